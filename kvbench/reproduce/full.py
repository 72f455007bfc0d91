"""The paper's own scale: its configuration as data, what it needs, and what it costs.

`full-scale.yaml` holds the settings and `datasets.yaml` the data sets.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kvbench.errors import InputError, did_you_mean
from kvbench.reproduce.command import RUN, Reproduction, reproduced
from kvbench.reproduce.datasets import DataSet, published_data_sets
from kvbench.reproduce.paper import MODEL
from kvbench.spec import parse_methods
from kvbench.sweep.command import ALL, Choices
from kvbench.sweep.progress import Listener

if TYPE_CHECKING:
    from kvbench.models.load import LoadedModel
    from kvbench.sweep.forecast import Workload

FULL_SCALE = Path(__file__).parent / "full-scale.yaml"
LEARNT = ("duoattention", "prulong")  # methods that need head scores

# Llama-3.1-8B: parameters, and bytes of keys and values per token (32 layers of 8 KV heads of 128).
PARAMETERS = 8_030_000_000
KV_BYTES = 2 * 32 * 8 * 128 * 2
WORKING_BYTES = 4 * 2**30  # activations of a prefill chunk of 32K tokens, in bfloat16
SHAPE = Path(__file__).parent / "llama-3.1-8b.json"  # of the paper's model, whose files are gated


def workloads(
    tasks: Sequence[str] | None,
    *,
    context: int,
    samples: int | None = None,
    answer: int = 128,
) -> "list[Workload]":
    """The data sets of the paper's tasks, cut to `context` tokens; None: all tasks.

    `samples` of a task, at most, are taken from its data sets in turn. A task that the paper does
    not have is one data set of `samples` (None: 100), whose prompts fill the context, with answers
    of `answer` tokens.
    """
    from kvbench.sweep.forecast import Workload

    known = published_data_sets()
    loads = []
    for task in tasks or dict.fromkeys(each.task for each in known.values()):
        sets = [each for each in known.values() if each.task == task]
        taken = in_turn([round(each.samples * each.rows) for each in sets], samples)
        for each, count in zip(sets, taken, strict=True):
            limit = min(each.answer_limit, context - 1)
            prompt = min(each.prompt_tokens, each.input_limit - limit, context - limit)
            loads.append(Workload(task, each.name, count, prompt, limit))
        if not sets:
            limit = min(answer, context - 1)
            loads.append(Workload(task, task, samples or 100, context - limit, limit))
    return loads


def in_turn(sizes: Sequence[int], count: int | None) -> list[int]:
    """How many of `count` samples (None: all) come from sets of these sizes, taken in turn."""
    taken, left = [0] * len(sizes), sum(sizes) if count is None else min(count, sum(sizes))
    while left:
        for place in [p for p, size in enumerate(sizes) if taken[p] < size][:left]:
            taken[place] += 1
            left -= 1
    return taken


def shapes(name: str, config: Path | None, dtype: str) -> "LoadedModel":
    """A model without weights, as `kvbench.models.shapes.read_shapes`; the paper's comes along."""
    from kvbench.models.shapes import read_shapes

    return read_shapes(name, SHAPE if config is None and name == MODEL else config, dtype)


def full_settings() -> dict[str, Any]:
    """The configuration of the full scale, as `kvbench run --config` takes it."""
    return dict(yaml.safe_load(FULL_SCALE.read_text(encoding="utf-8")))


def check_part(part: Mapping[str, Any], judged: bool) -> None:
    """InputError if a part of the full scale names tasks or methods that there are not.

    `judged`: whether there is a judge, which some tasks need.
    """
    known = full_settings()["task"]
    for name in part.get("task", known):
        if name not in known:
            raise InputError(f"the full scale has no task '{name}': {did_you_mean(name, known)}")
    asked = part.get("task", known)
    if not scored_tasks(judged) & set(asked):
        raise InputError(
            f"a language model judges the answers of {', '.join(asked)}: give --judge and "
            "--judge-url, or another --task"
        )
    for name in part.get("method", ()):
        if name != ALL:
            parse_methods(name, {})


def scored_tasks(judged: bool) -> set[str]:
    """The tasks with a data set that can be scored; `judged`: whether there is a judge."""
    return {d.task for d in published_data_sets().values() if judged or not d.left_out}


def full_choices(
    out: Path,
    data: Path,
    *,
    options: Mapping[str, str],
    judge: tuple[str, str] | None,
    **changed: Any,
) -> Choices:
    """The full scale as a sweep into the folder `out`, on the task files in `data`.

    `options` are added to those of the methods, `changed` replaces other fields of Choices. Tasks
    whose data sets are all judged are left out without a judge.
    """
    check_part(changed, judge is not None)
    settings = {key.replace("-", "_"): value for key, value in full_settings().items()} | changed
    scored = scored_tasks(judge is not None)
    settings["task"] = [str(data / task) for task in settings["task"] if task in scored]
    for name in ("method", "task", "budgets", "prefill_chunk"):
        settings[name] = tuple(settings[name])
    given = {**settings["option"], **options}
    settings["option"] = options_for(settings["method"], given)
    if judge:
        settings["judge"], settings["judge_url"] = judge
    return Choices(out=out, **settings)


def options_for(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, without the full scale's own ones of methods that are not in `names`."""
    own = full_settings()["option"]
    return {
        key: value if isinstance(value, tuple) else str(value)
        for key, value in options.items()
        if key not in own or any(key.partition(".")[0] in name for name in names)
    }


def missing_for_full_scale(
    data: Path, options: Mapping[str, str], judged: bool, part: Mapping[str, Any]
) -> list[str]:
    """What this machine lacks to run the full scale, or `part` of it, one line each.

    Raises InputError if there is no such part.
    """
    check_part(part, judged)
    settings = {**full_settings(), **part}
    model, context = str(settings["model"]), int(settings["context"])
    missing = [
        # the cluster has its own
        None if settings.get("ray") else _missing_gpu(context, settings.get("gpus_per_worker", 1)),
        _missing_model(model),
        *missing_data(data, judged, settings["task"]),
        _missing_scores(model, settings["method"], options),
    ]
    return [text for text in missing if text is not None]


def absent_data(data: Path, judged: bool, tasks: Sequence[str]) -> list[DataSet]:
    """The data sets of the tasks that have no task file in `data`; the judged ones if `judged`."""
    of_tasks = [each for each in published_data_sets().values() if each.task in tasks]
    wanted = [each for each in of_tasks if judged or not each.left_out]
    return [each for each in wanted if not (data / each.task / f"{each.name}.jsonl").is_file()]


def missing_data(data: Path, judged: bool, tasks: Sequence[str]) -> list[str]:
    """The task files that are not in `data`, by benchmark, with the command that makes them."""
    lines = []
    absent = absent_data(data, judged, tasks)
    for benchmark in dict.fromkeys(each.benchmark for each in absent):
        mine = [each for each in absent if each.benchmark == benchmark and not each.left_out]
        if not mine:
            continue
        tasks = ",".join(dict.fromkeys(each.task for each in mine))
        lines.append(
            f"task files in {data}: {', '.join(each.name for each in mine)}; make them with "
            f"'kvbench convert {benchmark} CHECKOUT --task {tasks} --out {data}'"
        )
    if judged_ones := [f"{each.task}/{each.name}.jsonl" for each in absent if each.left_out]:
        lines.append(
            f"task files in {data} for the judge: {', '.join(judged_ones)}; kvbench convert leaves "
            "them out, so write them with the metric 'judged' (docs/reproduce.md)"
        )
    return lines


def _missing_gpu(context: int, count: int) -> str | None:
    needed = 2 * PARAMETERS + 2 * KV_BYTES * context + WORKING_BYTES
    want = f"a CUDA GPU with {needed / 2**30:.0f} GiB of memory"
    try:
        import torch
    except ModuleNotFoundError:
        return f"{want}, and PyTorch to use it: pip install 'kvbench[run]'"
    if not torch.cuda.is_available():
        return f"{want}: there is none that PyTorch {torch.__version__} can use"
    gpus = range(torch.cuda.device_count())
    sizes = [torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus]
    memory = max(sizes) if count == 1 else sum(sizes[:count])
    which = "the largest here has" if count == 1 else f"the first {count} here have"
    return None if memory >= needed else f"{want}: {which} {memory / 2**30:.0f} GiB"


def _missing_model(name: str) -> str | None:
    try:
        from huggingface_hub import HfApi, try_to_load_from_cache
    except ModuleNotFoundError:
        return f"the model {name}: pip install 'kvbench[run]', to load it with"
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    try:
        HfApi().auth_check(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        return f"the model {name}: it is not in the hub's cache, and the hub says: {reason}"
    return None


def _missing_scores(model: str, names: Sequence[str], options: Mapping[str, str]) -> str | None:
    """A line about head scores that no option names; models from the hub come with none."""
    splits = [name for name in LEARNT if name in names]
    wanted = [m for m in splits if not Path(options.get(f"{m}.scores", "")).is_file()]
    if not wanted:
        return None
    given = " ".join(f"--option {name}.scores=FILE" for name in wanted)
    return f"head scores of {model}: learn them with 'kvbench train', and give {given}"


def reproduce_full(
    out: Path,
    data: Path,
    *,
    threshold: float,
    listener: Listener | None = None,
    options: Mapping[str, str],
    judge: tuple[str, str] | None,
    part: Mapping[str, Any],
) -> Reproduction:
    """Measure the full scale, or what `part` chooses of it, and report it as `reproduced`.

    `part` has fields of Choices. `judge` is a model and its address. Raises InputError.
    """
    choices = full_choices(out / RUN, data, options=options, judge=judge, **part)
    return reproduced(choices, out, threshold, listener, left_out_notes(choices))


def left_out_notes(choices: Choices) -> list[str]:
    """What a reader must know of a full-scale sweep's data sets: who judged, what is missing."""
    judged = [each.name for each in published_data_sets().values() if each.left_out]
    if choices.judge:
        return [f"Judged by {choices.judge} at {choices.judge_url}: {', '.join(judged)}."]
    return [
        f"Left out: {', '.join(judged)}, whose answers are judged by a language model "
        "(--judge MODEL). The paper's longqa and summ include them."
    ]
