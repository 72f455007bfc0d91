"""Hard-concrete masks and the sparsity constraint on them (ALGORITHMS, section 6b).

The distribution is that of Louizos et al. (1712.01312): a binary concrete variable stretched to
(-0.1, 1.1) and clamped, so that 0 and 1 have probability of their own.
"""

import math

import torch
from torch import Tensor

TEMPERATURE = 2 / 3  # beta
LOW, HIGH = -0.1, 1.1
EDGE = 1e-6  # keeps the uniform noise off 0 and 1


def hard_concrete(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Masks in [0, 1] from noise of the unit interval; both broadcast."""
    noise = uniform.clamp(EDGE, 1 - EDGE)
    gate = torch.sigmoid((noise.log() - (-noise).log1p() + log_alpha) / TEMPERATURE)
    return (gate * (HIGH - LOW) + LOW).clamp(0, 1)


def zero_probability(log_alpha: Tensor) -> Tensor:
    """P(mask = 0), in closed form."""
    return torch.sigmoid(TEMPERATURE * math.log(-LOW / HIGH) - log_alpha)


def expected_sparsity(log_alpha: Tensor) -> Tensor:
    """The share of heads expected to stream: the mean of P(mask = 0).

    The closed form, and not one minus the mean of the sampled masks: it has no sampling noise, so
    the multipliers answer to the parameters alone, and it counts heads that stream entirely, which
    is what eviction does with them afterwards.
    """
    return zero_probability(log_alpha).mean()


def constraint(sparsity: Tensor, target: float, multipliers: Tensor) -> Tensor:
    """`l1 (s - t) + l2 (s - t)^2`, to be added to the loss; multipliers [2] ascend on it."""
    gap = sparsity - target
    return multipliers[0] * gap + multipliers[1] * gap**2


def target_at(step: int, steps: int, final: float, ramp: float = 0.8) -> float:
    """The sparsity target at a step: from 0 to `final`, linear over the first `ramp` of steps."""
    return final * min(1.0, step / max(1.0, ramp * steps))
