"""Prompts, method specs and views for tests of the engine."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kvbench.engine.row import Row, policy_of
from kvbench.errors import InputError
from kvbench.method import Entries, LayerView, Need
from kvbench.models.load import LoadedModel
from kvbench.registry import methods
from kvbench.spec import MethodSpec, parse_method

SCORES = Path(__file__).parent.parent / "data" / "scores.tsv"


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 199, (count,), generator=generator).tolist()


def spec(name: str, window: int = 6, interval: int = 3) -> MethodSpec:
    """A method with windows for short prompts, and with head scores if it needs them."""
    options: dict[str, Any] = {"window": window, "interval": interval, "dense": 1, "page": 4}
    options |= {"least": 1}
    for split in ("prulong", "duoattention", "saliency-heads"):
        options |= {f"{split}.scores": str(SCORES), f"{split}.sinks": 2, f"{split}.window": 7}
    return parse_method(name, options)


def scores_tie(name: str, held: float) -> bool:
    """Whether a method that holds `held` entries may choose between scores equal but for rounding.

    Two keys are equally far from their mean; and what always stays has the same score in all KV
    heads, which compete.
    """
    if name.startswith("ada-") and methods.get(name.removeprefix("ada-")).ties_by_topk:
        return True
    return "keydiff" in name and held < 2


def measurable(names: Iterable[str], model: LoadedModel) -> list[str]:
    """The methods that can be measured on a model."""
    found = []
    for name in names:
        try:
            policy_of(model, Row(tokens(30), 4, spec(name), 0.5), None)
        except InputError:
            assert any(layer.limit for layer in model.layers), name
        else:
            found.append(name)
    return found


def without_replay(names: Iterable[str]) -> list[str]:
    """The methods that the engine's reference measures: it reads a prompt only once."""
    scorers = {name: spec(name).scorer for name in names}
    return [name for name, each in scorers.items() if not each or Need.REPLAY not in each.needs]


def view_of(prompt: int, window: int, layer: int, layers: int) -> LayerView:
    """A view without any content, for capacities."""
    empty = torch.empty(1, prompt, 0)
    positions = torch.arange(prompt)[None]
    return LayerView(
        blocks=[[Entries(empty, empty, positions)]],
        queries=torch.empty(1, 1, min(window, prompt), 0),
        query_positions=torch.arange(max(0, prompt - window), prompt),
        scaling=1.0,
        kv_heads=(0,),
        layer=layer,
        layers=layers,
        prompt=prompt,
        new=prompt,
        patched=0,
        last=True,
        generator=torch.Generator(),
    )
