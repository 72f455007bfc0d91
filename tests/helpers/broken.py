"""Methods that break their contract, each in one way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbench.method import Family, KVShape, LayerView, Method, Window
from kvbench.spec import Chunking, MethodSpec


def norms(view: LayerView) -> Tensor:
    """Good scores."""
    norms: Tensor = -view.keys.float().norm(dim=-1)
    return norms


def method(
    scores: Callable[[LayerView], Any] = norms,
    capacity: Callable[[LayerView, float], Any] | None = None,
    windows: Callable[[KVShape], Any] | None = None,
) -> Method:
    """A method called `bad` that answers so."""
    kind = Family.POST_FILL if windows is None else Family.RECENCY

    @dataclass(frozen=True)
    class Bad(Method):
        name = "bad"
        family = kind

        def scores(self, view: LayerView) -> Any:
            return scores(view)

        def capacity(self, view: LayerView, budget: float) -> Any:
            return super().capacity(view, budget) if capacity is None else capacity(view, budget)

        def windows(self, shape: KVShape, budget: float, prompt: int) -> Any:
            return None if windows is None else windows(shape)

    return Bad()


def spec(bad: Method, chunking: Chunking = Chunking.NONE) -> MethodSpec:
    """The method, ready to run."""
    return MethodSpec("bad", bad, chunking)


def writing(write: Callable[[LayerView], Any]) -> Method:
    """A method that writes to its view, and gives good scores."""

    def scores(view: LayerView) -> Tensor:
        write(view)
        return norms(view)

    return method(scores)


def write_in_inference_mode(view: LayerView) -> None:
    with torch.inference_mode():
        view.blocks[0][0].values.zero_()


WRITES: dict[str, Callable[[LayerView], Any]] = {
    "queries": lambda view: view.queries.mul_(0),
    "a part of the queries": lambda view: view.queries[0, 0].zero_(),
    "blocks": lambda view: view.blocks[0][0].keys.mul_(0),
    "the last block": lambda view: view.blocks[-1][-1].values.fill_(1),
    "positions in blocks": lambda view: view.blocks[0][0].positions.add_(1),
    "joined keys": lambda view: view.keys.mul_(0),
    "joined values": lambda view: view.values.copy_(torch.zeros_like(view.values)),
    "joined positions": lambda view: view.positions.zero_(),
    "attention": lambda view: view.attention.mul_(0),
    "out=": lambda view: torch.mul(view.queries, 0, out=view.queries),
    "NumPy": lambda view: view.blocks[0][0].keys.numpy().fill(0),
    "detach": lambda view: view.blocks[0][0].values.detach().zero_(),
    "inference mode": write_in_inference_mode,
}

WINDOWS: dict[str, tuple[Callable[[KVShape], Any], str]] = {
    "layers": (lambda shape: [[None] * shape.kv_heads], "returns 1 layers; expected 3 layers of 2"),
    "heads": (lambda shape: [[None]] * shape.layers, "layer 0: windows returns 1 KV heads"),
    "no sequence": (lambda shape: 3, "returns int 3; expected 3 layers"),
    "a number": (lambda shape: [[7] * shape.kv_heads] * shape.layers, "returns int 7; expected No"),
    "negative": (
        lambda shape: [[None] * shape.kv_heads] + [[Window(-1, 4)] * shape.kv_heads] * 2,
        "layer 1: windows returns Window(sinks=-1, size=4)",
    ),
    "empty": (lambda shape: [[Window(4, 0)] * shape.kv_heads] * shape.layers, "size of at least 1"),
    "a fraction": (
        lambda shape: [[Window(4, 2.5)] * shape.kv_heads] * shape.layers,  # type: ignore[arg-type]
        "Window(sinks=4, size=2.5)",
    ),
}

SCORES: dict[str, tuple[Callable[[LayerView], Any], str]] = {
    "shape": (lambda view: norms(view)[:, :5], "a tensor [2, 5] of float32; expected [KV heads, e"),
    "dimensions": (lambda view: norms(view)[0], "expected [KV heads, entries] = [2, "),
    "integers": (lambda view: norms(view).long(), "of int64; expected"),
    "bools": (lambda view: norms(view) > 0, "of bool; expected"),
    "complex": (lambda view: norms(view).to(torch.complex64), "of complex64; expected"),
    "8 bits": (lambda view: norms(view).to(torch.float8_e4m3fn), "of float8_e4m3fn; expected"),
    "sparse": (lambda view: norms(view).to_sparse(), "returns a sparse tensor; expected a dense"),
    "none": (lambda view: None, "returns None; expected a tensor"),
    "a list": (lambda view: norms(view).tolist(), "returns list"),
    "nan": (lambda view: norms(view).masked_fill(view.positions == 3, torch.nan), "returns 2 of "),
    "infinite": (lambda view: norms(view).masked_fill(view.positions == 3, torch.inf), "infinite"),
    "minus infinite": (lambda view: norms(view).masked_fill(view.positions < 9, -torch.inf), "inf"),
}

CAPACITIES: dict[str, tuple[Callable[[LayerView, float], Any], str]] = {
    "negative": (lambda view, budget: -3, "capacity returns -3; expected an int, at least 0"),
    "a fraction": (lambda view, budget: budget * view.new, "returns float "),
    "a bool": (lambda view, budget: True, "returns bool True"),
    "none": (lambda view, budget: None, "returns None; expected an int"),
}
