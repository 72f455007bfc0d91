"""Expected attention: what queries to come are expected to attend to."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.method import EVERY_QUERY, Family, LayerView, Method, Need
from kvbench.registry import register_method

from ._queries import queries_to_come, sums_of_queries


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
        """[K, G, D + 1, D + 1], see `sums_of_queries`."""
        return sums_of_queries(view, self.sinks)

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], the attention expected from later positions, times the norm of the value."""
        (mean, spread), rows = queries_to_come(view, self.future), []
        sinks = view.positions < self.sinks
        for head, (keys, values) in enumerate(zip(view.keys, view.values, strict=True)):
            keys, expected = keys.float() * view.scaling, []
            for middle, around in zip(mean[head, :, 0], spread[head], strict=True):
                logits = keys @ middle + ((keys @ around) * keys).sum(1) / 2
                hidden = logits.masked_fill(sinks[head], torch.finfo(logits.dtype).min)
                expected.append(hidden.softmax(0) + self.epsilon)
            rows.append(torch.stack(expected).mean(0) * values.float().norm(dim=-1))
        scores = torch.stack(rows)
        return torch.where(sinks, scores.max() + 1, scores)
