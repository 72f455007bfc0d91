"""Small trainings of head scores."""

from typing import Any

import torch
from torch import Tensor

from kvbench.learning.examples import TrainingRow
from kvbench.learning.recipe import HeadRecipe, make_recipe
from kvbench.method import KVShape

SHAPE = KVShape(layers=3, kv_heads=2, query_heads=4, head_dim=8)  # of tests/helpers/models.py
BASIC = {"model": "m", "model_fingerprint": "f", "data": "d", "length": 40, "seed": 0}


class OneProcess:
    """The part of accelerate's Accelerator that `learn` uses, for one process."""

    is_main_process, process_index, num_processes = True, 0, 1

    @staticmethod
    def reduce(tensor: Tensor, how: str) -> Tensor:
        return tensor


class RandomRows:
    """Rows of random ids; every token is predicted."""

    data_hash = ""

    def __init__(self, length: int) -> None:
        self.length = length

    def row(self, step: int, index: int) -> TrainingRow:
        generator = torch.Generator().manual_seed(1000 * step + index)
        ids = torch.randint(1, 199, (self.length,), generator=generator).tolist()
        return TrainingRow(ids, [0] + [1] * (self.length - 1))


def recipe(method: str, **changes: Any) -> HeadRecipe:
    return make_recipe(method, {**BASIC, "sinks": 2, "window": 6, "batch": 4}, changes)


def quiet(line: dict[str, float]) -> None:
    """Print nothing."""
