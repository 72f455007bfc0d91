"""Hard-concrete masks and the sparsity constraint on them (2506.17121, section 4).

The distribution is that of Louizos et al. (1712.01312): a binary concrete variable stretched to
(-0.1, 1.1) and clamped to [0, 1], so that exactly 0 and exactly 1 have positive probability.
"""

import math

import torch
from torch import Tensor

TEMPERATURE = 2 / 3  # beta
LOW, HIGH = -0.1, 1.1
EDGE = 1e-6  # keeps the uniform noise away from 0 and 1


def hard_concrete(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Masks in [0, 1] from uniform noise in [0, 1]; the arguments broadcast."""
    noise = uniform.clamp(EDGE, 1 - EDGE)
    gate = torch.sigmoid((noise.log() - (-noise).log1p() + log_alpha) / TEMPERATURE)
    return (gate * (HIGH - LOW) + LOW).clamp(0, 1)


def zero_probability(log_alpha: Tensor) -> Tensor:
    """P(mask = 0), in closed form."""
    return torch.sigmoid(TEMPERATURE * math.log(-LOW / HIGH) - log_alpha)


def expected_sparsity(log_alpha: Tensor) -> Tensor:
    """The expected share of streaming heads: the mean of P(mask = 0).

    The closed form has no sampling noise, unlike one minus the mean of sampled masks. It also
    counts only heads that stream entirely, which is what eviction does with them afterwards.
    """
    return zero_probability(log_alpha).mean()


def constraint(sparsity: Tensor, target: float, multipliers: Tensor) -> Tensor:
    """`l1 (s - t) + l2 (s - t)^2`, added to the loss; the multipliers [2] ascend on it."""
    gap = sparsity - target
    return multipliers[0] * gap + multipliers[1] * gap**2


def shifted_to(log_alpha: Tensor, target: float, bound: float) -> Tensor:
    """`log_alpha` plus one constant, within `bound`, so that the expected sparsity is `target`.

    The constant is found by bisection. Where the bound does not let the sparsity be the target, it
    is as near as it can be.
    """
    low, high = -2 * bound, 2 * bound  # all heads at the lower bound, all at the upper
    exact = log_alpha.double()
    for _ in range(60):
        shift = (low + high) / 2
        if expected_sparsity((exact + shift).clamp(-bound, bound)) > target:
            low = shift
        else:
            high = shift
    return (exact + high).clamp(-bound, bound).to(log_alpha.dtype)


def target_at(step: int, steps: int, final: float, ramp: float = 0.8) -> float:
    """The sparsity target at a step: from 0 to `final`, linear over the first `ramp` of steps."""
    return final * min(1.0, step / max(1.0, ramp * steps))
