"""Task files: what is refused, by file, line and reason, and what is read."""

import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbench.cli.app import main
from kvbench.errors import InputError
from kvbench.registry import open_task
from kvbench.task import Sample, Task

GOOD = {
    "prompt": "Ann has a red box. Which box has Ann? Answer:",
    "answer": "red",
    "metric": "substring_exact_match",
    "max_new_tokens": 8,
}
PARTS = {
    "instruction": "Read this.\n",
    "context": "Ann has a red box.",
    "question": "\nWhich box has Ann?\n",
    "answer_prefix": "Answer:",
    **{key: value for key, value in GOOD.items() if key != "prompt"},
}
LENGTH = len(GOOD["prompt"])  # type: ignore[arg-type]


def line(**changes: Any) -> bytes:
    """A good line with changes; a value of ... takes the key away."""
    values = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    return json.dumps(values).encode() + b"\n"


def parts(**changes: Any) -> bytes:
    """A good line of parts with changes."""
    values = {key: value for key, value in {**PARTS, **changes}.items() if value is not ...}
    return json.dumps(values).encode() + b"\n"


# References that no answer or every answer equals, by metric, and what is said of them.
REFERENCES: list[tuple[str, list[Any], str]] = [
    ("substring_exact_match", [" ", "?", "", [""], ["red", "the"]], "any text is right"),
    ("exact_match", ["?", ["red", "a"]], "any text is right"),
    ("label_exact_match", ["..."], "any text is right"),
    ("share_found", ["", [" "]], ""),
    (
        "ndcg@10",
        [{"id3": 1}, {"doc3": 1}, {" 3": 1}, {"03": 1}, {"3": 1, "ID3": 2}],
        "a reference must be a map from ids",
    ),
    ("ndcg@10", [{"3": 2**40}, {"3": 10**30}, {"3": 0}], "a reference must be a map from"),
    ("ndcg@10_mentions", [{"doc3": 1}], "a reference must be a map from ids"),
    (
        "row_f1",
        [
            *("", "a\tb", "a\ta\n1\t2", "a\tb\n1\t2\t3\n1\t2", "a\tb\n1\t2\n1"),
            *("a\n" + "x" * (1 << 18), "a\n1\r2\n3"),
        ],
        "a reference must be a table",
    ),
    ("table_f1", [["Alice\t3"], [{"a": "1"}], [[""]], [["a\tb"]]], "a reference"),
    ("rouge_l_f1", ["\u4f60\u597d", ["red", "\u041c\u0438\u0440"]], "a reference must be"),
    ("answer_found", ["?", ["red", "!"]], "a reference must be"),
    ("values_found", [["red", "?"]], "a reference must be"),
    (
        "choice_exact_match",
        [["B. red", "B"], ["B", ""], ["B", "B"]],
        "a reference must be [letter, line]",
    ),
    (
        "plan_accuracy",
        [{"ground_truth_cities": "New York**Rome", "ground_truth_durations": "2**3"}],
        "a reference must be cities of one word",
    ),
]

# What the third line of a file is, and a part of what is said of it.
DAMAGED: dict[str, tuple[bytes, str]] = {
    "cut off": (line()[:40], "not JSON"),
    "cut inside a word": (b'{"prompt": "x", "chat": tru\n', "not JSON"),
    "not an object": (b'"text"\n', "expected a JSON object"),
    "a number": (b"7\n", "expected a JSON object"),
    "null": (b"null\n", "expected a JSON object"),
    "a list": (b"[1, 2]\n", "it is a list"),
    "two objects": (line().strip() + line(), "not JSON (Extra data"),
    "pretty-printed": (b'{\n  "prompt": "x"\n}\n', "each sample is one line"),
    "csv": (b"prompt,answer\n", "a line is a JSON object"),
    "empty": (b"\n", "it is empty"),
    "blanks": (b"  \t \n", "it is empty"),
    "single quotes": (b"{'prompt': 'x'}\n", "not JSON"),
    "NaN": (b'{"prompt": "x", "reference": NaN}\n', "NaN is not a number"),
    "Infinity": (b'{"prompt": "x", "reference": -Infinity}\n', "-Infinity is not a number"),
    "1e999": (b'{"prompt": "x", "reference": 1e999}\n', "the number 1e999 is too large"),
    "an int of 5000 digits": (
        b'{"max_new_tokens": ' + b"9" * 5000 + b"}\n",
        "of 5000 digits is too",
    ),
    "a key twice": (b'{"prompt": "x", "prompt": "y"}\n', 'the key "prompt" twice'),
    "a key twice inside": (b'{"metadata": {"a": 1, "a": 2}}\n', 'the key "a" twice'),
    "latin-1": (line().replace(b"Ann", b"\xc4nn"), "not UTF-8 text (at byte"),
    "utf-16": (line().decode().encode("utf-16"), "not UTF-8 text but UTF-16"),
    "utf-16-le": (line().decode().encode("utf-16-le"), "not UTF-8 text but UTF-16"),
    "utf-16-be": (line().decode().encode("utf-16-be"), "not UTF-8 text but UTF-16"),
    "half a surrogate pair": (line(answer="\ud83d"), "half of a surrogate pair"),
    "NUL bytes": (b"\x00" * 64 + b"\n", "not JSON"),
    "NUL inside": (line().replace(b"red", b"r\x00d"), "not JSON (Invalid control character"),
    "deep": (b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nested too deeply"),
    "no prompt": (line(prompt=...), "it has no prompt"),
    "an empty prompt": (line(prompt=""), "its prompt is empty"),
    "a prompt that is a list": (line(prompt=["x"]), 'prompt is ["x"]; expected a text'),
    "a prompt and a context": (line(context="x"), "a prompt and context"),
    "no question": (parts(question=...), "it has no prompt"),
    "empty parts": (
        parts(instruction="", context="", question="", answer_prefix=""),
        "its context and question are empty",
    ),
    "parts with positions": (parts(question_at=3), "question_at belongs to a prompt"),
    "a context that is a number": (parts(context=5), "context is 5; expected a text"),
    "another prefix": (line(answer_prefix="So:"), 'does not end with its answer_prefix "So:"'),
    "no answer": (line(answer=...), "it has no answer"),
    "answer and reference": (line(reference="red"), "an answer and a reference"),
    "an empty answer": (line(answer=""), "none empty"),
    "an answer that is a number": (line(answer=42), "answer is 42; expected a text"),
    "no answers": (line(answer=[]), "answer is []"),
    "answers that are no texts": (line(answer=["a", 1]), 'answer is ["a", 1]'),
    "no metric": (line(metric=...), "it says no metric; add the key, or --metric NAME"),
    "an unknown metric": (line(metric="substring_exact"), "did you mean 'substring_exact_match'"),
    "a metric that is a number": (line(metric=1), "metric is 1; expected a text"),
    "a text for ndcg": (line(metric="ndcg@10"), "a reference must be a map from ids"),
    "ids without grades": (
        line(answer=..., reference={"ID1": "high"}, metric="ndcg@10"),
        "a reference must be a map from ids",
    ),
    "a choice of one": (line(metric="choice_exact_match"), "must be [letter, line]"),
    **{
        f"{metric}: {reference!r}": (
            line(answer=..., reference=reference, metric=metric),
            f'metric "{metric}": {reason}',
        )
        for metric, references, reason in REFERENCES
        for reference in references
    },
    "an answer in the answer's start": (
        parts(answer_prefix="It is red:"),
        "its answer_prefix 'It is red:' is right already",
    ),
    "a value in the answer's start": (
        parts(answer_prefix="It is red:", answer=["red", "blue"], metric="share_found"),
        "its answer_prefix 'It is red:' is right already",
    ),
    "a line in the answer's start": (
        parts(answer_prefix="B. red", answer=["B", "B. red"], metric="choice_exact_match"),
        "its answer_prefix 'B. red' is right already",
    ),
    "a plan without days": (
        line(answer=..., reference={"ground_truth_cities": "Rome"}, metric="plan_accuracy"),
        "ground_truth_durations",
    ),
    "no max_new_tokens": (line(max_new_tokens=...), "says no max_new_tokens; add the key, or"),
    "max_new_tokens 0": (line(max_new_tokens=0), "max_new_tokens is 0; expected at least 1"),
    "max_new_tokens -1": (line(max_new_tokens=-1), "max_new_tokens is -1"),
    "max_new_tokens true": (line(max_new_tokens=True), "max_new_tokens is true; expected a whole"),
    "max_new_tokens 1e9": (line(max_new_tokens=1e9), "expected a whole number"),
    "max_new_tokens a text": (line(max_new_tokens="5"), 'max_new_tokens is "5"'),
    "chat a text": (line(chat="yes"), 'chat is "yes"; expected true or false'),
    "chat 1": (line(chat=1), "chat is 1; expected true or false"),
    "a context behind the end": (line(context_span=[0, LENGTH + 1]), f"from 0 to {LENGTH}"),
    "a context before the start": (line(context_span=[-1, 5]), "context_span is [-1, 5]"),
    "a context from end to start": (line(context_span=[9, 3]), "context_span is [9, 3]"),
    "a context of one number": (line(context_span=[3]), "context_span is [3]"),
    "a context of true": (line(context_span=[False, True]), "context_span is [false, true]"),
    "a context of fractions": (line(context_span=[0.5, 2.5]), "context_span is [0.5, 2.5]"),
    "a context of bytes": (
        line(prompt="\U0001f642" * 4 + "?", context_span=[0, 16]),
        "expected [start, end] from 0 to 5",
    ),
    "a question in the context": (
        line(context_span=[0, 20], question_at=10),
        "from 0 to 10, where the question starts",
    ),
    "a context with the answer's start": (
        line(context_span=[0, LENGTH], answer_prefix="Answer:"),
        f"[0, {LENGTH}], which reaches into its answer_prefix",
    ),
    "a question at 0": (line(question_at=0), "question_at is 0; expected 1 to"),
    "a question behind the end": (line(question_at=LENGTH), f"question_at is {LENGTH}"),
    "a question that is a text": (line(question_at="3"), "expected a whole number"),
    "a cluster that is a number": (line(cluster=3), "cluster is 3; expected a text"),
    "an id twice": (line(id="b"), 'its id "b" is that of line 2 too'),
    "an id that is a list": (line(id=[1]), "id is [1]; expected a text"),
    "an empty subtask": (line(subtask=" "), "expected a name"),
    "a subtask of two lines": (line(subtask="a\nb"), "expected a name"),
    "a stop that is a text": (line(stop="\n"), "stop is"),
    "an empty stop": (line(stop=[""]), "none empty".replace("none", "are not")),
    "metadata that is a text": (line(metadata="x"), 'metadata is "x"; expected an object'),
}


def refused(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a task that cannot be used: one line, and nothing is written."""
    out = tmp_path / "out"
    assert main(["run", "--task", task, "--method", "snapkv", "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("kvbench: ")
    assert said.err.isascii()
    assert len(said.err) < 600 + len(str(tmp_path))
    assert not out.exists()
    return said.err


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_is_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, reason = DAMAGED[kind]
    file = tmp_path / "my.jsonl"
    file.write_bytes(line(id="a") + line(id="b") + damaged + line(id="c"))
    said = refused(str(file), tmp_path, capsys)
    assert f"{file}, line 3: " in said
    assert reason in said


def test_the_last_line_may_be_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.jsonl").write_bytes(line() + line()[:-20])
    assert "my.jsonl, line 2: not JSON" in refused(str(tmp_path / "my.jsonl"), tmp_path, capsys)


def made_folder(path: Path) -> str:
    path.mkdir()
    return str(path)


def made_file(path: Path, contents: bytes = line()) -> str:
    path.write_bytes(contents)
    return str(path)


def made_fifo(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


def made_loop(path: Path) -> str:
    path.symlink_to(path)
    return str(path)


def of_folders(path: Path) -> str:
    (path / "recall").mkdir(parents=True)
    made_file(path / "recall" / "json_kv.jsonl")
    return str(path)


def of_a_folder_called_like_a_file(path: Path) -> str:
    (path / "x.jsonl").mkdir(parents=True)
    return str(path)


def unreadable(path: Path) -> str:
    made_file(path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    return str(path)


# What a path is, and a part of what is said of it.
BAD_PATHS: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda home: str(home / "none.jsonl"), "No such file"),
    "an empty file": (lambda home: made_file(home / "e.jsonl", b""), "has no lines"),
    "a folder without files": (lambda home: made_folder(home / "f"), "holds no .jsonl file"),
    "a folder called x.jsonl": (lambda home: made_folder(home / "x.jsonl"), "holds no .jsonl"),
    "a folder of folders": (lambda home: of_folders(home / "f"), "folders in it that do: recall"),
    "a folder with such a folder": (
        lambda home: of_a_folder_called_like_a_file(home / "f"),
        "x.jsonl is no file",
    ),
    "a FIFO": (lambda home: made_fifo(home / "x.jsonl"), "is no file and no folder"),
    "a device": (lambda home: "/dev/null", "is no file and no folder"),
    "a loop of links": (lambda home: made_loop(home / "x.jsonl"), "symbolic links"),
    "unreadable": (lambda home: unreadable(home / "x.jsonl"), "Permission denied"),
    "gzip": (lambda home: made_file(home / "x.jsonl", b"\x1f\x8b\x08\x00"), "it is compressed"),
    "a JSON array": (
        lambda home: made_file(home / "x.jsonl", b"[" + line().strip() + b"]"),
        "line 1: it is a list",
    ),
    "a pretty-printed array": (
        lambda home: made_file(home / "x.jsonl", b'[\n {"prompt": "x"}\n]\n'),
        "each sample is one line",
    ),
    "a csv file": (
        lambda home: made_file(home / "x.jsonl", b"prompt,answer\r\nx,y\r\n"),
        "line 1: not JSON",
    ),
    "a name of two lines": (lambda home: made_file(home / "a\nb.jsonl"), "cannot be shown"),
    "a name with colour": (lambda home: made_file(home / "\x1b[31m.jsonl"), "\\x1b[31m"),
    "a name that is not UTF-8": (
        lambda home: made_file(home / os.fsdecode(b"\xff.jsonl")),
        "cannot be shown",
    ),
    "a NUL in the name": (lambda home: str(home / "a\0.jsonl"), "null byte"),
    "two tasks of a name": (
        lambda home: f"{made_file(home / 'recall.jsonl')},{of_folders(home / 'f')}/recall",
        "two tasks are called 'recall'",
    ),
    "an unknown source": (lambda home: "zip:my", "unknown task 'zip:my'"),
    "hf without a name": (lambda home: "hf:", "names no data set"),
}


@pytest.mark.parametrize("kind", BAD_PATHS)
def test_a_path_that_is_no_task_is_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, reason = BAD_PATHS[kind]
    assert reason in refused(make(tmp_path), tmp_path, capsys)


def ready(path: Path | str, count: int = 100, **given: Any) -> Task:
    """The task of a path, ready for a sweep."""
    task = open_task(str(path))
    task.ready(count, given.get("metric"), given.get("max_new_tokens"))
    return task


def samples(task: Task) -> list[Sample]:
    """All samples of a task that is ready."""
    assert task.size is not None
    tokenizer: Any = None
    return list(task.samples(task.size, seed=0, context=0, tokenizer=tokenizer))


@pytest.mark.parametrize(
    "contents",
    [
        line() + line(prompt="x"),
        (line() + line(prompt="x")).rstrip(b"\n"),
        line().replace(b"\n", b"\r\n") + line(prompt="x").replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + line() + line(prompt="x"),
        line(chat=None, cluster=None, reference=None) + line(prompt="x"),
        line(answer=["red", "crimson"]) + line(prompt="\u4f60\U0001f642"),
        line(length=3, task="mk_2") + line(prompt="x", metadata={"a": [1, None]}),
        line(id=1) + line(id="2"),
        line(context_span=[0, LENGTH], stop=["\n"]) + line(context_span=[0, 0]),
    ],
)
def test_variants_are_read(contents: bytes, tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(contents)
    first, second = samples(ready(path))
    assert (first.task, first.subtask, first.index, second.index) == ("my", "my", 0, 1)
    assert (first.prompt, first.max_new_tokens, first.metric) == (
        GOOD["prompt"],
        8,
        "substring_exact_match",
    )


def test_parts_are_put_together_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(parts(answer_prefix="\u00c4:") + parts(answer_prefix=..., question=""))
    first, second = samples(ready(path))
    assert first.prompt == "Read this.\nAnn has a red box.\nWhich box has Ann?\n\u00c4:"
    assert first.context_span is not None
    assert first.prompt[slice(*first.context_span)] == PARTS["context"]
    assert first.prompt[: first.question_at] == "Read this.\nAnn has a red box."
    assert (second.question_at, second.answer_prefix) == (None, "")


def test_what_a_line_does_not_say_comes_from_the_command(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(line(metric=..., max_new_tokens=...) + line(metric="exact_match"))
    task = ready(path, metric="share_found", max_new_tokens=5)
    told = [(sample.metric, sample.max_new_tokens) for sample in samples(task)]
    assert told == [("share_found", 5), ("exact_match", 8)]
    assert task.metric == "exact_match, share_found"
    with pytest.raises(InputError, match="unknown metric 'nothing'"):
        ready(path, metric="nothing")


def test_only_lines_that_are_used_are_read(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(line() + line(prompt="x") + b"damaged\n")
    assert [sample.prompt for sample in samples(ready(path, 2))] == [GOOD["prompt"], "x"]
    with pytest.raises(InputError, match="line 3: not JSON"):
        ready(path, 3)


def test_the_files_of_a_folder_take_turns(tmp_path: Path) -> None:
    home = tmp_path / "recall"
    home.mkdir()
    made_file(home / "b.jsonl", b"".join(line(prompt=f"b{i}") for i in range(4)))
    made_file(home / "a.jsonl", line(prompt="a0") + line(prompt="a1", subtask="other"))
    made_file(home / "manifest.json", b"{}")
    made_file(home / ".hidden.jsonl", b"")
    task = ready(home)
    assert (task.name, task.subtasks, task.size) == ("recall", ("a", "b"), 6)
    assert [sample.prompt for sample in samples(task)] == ["a0", "b0", "a1", "b1", "b2", "b3"]
    assert [sample.subtask for sample in samples(task)] == ["a", "b", "other", "b", "b", "b"]
    assert task.place(3) == f"{home / 'b.jsonl'}, line 2"
    assert [sample.prompt for sample in samples(ready(home, 3))] == ["a0", "b0", "a1"]


def test_an_empty_file_of_a_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = made_folder(tmp_path / "home")
    made_file(tmp_path / "home" / "a.jsonl", line())
    made_file(tmp_path / "home" / "b.jsonl", b"")
    assert "b.jsonl is empty; fill it, or move it" in refused(home, tmp_path, capsys)


def test_files_that_no_sample_comes_from_are_told(tmp_path: Path) -> None:
    made_folder(tmp_path / "home")
    for name in "abc":
        made_file(tmp_path / "home" / f"{name}.jsonl", line())
    assert ready(tmp_path / "home").remarks == ()
    assert ready(tmp_path / "home", 1).remarks[-1] == (
        "home: no sample of 2 of 3 subtasks, which count nothing in its score: b, c; --samples 3 "
        "takes one of each"
    )


def test_keys_that_mean_nothing_are_named_once(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(line(length=3) + line(length=4, depth=1))
    task = ready(path)
    assert task.remarks == ("my: keys that are not used: depth, length",)
    assert samples(task)[1].metadata == {"length": 4, "depth": 1}


def test_lines_that_a_run_does_not_use_are_told(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(line() + line(stops=["x"]) + b"damaged")
    task = ready(path, 2)
    assert task.remarks == (
        "my: the first 2 samples; there are more",
        "my: keys that are not used: stops",
    )
    assert ready(path, 1).remarks == ("my: the first sample; there are more",)
    path.write_bytes(line() + line(stops=["x"]))
    assert ready(path, 2).remarks == ("my: keys that are not used: stops",)


def test_check_names_keys_that_mean_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(line(answer="red fox", stops=["x"]))
    assert main(["check", str(path)]) == 0
    assert "keys        my: keys that are not used: stops" in capsys.readouterr().out


def test_the_start_of_an_answer_is_scored_with_it_but_in_a_chat(tmp_path: Path) -> None:
    """ "label:" before the output, and its line is the answer; as in HELMET."""
    path = tmp_path / "my.jsonl"
    path.write_bytes(parts(answer_prefix="label:", answer="7", metric="exact_match"))
    task = ready(path)
    sample = samples(task)[0]
    assert task.score("7", replace(sample, chat=True)) == 1.0
    label = replace(sample, metric="label_exact_match")
    assert task.score(" 7\nlabel: 8", label) == 1.0


@pytest.mark.parametrize("prefix", ["Answer:", "label:", "Result:", "Answer: it is"])
@pytest.mark.parametrize("metric", ["exact_match", "label_exact_match", "rouge_l_f1"])
def test_an_answer_is_found_behind_any_start(prefix: str, metric: str, tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(parts(answer_prefix=prefix, answer="seven", metric=metric))
    task = ready(path)
    assert task.score(" Seven.\nQuestion: Answer: eight", samples(task)[0]) == 1.0
    assert task.score(" eight", samples(task)[0]) == 0.0


def test_lines_are_found_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbench.tasks.task_file.BLOCK", 7)
    monkeypatch.setattr("kvbench.tasks.task_file.LONGEST_LINE", 400)
    path = tmp_path / "my.jsonl"
    path.write_bytes(b"".join(line(prompt="x" * i) for i in (5, 50, 1)))
    assert [len(sample.prompt) for sample in samples(ready(path))] == [5, 50, 1]
    path.write_bytes(line() + line(prompt="x" * 500))
    with pytest.raises(InputError, match="line 2: it is longer than"):
        ready(path)


def test_rows_of_the_hub_are_read_in_streaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    made_file(tmp_path / "test.jsonl", b"".join(parts(length=i) for i in range(5)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = ready(f"hf:{tmp_path}", 3)
    assert (task.name, task.size) == (tmp_path.name, 3)
    task.ready(10, None, None)  # goes on where it stopped
    assert [sample.metadata for sample in samples(task)] == [{"length": i} for i in range(5)]
    assert datasets
    with pytest.raises(InputError, match="cannot read hf:"):
        ready(f"hf:{tmp_path}:default:none")
    made_file(tmp_path / "test.jsonl", parts() + parts(answer=[]))
    with pytest.raises(InputError, match="hf:/ names no data set"):
        ready("hf:/")
    with pytest.raises(InputError, match="row 2: answer is "):
        ready(f"hf:{tmp_path}")


def test_a_large_file_is_neither_read_nor_held(tmp_path: Path) -> None:
    """A file of 4 GB (mostly a hole on the disk): only its first lines are touched."""
    path = tmp_path / "large.jsonl"
    path.write_bytes(line() + line(prompt="x"))
    os.truncate(path, 1 << 32)
    tracemalloc.start()
    task = ready(path, 2)
    assert [sample.prompt for sample in samples(task)] == [GOOD["prompt"], "x"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    with pytest.raises(InputError, match="line 3: it is longer than 64 MiB"):
        ready(path, 3)
