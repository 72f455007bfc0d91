"""A row: one sample under one method and budget, and what is measured of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.engine.accounting import (
    Accounting,
    EntryBytes,
    Held,
    entry_rows,
    full_attention_peak,
    full_attention_rows,
)
from kvbench.engine.cache import HeadGroup, Ledger, RowCache, Visible
from kvbench.engine.pages import PageBounds
from kvbench.engine.policy import EvictionPolicy
from kvbench.errors import InputError
from kvbench.method import EVERY_QUERY, Method
from kvbench.models.load import NOT_FINITE, LoadedModel
from kvbench.spec import MethodSpec


@dataclass(frozen=True)
class Row:
    """One sample under one method and budget."""

    prompt: Sequence[int]  # token ids
    max_new_tokens: int
    spec: MethodSpec
    budget: float  # above 0, at most 1
    seed: int = 0  # for methods that draw
    context: int | None = None  # tokens that are evicted from before the rest is read; None: all


@dataclass(frozen=True)
class Outcome:
    """What a row generated, and what it held in the KV cache (docs/concepts.md)."""

    tokens: list[int]  # generated, without the end token
    kv_footprint: float  # of full attention's, 0..1
    kv_peak: float  # most entries at a row in all layers, of those that full attention ends with
    kv_held_peak: float  # the same at one instant as executed: it depends on the prefill chunk
    kv_reads: float  # entries that attention read, of full attention's
    resident_rows: int  # entry-rows, summed over layers and KV heads
    full_rows: int  # the same under full attention
    patch_rows: int  # patched tokens that went through the model
    kv_bytes_peak: int  # as if the row ran alone, including temporary copies
    device_bytes_peak: int | None  # of the CUDA allocator, in the whole call; None on a CPU
    prefill_seconds: float  # the row's share of the time of each forward it took part in
    decode_seconds: float  # the row's share of the steps it took part in
    prompt_tokens: int
    new_tokens: int  # generated, the end token included
    timeline: list[list[int]]  # as in kvbench.records.Record
    shared_rows: int  # rows of its prefill group, itself included
    group_bytes_peak: int  # keys and values of all rows of the call
    replay_rows: int = 0  # tokens of a replay that went through the model
    kept: list[list[list[int]]] | None = None  # as `RowState.kept`, if it was asked for
    failure: str | None = None  # why the row could not be measured
    kv_bytes_read: float | None = None  # for a decoded token, on average; None if there was none


@dataclass
class RowState:
    """A row while it runs: its cache, and what it has held so far."""

    row: Row
    policy: EvictionPolicy
    cache: RowCache
    accounting: Accounting = field(default_factory=Accounting)
    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    kept: list[list[list[int]]] | None = None  # [layers][KV heads], positions after the prompt
    gathered: dict[int, Tensor] = field(default_factory=dict)  # by layer, of the method
    queries: dict[int, Tensor] = field(default_factory=dict)  # by layer, the last [H, W, D]
    before: list[list[Held]] = field(default_factory=list)  # what was held when last counted
    counted: int = 0  # tokens of the answer that have been counted
    flat: bool = False  # whether evictions while decoding are counted as a full window's

    @property
    def fed(self) -> int:
        """Tokens of the answer that have been read."""
        return len(self.tokens) - 1

    @property
    def evicts_now(self) -> bool:
        """Whether the row's interval of decoded tokens has ended."""
        interval = self.policy.interval
        return bool(interval) and self.fed % interval == 0

    def start_decoding(self) -> None:
        """Note what is held before tokens are decoded, and count the queries that are kept."""
        self.before = held(self)
        for layer, pages in enumerate(self.policy.pages):
            for group in self.cache.layers[layer]:
                if pages is None:
                    break
                keys = group.entries().keys
                group.bounds = PageBounds(pages, keys, group.length, group.capacity)
                self.accounting.kept_beside(group.bounds.nbytes)
        groups = [group for layer in self.policy.acting for group in self.cache.layers[layer]]
        if self.policy.interval:
            self.flat = self.policy.interval == 1 and all(
                group.length <= self.policy.held for group in groups
            )
            entry = EntryBytes.of(groups[0].entries())
            heads = self.policy.shape.query_heads * len(self.policy.acting)
            self.accounting.kept_beside(heads * self.policy.queries_needed * entry.key)

    def count_decoded(self) -> None:
        """Count the tokens that have been decoded since the last time."""
        fed = self.fed - self.counted
        self.accounting.decoded(self.before, fed)
        self.counted = self.fed
        for group in (group for groups in self.cache.layers for group in groups):
            if group.bounds is not None:
                size, start = EntryBytes.of(group.entries()), len(self.row.prompt)
                whole = len(group.heads) * (entry_rows(start, fed) - fed)
                pages = sum(-(-(start + n) // group.bounds.pages.size) for n in range(fed))
                self.accounting.read_in_pages(
                    whole, int(group.bounds.reads.sum()), len(group.heads) * pages, size
                )

    @contextmanager
    def evicting(self) -> Iterator[None]:
        """Count the tokens before an eviction, and what is held after it.

        With an interval of 1, all that is held is counted at once when the row ends: from its c-th
        entry on, a KV head holds c entries after each token.
        """
        if self.flat:
            yield
            return
        self.count_decoded()
        yield
        self.accounting.evicted_while_decoding()
        self.before = held(self)

    def gathered_by_method(self, layer: int) -> dict[tuple[Method, int], Tensor]:
        """What the row's method has gathered of a layer, by the method and the row's seed."""
        scorer = self.policy.spec.scorer
        if scorer is None or layer not in self.gathered:
            return {}
        return {(scorer, self.policy.seed): self.gathered[layer]}

    def keep_beside(self, layer: int, gathered: Tensor) -> None:
        """Keep what the method has gathered of a layer, and count its bytes."""
        before = self.gathered[layer].nbytes if layer in self.gathered else 0
        self.gathered[layer] = gathered
        self.accounting.kept_beside(gathered.nbytes - before)

    def remember(self, layer: int, queries: Tensor) -> None:
        """Keep the prompt's last queries [H, T, D] for the first eviction while decoding."""
        window = self.policy.spec.observation_window
        if self.policy.queries_needed and 0 < window < EVERY_QUERY:
            before = self.queries.get(layer)
            joined = queries if before is None else torch.cat([before, queries], dim=1)
            self.queries[layer] = joined[:, -window:].clone()

    def ended(self, model: LoadedModel) -> bool:
        """Whether the row has generated its answer, or cannot go on."""
        if self.tokens[-1] == NOT_FINITE:
            return True
        return self.tokens[-1] in model.end_tokens or len(self.tokens) >= self.row.max_new_tokens

    def reserve_answer(self) -> None:
        """Allocate storage for the answer where there is none; windows have all they need."""
        for group in (group for groups in self.cache.layers for group in groups):
            before, after = group.capacity, group.length + self.policy.answer_entries(group.length)
            if group.window is not None or before >= after:
                continue
            group.reserve(after)
            self.count_growth(group, before)

    def count_growth(self, group: HeadGroup, before: int) -> None:
        """Count that a group got more storage than for `before` entries of each KV head.

        Heads that are scored by themselves have separate storage when the row runs alone.
        """
        moves = len(group.heads) if self.policy.separate else 1
        size = EntryBytes.of(group.entries())
        for _ in range(moves):
            self.accounting.moved(len(group.heads) // moves, before, group.capacity, size)


def policy_of(model: LoadedModel, row: Row, prefill_chunk: int | None) -> EvictionPolicy:
    """The method of a row under its budget."""
    return EvictionPolicy(
        row.spec,
        row.budget,
        model.shape,
        len(row.prompt),
        row.max_new_tokens - 1,
        row.seed,
        prefill_chunk,
        model.layers,
        row.context,
    )


def held(state: RowState) -> list[list[Held]]:
    """What a row's layers hold before it decodes."""
    most = state.policy.held if state.policy.interval == 1 else None  # in effect if it is flat
    acting = state.policy.acting
    return [
        [held_by(group, most if layer in acting else None) for group in groups]
        for layer, groups in enumerate(state.cache.layers)
    ]


def held_by(group: HeadGroup, at_most: int | None) -> Held:
    """What a group of KV heads holds before it decodes, and then `at_most` after each token."""
    window, limit = group.window, group.limit
    heads, entries = len(group.heads), group.length
    size = sum(EntryBytes.of(group.entries()))
    if window is not None:
        most = window.sinks + window.size
        return Held(heads, entries, most, limit, isinstance(window, Visible), None, size)
    if limit is None:
        bound = None if at_most is None or entries > at_most else at_most
        return Held(heads, entries, bound, None, False, None, size)
    positions = group.entries().positions[:, :entries].clone()
    return Held(heads, entries, max(entries, limit.size - 1), limit, False, positions, size)


def check(model: LoadedModel, row: Row) -> None:
    """InputError for a row that cannot be run."""
    if not row.prompt or row.max_new_tokens < 1:
        raise InputError("a row needs a prompt and at least one token to generate")
    if not 0 < row.budget <= 1:
        raise InputError(f"a budget must be above 0 and at most 1, not {row.budget}")
    model.check_ids(row.prompt)
    if row.context is not None and not 0 < row.context < len(row.prompt):
        raise InputError(
            f"the context must be from 1 to {len(row.prompt) - 1} tokens of the prompt, not "
            f"{row.context}"
        )
    total = len(row.prompt) + row.max_new_tokens
    if total > model.max_context:
        raise InputError(
            f"{total} tokens are more than model '{model.name}' takes ({model.max_context})"
        )


def not_finite(model: LoadedModel, where: str) -> str:
    """What to say where logits are not finite."""
    return (
        f"logits are not finite {where}: the weights hold NaN or infinity, or values overflow "
        f"{str(model.dtype).removeprefix('torch.')} (try another --dtype)"
    )


def outcome(
    model: LoadedModel,
    state: RowState,
    device_bytes_peak: int | None,
    ledger: Ledger,
    shared_rows: int,
    alike: int,
) -> Outcome:
    """The measurements of a row that has ended, and that `alike` equal rows share."""
    counted = state.accounting
    prompt, fed = len(state.row.prompt), len(state.tokens) - 1
    full = full_attention_rows(model.layers, prompt, fed)
    tokens, failure = state.tokens, None
    if tokens[-1] == NOT_FINITE:
        failure = not_finite(model, f"at token {len(tokens)} of the answer")
    return Outcome(
        tokens=tokens[:-1] if failure or tokens[-1] in model.end_tokens else tokens,
        kv_footprint=counted.resident_rows / full,
        kv_peak=counted.entries_peak / full_attention_peak(model.layers, prompt + fed),
        kv_held_peak=counted.held_peak / full_attention_peak(model.layers, prompt + fed),
        kv_reads=counted.read_rows / full,
        kv_bytes_read=counted.bytes_read / fed if fed else None,
        resident_rows=counted.resident_rows,
        full_rows=full,
        patch_rows=counted.patch_rows,
        replay_rows=counted.replay_rows,
        kv_bytes_peak=counted.bytes_peak,
        device_bytes_peak=device_bytes_peak,
        prefill_seconds=state.prefill_seconds / alike,
        decode_seconds=state.decode_seconds / alike,
        prompt_tokens=prompt,
        new_tokens=len(tokens),
        timeline=[list(point) for point in counted.timeline],
        shared_rows=shared_rows,
        group_bytes_peak=ledger.peak,
        kept=state.kept,
        failure=failure,
    )
