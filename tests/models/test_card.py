"""Damaged model cards: each is refused in one line that names the file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.process import kvbench_here

from kvbench.errors import InputError
from kvbench.models.card import EMBEDDED, ModelCard, read_card


def card(**changes: Any) -> bytes:
    whole = json.loads((EMBEDDED["tiny"] / "kvbench.json").read_text())
    return json.dumps(whole | changes).encode()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\0" * 100, "Expecting value"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"notes": {"a": "\xe9"}}', "can't decode"),
        (card().decode().encode("utf-16"), "can't decode"),
        (b'{"notes": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"context": 1' + b"0" * 5000 + b"}", "digits"),
        (b'{"context": 512, "context": 1024}', "it has 'context' twice"),
        (b'{"notes": {"rate": NaN}}', "NaN is not a value of JSON"),
        (card(contxt=512), "did you mean 'context'?"),
        (card(context=-1), "context must be at least 0"),
        (card(context="1024"), "context must be a whole number"),
        (card(context=True), "context must be a whole number"),
        (card(prefill_chunk=[256]), "prefill_chunk must be a whole number"),
        (card(options=[]), "options must be a dictionary"),
        (card(options=None), "options is null"),
        (card(options={"snapkv": None}), "options.snapkv is null"),
        (card(options={"snapkv": {"windw": 8}}), "did you mean 'window'?"),
        (card(options={"snapkv": {"window": "wide"}}), "option window must be int"),
        (card(options={"snapkv": {"window": -8}}), "window must be at least 1"),
        (card(options={"prulong": {"scores": {}}}), "option scores must be Path"),
        (card(training=None), "training is null"),
        (card(training={"prulong": 3}), "training.prulong must be a dictionary"),
        (card(notes="mine"), "notes must be a dictionary"),
    ],
)
def test_a_damaged_card_is_refused(contents: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "kvbench.json"
    path.write_bytes(contents)
    with pytest.raises(InputError) as caught:
        read_card(tmp_path)
    assert str(caught.value).startswith(f"'{path}' is not a model card: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda p: p.symlink_to(p)],
)
def test_a_card_that_is_no_file_is_refused(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "kvbench.json")
    with pytest.raises(InputError, match=r"kvbench.json' is not a model card"):
        read_card(tmp_path)


def test_two_files_of_head_scores_are_refused(tmp_path: Path) -> None:
    for name in ("scores-prulong.tsv", "scores-prulong.json"):
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=r"prulong.json' and .*prulong.tsv' are both head scores"):
        read_card(tmp_path)


def test_a_card_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "kvbench.json").write_bytes(b"\xef\xbb\xbf" + card())
    whole = read_card(EMBEDDED["tiny"])
    assert read_card(tmp_path).context == whole.context


def test_options_of_methods_that_are_not_here_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "kvbench.json").write_bytes(card(options={"elsewhere": {"window": 8}}))
    assert read_card(tmp_path).options == {"elsewhere": {"window": 8}}
    assert read_card(tmp_path / "nowhere") == ModelCard()


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({"context": 10**6}, "run --task rag --samples 1 --out r"),
        ({"training": {"prulong": {"stps": 3}}}, "train prulong --steps 1 --out r"),
        ({"training": {"prulong": {"steps": "many"}}}, "train prulong --out r"),
    ],
)
def test_what_only_a_command_can_see_names_the_card_too(
    changes: dict[str, Any], command: str, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    for file in EMBEDDED["tiny"].glob("[!k]*"):
        if file.is_file():
            (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "m" / "kvbench.json").write_bytes(card(**changes))
    done = kvbench_here(*command.split(), "--model", "./m", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "'m/kvbench.json'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "r").exists()
