"""Sweeps on Ray: units that are lost, actors that die, nodes that join; and a real Ray, if any."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.process import kvbench
from helpers.records import record
from helpers.runs import SMALL, results

from kvbench.errors import InputError
from kvbench.records import from_line, read_records, to_line
from kvbench.sweep.command import Choices
from kvbench.sweep.on_ray import ENDED, Driver, Work, Worker, measured, run_on_ray
from kvbench.sweep.plan import encode_prompt
from kvbench.sweep.progress import Listener
from kvbench.task import Sample

COMMON = {"model": "m", "kvbench": "1"}


class Died(Exception):
    """Ray's error for an actor that died."""


@dataclass(eq=False)
class Sent:
    """What an actor will send."""

    lines: list[bytes]
    dead: bool


class Cluster:
    """Stands in for Ray: `cpus` actors, which `dies` may end with the cells that they are given.

    There are nodes with `gpus` GPUs each beside.
    """

    def __init__(
        self,
        cpus: int,
        dies: Callable[[list[str]], bool] = lambda cells: False,
        gpus: Sequence[int] = (),
    ) -> None:
        self.cpus, self.dies, self.gpus = cpus, dies, gpus
        self.exceptions = SimpleNamespace(RayActorError=Died)
        self.started, self.killed = 0, 0
        self.given: list[list[str]] = []
        self.cannot_start: Callable[[], bool] = lambda: False

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}}
        here = [{"Alive": True, "Resources": {"GPU": count}} for count in self.gpus]
        return [gone, {"Alive": True, "Resources": {"CPU": self.cpus, "memory": 1e9}}, *here]

    def remote(self, worker: Any) -> Any:
        def options(**asked: float) -> Any:
            self.asked = asked
            return SimpleNamespace(remote=self.actor)

        return SimpleNamespace(options=options)

    def actor(self, choices: Choices) -> Any:
        self.started += 1
        return SimpleNamespace(
            ready=SimpleNamespace(remote=lambda: Sent([], self.cannot_start())),
            measure=SimpleNamespace(remote=self.measure),
        )

    def measure(self, work: Work) -> Any:
        cells = list(work.cells)
        self.given.append(cells)
        dead = not work.error and self.dies(cells)
        return Sent([line(name, work.error) for name in cells], dead)

    def wait(self, sent: list[Any], timeout: float) -> Any:
        return sent[:1], sent[1:]

    def get(self, sent: Sent) -> list[bytes]:
        if sent.dead:
            raise Died
        return sent.lines

    def kill(self, actor: Any, no_restart: bool) -> None:
        self.killed += 1


def line(name: str, error: str) -> bytes:
    return to_line(record("full", 1.0, int(name), 1.0, fingerprint=name, error=error or None))


def told(*sizes: int) -> dict[str, Any]:
    """What an actor tells of units with so many cells."""
    names = iter(range(sum(sizes)))
    units = [
        Work({str(next(names)): 10 for _ in range(size)}, ("echo", 0, index))
        for index, size in enumerate(sizes)
    ]
    invocation = {"started": "2026-01-01T00:00:00"}
    return {
        "common": COMMON,
        "experiment": {"tasks": ["echo"]},
        "invocation": invocation,
        "notes": [],
        "left_out": [],
        "units": units,
    }


def test_the_longest_unit_is_given_out_first_and_all_are_recorded(tmp_path: Path) -> None:
    cluster = Cluster(2)
    choices = Choices(out=tmp_path / "out", ray="local")
    result = measured(Driver(cluster, choices), told(4, 3, 2), choices, Listener())
    assert [len(cells) for cells in cluster.given] == [4, 3, 2]
    assert (result.planned, result.reused, result.measured, result.failed) == (9, 0, 9, [])
    assert len(read_records(tmp_path / "out")) == 9
    again = measured(Driver(cluster, choices), told(4, 3, 2), choices, Listener())
    assert (again.reused, again.measured, len(cluster.given)) == (9, 0, 3)


def test_what_is_recorded_already_is_not_measured(tmp_path: Path) -> None:
    cluster = Cluster(1)
    choices = Choices(out=tmp_path / "out", ray="local")
    measured(Driver(cluster, choices), told(2), choices, Listener())
    measured(Driver(cluster, choices), told(4), choices, Listener())
    assert cluster.given == [["0", "1"], ["2", "3"]]


def test_a_unit_whose_actor_dies_is_measured_again_in_halves(tmp_path: Path) -> None:
    deaths = iter([True, False, False, False])
    cluster = Cluster(1, lambda cells: next(deaths))
    choices = Choices(out=tmp_path / "out", ray="local")
    result = measured(Driver(cluster, choices), told(5, 1), choices, Listener())
    assert sorted(map(len, cluster.given)) == [1, 2, 3, 5]
    assert (result.measured, cluster.killed, cluster.started) == (6, 1, 2)
    assert len(read_records(tmp_path / "out")) == 6


def test_a_cell_that_ends_two_actors_alone_fails_and_the_rest_goes_on(tmp_path: Path) -> None:
    cluster = Cluster(2, lambda cells: "2" in cells)
    choices = Choices(out=tmp_path / "out", ray="local")
    result = measured(Driver(cluster, choices), told(6), choices, Listener())
    assert [(each.fingerprint, each.error) for each in result.failed] == [("2", ENDED)]
    assert (result.measured, result.exit_code) == (5, 1)
    assert cluster.given.count(["2"]) == 3  # twice measured, once recorded


def test_an_actor_plans_the_units_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []

    def counted(tokenizer: Any, sample: Sample, **how: Any) -> list[int]:
        encoded.append(sample.index)
        return encode_prompt(tokenizer, sample, **how)

    monkeypatch.setattr("kvbench.sweep.plan.encode_prompt", counted)
    choices = Choices(method=("recency",), task=("recall",), budgets=(0.5,), samples=12)
    choices = replace(choices, context=128, ray="local")
    first, second = Worker(choices), Worker(choices)
    works = first.told()["units"]
    assert sorted(encoded) == list(range(12))
    encoded.clear()
    work = next(work for work in works if work.unit[2] == 7)
    lines = second.measure(work)
    assert sorted(encoded) == [0, 7]  # the first sample shows whether all of them vary
    found, expected = ([from_line(each) for each in part] for part in (lines, first.measure(work)))
    assert {each.fingerprint for each in found} == work.cells.keys()
    assert [each.prediction for each in found] == [each.prediction for each in expected]
    with pytest.raises(InputError, match="sample 7 of recall has changed since the run started"):
        second.measure(replace(work, cells={"gone": 1}))


@pytest.mark.parametrize(("each", "actors"), [(1, 11), (2, 5), (4, 2)])
def test_an_actor_gets_gpus_of_one_node(each: int, actors: int) -> None:
    cluster = Cluster(64, gpus=[5, 2, 4])
    driver = Driver(cluster, Choices(gpus_per_worker=each))
    driver.look()
    assert (cluster.started, cluster.asked["num_gpus"]) == (actors, each)
    driver = Driver(cluster, Choices(gpus_per_worker=6))
    with pytest.raises(InputError, match="6 GPUs, no node of the cluster has so many"):
        driver.look()
    driver = Driver(Cluster(3), Choices())
    driver.look()
    assert (len(driver.actors), driver.ray.asked["num_gpus"]) == (3, 0)


def test_actors_that_all_die_end_the_run(tmp_path: Path) -> None:
    cluster = Cluster(2)
    cluster.cannot_start = lambda: True
    choices = Choices(out=tmp_path / "out", ray="local")
    with pytest.raises(InputError, match="20 workers died one after the other"):
        measured(Driver(cluster, choices), told(64), choices, Listener())
    assert not (tmp_path / "out").exists()


def test_no_unit_is_blamed_for_actors_that_died_before_they_were_ready(tmp_path: Path) -> None:
    cluster, deaths = Cluster(1), iter([True] * 5 + [False])
    cluster.cannot_start = lambda: next(deaths)
    choices = Choices(out=tmp_path / "out", ray="local")
    result = measured(Driver(cluster, choices), told(2, 1), choices, Listener())
    assert cluster.given == [["0", "1"], ["2"]]
    assert (result.measured, result.failed, cluster.started) == (3, [], 6)


def test_a_node_that_joins_gets_an_actor(tmp_path: Path) -> None:
    cluster = Cluster(1)
    driver = Driver(cluster, Choices(ray="local"))
    driver.look()
    assert cluster.started == 1
    cluster.cpus = 4
    driver.look()
    assert cluster.started == 4
    bounded = Driver(cluster, Choices(ray="local", workers=2))
    bounded.look()
    assert len(bounded.actors) == 2


def test_ray_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'kvbench\[ray\]'"):
        run_on_ray(Choices(ray="local"))


def test_a_real_ray_measures_what_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for more in (["--out", "alone"], ["--ray", "local", "--workers", "2", "--out", "ray"]):
        done = kvbench("run", *SMALL, *more, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert results(tmp_path / "ray") == results(tmp_path / "alone")
    done = kvbench("run", *SMALL, "--ray", "127.0.0.1:1", "--out", "x", folder=tmp_path)
    assert (done.returncode, "cannot reach a Ray cluster" in done.stderr) == (2, True)
