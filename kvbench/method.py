"""What a KV-cache method is, and what it sees when it decides (docs/writing-a-method.md).

The engine shows a method one layer at a time, as a `LayerView`; `kvbench.engine.eviction` turns the
method's scores and capacity into an eviction.
"""

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from kvbench.errors import InputError

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Family(StrEnum):
    """The families of the paper (arXiv 2506.17121, section 3): when memory is freed, and how."""

    FULL = "full"
    DYNAMIC_SPARSITY = "dynamic sparsity"
    RECENCY = "recency"
    POST_FILL = "post-fill"
    DECODING = "eviction while decoding"
    HEAD_SPLIT = "head split"


class Need(StrEnum):
    """What a view holds only for a method that declares it in `Method.needs`."""

    MODULE = "attention module"
    ROTATION = "rotation"
    REPLAY = "replay"


class Competition(StrEnum):
    """Which entries compete for a budget (docs/concepts.md)."""

    HEAD = "head"  # those of a KV head, each of which keeps as many as the others of its layer
    LAYER = "layer"  # those of all KV heads of a layer
    MODEL = "model"  # those of all layers


EVERY_QUERY = 2**31  # an observation window of all queries since the method was last asked


@dataclass(frozen=True)
class Window:
    """What a streaming KV head keeps: the first `sinks` entries and the most recent `size`."""

    sinks: int
    size: int


@dataclass(frozen=True)
class Limit:
    """What the model itself lets a layer see: a sliding window, or chunks of attention.

    With a sliding window, a token sees itself and the `size - 1` tokens before it. With `chunked`,
    it sees the tokens of its own chunk: positions are cut into chunks of `size`.
    """

    size: int
    chunked: bool = False

    def hides(self, query: "Tensor", entry: "Tensor") -> "Tensor":
        """Whether tokens at positions `query` do not see earlier entries at positions `entry`."""
        if self.chunked:
            return entry // self.size != query // self.size
        return entry <= query - self.size

    def held(self, tokens: int) -> int:
        """Entries that the next token can still see once `tokens` tokens have been read."""
        return tokens % self.size if self.chunked else min(tokens, self.size - 1)


@dataclass(frozen=True)
class KVShape:
    """The shape of a model's KV cache.

    Methods act on the layers `acting` (None: all): those that the model does not limit and that
    hold keys of their own. What a method decides for another layer is ignored.
    """

    layers: int
    kv_heads: int  # of a layer that methods act on
    query_heads: int  # of a layer
    head_dim: int
    acting: tuple[int, ...] | None = None

    @property
    def group(self) -> int:
        """G, the query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def total_kv_heads(self) -> int:
        """KV heads of all layers."""
        return self.layers * self.kv_heads


@dataclass(frozen=True)
class Pages:
    """What a decoded token reads of a KV head: the pages whose keys may fit its query best.

    A page is `size` entries in order of position. Of P pages, the share `share` (0..1) is read, by
    number of entries, and no fewer than `least` pages.
    """

    size: int
    share: float
    least: int

    def read(self, entries: int) -> int:
        """The pages that a token reads of `entries` resident entries."""
        return max(self.least, round(self.share * entries / self.size))


class Rotation(Protocol):
    """RoPE of one layer."""

    def apply(self, states: "Tensor", positions: "Tensor") -> "Tensor":
        """Rotate queries or keys [..., T, D] to `positions` [T] or [..., T]."""
        ...

    def undo(self, states: "Tensor", positions: "Tensor") -> "Tensor":
        """Rotate queries or keys [..., T, D] back from `positions`."""
        ...


class Entries(NamedTuple):
    """Entries of some KV heads of one layer, in any order."""

    keys: "Tensor"  # [k, e, D]
    values: "Tensor"  # [k, e, Dv]
    positions: "Tensor"  # [k, e], positions in the text


@dataclass(frozen=True)
class LayerView:
    """One layer of one row, after tokens have attended and before anything is evicted.

    The tokens are a prefill chunk or, for eviction while decoding, those since the last eviction.

    K counts the KV heads that are scored: all of the layer, or the retrieval heads of a head split.
    E counts the resident entries, in this order: those kept of earlier chunks, the `new` entries of
    this chunk, and the patched entries if the chunk was patched. Queries and keys are after RoPE.

    `blocks` holds the entries as they are stored: for each run of KV heads, its pieces in order.
    `keys`, `values` and `positions` join the pieces, which copies the layer; `attention` does not.
    A view is read-only: a method that writes to its tensors is stopped.
    """

    blocks: "Sequence[Sequence[Entries]]"
    queries: "Tensor"  # [K, G, W, D], of the observation window; W = 0 if the method has none,
    # and the tokens that have just attended if its window is EVERY_QUERY
    query_positions: "Tensor"  # [W]
    scaling: float  # attention multiplies the logits by it
    kv_heads: tuple[int, ...]  # indices in the layer of the K heads
    layer: int  # from 0
    layers: int
    prompt: int  # n, tokens of the whole prompt
    new: int  # entries that may be evicted now; the whole prompt if it is evicted once, at its end
    patched: int  # entries at the end that stand for the prompt's last tokens; they are dropped
    last: bool  # whether this is the prompt's last chunk
    generator: "Generator"  # on the CPU, for methods that draw; seeded by `draw_seed`
    tokens: int = 0  # tokens that the `new` entries stand for; more where the model hides some
    acting: tuple[int, ...] | None = None  # the layers that methods act on; None: all
    limit: Limit | None = None  # what the model itself lets the layer see
    softcap: float | None = None  # the logits l become softcap * tanh(l / softcap)
    sinks: "Tensor | None" = None  # [K, G], logits of learnt sinks, which take part of the softmax
    read: int = 0  # tokens that have been read, of the prompt and of the answer
    gathered: "Tensor | None" = None  # what `Method.gather` returned, for methods that gather
    module: Any = None  # the layer's attention, a torch.nn.Module (Need.MODULE)
    rotation: Rotation | None = None  # (Need.ROTATION)
    replayed: "Tensor | None" = None  # [K, E], the most attention that each entry gets while the
    # prompt is read once more (Need.REPLAY)

    @property
    def depth(self) -> tuple[int, int]:
        """The layer's place, from 0, among the layers that methods act on, and their number."""
        if self.acting is None:
            return self.layer, self.layers
        return self.acting.index(self.layer), len(self.acting)

    @property
    def entries(self) -> int:
        """E, the resident entries of each KV head."""
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
        """[K, E], the position of each entry in the text."""
        return self._joined(2)

    @cached_property
    def attention(self) -> "Tensor":
        """[K, E], `observed_attention` of each entry."""
        import torch

        with torch.inference_mode():  # its results are read-only outside
            return observed_attention(
                self.queries,
                self.blocks,
                self.query_positions,
                self.scaling,
                limit=self.limit,
                softcap=self.softcap,
                sinks=self.sinks,
            )

    def latest(self, count: int) -> "LayerView":
        """The layer as if only the last `count` entries of each KV head were resident.

        `attention` is then normalised over these. Nothing is copied; everything else is the same.
        """
        if count >= self.entries:
            return self
        import torch

        with torch.inference_mode():  # slices of what is read-only are read-only too
            blocks = tuple(tuple(_last_entries(block, count)) for block in self.blocks)
        return replace(self, blocks=blocks)

    def _joined(self, which: int) -> "Tensor":
        import torch

        with torch.inference_mode():  # its results are read-only outside
            like = self.blocks[0][0][which]
            joined = like.new_empty((len(self.kv_heads), self.entries, *like.shape[2:]))
            start = 0
            for block in self.blocks:
                stop = start + len(block[0][which])
                torch.cat(
                    [piece[which].to(like.dtype) for piece in block], 1, out=joined[start:stop]
                )
                start = stop
            return joined


def _last_entries(block: "Sequence[Entries]", count: int) -> list[Entries]:
    pieces: list[Entries] = []
    for piece in reversed(block):
        size = piece.positions.shape[1]
        taken = min(size, count)
        if taken:
            pieces.insert(0, Entries(*(tensor[:, size - taken :] for tensor in piece)))
        count -= taken
    return pieces


QUERY_BLOCK = 512  # queries whose attention is computed at once


def observed_attention(
    queries: "Tensor",
    blocks: "Sequence[Sequence[Entries]]",
    query_positions: "Tensor",
    scaling: float,
    *,
    limit: Limit | None = None,
    softcap: float | None = None,
    sinks: "Tensor | None" = None,
) -> "Tensor":
    """Attention that entries receive from an observation window (SnapKV, arXiv 2404.14469).

    queries [K, G, W, D], `blocks` and the model's own rules as in a LayerView; returns [K, E].
    Softmax in float32 over all resident entries that a query sees, summed over the W queries and
    averaged over the G query heads of the group. One KV head at a time, so that it needs G x W x E
    floats at most, W at most 512 at a time.
    """
    import torch

    if queries.shape[2] > QUERY_BLOCK:
        starts = range(0, queries.shape[2], QUERY_BLOCK)
        parts = [
            observed_attention(
                queries[:, :, start : start + QUERY_BLOCK],
                blocks,
                query_positions[start : start + QUERY_BLOCK],
                scaling,
                limit=limit,
                softcap=softcap,
                sinks=sinks,
            )
            for start in starts
        ]
        return torch.stack(parts).sum(0)
    rows: list[Tensor] = []
    for block in blocks:
        for index in range(len(block[0].keys)):
            head = len(rows)
            query = queries[head].float()
            logits = torch.cat([query @ piece.keys[index].float().T for piece in block], -1)
            logits = logits * scaling
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh_()
            positions = torch.cat([piece.positions[index] for piece in block])
            hidden = positions > query_positions[:, None]
            if limit is not None:
                hidden |= limit.hides(query_positions[:, None], positions)
            logits.masked_fill_(hidden, -torch.inf)
            if sinks is None:
                weights = logits.softmax(-1)
            else:
                sink = sinks[head].float()[:, None, None].expand(-1, logits.shape[1], 1)
                weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
            rows.append(weights.sum(1).mean(0))
    return torch.stack(rows)


@dataclass(frozen=True)
class Method:
    """A rule for what stays in the KV cache. Its fields are its options.

    A field's metadata may hold a `help` text and, as `option`, the name that users type instead of
    the field's. A post-fill method overrides `scores`, and so does one that evicts while decoding;
    recency and head splits override `windows`; dynamic sparsity overrides `pages`; a method that
    overrides none of these keeps and reads everything. A method is never asked about a budget of
    1, which evicts nothing.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    needs: ClassVar[frozenset[Need]] = frozenset()
    gathers_per_entry: ClassVar[bool] = True
    ties_by_topk: ClassVar[bool] = False  # of equal scores those stay that `torch.topk` takes

    @property
    def observation_window(self) -> int:
        """W, how many of the last queries `scores` uses; EVERY_QUERY for a method that gathers."""
        return 0

    @property
    def protected(self) -> int:
        """How many of the last entries always stay: by default those of the observation window."""
        return 0 if self.observation_window >= EVERY_QUERY else self.observation_window

    @property
    def competition(self) -> Competition:
        """Which entries compete; by default those of one KV head."""
        return Competition.HEAD

    @property
    def head_share(self) -> float:
        """The share (0..1) of the mean capacity that each KV head keeps if heads compete."""
        return 0.0

    def windows(
        self, shape: KVShape, budget: float, prompt: int
    ) -> Sequence[Sequence[Window | None]] | None:
        """The window of each layer and KV head, [layers][KV heads]; None for a head that keeps all.

        `prompt` is in tokens. Returns None if no head streams.
        """
        return None

    def scores(self, view: LayerView) -> "Tensor | None":
        """[K, E], larger for the entries to keep; None for a method that does not score.

        Only the scores of the `view.new` entries of this chunk are used. They are computed once
        for all budgets of a sweep.
        """
        return None

    def capacity(self, view: LayerView, budget: float) -> int:
        """How many of the `view.new` entries of each KV head stay, observation window included."""
        return round(budget * view.new)

    def select(self, view: LayerView, scores: "Tensor", capacity: int) -> "Tensor | None":
        """Which of N candidates stay, indices [K, capacity]; None for those of highest scores.

        `scores` [K, N] are those of the candidates, the first N of the view's new entries. Of equal
        ones the first stay, or those that `torch.topk` takes if `ties_by_topk`.
        """
        return scores.topk(capacity).indices if self.ties_by_topk else None

    def gather(self, view: LayerView) -> "Tensor | None":
        """What is kept of the tokens that have just attended, for later views; None for nothing.

        It is asked after each prefill chunk, and before `scores`. `view.gathered` is what it
        returned before, None at first. With `gathers_per_entry`, it returns a number for each
        entry, [K, E], which is evicted with the entry, and new entries have 0; otherwise a tensor
        of any shape.
        """
        return None

    def pages(self, shape: KVShape, layer: int, budget: float) -> Pages | None:
        """What a decoded token reads of a layer; None for everything (dynamic sparsity)."""
        return None

    def missing(self) -> str | None:
        """What a user must give before the method can run, and how; None if nothing is missing."""
        return None

    def remarks(self) -> dict[str, Any]:
        """What a record says in addition to the options; JSON-serialisable."""
        return {}

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option names and their defaults; dataclasses.MISSING if an option has no default."""
        return {option_name(f): f.default for f in fields(cls) if f.init}

    @classmethod
    def check(cls, condition: bool, message: str) -> None:
        """Raise InputError(`message`) unless `condition` holds; for use in `__post_init__`."""
        if not condition:
            raise InputError(f"{getattr(cls, 'name', cls.__name__)}: {message}")


@dataclass(frozen=True)
class DecodingMethod(Method):
    """A method that evicts when the prompt has been read, and then while decoding.

    After each eviction, a KV head holds c entries: `capacity` if it is given, otherwise the
    budget's share of the prompt and of the tokens that will be decoded at most.
    """

    family = Family.DECODING
    interval: int = field(
        default=32, metadata={"help": "Decoded tokens between evictions; 0: only after the prompt."}
    )
    held: int | None = field(
        default=None,
        metadata={"option": "capacity", "help": "Entries that a KV head holds, at any budget."},
    )

    def __post_init__(self) -> None:
        self.check(self.interval >= 0, f"interval must be at least 0, not {self.interval}")
        self.check(
            self.held is None or self.held >= 1, f"capacity must be at least 1, not {self.held}"
        )

    def entries_held(self, tokens: int, budget: float) -> int:
        """c, for a row that reads `tokens` tokens at most, those of its answer included."""
        return round(budget * tokens) if self.held is None else self.held

    def capacity(self, view: LayerView, budget: float) -> int:
        """c of the prompt, for a row that evicts nothing while decoding (`interval` is 0)."""
        return self.entries_held(view.new, budget)


def option_name(given: "Field[Any]") -> str:
    """The name that users type for a field: its metadata's `option`, or the field's own name."""
    return str(given.metadata.get("option", given.name))


def draw_seed(seed: int, layer: int, start: int) -> int:
    """The seed of a view's generator: of a row with seed `seed`, in a layer, at position `start`.

    `start` is where the prefill chunk starts; 0 if entries are scored once, after the whole prompt.
    """
    return ((seed * 1_000_003 + layer) * 1_000_003 + start) % 2**62
