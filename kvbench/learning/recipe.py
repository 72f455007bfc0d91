"""The settings of each training; they are saved with what it learns."""

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvbench.arguments import LARGEST, check_whole
from kvbench.errors import InputError, did_you_mean
from kvbench.spec import convert

# The papers' settings: 2410.10819 (section 3.2) and 2506.17121 (section 4 and appendix).
PUBLISHED: dict[str, dict[str, Any]] = {
    "prulong": {
        "target": 0.7,
        "steps": 1000,
        "batch": 16,
        "rate": 1.0,
        "warm_up": 0.1,
        "sinks": 128,
        "window": 1024,
        "loss_tokens": 8192,
        "multiplier_rate": 1.0,
        "constraint": "multipliers",
        "focus": 1.0,
        "weights_rate": 0.0,
    },
    "duoattention": {
        "steps": 2000,
        "batch": 8,
        "rate": 0.02,
        "warm_up": 0.1,
        "sinks": 128,
        "window": 1024,
        "l1": 0.05,
        "passkeys": 10,
        "passkey_words": 32,
    },
    "saliency": {
        "steps": 100,
        "batch": 2,
        "rate": 1.0,
        "warm_up": 0.0,
        "sinks": 128,
        "window": 1024,
        "loss_tokens": 8192,
        "focus": 1.0,
    },
}
CONSTRAINTS = ("multipliers", "exact")  # ways to reach the target sparsity

# The least value of each setting that is a whole number. A row of one token predicts nothing.
LEAST = {
    **{"length": 2, "sinks": 0},
    **dict.fromkeys(("steps", "batch", "window", "loss_tokens", "passkeys", "passkey_words"), 1),
    **dict.fromkeys(("train_chunk", "rows"), 1),
}


@dataclass(frozen=True)
class HeadRecipe:
    """The settings of one training of head scores; InputError if one of them is out of range."""

    method: str  # prulong, duoattention or saliency
    model: str
    model_fingerprint: str
    data: str
    length: int  # tokens of a row; the longest row for duoattention
    steps: int
    batch: int  # rows per step, over all processes
    rate: float  # Adam's highest learning rate
    warm_up: float  # share of the steps; after it the rate falls linearly to zero
    sinks: int
    window: int
    seed: int
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    shard: bool = False  # shard the model's weights over the processes (FSDP)
    train_chunk: int = 1  # prefill chunk of the streaming heads, in tokens
    target: float | None = None  # prulong: sparsity to reach
    loss_tokens: int | None = None  # prulong, saliency: most tokens of a row in the loss, drawn
    focus: float | None = None  # prulong, saliency: share of these that need far context most
    rows: int | None = None  # prulong, saliency: different rows; then they come again
    constraint: str | None = None  # prulong: multipliers (the paper's) or exact
    multiplier_rate: float | None = None  # prulong: Adam's rate for the constraint's multipliers
    weights_rate: float = 0.0  # prulong: Adam's rate for the model's weights, 0 to freeze them
    l1: float | None = None  # duoattention: weight of the mean gate in the loss
    passkeys: int | None = None  # duoattention: most passkeys in a row
    passkey_words: int | None = None  # duoattention: words of a passkey
    data_hash: str = ""  # of the tokens that the rows are made of; "" if tasks make the rows

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if (value := getattr(self, name)) is not None:
                check_whole(f"{self.method}: {name}", value, least)
        check_whole(f"{self.method}: seed", self.seed, least=0, most=LARGEST)
        for name in ("multiplier_rate", "weights_rate", "l1"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise InputError(f"{self.method}: {name} must be 0 or more, not {value}")
        if not 0 < self.rate < math.inf:
            raise InputError(f"{self.method}: rate must be above 0, not {self.rate}")
        if self.target is not None and not 0 < self.target < 1:
            raise InputError(f"a target sparsity must be between 0 and 1, not {self.target}")
        if self.focus is not None and not 0 < self.focus <= 1:
            raise InputError(f"focus is a share of the tokens, above 0 to 1, not {self.focus}")
        if self.focus is not None and self.focus < 1 and self.weights_rate:
            raise InputError("focus below 1 is for frozen weights: set weights_rate=0 or focus=1")
        if self.constraint not in (None, *CONSTRAINTS):
            raise InputError(
                f"{self.method}: no constraint '{self.constraint}': "
                f"{did_you_mean(self.constraint, CONSTRAINTS)}"
            )
        if not 0 <= self.warm_up <= 1:
            raise InputError(f"warm_up is a share of the steps, 0 to 1, not {self.warm_up}")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step (from 0), as a share of the highest one."""
        warm = max(1.0, self.warm_up * self.steps)
        return min((step + 1) / warm, (self.steps - step) / max(1.0, self.steps - warm), 1.0)


def make_recipe(method: str, *layers: Mapping[str, Any]) -> HeadRecipe:
    """The published settings of a method, overridden by each of `layers` in turn.

    Values may be text. InputError for a setting that the method does not have.
    """
    hints = typing.get_type_hints(HeadRecipe)
    values: dict[str, Any] = {"method": method, **PUBLISHED[method]}
    foreign = {name for other in PUBLISHED.values() for name in other} - set(PUBLISHED[method])
    known = {field.name for field in fields(HeadRecipe)} - foreign - {"method", "data_hash"}
    for layer in layers:
        for name, value in layer.items():
            if name not in known:
                raise InputError(f"training {method} has no '{name}': {did_you_mean(name, known)}")
            values[name] = convert(hints[name], value, f"{method}: {name}")
    return HeadRecipe(**values)


@dataclass(frozen=True)
class TinyRecipe:
    """The settings of the embedded model and of its training."""

    seed: int = 0
    hidden: int = 192
    layers: int = 4
    query_heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    feed_forward: int = 384
    max_positions: int = 8192
    rope_theta: float = 1e8  # most frequencies are slow enough to match over a whole context
    stages: tuple[int, ...] = (192, 256, 384, 512, 768, 1024, 1280)  # tokens of a context
    pass_mark: float = 0.9  # accuracy of the worst subtask that ends a stage
    growth: float = 0.45  # share of the time after which the last stage starts at any accuracy
    tokens_a_step: int = 4096
    matrix_rate: float = 4e-3  # Muon's rate, for the matrices of the layers
    rate: float = 4e-3  # AdamW's rate, for embeddings, norms and biases
    warm_up: int = 100  # steps
    cool_down: float = 0.35  # share of the time in which the rates fall to zero
    decay: float = 0.01
    minutes: float = 32.0
    steps: int | None = None  # instead of minutes; then equal seeds give equal models

    def done(self, step: int, seconds: float) -> float:
        """The share of the training that is over."""
        return seconds / (60 * self.minutes) if self.steps is None else step / self.steps
