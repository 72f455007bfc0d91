"""A row: one sample under one method and budget, and what is measured of it."""

from dataclasses import dataclass, field

from kvbench.engine.accounting import (
    Accounting,
    EntryBytes,
    Held,
    full_attention_peak,
    full_attention_rows,
)
from kvbench.engine.cache import HeadGroup, Ledger, RowCache, Visible
from kvbench.engine.eviction import EvictionPolicy
from kvbench.errors import InputError
from kvbench.models.load import NOT_FINITE, LoadedModel
from kvbench.spec import MethodSpec


@dataclass(frozen=True)
class Row:
    """One sample under one method and budget."""

    prompt: list[int]  # token ids
    max_new_tokens: int
    spec: MethodSpec
    budget: float  # above 0, at most 1
    seed: int = 0  # for methods that draw


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
    kept: list[list[list[int]]] | None = None  # as `RowState.kept`, if it was asked for
    failure: str | None = None  # why the row could not be measured


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

    def ended(self, model: LoadedModel) -> bool:
        """Whether the row has generated its answer, or cannot go on."""
        if self.tokens[-1] == NOT_FINITE:
            return True
        return self.tokens[-1] in model.end_tokens or len(self.tokens) >= self.row.max_new_tokens

    def reserve_answer(self) -> None:
        """Allocate storage for the answer where there is none; windows have all they need."""
        for group in (group for groups in self.cache.layers for group in groups):
            before, after = group.capacity, group.length + self.policy.decoded
            if group.window is not None or before >= after:
                continue
            group.reserve(after)
            # Heads that were scored once have separate storage when the row runs alone.
            moves = len(group.heads) if self.policy.scores_once else 1
            size = EntryBytes.of(group.entries())
            for _ in range(moves):
                self.accounting.moved(len(group.heads) // moves, before, after, size)


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
    )


def held(cache: RowCache) -> list[list[Held]]:
    """What a row's layers hold before it decodes."""
    return [[held_by(group) for group in groups] for groups in cache.layers]


def held_by(group: HeadGroup) -> Held:
    """What a group of KV heads holds before it decodes."""
    window, limit = group.window, group.limit
    heads, entries = len(group.heads), group.length
    if window is not None:
        most = window.sinks + window.size
        return Held(heads, entries, most, limit, isinstance(window, Visible), None)
    if limit is None:
        return Held(heads, entries, None, None, False, None)
    positions = group.entries().positions[:, :entries].clone()
    return Held(heads, entries, max(entries, limit.size - 1), limit, False, positions)


def check(model: LoadedModel, row: Row) -> None:
    """InputError for a row that cannot be run."""
    if not row.prompt or row.max_new_tokens < 1:
        raise InputError("a row needs a prompt and at least one token to generate")
    if not 0 < row.budget <= 1:
        raise InputError(f"a budget must be above 0 and at most 1, not {row.budget}")
    model.check_ids(row.prompt)
    total = len(row.prompt) + row.max_new_tokens
    if total > model.max_context:
        raise InputError(
            f"{total} tokens are more than model '{model.name}' takes ({model.max_context})"
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
        failure = (
            f"logits are not finite at token {len(tokens)} of the answer: the weights hold NaN or "
            f"infinity, or values overflow {str(model.dtype).removeprefix('torch.')} (try another "
            "--dtype)"
        )
    return Outcome(
        tokens=tokens[:-1] if failure or tokens[-1] in model.end_tokens else tokens,
        kv_footprint=counted.resident_rows / full,
        kv_peak=counted.entries_peak / full_attention_peak(model.layers, prompt + fed),
        kv_held_peak=counted.held_peak / full_attention_peak(model.layers, prompt + fed),
        kv_reads=counted.read_rows / full,
        resident_rows=counted.resident_rows,
        full_rows=full,
        patch_rows=counted.patch_rows,
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
