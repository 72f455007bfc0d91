"""Learning on the tokens that need far context, at an exact sparsity, and by gradient alone."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from helpers.devices import Apart, split_model
from helpers.learning import SHAPE, OneProcess, RandomRows, quiet, recipe
from helpers.models import loaded_model, plain_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from kvbench.learning.attention import GatedAttention
from kvbench.learning.duoattention import DuoAttention
from kvbench.learning.examples import TrainingRow
from kvbench.learning.focus import Focus, token_losses
from kvbench.learning.loop import learn
from kvbench.learning.masks import expected_sparsity, shifted_to, zero_probability
from kvbench.learning.objective import forward
from kvbench.learning.optimizer import SharedAdam
from kvbench.learning.prulong import BOUND, PruLong
from kvbench.learning.saliency import Saliency
from kvbench.models.load import LoadedModel

CPU, DEVICE = torch.device("cpu"), torch.device("cpu:1")


class Counting:
    """A model that counts its calls."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.model(*args, **kwargs)

    def parameters(self) -> Any:
        return self.model.parameters()


def frozen() -> LoadedModel:
    model = loaded_model()
    model.model.requires_grad_(False)
    return model


def losses(model: Any, ids: list[int], gate: float | None) -> list[float]:
    """The loss of each token after the first, one prefix after another."""
    gates = None if gate is None else torch.full((SHAPE.layers, 1, SHAPE.kv_heads), gate)
    found = []
    for end in range(1, len(ids)):
        logits = forward(model, torch.tensor([ids[:end]]), GatedAttention(gates, 2, 6)).logits
        found.append(float(cross_entropy(logits[0, -1], torch.tensor(ids[end]))))
    return found


def test_the_tokens_whose_loss_rises_most_are_chosen() -> None:
    model = frozen().model
    ids = RandomRows(40).row(0, 0).ids
    allowed = [place for place in range(39) if place % 3]
    counts = torch.zeros(40, dtype=torch.bool)
    counts[allowed] = True
    with torch.no_grad():
        rise = [
            s - f for s, f in zip(losses(model, ids, 0.0), losses(model, ids, None), strict=True)
        ]
    expected = sorted(sorted(allowed, key=lambda place: -rise[place])[:5])
    focus = Focus(0.2, SHAPE, sinks=2, window=6, chunk=1)  # 26 tokens are allowed
    chosen = focus.choose(model, ids, counts)
    assert chosen.nonzero()[:, 0].tolist() == expected
    assert rise[expected[0]] > 0.01


def test_a_row_that_comes_again_costs_nothing() -> None:
    model, focus = Counting(frozen().model), Focus(0.1, SHAPE, sinks=2, window=6, chunk=1)
    counts = torch.ones(40, dtype=torch.bool)
    counts[-1] = False
    first, other = RandomRows(40).row(0, 0).ids, RandomRows(40).row(0, 1).ids
    once = focus.choose(model, first, counts)
    assert model.calls == 2
    assert torch.equal(focus.choose(model, first, counts), once)
    assert model.calls == 2
    assert not torch.equal(focus.choose(model, other, counts), once)
    assert model.calls == 4
    counts[10:] = False
    assert focus.choose(model, first, counts).nonzero().max() < 10


def test_the_loss_of_focus_is_that_of_the_chosen_tokens() -> None:
    model = frozen().model
    rows = [RandomRows(40).row(0, 0), RandomRows(31).row(0, 1)]
    objective = PruLong(SHAPE, recipe("prulong", focus=0.1), CPU)
    gates = objective.gates(0, [0, 1])
    expected = torch.zeros(())
    for index, row in enumerate(rows):
        ids = torch.tensor([row.ids])
        counts = torch.ones(len(row.ids), dtype=torch.bool)
        counts[-1] = False
        focus = Focus(0.1, SHAPE, sinks=2, window=6, chunk=1)
        chosen = focus.choose(model, row.ids, counts)
        logits = forward(model, ids, GatedAttention(gates[:, index, None], 2, 6)).logits[0, :-1]
        each = cross_entropy(logits, ids[0, 1:], reduction="none")
        expected = expected + each[chosen[:-1]].mean()
    torch.testing.assert_close(objective.data_loss(model, rows, 0, [0, 1]), expected)


def test_a_long_row_is_looked_at_once_though_few_of_its_tokens_count() -> None:
    model = Counting(frozen().model)
    objective = PruLong(SHAPE, recipe("prulong", focus=0.2, loss_tokens=20), CPU)
    row = RandomRows(60).row(0, 0)
    objective.data_loss(model, [row], 0, [0])
    assert model.calls == 3  # full attention, streaming attention, the masks'
    objective.data_loss(model, [row], 1, [0])
    assert model.calls == 4


def test_losses_by_blocks_are_the_losses() -> None:
    model = frozen().model
    ids = torch.tensor([RandomRows(600).row(0, index).ids for index in range(2)])
    places = torch.arange(0, 599, 2)
    full = GatedAttention(None, 2, 6)
    logits = forward(model, ids, full).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    found = token_losses(model, ids, full, places)
    torch.testing.assert_close(found, expected.view(2, 599)[:, places])


def test_heads_without_weight_change_neither_attention_nor_gradients() -> None:
    net = frozen().model
    ids = torch.tensor([RandomRows(60).row(0, index).ids for index in range(2)])
    gates = torch.rand(SHAPE.layers, 2, SHAPE.kv_heads, generator=torch.Generator().manual_seed(1))
    gates[0, 0], gates[1, 1, 0], gates[2, 0, 1], gates[2, 1] = 0.0, 1.0, 0.0, 1.0
    found: list[tuple[Tensor, Tensor]] = []
    for fixed in (False, True):
        leaf = gates.clone().requires_grad_()
        logits = forward(net, ids, GatedAttention(leaf, 2, 6, chunk=4, fixed=fixed)).logits
        logits.square().mean().backward()
        assert leaf.grad is not None
        found.append((logits, torch.where((gates > 0) & (gates < 1), leaf.grad, 0)))
    torch.testing.assert_close(found[0], found[1])
    assert found[1][1].abs().max() > 1e-4


# Exact sparsity


@pytest.mark.parametrize("target", [0.01, 0.3, 0.5, 0.7, 0.8])
def test_a_shift_meets_the_target_and_keeps_the_order(target: float) -> None:
    log_alpha = torch.randn(30, 3, generator=torch.Generator().manual_seed(2)) * 2
    shifted = shifted_to(log_alpha, target, BOUND)
    assert expected_sparsity(shifted).item() == pytest.approx(target, abs=1e-5)
    inside = shifted.abs() < BOUND
    shifts = (shifted - log_alpha)[inside]
    torch.testing.assert_close(shifts, shifts[:1].expand_as(shifts))
    assert inside.sum() > 30


def test_a_target_beyond_the_bound_is_met_as_nearly_as_it_can_be() -> None:
    shifted = shifted_to(torch.zeros(2, 2), 0.0, BOUND)
    assert torch.equal(shifted, torch.full((2, 2), BOUND))
    assert torch.equal(shifted_to(torch.zeros(2, 2), 1.0, BOUND), -shifted)


def test_shared_adam_keeps_gradients_relative_size() -> None:
    tensor = torch.zeros(2, requires_grad=True)
    optimizer = SharedAdam([{"params": [tensor], "lr": 0.5}])
    tensor.grad = torch.tensor([3.0, 1.0])
    optimizer.step()  # the means are the gradient itself, the second moment (9 + 1) / 2
    first = -0.5 * torch.tensor([3.0, 1.0]) / 5**0.5
    torch.testing.assert_close(tensor.detach(), first)
    tensor.grad = torch.tensor([-1.0, 2.0])
    optimizer.step()
    mean = (0.9 * 0.1 * torch.tensor([3.0, 1.0]) + 0.1 * torch.tensor([-1.0, 2.0])) / (1 - 0.9**2)
    second = (0.999 * 0.001 * 5 + 0.001 * 2.5) / (1 - 0.999**2)
    torch.testing.assert_close(tensor.detach(), first - 0.5 * mean / second**0.5)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7, 0.8])
def test_exact_masks_follow_their_target_at_every_step(target: float, tmp_path: Path) -> None:
    how = recipe("prulong", target=target, steps=40, constraint="exact", rate=0.5)
    model = frozen()
    objective = PruLong(SHAPE, how, CPU)
    log = learn(model.model, objective, RandomRows(24), how, tmp_path, OneProcess, quiet)
    # Below log_alpha's upper bound P(mask = 0) is at least 0.002, at the start 0.004.
    assert all(abs(line["sparsity"] - line["target"]) < 0.005 for line in log)
    assert expected_sparsity(objective.log_alpha).item() == pytest.approx(target, abs=1e-5)
    assert set(log[0]) == {"step", "loss", "sparsity", "target", "seconds"}


def test_a_gradient_that_all_heads_share_moves_nothing() -> None:
    objective = PruLong(SHAPE, recipe("prulong", constraint="exact"), CPU)
    objective.log_alpha.data += torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    (common,) = torch.autograd.grad(objective.log_alpha.sum(), objective.log_alpha)
    assert common.abs().max() < 1e-6
    (alone,) = torch.autograd.grad(objective.log_alpha[0, 0], objective.log_alpha)
    zero = zero_probability(objective.log_alpha.detach())
    change = (zero * (1 - zero) * alone).sum()  # of the sparsity
    assert abs(change) < 1e-7
    assert alone[0, 0] > 0.5


def test_a_broken_training_with_focus_goes_on_to_the_same_end(tmp_path: Path) -> None:
    def train(folder: Path, stop: int | None) -> Tensor:
        how = recipe("prulong", steps=9, focus=0.2, constraint="exact", rate=0.3)
        model = frozen()
        objective = PruLong(SHAPE, how, CPU)

        def show(line: dict[str, float]) -> None:
            if line["step"] == stop:
                raise KeyboardInterrupt

        learn(model.model, objective, RepeatedRows(), how, folder, OneProcess, show)
        return objective.log_alpha.detach()

    whole = train(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", 5)
    assert torch.equal(train(tmp_path / "broken", None), whole)
    assert zero_probability(whole).std() > 0


class RepeatedRows:
    """Three rows that come again and again."""

    data_hash = ""

    def row(self, step: int, index: int) -> TrainingRow:
        return RandomRows(30).row(0, (step * 4 + index) % 3)


# Saliency


def test_saliency_is_the_rise_of_the_loss_to_first_order(tmp_path: Path) -> None:
    model = frozen()
    how = recipe("saliency", steps=3, batch=2, focus=0.5)
    objective = Saliency(SHAPE, how, CPU)
    log = learn(model.model, objective, RandomRows(40), how, tmp_path, OneProcess, quiet)
    rises = torch.zeros(SHAPE.layers, SHAPE.kv_heads)
    for step in range(3):
        for index in range(2):
            row = RandomRows(40).row(step, index)
            ids, counts = torch.tensor([row.ids]), torch.ones(40, dtype=torch.bool)
            counts[-1] = False
            places = Focus(0.5, SHAPE, 2, 6, 1).choose(model.model, row.ids, counts).nonzero()[:, 0]
            for layer in range(SHAPE.layers):
                for head in range(SHAPE.kv_heads):
                    less, more = (torch.ones(SHAPE.layers, 1, SHAPE.kv_heads) for _ in range(2))
                    less[layer, 0, head] -= 0.01
                    more[layer, 0, head] += 0.01
                    rise, fall = (
                        token_losses(model.model, ids, GatedAttention(g, 2, 6), places).mean()
                        for g in (less, more)
                    )
                    rises[layer, head] += (rise - fall) / 0.02 / 6
    torch.testing.assert_close(objective.scores(), rises, atol=1e-4, rtol=2e-2)
    assert rises.abs().max() > 1e-3
    assert set(log[0]) == {"step", "loss", "seconds"}


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (PruLong, {"focus": 0.2, "constraint": "exact"}),
        (PruLong, {}),
        (Saliency, {"focus": 0.2}),
        (DuoAttention, {}),
    ],
)
def test_a_training_on_another_device_learns_the_same(kind: Any, given: dict[str, Any]) -> None:
    how = recipe(kind.__name__.lower(), steps=2, rate=0.1, **given)

    def learnt(model: Any, device: torch.device) -> Tensor:
        model.requires_grad_(False)
        objective = kind(SHAPE, how, device)
        with TemporaryDirectory() as folder:
            learn(model, objective, RandomRows(40), how, Path(folder), OneProcess, quiet)
        scores: Tensor = objective.scores()
        return scores

    with Apart():
        elsewhere = learnt(split_model(plain_model(), [1] * SHAPE.layers).model, DEVICE)
        assert elsewhere.device == DEVICE
        found = elsewhere.tolist()
    assert found == learnt(loaded_model().model, CPU).tolist()


def test_scores_at_an_exact_sparsity_are_the_mean_over_all_steps() -> None:
    how = recipe("prulong", steps=3, constraint="exact", target=0.5)
    objective, passed = PruLong(SHAPE, how, CPU), []
    for step in range(3):
        with torch.no_grad():
            objective.log_alpha += torch.randn(SHAPE.layers, SHAPE.kv_heads)
        objective.settle(step)
        passed.append(objective.log_alpha.detach().clone())
    torch.testing.assert_close(objective.scores(), torch.stack(passed).mean(0))
    paper = PruLong(SHAPE, recipe("prulong", steps=3), CPU)
    paper.settle(0)
    assert paper.scores().equal(paper.log_alpha.detach())
