"""What determines learnt head scores, and is saved with them."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvbench.errors import InputError, did_you_mean
from kvbench.spec import convert

# The papers' settings, 2410.10819 (section 3.2) and 2506.17121 (section 4 and appendix).
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
}


@dataclass(frozen=True)
class Recipe:
    """The settings of one training (ALGORITHMS, section 6)."""

    method: str  # prulong or duoattention
    model: str
    model_fingerprint: str
    data: str
    length: int  # tokens of a row, for duoattention of the longest
    steps: int
    batch: int  # rows a step, over all processes
    rate: float  # Adam's, at its highest
    warm_up: float  # share of the steps; the rate then falls linearly to zero
    sinks: int
    window: int
    seed: int
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    shard: bool = False  # the model's weights over the processes (FSDP)
    target: float | None = None  # prulong: sparsity to reach
    loss_tokens: int | None = None  # prulong: predicted in a row, drawn at random if it has more
    multiplier_rate: float | None = None  # prulong: Adam's for the constraint's multipliers
    weights_rate: float = 0.0  # prulong: Adam's for the model's weights, 0 to freeze them
    l1: float | None = None  # duoattention: weight of the mean gate
    passkeys: int | None = None  # duoattention: in a row, at most
    passkey_words: int | None = None  # duoattention

    def __post_init__(self) -> None:
        for name in ("length", "steps", "batch", "window", "loss_tokens", "passkeys"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{self.method}: {name} must be at least 1, not {value}")
        if self.passkey_words is not None and self.passkey_words < 1:
            raise InputError("duoattention: passkey_words must be at least 1")
        if self.sinks < 0 or self.rate <= 0 or self.weights_rate < 0:
            raise InputError(
                f"{self.method}: sinks and weights_rate must be at least 0, rate above it"
            )
        if self.target is not None and not 0 < self.target < 1:
            raise InputError(f"a target sparsity must be between 0 and 1, not {self.target}")
        if not 0 <= self.warm_up <= 1:
            raise InputError(f"warm_up is a share of the steps, 0 to 1, not {self.warm_up}")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0 on, as a share of its highest."""
        warm = max(1.0, self.warm_up * self.steps)
        return min((step + 1) / warm, (self.steps - step) / max(1.0, self.steps - warm), 1.0)


def make_recipe(method: str, *layers: Mapping[str, Any]) -> Recipe:
    """The published settings of a method, each layer's values over those before it.

    Values may be text. InputError for a setting that the method does not have.
    """
    hints = typing.get_type_hints(Recipe)
    values: dict[str, Any] = {"method": method, **PUBLISHED[method]}
    foreign = {name for other in PUBLISHED.values() for name in other} - set(PUBLISHED[method])
    known = {field.name for field in fields(Recipe)} - foreign - {"method"}
    for layer in layers:
        for name, value in layer.items():
            if name not in known:
                raise InputError(f"training {method} has no '{name}': {did_you_mean(name, known)}")
            values[name] = convert(hints[name], value, f"{method}: {name}")
    return Recipe(**values)
