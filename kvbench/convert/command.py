"""`kvbench convert`: task files from the public data of HELMET and LongProc.

The projects' own loaders run in a process of their own (`worker.py`), so prompts, demonstrations
and drawing are theirs. What the worker prints is checked here and written: a folder for each of the
paper's tasks, with a task file for each data set and a `manifest.json`. A folder appears when all
of its files are complete. `docs/published-data.md` is for users.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import kvbench
from kvbench.errors import InputError, did_you_mean
from kvbench.files import read_regular
from kvbench.registry import open_task
from kvbench.reproduce.datasets import DataSet, published_data_sets

WORKER = Path(__file__).with_name("worker.py")
MANIFEST = "manifest.json"
# What HELMET's configurations list for each data set.
CONFIGURED = ("datasets", "test_files", "demo_files", "input_max_length", "generation_max_length")
# Names that pip knows packages by, where they are not the modules'.
PACKAGES = {"yaml": "pyyaml", "pytrec_eval": "pytrec-eval-terrier", "rouge_score": "rouge-score"}
HUB = (
    "its data come from the Hugging Face hub or its cache, and datasets from 4 on run no data set "
    "scripts: give a --python with datasets<4, or put the data set's Parquet files in a folder of "
    "its hub name inside the checkout"
)


@dataclass(frozen=True)
class Benchmark:
    """A project whose loader makes prompts."""

    name: str  # as its papers write it
    repository: str
    loader: str  # file of a checkout
    data: str  # where to get the data
    length: str | None  # of the paper; None: all


BENCHMARKS = {
    "helmet": Benchmark(
        name="HELMET",
        repository="https://github.com/princeton-nlp/HELMET",
        loader="data.py",
        data="scripts/download_data.sh of the checkout gets data.tar.gz from princeton-nlp/HELMET "
        "on the Hugging Face hub; --data FOLDER names another folder",
        length="131072",
    ),
    "longproc": Benchmark(
        name="LongProc",
        repository="https://github.com/princeton-pli/LongProc",
        loader="longproc/longproc_data.py",
        data="the repository has them in its folder data; --data FOLDER names another folder",
        length=None,
    ),
}


@dataclass(frozen=True)
class Request:
    """What to convert, and how."""

    benchmark: str
    checkout: Path
    out: Path
    python: str
    tasks: tuple[str, ...] | None = None  # of the paper, or data sets; None: all
    length: str | None = None  # tokens of HELMET's inputs; 0.5k, 2k or 8k of LongProc
    samples: int | None = None  # questions of each data set; None: as published
    seed: int = 42
    data: Path | None = None  # None: the folder `data` of the checkout
    stop_at_newline: bool = False
    one_row_per_question: bool = False

    @property
    def source(self) -> Benchmark:
        """The benchmark's facts."""
        return BENCHMARKS[self.benchmark]

    def place(self, path: str) -> Path:
        """A file of a data set, whose path is given as in a checkout."""
        top, *rest = Path(path).parts
        return self.data.joinpath(*rest) if self.data and top == "data" else self.checkout / path


def convert(request: Request, say: Callable[[str], None]) -> None:
    """Write a folder of task files for each task.

    Raises InputError before anything is written if a file is missing or a folder exists. If a data
    set fails, its task is not written; the other tasks are, and InputError is raised in the end.
    """
    source = request.source
    if not (request.checkout / source.loader).is_file():
        raise InputError(
            f"{request.checkout} has no {source.loader}; give the folder of a {source.name} "
            f"checkout: git clone {source.repository}"
        )
    data = request.data and request.data.resolve()
    request = replace(request, checkout=request.checkout.resolve(), data=data)
    by_task: dict[str, list[DataSet]] = {}
    for data_set in wanted(request):
        by_task.setdefault(data_set.task, []).append(data_set)
    check_files(request, by_task)
    failures = []
    for task, data_sets in by_task.items():
        try:
            convert_task(request, task, data_sets, say)
        except InputError as error:
            failures.append(str(error))
    for failure in failures[:-1]:
        say(failure)
    if failures:
        raise InputError(failures[-1])


def wanted(request: Request) -> list[DataSet]:
    """The data sets that the request names, at its length. Raises InputError."""
    name, length = request.source.name, request.length or request.source.length
    paper = [d for d in published_data_sets().values() if d.benchmark == request.benchmark]
    by_length: dict[str | None, list[DataSet]] = {request.source.length: paper}
    if request.benchmark == "longproc":
        for data_set in paper:
            by_length.setdefault(data_set.name.rpartition("_")[2], []).append(data_set)
    elif length != request.source.length:
        for data_set in configured(request.checkout, paper):
            by_length.setdefault(str(data_set.input_limit), []).append(data_set)
    if length not in by_length:
        known = ", ".join(text for text in by_length if text)
        raise InputError(f"{name} has no data of --length {length}; choose one of {known}")
    names = {text for d in by_length[length] for text in (d.task, d.name)}
    for text in request.tasks or ():
        if text not in names:
            at = f" of length {length}" if request.length else ""
            hint = did_you_mean(text, names)
            raise InputError(f"{name} has no task or data set '{text}'{at} here: {hint}")
    asked = names if request.tasks is None else set(request.tasks)
    return [d for d in by_length[length] if asked & {d.task, d.name}]


def configured(checkout: Path, paper: Iterable[DataSet]) -> Iterator[DataSet]:
    """HELMET's data sets at other lengths, as the checkout's own configurations have them."""
    of_family = {_family(d.name): d for d in paper}
    for task in dict.fromkeys(d.task for d in of_family.values()):
        path = checkout / "configs" / f"{task}_short.yaml"
        try:
            settings = yaml.safe_load(read_regular(path))
            columns = [str(settings[key]).split(",") for key in CONFIGURED]
            rows = list(zip(*columns, strict=True))
        except (OSError, KeyError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path} does not name the data of other lengths: {error}") from error
        for name, data, demos, limit, answer in rows:
            if of := of_family.get(_family(name)):
                found = replace(of, name=name, data=data or None, demos=demos or None)
                yield replace(found, input_limit=int(limit), answer_limit=int(answer))


def _family(name: str) -> str:
    """A data set's name without its length."""
    return re.sub(r"_\d{3,}(shot_balance)?$", "", name)


def check_files(request: Request, by_task: dict[str, list[DataSet]]) -> None:
    """InputError if a file of the data is missing, or a folder of the output exists."""
    used = [d for data_sets in by_task.values() for d in data_sets if not d.left_out]
    files = dict.fromkeys(path for d in used for path in d.files)
    if missing := [path for path in files if not request.place(path).is_file()]:
        raise InputError(
            f"the data of {request.source.name} are not complete in {request.place('data')}; "
            f"missing: {', '.join(missing)}; {request.source.data}"
        )
    for folder in (request.out / task for task in by_task):
        if folder.exists():
            raise InputError(f"{folder} exists; delete it, or choose another --out")


def convert_task(
    request: Request, task: str, data_sets: list[DataSet], say: Callable[[str], None]
) -> None:
    """Write the folder of a task."""
    source, folder = request.source, request.out / task
    left_out = {d.name: d.left_out for d in data_sets if d.left_out}
    for name, reason in left_out.items():
        say(f"{name} is left out: {reason}")
    files = {}
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{task}-", dir=request.out) as temporary:
            draft = Path(temporary) / task
            draft.mkdir()
            for data_set in (d for d in data_sets if not d.left_out):
                path = draft / f"{data_set.name}.jsonl"
                files[path.name] = entry = write_data_set(request, data_set, path)
                say(f"{data_set.name}: {entry['rows']} rows, {entry['questions']} questions")
            manifest = {
                "source": request.benchmark,
                "repository": source.repository,
                "commit": _commit(request.checkout, source.loader),
                "loader": {source.loader: _digest(request.checkout / source.loader)},
                "task": task,
                "column": task,  # of the paper's tables
                "options": {
                    "length": request.length or source.length,
                    "samples": request.samples,
                    "seed": request.seed,
                    "stop_at_newline": request.stop_at_newline,
                    "one_row_per_question": request.one_row_per_question,
                },
                "kvbench": kvbench.__version__,
                "files": files,
                "left_out": left_out,
            }
            (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            draft.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    say(f"wrote {folder}")


def write_data_set(request: Request, data_set: DataSet, path: Path) -> dict[str, Any]:
    """Write the task file of a data set, and return its entry in the manifest."""
    versions: dict[str, str] = {}
    questions = set()
    rows = 0
    always = {
        "metric": data_set.metric,
        "max_new_tokens": data_set.answer_limit,
        "chat": data_set.chat,
    }
    if request.stop_at_newline and data_set.newline:
        always["stop"] = ["\n"]
    with path.open("w", encoding="utf-8") as file:
        for sample in draw(request, data_set, versions):
            given = {key: value for key, value in sample.items() if value not in (None, "")}
            line = {"id": f"{data_set.name}-{rows}", **given, **always}
            file.write(json.dumps(line) + "\n")
            questions.add(sample.get("cluster") or rows)
            rows += 1
    if not rows:
        raise InputError(f"{data_set.name}: {request.source.name}'s loader gave no example")
    check_as_run(path, rows)
    return {
        "data_set": data_set.name,
        "rows": rows,
        "questions": len(questions),
        "sha256": _digest(path),
        "sources": {name: _digest(request.place(name)) for name in data_set.files},
        "versions": versions,
    }


def check_as_run(path: Path, rows: int) -> None:
    """InputError if `kvbench run` would refuse a line of a task file."""
    try:
        open_task(str(path)).ready(rows, None, None)
    except InputError as error:
        raise InputError(str(error).replace(str(path), path.stem)) from None


def draw(request: Request, data_set: DataSet, versions: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The samples of a data set; HELMET's loader draws, LongProc's samples are drawn here.

    HELMET draws LongProc's with the shuffle of `datasets`, which is a permutation by numpy.
    """
    samples = request.samples or data_set.samples
    found = run_worker(request, data_set, samples, versions)
    if request.benchmark == "helmet":
        yield from found
    else:
        rows = list(found)
        order = np.random.default_rng(request.seed).permutation(len(rows))
        yield from (rows[index] for index in order[:samples])


def run_worker(
    request: Request, data_set: DataSet, samples: int, versions: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """The samples that the worker prints, and the `versions` that it ran with.

    Raises InputError if it fails.
    """
    job = {
        "benchmark": request.benchmark,
        "checkout": str(request.checkout),
        "data": str(request.place("data")),
        "name": data_set.name,
        "path": str(request.place(data_set.data)) if data_set.data else "",
        "demos": str(request.place(data_set.demos)) if data_set.demos else "",
        "settings": {
            "shots": data_set.shots,
            "max_test_samples": samples,
            "seed": request.seed,
            "input_max_length": data_set.input_limit,
            "generation_max_length": data_set.answer_limit,
            "use_chat_template": data_set.chat,
        },
        "question": data_set.question,
        "one_row": request.one_row_per_question,
    }
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                [request.python, "-X", "utf8", str(WORKER), json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise InputError(
                f"cannot run --python {request.python}: {error.strerror}; give a Python that has "
                f"what the checkout's requirements.txt lists"
            ) from error
        line: dict[str, Any] = {}
        count = 0
        try:
            for text in process.stdout or ():
                if (told := _told(text)) is None:
                    continue
                line = told
                versions.update(line.get("versions", {}))
                if "sample" in line:
                    count += 1
                    yield line["sample"]
            process.wait()
        finally:
            process.kill()
            process.wait()
        if line.get("done") != count:
            log.seek(0)
            said = log.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            code = process.returncode
            raise InputError(f"{data_set.name}: {_failure(request, data_set, line, code, said)}")


def _told(text: str) -> dict[str, Any] | None:
    """What a line of a worker says; None if it is another's: a wrapper's words, a torn line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _failure(
    request: Request, data_set: DataSet, line: dict[str, Any], code: int, said: str
) -> str:
    """What went wrong in a worker: its last line, its exit code, and the last words of its log."""
    python, name = request.python, request.source.name
    if package := line.get("package"):
        install = f"{python} -m pip install {PACKAGES.get(package, package)}"
        return f"{name}'s loader needs the package '{package}', which {python} lacks: {install}"
    if "error" in line:
        hint = "" if data_set.data else f"; {HUB}"
        return f"{name}'s loader: {line['error']}{hint}"
    ended = "was killed, perhaps for want of memory" if code == -9 else f"ended with code {code}"
    last = f"; it said last: {said[:300]}" if said else ""
    return f"{python} {ended} before {name}'s loader was done{last}"


def _commit(checkout: Path, file: str) -> str | None:
    """The commit of a checkout that tracks the file; None if there is none."""
    git = ["git", "-C", str(checkout)]
    try:
        tracked = subprocess.run([*git, "ls-files", file], capture_output=True, text=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() if tracked.stdout and head.returncode == 0 else None


def _digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
