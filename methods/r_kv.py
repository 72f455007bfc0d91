"""R-KV: what the last queries attend to, without repetitions."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from kvbench.method import DecodingMethod, LayerView
from kvbench.registry import register_method

ROWS = 512  # keys that are compared with all keys at once


@register_method("r-kv")
@dataclass(frozen=True)
class RKV(DecodingMethod):
    """Keep attended entries whose keys are unlike the others (Cai et al., arXiv 2505.24133)."""

    interval: int = field(default=128, metadata={"help": "Decoded tokens between evictions."})
    window: int = field(default=8, metadata={"help": "Queries of the observation window."})
    lam: float = field(default=0.1, metadata={"help": "Weight of attention."})
    threshold: float = field(default=0.5, metadata={"help": "Cosine of keys that are alike."})
    kernel: int = field(default=7, metadata={"help": "Entries of the max pooling; odd."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.window > 0, f"window must be at least 1, not {self.window}")
        self.check(0 <= self.lam <= 1, f"lam must be from 0 to 1, not {self.lam}")
        self.check(self.kernel in range(1, 999, 2), f"kernel must be odd, not {self.kernel}")

    @property
    def observation_window(self) -> int:
        """W, the option `window`."""
        return self.window

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], weighted attention minus weighted redundancy; 0 for the window's entries."""
        keys = view.latest(view.new).keys.float()
        before, rows = keys.shape[1] - view.queries.shape[2], []
        for states, queries in zip(keys, view.queries.float(), strict=True):
            logits = queries @ states[:before].T * view.scaling  # [G, W, before]
            if view.softcap is not None:
                logits = view.softcap * (logits / view.softcap).tanh()
            attended = logits.amax(0).softmax(-1).mean(0)
            pooled = max_pool1d(attended[None], self.kernel, 1, self.kernel // 2)[0]
            rows.append(self.lam * pooled - (1 - self.lam) * self._redundancy(states)[:before])
        return pad(torch.stack(rows), (view.entries - keys.shape[1], keys.shape[1] - before))

    def _redundancy(self, keys: Tensor) -> Tensor:
        """[E], the mean cosine with all keys, each of which spares the latest key like it."""
        unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
        order, total = torch.arange(len(keys), device=keys.device), keys.new_zeros(len(keys))
        for first in range(0, len(keys), ROWS):
            cosines = unit[first : first + ROWS] @ unit.T
            cosines.diagonal(first).zero_()  # of a key with itself
            latest = cosines.clone().gt_(self.threshold).mul_(order).amax(-1, keepdim=True).long()
            total += cosines.scatter_(1, latest, 0).sum(0)
        return (total / len(keys)).softmax(-1)
