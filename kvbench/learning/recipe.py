"""What determines learnt head scores, and what is saved of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The settings of one training; saved with the scores (ALGORITHMS, section 6)."""

    method: str  # prulong or duoattention
    model: str
    model_fingerprint: str
    data: str
    length: int  # tokens of a row, for duoattention of the longest
    steps: int
    batch: int  # rows a step, over all processes
    rate: float  # Adam's, at its highest
    warm_up: float  # share of the steps; the rate then falls linearly to zero
    sinks: int
    window: int
    seed: int
    target: float | None = None  # prulong: sparsity to reach
    loss_tokens: int = 8192  # prulong: tokens predicted in a row, drawn at random if it has more
    weights_rate: float = 0.0  # prulong: Adam's for the model's weights, 0 to freeze them
    l1: float | None = None  # duoattention: weight of the mean gate
    passkeys: int | None = None  # duoattention: in a row, at most
    passkey_words: int | None = None  # duoattention

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0 on, as a share of its highest."""
        warm = max(1.0, self.warm_up * self.steps)
        return min((step + 1) / warm, (self.steps - step) / max(1.0, self.steps - warm), 1.0)
