"""Run folders put together: what does not belong together is refused, and nothing is lost."""

import os
from pathlib import Path

import pytest
from helpers.disk import full_after
from helpers.records import record, store

from kvbench import run_folder
from kvbench.errors import InputError
from kvbench.records import read_records, to_line
from kvbench.report.build import make_report
from kvbench.run_folder import RUN_FILE, RunWriter
from kvbench.sweep.merge import merge

HOME = Path("nowhere")
LATER = "2026-01-02T00:00:00"


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
    with pytest.raises(InputError, match="b holds a run with other settings"):
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
    for path in tmp_path.rglob("invocation-*"):
        path.write_text("{}")  # of before the hash of the settings was kept
    with pytest.raises(InputError, match=r"context is 100, and 200 in the settings of this run"):
        merge([first, second], tmp_path / "c", HOME)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("written", range(5))
def test_a_full_disk_leaves_nothing(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [run(tmp_path / "a", 0), run(tmp_path / "b", 1)]
    before = sorted(tmp_path.rglob("*"))
    full_after(written, monkeypatch)
    with pytest.raises(InputError, match="No space left on device; choose another --out"):
        merge(folders, tmp_path / "new" / "c", HOME)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_lost_its_settings_is_not_continued(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 0)
    (folder / RUN_FILE).unlink()
    with pytest.raises(InputError, match=r"holds records but no run\.json"):
        run(folder, 1, dtype="bfloat16")


def test_of_two_measurements_the_later_counts_in_merge_and_report_and_both_say_so(
    tmp_path: Path,
) -> None:
    first = run(tmp_path / "a", 0, 1)
    again = record("full", 1.0, 1, 0.5, fingerprint="full/1.0/1/{}", finished=LATER)
    same = record("full", 1.0, 0, 1.0, fingerprint="full/1.0/0/{}", finished=LATER)
    second = store(tmp_path / "b", [same, again])
    left, right = (next(folder.glob("samples-*")).name for folder in (first, second))
    for folders in ([first, second], [second, first]):
        notes: list[str] = []
        out = tmp_path / f"c-{folders[0].name}"
        assert merge(folders, out, HOME, notes.append) == (2, 0)
        told = "cells measured again with another result: 1; the latest counts ("
        assert [note.startswith(told) for note in notes] == [True]
        assert left in notes[0]
        assert right in notes[0]
        for report in (make_report(folders), make_report([out])):
            assert report.records.set_index("sample")["score"].to_dict() == {0: 1.0, 1: 0.5}
            assert any(note.startswith(told) for note in report.notes)


@pytest.mark.parametrize(
    ("changes", "same_file"),
    [
        ({}, False),  # the same moment
        ({"finished": LATER}, True),  # a process measures a cell once
    ],
)
def test_records_that_contradict_each_other_are_damaged(
    changes: dict[str, object], same_file: bool, tmp_path: Path
) -> None:
    first, second = run(tmp_path / "a", 0, 1), run(tmp_path / "b", 0)
    file = next((first if same_file else second).glob("samples-*"))
    other = record("full", 1.0, 0, 0.0, fingerprint="full/1.0/0/{}", **changes)
    file.write_bytes((file.read_bytes() if same_file else b"") + to_line(other))
    with pytest.raises(InputError, match="of the same cell, and neither is a later measurement"):
        merge([first, second], tmp_path / "c", HOME)
    assert not (tmp_path / "c").exists()
    report = make_report([first, second])
    assert len(report.damaged) == 2
    assert report.records["sample"].tolist() == [1]
    healed = record(
        "full", 1.0, 0, 0.5, fingerprint="full/1.0/0/{}", finished="2026-01-03T00:00:00"
    )
    report = make_report([first, second, store(tmp_path / "d", [healed])])
    assert report.records.set_index("sample")["score"].to_dict() == {1: 1.0, 0: 0.5}


def test_a_folder_that_a_process_writes_to_is_left_alone(tmp_path: Path) -> None:
    first, live = run(tmp_path / "a", 0), run(tmp_path / "b", 1)
    with RunWriter(live, {"model": "m"}, {}) as writer:
        if not writer.has_locks:
            pytest.skip("no locks here")
        writer.append([record("full", 1.0, 2, 1.0)])
        before = {path: path.read_bytes() for path in live.iterdir()}
        with pytest.raises(InputError, match=r"a process measures into .*; wait for its end"):
            merge([first], live, HOME)
        assert {path: path.read_bytes() for path in live.iterdir()} == before
        writer.append([record("full", 1.0, 3, 1.0)])  # it goes on
    assert merge([first], live, HOME) == (4, 0)


def test_equal_files_are_left_alone(tmp_path: Path) -> None:
    first = run(tmp_path / "a", 0)
    merge([first], tmp_path / "c", HOME)
    before = {path: path.stat().st_ino for path in (tmp_path / "c").iterdir()}
    merge([first], tmp_path / "c", HOME)
    assert {path: path.stat().st_ino for path in (tmp_path / "c").iterdir()} == before


def test_a_merge_of_nothing_and_into_damage_is_refused(tmp_path: Path) -> None:
    first, empty, damaged = run(tmp_path / "a", 0), tmp_path / "b", run(tmp_path / "d", 1)
    with RunWriter(empty, {"model": "m"}, {}) as writer:
        writer.append([record("full", 1.0, 0, 1.0)])
    writer.path.write_bytes(b"")
    with pytest.raises(InputError, match=r"nothing to merge: .*b hold no record yet"):
        merge([empty], tmp_path / "c", HOME)
    assert not (tmp_path / "c").exists()
    next(damaged.glob("samples-*")).write_bytes(b"{}\n")
    before = sorted(damaged.iterdir())
    with pytest.raises(InputError, match="line 1: not a record of kvbench"):
        merge([first], damaged, HOME)
    assert sorted(damaged.iterdir()) == before


def test_files_of_other_settings_are_refused(tmp_path: Path) -> None:
    first = run(tmp_path / "a", 0, dtype="float32")
    other = run(tmp_path / "b", 1, dtype="bfloat16")
    foreign = next(other.glob("samples-*"))
    (first / foreign.name).write_bytes(foreign.read_bytes())
    told = f"{foreign.name} has no invocation-.*, which says with which settings"
    for use in (lambda: merge([first], tmp_path / "c", HOME), lambda: make_report([first])):
        with pytest.raises(InputError, match=told):
            use()
    with pytest.raises(InputError, match=told):
        run(first, 2, dtype="float32")
    invocation = next(other.glob("invocation-*"))
    (first / invocation.name).write_bytes(invocation.read_bytes())
    with pytest.raises(InputError, match=r"of a process with other settings than .*run\.json"):
        make_report([first])
    (other / RUN_FILE).write_bytes((first / RUN_FILE).read_bytes())
    with pytest.raises(InputError, match=r"put back the run\.json that was there"):
        make_report([other])


def test_records_of_before_the_hash_are_read(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a", 0), run(tmp_path / "b", 1)
    for folder in (first, second):
        for path in folder.glob("invocation-*"):
            path.write_text("{}")
    next(second.glob("invocation-*")).unlink()
    assert merge([first, second], tmp_path / "c", HOME) == (2, 0)
    (second / RUN_FILE).write_text(
        (tmp_path / "c" / RUN_FILE).read_text().replace("{", '{"invocations": [{}], ', 1)
    )
    assert merge([second], tmp_path / "d", HOME) == (1, 0)
    run(tmp_path / "d", 2)  # a process of today goes on there
    assert len(make_report([tmp_path / "d"]).records) == 2


def test_what_is_missing_is_said_by_merge_and_report(tmp_path: Path) -> None:
    for index in (1, 2):
        asked = {"samples": 4, "seed": [0], "shard": [index, 3]}
        about = {"experiment": {"tasks": ["recall"]}, "settings": asked}
        with RunWriter(tmp_path / f"s{index}", {"model": "m"}, about) as writer:
            writer.append([record("full", 1.0, index, 1.0)])
    folders = [tmp_path / "s1", tmp_path / "s2"]
    told = ["recall: unfinished, 2 of 4 samples are there", "shards that are missing: 3/3"]
    notes: list[str] = []
    merge(folders, tmp_path / "c", HOME, notes.append)
    assert notes == told
    for runs in (folders, [tmp_path / "c"]):
        assert [note for note in make_report(runs).notes if note in told] == told
    assert "1 of 4 samples" in "".join(make_report(folders[:1]).notes)
    with RunWriter(tmp_path / "c", {"model": "m"}, {}) as writer:
        writer.append([record("full", 1.0, each, 1.0) for each in (0, 3)])
    assert not set(make_report([tmp_path / "c"]).notes) & set(told)


def test_who_is_slower_with_other_settings_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster = RunWriter(tmp_path / "other", {"model": "m"}, {})
    faster.append([record("full", 1.0, 0, 1.0)])
    write_once = run_folder.write_once

    def late(path: Path, contents: str) -> bool:
        faster.folder.rename(path.parent / "here")
        for file in (path.parent / "here").iterdir():
            file.rename(path.parent / file.name)
        return write_once(path, contents)

    monkeypatch.setattr(run_folder, "write_once", late)
    with pytest.raises(InputError, match="holds a run with other settings"):
        RunWriter(tmp_path / "a", {"model": "m", "dtype": "x"}, {})
    assert len(list((tmp_path / "a").glob("invocation-*"))) == 1
    assert len(make_report([tmp_path / "a"]).records) == 1
