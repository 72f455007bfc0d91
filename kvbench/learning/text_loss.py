"""Next-token loss on rows of text, with gated attention: what PruLong and saliency learn from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.errors import InputError
from kvbench.learning.attention import GatedAttention
from kvbench.learning.examples import TrainingRow, padded
from kvbench.learning.focus import Focus, token_losses
from kvbench.learning.objective import seeded
from kvbench.learning.recipe import HeadRecipe
from kvbench.method import KVShape


def make_focus(recipe: HeadRecipe, shape: KVShape) -> Focus | None:
    """What chooses the tokens of the loss; None if all of them count."""
    assert recipe.focus is not None
    if recipe.focus == 1:
        return None
    return Focus(recipe.focus, shape, recipe.sinks, recipe.window, recipe.train_chunk)


def text_loss(
    model: Any,
    rows: Sequence[TrainingRow],
    step: int,
    recipe: HeadRecipe,
    attention: GatedAttention,
    focus: Focus | None,
) -> Tensor:
    """The sum over rows of the next-token cross-entropy, averaged over a row's counted tokens.

    InputError if no token counts.
    """
    device = next(model.parameters()).device
    ids, answers = (tensor.to(device) for tensor in padded(rows))
    assert recipe.loss_tokens is not None
    # With a focus the draw is the same at all steps, so that a row's choice can be kept.
    draw = 0 if focus else step
    drawn = drawn_places(answers.shape[1], recipe.loss_tokens, recipe.seed, draw)
    counts = (answers > 0) & drawn.to(device)
    if not counts.any():
        raise InputError(
            f"step {step} has no token to predict: {recipe.loss_tokens} of "
            f"{answers.shape[1]} tokens were drawn for the loss, and no answer is among them; "
            "give a larger --option loss_tokens"
        )
    if focus:
        for index, row in enumerate(rows):
            length = len(row.ids)
            counts[index, :length] = focus.choose(model, row.ids, counts[index, :length])
    places = counts.any(0).nonzero()[:, 0]
    each = token_losses(model, ids, attention, places)
    counted = counts[:, places]
    return ((each * counted).sum(1) / counted.sum(1).clamp(min=1)).sum()


def drawn_places(length: int, most: int, seed: int, step: int) -> Tensor:
    """Which places [T] may count: the logits of a whole long row need much memory."""
    chosen = torch.zeros(length, dtype=torch.bool)
    order = torch.randperm(length, generator=seeded(seed, step))
    chosen[order[:most]] = True
    return chosen
