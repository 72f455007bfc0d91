"""The picture of what focus is: which tokens of a text need far context, and which heads they need.

    python benchmarks/focus_picture.py SCORES [--out results/heads/focus]

SCORES is a file of head scores of smollm2-135m. The text is kvbench's own source; of a row's lines,
those are shown that hold the most tokens of the focus.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench import escape
from kvbench.heads import read_scores
from kvbench.learning.focus import Focus
from kvbench.learning.rows import PackedRows, read_tokens
from kvbench.models.load import load_model

MODEL = "smollm2-135m"
TEXT = str(Path(__file__).parent.parent / "kvbench" / "engine")
LENGTH, SINKS, WINDOW, SHARE = 1536, 16, 128, 0.05
LINES, WIDTH = 15, 84  # of the text that is shown


def draw_text(axes: Axes, pieces: list[str], rises: list[float], chosen: list[bool]) -> None:
    """The lines that hold the most chosen tokens; the darker a token, the more its loss rises."""
    places: list[tuple[int, int, str, float]] = []  # line, column, text, rise
    hits: dict[int, int] = {}
    line = column = 0
    for piece, rise, is_chosen in zip(pieces, rises, chosen, strict=True):
        hits[line] = hits.get(line, 0) + is_chosen
        for number, part in enumerate(piece.split("\n")):
            if number:
                line, column = line + 1, 0
            if part.strip() and column + len(part) <= WIDTH:
                places.append((line, column, part, rise))
            column += len(part)
    counts = [
        sum(hits.get(line, 0) for line in range(first, first + LINES)) for first in range(line)
    ]
    first = int(np.argmax(counts))
    for at, column, part, rise in places:
        if first <= at < first + LINES:
            bare = part.lstrip()
            shade = min(1.0, max(0.0, rise) / 6)
            axes.text(
                column + len(part) - len(bare),
                at - first,
                bare.replace("$", r"\$"),
                family="monospace",
                fontsize=8.4,
                va="center",
                bbox={
                    "boxstyle": "square,pad=0.08",
                    "facecolor": (0.84, 0.37, 0.0, shade),
                    "edgecolor": "none",
                },
            )
    axes.set_xlim(-1, WIDTH + 1)
    axes.set_ylim(LINES - 0.4, -0.8)
    axes.axis("off")
    axes.set_title(
        "how much a token's loss rises if all heads stream (full colour: 6 nats)", fontsize=8
    )


def draw_shares(axes: Axes, rises: list[float]) -> None:
    """The share of the whole rise that the tokens with the largest rises hold."""
    ordered = np.sort(np.maximum(rises, 0))[::-1]
    share = np.cumsum(ordered) / ordered.sum()
    axes.plot(np.arange(1, len(share) + 1) / len(share) * 100, share * 100, color="#D55E00")
    at = share[round(SHARE * len(share)) - 1] * 100
    axes.axvline(SHARE * 100, color="#7F7F7F", linewidth=0.8, linestyle="--")
    axes.annotate(
        f"{SHARE * 100:.0f} % of the tokens:\n{at:.0f} % of the rise", (8, at - 12), fontsize=7
    )
    axes.set_xlabel("tokens, largest rise first (%)", fontsize=7)
    axes.set_ylabel("of the whole rise (%)", fontsize=7)
    axes.tick_params(labelsize=6.5)
    axes.set_xlim(0, 50)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_heads(axes: Axes, table: list[list[float]]) -> None:
    """The scores of all heads, layers from left to right."""
    axes.imshow(np.asarray(table).T, cmap="Oranges", aspect="auto")
    axes.set_xlabel("layer", fontsize=7)
    axes.set_ylabel("KV head", fontsize=7)
    axes.set_yticks(range(len(table[0])))
    axes.tick_params(labelsize=6.5)
    axes.set_title("the heads that PruLong keeps for them", fontsize=8)


def main() -> None:
    """Compute the rises of one row and write the picture as PNG and PDF."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/heads/focus"))
    parser.add_argument("--row", type=int, default=1)
    chosen = parser.parse_args()
    model = load_model(MODEL, device="cpu", dtype="bfloat16")
    tokens = read_tokens(TEXT, model.tokenizer, LENGTH * (chosen.row + 1), 0, least=LENGTH)
    ids = PackedRows(tokens, LENGTH, 1).row(chosen.row, 0).ids
    focus = Focus(SHARE, model.shape, SINKS, WINDOW, 1)
    counts = torch.ones(LENGTH, dtype=torch.bool)
    counts[-1] = False
    with torch.no_grad():
        rises = focus.rise(model.model, torch.tensor(ids), counts.nonzero()[:, 0]).tolist()
    marks = focus.choose(model.model, ids, counts)[:-1].tolist()
    pieces = [model.tokenizer.decode([token]) for token in ids]
    sets = read_scores(chosen.scores)
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2.2, 1), height_ratios=(1.5, 1))
    draw_text(figure.add_subplot(grid[:, 0]), pieces[1:], rises, marks)
    draw_shares(figure.add_subplot(grid[0, 1]), rises)
    draw_heads(figure.add_subplot(grid[1, 1]), sets[0].scores)
    with escape.drawing(figure):
        for kind, dated in (("png", "Software"), ("pdf", "CreationDate")):
            figure.savefig(chosen.out.with_suffix(f".{kind}"), dpi=160, metadata={dated: None})
    focused = np.mean(np.array(rises)[marks])
    print(f"the loss of the focus rises by {focused:.2f} nats, of all by {np.mean(rises):.2f} nats")


if __name__ == "__main__":
    main()
