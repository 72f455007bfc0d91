"""What a KV-cache method is, and what it may look at when it decides."""

from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from kvbench.errors import InputError

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Family(StrEnum):
    """The paper's families (section 3): when memory is freed, and by which choice."""

    FULL = "full"
    DYNAMIC_SPARSITY = "dynamic sparsity"
    RECENCY = "recency"
    POST_FILL = "post-fill"
    HEAD_SPLIT = "head split"


@dataclass(frozen=True)
class Window:
    """A streaming KV head: it keeps the first `sinks` entries and the most recent `size`."""

    sinks: int
    size: int


@dataclass(frozen=True)
class KVShape:
    """The shape of a model's KV cache: layers, KV heads a layer, query heads, head size."""

    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.query_heads // self.kv_heads


class Entries(NamedTuple):
    """Entries of some KV heads of a layer, wherever they lie."""

    keys: "Tensor"  # [k, e, D]
    values: "Tensor"  # [k, e, Dv]
    positions: "Tensor"  # [k, e]


@dataclass(frozen=True)
class LayerView:
    """One layer of one row, just after a prefill chunk has attended and before it is evicted.

    K counts the KV heads that are scored (all of a layer's, or a head split's retrieval heads), E
    the resident entries: those kept of earlier chunks, then the `new` entries of this chunk, then,
    where the chunk was patched, the patched entries. Queries and keys are after RoPE.

    Entries lie apart, as `blocks`: for each run of KV heads, its pieces in order. `keys`, `values`
    and `positions` put them side by side, a copy of the layer; `attention` needs no such copy.
    """

    blocks: "Sequence[Sequence[Entries]]"
    queries: "Tensor"  # [K, G, W, D], the observation window's; W = 0 if the method has none
    query_positions: "Tensor"  # [W]
    scaling: float  # what attention multiplies logits by
    kv_heads: tuple[int, ...]  # which KV heads of the layer the K are
    layer: int
    layers: int
    budget: float  # nan in `scores`: one scoring serves every budget of a sweep
    prompt: int  # n, tokens of the whole prompt
    new: int  # T, entries that may be evicted now (of a prompt read at once: all of them)
    patched: int  # entries at the end that stand for the prompt's last tokens and will be dropped
    last: bool  # whether this is the prompt's last chunk
    generator: "Generator"  # for methods that draw; seeded by row, layer and chunk, on the CPU

    @property
    def entries(self) -> int:
        """E."""
        return sum(piece.positions.shape[1] for piece in self.blocks[0])

    @cached_property
    def keys(self) -> "Tensor":
        """[K, E, D]."""
        return self._joined(0)

    @cached_property
    def values(self) -> "Tensor":
        """[K, E, Dv]."""
        return self._joined(1)

    @cached_property
    def positions(self) -> "Tensor":
        """[K, E], position in the text of each entry."""
        return self._joined(2)

    @cached_property
    def attention(self) -> "Tensor":
        """[K, E], what each entry gets from the observation window; not to be written to.

        Softmax in float32 over all resident entries, summed over the window's queries and averaged
        over the query group (SnapKV, 2404.14469).
        """
        return observed_attention(self.queries, self.blocks, self.query_positions, self.scaling)

    def _joined(self, which: int) -> "Tensor":
        import torch

        like = self.blocks[0][0][which]
        joined = like.new_empty((len(self.kv_heads), self.entries, *like.shape[2:]))
        start = 0
        for block in self.blocks:
            stop = start + len(block[0][which])
            torch.cat([piece[which].to(like.dtype) for piece in block], 1, out=joined[start:stop])
            start = stop
        return joined


def observed_attention(
    queries: "Tensor",
    blocks: "Sequence[Sequence[Entries]]",
    query_positions: "Tensor",
    scaling: float,
) -> "Tensor":
    """Attention that entries get from an observation window (SnapKV, 2404.14469).

    queries [K, G, W, D] and `blocks` as in a LayerView -> [K, E]: softmax in float32 over all
    resident entries, causal by position, summed over the W queries and averaged over the G of the
    query group. One KV head at a time, so that the memory is G x W x E whatever the model.
    """
    import torch

    rows: list[Tensor] = []
    for block in blocks:
        for index in range(len(block[0].keys)):
            query = queries[len(rows)].float()
            logits = torch.cat([query @ piece.keys[index].float().T for piece in block], -1)
            positions = torch.cat([piece.positions[index] for piece in block])
            logits = (logits * scaling).masked_fill_(
                positions > query_positions[:, None], -torch.inf
            )
            rows.append(logits.softmax(-1).sum(1).mean(0))
    return torch.stack(rows)


@dataclass(frozen=True)
class Method:
    """A rule for what stays in the KV cache; its fields are its options.

    A post-fill method overrides `scores`; recency and head splits override `windows`. What neither
    overrides keeps everything. A budget of 1 never reaches a method: nothing is evicted.
    """

    name: ClassVar[str]
    family: ClassVar[Family]

    @property
    def observation_window(self) -> int:
        """W, how many of the prompt's last queries `scores` looks at, always kept themselves."""
        return 0

    def windows(
        self, shape: KVShape, budget: float, prompt: int
    ) -> Sequence[Sequence[Window | None]] | None:
        """For every layer and KV head the window it keeps, None for a head that keeps all.

        None for all heads together means that none streams.
        """
        return None

    def scores(self, view: LayerView) -> "Tensor | None":
        """[K, E], larger for the entries to keep; None for a method that scores nothing.

        Only the scores of the `view.new` entries of this chunk are used. They are computed once
        and cut at each budget, so they cannot depend on it.
        """
        return None

    def capacity(self, view: LayerView) -> int:
        """How many of the `view.new` entries stay, the observation window included."""
        return round(view.budget * view.new)

    def missing(self) -> str | None:
        """What has to be given before the method can run, and how; None for nothing."""
        return None

    def remarks(self) -> dict[str, Any]:
        """What a record should say beside the options, JSON-serialisable."""
        return {}

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option names and their defaults, dataclasses.MISSING where one must be given."""
        return {option_name(f): f.default for f in fields(cls) if f.init}

    @classmethod
    def check(cls, condition: bool, message: str) -> None:
        """Raise InputError(`message`) unless `condition`; for `__post_init__`."""
        if not condition:
            raise InputError(f"{getattr(cls, 'name', cls.__name__)}: {message}")


def option_name(field: "Field[Any]") -> str:
    """What a user calls a field of a method: its name, unless its metadata name an `option`."""
    return str(field.metadata.get("option", field.name))
