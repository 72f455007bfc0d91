"""Adam for masks that compete: all of them share one second moment."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTS = (0.9, 0.999)
EPSILON = 1e-8


class SharedAdam(torch.optim.Optimizer):
    """Adam (1412.6980) with one second moment for a whole tensor: the mean over its elements.

    Adam divides each element by its own second moment, so a head with a weak gradient moves as far
    as a head with a strong one. Divided by a common number, gradients keep their relative size.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """Move every tensor that has a gradient."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                state = self.state[tensor]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(tensor)
                    state["exp_avg_sq"] = torch.zeros((), device=tensor.device)
                first, second = MOMENTS
                state["step"] += 1
                state["exp_avg"].lerp_(tensor.grad, 1 - first)
                state["exp_avg_sq"].lerp_(tensor.grad.square().mean(), 1 - second)
                count = state["step"].item()
                mean = state["exp_avg"] / (1 - first**count)
                spread = (state["exp_avg_sq"] / (1 - second**count)).sqrt()
                tensor -= group["lr"] * mean / (spread + EPSILON)
