"""The cost of a batch before it runs: tokens through the model, peak memory, seconds."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from kvbench.engine.policy import EvictionPolicy
from kvbench.engine.prefill import PACKED_TOKENS
from kvbench.engine.row import Row, policy_of
from kvbench.engine.run import run_rows
from kvbench.method import Pages, Window
from kvbench.models.attention import LayerShape
from kvbench.models.load import LoadedModel
from kvbench.records import BASELINE
from kvbench.spec import parse_method

TRIALS = 2  # of which the shorter counts: other work on the machine may hold up one
TRIAL_ROWS = 8
TRIAL_TOKENS = 6  # of each row's answer


@dataclass(frozen=True)
class Cost:
    """Tokens that go through the model, and the most bytes at one moment beside the weights."""

    prefill_tokens: int
    decode_tokens: int  # at most
    attended: int  # entry-rows of the prefill, a KV head's mean over the layers, full where unsure
    bytes: int

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.prefill_tokens + self.decode_tokens


def cost_of(model: LoadedModel, rows: Sequence[Row], prefill_chunk: int | None) -> Cost:
    """The cost of rows that run together, as `cost_of_policies` gives it.

    A row whose method gives no usable windows costs nothing: it fails before anything is read.
    """
    groups: dict[Hashable, list[EvictionPolicy]] = {}
    for row in rows:
        try:
            policy = policy_of(model, row, prefill_chunk)
            _ = policy.windows
        except Exception:
            continue
        prompt = row.prompt if isinstance(row.prompt, Hashable) else tuple(row.prompt)
        groups.setdefault(prompt, []).append(policy)
    return cost_of_policies(model, list(groups.values()), prefill_chunk)


def cost_of_policies(
    model: LoadedModel, groups: Sequence[Sequence[EvictionPolicy]], prefill_chunk: int | None
) -> Cost:
    """The cost of rows that run together, grouped by prompt; the memory is an upper bound.

    The memory is that of the GPU which needs most, if the model is split over several. The
    allocator's own is not included.
    """
    prefill = attended = 0
    for policies in groups:
        n = policies[0].prompt
        first = min(n, prefill_chunk or n)
        late = [p for p in policies if p.keeps_whole_prompt and not p.evicts_late]
        early = [p for p in policies if not p.keeps_whole_prompt or p.evicts_late]
        streams = len(early) + bool(late)
        patches = {p: sum(c.patched for c in p.chunks) for p in early}
        # The first chunk is read once, and once more with every other patch.
        kinds = {p.chunks[0].patched for p in policies}
        prefill += first * len(kinds) + (n - first) * streams + sum(patches.values())
        attended += streams * n * n // 2
    most = max(bytes_on(model, device, groups, prefill_chunk) for device in model.devices)
    decoded = sum(policy.decoded for policies in groups for policy in policies)
    return Cost(prefill, decoded, attended, most)


def bytes_on(
    model: LoadedModel,
    device: torch.device,
    groups: Sequence[Sequence[EvictionPolicy]],
    prefill_chunk: int | None,
) -> int:
    """The most bytes that rows take on one device, beside the weights; an upper bound.

    It is the largest of two kinds of moments. While a prompt is read: its whole streams, the copies
    that its rows keep, what the rows of earlier prompts keep, and the activations of one forward.
    While all rows decode: everything they hold, and a copy of one layer.
    """
    layers = [index for index, layer in enumerate(model.layers) if layer.device == device]
    most = kept = 0
    for policies in groups:
        n = policies[0].prompt
        late = [p for p in policies if p.keeps_whole_prompt and not p.evicts_late]
        held = sum(bytes_kept(model, p, layers) for p in policies if not p.keeps_all)
        full = max((bytes_full(model, n + p.decoded, layers) for p in late), default=0)
        keeps = full if any(p.keeps_all for p in policies) else 0
        most = max(most, kept + held + full + workspace(model, n, min(n, prefill_chunk or n)))
        kept += held + keeps
    acting = [layer for layer in model.shape.acting or layers if layer in layers]
    return max(most, kept + kept // max(1, len(acting)))


def bytes_kept(model: LoadedModel, policy: EvictionPolicy, layers: Sequence[int]) -> int:
    """Bytes that a row stores in some layers: what stays of its prompt, and its answer."""
    whole = policy.prompt + policy.decoded
    if policy.evicts_late:
        return bytes_full(model, whole, layers)
    if any(policy.pages):  # a page has two keys more
        bounds = ((model.layers[layer], policy.pages[layer]) for layer in layers)
        more = sum(bounds_bytes(model, layer, pages, whole) for layer, pages in bounds)
        return bytes_full(model, whole, layers) + more
    share = policy.spec.scorer_budget(policy.budget) if policy.evicts_by_score else 1.0
    scored = min(whole, round(share * policy.prompt) + 1 + policy.decoded)
    if policy.interval:
        scored = min(whole, policy.held + policy.interval)
    if len(layers) < len(model.layers):  # some may keep more than the mean: PyramidKV, up to twice
        scored = min(whole, 2 * scored)
    return sum(
        entry_bytes(model, model.layers[layer]) * policy_entries(window, scored, whole)
        for layer in layers
        for window in policy.windows[layer]
    )


def bounds_bytes(model: LoadedModel, layer: LayerShape, pages: Pages | None, entries: int) -> int:
    """Bytes of the bounds of a layer's pages."""
    if pages is None:
        return 0
    return 2 * layer.kv_heads * layer.key_size * model.dtype.itemsize * -(-entries // pages.size)


def policy_entries(window: Window | None, scored: int, whole: int) -> int:
    """Entries of a KV head with this window."""
    return scored if window is None else min(whole, window.sinks + window.size + 1)


def bytes_full(model: LoadedModel, tokens: int, layers: Sequence[int] | None = None) -> int:
    """Bytes that full attention holds after `tokens` tokens, in some layers or in all."""
    own = range(len(model.layers)) if layers is None else layers
    return sum(
        layer.kv_heads
        * entry_bytes(model, layer)
        * (tokens if layer.limit is None else min(tokens, layer.limit.size + 1))
        for layer in (model.layers[index] for index in own if model.layers[index].source == index)
    )


def workspace(model: LoadedModel, prompt: int, chunk: int) -> int:
    """Bytes of one forward's activations and of an observation window's attention, roughly."""
    config = model.model.config.get_text_config(decoder=True)
    hidden = config.hidden_size
    given = getattr(config, "intermediate_size", None) or 4 * hidden
    wide = max(given) if isinstance(given, list | tuple) else given
    heads = max(
        layer.query_heads * (layer.key_size + layer.value_size)
        + 2 * layer.kv_heads * (layer.key_size + layer.value_size)
        for layer in model.layers
    )
    tokens = max(chunk, min(PACKED_TOKENS, prompt))
    activations = tokens * (6 * hidden + 3 * wide + 2 * heads) * model.dtype.itemsize
    observed = 3 * model.shape.group * 64 * prompt * 4
    return activations + observed


def entry_bytes(model: LoadedModel, layer: LayerShape) -> int:
    """Bytes of a key and a value of a layer."""
    return (layer.key_size + layer.value_size) * model.dtype.itemsize


def trial_length(model: LoadedModel, prefill_chunk: int) -> int:
    """Tokens of a trial's prompt."""
    return max(1, min(256, prefill_chunk, model.max_context - TRIAL_TOKENS))


def trial_tokens(model: LoadedModel, prefill_chunk: int) -> int:
    """Tokens of the trials of `seconds_of`."""
    return (TRIALS * TRIAL_ROWS + 1) * (trial_length(model, prefill_chunk) + TRIAL_TOKENS)


def seconds_of(model: LoadedModel, costs: Sequence[Cost], prefill_chunk: int) -> float:
    """About how many seconds batches take, by short trials on this machine.

    Decoding is predicted by the trial's tokens a second; the prefill by its multiplications a
    second, since the share of attention grows with the context.
    """
    length = trial_length(model, prefill_chunk)
    spec = parse_method(BASELINE, {})
    prompts = [[(7 * i + r) % 50 for i in range(length)] for r in range(TRIAL_ROWS)]
    rows = [Row(prompt, TRIAL_TOKENS, spec, 1.0) for prompt in prompts]
    run_rows(model, rows[:1], prefill_chunk=None)  # the first run sets things up
    trials = [run_rows(model, rows, prefill_chunk=None) for _ in range(TRIALS)]
    fed = max(1, sum(outcome.new_tokens - 1 for outcome in trials[0]))
    per_token = min(sum(outcome.decode_seconds for outcome in trial) for trial in trials) / fed
    weights = sum(p.numel() for p in model.model.parameters())
    shape = model.shape
    per_entry = 2 * shape.layers * shape.query_heads * shape.head_dim  # to 2 for a token's weight
    done = TRIAL_ROWS * (length * weights + per_entry * length * length // 2)
    speed = done / min(sum(outcome.prefill_seconds for outcome in trial) for trial in trials)
    return sum(
        (cost.prefill_tokens * weights + per_entry * cost.attended) / speed
        + cost.decode_tokens * per_token
        for cost in costs
    )
