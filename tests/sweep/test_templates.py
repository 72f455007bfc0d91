"""Chat templates: the day is fixed, options are passed on, and faults are bad input."""

import shutil
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbench.errors import InputError
from kvbench.models.card import EMBEDDED
from kvbench.sweep.chat import Chat
from kvbench.sweep.command import template_date, template_options
from kvbench.sweep.plan import Settings, common_settings, context_tokens, encode_prompt
from kvbench.task import Sample

MESSAGES = "{% for m in messages %}user: {{ m['content'] }}\n{% endfor %}assistant:\n"
THINKING = "{% if enable_thinking is not defined or enable_thinking %}<think>\n"
THINKING += "{% else %}<think>\n\n</think>\n\n{% endif %}"


@pytest.fixture
def tokenizer_with(tmp_path: Path) -> Callable[[str], Any]:
    """Makes the embedded model's tokenizer with another chat template."""

    def make(template: str) -> Any:
        from transformers import AutoTokenizer

        folder = tmp_path / "m"
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copy(EMBEDDED["tiny"] / name, folder)
        (folder / "chat_template.jinja").write_text(template)
        return AutoTokenizer.from_pretrained(folder)

    return make


def test_the_day_is_fixed(tokenizer_with: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_with('{{ strftime_now("%d %b %Y, %A %-d") }}\n' + MESSAGES)
    text = Chat("2024-07-26").text(tokenizer, "Hi")
    assert text == "26 Jul 2024, Friday 26\nuser: Hi\nassistant:"
    assert Chat().text(tokenizer, "") != Chat("2024-07-26").text(tokenizer, "")
    assert str(datetime.now().year) not in Chat("1999-01-01").text(tokenizer, "")


@pytest.mark.parametrize(
    "template", [MESSAGES, "\n" + MESSAGES, "  {% if true %}\n  a{% endif %}b"]
)
def test_templates_without_a_day_are_as_they_were(
    template: str, tokenizer_with: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_with(template)
    turns = [{"role": "user", "content": "Hi"}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert Chat().text(tokenizer, "Hi") == expected


def test_options_are_passed_on(tokenizer_with: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_with(MESSAGES + THINKING)
    assert Chat().opens_thinking(tokenizer) == "<think>"
    off = Chat(options=template_options({"enable_thinking": "false"}))
    assert off.opens_thinking(tokenizer) is None
    assert off.text(tokenizer, "Hi").endswith("</think>\n\n")
    assert template_options({"a": "x", "b": "3"}) == (("a", "x"), ("b", 3))


def test_a_template_that_raises_is_bad_input(tokenizer_with: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_with("{{ raise_exception('a system message is needed') }}")
    with pytest.raises(InputError, match="a system message is needed"):
        Chat().text(tokenizer, "Hi")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "an end",
        ),
        ("{{ range(100000) | random }}" + MESSAGES, "something else each time"),
    ],
)
def test_a_template_that_loops_or_varies_is_bad_input(
    template: str, message: str, tokenizer_with: Callable[[str], Any]
) -> None:
    tracer = sys.gettrace()
    with pytest.raises(InputError, match=message):
        Chat().text(tokenizer_with(template), "Hi")
    assert sys.gettrace() is tracer


@pytest.mark.parametrize("template", ["", "Hello", MESSAGES.replace("m['content']", "m.role")])
def test_a_template_that_leaves_out_the_prompt_is_bad_input(
    template: str, tokenizer_with: Callable[[str], Any]
) -> None:
    sample = Sample("t", "any", 0, "Where is the badger?", ["x"], 4)
    with pytest.raises(InputError, match="leaves out the prompt"):
        encode_prompt(tokenizer_with(template), sample, chat=Chat())


def test_a_sample_may_say_what_its_turns_are(tokenizer_with: Callable[[str], Any]) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = tokenizer_with(template)
    question = {"role": "user", "content": "Who? "}
    start = {"role": "assistant", "content": "It is"}
    system = {"role": "system", "content": "Be short."}

    def text(*turns: dict[str, str]) -> str:
        sample = Sample("t", "any", 0, "plain", ["x"], 4, {"turns": turns})
        assert encode_prompt(tokenizer, sample, chat=None) == tokenizer.encode("plain")
        return str(tokenizer.decode(encode_prompt(tokenizer, sample, chat=Chat())))

    assert text(question) == "<user>Who? <end><assistant>"
    assert text(system, question) == "<system>Be short.<end><user>Who? <end><assistant>"
    assert text(question, start) == "<user>Who? <end><assistant>It is"
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = no_system + template
    assert text(system, question, start) == "<user>Who? <end><assistant>It is"


def test_the_context_is_found_where_the_prompt_is(tokenizer_with: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_with("You are a helpful assistant.\n" + MESSAGES)
    sample = Sample("t", "any", 0, "You are a cat. Meow?", "x", 4, question_at=8)
    prompt = encode_prompt(tokenizer, sample, chat=Chat())
    context = tokenizer.decode(prompt[: context_tokens(tokenizer, sample, prompt, chat=Chat())])
    assert context == "You are a helpful assistant.\nuser: You are"


def test_a_sample_must_say_where_its_question_starts() -> None:
    with pytest.raises(InputError, match=r"question starts .* use --compress prompt"):
        context_tokens(None, Sample("t", "any", 0, "Who?", "x", 4), [1, 2], chat=None)


def test_a_day_is_checked() -> None:
    assert template_date("2024-07-26") == "2024-07-26"
    with pytest.raises(InputError, match="not a day"):
        template_date("yesterday")


def test_what_the_template_is_given_is_recorded() -> None:
    model: Any = SimpleNamespace(
        name="m",
        fingerprint="f",
        dtype="torch.float32",
        device=SimpleNamespace(type="cpu"),
        attention="sdpa",
        long_rope=None,
    )
    settings = Settings(64, 0, 1, (8,), (0.5,), True, "2024-07-26", (("enable_thinking", False),))
    common = common_settings(model, settings)
    assert common["template_date"] == "2024-07-26"
    assert common["template_options"] == {"enable_thinking": False}
