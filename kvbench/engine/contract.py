"""Checks what a method answers, and that it does not write to what it is shown.

`kvbench.engine.eviction` asks methods through these functions. A wrong answer raises ContractError,
which names the method, the layer, what was given and what is expected; the cell fails with it
(docs/writing-a-method.md).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from kvbench.errors import ContractError
from kvbench.method import Entries, KVShape, LayerView, Window

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
WRITES = "views are read-only; clone what you change"


@contextmanager
def asking(who: str) -> Iterator[None]:
    """Ask a method while views are read-only; `who` says which method is asked for what.

    A view holds inference tensors, and PyTorch refuses to write to them outside inference mode. It
    costs nothing. PyTorch may have written before it refuses: what is measured with the method must
    not be used then.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except RuntimeError as error:
        if "nplace update to inference tensor" in str(error):
            raise ContractError(f"{who} writes to the view; {WRITES}") from error
        raise


def contents(blocks: Sequence[Sequence[Entries]]) -> list[Tensor]:
    """Checksums of entries as they are stored: the sum of each entry's bits, and its position.

    They reveal writes that PyTorch does not see, such as those through NumPy.
    """
    sums = []
    for piece in (piece for block in blocks for piece in block):
        for tensor in (piece.keys, piece.values):
            bits = BITS[tensor.itemsize]
            sums.append(tensor.view(bits).sum(-1, dtype=bits))  # another dtype would be a copy
        sums.append(piece.positions.clone())
    return sums


def check_contents(before: Sequence[Tensor], after: Sequence[Tensor], who: str) -> None:
    """ContractError if checksums differ. Waits for the GPU."""
    if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        raise ContractError(f"{who} writes to the cache; {WRITES}")


def check_scores(scores: Any, view: LayerView, who: str) -> Tensor:
    """The scores [K, E]; ContractError for another type, shape or dtype."""
    shape = (len(view.kv_heads), view.entries)
    if not isinstance(scores, Tensor):
        raise ContractError(f"{who} returns {_kind(scores)}; expected a tensor {list(shape)}")
    if scores.shape != shape or not scores.is_floating_point():
        given = f"{list(scores.shape)} of {_name(scores.dtype)}"
        raise ContractError(
            f"{who} returns a tensor {given}; expected [KV heads, entries] = {list(shape)} of a "
            "floating-point dtype"
        )
    return scores


def check_finite(finite: Sequence[tuple[str, int, Tensor]]) -> None:
    """ContractError for scores that are not finite. Waits for the GPU, once.

    Of each scores: who gave them, how many there are, and how many are finite (a tensor without
    dimensions).
    """
    if not finite:
        return
    counts = torch.stack([count for _, _, count in finite]).tolist()
    for (who, total, _), count in zip(finite, counts, strict=True):
        if count < total:
            raise ContractError(
                f"{who} returns {total - count} of {total} scores that are NaN or infinite; "
                "expected finite ones (torch.finfo(dtype).max for what must stay)"
            )


def check_capacity(capacity: Any, who: str) -> int:
    """The capacity; ContractError unless it is an integer from 0."""
    if not isinstance(capacity, Integral) or isinstance(capacity, bool):
        raise ContractError(f"{who} returns {_kind(capacity)}; expected an int, at least 0")
    if capacity < 0:
        raise ContractError(f"{who} returns {capacity}; expected an int, at least 0")
    return int(capacity)


def check_observation_window(window: Any, who: str) -> None:
    """ContractError unless an observation window is an integer from 0."""
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise ContractError(f"{who} is {_kind(window)}; expected an int, at least 0")


def check_windows(windows: Any, shape: KVShape, who: str) -> Sequence[Sequence[Window | None]]:
    """The windows [layers][KV heads]; ContractError for other lengths, types or sizes."""
    expected = f"expected {shape.layers} layers of {shape.kv_heads} KV heads"
    if not isinstance(windows, Sequence):
        raise ContractError(f"{who} returns {_kind(windows)}; {expected}")
    if len(windows) != shape.layers:
        raise ContractError(f"{who} returns {len(windows)} layers; {expected}")
    for layer, row in enumerate(windows):
        if not isinstance(row, Sequence):
            raise ContractError(f"{who}, layer {layer}: returns {_kind(row)}; {expected}")
        if len(row) != shape.kv_heads:
            raise ContractError(f"{who}, layer {layer}: returns {len(row)} KV heads; {expected}")
        for window in {id(window): window for window in row}.values():
            if window is not None and not _usable(window):
                raise ContractError(
                    f"{who}, layer {layer}: returns {_kind(window)}; expected None or a Window "
                    "with sinks of at least 0 and a size of at least 1"
                )
    return windows


def _usable(window: Any) -> bool:
    if not isinstance(window, Window):
        return False
    numbers = (window.sinks, window.size)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    return whole and window.sinks >= 0 and window.size >= 1


def _kind(value: Any) -> str:
    """A value as an error names it: its type and, shortened, itself."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {_name(value.dtype)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
