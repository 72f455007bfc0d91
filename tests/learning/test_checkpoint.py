"""Checkpoints: whole or not at all, checked when read, and only for the training they belong to."""

import contextlib
import json
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.process import kvbench_here
from helpers.warm import Program
from safetensors.torch import load_file, save_file

from kvbench.errors import InputError
from kvbench.learning.checkpoint import (
    BEFORE,
    CHECKPOINT,
    DRAFT,
    Checkpoints,
    holding,
    resume_log,
    seconds_of,
)
from kvbench.learning.command import HeadChoices, TrainingResult, train_heads
from kvbench.learning.recipe import TinyRecipe
from kvbench.learning.tiny import train_tiny
from kvbench.models.card import EMBEDDED

TEXT = "the badger digs a hole while the crane stands still and looks at the water. "


def trained(folder: Path, value: float = 0.0, steps: int = 3) -> Checkpoints:
    """A number that Adam has moved for some steps, with a checkpoint after each."""
    tensor = torch.full((2, 3), value, requires_grad=True)
    optimizer = torch.optim.Adam([tensor], lr=0.1)
    checkpoints = Checkpoints(folder, {"seed": 1, "stages": (1, 2)}, {"x": tensor}, [optimizer])
    start = (checkpoints.restore() or {"step": 0})["step"]
    for step in range(start, steps):
        torch.autograd.backward((tensor - 1).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        checkpoints.save({"step": step + 1})
    return checkpoints


def test_a_checkpoint_holds_what_is_learnt_and_the_optimizers_state(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = trained(tmp_path / "whole", steps=5)
    trained(tmp_path / "broken", steps=2)
    again = trained(tmp_path / "broken", value=7.0, steps=5)
    assert torch.equal(whole.learnt["x"], again.learnt["x"])
    assert again.note == ""
    left, right = (load_file(tmp_path / name / CHECKPOINT) for name in ("whole", "broken"))
    assert {"x", "state.step/x", "state.exp_avg/x", "state.exp_avg_sq/x"} == set(left)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def foreign(path: Path) -> None:
    save_file({"x": torch.zeros(2, 3)}, path)


@pytest.mark.parametrize("damage", [cut, flip, foreign, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage: Any, tmp_path: Path) -> None:
    trained(tmp_path, steps=3)
    damage(tmp_path / CHECKPOINT)
    checkpoints = trained(tmp_path, steps=2)  # nothing more to do
    assert f"checkpoint '{tmp_path / CHECKPOINT}' is broken" in checkpoints.note
    assert "going on from the one before it" in checkpoints.note
    (tmp_path / "whole").mkdir()
    assert torch.equal(checkpoints.learnt["x"], trained(tmp_path / "whole", steps=2).learnt["x"])
    damage(tmp_path / BEFORE)
    with pytest.raises(InputError, match=r"is broken .* and .* is broken .*; delete it to start"):
        trained(tmp_path)


def test_a_kill_between_two_checkpoints_loses_neither(tmp_path: Path) -> None:
    trained(tmp_path, steps=3)
    (tmp_path / CHECKPOINT).rename(tmp_path / BEFORE)  # killed before the new one has its name
    (tmp_path / DRAFT).write_bytes(b"half")
    checkpoints = trained(tmp_path, steps=4)
    assert checkpoints.note == ""
    assert not (tmp_path / DRAFT).exists()


def test_other_settings_and_other_data_are_named(tmp_path: Path) -> None:
    known = trained(tmp_path)
    for settings, message in (
        ({"seed": 2, "stages": [1, 2]}, "other settings (seed was 1, now 2): choose another --out"),
        ({"seed": 1, "stages": [1]}, "stages was [1, 2], now [1]"),
        ({"seed": 1, "stages": [1, 2], "dtype": "bfloat16"}, "dtype was None, now bfloat16"),
    ):
        other = Checkpoints(tmp_path, settings, known.learnt, known.optimizers)
        with pytest.raises(InputError, match=re.escape(message)):
            other.restore()


def test_two_trainings_do_not_write_to_one_folder(tmp_path: Path) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom kvbench.learning.checkpoint import holding\n"
    code += "with holding(Path('t')):\n    print('holds', flush=True)\n    sys.stdin.read()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    with pytest.raises(InputError, match="another process trains in"), holding(tmp_path / "t"):
        pass
    process.kill()
    process.communicate()
    with holding(tmp_path / "t"):
        pass


def test_a_log_loses_only_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 0}\n{"step": 1}\n[1]\n\xff\n{"step": 2}\n{"st')
    assert resume_log(log, 2) == [{"step": 0}, {"step": 1}]
    assert log.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_damaged_log_costs_lines_and_the_time_is_not_known(tmp_path: Path) -> None:
    log, good = tmp_path / "log.jsonl", [{"step": n, "seconds": 1.5} for n in range(2)]
    odd = [
        *('{"step": 1}', '{"step": 1, "seconds": "x"}', '{"step": 1, "seconds": NaN}', "[]"),
        *('{"step": true, "seconds": 1}', '{"step": -5, "seconds": 1}', '{"seconds": 1}'),
        *('{"step": 0, "seconds": 9}', '{"step": 1, "seconds": 1' + "0" * 400 + "}", "[" * 10**5),
    ]
    log.write_text("\n".join([json.dumps(good[0]), *odd, json.dumps(good[1]), odd[0]]))
    assert resume_log(log, 5, ("seconds",)) == good
    assert log.read_text().splitlines() == [json.dumps(line) for line in good]
    assert seconds_of(good, 2) == 3.0
    assert seconds_of(good, 3) is seconds_of([], 1) is None
    assert seconds_of([{**good[0], "seconds": -1.0}, good[1]], 2) is None


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file grows beyond `room` bytes, as on a disk that has no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_keeps_the_checkpoints_that_are_there(tmp_path: Path) -> None:
    checkpoints = trained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (CHECKPOINT, BEFORE)}
    with full_disk(100), pytest.raises(InputError, match=r"cannot write to .* free some space"):
        checkpoints.save({"step": 9})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Whole trainings


def heads(folder: Path, data: Path, method: str = "prulong", steps: int = 8) -> TrainingResult:
    settings = {"steps": steps, "batch": 1, "length": 32, "data": str(data), "seed": 3}
    settings |= {"passkey_words": 1} if method == "duoattention" else {}
    choices = HeadChoices(method, "tiny", None, settings, folder, "cpu", "float32")
    return train_heads(choices, say=lambda text: None)


@pytest.mark.parametrize("method", ["prulong", "duoattention"])
def test_changed_or_vanished_data_are_refused_and_brought_back_they_do(
    method: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text(TEXT * 30)
    whole = heads(tmp_path / "whole", data, method)

    heads(tmp_path / "t", data, method)
    (data / "a.txt").write_text(TEXT.replace("badger", "beaver") * 30)
    message = f"holds a training on other data: '{data}' has changed since"
    before = {path: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    with pytest.raises(InputError, match=re.escape(message)):
        heads(tmp_path / "t", data, method)
    (data / "a.txt").unlink()
    with pytest.raises(InputError, match="no text or code files"):
        heads(tmp_path / "t", data, method)
    data.rmdir()
    with pytest.raises(InputError, match="no data"):
        heads(tmp_path / "t", data, method)
    assert {path: path.read_bytes() for path in (tmp_path / "t").iterdir()} == before
    data.mkdir()
    (data / "a.txt").write_text(TEXT * 30)
    assert heads(tmp_path / "t", data, method).sets[0].scores == whole.sets[0].scores


def test_a_folder_with_the_name_of_a_text_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "data" / "odd.py").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text(TEXT * 30)
    assert heads(tmp_path / "t", tmp_path / "data", steps=1).scores is not None


def test_a_killed_training_goes_on_to_the_same_scores(tmp_path: Path) -> None:
    """A kill while it trains; `benchmarks/train_kills.py` makes many, at any moment."""
    small = ["prulong", "--steps", "20", "--batch", "1", "--length", "32", "--data", "tasks"]
    command = ["-m", "kvbench", "train", *small, "--device", "cpu", "--out", "t"]
    log = tmp_path / "t" / "log.jsonl"
    process = Program(*command, folder=tmp_path)
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "t" / "scores-prulong.json").exists()
    for folder in ("t", "whole"):
        done = kvbench_here("train", *small, "--device", "cpu", "--out", folder, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    left, right = (
        re.sub(r'"seconds": .*', "", (tmp_path / name / "scores-prulong.json").read_text())
        for name in ("t", "whole")
    )
    assert left == right


def tiny(folder: Path, stop: int | None = None, **changes: Any) -> bytes:
    """The weights of some steps of the embedded model, interrupted after `stop` steps."""
    recipe = TinyRecipe(tokens_a_step=192, **{"steps": 5, "seed": 2, **changes})
    if stop is None:
        train_tiny(recipe, folder, lambda text: None, EMBEDDED["tiny"])
        return (folder / "model.safetensors").read_bytes()
    progress = iter(range(stop))

    def due(self: Checkpoints) -> bool:
        if next(progress, None) is None:
            raise KeyboardInterrupt
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "due", property(due))
        with pytest.raises(KeyboardInterrupt):
            train_tiny(recipe, folder, lambda text: None, EMBEDDED["tiny"])
    assert not (folder / "model.safetensors").exists()
    return b""


def test_the_embedded_model_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = tiny(tmp_path / "whole")
    tiny(tmp_path / "t", stop=2)
    assert tiny(tmp_path / "t") == whole
    assert tiny(tmp_path / "t") == whole  # it is finished
    with pytest.raises(InputError, match=re.escape("other settings (seed was 2, now 3)")):
        tiny(tmp_path / "t", seed=3)
    assert (tmp_path / "t" / "model.safetensors").read_bytes() == whole
