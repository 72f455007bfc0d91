"""Kill trainings at random moments: do they go on to the result of an unbroken one?

    python benchmarks/train_kills.py --kills 20

Each training runs in a process of its own, which is killed (SIGKILL) at a random moment and started
again with the same arguments, until it ends by itself; so on, until there were as many kills. What
it learnt must equal what a training learns that nothing breaks, bit for bit. The processes are
forks of this one, so that they start at once and most of them are killed while they train.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from kvbench.cli.app import main
from kvbench.learning import command, tiny  # noqa: F401  imported once, before the forks

TRAININGS = {
    "prulong": [*("prulong", "--steps", "40", "--batch", "1", "--length", "96")],
    "two targets": [
        *("prulong", "--target", "0.5,0.8", "--steps", "20", "--batch", "1", "--length", "64")
    ],
    "weights": [
        *("prulong", "--steps", "20", "--batch", "1", "--length", "64"),
        *("--option", "weights_rate=1e-5"),
    ],
    "duoattention": [
        *("duoattention", "--steps", "30", "--batch", "1", "--length", "128"),
        *("--option", "passkey_words=2"),
    ],
    "tiny": ["tiny", "--steps", "10"],
}


def started(arguments: list[str], folder: Path) -> int:
    """The id of a new process that trains into `folder`."""
    if child := os.fork():
        return child
    with (folder.parent / "said").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    code = 1
    try:
        device = [] if arguments[0] == "tiny" else ["--device", "cpu", "--dtype", "float32"]
        code = main(["train", *arguments, *device, "--out", str(folder)])
    finally:
        os._exit(code)


def result_of(folder: Path) -> str:
    """A hash of what a training learnt."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("scores-*.json")):
        found.update(
            json.dumps([s["scores"] for s in json.loads(file.read_text())["sets"]]).encode()
        )
    for file in sorted(folder.rglob("model.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def unbroken(arguments: list[str], folder: Path) -> float:
    """Train without a break; the seconds that it took."""
    begun = time.monotonic()
    _, status = os.waitpid(started(arguments, folder), 0)
    if status:
        sys.exit((folder.parent / "said").read_text()[-500:])
    return time.monotonic() - begun


def broken(
    arguments: list[str], folder: Path, kills: int, most: float, rng: random.Random
) -> list[str]:
    """Train with `kills` kills, each after up to `most` seconds; the result of each training.

    A training that has ended is made anew, until there were all kills.
    """
    results = []
    while True:
        child = started(arguments, folder)
        if kills:
            time.sleep(rng.uniform(0, most))
        ended, status = os.waitpid(child, os.WNOHANG if kills else 0)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills -= 1
            continue
        if status:
            sys.exit((folder.parent / "said").read_text()[-500:])
        results.append(result_of(folder))
        if kills:
            shutil.rmtree(folder)
        else:
            return results


def drafts(folder: Path) -> list[str]:
    """Files that a killed process left half-written."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix == ".part"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TRAININGS, nargs="*", default=list(TRAININGS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    worst = 0
    for name in given.only:
        with tempfile.TemporaryDirectory() as home:
            whole, torn = Path(home) / "whole", Path(home) / "torn"
            seconds = unbroken(TRAININGS[name], whole)
            rng = random.Random(f"{given.seed}/{name}")
            results = broken(TRAININGS[name], torn, given.kills, seconds, rng)
            others = sum(result != result_of(whole) for result in results)
            worst |= others > 0
            print(
                f"{name:14} {seconds:5.1f} s unbroken; {given.kills} kills, {len(results)} "
                f"trainings ended, {others} with another result; left over: "
                f"{drafts(torn) or 'nothing'}",
                flush=True,
            )
    sys.exit(worst)
