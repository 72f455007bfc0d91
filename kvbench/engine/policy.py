"""When and how much a row evicts: a method under a budget, on one model and one prompt.

`kvbench.engine.eviction` asks the policy for the capacity when it chooses which entries stay;
`kvbench.engine.prefill` and `kvbench.engine.run` ask it when to evict.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kvbench.engine.accounting import chunks
from kvbench.engine.cache import HeadGroup, Visible
from kvbench.engine.contract import (
    Asked,
    asking,
    check_capacity,
    check_observation_window,
    check_pages,
    check_windows,
)
from kvbench.errors import InputError
from kvbench.method import (
    EVERY_QUERY,
    Competition,
    DecodingMethod,
    KVShape,
    LayerView,
    Limit,
    Method,
    Need,
    Pages,
    Window,
)
from kvbench.models.attention import LayerShape
from kvbench.spec import Chunking, MethodSpec


@dataclass(frozen=True)
class Chunk:
    """A prefill chunk: `length` tokens of the prompt from position `start`, then `patched` more.

    The patched tokens are the last ones of what is evicted from. They lend the chunk their queries
    and leave no entries (docs/methods.md).
    """

    start: int
    length: int
    patched: int
    last: bool  # of those that the method evicts from
    final: bool  # of the prompt
    question: bool = False  # whether it is read after the eviction, and keeps all its entries
    decoded: bool = False  # whether these are tokens of the answer, whose entries are stored

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.length + self.patched


@dataclass(frozen=True)
class EvictionPolicy:
    """When and how much one row evicts: a method under a budget. A budget of 1 evicts nothing."""

    spec: MethodSpec
    budget: float
    shape: KVShape
    prompt: int  # n, tokens
    decoded: int  # tokens that are fed in decoding, at most
    seed: int
    prefill_chunk: int | None  # tokens; None reads the prompt at once
    layers: tuple[LayerShape, ...]
    context: int | None = None  # tokens that methods evict from; the question after them stays

    def __post_init__(self) -> None:
        """Raise ContractError for an observation window that is not a number of queries.

        InputError for a method that cannot run on this model.
        """
        check_observation_window(self.spec.observation_window, self.asked("observation_window"))
        if self.budget == 1:
            return
        scorer, beyond = self.spec.scorer, any(self.pages)
        if scorer is not None:
            if scorer.observation_window >= EVERY_QUERY and not self.gathers:
                raise self.asked("observation_window").error(
                    "is EVERY_QUERY, but the method has no gather(); only methods that gather see "
                    "all queries"
                )
            bounded = self.spec.chunking is Chunking.BOUNDED
            beyond = bool(self.spec.uneven or bounded or self.interval or self.gathers)
            beyond = beyond or self.evicts_late
            unknown = any(self.layers[index].rotation is None for index in self.acting)
            if Need.ROTATION in scorer.needs and unknown:
                raise InputError(
                    f"method '{self.spec.name}' needs queries before RoPE, and kvbench does not "
                    "know the model's rotation"
                )
        paged = [layer for layer, read in zip(self.layers, self.pages, strict=True) if read]
        if any(len(layer.readers) > 1 for layer in paged):
            raise InputError(
                f"method '{self.spec.name}' cannot be measured on a model whose layers share keys: "
                "pages are chosen for one layer; choose a method that evicts"
            )
        limited = any(self.layers[index].limit is not None for index in self.acting)
        if limited and (beyond or self.context is not None):
            asked = "" if beyond else " with --compress context"
            raise InputError(
                f"method '{self.spec.name}' cannot be measured{asked} on a model whose layers all "
                "have a limited attention (sliding windows or chunks)"
            )

    @property
    def evicted_from(self) -> int:
        """Tokens of the prompt that a method evicts from: all, or those before the question."""
        return self.prompt if self.context is None else self.context

    @property
    def interval(self) -> int:
        """Decoded tokens between evictions; 0 if nothing is evicted while decoding."""
        return self.spec.interval if self.budget < 1 else 0

    @cached_property
    def windows(self) -> Sequence[Sequence[Window | None]]:
        """The window of each layer's KV heads, None for heads that hold all they read.

        A layer that reads the keys of another one has none. Layers that the model limits hold what
        later tokens can see, and if methods act on them nothing else.
        """
        chosen = None
        if self.budget < 1:
            chosen = self.spec.method.windows(self.shape, self.budget, self.prompt)
        if chosen is not None:
            chosen = check_windows(chosen, self.shape, self.asked("windows"))
        return [self._layer_windows(layer, chosen) for layer in range(len(self.layers))]

    def _layer_windows(
        self, index: int, chosen: Sequence[Sequence[Window | None]] | None
    ) -> Sequence[Window | None]:
        layer = self.layers[index]
        if layer.source != index:
            return []
        acting = index in self.acting
        if layer.limit is None or (acting and layer.limit.size >= self.prompt + self.decoded):
            return chosen[index] if chosen and acting else [None] * layer.kv_heads
        visible = Visible.under(layer.limit)
        if not chosen or not acting:
            late = acting and self.scores_each_chunk
            return [None if late else visible] * layer.kv_heads
        # Sinks are out of sight before the end.
        own = None if self.scores_each_chunk else visible
        return [
            own if window is None else Window(0, min(window.sinks + window.size, visible.size))
            for window in chosen[index]
        ]

    @cached_property
    def limits(self) -> Sequence[Limit | None]:
        """The model's own limit of each layer."""
        return [layer.limit for layer in self.layers]

    @property
    def acting(self) -> Sequence[int]:
        """The layers that methods act on."""
        return range(len(self.layers)) if self.shape.acting is None else self.shape.acting

    def scores(self, layer: int, group: HeadGroup) -> bool:
        """Whether a method may score the entries of these KV heads of a layer."""
        return layer in self.acting and _may_be_scored(group.window)

    @cached_property
    def first_scored(self) -> int:
        """The first layer with KV heads that are scored."""
        acting = (i for i in self.acting if any(map(_may_be_scored, self.windows[i])))
        return next(acting, 0)

    def asked(self, what: str, layer: int | None = None) -> Asked:
        """What the method is asked for, for errors."""
        return Asked(self.spec.name, what, layer)

    @cached_property
    def chunks(self) -> Sequence[Chunk]:
        """The prefill chunks of the prompt."""
        patched = self.evicts_by_score and self.spec.chunking is Chunking.PATCHED
        stop = self.evicted_from
        patch = min(self.spec.observation_window, stop) if patched else 0
        result, start = [], 0
        for length in chunks(stop, self.prefill_chunk):
            last = start + length == stop
            final = start + length == self.prompt
            result.append(Chunk(start, length, 0 if last else patch, last, final))
            start += length
        for length in chunks(self.prompt - stop, self.prefill_chunk) if stop < self.prompt else ():
            result.append(Chunk(start, length, 0, False, start + length == self.prompt, True))
            start += length
        return result

    @property
    def evicts_by_score(self) -> bool:
        """Whether entries are scored, and some of them evicted."""
        return self.budget < 1 and self.spec.scorer is not None

    @property
    def scores_each_chunk(self) -> bool:
        """Whether each chunk keeps its own share (chunked eviction, naive or patched)."""
        return self.evicts_by_score and self.spec.chunking in (Chunking.NAIVE, Chunking.PATCHED)

    @property
    def bounded(self) -> bool:
        """Whether all entries compete after every chunk, so that the cache is bounded."""
        return self.evicts_by_score and self.spec.chunking is Chunking.BOUNDED

    @property
    def scores_once(self) -> bool:
        """Whether entries are scored once the whole prompt is read (post-fill)."""
        return self.evicts_by_score and self.spec.chunking is Chunking.NONE

    @property
    def keeps_whole_prompt(self) -> bool:
        """Whether nothing is evicted before all that is evicted from has been read."""
        streaming = any(
            window is not None and not isinstance(window, Visible)
            for layer in self.windows
            for window in layer
        )
        return not self.scores_each_chunk and not self.bounded and not streaming

    @property
    def keeps_all(self) -> bool:
        """Whether this is full attention, whatever the method is called."""
        return not self.evicts_by_score and self.keeps_whole_prompt and not any(self.pages)

    @cached_property
    def pages(self) -> Sequence[Pages | None]:
        """The pages that a decoded token reads of each layer; None where it reads everything."""
        read: list[Pages | None] = [None] * len(self.layers)
        for layer in self.acting if self.budget < 1 else ():
            asked = self.asked("pages", layer)
            with asking(asked):
                given = self.spec.method.pages(self.shape, layer, self.budget)
            read[layer] = check_pages(given, asked)
        return read

    @property
    def evicts_late(self) -> bool:
        """Whether entries are chosen once all layers have attended to the last chunk.

        So it is if entries of different layers compete, or if a replay scores them.
        """
        scorer = self.spec.scorer
        if not self.scores_once or scorer is None:
            return False
        return self.spec.competition is Competition.MODEL or Need.REPLAY in scorer.needs

    def evicts(self, window: Window | None, chunk: Chunk) -> bool:
        """Whether KV heads with this window (None: they do not stream) evict after a chunk."""
        return window is not None or self.scores_after(chunk)

    @property
    def gathers(self) -> bool:
        """Whether the method keeps something of the tokens that attended."""
        scorer = self.spec.scorer
        own = scorer is not None and type(scorer).gather is not Method.gather
        return self.evicts_by_score and own

    @property
    def queries_needed(self) -> int:
        """The latest queries that are kept of each query head, if it evicts while decoding."""
        if not 0 < self.interval < self.decoded:
            return 0
        window = self.spec.observation_window
        wanted = self.interval if window >= EVERY_QUERY else window
        return min(wanted, self.prompt + self.decoded)

    def gathers_after(self, chunk: Chunk) -> bool:
        """Whether the method keeps something of the tokens of a chunk."""
        return self.gathers and (bool(self.interval) or not chunk.question)

    def scores_after(self, chunk: Chunk) -> bool:
        """Whether entries are scored, and some of them evicted, after a chunk has attended."""
        if chunk.question or self.evicts_late:
            return False
        return self.scores_each_chunk or self.bounded or (self.evicts_by_score and chunk.last)

    def capacity(self, view: LayerView) -> int:
        """How many of the view's new entries each KV head keeps; all if it is more than these.

        It is a share of the tokens read, also where the model hides some of their entries, or of
        all that will be read where the number of entries is bounded.
        """
        assert self.spec.scorer is not None
        asked = self.asked("capacity", view.layer)
        read = view if view.limit is None else replace(view, new=max(view.new, view.tokens))
        if self.interval:
            return self.held
        if self.bounded or isinstance(self.spec.scorer, DecodingMethod):
            read = replace(view, new=self.evicted_from)
        with asking(asked):
            capacity = self.spec.scorer.capacity(read, self.spec.scorer_budget(self.budget))
        capacity = check_capacity(capacity, asked)
        return capacity if view.limit is None else min(view.new, capacity)

    def reserved(self, layer: int, window: Window | None) -> int:
        """Entries of storage for each KV head of a layer with this window, while it is read.

        Heads that are scored once the prompt is read need none for its last chunk. A full window
        that several layers read needs a place for the token that the first of them brings.
        """
        whole = self.prompt + self.decoded
        if window is not None:
            shared = len(self.layers[layer].readers) > 1
            return min(whole, window.sinks + window.size + shared)
        if not self.evicts_by_score or self.evicts_late or layer not in self.acting:
            return whole
        return next(chunk.start for chunk in self.chunks if chunk.last)

    def reserved_for_question(self, before: int, chunk: Chunk) -> int:
        """Entries of storage for each KV head that holds `before` entries as the question is read.

        The rest of the question and the answer are included, so that nothing moves later.
        """
        kept = before + self.prompt - chunk.start
        return kept + self.answer_entries(kept)

    def reserved_from(self, chunk: Chunk, view: LayerView) -> int:
        """Entries of storage for each KV head that evicts after this and every later chunk."""
        kept = 0
        for later in (c for c in self.chunks if c.start >= chunk.start and not c.question):
            then = replace(
                view,
                new=later.length,
                tokens=later.length,
                patched=later.patched,
                last=later.last,
            )
            kept += min(later.length, self.capacity(then))
        return self.reserved_for_answer(kept, 0, chunk.length)

    def reserved_for_answer(self, kept: int, before: int, new: int) -> int:
        """Entries of storage for each KV head that keeps `kept` of `before` and `new` ones.

        Storage for the answer is included, so that nothing moves later, unless that would raise the
        peak by more than 1%: all layers hold it while one still holds what it is about to evict.
        """
        layers, answer = len(self.acting), self.answer_entries(kept)
        if not self.evicts_late:
            answer += self.prompt - self.evicted_from
        raised = min(answer * layers, new) if kept + answer > before else 0
        return kept + (answer if 100 * raised <= kept * layers else 0)

    def answer_entries(self, kept: int) -> int:
        """Entries of storage that the answer needs after `kept` entries of each KV head."""
        if not self.interval:
            return self.decoded
        return min(self.decoded, max(0, self.held - kept) + self.interval)

    @cached_property
    def held(self) -> int:
        """c, the entries that a KV head holds at most after an eviction while decoding."""
        scorer, asked = self.spec.scorer, self.asked("entries_held")
        assert isinstance(scorer, DecodingMethod)
        with asking(asked):
            held = scorer.entries_held(self.prompt + self.decoded, self.budget)
        return check_capacity(held, asked)

    @property
    def separate(self) -> bool:
        """Whether each scored KV head has storage of its own, so that it moves by itself."""
        return self.scores_once or self.bounded


def _may_be_scored(window: Window | None) -> bool:
    return window is None or isinstance(window, Visible)
