"""The rehearsal of the full scale: the same path on small made-up data, on a CPU.

Every data set of the paper gets a stand-in of the same task, metric and kind of prompt, `SHARE`
times shorter. Its rows come from the generators of kvbench's own tasks, or from the few lines here;
they lie in stand-in checkouts, from which the real `kvbench convert` makes task files. A stand-in
judge scores what a judge scores. The numbers mean nothing: they show that the path works.
"""

import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from kvbench.convert.command import Request, convert_task
from kvbench.errors import InputError
from kvbench.heads import equal_scores
from kvbench.judge import HIGHEST, JUDGED, Judge, use_judge
from kvbench.registry import tasks
from kvbench.reproduce.command import RUN, Reproduction, reproduced
from kvbench.reproduce.datasets import DataSet, published_data_sets
from kvbench.reproduce.full import LEARNT, absent_data, check_part, full_choices, full_settings
from kvbench.sweep.plan import ANSWER_PREFIX
from kvbench.sweep.progress import Listener
from kvbench.task import Tokenizer

SHARE = 128  # full-scale lengths and prefill chunks are divided by this
BUDGETS = (0.2, 0.5, 0.9)
JUDGE = "stand-in-judge"
LABELS = ("north", "south", "east", "west")
CITIES = ("Lisbon", "Vienna", "Oslo", "Athens", "Dublin", "Prague")
LOUD = (
    "REHEARSAL: the data are made up, the model is small and the judge is a stand-in. The numbers "
    "mean nothing, and neither do the claims judged by them; they show that the full scale runs. "
    "The paper's values are not comparable: they stand here because the full scale prints them."
)

# The generator and subtask of each stand-in; the data sets of icl and travel_planning have others.
GENERATED = {
    "ruler_niah_mk_2": ("recall", "mk_2"),
    "ruler_niah_mk_3": ("recall", "mk_3"),
    "ruler_niah_mv": ("recall", "mv"),
    "json_kv": ("recall", "json_kv"),
    "kilt_nq": ("rag", "birthplace"),
    "kilt_triviaqa": ("rag", "profession"),
    "kilt_hotpotqa": ("rag", "instrument"),
    "kilt_popqa_3": ("rag", "birthplace"),
    "msmarco_rerank_psg": ("rerank", "graded"),
    "narrativeqa_130772": ("rag", "profession"),
    "infbench_qa_eng_130862": ("rag", "birthplace"),
    "infbench_choice_eng_130862": ("rag", "instrument"),
    "infbench_sum_eng_129672": ("rag", "birthplace"),
    "multi_lexsum_130372": ("recall", "mk_2"),
    "html_to_tsv_0.5k": ("html_to_tsv", "short"),
    "html_to_tsv_2k": ("html_to_tsv", "medium"),
    "html_to_tsv_8k": ("html_to_tsv", "long"),
}

# Loaders with the projects' interfaces, which `kvbench convert` calls.
LOADERS = {
    "helmet": (
        "data.py",
        """
import json

def load_data(args, dataset, path=None, demo_path=None):
    with open(path or "data/" + dataset) as file:
        rows = [json.loads(line) for line in file]
    whole, prefix = "{context}{question}{answer_prefix}", "{answer_prefix}"
    templates = {"user_template": whole, "prompt_template": whole, "system_template": prefix}
    return {"data": rows, **templates}
""",
    ),
    "longproc": (
        "longproc/longproc_data.py",
        """
import json, os

def load_longproc_data(name, path):
    with open(os.path.join(path, name)) as file:
        rows = [json.loads(line) for line in file]
    return [{
        "input_prompt": row["context"] + row["question"] + row["answer_prefix"],
        "reference_output": row["answer"],
        "item": {"html_str": row["context"], "problem": row["question"], **row["truth"]},
    } for row in rows], None
""",
    ),
}


def rehearse(
    out: Path,
    model: str,
    *,
    samples: int,
    threshold: float,
    listener: Listener | None = None,
    part: Mapping[str, Any],
) -> Reproduction:
    """Run the full scale on stand-ins: `samples` of each data set, with `model` on a CPU.

    `part` has fields of Choices, such as fewer methods. Raises InputError, before anything is
    written if it is a wrong one.
    """
    from kvbench.models.load import load_model

    settings = full_settings()
    check_part(part, True)
    loaded = load_model(model, device="cpu")
    data = out / f"data-{model}-{samples}"
    with stand_in_judge() as url:
        use_judge(Judge(JUDGE, url))
        wanted = part.get("task", settings["task"])
        absent = absent_data(data, True, wanted)
        if absent:
            try:
                make_task_files(
                    data, loaded.tokenizer, samples, settings["seed"], {d.task for d in absent}
                )
            except OSError as error:
                raise InputError(f"cannot write {data}: {error.strerror}") from error
        options = {}
        for method in LEARNT:
            if "scores" not in loaded.card.options.get(method, {}):
                options[f"{method}.scores"] = str(equal_scores(data, loaded.shape))
        chosen = {
            "model": model,
            "context": settings["context"] // SHARE,
            "prefill_chunk": [chunk // SHARE for chunk in settings["prefill-chunk"]],
            "budgets": BUDGETS,
            "option": {},  # the model's card has windows for short contexts
            "device": "cpu",
            "dtype": "float32",
            **part,
        }
        choices = full_choices(out / RUN, data, options=options, judge=(JUDGE, url), **chosen)
        return reproduced(choices, out, threshold, listener, [LOUD], "paper (not comparable)")


def make_task_files(
    folder: Path, tokenizer: Tokenizer, samples: int, seed: int, wanted: Collection[str]
) -> None:
    """Convert stand-in checkouts to task files of the tasks `wanted`.

    They have `samples` samples for every data set. Each file is put in place whole, so that a
    process that was killed here left some files of a task, or none; another one makes the rest.
    Equal files come out equal. Raises InputError and OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as home:
        stand_ins: dict[tuple[str, str], list[DataSet]] = {}
        for each in (d for d in published_data_sets().values() if d.task in wanted):
            checkout = Path(home) / each.benchmark
            rngs = [random.Random(f"{each.name}/{seed}/{index}") for index in range(samples)]
            rows = [row_of(each, tokenizer, rng) for rng in rngs]
            for index, row in enumerate(rows):
                row |= {name: index // max(1, round(each.rows)) for name in each.question[:1]}
            loader, text = LOADERS[each.benchmark]
            data = "".join(json.dumps(row) + "\n" for row in rows)
            for path, content in ((loader, text), (f"data/{each.name}", data)):
                (checkout / path).parent.mkdir(parents=True, exist_ok=True)
                (checkout / path).write_text(content, encoding="utf-8")
            stand_in = replace(
                each,
                data=None,
                demos=None,
                input_limit=each.input_limit // SHARE,
                answer_limit=max(row["limit"] for row in rows),
                metric=JUDGED if each.left_out else each.metric,
                left_out=None,
            )
            stand_ins.setdefault((each.benchmark, each.task), []).append(stand_in)
        for (benchmark, task), data_sets in stand_ins.items():
            checkout = Path(home).resolve() / benchmark
            made = checkout / "made"
            request = Request(benchmark, checkout, made, python=sys.executable)
            convert_task(request, task, data_sets, lambda text: None)
            (folder / task).mkdir(exist_ok=True)
            # The manifest comes first: where it is missing, so is a file that will be noticed.
            for file in sorted((made / task).iterdir(), key=lambda path: path.suffix == ".jsonl"):
                os.replace(file, folder / task / file.name)


def row_of(each: DataSet, tokenizer: Tokenizer, rng: random.Random) -> dict[str, Any]:
    """A row of a stand-in: parts of the prompt, the answer as the metric takes it, its limit."""
    tokens = each.input_limit // SHARE
    if each.task == "icl":
        return labelled(tokenizer, rng, tokens)
    if each.name not in GENERATED:
        return trip(rng)
    name, subtask = GENERATED[each.name]
    task = tasks.get(name)()
    number = rng.randrange(10**6) * len(task.subtasks) + task.subtasks.index(subtask)
    sample = task.sample(number, seed=0, context=tokens, tokenizer=tokenizer)
    prefix, at = str(sample.metadata[ANSWER_PREFIX]), sample.question_at
    prompt, answer = sample.prompt.removesuffix(prefix), sample.reference
    row = {"context": prompt[:at], "question": prompt[at:], "answer_prefix": prefix, "truth": {}}
    if each.left_out:
        answer = {"question": prompt[at:].strip(), "answer": answer}
    elif each.metric == "choice_exact_match":
        answer = ["B", answer[0]]
    elif each.metric == "ndcg@10":
        row["qrel"] = list(answer.items())
    elif each.metric == "row_f1":
        answer = prefix + "\n".join("\t".join(cells) for cells in answer)
    return {**row, "answer": answer, "limit": sample.max_new_tokens}


def labelled(tokenizer: Tokenizer, rng: random.Random, tokens: int) -> dict[str, Any]:
    """Sentences with a label that their direction decides; the last one has none yet."""
    context = ""
    while True:
        label = rng.randrange(len(LABELS))
        text = f"In week {rng.randrange(100)} the wind came from the {LABELS[label]}.\n"
        more = f"{text}label: {label}\n"
        if len(tokenizer.encode(context + more)) + 8 > tokens:
            break
        context += more
    parts = {"context": context, "question": text, "answer_prefix": "label:", "truth": {}}
    return {**parts, "answer": str(label), "limit": 6}


def trip(rng: random.Random) -> dict[str, Any]:
    """A trip through some cities, to be written as a plan of days."""
    cities, days = rng.sample(CITIES, 3), [rng.randint(2, 5) for _ in range(3)]
    stays = ", ".join(f"{days[i]} days in {cities[i]}" for i in range(3))
    total = sum(days) - len(days) + 1
    question = f"You visit 3 European cities for {total} days in this order: {stays}.\n"
    truth = {
        "ground_truth_cities": "**".join(cities),
        "ground_truth_durations": "**".join(map(str, days)),
    }
    parts = {"context": "Write a plan between <Plan> and </Plan>.\n", "question": question}
    return {**parts, "answer_prefix": "", "answer": "", "truth": truth, "limit": 24}


class StandIn(BaseHTTPRequestHandler):
    """A judge that gives full marks to an answer that contains the reference, else none."""

    def do_POST(self) -> None:
        """Answer a request as an OpenAI-compatible address does."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][0]["content"]
        found = re.search(
            r"<reference>\n(.*)\n</reference>\n<answer>\n(.*)\n</answer>", asked, re.S
        )
        references = found[1].lower().split("\nor\n") if found else []
        right = any(text in found[2].lower() for text in references) if found else False
        message = {"role": "assistant", "content": str(HIGHEST * right)}
        reply = json.dumps({"choices": [{"message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def stand_in_judge() -> Iterator[str]:
    """The address of a stand-in judge on this machine, as long as the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
