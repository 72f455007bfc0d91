"""A row: one sample under one method and budget, on its way from prompt to answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.engine.cache import HeadGroup, Ledger, RowCache
from kvbench.engine.eviction import Chooser, Evictor, Layer
from kvbench.engine.footprint import Meter, full_rows
from kvbench.errors import InputError
from kvbench.method import Entries, KVShape
from kvbench.models.load import LoadedModel
from kvbench.spec import MethodSpec


@dataclass(frozen=True)
class Row:
    """One sample under one method and budget."""

    prompt: list[int]
    max_new_tokens: int
    spec: MethodSpec
    budget: float
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a row gave and what it held (ALGORITHMS, section 1)."""

    tokens: list[int]  # generated, without the end token
    kv_footprint: float
    kv_peak: float
    kv_reads: float
    resident_rows: int  # entry-rows, summed over layers and KV heads
    full_rows: int  # the same under full attention
    patch_rows: int
    kv_bytes_peak: int  # of the row as it is alone; storage shared with other rows counts in full
    device_bytes_peak: int | None  # the CUDA allocator's, of the whole call; None on a CPU
    prefill_seconds: float  # the row's share of the time of each forward it took part in
    decode_seconds: float  # the row's share of the steps it took part in
    prompt_tokens: int
    new_tokens: int  # generated, the end token included
    timeline: list[list[int]]  # as in results.Record
    shared_rows: int  # rows of its prefill group, itself included
    group_bytes_peak: int  # keys and values of all rows of the call together


@dataclass
class RowState:
    """A row on its way: its cache, and what it held so far, counted as if it ran alone."""

    row: Row
    evictor: Evictor
    cache: RowCache
    meter: Meter = field(default_factory=Meter)
    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def arrive(self, groups: Sequence[HeadGroup], layer: Layer) -> None:
        """Count a chunk that a layer has attended to."""
        chunk = layer.chunk
        new = chunk.length + chunk.patched
        for group in groups:
            heads = len(group.heads)
            self.meter.attended(heads, group.length, chunk.length)
            self.meter.hold(heads * new)
            if self.evictor.chooses(group.window, chunk):
                self.meter.allocate(heads * new * layer.entry_bytes)
            elif not chunk.start:
                room = self.evictor.room(group.window, layer.last_chunk)
                self.meter.allocate(heads * room * layer.entry_bytes)

    def settle(self, sources: Sequence[HeadGroup], layer: Layer, chooser: Chooser) -> None:
        """Take in a chunk, or what stays of it.

        `sources` hold the entries of earlier chunks; they are the row's own, or those of a stream
        that it leaves with this chunk.
        """
        chunk, evictor, meter = layer.chunk, self.evictor, self.meter
        choice, kept_room = None, 0
        if chooser.groups and evictor.chooses(None, chunk):
            choice = chooser.choice(evictor)
            kept_room = chooser.room(evictor) if evictor.chunked else 0
        if sources[0] in self.cache.layers[layer.index]:
            chooser.forget()  # or a layer's old entries would be there until all new ones are
        scored = 0  # KV heads of the chooser's that are dealt with
        for group in sources:
            heads, past = len(group.heads), group.length
            own = layer.own_of(group)
            room = evictor.room(group.window, layer.last_chunk)
            if not evictor.chooses(group.window, chunk):
                group.add(own, room)
                continue
            if group.window is not None:
                group.slide(own, chunk.start, room)
            else:
                mine = None if choice is None else choice[scored : scored + heads]
                scored += heads
                if not evictor.chunked:
                    self._choose_from_all(group, own, mine, layer)
                    continue
                group.take(own, mine, kept_room)
            if not chunk.start:
                meter.allocate(heads * group.capacity * layer.entry_bytes)
            new = chunk.length + chunk.patched
            meter.hold(heads * (group.length - past - new))
            meter.allocate(-heads * new * layer.entry_bytes)

    def _choose_from_all(
        self, group: HeadGroup, own: Entries, choice: Tensor | None, layer: Layer
    ) -> None:
        """Hold only the entries `choice` of a group's, and of the prompt's last chunk."""
        before, new = group.length, layer.chunk.length
        if choice is None:
            everything = torch.arange(before + new, device=own.keys.device)
            choice = everything.expand(len(group.heads), -1)
        room = self.evictor.room_for_answer(choice.shape[1], before, new)
        self.cache.group_like(layer.index, group).replace(group, own, choice, room)
        for _ in group.heads:  # alone, a row's heads have storage each, and move one by one
            self._moved(own, 1, before, room)
            self.meter.hold(choice.shape[1] - before - new)
            self.meter.allocate(-new * layer.entry_bytes)

    def make_room(self) -> None:
        """Make room for the answer where there is none; windows have all they need."""
        for group in (group for groups in self.cache.layers for group in groups):
            before, room = group.capacity, group.length + self.evictor.decoded
            if group.window is not None or before >= room:
                continue
            group.reserve(room)
            moves = len(group.heads) if self.evictor.one_by_one else 1
            for _ in range(moves):
                self._moved(group.entries(), len(group.heads) // moves, before, room)

    def _moved(self, entries: Entries, heads: int, before: int, after: int) -> None:
        """Count the storage of `heads` KV heads that had room for `before` entries each."""
        for tensor in (entries.keys, entries.values):
            entry = heads * tensor.shape[-1] * tensor.itemsize
            self.meter.allocate(after * entry)
            self.meter.allocate(-before * entry)


def evictor_of(model: LoadedModel, row: Row) -> Evictor:
    """The method and budget of a row, ready to decide."""
    decoded = row.max_new_tokens - 1
    return Evictor(row.spec, row.budget, model.shape, len(row.prompt), decoded, row.seed)


def check(model: LoadedModel, row: Row) -> None:
    """InputError for a row that cannot be run."""
    if not row.prompt or row.max_new_tokens < 1:
        raise InputError("a row needs a prompt and at least one token to generate")
    if not 0 < row.budget <= 1:
        raise InputError(f"a budget must be above 0 and at most 1, not {row.budget}")
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
    """The measurements of a row that has ended, one of `alike` rows that it stands for."""
    meter, shape = state.meter, state.evictor.shape
    prompt, fed = len(state.row.prompt), len(state.tokens) - 1
    heads = heads_of(shape)
    full = heads * full_rows(prompt, fed)
    tokens = state.tokens
    return Outcome(
        tokens=tokens[:-1] if tokens[-1] in model.end_tokens else tokens,
        kv_footprint=meter.resident_rows / full,
        kv_peak=meter.entries_peak / (heads * (prompt + fed)),
        kv_reads=meter.read_rows / full,
        resident_rows=meter.resident_rows,
        full_rows=full,
        patch_rows=meter.patch_rows,
        kv_bytes_peak=meter.bytes_peak,
        device_bytes_peak=device_bytes_peak,
        prefill_seconds=state.prefill_seconds / alike,
        decode_seconds=state.decode_seconds / alike,
        prompt_tokens=prompt,
        new_tokens=len(tokens),
        timeline=[list(corner) for corner in meter.timeline],
        shared_rows=shared_rows,
        group_bytes_peak=ledger.peak,
    )


def heads_of(shape: KVShape) -> int:
    """KV heads of all layers together."""
    return shape.layers * shape.kv_heads
