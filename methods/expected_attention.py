"""Expected attention: what queries to come are expected to attend to."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvbench.method import EVERY_QUERY, Family, LayerView, Method, Need
from kvbench.registry import register_method

BLOCK = 512  # queries, or positions, that are rotated at once


@register_method("expected-attention")
@dataclass(frozen=True)
class ExpectedAttention(Method):
    """Keep what queries like the prompt's would attend to (Devoto et al., arXiv 2510.00636)."""

    family = Family.POST_FILL
    needs = frozenset({Need.ROTATION})
    gathers_per_entry = False
    ties_by_topk = True  # 0 where the softmax underflows
    future: int = field(default=512, metadata={"help": "Positions to come, which are averaged."})
    sinks: int = field(default=4, metadata={"help": "First entries, which stay."})
    epsilon: float = field(default=0.0, metadata={"help": "Added to the expected attention."})

    def __post_init__(self) -> None:
        self.check(self.future >= 1, f"future must be at least 1, not {self.future}")
        self.check(self.sinks >= 0, f"sinks must be at least 0, not {self.sinks}")

    @property
    def observation_window(self) -> int:
        """All queries, for their mean and covariance."""
        return EVERY_QUERY

    def gather(self, view: LayerView) -> Tensor:
        """[K, G, D + 1, D + 1], the sum of x x^T, x a query before RoPE with a 1 at its end."""
        assert view.rotation is not None
        queries, total = view.queries, view.gathered
        if total is None:
            size = queries.shape[3] + 1
            total = queries.new_zeros((*queries.shape[:2], size, size), dtype=torch.float64)
        skipped = max(0, self.sinks - (view.read - queries.shape[2]))
        for first in range(skipped, queries.shape[2], BLOCK):
            block, places = (
                queries[:, :, first : first + BLOCK].float(),
                view.query_positions[first:],
            )
            block = pad(view.rotation.undo(block, places[:BLOCK]), (0, 1), value=1.0).double()
            total = total + block.mT @ block
        return total

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], the attention expected from later positions, times the norm of the value."""
        assert view.rotation is not None
        assert view.gathered is not None
        count = view.gathered[..., -1:, -1:].clamp(min=1)
        mean, squares = view.gathered[..., -1:, :-1] / count, view.gathered[..., :-1, :-1] / count
        each = torch.eye(mean.shape[3], device=mean.device)[:, None].expand(-1, BLOCK, -1)
        later = torch.arange(view.read, view.read + self.future, device=mean.device).split(BLOCK)
        turned = [view.rotation.apply(each[:, : len(p)], p).sum(1).double() for p in later]
        turn = torch.stack(turned).sum(0) / self.future
        spread = (turn.T @ (squares - mean.mT @ mean) @ turn).float()
        mean, sinks, rows = (mean @ turn).float(), view.positions < self.sinks, []
        for head, (keys, values) in enumerate(zip(view.keys, view.values, strict=True)):
            keys, expected = keys.float() * view.scaling, []
            for middle, around in zip(mean[head, :, 0], spread[head], strict=True):
                logits = keys @ middle + ((keys @ around) * keys).sum(1) / 2
                hidden = logits.masked_fill(sinks[head], torch.finfo(logits.dtype).min)
                expected.append(hidden.softmax(0) + self.epsilon)
            rows.append(torch.stack(expected).mean(0) * values.float().norm(dim=-1))
        scores = torch.stack(rows)
        return scores.masked_fill(sinks, scores.max() + 1)
