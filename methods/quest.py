"""Quest: dynamic sparsity by pages."""

from dataclasses import dataclass, field

from kvbench.method import Family, KVShape, Method, Pages
from kvbench.registry import register_method


@register_method("quest")
@dataclass(frozen=True)
class Quest(Method):
    """Read the pages that may fit the query best, evict nothing (Tang et al., arXiv 2406.10774)."""

    family = Family.DYNAMIC_SPARSITY
    page: int = field(default=16, metadata={"help": "Entries of a page."})
    least: int = field(default=3, metadata={"help": "Pages that are read at any budget."})
    dense: int = field(default=2, metadata={"help": "First layers, which read everything."})

    def __post_init__(self) -> None:
        self.check(self.page >= 1, f"page must be at least 1, not {self.page}")
        self.check(self.least >= 1, f"least must be at least 1, not {self.least}")
        self.check(self.dense >= 0, f"dense must be at least 0, not {self.dense}")

    def pages(self, shape: KVShape, layer: int, budget: float) -> Pages | None:
        """The budget's share of the pages; everything in the first layers."""
        return None if layer < self.dense else Pages(self.page, budget, self.least)
