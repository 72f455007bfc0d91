"""A sweep in several processes of one machine: `kvbench run --workers N` (docs/scale.md).

Every worker runs the whole sweep into the same folder, where each claims what it measures
(`claims.py`): a process for each GPU, or for an equal part of a CPU's cores. A worker gets its
choices, and tells what it does, over a connection that it shares with the process that started it
alone, so that it does not matter what plug-ins print. One that dies is started again.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any

from kvbench.errors import InputError, debugging
from kvbench.machine import free_memory
from kvbench.models.card import model_folder
from kvbench.records import Record
from kvbench.registry import load_plugins
from kvbench.sweep.command import Choices, SweepResult, ended_by_signals, run_sweep
from kvbench.sweep.progress import Listener, Progress

MOST_STARTS = 10  # of a worker in a row, without a cell that is finished in between
GRACE_SECONDS = 30.0  # that workers have to end when the sweep is interrupted
WORKER_BYTES = 2**28  # that a process with PyTorch takes, at least, beside the model


def run_workers(choices: Choices, listener: Listener | None = None) -> SweepResult:
    """As `run_sweep`, in `choices.workers` processes. Raises InputError as it does."""
    given = [str(task) for task in choices.task or () if not isinstance(task, str)]
    if given:
        raise InputError("workers open tasks by their names or paths; give these, or one worker")
    load_plugins()  # names what cannot be loaded; workers do not
    crew = Crew(choices, listener or Listener(), environments(choices))
    threads = [
        threading.Thread(target=crew.work, args=(index,), daemon=True)
        for index in range(choices.workers)
    ]
    interrupted = False
    with ended_by_signals():
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except KeyboardInterrupt:
            interrupted = True
            crew.stop()
            for thread in threads:
                thread.join(GRACE_SECONDS)
    return crew.result(interrupted)


def environments(choices: Choices) -> list[dict[str, str]]:
    """The environment of each worker: its GPUs, or its part of the cores."""
    count, each = choices.workers, choices.gpus_per_worker
    if choices.device == "cpu":
        gpus = 0
    else:
        import torch

        gpus = torch.cuda.device_count()
    if choices.device == "auto" and not gpus and each == 1:
        gpus = 0
    elif choices.device in ("auto", "cuda") and gpus < count * each:
        need = "a GPU" if each == 1 else f"{each} GPUs"
        raise InputError(f"{count} workers need {need} each, this machine has {gpus}")
    elif choices.device not in ("auto", "cuda", "cpu"):
        raise InputError(
            f"device '{choices.device}' is for one process; with workers, give cuda or cpu"
        )
    if not gpus:
        given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # of nested levels
        cores = int(given) if given.isdecimal() else len(os.sched_getaffinity(0))
        check_memory(choices)
        return [{**os.environ, "OMP_NUM_THREADS": str(max(1, cores // count))}] * count
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    names = [name.strip() for name in names]
    parts = (names[start : start + each] for start in range(0, count * each, each))
    return [{**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


def check_memory(choices: Choices) -> None:
    """InputError if the machine cannot hold the models of all workers on a CPU."""
    folder = model_folder(choices.model)
    files = folder.glob("*.safetensors") if folder else ()
    each = WORKER_BYTES + sum(file.stat().st_size for file in files)
    if each * choices.workers > (free := free_memory()):
        raise InputError(
            f"{choices.workers} workers need {each * choices.workers / 2**30:.1f} GiB at least, "
            f"{free / 2**30:.1f} are free; choose --workers {max(1, free // each)} or less"
        )


@dataclass
class Crew:
    """The workers of a sweep, as the process that started them sees them."""

    choices: Choices
    listener: Listener
    environments: list[dict[str, str]]
    results: list[dict[str, Any]] = field(default_factory=list)
    processes: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    error: str = ""  # of input that cannot be measured
    stopping: bool = False
    cells: int = 0  # to measure, when the first worker started
    finished: int = 0  # cells, so that a worker that dies without any is not started forever
    speaker: int | None = None  # the worker whose progress is shown
    progress: Progress | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def work(self, index: int) -> None:
        """Start a worker, again if it dies, until the sweep ends."""
        starts, finished = 0, -1
        while not self.stopping:
            with self.lock:
                starts = 1 if self.finished > finished else starts + 1
                finished = self.finished
            with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
                code = self.watch(index, errors)
                if code is None or self.stopping:
                    return
                errors.seek(0)
                last = (errors.read().strip().splitlines() or [""])[-1]
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            if starts == MOST_STARTS:
                self.say(f"worker {index + 1} ended {starts} times ({how}); it is given up. {last}")
                return
            self.say(f"worker {index + 1} ended ({how}) and is started again. {last}".rstrip())

    def watch(self, index: int, errors: Any) -> int | None:
        """Run a worker to its end; its exit code if it died, else None."""
        events, theirs = Pipe()
        with events:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-c", f"from {__name__} import main; main({theirs.fileno()})"],
                    stdin=subprocess.DEVNULL,
                    stdout=2 if debugging() else errors,
                    stderr=2 if debugging() else errors,
                    env=self.environments[index],
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # Ctrl-C reaches this process, which ends the others
                )
            with self.lock:
                self.processes[index] = process
            ended = False
            try:
                events.send(self.choices)
                while True:
                    event = events.recv()
                    ended |= event["what"] in ("result", "error")
                    self.hear(index, event)
            except (EOFError, OSError):
                pass  # it has ended, or died
        code = process.wait()
        with self.lock:
            if self.speaker == index:
                self.speaker = None
        return None if ended else code

    def hear(self, index: int, event: Mapping[str, Any]) -> None:
        """Take in what a worker tells."""
        with self.lock:
            what = event["what"]
            if what == "error":
                self.error = self.error or event["text"]
                self.stop()
            elif what == "result":
                self.results.append(dict(event))
            if what == "progress" and event["finished"]:
                self.finished += 1
            if self.speaker is None:
                self.speaker = index
            if self.speaker == index and what == "note":
                self.listener.note(event["text"])
            elif self.speaker == index and what == "progress":
                self.show(event)

    def show(self, event: Mapping[str, Any]) -> None:
        """Pass a worker's progress on; it counts the cells of all workers."""
        first = self.progress is None
        if self.progress is None:
            self.progress = Progress(self.listener, event["cells"], event["tokens"])
            self.cells = event["cells"]
        progress, before = self.progress, self.cells - event["cells"]
        progress.task, progress.done = event["task"], before + event["done"]
        progress.done_tokens = progress.tokens - event["tokens"] + event["done_tokens"]
        progress.began, progress.expected = time.monotonic(), event["left"]
        if first:
            self.listener.started(progress)
        self.listener.advanced(progress)

    def say(self, text: str) -> None:
        """Tell the user."""
        with self.lock:
            self.listener.note(text)

    def stop(self) -> None:
        """End all workers; what they have finished is kept."""
        with self.lock:
            self.stopping = True
            for process in self.processes.values():
                if process.poll() is None:
                    process.terminate()

    def result(self, interrupted: bool) -> SweepResult:
        """What came of it. Raises InputError if a worker could not use its input, or none ended."""
        if self.progress is not None:
            self.listener.stopped()
        if self.error:
            raise InputError(self.error)
        whole = [each for each in self.results if not each["interrupted"]]
        if not whole and not interrupted:
            raise InputError("all workers died; what was finished is kept, see the lines above")
        if not self.results:
            raise KeyboardInterrupt
        failed: dict[str, Record] = {}
        for each in self.results:
            failed |= {record.fingerprint: record for record in each["failed"]}
        first = min(self.results, key=lambda each: int(each["reused"]))
        planned, reused = int(first["planned"]), int(first["reused"])
        done = planned - reused - len(failed)
        if interrupted:
            done = sum(int(each["measured"]) for each in self.results)
        return SweepResult(
            first["folder"],
            planned,
            reused,
            done,
            list(failed.values()),
            first["left_out"],
            interrupted,
        )


class Told(Listener):
    """A worker's side: tells what it hears to the process that started it."""

    done = 0

    def __init__(self, events: Connection) -> None:
        self.events = events

    def tell(self, what: str, **told: Any) -> None:
        """Send an event; the sweep is interrupted if nobody reads any more."""
        try:
            self.events.send({"what": what, **told})
        except OSError:
            raise KeyboardInterrupt from None

    def note(self, text: str) -> None:
        """Tell a line for the user."""
        self.tell("note", text=text)

    def note_on_others(self, text: str) -> None:
        """Tell nothing: other workers are expected."""

    def started(self, progress: Progress) -> None:
        """Tell how much there is to do."""
        self.advanced(progress)

    def advanced(self, progress: Progress) -> None:
        """Tell how far the sweep is."""
        names = ("task", "cells", "tokens", "done", "done_tokens")
        told = {name: getattr(progress, name) for name in names}
        finished, self.done = progress.done > self.done, progress.done
        self.tell("progress", left=progress.seconds_left, finished=finished, **told)


def main(descriptor: int) -> None:
    """A worker: measures the choices that come over the connection of this descriptor."""
    os.set_inheritable(descriptor, False)
    listener = Told(Connection(descriptor))
    try:
        try:
            choices = listener.events.recv()
        except EOFError:  # the process that started it is gone
            raise KeyboardInterrupt from None
        result = run_sweep(choices, listener)
        names = ("planned", "reused", "measured", "left_out", "interrupted", "folder", "failed")
        listener.tell("result", **{name: getattr(result, name) for name in names})
    except InputError as error:
        listener.tell("error", text=str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
