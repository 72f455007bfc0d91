"""Pictures of a training of head scores: the map of the heads, and the course of the training."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvbench import escape
from kvbench.files import write_together
from kvbench.heads import Table, retrieval_heads
from kvbench.learning.recipe import HeadRecipe

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7F7F7F"
BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
MOST_NUMBERED = 200  # heads; larger maps have no numbers in their squares
SMOOTHING = 0.05  # share of the steps over which the drawn loss is averaged


def save_training_pictures(
    log: Sequence[dict[str, float]], scores: Table, path: Path, recipe: HeadRecipe
) -> list[Path]:
    """Write the picture of a training as PNG and PDF at `path`; returns the files."""
    layers, heads = len(scores), len(scores[0])
    figure = Figure(figsize=(9.6, max(3.2, 1.6 + 0.16 * layers)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(max(2.2, 0.22 * heads), 4.2))
    draw_map(left, scores)
    draw_log(right, log, recipe)
    goal = f", target sparsity {recipe.target:g}" if recipe.target is not None else ""
    figure.suptitle(
        f"{recipe.method} on {recipe.model}{goal}: {recipe.steps} steps, seed {recipe.seed}",
        fontsize=11,
    )
    files: dict[Path, str | bytes] = {}
    for kind, dated in (("png", "Software"), ("pdf", "CreationDate")):
        drawn = BytesIO()
        with escape.drawing(figure):
            figure.savefig(drawn, format=kind, dpi=160, metadata={dated: None})
        files[path.with_suffix(f".{kind}")] = drawn.getvalue()
    write_together(files)
    return list(files)


def smallest_budgets(scores: Table) -> npt.NDArray[np.float64]:
    """The smallest of `BUDGETS` at which each head is a retrieval head [L, K], 1 if at none."""
    smallest = np.ones((len(scores), len(scores[0])))
    for budget in sorted(BUDGETS, reverse=True):
        for place in retrieval_heads(scores, budget):
            smallest[place] = budget
    return smallest


def draw_map(axes: Axes, scores: Table) -> None:
    """Layers by KV heads; darker heads keep their whole cache at smaller budgets."""
    budgets = smallest_budgets(scores)
    layers, heads = budgets.shape
    axes.imshow(1 - budgets, cmap="Blues", vmin=-0.1, vmax=1.1, aspect="auto")
    if budgets.size <= MOST_NUMBERED:
        for (layer, head), budget in np.ndenumerate(budgets):
            text = f"{budget:g}" if budget < 1 else "-"
            color = "white" if budget < 0.45 else "black"
            axes.text(head, layer, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_title("smallest budget that makes it a retrieval head", fontsize=9)
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(heads, 10)))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 16)))


def draw_log(axes: Axes, log: Sequence[dict[str, Any]], recipe: HeadRecipe) -> None:
    """The loss on the left axis; the sparsity, and its target if it has one, on the right axis."""
    lines = pd.DataFrame(log, columns=["step", "loss", "sparsity", "target"])
    smooth = lines["loss"].ewm(alpha=1 / max(1.0, SMOOTHING * len(lines)), adjust=False).mean()
    axes.plot(lines["step"], lines["loss"], color=BLUE, linewidth=0.4, alpha=0.35)
    axes.plot(lines["step"], smooth, color=BLUE, linewidth=1.4)
    axes.set_ylabel("loss of the data", color=BLUE)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.set_title("training", fontsize=9)
    axes.spines["top"].set_visible(False)
    if lines["sparsity"].isna().all():
        return  # no heads are chosen
    other = axes.twinx()
    other.plot(lines["step"], lines["sparsity"], color=ORANGE, linewidth=1.4)
    if recipe.target is not None:
        other.plot(lines["step"], lines["target"], color=GREY, linestyle="--")
    other.set_ylim(0, 1)
    other.set_ylabel("sparsity" + (" (dashed: target)" if recipe.target else ""), color=ORANGE)
    other.spines["top"].set_visible(False)
