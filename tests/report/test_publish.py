"""What a report's folder holds, and that nothing is drawn twice."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.disk import full_after
from helpers.records import record, store

from kvbench.errors import InputError
from kvbench.files import write_atomically, write_together
from kvbench.learning.pictures import save_training_pictures
from kvbench.report import publish as module
from kvbench.report.build import make_report, report_records
from kvbench.report.publish import publish


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder."""
    rows = [record("full", 1.0, i, 1.0) for i in range(12)]
    rows += [record("snapkv", b, i, b) for i in range(12) for b in (0.2, 0.8)]
    return store(tmp_path / "run", rows)


def test_the_same_report_is_not_drawn_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name for path in run.iterdir()}
    first = publish(make_report([run], 0.9), run)
    assert first.written
    assert first.message.startswith("wrote critical.csv")
    names = {path.name for path in first.files}
    assert {"critical.csv", "differences.csv", "recall.png", "recall.pdf", "report.html"} <= names
    assert {path.name for path in run.iterdir()} == before | names | {".report.json"}
    monkeypatch.setattr(module, "_files", lambda report: pytest.fail("it was drawn again"))
    second = publish(make_report([run], 0.9), run)
    assert not second.written
    assert second.files == first.files
    assert "up to date" in second.message


@pytest.mark.parametrize("change", ["altered", "deleted", "stamp", "record", "threshold", "latest"])
def test_whatever_changes_the_report_is_drawn_again(run: Path, change: str) -> None:
    before = publish(make_report([run], 0.9), run)
    picture, stamp = run / "recall.png", run / ".report.json"
    drawn = picture.read_bytes()
    if change == "altered":
        picture.write_bytes(drawn[:-1])
    if change == "deleted":
        picture.unlink()
    if change == "stamp":
        stamp.write_text("[]")
    if change == "record":
        store(run, [record("snapkv", 0.5, i, 1.0) for i in range(12)])
    threshold = 0.8 if change == "threshold" else 0.9
    after = publish(make_report([run], threshold, latest=change == "latest"), run)
    assert after.written
    assert [path.name for path in after.files] == [path.name for path in before.files]
    if change in ("altered", "deleted", "stamp"):
        assert picture.read_bytes() == drawn


def test_changed_code_draws_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(make_report([run], 0.9), run)
    monkeypatch.setattr(module, "version", lambda name: "another")
    assert publish(make_report([run], 0.9), run).written


def test_a_report_of_records_in_memory_is_always_written(tmp_path: Path) -> None:
    report = report_records([record("full", 1.0, 0, 1.0)], 0.9)
    assert publish(report, tmp_path).written
    assert publish(report, tmp_path).written


@pytest.mark.parametrize("written", [0, 1, 5])
def test_a_full_disk_leaves_the_old_report(
    written: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(make_report([run], 0.9), run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    full_after(written, monkeypatch)
    with pytest.raises(InputError, match="No space left on device; choose another --out"):
        publish(make_report([run], 0.8), run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_an_interrupt_leaves_no_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_together({tmp_path / "a": "x", tmp_path / "b": b"y"})
    assert not list(tmp_path.iterdir())


def test_pictures_of_a_training_are_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = "[/v2] $\\frac{$\x1b[31m"
    recipe: Any = SimpleNamespace(method="prulong", model=odd, steps=2, seed=0, target=0.5)
    log = [{"step": i, "loss": 1.0, "sparsity": 0.1, "target": 0.2} for i in range(2)]
    files = save_training_pictures(log, [[0.1, 0.9]], tmp_path / "training", recipe)
    assert [path.read_bytes()[:4] for path in files] == [b"\x89PNG", b"%PDF"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_training_pictures(log, [[0.2, 0.1]], tmp_path / "training", recipe)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_atomically(path, "é")
    assert path.read_bytes() == "é".encode()
    with pytest.raises(OSError, match="No such file"):
        write_atomically(tmp_path / "no" / "file", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "folder", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
