"""The cost of a batch before it runs: tokens through the model, peak memory, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvbench.engine.eviction import EvictionPolicy
from kvbench.engine.prefill import PACKED_TOKENS
from kvbench.engine.row import Row, policy_of
from kvbench.engine.run import run_rows
from kvbench.models.load import LoadedModel
from kvbench.records import BASELINE
from kvbench.spec import parse_method

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
    """The cost of rows run together; the memory is an upper bound, but for the allocator's own.

    A row whose method gives no usable windows costs nothing: it fails before anything is read.
    It is the largest of: while each prompt is read, its streams whole, the forks of its rows, what
    the rows before it keep, and one forward's activations; and, while all decode, all they hold and
    the copy of one layer.
    """
    groups: dict[tuple[int, ...], list[EvictionPolicy]] = {}
    for row in rows:
        try:
            policy = policy_of(model, row, prefill_chunk)
            _ = policy.windows
        except Exception:
            continue
        groups.setdefault(tuple(row.prompt), []).append(policy)
    prefill = attended = most = kept = 0
    for prompt, policies in groups.items():
        n = len(prompt)
        first = min(n, prefill_chunk or n)
        late = [p for p in policies if p.keeps_whole_prompt]
        early = [p for p in policies if not p.keeps_whole_prompt]
        streams = len(early) + bool(late)
        patches = {p: sum(c.patched for c in p.chunks) for p in early}
        # The first chunk is read once, and once more with every other patch.
        kinds = {p.chunks[0].patched for p in policies}
        prefill += first * len(kinds) + (n - first) * streams + sum(patches.values())
        attended += streams * n * n // 2
        held = sum(entries_kept(p) for p in policies if not p.keeps_all)
        full = max((n + p.decoded for p in late), default=0) * model.shape.total_kv_heads
        keeps = full if any(p.keeps_all for p in policies) else 0
        most = max(most, (kept + held + full) * entry_bytes(model) + workspace(model, n, first))
        kept += held + keeps
    moved = kept // model.shape.layers
    most = max(most, (kept + moved) * entry_bytes(model))
    return Cost(prefill, sum(row.max_new_tokens - 1 for row in rows), attended, most)


def entries_kept(policy: EvictionPolicy) -> int:
    """Entries that a row holds after its prompt, with room for its answer, over all KV heads."""
    whole = policy.prompt + policy.decoded
    share = policy.spec.scorer_budget(policy.budget) if policy.evicts_by_score else 1.0
    scored = min(whole, round(share * policy.prompt) + 1 + policy.decoded)
    return sum(
        scored if window is None else min(whole, window.sinks + window.size)
        for layer in policy.windows
        for window in layer
    )


def workspace(model: LoadedModel, prompt: int, chunk: int) -> int:
    """Bytes of one forward's activations and of an observation window's attention, roughly."""
    config = model.model.config.get_text_config()
    shape = model.shape
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = (shape.query_heads + 2 * shape.kv_heads) * shape.head_dim
    tokens = max(chunk, min(PACKED_TOKENS, prompt))
    activations = tokens * (6 * hidden + 3 * wide + 3 * heads) * model.dtype.itemsize
    observed = 3 * shape.group * 64 * prompt * 4
    return activations + observed


def entry_bytes(model: LoadedModel) -> int:
    """Bytes of a key and a value."""
    return 2 * model.shape.head_dim * model.dtype.itemsize


def trial_length(model: LoadedModel, prefill_chunk: int) -> int:
    """Tokens of a trial's prompt."""
    return max(1, min(256, prefill_chunk, model.max_context - TRIAL_TOKENS))


def trial_tokens(model: LoadedModel, prefill_chunk: int) -> int:
    """Tokens of the trial of `seconds_of`."""
    return (TRIAL_ROWS + 1) * (trial_length(model, prefill_chunk) + TRIAL_TOKENS)


def seconds_of(model: LoadedModel, costs: Sequence[Cost], prefill_chunk: int) -> float:
    """About how many seconds batches take, by a short trial on this machine.

    Decoding is predicted by the trial's tokens a second; the prefill by its multiplications a
    second, since the share of attention grows with the context.
    """
    length = trial_length(model, prefill_chunk)
    spec = parse_method(BASELINE, {})
    prompts = [[(7 * i + r) % 50 for i in range(length)] for r in range(TRIAL_ROWS)]
    rows = [Row(prompt, TRIAL_TOKENS, spec, 1.0) for prompt in prompts]
    run_rows(model, rows[:1], prefill_chunk=None)  # the first run sets things up
    trial = run_rows(model, rows, prefill_chunk=None)
    fed = max(1, sum(outcome.new_tokens - 1 for outcome in trial))
    per_token = sum(outcome.decode_seconds for outcome in trial) / fed
    weights = sum(p.numel() for p in model.model.parameters())
    shape = model.shape
    per_entry = 2 * shape.layers * shape.query_heads * shape.head_dim  # to 2 for a token's weight
    done = TRIAL_ROWS * (length * weights + per_entry * length * length // 2)
    speed = done / sum(outcome.prefill_seconds for outcome in trial)
    return sum(
        (cost.prefill_tokens * weights + per_entry * cost.attended) / speed
        + cost.decode_tokens * per_token
        for cost in costs
    )
