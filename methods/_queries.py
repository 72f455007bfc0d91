"""The distribution of queries before RoPE, and what it is at positions to come."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvbench.method import LayerView

BLOCK = 512  # queries, or positions, that are rotated at once


def sums_of_queries(view: LayerView, skip: int) -> Tensor:
    """[K, G, D + 1, D + 1], the sum of x x^T, x a query before RoPE with a 1 at its end.

    It adds those of `view.queries` to `view.gathered`, without the first `skip` of the text.
    """
    assert view.rotation is not None
    queries, total = view.queries, view.gathered
    if total is None:
        size = queries.shape[3] + 1
        total = queries.new_zeros((*queries.shape[:2], size, size), dtype=torch.float64)
    for first in range(max(0, skip - (view.read - queries.shape[2])), queries.shape[2], BLOCK):
        block = queries[:, :, first : first + BLOCK].float()
        places = view.query_positions[first : first + BLOCK]
        block = pad(view.rotation.undo(block, places), (0, 1), value=1.0).double()
        total = total + block.mT @ block
    return total


def queries_to_come(view: LayerView, future: int) -> tuple[Tensor, Tensor]:
    """The mean [K, G, 1, D] and covariance [K, G, D, D] of queries at the next positions.

    They are those of the gathered queries, turned by the mean rotation of `future` positions.
    """
    assert view.rotation is not None
    assert view.gathered is not None
    count = view.gathered[..., -1:, -1:].clamp(min=1)
    mean, squares = view.gathered[..., -1:, :-1] / count, view.gathered[..., :-1, :-1] / count
    each = torch.eye(mean.shape[3], device=mean.device)[:, None].expand(-1, BLOCK, -1)
    later = torch.arange(view.read, view.read + future, device=mean.device).split(BLOCK)
    turned = [view.rotation.apply(each[:, : len(p)], p).sum(1).double() for p in later]
    turn = torch.stack(turned).sum(0) / future
    spread = (turn.T @ (squares - mean.mT @ mean) @ turn).float()
    return (mean @ turn).float(), spread
