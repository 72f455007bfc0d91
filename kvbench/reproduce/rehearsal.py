"""The rehearsal of the full scale: the same path on small made-up data, on a CPU.

Every data set of the paper gets a stand-in of the same task, metric and kind of file, `SHARE`
times shorter, made by the generators of kvbench's own tasks or by the few lines here. A stand-in
judge scores what a judge scores. The numbers mean nothing: they show that the path works.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from kvbench.errors import InputError
from kvbench.heads import equal_scores
from kvbench.judge import HIGHEST, JUDGED
from kvbench.registry import tasks
from kvbench.reproduce.command import RUN, Reproduction, reproduced
from kvbench.reproduce.datasets import DataSet, published_data_sets
from kvbench.reproduce.full import LEARNT, full_choices, full_settings, missing_data
from kvbench.sweep.plan import ANSWER_PREFIX
from kvbench.sweep.progress import Listener
from kvbench.task import Tokenizer

SHARE = 128  # full-scale lengths and prefill chunks are divided by this
BUDGETS = (0.2, 0.5, 0.9)
JUDGE = "stand-in-judge"
DATA = "data"  # the folder of the task files, inside the output folder
LOUD = (
    "REHEARSAL: the data are made up, the model is small and the judge is a stand-in. The numbers "
    "mean nothing, and neither do the claims judged by them; they show that the full scale runs. "
    "The paper's values are not comparable: they stand here because the full scale prints them."
)
LABELS = ("north", "south", "east", "west")
CITIES = ("Lisbon", "Vienna", "Oslo", "Athens", "Dublin", "Prague")

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

    `part` has fields of Choices, such as fewer methods. Raises InputError.
    """
    from kvbench.models.load import load_model

    loaded, settings = load_model(model, device="cpu"), full_settings()
    write_task_files(out / DATA, loaded.tokenizer, samples, settings["seed"])
    if missing := missing_data(out / DATA, judged=True):
        raise InputError(missing[0])
    options = {}
    for method in LEARNT:
        if "scores" not in loaded.card.options.get(method, {}):
            options[f"{method}.scores"] = str(equal_scores(out / DATA, loaded.shape))
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
    with stand_in_judge() as url:
        judge = JUDGE, url
        choices = full_choices(out / RUN, out / DATA, options=options, judge=judge, **chosen)
        return reproduced(choices, out, threshold, listener, [LOUD], "paper (not comparable)")


def write_task_files(folder: Path, tokenizer: Tokenizer, samples: int, seed: int) -> None:
    """Write a task file with `samples` samples for every data set of the paper."""
    for each in published_data_sets().values():
        lines = [
            line_of(each, tokenizer, random.Random(f"{each.name}/{seed}/{index}"), index)
            for index in range(samples)
        ]
        file = folder / each.task / f"{each.name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def line_of(each: DataSet, tokenizer: Tokenizer, rng: random.Random, index: int) -> dict[str, Any]:
    """One sample of a stand-in, as a line of a task file."""
    tokens = each.input_limit // SHARE
    if each.name in GENERATED:
        made = generated(each, tokenizer, rng, tokens)
    elif each.task == "icl":
        made = labelled(tokenizer, rng, tokens)
    else:
        made = trip(rng)
    made["metric"] = JUDGED if each.left_out else each.metric
    rows = max(1, round(each.rows))
    return {**made, "chat": each.chat, "cluster": f"{each.name}/{index // rows}"}


def generated(
    each: DataSet, tokenizer: Tokenizer, rng: random.Random, tokens: int
) -> dict[str, Any]:
    """A sample of one of kvbench's generators, its reference as the data set's metric takes it."""
    name, subtask = GENERATED[each.name]
    task = tasks.get(name)()
    number = rng.randrange(10**6) * len(task.subtasks) + task.subtasks.index(subtask)
    sample = task.sample(number, seed=0, context=tokens, tokenizer=tokenizer)
    prefix = sample.metadata[ANSWER_PREFIX]
    prompt, at = sample.prompt.removesuffix(prefix), sample.question_at
    question, first = prompt[at:], sample.reference
    shaped: dict[str, Callable[[], Any]] = {
        "choice_exact_match": lambda: ["B", first[0]],
        "row_f1": lambda: prefix + "\n".join("\t".join(row) for row in first),
    }
    reference = shaped.get(each.metric, lambda: first)()
    if each.left_out:
        reference = {"question": question.strip(), "answer": first}
    limit = sample.max_new_tokens
    parts = {"context": prompt[:at], "question": question, "answer_prefix": prefix}
    return {**parts, "reference": reference, "max_new_tokens": limit}


def labelled(tokenizer: Tokenizer, rng: random.Random, tokens: int) -> dict[str, Any]:
    """Sentences with a label that their direction decides; the last one has none yet."""
    context, label = "", ""
    question = "The wind comes from the"
    while True:
        label = rng.choice(LABELS)
        more = f"{question} {label} in week {rng.randrange(100)}.\nlabel: {LABELS.index(label)}\n"
        if len(tokenizer.encode(context + more + more)) + 8 > tokens:
            break
        context += more
    asked = f"{question} {label} in week {rng.randrange(100)}.\n"
    parts = {"context": context, "question": asked, "answer_prefix": "label:"}
    return {**parts, "reference": str(LABELS.index(label)), "max_new_tokens": 6}


def trip(rng: random.Random) -> dict[str, Any]:
    """A trip through some cities, to be written as a plan of days."""
    cities, days = rng.sample(CITIES, 3), [rng.randint(2, 5) for _ in range(3)]
    stays = ", ".join(f"{days[i]} days in {cities[i]}" for i in range(3))
    total = sum(days) - len(days) + 1
    context = f"You visit 3 European cities for {total} days in this order: {stays}.\n"
    question = "Write the plan between <Plan> and </Plan>.\n"
    truth = {
        "ground_truth_cities": "**".join(cities),
        "ground_truth_durations": "**".join(map(str, days)),
    }
    return {"context": context, "question": question, "reference": truth, "max_new_tokens": 24}


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
