"""The tokens of a row that need its far context: training on them alone teaches heads faster.

Most tokens of natural text are predicted as well from a short window. A loss over all tokens says
little about which heads look far back, and much about everything else. A token needs far context
as much as its loss rises when all KV heads stream (docs/learning-heads.md).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kvbench.learning.attention import GatedAttention
from kvbench.learning.objective import at_least_float32, forward
from kvbench.method import KVShape

KEPT_TOKENS = 16_000_000  # places remembered over all rows, 4 bytes each
LOSS_BLOCK = 256  # tokens whose logits are converted to float32 at once


class Focus:
    """Chooses, in each row, the share of predicted tokens whose loss rises most.

    The choice for a row is kept, so that a row that comes again costs nothing. That is right as
    long as the model's weights are frozen.
    """

    def __init__(self, share: float, shape: KVShape, sinks: int, window: int, chunk: int) -> None:
        self.share = share
        streaming = torch.zeros(shape.layers, 1, shape.kv_heads)
        self.full = GatedAttention(None, sinks, window)
        self.streaming = GatedAttention(
            streaming, sinks, window, shape.acting, chunk=chunk, fixed=True
        )
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.kept_tokens = 0

    @torch.no_grad()
    def choose(self, model: Any, ids: Sequence[int], counts: Tensor) -> Tensor:
        """Which of the places `counts` [T] are chosen [T]; at least one if there is any.

        A place stands for the prediction of the token after it. Rows are looked at one by one, so
        that the choice does not depend on the other rows of a batch.
        """
        candidates = counts.nonzero()[:, 0]
        wanted = min(len(candidates), max(1, round(self.share * len(candidates))))
        key = (hash(tuple(ids)), hash(counts.cpu().numpy().tobytes()))
        places = self.kept.get(key)
        # The processes of a sharded model must all call it equally often.
        if places is None or isinstance(model, FSDPModule):
            rise = self.rise(model, torch.tensor(ids, device=counts.device), candidates)
            places = candidates[rise.topk(wanted).indices]
            if self.kept_tokens + wanted <= KEPT_TOKENS:
                self.kept_tokens += wanted if key not in self.kept else 0
                self.kept[key] = places.int().cpu()
        chosen = torch.zeros_like(counts)
        chosen[places.long().to(counts.device)] = True
        return chosen

    def rise(self, model: Any, ids: Tensor, places: Tensor) -> Tensor:
        """How much the loss at each place rises if all KV heads stream, in nats."""
        full, streaming = (
            token_losses(model, ids[None], attention, places)[0]
            for attention in (self.full, self.streaming)
        )
        return streaming - full


def token_losses(model: Any, ids: Tensor, attention: GatedAttention, places: Tensor) -> Tensor:
    """The next-token loss [B, P] at `places` [P] of each row of `ids` [B, T], in nats."""
    logits = forward(model, ids, attention, logits_to_keep=places).logits.flatten(0, 1)
    wanted = ids[:, places + 1].flatten()
    losses = [
        torch.nn.functional.cross_entropy(at_least_float32(some), following, reduction="none")
        for some, following in zip(logits.split(LOSS_BLOCK), wanted.split(LOSS_BLOCK), strict=True)
    ]
    return torch.cat(losses).view(len(ids), -1)
