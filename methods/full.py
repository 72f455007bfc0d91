"""Full attention."""

from dataclasses import dataclass

from kvbench.method import Family, Method
from kvbench.registry import register_method


@register_method("full")
@dataclass(frozen=True)
class Full(Method):
    """Keep every entry: the baseline for every other method."""

    family = Family.FULL
