"""Run folders put together: what does not belong together is refused, and nothing is lost."""

import errno
import os
from pathlib import Path

import pytest
from helpers.records import record, store

from kvbench.errors import InputError
from kvbench.records import read_records
from kvbench.run_folder import RUN_FILE
from kvbench.sweep.merge import merge

HOME = Path("nowhere")


def run(folder: Path, *samples: int, **common: object) -> Path:
    """A run folder with records of these samples."""
    return store(folder, [record("full", 1.0, sample, 1.0) for sample in samples], **common)


def test_folders_become_one_and_stay_as_they_are(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a", 0, 1), run(tmp_path / "b", 1, 2)
    before = sorted(path.name for path in first.iterdir())
    assert merge([first, second], tmp_path / "c", HOME) == (3, 0)
    assert sorted(path.name for path in first.iterdir()) == before
    with next(first.glob("samples-*")).open("ab") as file:  # the run goes on
        file.write(next(second.glob("samples-*")).read_bytes().replace(b"full/1.0/2", b"later"))
    assert merge([first, second], tmp_path / "c", HOME) == (4, 0)
    assert merge([tmp_path], tmp_path / "c", HOME) == (4, 0)  # a folder of run folders


def test_two_edited_copies_are_not_mixed(tmp_path: Path) -> None:
    first = run(tmp_path / "a", 0, 1, 2)
    file = next(first.glob("samples-*"))
    second = tmp_path / "b"
    second.mkdir()
    (second / RUN_FILE).write_bytes((first / RUN_FILE).read_bytes())
    lines = file.read_bytes().splitlines(keepends=True)
    (second / file.name).write_bytes(lines[0] + lines[2])
    file.write_bytes(lines[1] + lines[2])
    with pytest.raises(InputError, match="neither is an earlier state of the other"):
        merge([first, second], tmp_path / "c", HOME)
    assert not (tmp_path / "c").exists()
    assert len(read_records(first)) == 2


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    first = run(tmp_path / "a", 0)
    with pytest.raises(InputError, match="the only folder to merge"):
        merge([first], first, HOME)
    with pytest.raises(InputError, match="a holds a run with other settings"):
        merge([first, run(tmp_path / "b", 1, context=7, dtype="x")], tmp_path / "c", HOME)
    other = run(tmp_path / "d", 1)
    (other / RUN_FILE).unlink()
    with pytest.raises(InputError, match=r"no run\.json"):
        merge([first, other], tmp_path / "c", HOME)
    name = next(first.glob("samples-*")).name
    target = run(tmp_path / "e", 5)
    os.mkfifo(target / name)
    with pytest.raises(InputError, match="not a regular file"):
        merge([first], target, HOME)


def test_records_of_another_run_are_refused(tmp_path: Path) -> None:
    first = run(tmp_path / "a", 0, context=100)
    second = run(tmp_path / "b", 1, context=200)  # its record was copied: it says 100
    (second / RUN_FILE).rename(second / "old")
    (second / RUN_FILE).write_bytes((first / RUN_FILE).read_bytes().replace(b"100", b"200"))
    (first / RUN_FILE).write_bytes((second / RUN_FILE).read_bytes())
    with pytest.raises(InputError, match=r"context is 100, and 200 in the settings of this run"):
        merge([first, second], tmp_path / "c", HOME)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("written", range(5))
def test_a_full_disk_leaves_nothing(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [run(tmp_path / "a", 0), run(tmp_path / "b", 1)]
    before = sorted(tmp_path.rglob("*"))
    left = iter(range(written))
    sync = os.fsync

    def full(file: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device; choose another --out"):
        merge(folders, tmp_path / "new" / "c", HOME)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_lost_its_settings_is_not_continued(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 0)
    (folder / RUN_FILE).unlink()
    with pytest.raises(InputError, match=r"holds records but no run\.json"):
        run(folder, 1, dtype="bfloat16")
