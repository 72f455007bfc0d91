"""Recency eviction: attention sinks and a recent window."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbench.method import Family, KVShape, Method, Window
from kvbench.registry import register_method


@register_method("recency")
@dataclass(frozen=True)
class Recency(Method):
    """Keep attention sinks and a recent window (StreamingLLM, Xiao et al., arXiv 2309.17453)."""

    family = Family.RECENCY
    sinks: int = field(default=4, metadata={"help": "First entries that always stay."})

    def __post_init__(self) -> None:
        self.check(self.sinks >= 0, f"sinks must be at least 0, not {self.sinks}")

    def windows(
        self, shape: KVShape, budget: float, prompt: int
    ) -> Sequence[Sequence[Window | None]]:
        """The same window for all KV heads: `budget * prompt` entries, sinks included."""
        window = Window(self.sinks, max(1, round(budget * prompt) - self.sinks))
        return [[window] * shape.kv_heads] * shape.layers
