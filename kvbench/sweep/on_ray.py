"""A sweep on a Ray cluster: `kvbench run --ray ADDRESS` (docs/scale.md).

Actors hold the model, one for each GPU of the cluster, or for each CPU. The process that the user
started gives them work units, the longest first, and writes what they send back. So the nodes need
no common file system, and the process needs no GPU. An actor that dies is replaced, and its unit is
measured again in halves; a cell that ended two actors alone is recorded as failed. An actor gets
its first unit when it is ready, so no unit is blamed for one that died before. Nodes may join and
leave meanwhile.
"""

import importlib
import socket
import tempfile
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvbench.errors import InputError
from kvbench.records import SAMPLE_FILES, Record, from_line, read_records
from kvbench.run_folder import RunWriter, check_common
from kvbench.sweep.command import (
    RUNS,
    Choices,
    SweepPlan,
    SweepResult,
    interruptible,
    invocation,
    plan_sweep,
    where_it_goes,
)
from kvbench.sweep.folder import find_folder
from kvbench.sweep.plan import Unit
from kvbench.sweep.progress import Listener, Progress
from kvbench.sweep.units import longest_first, tokens_of, units_of

LOCAL = "local"  # starts a Ray of its own on this machine
NOWHERE = Path("kvbench-on-ray")  # actors read no run folder
LOOK_SECONDS = 5.0  # between looks at how large the cluster is
CONNECT_SECONDS = 10.0
MOST_DEATHS = 2  # actors that a cell may end alone
MOST_IN_A_ROW = 20  # actors that may die without a cell that is finished in between
ENDED = f"{MOST_DEATHS} workers ended without a word while they measured it (out of memory?)"


@dataclass
class Work:
    """Cells of a unit that an actor measures at a time."""

    cells: dict[str, int]  # the tokens of each cell, by fingerprint
    unit: Unit
    deaths: int = 0  # actors that ended while they measured it, once it is a single cell
    error: str = ""  # why it is not measured

    def after_death(self) -> "list[Work]":
        """What is given out instead, once an actor died with it."""
        if len(self.cells) == 1:
            deaths = self.deaths + 1
            return [replace(self, deaths=deaths, error=ENDED if deaths >= MOST_DEATHS else "")]
        items = list(self.cells.items())
        middle = (len(items) + 1) // 2
        return [replace(self, cells=dict(part)) for part in (items[:middle], items[middle:])]


class Worker:
    """An actor. One makes the whole plan; the others plan the units that they are given.

    Equal choices give equal cells.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = replace(choices, out=NOWHERE)
        self._plan: SweepPlan | None = None

    def plan(self, only: Set[Unit] | None) -> SweepPlan:
        """The plan, made when it is first needed; `only` is for what must be planned then."""
        if self._plan is None:
            from kvbench.sweep.runner import warm_up

            self._plan = plan_sweep(self.choices, only)
            warm_up(self._plan.sweep.model)
        return self._plan

    def told(self) -> dict[str, Any]:
        """What the driver must know; or the `error` of choices that cannot be measured."""
        try:
            plan = self.plan(None)
        except InputError as error:
            return {"error": str(error)}
        return {
            "common": plan.common,
            "experiment": plan.experiment,
            "invocation": invocation(self.choices, plan),
            "notes": plan.notes,
            "left_out": plan.left_out,
            "units": [
                Work({cell.fingerprint: cell.tokens for cell in unit}, unit[0].unit)
                for unit in longest_first(units_of(plan.cells), tokens_of)
            ],
        }

    def ready(self) -> None:
        """Load the model, so that units can be measured."""
        self.plan(frozenset())

    def measure(self, work: Work) -> list[bytes]:
        """The records of some cells, as lines; if there is an error, cells that failed by it.

        InputError if the unit has other cells than when it was planned.
        """
        plan, error = self.plan(frozenset()), work.error
        planned = [cell for cell in plan.cells if cell.unit == work.unit]
        planned = planned or plan.make(frozenset([work.unit]))
        cells = [cell for cell in planned if cell.fingerprint in work.cells]
        if len(cells) < len(work.cells):
            task, _, index = work.unit
            raise InputError(
                f"sample {index} of {task} has changed since the run started; what was finished is "
                "kept, give the same command again"
            )
        if error:
            cells = [replace(cell, error=error) for cell in cells]
        sweep = replace(plan.sweep, recorded=set(), added=None)
        with tempfile.TemporaryDirectory() as folder:
            with RunWriter(Path(folder), plan.common, {}) as writer:
                sweep.run(cells, writer, lambda cell: None)
            files = list(Path(folder).glob(SAMPLE_FILES))
            return [line for file in files for line in file.read_bytes().splitlines(keepends=True)]


@dataclass
class Driver:
    """Gives units to actors, and takes in what they send back."""

    ray: Any
    choices: Choices
    actors: list[Any] = field(default_factory=list)
    units: list[Work] = field(default_factory=list)  # to be given out, the next one last
    starting: dict[Any, Any] = field(default_factory=dict)  # actors, by what they send when ready
    idle: list[Any] = field(default_factory=list)  # actors that are ready
    busy: dict[Any, tuple[Any, Work]] = field(default_factory=dict)  # by what an actor will send
    deaths: int = 0  # of actors, in a row

    def learn(self) -> dict[str, Any]:
        """What an actor tells of the sweep. Raises InputError if it cannot be measured."""
        while True:
            self.look()
            try:
                told = dict(self.ray.get(self.actors[0].told.remote()))
            except self.ray.exceptions.RayActorError:
                self.bury(self.actors[0])
                continue
            if "error" in told:
                raise InputError(told["error"])
            return told

    def look(self) -> None:
        """Start an actor for each GPU, or several, or CPU, that the cluster has; one at least."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus = [0 if self.choices.device == "cpu" else int(node.get("GPU", 0)) for node in nodes]
        each = self.choices.gpus_per_worker
        if each > max(1, *gpus):  # an actor is on one node
            raise InputError(f"a worker needs {each} GPUs, no node of the cluster has so many")
        cores = sum(int(node.get("CPU", 0)) for node in nodes)
        count = max(1, sum(count // each for count in gpus) if any(gpus) else cores)
        if self.choices.workers > 1:
            count = min(count, self.choices.workers)
        kind = self.ray.remote(Worker).options(num_gpus=each if any(gpus) else 0, num_cpus=1)
        while len(self.actors) < count:
            self.actors.append(kind.remote(self.choices))

    def step(self) -> list[Record]:
        """Give units to actors that are ready, and wait a little; the records that arrived."""
        self.look()
        known = [*self.starting.values(), *self.idle, *(actor for actor, _ in self.busy.values())]
        for actor in self.actors:
            if not any(actor is other for other in known):
                self.starting[actor.ready.remote()] = actor
        while self.units and self.idle:
            actor, work = self.idle.pop(), self.units.pop()
            self.busy[actor.measure.remote(work)] = actor, work
        arrived, _ = self.ray.wait([*self.busy, *self.starting], timeout=LOOK_SECONDS)
        records = []
        for sent in arrived:
            unit = None
            if sent in self.busy:
                actor, unit = self.busy.pop(sent)
            else:
                actor = self.starting.pop(sent)
            try:
                lines = self.ray.get(sent)
            except self.ray.exceptions.RayActorError:
                self.units += unit.after_death() if unit else []
                self.bury(actor)
                continue
            self.idle.append(actor)
            if unit:
                records += [from_line(line) for line in lines]
                self.deaths = 0
        return records

    def bury(self, actor: Any) -> None:
        """Give up an actor that died; `look` starts another."""
        self.deaths += 1
        if self.deaths >= MOST_IN_A_ROW:
            raise InputError(
                f"{self.deaths} workers died one after the other without finishing a cell; what "
                "was finished is kept, Ray's log of the workers says why"
            )
        self.ray.kill(actor, no_restart=True)
        self.actors.remove(actor)


def run_on_ray(choices: Choices, listener: Listener | None = None) -> SweepResult:
    """As `run_sweep`, on the cluster `choices.ray`. Raises InputError as it does."""
    listener = listener or Listener()
    if any(not isinstance(task, str) for task in choices.task or ()):
        raise InputError("workers open tasks by their names or paths; give these, or one process")
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise InputError("--ray needs Ray: pip install 'kvbench[ray]'") from None
    address = choices.ray or LOCAL
    where = {"include_dashboard": False} if address == LOCAL else {"address": address}
    try:
        check_answers(address)
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot reach a Ray cluster at '{address}': {reason}") from None
    try:
        driver = Driver(ray, choices)
        return measured(driver, driver.learn(), choices, listener)
    finally:
        ray.shutdown()


def check_answers(address: str) -> None:
    """OSError if nobody listens at an address with a port; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def measured(
    driver: Driver, told: Mapping[str, Any], choices: Choices, listener: Listener
) -> SweepResult:
    """Measure the units that the run folder lacks."""
    out = choices.out or find_folder(RUNS, told["common"], told["experiment"])
    check_common(out, told["common"])
    found = read_records(out, common=told["common"]) if out.is_dir() else []
    known = {record.fingerprint for record in found if record.error is None}
    planned = sum(len(unit.cells) for unit in told["units"])
    for unit in reversed(told["units"]):
        if cells := {name: tokens for name, tokens in unit.cells.items() if name not in known}:
            driver.units.append(replace(unit, cells=cells))
    missing = {name: tokens for unit in driver.units for name, tokens in unit.cells.items()}
    tasks = {name: unit.unit[0] for unit in driver.units for name in unit.cells}
    reused, failed = planned - len(missing), []
    for note in told["notes"]:
        listener.note(note)
    if not missing:
        listener.note(f"all {planned} cells are measured already in {out}")
        return SweepResult(out, planned, reused, left_out=told["left_out"])
    where = where_it_goes(out, planned, reused)
    progress = Progress(listener, len(missing), sum(missing.values()))
    with RunWriter(out, told["common"], told["invocation"]) as writer:
        listener.note(where)
        with interruptible(listener) as ending:
            progress.start(None)
            while driver.units or driver.busy:
                records = driver.step()
                writer.append(records)
                known |= {record.fingerprint for record in records}
                failed += [record for record in records if record.error is not None]
                for record in records:
                    progress.count(tasks[record.fingerprint], missing[record.fingerprint])
        writer.check_stored(known)
    ending.tell(listener, out)
    return SweepResult(
        out,
        planned,
        reused,
        progress.done - len(failed),
        failed,
        told["left_out"],
        ending.interrupted,
    )
