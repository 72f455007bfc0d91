"""`kvbench convert` on small stand-ins for the checkouts of HELMET and LongProc.

The stand-ins have the interfaces of the projects, with data and wording of their own. Real loaders
in a real process make the prompts.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kvbench.cli.app import main
from kvbench.convert.command import WORKER
from kvbench.metrics import metrics
from kvbench.registry import open_task
from kvbench.reproduce.datasets import published_data_sets
from kvbench.reproduce.full import full_settings

# A loader as HELMET's: dictionaries of rows and templates, by name.
HELMET = """
import json
import random
import sys

print("a loader may print")
print("and warn", file=sys.stderr)


def lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def load_data(args, dataset, path=None, demo_path=None):
    user = "{{Read}} this.\\n{context}\\n{demos}Asked: {question}"
    system = "Reply:"
    if "infbench" in dataset:
        rows = [{"id": i, "context": f"book {i}", "question": "who?", "answer": ["Ann", "Anne"],
                 "demos": ""} for i in range(args.max_test_samples)]
    elif dataset.startswith("icl"):
        shots = dataset.split("shot")[0].split("_")[-1]
        rows = [{"context": f"{shots} examples", "question": f"text {i}", "answer": str(i),
                 "demos": ""} for i in range(3)]
    else:
        rows = lines(path)
        keys = ("id", "qid", "question") if "depth" in rows[0] else ()
        key = next((name for name in keys if name in rows[0]), None)
        if key is None:
            rows = random.sample(rows, min(args.max_test_samples, len(rows)))
        else:
            keys = random.sample(sorted({row[key] for row in rows}), args.max_test_samples)
            rows = [row for row in rows if row[key] in keys]
        demos = lines(demo_path)[:args.shots] if demo_path else []
        demos = "".join(row["question"] + "!\\n" for row in demos)
        rows = [{"demos": demos, **row} for row in rows]
    if "ruler" in dataset:
        user = "Keep {type_needle_v}.\\n{context}\\nWhich for {query}?"
        system = "The {type_needle_v} of {query}:"
    return {"data": rows, "user_template": user, "system_template": system,
            "prompt_template": user + "\\n" + system}
"""

LONGPROC = """
import json
import os


def load_longproc_data(name, path):
    kind = name.rsplit("_", 1)[0]
    file = "travel_planning_all" if kind == "travel_planning" else name
    with open(os.path.join(path, kind, file + ".json")) as file:
        items = json.load(file)
    if kind == "travel_planning":
        return [{"input_prompt": "Example: a trip.\\nPlan: " + item["problem"], "reference_output":
                 "steps", "item": item} for item in items], None
    return [{"input_prompt": "Page:\\n" + item["html_str"] + "\\nAs a table.", "reference_output":
             item["table"], "item": item} for item in items], None
"""

RULER = "data/ruler/niah_{}/validation_{}.jsonl"
KILT = "data/kilt/{}_1000_{}_dep{}.jsonl"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def helmet(tmp_path: Path) -> Path:
    """A checkout as HELMET's with data for recall, rag and rerank."""
    home = tmp_path / "helmet"
    needle = {"type_needle_v": "numbers", "length": 40}
    for kind, count in (("multikey_2", 1), ("multikey_3", 1), ("multivalue", 2)):
        rows = [
            {
                **needle,
                "context": f"lake {i} has 7{i}",
                "query": f"lake {i}",
                "question": f"lake {i}",
            }
            | {"answer": [f"7{i}"] * count}
            for i in range(9)
        ]
        for length in (131072, 8192):
            write_lines(home / RULER.format(kind, length), rows)
    pairs = [{"context": '{"k": "v"}', "question": "k", "answer": "v", "num_kvs": 1}] * 9
    write_lines(home / "data/json_kv/test_k1800_dep6.jsonl", pairs)
    demos = [{"question": f"shown {i}?"} for i in range(3)]
    for name, train, depths in (
        ("nq-dev-multikilt", "nq-train-multikilt", 6),
        ("triviaqa-dev-multikilt", "triviaqa-train-multikilt", 6),
        ("hotpotqa-dev-multikilt", "hotpotqa-train-multikilt", 3),
        ("popqa_test", "popqa_test", 6),
    ):
        rows = [
            {"context": f"{name} {i} at {d}", "question": f"{name} {i}?", "answer": [f"yes {i}"]}
            | {"depth": d, **({"id": i} if name == "popqa_test" else {})}
            for i in range(5)
            for d in range(depths)
        ]
        write_lines(home / KILT.format(name, "k1000", depths), rows)
        write_lines(home / KILT.format(train, "k3", depths), demos)
    documents = [["4", "1"], ["17", "0"], ["9", "3"]]
    passages = [
        {"qid": f"q{i}", "context": "[ID: 4] a", "question": "order?", "answer": "9 > 4 > 17"}
        | {"qrel": documents, "depth": d}
        for i in range(4)
        for d in range(1 + i % 2)
    ]
    write_lines(home / "data/msmarco/test_reranking_data_k1000_dep3.jsonl", passages)
    write_lines(home / "data/msmarco/test_reranking_data_k10_dep3.jsonl", demos)
    (home / "data.py").write_text(HELMET, encoding="utf-8")
    return home


@pytest.fixture
def longproc(tmp_path: Path) -> Path:
    """A checkout as LongProc's with 7 pages of one length and 5 trips."""
    home = tmp_path / "longproc"
    pages = [{"html_str": f"<b>{i}</b>", "table": f"n\n{i}", "task_id": f"W{i}"} for i in range(7)]
    trips = [
        {"problem": f"trip {i}", "ground_truth_cities": "Rome**Oslo"}
        | {"ground_truth_durations": "5**6", "steps": ["x"]}
        for i in range(5)
    ]
    for name, items in (("html_to_tsv_0.5k", pages), ("travel_planning_all", trips)):
        path = home / "data" / name.rpartition("_")[0] / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(items), encoding="utf-8")
    (home / "longproc").mkdir()
    (home / "longproc/longproc_data.py").write_text(LONGPROC, encoding="utf-8")
    return home


def convert(checkout: Path, *words: str, code: int = 0) -> Path:
    """Run the command; the folder that it writes to."""
    out = checkout.parent / "out"
    assert main(["convert", checkout.name, str(checkout), *words, "--out", str(out)]) == code
    return out


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_prompts_are_the_templates_and_their_parts_are_known(helmet: Path) -> None:
    out = convert(helmet, "--task", "json_kv,ruler_niah_mv", "--samples", "4")
    rows = read(out / "recall", "json_kv")
    assert len(rows) == 4
    first = rows[0]
    assert first["prompt"] == '{Read} this.\n{"k": "v"}\nAsked: k\nReply:'
    start, end = first["context_span"]
    assert first["prompt"][start:end] == '{"k": "v"}'
    assert first["question_at"] == end
    assert first["answer_prefix"] == "Reply:"
    assert first["reference"] == "v"
    assert first["metric"] == "substring_exact_match"
    assert (first["max_new_tokens"], first["chat"]) == (100, False)
    assert "cluster" not in first
    assert first["metadata"] == {"num_kvs": 1}
    needles = read(out / "recall", "ruler_niah_mv")
    assert all(row["answer_prefix"].startswith("The numbers of lake") for row in needles)
    assert all(row["metric"] == "share_found" for row in needles)


def test_all_rows_of_the_drawn_questions_are_clusters(helmet: Path) -> None:
    out = convert(helmet, "--task", "rag", "--samples", "3")
    for name, depths in (("kilt_nq", 6), ("kilt_hotpotqa", 3), ("kilt_popqa_3", 6)):
        clusters = [row["cluster"] for row in read(out / "rag", name)]
        assert len(set(clusters)) == 3
        assert sorted(clusters.count(each) for each in set(clusters)) == [depths] * 3
    row = read(out / "rag", "kilt_nq")[0]
    assert "shown 0?!\nshown 1?!\nAsked" in row["prompt"]  # as many demonstrations as published
    assert row["cluster"].startswith("kilt_nq/nq-dev")
    popqa = read(out / "rag", "kilt_popqa_3")[0]["cluster"]
    assert popqa.removeprefix("kilt_popqa_3/").isdecimal()  # its id
    assert "stop" not in row


def test_switches_follow_the_intent(helmet: Path) -> None:
    words = ("--samples", "4", "--one-row-per-question", "--stop-at-newline")
    out = convert(helmet, "--task", "kilt_nq,json_kv", *words)
    rows = read(out / "rag", "kilt_nq")
    assert [row["metadata"]["depth"] for row in rows] == [0, 1, 2, 3]
    assert len({row["cluster"] for row in rows}) == 4
    assert rows[0]["stop"] == ["\n"]
    assert "stop" not in read(out / "recall", "json_kv")[0]
    options = json.loads((out / "rag/manifest.json").read_text())["options"]
    assert options["one_row_per_question"]
    assert options["stop_at_newline"]


def test_rankings_have_grades_and_score(helmet: Path) -> None:
    out = convert(helmet, "--task", "rerank", "--samples", "2")
    rows = read(out / "rerank", "msmarco_rerank_psg")
    assert rows[0]["reference"] == {"4": 1, "17": 0, "9": 3}
    task = open_task(str(out / "rerank"))
    task.ready(1, None, None)
    sample = task.sample(0, seed=0, context=0, tokenizer=None)  # type: ignore[arg-type]
    assert task.score(" ID9 > ID4 > ID17", sample) == 1.0
    assert 0 < task.score(" ID17 > ID4", sample) < 1
    assert sample.cluster == rows[0]["cluster"]


def test_judged_data_sets_are_left_out(helmet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert(helmet, "--task", "infbench_qa_eng_130862,narrativeqa_130772,summ")
    assert "narrativeqa_130772 is left out" in capsys.readouterr().err
    manifest = json.loads((out / "longqa/manifest.json").read_text())
    assert list(manifest["files"]) == ["infbench_qa_eng_130862.jsonl"]
    assert "judged" in manifest["left_out"]["narrativeqa_130772"]
    row = read(out / "longqa", "infbench_qa_eng_130862")[7]
    assert row["prompt"] == "{Read} this.\nbook 7\nAsked: who?"  # a user's message: no prefix
    assert row["chat"]
    assert "answer_prefix" not in row
    assert "cluster" not in row
    assert len(json.loads((out / "summ/manifest.json").read_text())["left_out"]) == 2


def test_the_seed_draws(helmet: Path) -> None:
    words = ("--task", "kilt_nq", "--samples", "2")
    asked = []
    for seed in ("42", "42", "7"):
        out = convert(helmet, *words, "--seed", seed)
        asked.append({row["cluster"] for row in read(out / "rag", "kilt_nq")})
        out.rename(out.with_name(f"seed {len(asked)}"))
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


def test_other_lengths_are_those_of_the_checkout(
    helmet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {"recall", "rag", "rerank", "icl", "longqa", "summ"}
    short: dict[str, dict[str, Any]] = {task: {"datasets": "other"} for task in tasks}
    short["recall"] = {
        "datasets": "ruler_niah_mk_2",
        "test_files": RULER.format("multikey_2", 8192),
    }
    short["icl"] = {"datasets": "icl_nlu_510shot_balance"}
    (helmet / "configs").mkdir()
    for task, settings in short.items():
        row = {"test_files": "", "demo_files": "", "input_max_length": 8192, **settings}
        text = yaml.safe_dump({**row, "generation_max_length": 30})
        (helmet / f"configs/{task}_short.yaml").write_text(text)
    out = convert(helmet, "--length", "8192")
    assert sorted(path.name for path in out.iterdir()) == ["icl", "recall"]
    row = read(out / "icl", "icl_nlu_510shot_balance")[0]
    assert row["prompt"].startswith("{Read} this.\n510 examples\n")
    assert row["max_new_tokens"] == 30
    assert row["metric"] == "label_exact_match"
    convert(helmet, "--length", "9000", code=2)
    assert "choose one of 131072, 8192" in capsys.readouterr().err


def test_longproc_is_drawn_as_helmet_does(longproc: Path) -> None:
    out = convert(longproc, "--task", "html_to_tsv_0.5k,travel_planning", "--samples", "4")
    rows = read(out / "html_to_tsv", "html_to_tsv_0.5k")
    order = np.random.default_rng(42).permutation(7)[:4]
    assert [row["metadata"]["task_id"] for row in rows] == [f"W{i}" for i in order]
    for row, page in zip(rows, order, strict=True):
        assert row["prompt"] == f"Page:\n<b>{page}</b>\nAs a table."
        start, end = row["context_span"]
        assert row["prompt"][start:end] == f"<b>{page}</b>"
        assert row["question_at"] == end
        assert (row["metric"], row["max_new_tokens"], row["chat"]) == ("row_f1", 1024, True)
        assert metrics.get("row_f1")(f"n\n{page}", row["reference"]) == 1.0
    trip = read(out / "travel_planning", "travel_planning_2k")[0]
    assert trip["prompt"][trip["question_at"] :].startswith("trip")
    assert "context_span" not in trip
    plan = "<Plan>\nDay 5: Fly from Rome to Oslo.\n**Day 5-10:** Oslo\n</Plan>"
    assert metrics.get(trip["metric"])(plan, trip["reference"]) == 1.0


def test_data_may_lie_elsewhere(longproc: Path) -> None:
    (longproc / "data").rename(longproc.parent / "elsewhere")
    words = (
        "--task",
        "html_to_tsv",
        "--length",
        "0.5k",
        "--data",
        str(longproc.parent / "elsewhere"),
    )
    out = convert(longproc, *words)
    assert len(read(out / "html_to_tsv", "html_to_tsv_0.5k")) == 7


def test_manifest_tells_the_source(longproc: Path) -> None:
    git = ["git", "-C", str(longproc), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "longproc"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    out = convert(longproc, "--task", "travel_planning")
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    manifest = json.loads((out / "travel_planning/manifest.json").read_text())
    assert manifest["commit"] == head.stdout.strip()
    assert manifest["task"] == manifest["column"] == "travel_planning"
    entry = manifest["files"]["travel_planning_2k.jsonl"]
    assert (entry["rows"], entry["questions"]) == (5, 5)
    assert list(entry["sources"]) == ["data/travel_planning/travel_planning_all.json"]
    assert entry["versions"]["python"] == sys.version.split()[0]


TEMPLATE = 'return {"data": rows, "user_template": user, '
FAULTS = {
    "package": ("import json\n", "import nosuchlibrary\n", "needs the package 'nosuchlibrary'"),
    "own file": ("import json\n", "import json, utils_of_it\n", "'utils_of_it'"),
    "raises": (
        "    user =",
        "    1 / 0\n    user =",
        "ZeroDivisionError: division by zero (data.py:",
    ),
    "syntax": ("def lines", "def def", "SyntaxError"),
    "exits": ("    user =", "    sys.exit(3)\n    user =", "ended with code 3"),
    "killed": ("    user =", "    import os; os.kill(os.getpid(), 9)\n    user =", "was killed"),
    "no context": ("{context}", "the text", "example 0 has no context"),
    "empty context": (TEMPLATE, f'rows[1]["context"] = ""; {TEMPLATE}', "example 1 has no context"),
    "no question": (
        TEMPLATE,
        f'del rows[1]["question"]; {TEMPLATE}',
        "no field 'question'",
    ),
    "empty question": (TEMPLATE, f'rows[0]["question"] = ""; {TEMPLATE}', "0 has no question"),
    "no rows": (TEMPLATE, f"rows = []; {TEMPLATE}", "gave no example"),
    "bad answer": (
        TEMPLATE,
        f'rows[0]["answer"] = 5; {TEMPLATE}',
        'line 1: metric "substring_exact_match": a reference must be',
    ),
    "empty answer": (TEMPLATE, f'rows[2]["answer"] = ""; {TEMPLATE}', "line 3: it has no answer"),
    "surrogate": (
        TEMPLATE,
        f'rows[1]["context"] = "a\\ud800"; {TEMPLATE}',
        "line 2: it has half of a surrogate pair",
    ),
    "other prefix": (
        '"system_template": system,',
        '"system_template": "So:",',
        "line 1: its prompt does not end with its answer_prefix",
    ),
    "no answer": (TEMPLATE, f'del rows[0]["answer"]; {TEMPLATE}', "KeyError: 'answer'"),
    "late": (TEMPLATE, f'rows[7]["context"] = None; {TEMPLATE}', "example 7 has no context"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loader_that_fails_leaves_nothing(
    helmet: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    old, new, message = FAULTS[fault]
    assert old in HELMET
    (helmet / "data.py").write_text(HELMET.replace(old, new, 1), encoding="utf-8")
    out = convert(helmet, "--task", "json_kv", code=2)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("kvbench: json_kv")
    assert message in said[0]
    assert list(out.iterdir()) == []


PYTHONS = {
    "banner": ('echo Activating\necho "[1]"\nexec {} "$@"', None),
    "binary": ("printf '\\377\\n{{\\n'\nexec {} \"$@\"", None),
    "echo": ('echo "$@"', "ended with code 0 before HELMET's loader was done"),
    "torn": ('{} "$@" | head -c 400', "before HELMET's loader was done"),
    "one lost": ("{} \"$@\" | sed '3d'", "before HELMET's loader was done"),
    "no end": ("{} \"$@\" | sed '$d'", "before HELMET's loader was done"),
}


@pytest.mark.parametrize("kind", PYTHONS)
def test_lines_of_a_wrapper_are_not_samples_and_none_is_lost(
    helmet: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    script, message = PYTHONS[kind]
    wrapper = helmet.parent / "wrapper"
    wrapper.write_text("#!/bin/sh\n" + script.format(sys.executable) + "\n")
    wrapper.chmod(0o755)
    words = ("--task", "json_kv", "--samples", "3", "--python", str(wrapper))
    out = convert(helmet, *words, code=2 if message else 0)
    if message is None:
        assert len(read(out / "recall", "json_kv")) == 3
    else:
        (said,) = capsys.readouterr().err.splitlines()
        assert message in said
        assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("template", "cut", "at"),
    [
        ("{context}\\n{question}", True, "\nk"),
        ("{question}\\n{context}\\n", True, None),
        ("{context} {question} {context}\\n", False, None),
        ("{context} {context}\\n{question}", False, "\nk"),
    ],
)
def test_a_question_before_the_context_and_a_second_context_are_seen(
    helmet: Path, template: str, cut: bool, at: str | None
) -> None:
    text = HELMET.replace("    system =", f'    user = "{template}"\n    system =', 1)
    (helmet / "data.py").write_text(text, encoding="utf-8")
    row = read(convert(helmet, "--task", "json_kv", "--samples", "1") / "recall", "json_kv")[0]
    if cut:
        start, end = row["context_span"]
        assert row["prompt"][start:end] == '{"k": "v"}'
    else:
        assert "context_span" not in row
    assert row["prompt"][row["question_at"] :].startswith(at) if at else "question_at" not in row


def test_metadata_that_json_cannot_hold_is_left_out(helmet: Path) -> None:
    extra = 'rows[0] |= {"huge": 10**5000, "nan": float("nan"), "depth": 3}; '
    text = HELMET.replace(TEMPLATE, extra + TEMPLATE, 1)
    (helmet / "data.py").write_text(text, encoding="utf-8")
    row = read(convert(helmet, "--task", "json_kv", "--samples", "1") / "recall", "json_kv")[0]
    assert row["metadata"] == {"num_kvs": 1, "depth": 3}


def test_one_failure_spoils_one_task(helmet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = '    if "nq" in dataset: raise ValueError("torn")\n    user ='
    (helmet / "data.py").write_text(HELMET.replace("    user =", fault, 1), encoding="utf-8")
    out = convert(helmet, "--task", "json_kv,rag,rerank", "--samples", "2", code=2)
    assert sorted(path.name for path in out.iterdir()) == ["recall", "rerank"]
    assert capsys.readouterr().err.splitlines()[-1].startswith("kvbench: kilt_nq: HELMET's loader")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "recal"), "no task or data set 'recal' here: did you mean 'recall'?"),
        (("--task", "html_to_tsv"), "no task or data set 'html_to_tsv'"),
        (("--task", "recall", "--python", "no such"), "cannot run --python no such"),
        (("--task", "recall", "--data", "nowhere"), "missing: data/ruler/niah_multikey_2"),
        (("--length", "8192"), "configs/recall_short.yaml does not name"),
        (("--task", "recall", "--samples", "0"), "--samples"),
    ],
)
def test_bad_requests(
    helmet: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    convert(helmet, *words, code=2)
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_what_is_missing_is_named_with_its_source(
    helmet: Path, longproc: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (helmet / "data/json_kv/test_k1800_dep6.jsonl").unlink()
    out = convert(helmet, code=2)
    said = capsys.readouterr().err
    assert "missing: data/json_kv/test_k1800_dep6.jsonl; " in said
    assert "princeton-nlp/HELMET" in said
    (helmet / "data.py").unlink()
    convert(helmet, code=2)
    assert "git clone https://github.com/princeton-nlp/HELMET" in capsys.readouterr().err
    convert(longproc, "--stop-at-newline", code=2)
    assert "only helmet has" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_is_not_written_twice(longproc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert(longproc, "--task", "travel_planning")
    before = (out / "travel_planning/travel_planning_2k.jsonl").stat().st_mtime_ns
    convert(longproc, "--task", "travel_planning", "--samples", "1", code=2)
    assert "exists; delete it, or choose another --out" in capsys.readouterr().err
    assert (out / "travel_planning/travel_planning_2k.jsonl").stat().st_mtime_ns == before


def test_the_worker_needs_an_old_python_alone() -> None:
    tree = ast.parse(WORKER.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def test_the_table_is_whole() -> None:
    data_sets = published_data_sets().values()
    assert list(dict.fromkeys(d.task for d in data_sets)) == full_settings()["task"]
    assert all(d.left_out or d.metric in metrics.names() for d in data_sets)
    assert all(d.prompt_tokens + d.answer_limit <= d.input_limit for d in data_sets)
