"""Train the embedded model: `kvbench train tiny`.

A small Llama learns the four synthetic tasks from their own generators, with loss on the answers
alone. Three things make it learn on two cores: many turns about each context; an initialisation
that already holds the parts of an induction circuit (heads that look a fixed number of tokens back,
heads that match what those found, heads that copy); and contexts that grow once the present length
is learnt.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvbench.errors import InputError
from kvbench.learning.tiny_tokenizer import build_tokenizer
from kvbench.registry import tasks
from kvbench.task import Episode, Tokenizer

# How many tokens back each matching KV head of layer 1 compares at the start (0: the token itself).
OFFSETS = ((0, 1, 2), (0, 2, 3), (1, 2, 3), (0, 3, 4))

SINGLE = 0.3  # share of the examples that have one turn


@dataclass(frozen=True)
class Recipe:
    """All that determines the embedded model; saved beside it."""

    seed: int = 0
    hidden: int = 192
    layers: int = 4
    query_heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    feed_forward: int = 384
    max_positions: int = 8192
    rope_theta: float = 1e8  # leaves most frequencies slow enough to match over a whole context
    stages: tuple[int, ...] = (192, 256, 384, 512, 768, 1024, 1280)  # tokens of a context
    pass_mark: float = 0.9  # exact answers, in the worst subtask, that end a stage
    growth: float = 0.45  # share of the time in which the stages pass even if it is not reached
    tokens_a_step: int = 4096
    matrix_rate: float = 4e-3  # Muon's, for the matrices of the layers
    rate: float = 4e-3  # AdamW's, for embeddings, norms and biases
    warm_up: int = 100  # steps
    cool_down: float = 0.35  # share of the time in which the rates fall to zero
    decay: float = 0.01
    minutes: float = 32.0


@dataclass
class Progress:
    """What training has come to; checkpointed."""

    step: int = 0
    stage: int = 0
    seconds: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)  # running, by task/subtask


def subtasks() -> list[str]:
    """Every task/subtask that offers episodes to train on."""
    return [
        f"{name}/{subtask}"
        for name in tasks.names()
        if hasattr(tasks.get(name), "episode")
        for subtask in tasks.get(name).subtasks
    ]


def episode(name: str, rng: random.Random, units: int, turns: int) -> Episode:
    """A training episode of 'task/subtask'."""
    task, subtask = name.split("/")
    made: Episode = tasks.get(task)().episode(rng, subtask, units, turns)  # type: ignore[attr-defined]
    return made


def smallest(name: str) -> int:
    """The fewest units of a 'task/subtask'."""
    task, subtask = name.split("/")
    units: int = tasks.get(task)().smallest(subtask)  # type: ignore[attr-defined]
    return units


def tiny_tokenizer(seed: int) -> Any:
    """The tokenizer of the task texts."""
    texts = []
    for name in subtasks():
        for i in range(150):
            made = episode(name, random.Random(f"tokenizer/{seed}/{name}/{i}"), 30, 8)
            texts.append(made.context)
            texts += [turn.question + turn.answer_prefix + turn.answer for turn in made.turns]
    return build_tokenizer(texts)


def tiny_model(recipe: Recipe, vocabulary: int, end: int, pad: int) -> LlamaForCausalLM:
    """The untrained model, with the parts of an induction circuit in its first two layers."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.query_heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        attention_bias=True,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.05)
        prepare_induction(model, recipe)
    return model


def prepare_induction(model: LlamaForCausalLM, recipe: Recipe) -> None:
    """Set layers 0 and 1 so that the model starts out as a rough induction machine.

    Layer 0, query head h: RoPE of constant queries and keys peaks h + 1 tokens back; a sketch of
    that token is written to a subspace of the head's own. Layer 1: a query's sketch of its tokens
    at `OFFSETS` back meets the keys whose tokens one further back are the same, in the slow
    frequencies, which hardly turn over a context; the token found is copied to the output.
    """
    hidden, dim, half = recipe.hidden, recipe.head_dim, recipe.head_dim // 2
    heads, kv_heads = recipe.query_heads, recipe.kv_heads
    group = heads // kv_heads
    frequencies = recipe.rope_theta ** (-torch.arange(half) / half)
    amplitude = torch.zeros(half)
    amplitude[:5] = torch.tensor([7.0, 5.5, 4.5, 4.5, 3.0])
    slow = [i for i in range(half) if frequencies[i] < 2e-3]
    places = torch.tensor([*slow, *(half + i for i in slow)])

    first = model.model.layers[0].self_attn
    sketches = torch.linalg.qr(torch.randn(hidden, hidden))[0].view(-1, dim, hidden)
    traces = torch.linalg.qr(torch.randn(hidden, hidden))[0].view(-1, dim, hidden)
    traces = torch.cat(
        [traces, torch.linalg.qr(torch.randn(hidden, hidden))[0].view(-1, dim, hidden)]
    )
    queries = first.q_proj.bias.view(heads, 2, half)
    first.k_proj.bias.view(kv_heads, 2, half)[:, 0] = amplitude
    values = first.v_proj.weight.view(kv_heads, dim, hidden)
    values[:] = sketches[0]
    written = first.o_proj.weight.view(hidden, heads, dim)
    for head in range(heads):
        # The heads of a query group share a key, so the distance is set on the query's side.
        queries[head, 0] = amplitude * torch.cos(frequencies * (head + 1))
        queries[head, 1] = -amplitude * torch.sin(frequencies * (head + 1))
        written[:, head] = 0.06 * traces[head].T

    second = model.model.layers[1].self_attn
    look = second.q_proj.weight.view(heads, dim, hidden)
    show = second.k_proj.weight.view(kv_heads, dim, hidden)
    for kv_head, offsets in enumerate(OFFSETS[:kv_heads]):
        for offset in offsets:
            narrow = torch.linalg.qr(torch.randn(dim, dim))[0][: len(places)]
            back = sketches[0] if offset == 0 else 1.6 * traces[offset - 1]
            look[kv_head * group : (kv_head + 1) * group, places] += 1.5 * narrow @ back
            show[kv_head, places] += 1.5 * narrow @ traces[offset]
        copied = sketches[1 + kv_head]
        second.v_proj.weight.view(kv_heads, dim, hidden)[kv_head] = copied
        out = second.o_proj.weight.view(hidden, kv_heads, group, dim)
        out[:, kv_head] = 0.1 * copied.T[:, None]


@dataclass(frozen=True)
class Example:
    """Token ids, whether each is part of an answer, and where the turns end."""

    name: str
    ids: list[int]
    answer: list[int]  # 0, or the number of the turn from 1


class ExampleMaker:
    """Makes examples of about the wanted length, remembering what a unit of a task costs."""

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self.tokenizer, self.end = tokenizer, end
        self.cost: dict[str, tuple[float, float]] = {}  # tokens of a bare episode and of a unit

    def make(self, name: str, rng: random.Random, length: int) -> Example:
        """An example of at most `length` tokens, its context a random share of it."""
        # A sample has one turn: it must be answered without earlier answers to imitate.
        turns = 1 if rng.random() < SINGLE else rng.randint(1, max(2, length // 24))
        least = smallest(name) + 1
        units = max(least, int(length * rng.uniform(0.25, 0.9) / 14))
        while True:
            example = self.encode(name, episode(name, rng, units, turns))
            if len(example.ids) <= length:
                return example
            excess = len(example.ids) / length
            units = int(units / excess * 0.95)
            turns = max(1, int(turns / excess))
            if units < least:  # no shorter one can be made
                units, turns, length = least, 1, sys.maxsize

    def encode(self, name: str, made: Episode) -> Example:
        """The ids of an episode; each answer is followed by the end token.

        The first turn is encoded together with the context, as a sample's prompt is: tokens may
        span where they meet.
        """
        ids: list[int] = []
        answer: list[int] = []
        before = made.context
        for number, turn in enumerate(made.turns, start=1):
            question = self.tokenizer.encode(before + turn.question + turn.answer_prefix)
            reply = [*self.tokenizer.encode(turn.answer), self.end]
            ids += question + reply
            answer += [0] * len(question) + [number] * len(reply)
            before = ""
        return Example(name, ids, answer)


def batch(examples: list[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Padded ids [B, T], and the turn that every *next* token answers [B, T], 0 for none."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad)
    turn = torch.zeros((len(examples), length), dtype=torch.long)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        turn[row, : len(example.ids) - 1] = torch.tensor(example.answer[1:])
    return ids, turn


def answer_loss(model: LlamaForCausalLM, ids: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over examples of the answers' cross-entropy; [B] the share of answers all right."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids, use_cache=False).last_hidden_state
    rows, places = turn.nonzero(as_tuple=True)
    logits = model.lm_head(hidden[rows, places].float())
    wanted = ids[rows, places + 1]
    each = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    # An example counts once, however long its answers: rankings are not drowned out by tables.
    loss = (each / (turn > 0).sum(1)[rows]).sum() / len(ids)
    with torch.no_grad():
        wrong = torch.zeros_like(turn)
        wrong[rows, places] = (logits.argmax(-1) != wanted).long()
        turns = turn.amax(1)
        per_turn = torch.zeros(len(ids), int(turns.max()) + 1, dtype=torch.long)
        per_turn.scatter_add_(1, turn, wrong)
        failed = (per_turn[:, 1:] > 0).sum(1)
        share = 1 - failed / turns
    return loss, share


def optimisers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.matrix_rate,
            weight_decay=recipe.decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def examples_for(
    recipe: Recipe, progress: Progress, maker: ExampleMaker, names: list[str]
) -> list[Example]:
    """One step's examples: one length for all, the weaker subtasks more often.

    A quarter of the steps go back to a shorter length, so that short contexts are not forgotten.
    """
    rng = random.Random(f"train/{recipe.seed}/{progress.step}")
    stage = progress.stage if rng.random() < 0.75 else rng.randint(0, progress.stage)
    length = recipe.stages[stage]
    weights = [1.1 - progress.accuracy.get(name, 0.0) for name in names]
    chosen = rng.choices(names, weights, k=max(1, recipe.tokens_a_step // length))
    return [maker.make(name, rng, length) for name in chosen]


def train(out: Path, *, minutes: float, seed: int, start: Path | None = None) -> None:
    """`kvbench train tiny`: train with the shipped recipe, a line of progress now and then.

    `start` is a folder that an earlier training wrote, to go on from its weights and tokenizer.
    """

    def show(line: dict[str, Any]) -> None:
        if line["step"] % 100 == 0:
            weakest = min(line["accuracy"], key=line["accuracy"].get)
            print(
                f"{line['seconds'] / 60:.1f} of {minutes:g} min, step {line['step']}, "
                f"{line['length']} tokens, loss {line['loss']:.3f}, "
                f"weakest {weakest} {line['accuracy'][weakest]:.2f}",
                file=sys.stderr,
                flush=True,
            )

    follow(Recipe(minutes=minutes, seed=seed), out, show, start)


def follow(
    recipe: Recipe,
    out: Path,
    report: Callable[[dict[str, Any]], None],
    start: Path | None = None,
) -> None:
    """Train for `recipe.minutes` and write the model, its tokenizer and the log to `out`.

    InputError if `out` cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to '{out}': {error}; choose another --out") from None
    if start is None:
        tokenizer = tiny_tokenizer(recipe.seed)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    tokenizer.save_pretrained(out)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = tiny_model(recipe, len(tokenizer), end, pad)
    if start is not None:
        earlier = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        model.load_state_dict(earlier.state_dict())
    model.train()
    optimizers = optimisers(model, recipe)
    base = [group["lr"] for o in optimizers for group in o.param_groups]
    maker, names = ExampleMaker(tokenizer, end), subtasks()
    progress = Progress()
    passed_at = 0
    saved = started = time.monotonic()
    with (out / "log.jsonl").open("w") as log:
        while progress.seconds < 60 * recipe.minutes:
            done = progress.seconds / (60 * recipe.minutes)
            factor = min(1.0, (progress.step + 1) / recipe.warm_up)
            factor *= min(1.0, (1 - done) / recipe.cool_down)
            groups = [group for o in optimizers for group in o.param_groups]
            for group, rate in zip(groups, base, strict=True):
                group["lr"] = rate * factor
            examples = examples_for(recipe, progress, maker, names)
            ids, turn = batch(examples, pad)
            loss, share = answer_loss(model, ids, turn)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for example, right in zip(examples, share.tolist(), strict=True):
                old = progress.accuracy.get(example.name, 0.0)
                progress.accuracy[example.name] = old + 0.05 * (right - old)
            progress.step += 1
            progress.seconds = time.monotonic() - started
            settled = progress.step - passed_at >= 100
            last = progress.stage == len(recipe.stages) - 1
            learnt = min(progress.accuracy.values()) >= recipe.pass_mark
            overdue = done > recipe.growth * (progress.stage + 1) / len(recipe.stages)
            if settled and not last and (learnt or overdue):
                progress.stage += 1
                passed_at = progress.step
            if progress.step % 25 == 0:
                line = {
                    "step": progress.step,
                    "seconds": round(progress.seconds, 1),
                    "length": recipe.stages[progress.stage],
                    "loss": round(loss.item(), 4),
                    "accuracy": {n: round(a, 3) for n, a in sorted(progress.accuracy.items())},
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
                report(line)
            if time.monotonic() - saved > 120:
                save(model, out)
                saved = time.monotonic()
    save(model, out)


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write the model's weights as safetensors."""
    model.save_pretrained(out)
