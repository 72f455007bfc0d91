"""Names that are commands to a terminal, a spreadsheet, a formula or a file system."""

import csv
import io
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import matplotlib.image
import pytest
from helpers.process import kvbench_here
from helpers.records import record, store
from pandas import DataFrame

from kvbench import escape
from kvbench.cli.list import print_listing
from kvbench.records import Record
from kvbench.report.figures import Picture

NAMES = {
    "closing markup": "[/v2]",
    "a version": "[v2]",
    "opening markup": "[bold]",
    "a link of markup": "[link=http://example.com]x[/link]",
    "an emoji of markup": ":warning:",
    "colours": "\x1b[31mred\x1b[0m",
    "title of the window": "\x1b]0;owned\x07",
    "an escape of eight bits": "\x9b31m",
    "backspaces": "good\b\b\b\bevil",
    "a formula of TeX": "$\\frac{$",
    "half a formula": "a$b",
    "TeX": "\\input{/etc/passwd}%_&#^~",
    "a formula of a spreadsheet": "=cmd|' /C calc'!A0",
    "plus": "+1+1",
    "minus": "-2+3",
    "at": "@SUM(1)",
    "a tab": "\t=1",
    "a carriage return": "\r=1",
    "line ends": "a\nb\r\nc\u2028d",
    "nothing but a line end": "\n",
    "a note": "x\nkvbench: all is well",
    "right to left": "abc\u202egnp.exe",
    "isolates": "\u2067\u2066x\u2069",
    "zero width": "a\u200bb\ufeffc",
    "NUL": "a\x00b",
    "HTML": "</title><script>alert(1)</script>",
    "an attribute": '" onmouseover="alert(1)',
    "a template": "{{ 7 * 7 }}{% raw %}",
    "Markdown": "`*_|~ [x](http://example.com) <!-- -->",
    "a table row": "a | b |",
    "a path": "../../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "a hidden file": ".hidden",
    "dots": "..",
    "a device of Windows": "NUL",
    "an underscore": "_hidden",
    "emoji": "🤖👩‍👩‍👧",
    "Chinese": "注意力",
    "Arabic": "انتباه",
    "combining": "Z" + "\u0301" * 40,
    "a space": " ",
    "nothing": "",
    "long": "x" * 5000,
    "long words": "word " * 1000,
    "format": "%s {0} {name!r}",
    "a quote": "'\"",
}
NUMBER = re.compile(r"-?\d+(\.\d+)?(e-\d+)?")
HIDDEN = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\u200b\ufeff]"
)


def rows_of(methods: Iterable[str] = ("snapkv",), **names: Any) -> list[Record]:
    """Records of full attention and other methods; with timelines and bytes, for all pictures."""
    names = {"timeline": [[0, 0], [8, 8], [8, 4], [10, 6]], "kv_bytes_peak": 100, **names}
    rows = []
    for i in range(3):
        for method in methods:
            more: dict[str, Any] = {"method": method, "family": method, "options": {method: method}}
            found = record("x", 0.5, i, 0.5 * i)
            rows.append(replace(found, **names, **more, fingerprint=f"{names} {method!r} {i}"))
        found = record("full", 1.0, i, 1.0)
        rows.append(replace(found, **names, fingerprint=f"{names} full {i}"))
    return rows


def reported(folder: Path, *more: str) -> CompletedProcess[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return kvbench_here("report", "run", *more, folder=folder)


def check_files(run: Path, pictures: int) -> None:
    """That the files of a report are whole, and nothing in them is a command."""
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2
    assert not HIDDEN.search(re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    for picture in run.glob("*.png"):
        assert matplotlib.image.imread(picture).std() > 0
    files = [path.name for path in run.iterdir()]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,120}", file) for file in files)
    assert len({file.lower() for file in files if file.endswith(".png")}) == pictures
    for name in ("critical.csv", "differences.csv"):
        rows = list(csv.reader(io.StringIO((run / name).read_text(encoding="utf-8"))))
        assert {len(row) for row in rows} == {len(rows[0])}
        for cell in (cell for row in rows for cell in row):
            assert NUMBER.fullmatch(cell) or not re.match(r"[=+\-@\t\r]", cell)
            assert not HIDDEN.search(cell)


def test_methods_of_any_name_in_any_medium(tmp_path: Path) -> None:
    names = [name for name in NAMES.values() if name]
    odd = "[/v2] $\\frac{$ =1\x1b[31m\n\u202e"
    texts = dict.fromkeys(("model", "task", "subtask", "prompt_tail", "reference"), odd)
    run = store(tmp_path / "run", rows_of(names, **texts), model=odd, **{odd: [odd]})
    done = reported(tmp_path)
    assert done.returncode == 0, done.stderr
    assert not HIDDEN.search(done.stdout + done.stderr)
    for name in names:
        if len(name) < 30 and name.isascii():
            assert escape.plain(name).strip() in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    check_files(run, pictures=4)

    markdown = reported(tmp_path, "--format", "markdown").stdout
    table = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len(table) == 3 + len(names)  # header, line, full attention
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}
    assert not HIDDEN.search(markdown)
    latex = reported(tmp_path, "--format", "latex").stdout
    assert not re.search(r"(?<!\\)\\input|\\\\\s*[\[*]|(?<!\\)%", latex)
    assert not HIDDEN.search(latex)
    rows = json.loads(reported(tmp_path, "--format", "json").stdout)
    assert {row["method"] for row in rows} == {"full", *names}


def test_each_task_has_a_picture_of_its_own(tmp_path: Path) -> None:
    names = ["a b", "a-b", "A B", "../a b", "..", "", "_x", *("y" * 4999 + end for end in "pq")]
    run = store(tmp_path / "run", [row for name in names for row in rows_of(task=name)])
    done = reported(tmp_path)
    assert done.returncode == 0, done.stderr
    check_files(run, pictures=len(names) + 3)  # and those over all tasks


@pytest.mark.parametrize("name", ["[/v2]\x1b[31m", "a\nb\udcff", "y" * 250])
def test_folders_of_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what a picture shows does not depend on folders, and rendering takes seconds
    monkeypatch.setattr(Picture, "files", lambda self: {f"{self.stem}.png": b"drawn elsewhere"})
    store(tmp_path / "runs" / name, rows_of())
    store(tmp_path / "runs" / "other", rows_of(), device=name)
    for arguments in (["runs"], [f"runs/{name}"], ["runs", "--out", f"out{name}"]):
        done = kvbench_here("report", *arguments, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not HIDDEN.search(done.stdout + done.stderr)
    missing = kvbench_here("report", f"no {name}", folder=tmp_path)
    told = escape.plain(name.replace("\n", " "))  # an error is one line
    assert missing.returncode == 2
    assert missing.stderr.startswith(f"kvbench: no run directory 'no {told[:20]}")
    assert len(missing.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["[/v2]", "\x1b[31m", "\u202e", "a\nkvbench: b", "\udcff"])
def test_errors_show_any_name(name: str, tmp_path: Path) -> None:
    for command in (
        ["run", "--model", name],
        ["run", "--method", f"x{name}"],
        ["run", "--task", f"x{name}"],
        ["run", "--option", f"{name}.x=1"],
        ["run", "--config", f"{name}x"],
        ["list", f"x{name}"],
        ["check", f"x{name}"],
        ["report", f"{name}x"],
        [f"x{name}"],
    ):
        done = kvbench_here(*command, folder=tmp_path)
        assert done.returncode == 2, (command, done.stderr)
        assert len(done.stderr.splitlines()) == 1
        assert not HIDDEN.search(done.stderr)


def test_a_list_of_plug_ins_of_any_name(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "method": name,
            "about": name,
            "family": name,
            "variants": [name],
            "options": {name: name},
            "on_models": {name: {name: name}},
            "option_types": {name: name},
            "option_help": {name: name},
        }
        for name in NAMES.values()
    ]
    print_listing({"methods": rows})
    listed = capsys.readouterr().out
    assert not HIDDEN.search(listed)
    for name in NAMES.values():
        if 0 < len(name) < 30 and name.isascii():
            assert escape.plain(name).strip() in listed


@pytest.mark.parametrize("kind", NAMES)
def test_each_medium_shows_a_name_in_one_line(kind: str) -> None:
    name = NAMES[kind]
    shown = escape.plain(name)
    assert not HIDDEN.search(shown)
    assert "\n" not in shown
    assert all(unicodedata.category(c) not in ("Cc", "Cs") for c in shown)
    if name.isprintable():
        assert shown == name
    assert "\n" not in escape.markdown(name) + escape.latex(name)
    assert re.fullmatch(r"[A-Za-z0-9._-]+", escape.file_name(name))
    assert not escape.file_name(name).startswith(".")


def test_numbers_of_a_csv_stay_numbers() -> None:
    frame = DataFrame({"text": ["-x", "x-", None], "number": [-1.5, 2, None], "n": [-1, 0, 1]})
    assert escape.csv(frame) == "text,number,n\n'-x,-1.5,-1\nx-,2.0,0\n,,1\n"


def test_markdown_and_latex_show_what_is_meant() -> None:
    assert escape.markdown("html_to_tsv <= 3 & [x]") == "html_to_tsv ≤ 3 &amp; \\[x\\]"
    assert escape.markdown("_x_ a_b `c` $d$") == "\\_x\\_ a_b \\`c\\` \\$d\\$"
    assert escape.latex("<=80 [a_b] 5%") == "$\\leq$80 {[}a\\_b{]} 5\\%"
