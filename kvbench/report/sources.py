"""Tasks of one name that read different data are different tasks of a report.

A task that reads is called like its file, so two files of one name may meet in a report. Records
say where their samples were read (`source`), and run folders which samples that were.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from pandas import DataFrame

from kvbench.errors import InputError
from kvbench.run_folder import same_data, samples_by_source

GENERATED = "generated"  # how a label names samples that kvbench makes


def task_names(records: DataFrame, runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Return the names of tasks in a report, by task and source.

    A task whose samples are the same data everywhere keeps its name; different data of one name
    have their source in the name. InputError if a record does not say which of them it is.
    """
    found = samples_by_source(each for run in runs for each in run["invocations"])
    columns = ["task", "source", "sample", "sample_code"]
    for task, source, sample, code in records[columns].drop_duplicates().itertuples(index=False):
        samples = found.setdefault(task, {}).setdefault(source, [])
        if code:
            samples += [set() for _ in range(sample + 1 - len(samples))]
            samples[sample].add(code)
    names: dict[tuple[str, str], str] = {}
    for task, sources in found.items():
        unknown = sources.pop("") if sources.get("") and len(sources) > 1 else None
        kinds = _of_same_data(sources)
        if unknown is not None:
            if len(kinds) > 1:
                raise InputError(
                    f"records of '{task}' do not say where their samples were read, and these runs "
                    f"read different ones, from {' and '.join(kind[0] for kind in kinds)}; "
                    "report the runs one by one"
                )
            kinds[0].append("")
        shown = [task] if len(kinds) == 1 else _labels(task, [kind[0] for kind in kinds])
        for kind, name in zip(kinds, shown, strict=True):
            names |= {(task, source): name for source in kind}
    return names


def _of_same_data(sources: Mapping[str, list[set[str]]]) -> list[list[str]]:
    """Return the sources of each data set."""
    kinds: list[tuple[list[str], list[set[str]]]] = []
    nothing: set[str] = set()
    for source, samples in sources.items():
        names, known, others = [source], samples, []
        for kind in kinds:
            if same_data(known, kind[1]):
                names = [*kind[0], *names]
                known = [a | b for a, b in zip_longest(known, kind[1], fillvalue=nothing)]
            else:
                others.append(kind)
        kinds = [*others, (names, known)]
    return [names for names, _ in kinds]


def _labels(task: str, sources: list[str]) -> list[str]:
    """Return names that tell sources apart: with the end of each, as short as it can be."""
    parts = [source.split("/") if source else [GENERATED] for source in sources]
    for length in range(2, max(map(len, parts)) + 1):
        ends = ["/".join(each[-length:]) for each in parts]
        if len(set(ends)) == len(ends):
            break
    else:
        ends = ["/".join(each) for each in parts]
    return [f"{task} ({end})" for end in ends]
