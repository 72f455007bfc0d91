"""Records and run folders that are damaged: each is named, and the rest is reported."""

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.process import kvbench_here
from helpers.records import record

import kvbench
from kvbench.errors import InputError
from kvbench.records import SHOWN, from_line, read_records, to_line
from kvbench.report.build import make_report
from kvbench.run_folder import RUN_FILE, find_runs, read_settings

MEASURED: dict[str, Any] = {
    "kv_footprint": 0.5,
    "kv_peak": 0.75,
    "kv_reads": 0.5,
    "resident_rows": 50,
    "full_rows": 100,
    "patch_rows": 0,
    "replay_rows": 0,
    "prompt_tokens": 8,
    "new_tokens": 2,
    "timeline": [[0, 0], [8, 8], [8, 4], [10, 6]],
}
LINE = to_line(record("snapkv", 0.5, 1, 1.0, **MEASURED))
DAMAGED = 3  # the line


def with_values(**changes: Any) -> bytes:
    return json.dumps({**json.loads(LINE), **changes}).encode() + b"\n"


def without(*names: str) -> bytes:
    return (
        json.dumps({k: v for k, v in json.loads(LINE).items() if k not in names}).encode() + b"\n"
    )


def with_text(name: str, text: str) -> bytes:
    """The line with a field's JSON text as given."""
    old = json.dumps({name: json.loads(LINE)[name]}, separators=(",", ":"))[1:-1].encode()
    assert old in LINE
    return LINE.replace(old, f'"{name}":{text}'.encode("utf-8", "surrogatepass"), 1)


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


KINDS: dict[str, tuple[bytes, str]] = {
    # no JSON
    "empty": (b"\n", "truncated"),
    "blank": (b"   \n", "truncated"),
    "text": (b"hello\n", "malformed"),
    "cut": (LINE[:-40] + b"\n", "invalid character"),
    "cut in a text": (LINE[:20] + b"\n", "invalid character|truncated"),
    "cut in front": (LINE[30:], "malformed"),
    "two in a line": (LINE[:-1] + LINE, "trailing characters"),
    "comma at the end": (LINE[:-2] + b",}\n", "malformed"),
    "single quotes": (LINE.replace(b'"', b"'"), "malformed"),
    "NUL bytes": (b"\0" * 300 + b"\n", "malformed"),
    "a NUL byte in a text": (LINE.replace(b'"any"', b'"a\0y"'), "malformed"),
    "a raw control character": (LINE.replace(b'"any"', b'"a\x1by"'), "malformed"),
    "half overwritten by NUL": (LINE[:300] + b"\0" * 100 + LINE[400:], "malformed"),
    "not UTF-8": (LINE.replace(b'"any"', b'"\xff\xfe"'), "utf-8"),
    "Latin-1": (LINE.replace(b'"any"', b'"caf\xe9"'), "utf-8"),
    "an overlong encoding": (LINE.replace(b'"any"', b'"\xc0\xaf"'), "utf-8"),
    "UTF-16": (LINE.decode().encode("utf-16-le").replace(b"\n", b"") + b"\n", "malformed"),
    "a surrogate half, escaped": (with_text("subtask", '"\\ud800"'), "surrogate pair"),
    "a low surrogate half": (with_text("subtask", '"\\udc00x"'), "surrogate|malformed|truncated"),
    "a surrogate half, raw": (with_text("subtask", '"\ud800"'), "utf-8"),
    "a surrogate half in a key": (with_text("options", '{"\\ud800":1}'), "surrogate|malformed"),
    "a bad escape": (with_text("subtask", '"\\x41"'), "malformed"),
    "NaN": (with_text("score", "NaN"), "malformed"),
    "Infinity": (with_text("kv_peak", "Infinity"), "malformed"),
    "minus Infinity": (with_text("kv_reads", "-Infinity"), "malformed"),
    "NaN in options": (with_text("options", '{"a":NaN}'), "malformed"),
    "a number out of range": (with_text("score", "1e999"), "score: Number out of range"),
    "a number out of range in the reference": (with_text("reference", "[1e999]"), "out of range"),
    "a leading zero": (with_text("sample", "01"), "malformed"),
    "a plus sign": (with_text("sample", "+1"), "malformed"),
    "hexadecimal": (with_text("sample", "0x1"), "malformed"),
    "a comment": (LINE.replace(b"{", b"{/* no */", 1), "malformed"),
    # another JSON
    "a list": (b"[" + LINE[:-1] + b"]\n", "Expected object, got array"),
    "a text of JSON": (json.dumps(LINE.decode()).encode() + b"\n", "Expected object, got str"),
    "a number": (b"1\n", "Expected object, got int"),
    "null": (b"null\n", "Expected object, got null"),
    "an empty object": (b"{}\n", "missing required field fingerprint"),
    "a log line": (b'{"level":"info","msg":"started"}\n', "missing required field"),
    # lists in lists
    "no end of lists": (b"[" * 100_000 + b"\n", "Expected object|lists in lists"),
    "no end of lists in a field": (with_text("reference", "[" * 100_000), "lists in lists"),
    "a deep reference": (with_text("reference", deep(900)), "nested more than 50 deep"),
    "deep options": (with_text("options", '{"a":' * 90 + "1" + "}" * 90), "nested more than 50"),
    "lists in an unknown field": (LINE.replace(b"{", b'{"new":' + b"[" * 5000, 1), "lists|malf"),
    # keys
    "a key twice": (
        LINE.replace(b'"score":1.0', b'"score":1.0,"score":0.0'),
        "score is there twice",
    ),
    "a key twice, apart": (LINE[:-2] + b',"score" : 0.0}\n', "score is there twice"),
    "an option twice": (with_text("options", '{"w":1,"w":2}'), "w is there twice"),
    "keys in capitals": (LINE.replace(b'"score"', b'"Score"'), "lacks score"),
    **{
        f"no {name}": (without(name), f"missing required field {name}")
        for name in ("fingerprint", "model", "task", "subtask", "method", "family", "options")
    },
    **{
        f"no {name}": (without(name), f"missing required field {name}")
        for name in ("budget", "prefill_chunk", "sample", "sample_seed", "context", "finished")
    },
    **{
        f"neither error nor {name}": (with_values(**{name: None}), f"lacks {name}")
        for name in ("prediction", "score", "kv_footprint", "kv_peak")
    },
    "neither error nor measured fields": (
        without(*MEASURED, "score"),
        "it has no error, and lacks",
    ),
    # types
    "a score as a text": (with_values(score="1.0"), "score: Expected float"),
    "a score as a list": (with_values(score=[1]), "score: Expected float"),
    "a score as an object": (with_values(score={}), "score: Expected float"),
    "a score of true": (with_values(score=True), "score: Expected float"),
    "a model as a number": (with_values(model=1), "model: Expected str"),
    "a model of null": (with_values(model=None), "model: Expected str"),
    "a sample as a fraction": (with_values(sample=1.5), "sample: Expected int"),
    "a sample as a text": (with_values(sample="1"), "sample: Expected int"),
    "options as a list": (with_values(options=[]), "options: Expected object"),
    "options as a text": (with_values(options="{}"), "options: Expected object"),
    "a prediction as a list": (with_values(prediction=["y"]), "prediction: Expected str"),
    "chat as a number": (with_values(chat=1), "chat: Expected bool"),
    "an error as an object": (with_values(error={}), "error: Expected str"),
    "a time as a number": (with_values(finished=1764000000), "finished: Expected str"),
    "no time": (with_values(finished="zzz"), "finished: Expected str matching"),
    "an unknown compress": (with_values(compress="both"), "compress: Invalid enum value"),
    # ranges
    "a score of -1": (with_values(score=-1), "score: Expected float >= 0"),
    "a score of 2": (with_values(score=2), "score: Expected float <= 1"),
    "a score of 100": (with_values(score=100.0), "score: Expected float <= 1"),
    "a budget of -0.5": (with_values(budget=-0.5), "budget: Expected float >= 0"),
    "a budget of 30": (with_values(budget=30), "budget: Expected float <= 1"),
    "a footprint of 3": (with_values(kv_footprint=3.0), "kv_footprint: Expected float <= 1"),
    "a footprint below 0": (with_values(kv_footprint=-0.1), "kv_footprint: Expected float >= 0"),
    "reads below 0": (with_values(kv_reads=-1), "kv_reads: Expected float >= 0"),
    "a peak below 0": (with_values(kv_peak=-1), "kv_peak: Expected float >= 0"),
    "a sample of -1": (with_values(sample=-1), "sample: Expected int >= 0"),
    "a seed of -1": (with_values(sample_seed=-1), "sample_seed: Expected int >= 0"),
    "a context of -1": (with_values(context=-1), "context: Expected int >= 0"),
    "a chunk of 0": (with_values(prefill_chunk=0), "prefill_chunk: Expected int >= 1"),
    "rows below 0": (with_values(full_rows=-100), "full_rows: Expected int >= 0"),
    "bytes below 0": (with_values(kv_bytes_peak=-1), "kv_bytes_peak: Expected int >= 0"),
    "seconds below 0": (with_values(decode_seconds=-1.0), "decode_seconds: Expected float >= 0"),
    "tokens below 0": (with_values(new_tokens=-1), "new_tokens: Expected int >= 0"),
    "a huge sample": (with_values(sample=2**70), "sample: "),
    "a number of 5000 digits": (with_text("full_rows", "9" * 5000), "full_rows: "),
    "a large float": (with_values(kv_peak=1e308), "kv_peak: Expected float <="),
    # contradictions
    "another footprint": (with_values(kv_footprint=0.4), "kv_footprint is 0.4, but 50 of 100"),
    "more rows than full": (with_values(resident_rows=150), "150 of 100 rows are resident"),
    "no rows of full attention": (with_values(full_rows=0), "50 of 0 rows are resident"),
    "more read than held": (with_values(kv_reads=0.9), "kv_reads is 0.9, more than kv_footprint"),
    "a peak without a reason": (with_values(kv_peak=1.5), "kv_peak is 1.5; expected at most 1"),
    "no rows at all": (with_values(resident_rows=0, full_rows=0), "full_rows is 0; expected 1 or"),
    "a budget of 0": (with_values(budget=0), "budget is 0; expected more"),
    "no such day": (with_values(finished="2026-02-31T00:00:00"), "day is out of range"),
    "an absurd peak": (with_values(kv_peak=9e18, patch_rows=None), "kv_peak is 9e.*; expected at"),
    "a held peak without a reason": (with_values(kv_held_peak=9), "kv_held_peak is 9.0; expected"),
    # timelines
    "a timeline as a text": (with_values(timeline="x"), "timeline: Expected array"),
    "a point of one": (with_values(timeline=[[1]]), r"timeline\[0\]: Expected array"),
    "a point of three": (with_values(timeline=[[1, 2, 3]]), r"timeline\[0\]: Expected array"),
    "a point of texts": (with_values(timeline=[["1", "2"]]), r"timeline\[0\]\[0\]: Expected int"),
    "a point of fractions": (with_values(timeline=[[0, 0.5]]), r"timeline\[0\]\[1\]: Expected int"),
    "a point of null": (with_values(timeline=[None]), r"timeline\[0\]: Expected array"),
    "a point below 0": (with_values(timeline=[[0, 0], [1, -1]]), r"timeline\[1\]\[1\]: Expected"),
    "points that go back": (with_values(timeline=[[0, 0], [5, 5], [4, 4]]), "rows of its points"),
}


def run_with(folder: Path, line: bytes) -> Path:
    """A run folder whose third line is `line`; the file of records."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "samples-x.jsonl"
    full = [to_line(record("full", 1.0, i, 1.0)) for i in range(3)]
    rows = [to_line(record("snapkv", 0.5, i, 1.0, **MEASURED)) for i in (0, 2)]
    file.write_bytes(b"".join([full[0], rows[0], line, full[1], rows[1], full[2]]))
    return file


def test_a_sound_line_is_read(tmp_path: Path) -> None:
    assert to_line(from_line(LINE)) == LINE
    run_with(tmp_path, LINE)
    report = make_report([tmp_path])
    assert not report.damaged
    assert [curve.samples for curve in report.curves] == [3, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_line_is_named_and_the_rest_is_reported(kind: str, tmp_path: Path) -> None:
    line, reason = KINDS[kind]
    file = run_with(tmp_path, line)
    report = make_report([tmp_path])
    (damage,) = report.damaged
    assert report.notes[0] == damage
    before, _, told = damage.partition(": not a record of kvbench ")
    assert before == f"left out: {file}, line {DAMAGED}"
    assert told.startswith("(")
    assert len(told) < 200
    with pytest.raises(ValueError, match=f"(?i){reason}"):
        from_line(line)
    assert [(c.method, [p.samples for p in c.points]) for c in report.curves] == [
        ("full", [3]),
        ("snapkv", [2]),
    ]


def test_kinds_of_damage_are_many() -> None:
    assert len(KINDS) >= 73


@pytest.mark.parametrize(
    "line",
    [
        LINE[:-1] + b"\r\n",
        LINE.replace(b'":', b'" : '),
        LINE.replace(b"{", b' {"of a later version": {"score": 7}, ', 1),
        with_values(score=1),
        with_values(kv_peak=1.1, patch_rows=1),
        with_values(error="out of memory", score=None, kv_footprint=None, kv_peak=None),
        with_values(reference=[{"a": 1}, {"a": 2}]),
        with_values(prediction='"score": 1, "score": 2', subtask="\\"),
        with_values(task="[/v2] \x1b[31m \u202e $\\frac{$", method="\u0000"),
        with_text("reference", deep(40)),
        without(*(name for name in MEASURED if name not in ("kv_footprint", "kv_peak"))),
    ],
)
def test_what_is_odd_but_says_the_same_is_read(line: bytes, tmp_path: Path) -> None:
    run_with(tmp_path, line)
    assert len(read_records(tmp_path)) == 6


def test_a_byte_order_mark_before_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "samples-x.jsonl").write_bytes(
        b"\xef\xbb\xbf" + LINE + LINE.replace(b"/1/", b"/2/")
    )
    assert len(read_records(tmp_path)) == 2


def test_the_command_writes_the_report_and_ends_with_code_2(tmp_path: Path) -> None:
    run_with(tmp_path / "r", with_values(score=7))
    done = kvbench_here("report", "r", folder=tmp_path)
    assert done.returncode == 2
    assert "snapkv" in done.stdout
    assert "samples-x.jsonl, line 3: not a record of kvbench (score: " in done.stderr
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "samples-x.jsonl, line 3: not a record" in page
    assert "samples-x.jsonl, line 3: not a record" in kvbench_here(
        "report", "r", "--format", "markdown", folder=tmp_path
    ).stdout.replace("\\", "")


COMMON: dict[str, Any] = {
    **{"model": "m", "context": 100, "seed": [0, 2]},
    **{"compress": "prompt", "chat_template": False},
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "other"}, "model is other, and m in the settings"),
        ({"context": 50}, "context is 50, and 100 in the settings"),
        ({"context": 50, "source": "a.jsonl"}, ""),  # a sample that was read has its own
        ({"sample_seed": 1}, r"seed is 1, and \[0, 2\] in the settings"),
        ({"sample_seed": 2}, ""),
        ({"compress": "context"}, "compress is context, and prompt in the settings"),
        ({"chat": True}, "chat_template is True, and False in the settings"),
        ({"chat": False}, ""),
    ],
)
def test_a_record_of_other_settings_than_its_run_is_named(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    run_with(tmp_path, with_values(**changes))
    (tmp_path / RUN_FILE).write_text(json.dumps({"common": COMMON}))
    damaged = "\n".join(make_report([tmp_path]).damaged)
    assert ("line 3: not a record" in damaged) == bool(told)
    assert re.search(told, damaged)
    found = read_records(tmp_path, [], COMMON)  # what a run that goes on does not measure again
    assert len(found) == (5 if told else 6)


def test_many_damaged_lines_are_counted(tmp_path: Path) -> None:
    run_with(tmp_path, b"{}\n" * 100)
    report = make_report([tmp_path])
    assert len(report.damaged) == SHOWN + 1
    assert report.damaged[-1] == f"left out: and {100 - SHOWN} more like this"
    assert [curve.samples for curve in report.curves] == [3, 2]


def test_from_python_a_damaged_line_is_a_warning(tmp_path: Path) -> None:
    run_with(tmp_path, b"{}\n")
    with pytest.warns(UserWarning, match="line 3: not a record"):
        assert len(kvbench.load_records(tmp_path)) == 5
    with pytest.raises(InputError, match="line 3: not a record"):
        read_records(tmp_path)


def bind(path: Path) -> None:
    """A socket at a path of any length."""
    with socket.socket(socket.AF_UNIX) as made:
        short = Path(f"/proc/self/fd/{os.open(path.parent, os.O_RDONLY)}") / path.name
        made.bind(str(short))


def loop(path: Path) -> None:
    path.symlink_to(path)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "socket": bind,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": loop,
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_named_and_hangs_nothing(kind: str, tmp_path: Path) -> None:
    run_with(tmp_path, LINE)
    bad = tmp_path / "samples-bad.jsonl"
    NO_FILES[kind](bad)
    report = make_report([tmp_path])
    assert report.damaged[0].startswith(f"left out: cannot read {bad}: ")
    assert [curve.samples for curve in report.curves] == [3, 3]


@pytest.mark.parametrize("kind", [kind for kind in NO_FILES if kind != "link to nothing"])
def test_a_run_json_that_is_no_file(kind: str, tmp_path: Path) -> None:
    run_with(tmp_path / "r", LINE)
    NO_FILES[kind](tmp_path / "r" / RUN_FILE)
    done = kvbench_here("report", "r", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"cannot read {Path('r') / RUN_FILE}: " in done.stderr


@pytest.mark.parametrize("kind", [kind for kind in NO_FILES if kind != "link to nothing"])
def test_an_invocation_that_is_no_file(kind: str, tmp_path: Path) -> None:
    run_with(tmp_path, LINE)
    (tmp_path / RUN_FILE).write_text('{"common": {}}')
    bad = tmp_path / "invocation-bad.json"
    NO_FILES[kind](bad)
    with pytest.raises(InputError, match=f"cannot read {bad}: .*; make it readable, or move it aw"):
        make_report([tmp_path])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is damaged"),
        ("[]", "is damaged"),
        ("{", "is damaged"),
        ("\ufeff{}", "is damaged"),
        ("{}", "missing required field"),
        ('{"common": [], "invocations": []}', "common"),
        ('{"common": {}, "invocations": {}}', "invocations"),
        ('{"common": {}, "invocations": [1]}', "invocations"),
        ('{"common": {}, "invocations": [{"codes": []}]}', "codes"),
        ('{"common": {}, "invocations": [{"codes": {"samples recall": 1}}]}', "codes"),
        ('{"common": {}, "invocations": [{"skipped": {"recall": 3}}]}', "skipped"),
        ('{"common": {}, "invocations": [{"experiment": []}]}', "experiment"),
        ('{"common": {}, "invocations": [{"experiment": {"tasks": 3}}]}', "tasks"),
        ('{"common": {}, "invocations": [{"started": 3}]}', "started"),
        ('{"common": {"a": ' + deep(600) + '}, "invocations": []}', "nested"),
        ("[" * 100_000, "is damaged"),
        ('{"common": {}, "common": {}}', "common is there twice"),
        ('{"common": {}, "invocations": [{"settings": {"samples": 1e99}}]}', "samples"),
        ('{"format": "3", "common": {}}', "its format is '3'; expected a whole number like 2"),
        *(
            (f'{{"format": {number}, "common": {{}}}}', "its format is ")
            for number in ("3.0", "[3]", "1e99", "null", "true", "0", "-1")
        ),
        ('{"format": 3, "other": "keys"}', "newer kvbench wrote it"),
        ('{"format": 99, "common": {}, "invocations": []}', "newer kvbench wrote it"),
    ],
)
def test_a_damaged_run_json_is_one_line(text: str, told: str, tmp_path: Path) -> None:
    run_with(tmp_path / "r", LINE)
    (tmp_path / "r" / RUN_FILE).write_text(text, encoding="utf-8")
    done = kvbench_here("report", "r", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert str(Path("r") / RUN_FILE) in done.stderr
    assert told in done.stderr


def test_odd_settings_are_shown(tmp_path: Path) -> None:
    run_with(tmp_path / "r", LINE)
    odd = {"common": {"a": None, "b": [1, {"c": "\ud800"}]}, "invocations": [{"d": {"e": {}}}]}
    (tmp_path / "r" / RUN_FILE).write_text(json.dumps(odd))
    assert read_settings(tmp_path / "r") == odd
    done = kvbench_here("report", "r", folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_folders_that_cannot_be_read_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "results" / "runs"
    run_with(home / "good", LINE)
    run_with(home / "locked", LINE)
    stat = os.stat

    def denied(path: Any, *more: Any, **how: Any) -> os.stat_result:
        if "locked/" in str(path):  # as for a user who may not enter it
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *more, **how)

    monkeypatch.setattr(os, "stat", denied)
    assert [run.name for run in find_runs(home)] == ["good"]
    done = kvbench_here("report", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote critical.csv" in done.stderr
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    done = kvbench_here("report", "locked", folder=tmp_path)
    assert done.returncode == 2
    assert "cannot read results/runs/locked: permission denied" in done.stderr
