"""RoPE of each layer, learnt from the probe of `kvbench.models.layers`.

In the probe, attention adds nothing, so a token enters a layer with the same hidden state wherever
it stands: its keys, and its queries, differ by RoPE alone. A rotation is accepted only if it takes
all of them to the same vector. Nothing is known of the architecture but that it has a module that
computes cosines and sines from positions; that module is called again at other positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvbench.method import Rotation
from kvbench.models.attention import AttentionCall

# Largest distance between unit vectors that should be the same. A wrong rotation is off by about 1.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


class NoRotation:
    """The rotation of a layer without RoPE."""

    def apply(self, states: Tensor, positions: Tensor) -> Tensor:
        """The states as they are."""
        return states

    def undo(self, states: Tensor, positions: Tensor) -> Tensor:
        """The states as they are."""
        return states


@dataclass(frozen=True, eq=False)
class RotaryCall:
    """A call of a module that computes cosines and sines, which can be repeated."""

    module: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, C] at positions [N], in float32."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():  # hidden states, for their dtype and device
                return value.new_zeros((1, len(positions), 1), dtype=torch.float32)
            return positions.expand(*value.shape[:-2], 1, -1)

        with torch.no_grad():
            found = self.module(
                *map(moved, self.arguments), **{k: moved(v) for k, v in self.keywords.items()}
            )
        cos, sin = (found.real, found.imag) if isinstance(found, Tensor) else found[:2]
        return cos.float().reshape(len(positions), -1), sin.float().reshape(len(positions), -1)


@dataclass(frozen=True, eq=False)
class Rope:
    """RoPE as a model computes it: pairs of dimensions are turned by angles (arXiv 2104.09864).

    `columns` are those of the module's output that hold each angle once; `first` and `second` are
    the dimensions of the pairs. Other dimensions stay as they are.
    """

    call: RotaryCall
    columns: slice
    first: slice
    second: slice

    def apply(self, states: Tensor, positions: Tensor) -> Tensor:
        """As `Rotation.apply`, with the model's attention scaling (YaRN, LongRoPE)."""
        return self._turned(states, *self._angles(states, positions))

    def undo(self, states: Tensor, positions: Tensor) -> Tensor:
        """As `Rotation.undo`."""
        cos, sin = self._angles(states, positions)
        scale = cos.square() + sin.square()  # the square of the attention scaling
        return self._turned(states, cos / scale, -sin / scale)

    def _angles(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., T, P] of the P pairs."""
        flat = positions.to(states.device).flatten()
        cos, sin = (table.to(states.device)[:, self.columns] for table in self.call.at(flat))
        return cos.unflatten(0, positions.shape), sin.unflatten(0, positions.shape)

    def _turned(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = states.clone()
        first, second = states[..., self.first], states[..., self.second]
        turned[..., self.first] = first * cos - second * sin
        turned[..., self.second] = second * cos + first * sin
        return turned


@contextmanager
def rotary_calls(model: Any) -> Iterator[list[RotaryCall]]:
    """Collect, while the model runs, the calls of modules that may compute cosines and sines.

    These have no weights and no parts, and are given positions.
    """
    calls: list[RotaryCall] = []

    def note(module: Any, arguments: Any, keywords: Any, _: Any) -> None:
        given = (*arguments, *keywords.values())
        if any(isinstance(each, Tensor) and not each.is_floating_point() for each in given):
            calls.append(RotaryCall(module, arguments, keywords))

    leaves = (m for m in model.modules() if not [*m.children(), *m.parameters(recurse=False)])
    hooks = [leaf.register_forward_hook(note, with_kwargs=True) for leaf in leaves]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def rotation_of(
    layer: AttentionCall, positions: Tensor, calls: Sequence[RotaryCall]
) -> Rotation | None:
    """The rotation of a layer of which the probe has read the same tokens at `positions` [B, T].

    None if no rotation is known that explains its queries and keys.
    """
    states = torch.cat([layer.query, layer.key], 1).float()
    best = min(
        candidates(calls, positions, layer.key.shape[-1]),
        key=lambda rotation: distance(rotation, states, positions),
    )
    found = distance(best, states, positions) <= TOLERANCE.get(layer.key.dtype, 0.0)
    return best if found else None


def distance(rotation: Rotation, states: Tensor, positions: Tensor) -> float:
    """How far states [B, H, T, D] are from being the same in all B once they are rotated back."""
    back = normalize(rotation.undo(states, positions[:, None]), dim=-1)
    return float((back - back[:1]).norm(dim=-1).max())


def candidates(calls: Sequence[RotaryCall], positions: Tensor, size: int) -> Iterator[Rotation]:
    """Rotations of heads of `size` dimensions.

    The pairs are neighbours, or a half apart, in the first or the last dimensions; a module gives
    each angle once, or twice: next to each other or in two halves.
    """
    yield NoRotation()
    for call in calls:
        width = call.at(positions.flatten())[0].shape[1]
        once = [(slice(None), width)]
        if not width % 2:
            once += [(slice(0, width // 2), width // 2), (slice(0, None, 2), width // 2)]
        for (columns, pairs), last in product(once, (False, True)):
            if not 0 < 2 * pairs <= size:
                continue
            start = size - 2 * pairs if last else 0
            middle, stop = start + pairs, start + 2 * pairs
            yield Rope(call, columns, slice(start, middle), slice(middle, stop))
            yield Rope(call, columns, slice(start, stop, 2), slice(start + 1, stop, 2))
