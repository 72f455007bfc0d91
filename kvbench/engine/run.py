"""Runs rows: prompts are read in chunks, shared as far as rows hold the same; all decode together.

Rows with the same prompt are a *prefill group*. Within it, a *stream* is one cache being filled,
for all the rows that hold the same entries so far: full attention and everything that evicts only
after the prompt share one; whatever evicts earlier has its own. In the first chunk nothing has been
evicted, so it is read once for all streams. Later chunks of all streams go through the model as one
packed sequence: only attention knows whose tokens are whose.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from kvbench.engine.attention import backend_of
from kvbench.engine.cache import Ledger
from kvbench.engine.decoding import DecodeKV
from kvbench.engine.graph import Repeated
from kvbench.engine.prefill import prefill
from kvbench.engine.row import Outcome, Row, RowState, check, evictor_of, outcome
from kvbench.models.load import LoadedModel, forward


def run_rows(
    model: LoadedModel, rows: Sequence[Row], *, prefill_chunk: int | None
) -> list[Outcome]:
    """Prefill and decode all rows, greedily; outcomes in the order of the rows.

    `prefill_chunk` is in tokens, None reads each prompt at once. InputError if a row does not fit
    the model, or the model's layers do not reach the harness's attention. Rows that evict nothing
    of the same prompt are one row: it is run once.
    """
    for row in rows:
        check(model, row)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    ledger = Ledger()
    groups: dict[tuple[int, ...], dict[object, list[int]]] = {}
    for index, row in enumerate(rows):
        same = (row.max_new_tokens,) if evictor_of(model, row).keeps_all else index
        groups.setdefault(tuple(row.prompt), {}).setdefault(same, []).append(index)
    states: list[RowState] = []
    # Kernels and graphs go to the current GPU, which may be another than the model's.
    with torch.inference_mode(), torch.cuda.device(model.device) if on_gpu else nullcontext():
        for group in groups.values():
            states += prefill(model, [rows[i[0]] for i in group.values()], prefill_chunk, ledger)
        decode(model, states)
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else None
    results: dict[int, Outcome] = {}
    waiting = iter(states)
    for group in groups.values():
        shared = sum(len(members) for members in group.values())
        for members in group.values():
            state = next(waiting)
            for index in members:
                results[index] = outcome(model, state, peak, ledger, shared, len(members))
    return [results[index] for index in range(len(rows))]


def decode(model: LoadedModel, states: Sequence[RowState]) -> None:
    """Decode until every row has ended; rows leave the batch as they end."""
    batch = [state for state in states if not ended(model, state)]
    if not batch:
        return
    started = time.perf_counter()
    held = {id(state): state.cache.lengths() for state in batch}
    for state in batch:
        state.make_room()
    kv = DecodeKV(
        [state.cache for state in batch],
        [len(state.row.prompt) for state in batch],
        backend_of(model.attention),
    )
    ids = torch.tensor([state.tokens[-1] for state in batch], device=model.device)

    def step() -> None:
        ids.copy_(forward(model, ids[:, None], kv.positions[:, None], kv).argmax(-1))
        kv.advance()

    take = Repeated(step, kv.capturable)
    running = list(range(len(batch)))  # places in the batch
    while running:
        take()
        tokens = ids.tolist()
        now = time.perf_counter()
        for place in running:
            state = batch[place]
            state.tokens.append(tokens[place])
            state.decode_seconds += (now - started) / len(running)
        started = now
        over = {place for place in running if ended(model, batch[place])}
        if not over:
            continue
        for place in over:
            state = batch[place]
            state.meter.decoded(held[id(state)], len(state.tokens) - 1)
        running = [place for place in running if place not in over]
        if kv.keeps_places and 2 * len(running) > len(batch):
            kv.retire(over)
            continue
        batch = [batch[place] for place in running]
        ids = ids[torch.tensor(running, dtype=torch.long, device=model.device)]
        kv.leave(running)
        take.changed()
        running = list(range(len(batch)))


def ended(model: LoadedModel, state: RowState) -> bool:
    """Whether a row has written its answer."""
    return state.tokens[-1] in model.end_tokens or len(state.tokens) >= state.row.max_new_tokens
