"""Pictures of a training of head scores: the map of the heads, and how they were learnt."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvbench.heads import retrieval_heads
from kvbench.learning.recipe import Recipe

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7F7F7F"
BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
MOST_NUMBERED = 200  # heads; more are drawn without the number in their square


def save_training_pictures(
    log: Sequence[dict[str, float]],
    scores: Sequence[Sequence[float]],
    path: Path,
    recipe: Recipe,
) -> list[Path]:
    """Write the picture of a training as PNG and PDF at `path`; returns the files."""
    layers, heads = len(scores), len(scores[0])
    figure = Figure(figsize=(9.6, max(3.2, 1.6 + 0.16 * layers)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(max(2.2, 0.22 * heads), 4.2))
    draw_map(left, [list(row) for row in scores])
    draw_log(right, log, recipe)
    goal = f", target sparsity {recipe.target:g}" if recipe.target is not None else ""
    figure.suptitle(
        f"{recipe.method} on {recipe.model}{goal}: {recipe.steps} steps, seed {recipe.seed}",
        fontsize=11,
    )
    files = [path.with_suffix(".png"), path.with_suffix(".pdf")]
    for file in files:
        dated = {"Software": None} if file.suffix == ".png" else {"CreationDate": None}
        figure.savefig(file, dpi=160, metadata=dated)
    return files


def draw_map(axes: Axes, scores: list[list[float]]) -> None:
    """Layers by KV heads; a square says the smallest budget at which its head is a retrieval head.

    Darker heads are kept first.
    """
    layers, heads = len(scores), len(scores[0])
    first = [[1.0] * heads for _ in range(layers)]
    for budget in sorted(BUDGETS, reverse=True):
        for layer, head in retrieval_heads(scores, budget):
            first[layer][head] = budget
    axes.imshow(
        [[1 - b for b in row] for row in first], cmap="Blues", vmin=-0.1, vmax=1.1, aspect="auto"
    )
    if layers * heads <= MOST_NUMBERED:
        for layer in range(layers):
            for head in range(heads):
                budget = first[layer][head]
                axes.text(
                    head,
                    layer,
                    f"{budget:g}" if budget < 1 else "-",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if budget < 0.45 else "black",
                )
    axes.set_title("retrieval head from which budget on", fontsize=9)
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(heads, 10)))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 16)))


def draw_log(axes: Axes, log: Sequence[dict[str, float]], recipe: Recipe) -> None:
    """Loss on the left axis; sparsity, and its target where it has one, on the right one."""
    steps = [line["step"] for line in log]
    losses = [line["loss"] for line in log]
    axes.plot(steps, losses, color=BLUE, linewidth=0.4, alpha=0.35)
    axes.plot(steps, smoothed(losses), color=BLUE, linewidth=1.4)
    axes.set_ylabel("loss of the data", color=BLUE)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.plot(steps, [line["sparsity"] for line in log], color=ORANGE, linewidth=1.4)
    if recipe.target is not None:
        other.plot(steps, [line["target"] for line in log], color=GREY, linestyle="--")
    other.set_ylim(0, 1)
    other.set_ylabel("sparsity" + (" (dashed: target)" if recipe.target else ""), color=ORANGE)
    for each in (axes, other):
        each.spines["top"].set_visible(False)
    axes.set_title("training", fontsize=9)


def smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """An exponential running mean over about `share` of the values."""
    keep = 1 - 1 / max(1.0, share * len(values))
    result: list[float] = []
    for value in values:
        result.append(keep * result[-1] + (1 - keep) * value if result else value)
    return result
