"""`kvbench convert`: task files from the public data of HELMET and LongProc.

The projects' own loaders run in a process of their own (`worker.py`), so prompts, demonstrations
and drawing are theirs. What the worker prints is checked here and written: a folder for each of the
paper's tasks, with a task file for each of its data sets and a `manifest.json`. A folder appears
when all of its files are complete.
"""

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import kvbench
from kvbench.errors import InputError, did_you_mean
from kvbench.metrics import metrics
from kvbench.reproduce.datasets import DataSet, published_data_sets

WORKER = Path(__file__).with_name("worker.py")
MANIFEST = "manifest.json"
PAPER_LENGTH = 131072  # tokens of HELMET's inputs in the paper
# Names that pip knows packages by, where it is not the module's.
PACKAGES = {"yaml": "pyyaml", "pytrec_eval": "pytrec-eval-terrier", "rouge_score": "rouge-score"}
# What HELMET's configurations list for each data set.
CONFIGURED = ("datasets", "test_files", "demo_files", "input_max_length", "generation_max_length")


@dataclass(frozen=True)
class Benchmark:
    """A project whose loader makes prompts."""

    name: str  # as its papers write it
    repository: str
    loader: str  # file of a checkout
    data: str  # where to get the data


BENCHMARKS = {
    "helmet": Benchmark(
        "HELMET",
        "https://github.com/princeton-nlp/HELMET",
        "data.py",
        "it is in data.tar.gz of the data set princeton-nlp/HELMET on the Hugging Face hub "
        "(scripts/download_data.sh in the checkout gets it); or name its folder: --data FOLDER",
    ),
    "longproc": Benchmark(
        "LongProc",
        "https://github.com/princeton-pli/LongProc",
        "longproc/longproc_data.py",
        "it is in the repository's folder data; or name its folder: --data FOLDER",
    ),
}
HUB = (
    "its data come from the Hugging Face hub or its cache, and datasets 4 and later load no data "
    "set scripts: use a --python with datasets<4, or put the data set's Parquet files in a folder "
    "of its hub name inside the checkout"
)


@dataclass(frozen=True)
class Request:
    """What to convert, and how."""

    benchmark: str
    checkout: Path
    out: Path
    tasks: tuple[str, ...] | None = None  # of the paper, or data sets; None: all
    length: str | None = None  # HELMET: tokens; LongProc: 0.5k, 2k or 8k
    samples: int | None = None  # questions of each data set; None: as published
    seed: int = 42
    python: str = "python3"
    data: Path | None = None  # None: the folder `data` of the checkout
    stop_at_newline: bool = False
    one_row_per_question: bool = False

    @property
    def source(self) -> Benchmark:
        """The benchmark's facts."""
        return BENCHMARKS[self.benchmark]

    def options(self) -> dict[str, Any]:
        """What changes the samples."""
        names = ("length", "samples", "seed", "stop_at_newline", "one_row_per_question")
        return {name: getattr(self, name) for name in names}

    def place(self, path: str) -> Path:
        """A file of the data, whose path in a checkout starts with `data`."""
        top, *rest = Path(path).parts
        return self.data.joinpath(*rest) if self.data and top == "data" else self.checkout / path


def convert(request: Request, say: Callable[[str], None]) -> list[Path]:
    """Write a folder of task files for each task, and return the folders.

    A data set that fails leaves its task out; the others are converted. Raises InputError before
    anything is written if a file is missing, and in the end if a data set failed.
    """
    source = request.source
    if not (request.checkout / source.loader).is_file():
        raise InputError(
            f"{request.checkout} has no {source.loader}; give the folder of a {source.name} "
            f"checkout: git clone {source.repository}"
        )
    request = replace(request, checkout=request.checkout.resolve())
    by_task: dict[str, list[DataSet]] = {}
    for data_set in wanted(request):
        by_task.setdefault(data_set.task, []).append(data_set)
    check_files(request, by_task)
    failures, folders = [], []
    for task, data_sets in by_task.items():
        try:
            folders.append(convert_task(request, task, data_sets, say))
        except InputError as error:
            failures.append(str(error))
    if failures:
        for failure in failures[:-1]:
            say(failure)
        raise InputError(failures[-1])
    return folders


def wanted(request: Request) -> list[DataSet]:
    """The data sets that the request names, at its length. Raises InputError."""
    known = [d for d in published_data_sets().values() if d.benchmark == request.benchmark]
    if request.length is not None:
        at_length = longproc_length if request.benchmark == "longproc" else helmet_length
        known = at_length(request, known)
    if request.tasks is None:
        return known
    names = {name for d in known for name in (d.task, d.name)}
    for name in request.tasks:
        if name not in names:
            other = published_data_sets().values()
            if found := next((d for d in other if name in (d.task, d.name)), None):
                hint = f"it is one of {BENCHMARKS[found.benchmark].name}'s"
                if found.benchmark == request.benchmark:
                    hint = f"not at length {request.length}"
            else:
                hint = did_you_mean(name, names)
            raise InputError(f"{request.source.name} has no task or data set '{name}': {hint}")
    return [d for d in known if d.task in request.tasks or d.name in request.tasks]


def longproc_length(request: Request, known: list[DataSet]) -> list[DataSet]:
    """LongProc's data sets whose answers have a length."""
    lengths = sorted({d.name.rpartition("_")[2] for d in known})
    if request.length not in lengths:
        raise InputError(f"LongProc has no length {request.length}; choose {', '.join(lengths)}")
    return [d for d in known if d.name.endswith(f"_{request.length}")]


def helmet_length(request: Request, known: list[DataSet]) -> list[DataSet]:
    """HELMET's data sets at a length, as the checkout's own configurations have them."""
    if request.length == str(PAPER_LENGTH):
        return known
    of_family = {family(d.name): d for d in known}
    found, lengths = [], {PAPER_LENGTH}
    for task in dict.fromkeys(d.task for d in known):
        path = request.checkout / "configs" / f"{task}_short.yaml"
        if not path.is_file():
            raise InputError(f"{path} is missing, which names HELMET's data at other lengths")
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        columns = [str(settings[key]).split(",") for key in CONFIGURED]
        for name, data, demos, limit, answer in zip(*columns, strict=True):
            lengths.add(int(limit))
            if limit == request.length and (paper := of_family.get(family(name))):
                found.append(
                    replace(
                        paper,
                        name=name,
                        data=data or None,
                        demos=demos or None,
                        input_limit=int(limit),
                        answer_limit=int(answer),
                    )
                )
    if not found:
        raise InputError(
            f"HELMET has no inputs of {request.length} tokens; choose --length from "
            f"{', '.join(map(str, sorted(lengths)))}"
        )
    return found


def family(name: str) -> str:
    """A data set's name without its length."""
    return re.sub(r"_\d{3,}(shot_balance)?$", "", name)


def check_files(request: Request, by_task: dict[str, list[DataSet]]) -> None:
    """InputError if a file of the data is missing, or a folder of the output is there."""
    files = [
        path for ds in by_task.values() for d in ds if not d.left_out for path in (d.data, d.demos)
    ]
    missing = [path for path in dict.fromkeys(files) if path and not request.place(path).is_file()]
    if missing:
        folder = request.place("data")
        raise InputError(
            f"{request.source.name}'s data are not complete in {folder}: missing "
            f"{', '.join(missing)}; {request.source.data}"
        )
    for task in by_task:
        if (request.out / task).exists():
            raise InputError(f"{request.out / task} exists; delete it, or choose another --out")


def convert_task(
    request: Request, task: str, data_sets: list[DataSet], say: Callable[[str], None]
) -> Path:
    """Write the folder of a task."""
    folder = request.out / task
    manifest = {
        "source": request.benchmark,
        "repository": request.source.repository,
        "commit": commit(request.checkout, request.source.loader),
        "loader": {request.source.loader: digest(request.checkout / request.source.loader)},
        "task": task,
        "column": task,
        "options": request.options(),
        "kvbench": kvbench.__version__,
        "files": {},
        "left_out": {d.name: d.left_out for d in data_sets if d.left_out},
    }
    for name, reason in manifest["left_out"].items():
        say(f"{task}: left out {name}: {reason}")
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{task}-", dir=request.out))
    except OSError as error:
        raise InputError(f"cannot write to {request.out}: {error.strerror}") from error
    try:
        for data_set in (d for d in data_sets if not d.left_out):
            path = draft / f"{data_set.name}.jsonl"
            entry = write_data_set(request, data_set, path)
            manifest["files"][path.name] = entry
            say(f"{task}: {data_set.name}: {entry['rows']} rows of {entry['questions']} questions")
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        draft.chmod(0o755)
        draft.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def write_data_set(request: Request, data_set: DataSet, path: Path) -> dict[str, Any]:
    """Write a data set's task file; its entry of the manifest."""
    score = metrics.get(data_set.metric)
    versions: dict[str, str] = {}
    rows, questions = 0, set()
    stop = ["\n"] if request.stop_at_newline and data_set.newline else []
    with path.open("w", encoding="utf-8") as file:
        for sample in draw(request, data_set, versions):
            fault = fault_of(sample)
            try:
                score("", sample["reference"])
            except InputError as error:
                fault = str(error)
            if fault:
                raise InputError(f"{data_set.name}: example {rows}: {fault}")
            line = {
                "id": f"{data_set.name}-{rows}",
                **{key: value for key, value in sample.items() if value not in (None, "")},
                "metric": data_set.metric,
                "max_new_tokens": data_set.answer_limit,
                "chat": data_set.chat,
                **({"stop": stop} if stop else {}),
            }
            file.write(json.dumps(line) + "\n")
            questions.add(sample.get("cluster") or rows)
            rows += 1
    if not rows:
        raise InputError(f"{data_set.name}: {request.source.name}'s loader gave no example")
    sources = {
        name: digest(request.place(name)) for name in (data_set.data, data_set.demos) if name
    }
    return {
        "data_set": data_set.name,
        "rows": rows,
        "questions": len(questions),
        "sha256": digest(path),
        "sources": {name: digest(request.place(name)) for name in sources},
        "versions": versions,
    }


def fault_of(sample: dict[str, Any]) -> str | None:
    """What is wrong with a sample of the worker; None if nothing."""
    prompt, span, question = (sample.get(k) for k in ("prompt", "context_span", "question_at"))
    if not isinstance(prompt, str) or not prompt.strip():
        return "its prompt is empty"
    if span is not None and not 0 <= span[0] < span[1] <= len(prompt):
        return "its context is not in the prompt"
    if question is not None and not 0 < question < len(prompt):
        return "its question is not in the prompt"
    return None


def draw(request: Request, data_set: DataSet, versions: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The samples of a data set, as published: HELMET's loader draws, LongProc's are drawn here.

    HELMET's addon draws LongProc's with the shuffle of `datasets`, a permutation by numpy.
    """
    samples = data_set.samples if request.samples is None else request.samples
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
    """What the worker prints for a data set, and its `versions`; InputError if it fails."""
    job = {
        "benchmark": request.benchmark,
        "checkout": str(request.checkout),
        "data": str(request.place("data").resolve()),
        "name": data_set.name,
        "path": str(request.place(data_set.data).resolve()) if data_set.data else "",
        "demos": str(request.place(data_set.demos).resolve()) if data_set.demos else "",
        "settings": {
            "shots": data_set.shots,
            "max_test_samples": samples,
            "seed": request.seed,
            "input_max_length": data_set.input_limit,
            "generation_max_length": data_set.answer_limit,
            "use_chat_template": data_set.chat,
        },
        "chat": data_set.chat,
        "question": list(data_set.question),
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
            )
        except OSError as error:
            raise InputError(
                f"cannot run --python {request.python}: {error.strerror}; give a Python that has "
                f"the packages of {request.source.name}'s requirements.txt"
            ) from error
        assert process.stdout is not None
        done = False
        try:
            for text in process.stdout:
                line = json.loads(text)
                if "error" in line:
                    raise InputError(worker_failed(request, data_set, line))
                versions.update(line.get("versions", {}))
                if "sample" in line:
                    yield line["sample"]
                done = "done" in line
            process.wait()
        finally:
            process.kill()
            process.wait()
        if not done:
            log.seek(0)
            said = log.read().decode("utf-8", "replace").split("\n")
            last = next((text.strip() for text in reversed(said) if text.strip()), "nothing")
            raise InputError(
                f"{data_set.name}: {request.python} ended early with code {process.returncode}"
                f"{' (killed; out of memory?)' if process.returncode == -9 else ''}; "
                f"it said last: {last[:300]}"
            )


def worker_failed(request: Request, data_set: DataSet, line: dict[str, Any]) -> str:
    """The message for an error that the worker met."""
    if package := line.get("package"):
        install = f"{request.python} -m pip install {PACKAGES.get(package, package)}"
        return (
            f"{data_set.name}: {request.python} has no package '{package}', which "
            f"{request.source.name}'s loader needs; install it: {install}"
        )
    hint = "" if data_set.data else f"; {HUB}"
    return f"{data_set.name}: {request.source.name}'s loader: {line['error']}{hint}"


def commit(checkout: Path, file: str) -> str | None:
    """The commit of a checkout in which the file is tracked; None if it is no such checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(checkout), *words], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    return git("rev-parse", "HEAD") if git("ls-files", file) else None


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
