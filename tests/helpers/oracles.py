"""Which entries each method keeps, computed slowly from one layer's tensors as its paper says.

Shapes: n entries, K KV heads, H query heads of which G = H/K share a KV head, head size D. `keys`
and `values` are [K, n, D], `queries` [H, T, D] those of the last T tokens; keys and queries are
after RoPE unless an argument's name says otherwise. `scaling` multiplies the attention logits. What
is kept comes as one sorted list of positions a KV head. Numbers are in float64, or in float32 where
many scores differ in float64 alone.

The papers leave some things open, and kvpress (NVIDIA's library, version 0.5.5) fills the gaps or
differs; the docstrings say how. Where scores are equal, `torch.topk` decides, as in kvpress.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Kept = list[list[int]]  # for each KV head, the positions it keeps, in order


def best(scores: Tensor, capacity: int) -> list[int]:
    """The positions of the `capacity` highest of the scores [n], in order."""
    return sorted(scores.topk(capacity).indices.tolist())


def kept(scores: Tensor, capacity: int) -> Kept:
    """The `capacity` highest entries of each KV head, of scores [K, n]."""
    return [best(head, capacity) for head in scores]


def protect(scores: Tensor, *, first: int = 0, last: int = 0) -> Tensor:
    """Scores [K, n] in which the first and last entries are higher by 1 than all others are."""
    n = scores.shape[1]
    inside = scores[:, first : n - last]
    scores = torch.full_like(scores, inside.max().item() + 1)
    scores[:, first : n - last] = inside
    return scores


def holding(
    keep: Callable[[list[int]], list[int]], capacity: int, evictions: Sequence[int]
) -> list[int]:
    """The positions that a KV head holds after evictions once so many tokens were read, ascending.

    A bounded method evicts after each prefill chunk, a decode-time method after the prompt and then
    every few tokens, if more than `capacity` entries are held. `keep` gets the positions that are
    held, and gives the places in that list of those that stay.
    """
    held: list[int] = []
    read = 0
    for end in evictions:
        held += range(read, end)
        read = end
        if len(held) > capacity:
            held = [held[place] for place in keep(held)]
    return held


def attention(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """[H, T, n], causal attention of the last T tokens' queries, normalised over all keys."""
    heads, tokens, _ = queries.shape
    n = keys.shape[1]
    group = heads // len(keys)
    weights = torch.zeros(heads, tokens, n, dtype=torch.float64)
    for head in range(heads):
        for token in range(tokens):
            seen = n - tokens + token + 1
            query, visible = queries[head, token].double(), keys[head // group, :seen].double()
            weights[head, token, :seen] = (visible @ query * scaling).softmax(0)
    return weights


def by_kv_head(per_query_head: Tensor, kv_heads: int) -> Tensor:
    """The mean over each group of query heads: [H, n] to [K, n]."""
    return torch.stack([group.mean(0) for group in per_query_head.chunk(kv_heads)])


def pooled(row: Tensor, kernel: int, *, maximum: bool = False) -> Tensor:
    """A row [n], each number the mean (or maximum) of the `kernel` around it.

    The mean counts what lies beyond the row's ends as zeros.
    """
    reach = kernel // 2
    around = [row[max(0, i - reach) : i + reach + 1] for i in range(len(row))]
    return torch.stack([part.max() if maximum else part.sum() / kernel for part in around])


def snapkv_scores(
    queries: Tensor, keys: Tensor, scaling: float, window: int = 64, kernel: int = 5
) -> Tensor:
    """[K, n], SnapKV's scores (arXiv 2404.14469): attention from the observation window, smoothed.

    The window's own entries have the highest score. The paper pools by the maximum; its authors'
    code and kvpress by the mean, kernel 5, window 64.
    """
    n = keys.shape[1]
    weights = attention(queries[:, -window:], keys, scaling)[:, :, : n - window].mean(1)
    scores = torch.zeros(len(keys), n, dtype=torch.float64)
    for head, row in enumerate(by_kv_head(weights, len(keys))):
        scores[head, : n - window] = pooled(row, kernel)
    return protect(scores, last=window)


def keydiff_scores(keys: Tensor) -> Tensor:
    """[K, n], minus the cosine of each key with the mean normalised key of its KV head."""
    scores = []
    for head in keys.double():
        anchor = torch.stack([key / key.norm() for key in head]).mean(0)
        scores.append(torch.stack([-(key @ anchor) / key.norm() / anchor.norm() for key in head]))
    return torch.stack(scores)


def keydiff(keys: Tensor, capacity: int) -> Kept:
    """KeyDiff (arXiv 2504.15364): the keys least like the mean key of their KV head.

    Nothing is protected. The paper evicts after each block of 128 tokens, among what is kept and
    the block; kvpress's KeyDiffPress once, after the prompt, as this does.
    """
    return kept(keydiff_scores(keys), capacity)


def lagkv(keys: Tensor, values: Tensor, capacity: int, sinks: int = 4, lag: int = 128) -> Kept:
    """LagKV (arXiv 2504.04704): entries that vary most, measured by the range of the next ones.

    After the sinks come partitions of `lag` entries. The last whole partition and what follows it
    stay, as the sinks do. In each other partition, keys and values are scaled by the minimum and
    maximum of each channel in the next partition; the standard deviation over the channels, through
    a softmax over the partition, scores an entry; keys and values count the same.

    The paper keeps the same share of each partition. kvpress, and this, give each entry its rank in
    its partition as score and keep the `capacity` best of all, so many scores are equal. A prompt
    shorter than the sinks and two partitions keeps the sinks and the most recent entries.
    """
    n = keys.shape[1]
    partitions = (n - sinks) // lag
    scores = torch.ones(len(keys), n, dtype=torch.float32)
    if partitions < 2:
        scores[:, sinks:] = torch.arange(n - sinks) / (n - sinks)
        return kept(scores, capacity)
    for head in range(len(keys)):
        for partition in range(partitions - 1):
            here = slice(sinks + partition * lag, sinks + (partition + 1) * lag)
            after = slice(here.stop, here.stop + lag)
            score = torch.zeros(lag, dtype=torch.float64)
            for states in (keys[head].double(), values[head].double()):
                low, high = states[after].min(0).values, states[after].max(0).values
                scaled = (states[here] - low) / (high - low)
                score += scaled.std(1).softmax(0)
            for rank, entry in enumerate(score.argsort().tolist()):
                scores[head, here.start + entry] = rank / lag
    return kept(scores, capacity)


def cur_scores(keys: Tensor, values: Tensor, sinks: int = 4, window: int = 16) -> Tensor:
    """[K, n], `cur`'s scores; the sinks have 1, the others less."""
    n = keys.shape[1]
    scores = torch.ones(len(keys), n)
    for head in range(len(keys)):
        for start in range(0, n, window):
            here = slice(start, min(n, start + window))
            for states in (keys[head, here].float(), values[head, here].float()):
                squares = (states**2).sum(1)
                scores[head, here] *= squares / squares.sum()
        scores[head] /= scores[head].sum()
    scores[:, :sinks] = 1
    return scores


def cur(keys: Tensor, values: Tensor, capacity: int, sinks: int = 4, window: int = 16) -> Kept:
    """CurDKV (arXiv 2509.15038): the highest leverage of key and value, approximately.

    The leverage is the squared norm of the key times that of the value, each as a share of its
    window of 16 entries, counted from the first. The first entries stay. The paper projects keys
    and values to 20 random dimensions first and takes shares of the whole row; kvpress has both as
    options, and its defaults are these.
    """
    return kept(cur_scores(keys, values, sinks, window), capacity)


def tova(last_queries: Tensor, keys: Tensor, scaling: float, capacity: int) -> Kept:
    """TOVA (arXiv 2401.06104): the last query's attention, averaged over all heads of the layer.

    All KV heads keep the same entries. In the paper the last entry competes as well; kvpress, and
    this, keep it always.
    """
    row = attention(last_queries[:, -1:], keys, scaling)[:, 0].mean(0)
    scores = protect(row[None], last=1)
    return [best(scores[0], capacity) for _ in keys]


def h2o(queries: Tensor, keys: Tensor, scaling: float, capacity: int) -> Kept:
    """H2O (arXiv 2306.14048) after a prompt: the recent half, and what got most attention.

    The attention of all the prompt's queries, summed over them and over the query group. With an
    odd capacity the recent part has one entry fewer. kvpress has no H2O; its
    ObservedAttentionPress takes the mean over the queries that see an entry, and no recent part.
    """
    weights = attention(queries, keys, scaling).sum(1)
    return [heavy(row, capacity) for row in by_kv_head(weights, len(keys))]


def heavy(sums: Tensor, capacity: int) -> list[int]:
    """The `capacity // 2` last entries and the highest of the others, of sums [n]."""
    recent = capacity // 2
    earlier = best(sums[: len(sums) - recent], capacity - recent)
    return earlier + list(range(len(sums) - recent, len(sums)))


def h2o_decoding(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    capacity: int,
    prompt: int,
    evictions: Sequence[int],
) -> Kept:
    """What H2O holds after all tokens, of which the first `prompt` are the prompt.

    It evicts once as many tokens were read as `evictions` say (see `holding`). A decoded token's
    attention is over the entries that its KV head holds, itself among them.
    """
    n, group = keys.shape[1], len(queries) // len(keys)
    sums = attention(queries[:, :prompt], keys[:, :prompt], scaling).sum(1)
    result = []
    for head, row in enumerate(by_kv_head(sums, len(keys))):
        held, score = list(range(prompt)), row.tolist() + [0.0] * (n - prompt)
        for read in range(prompt, n + 1):
            if read > prompt:
                held.append(read - 1)
                for query in queries[head * group : (head + 1) * group, read - 1].double():
                    weights = (keys[head, held].double() @ query * scaling).softmax(0)
                    for position, weight in zip(held, weights.tolist(), strict=True):
                        score[position] += weight / group
            if read in evictions and len(held) > capacity:
                of_held = torch.tensor([score[p] for p in held], dtype=torch.float64)
                held = [held[place] for place in heavy(of_held, capacity)]
        result.append(held)
    return result


def r_kv(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    capacity: int,
    window: int = 8,
    mix: float = 0.1,
    kernel: int = 7,
    threshold: float = 0.5,
) -> Kept:
    """R-KV (arXiv 2505.24133): attended by the last queries, and unlike other keys.

    The last `window` entries stay. Importance is the window's attention to the entries before it,
    normalised over these, averaged over the window and pooled by the maximum of 7 entries; the
    logits are the maximum over the query group. Redundancy of an entry is the mean cosine of its
    key with all keys, through a softmax over the entries; of the keys that look like a key (cosine
    above 0.5) the last one is not counted, so that the latest of equals stays. The score is
    `mix * importance - (1 - mix) * redundancy`.

    This is the authors' code, with the paper's mix of 0.1 (the code's default is 0.07). The paper
    takes the maximum over the query group after the softmax, and may spare more than one of the
    latest look-alikes. kvpress has no R-KV.
    """
    n, group = keys.shape[1], len(queries) // len(keys)
    before, result = n - window, []
    for head, states in enumerate(keys.double()):
        attended = torch.zeros(before, dtype=torch.float64)
        for token in range(-window, 0):
            grouped = queries[head * group : (head + 1) * group, token].double()
            logits = torch.stack([states[:before] @ query * scaling for query in grouped])
            attended += logits.max(0).values.softmax(0) / window
        importance = pooled(attended, kernel, maximum=True)
        unit = torch.stack([key / (key.norm() + 1e-8) for key in states])
        cosines = unit @ unit.T
        for i in range(n):
            cosines[i, i] = 0
        for i in range(n):
            alike = (cosines[i] > threshold).nonzero().flatten().tolist()
            cosines[i, alike[-1] if alike else 0] = 0
        redundancy = cosines.mean(0).softmax(0)[:before]
        score = mix * importance - (1 - mix) * redundancy
        result.append(best(score, capacity - window) + list(range(before, n)))
    return result


def expected_attention_scores(
    unrotated_queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    scaling: float,
    sinks: int = 4,
    epsilon: float = 0.0,
) -> Tensor:
    """[K, n], `expected_attention`'s scores."""
    size, group = keys.shape[2], len(unrotated_queries) // len(keys)
    # q at position p is cos[p] * q + sin[p] * turn @ q: its second half negated, then its first.
    half = torch.eye(size // 2, dtype=torch.float64)
    none = torch.zeros_like(half)
    turn = torch.cat([torch.cat([none, -half], 1), torch.cat([half, none], 1)])
    rotation = torch.zeros(size, size, dtype=torch.float64)
    for c, s in zip(cos.double(), sin.double(), strict=True):
        rotation += (torch.diag(c) + torch.diag(s) @ turn) / len(cos)
    expected = []
    for head, queries in enumerate(unrotated_queries.double()):
        seen = queries[sinks:]
        mean = seen.mean(0)
        covariance = (seen - mean).T @ (seen - mean) / len(seen)
        mean, covariance = rotation @ mean, rotation @ covariance @ rotation.T
        logits = []
        for key in keys[head // group, sinks:].double():
            logits.append(mean @ key * scaling + key @ covariance @ key * scaling**2 / 2)
        expected.append(torch.stack(logits).float().softmax(0))
    scores = torch.zeros(keys.shape[:2])
    scores[:, sinks:] = by_kv_head(torch.stack(expected), len(keys)) + epsilon
    return protect(scores * values.float().norm(dim=2), first=sinks)


def expected_attention(
    unrotated_queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    scaling: float,
    capacity: int,
    sinks: int = 4,
    epsilon: float = 0.0,
) -> Kept:
    """Expected Attention (arXiv 2510.00636): the attention expected from the queries to come.

    `unrotated_queries` [H, n, D] are the prompt's before RoPE; `cos` and `sin` [P, D] are the
    rotation at the P positions after the prompt (512), whose mean rotates the queries' mean and
    covariance. The queries are taken as normal: an entry's logit is that of the mean query, plus
    half the variance of the logits. The softmax over the entries, averaged over the query group,
    plus `epsilon`, times the norm of the value is the score. The first 4 entries stay; they do not
    take part in the softmax, nor their queries in the mean and covariance.

    The logits may be so far apart that the softmax gives most entries 0, which are then equal: it
    is in float32 here, as in kvpress, so that as many are. kvpress is by the paper's authors; it
    takes the value's own norm, the paper that of the value after the output projection.
    """
    scores = expected_attention_scores(
        unrotated_queries, keys, values, cos, sin, scaling, sinks, epsilon
    )
    return kept(scores, capacity)


def chunkkv(scores: Tensor, capacity: int, length: int = 20) -> Kept:
    """ChunkKV (arXiv 2502.00299): whole chunks of neighbours, by the mean of their scores [K, n].

    The scores are SnapKV's. Chunks of `length` entries are counted from the first entry, and all KV
    heads keep the same, by the sum of the heads' scores. Chunks are taken from the best on until
    `capacity` entries are; the last one that is taken gives its first entries.

    kvpress takes whole chunks only: the budget's share of their number, rounded down. The paper has
    chunks of 10, keeps the observation window apart from them, and lets a layer use the
    chunks of the layer before.
    """
    n = scores.shape[1]
    chunks = [list(range(start, min(n, start + length))) for start in range(0, n, length)]
    means = torch.stack([scores[:, chunk].sum(0).mean() for chunk in chunks])
    chosen: list[int] = []
    for chunk in means.topk(len(chunks)).indices.tolist():
        chosen += chunks[chunk][: capacity - len(chosen)]
    return [sorted(chosen) for _ in scores]


def criticalkv(
    scores: Tensor,
    values: Tensor,
    output: Tensor,
    capacity: int,
    first: float = 0.5,
    epsilon: float = 1e-4,
) -> Kept:
    """CriticalKV (arXiv 2502.03805): half by the scores [K, n], the rest by scores times values.

    The first stage takes the best `first` of the capacity (rounded down, at least one). The second
    multiplies the scores, plus `epsilon`, by the L1 norm of the value after the output projection
    `output` [hidden, H * D], averaged over the query group.

    The scores are SnapKV's, whose observation window has the highest; in kvpress, as here, it takes
    part in both stages, in the paper it is apart.
    """
    size, group = values.shape[2], output.shape[1] // values.shape[2] // len(values)
    result = []
    for head in range(len(values)):
        norms = torch.zeros(values.shape[1], dtype=torch.float64)
        for query_head in range(head * group, (head + 1) * group):
            projection = output[:, query_head * size : (query_head + 1) * size].double()
            for entry, value in enumerate(values[head].double()):
                norms[entry] += (projection @ value).abs().sum() / group
        second = (scores[head].double() + epsilon) * norms
        second[best(scores[head], max(1, int(capacity * first)))] = torch.inf
        result.append(best(second, capacity))
    return result


def ada(scores: Tensor, capacity: int, share: float = 0.2) -> Kept:
    """Ada-KV (arXiv 2407.11550): the layer keeps its best K * capacity by the scores [K, n].

    Each KV head keeps at least its best `share * capacity` (rounded down, at least one). In
    kvpress, as here, the observation window of the scores counts in that share; in the paper it is
    apart, and the window is 32 with pooling by the maximum.
    """
    heads, n = scores.shape
    raised = scores.clone()
    if share > 0:
        for head, row in enumerate(scores):
            raised[head, best(row, max(1, int(share * capacity)))] = torch.inf
    gone = set(best(-raised.flatten(), heads * (n - capacity)))
    return [[p for p in range(n) if head * n + p not in gone] for head in range(heads)]


def quest(queries: Tensor, keys: Tensor, pages: int, page: int = 16) -> Kept:
    """Quest (arXiv 2406.10774): the pages, by number, that a decoded token reads in each KV head.

    `queries` [H, D] are the token's. A page of `page` entries is bounded by the lowest and highest
    of its keys in each channel; the last page may be shorter. The bound on the logit of a page is
    the maximum over the query group; the paper's models have no groups. At least 3 pages are read.
    kvpress has no Quest.
    """
    group = len(queries) // len(keys)
    result = []
    for head, states in enumerate(keys.double()):
        bounds = []
        for entries in states.split(page):
            low, high = entries.min(0).values, entries.max(0).values
            grouped = queries[head * group : (head + 1) * group].double()
            bounds.append(max(float(torch.maximum(q * low, q * high).sum()) for q in grouped))
        result.append(best(torch.tensor(bounds), min(max(3, pages), len(bounds))))
    return result


def kvzip_scores(
    replay_queries: Tensor,
    sink_keys: Tensor,
    chunk_keys: Tensor,
    replay_keys: Tensor,
    scaling: float,
) -> Tensor:
    """[K, chunk], the maximal attention that entries get while the model repeats their chunk.

    The model reads an instruction and the chunk again, on top of the cache: `replay_queries`
    [H, T, D] and `replay_keys` [K, T, D] are of these tokens. Attention is normalised over the
    sinks before the chunk (0 to 4), the chunk's entries, and the replay's, causally. The maximum is
    over the replay's tokens and the query group.
    """
    sinks, chunk = sink_keys.shape[1], chunk_keys.shape[1]
    keys = torch.cat([sink_keys, chunk_keys, replay_keys], 1)
    highest = attention(replay_queries, keys, scaling).max(1).values[:, sinks : sinks + chunk]
    return torch.stack([group.max(0).values for group in highest.chunk(len(keys))])


def kvzip(scores: Sequence[Tensor], evicted: int, sinks: int = 4) -> list[Kept]:
    """KVzip (arXiv 2505.23416): without the `evicted` lowest of all layers' scores [K, n].

    The first entries stay. Layers and KV heads keep different numbers; with one layer at a time the
    budget is equal in all layers. kvpress evicts `int(ratio * entries)`, replays chunks of 2,048
    tokens, and scores a chat template's first tokens 0, where the paper keeps them.
    """
    every = torch.stack([layer.double() for layer in scores])
    every[:, :, :sinks] = torch.inf
    chosen = set(best(every.flatten(), every.numel() - evicted))
    layers, heads, n = every.shape
    return [
        [[p for p in range(n) if (layer * heads + head) * n + p in chosen] for head in range(heads)]
        for layer in range(layers)
    ]


def random_keeping_prompt(
    draw: Callable[[int], Tensor], capacity: int, prompt: int, evictions: Sequence[int]
) -> list[int]:
    """What the random control (arXiv 2609.03430) holds after `evictions`, in one KV head.

    The prompt stays, and of the decoded entries as many as the capacity has room for, at random:
    `draw(count)` gives a number for each that is held, in order; those with the highest stay.
    """

    def keep(held: list[int]) -> list[int]:
        decoded = len(held) - prompt
        chosen = best(draw(decoded), min(decoded, max(0, capacity - prompt)))
        return list(range(prompt)) + [prompt + place for place in chosen]

    return holding(keep, capacity, evictions)
