"""Checks what a method answers, and that it does not write to what it is shown.

`kvbench.engine.eviction` asks methods through these functions. A wrong answer raises ContractError,
which names the method, the layer, what was given and what is expected; the cell fails with it
(docs/writing-a-method.md).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from kvbench.errors import ContractError
from kvbench.method import KVShape, LayerView, Pages, Window

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
SCORES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WRITES = "views are read-only; clone what you change"


@dataclass(frozen=True)
class Asked:
    """What a method is asked for, as errors name it: `method 'snapkv', layer 3: scores`."""

    method: str
    what: str
    layer: int | None = None

    def error(self, fault: str) -> ContractError:
        """The error that says that the answer has a fault."""
        where = "" if self.layer is None else f", layer {self.layer}"
        return ContractError(f"method '{self.method}'{where}: {self.what} {fault}", self.method)


@contextmanager
def asking(asked: Asked) -> Iterator[None]:
    """Ask a method while views are read-only.

    A view holds inference tensors, and PyTorch refuses to write to them outside inference mode. It
    costs nothing. PyTorch may have written before it refuses: what is measured with the method must
    not be used then.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except RuntimeError as error:
        if "nplace update to inference tensor" in str(error):
            raise asked.error(f"writes to the view; {WRITES}") from error
        raise


def contents(view: LayerView) -> list[Tensor]:
    """Checksums of a view: the sum of the bits of each key, value and query, and each position.

    They reveal writes that PyTorch does not refuse, such as those through NumPy.
    """
    pieces = [piece for block in view.blocks for piece in block]
    tensors = [view.queries, *(tensor for piece in pieces for tensor in piece[:2])]
    bits = [BITS[tensor.itemsize] for tensor in tensors]
    # The sum has the dtype of what is summed, because another one would need a copy.
    sums = [t.view(kind).sum(-1, dtype=kind) for t, kind in zip(tensors, bits, strict=True)]
    return sums + [piece.positions.clone() for piece in pieces]


def check_contents(before: Sequence[Tensor], after: Sequence[Tensor], asked: Asked) -> None:
    """ContractError if checksums differ. Waits for the GPU, once."""
    changed = [(a != b).any() for a, b in zip(before, after, strict=True)]
    if torch.stack(changed).any():
        raise asked.error(f"writes to the view; {WRITES}")


def check_scores(scores: Any, view: LayerView, asked: Asked) -> Tensor:
    """The scores [K, E]; ContractError for another type, shape or dtype."""
    shape = (len(view.kv_heads), view.entries)
    if not isinstance(scores, Tensor):
        raise asked.error(f"returns {_kind(scores)}; expected a tensor {list(shape)}")
    if scores.is_nested or scores.layout is not torch.strided or scores.is_meta:
        kind = "nested" if scores.is_nested else "meta" if scores.is_meta else "sparse"
        raise asked.error(f"returns a {kind} tensor; expected a dense one {list(shape)}")
    if scores.shape != shape or scores.dtype not in SCORES:
        given = f"{list(scores.shape)} of {_name(scores.dtype)}"
        raise asked.error(
            f"returns a tensor {given}; expected [KV heads, entries] = {list(shape)} of a "
            "floating-point dtype from 16 bits"
        )
    return scores


def check_finite(finite: Sequence[tuple[Asked, int, Tensor]]) -> None:
    """ContractError for scores that are not finite. Waits for the GPU, once.

    Of each scores: what was asked, how many there are, and how many are finite (a tensor without
    dimensions).
    """
    if not finite:
        return
    home = finite[0][2].device  # layers may be on several
    counts = torch.stack([count.to(home) for _, _, count in finite]).tolist()
    for (asked, total, _), count in zip(finite, counts, strict=True):
        if count < total:
            raise asked.error(
                f"returns {total - count} of {total} scores that are NaN or infinite; "
                "expected finite ones (torch.finfo(dtype).max for what must stay)"
            )


def check_gathered(gathered: Any, view: LayerView, per_entry: bool, asked: Asked) -> Tensor:
    """What a method keeps of the tokens; ContractError for another type or, by entry, shape."""
    if not isinstance(gathered, Tensor):
        raise asked.error(f"returns {_kind(gathered)}; expected a tensor")
    shape = (len(view.kv_heads), view.entries)
    if per_entry and gathered.shape != shape:
        raise asked.error(
            f"returns a tensor {list(gathered.shape)}; expected [KV heads, entries] = {list(shape)}"
        )
    return gathered


def check_selection(
    selected: Any, candidates: Tensor, capacity: int, asked: Asked
) -> Tensor | None:
    """Indices [K, capacity] of candidates [K, N]; ContractError for other ones, or for repeats."""
    if selected is None:
        return None
    shape = (len(candidates), capacity)
    if not isinstance(selected, Tensor) or selected.shape != shape:
        raise asked.error(f"returns {_kind(selected)}; expected indices {list(shape)}")
    if selected.dtype != torch.int64:
        raise asked.error(f"returns indices of {_name(selected.dtype)}; expected int64")
    ordered = selected.to(candidates.device).sort(dim=-1).values
    inside = (ordered >= 0) & (ordered < candidates.shape[1])
    if not inside.all() or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise asked.error(
            f"returns indices that repeat or lie outside 0 to {candidates.shape[1] - 1}"
        )
    return ordered


def check_pages(pages: Any, asked: Asked) -> Pages | None:
    """The pages that a token reads; ContractError for another type or numbers out of range."""
    if pages is None:
        return None
    if isinstance(pages, Pages):
        whole = all(type(n) is int and n >= 1 for n in (pages.size, pages.least))
        if whole and isinstance(pages.share, Real) and 0 <= pages.share <= 1:
            return pages
    raise asked.error(
        f"returns {_kind(pages)}; expected None or Pages with a size and a least number, integers "
        "from 1, and a share from 0 to 1"
    )


def check_capacity(capacity: Any, asked: Asked) -> int:
    """The capacity; ContractError unless it is an integer from 0."""
    if not isinstance(capacity, Integral) or isinstance(capacity, bool):
        raise asked.error(f"returns {_kind(capacity)}; expected an int, at least 0")
    whole = int(capacity)
    if whole < 0:
        raise asked.error(f"returns {whole}; expected an int, at least 0")
    return whole


def check_observation_window(window: Any, asked: Asked) -> None:
    """ContractError unless an observation window is an integer from 0."""
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise asked.error(f"is {_kind(window)}; expected an int, at least 0")


def check_windows(windows: Any, shape: KVShape, asked: Asked) -> Sequence[Sequence[Window | None]]:
    """The windows [layers][KV heads]; ContractError for other lengths, types or sizes."""
    expected = f"expected {shape.layers} layers of {shape.kv_heads} KV heads"
    if not isinstance(windows, Sequence):
        raise asked.error(f"returns {_kind(windows)}; {expected}")
    if len(windows) != shape.layers:
        raise asked.error(f"returns {len(windows)} layers; {expected}")
    for layer, row in enumerate(windows):
        here = replace(asked, layer=layer)
        if not isinstance(row, Sequence):
            raise here.error(f"returns {_kind(row)}; {expected}")
        if len(row) != shape.kv_heads:
            raise here.error(f"returns {len(row)} KV heads; {expected}")
        for window in {id(window): window for window in row}.values():
            if window is not None and not _usable(window):
                raise here.error(
                    f"returns {_kind(window)}; expected None or a Window with sinks of at least 0 "
                    "and a size of at least 1"
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
    kind, text = type(value).__name__, " ".join(repr(value).split())
    text = text if len(text) <= 60 else f"{text[:60]}..."
    return text if text.startswith(kind) else f"{kind} {text}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
