"""Training the embedded model: a few steps from the shipped weights."""

import json
from pathlib import Path

import pytest

from kvbench.errors import InputError
from kvbench.learning.examples import ExampleMaker, padded
from kvbench.learning.recipe import TinyRecipe
from kvbench.learning.tiny import Progress, draw_examples, train_tiny
from kvbench.models.card import EMBEDDED
from kvbench.models.load import load_model

STAGES = TinyRecipe().stages


def test_a_training_writes_a_model_that_loads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = TinyRecipe(minutes=1e-4, tokens_a_step=192)
    progress = train_tiny(recipe, tmp_path / "new", lambda text: None, EMBEDDED["tiny"])
    assert progress.step >= 1
    assert set(progress.accuracy) <= set(ExampleMaker(load_model("tiny").tokenizer, 0).subtasks)
    assert json.loads((tmp_path / "new" / "recipe.json").read_text())["tokens_a_step"] == 192
    assert (tmp_path / "new" / "log.jsonl").is_file()
    assert load_model(str(tmp_path / "new")).shape == load_model("tiny").shape
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --out"):
        train_tiny(TinyRecipe(), tmp_path / "file" / "out", lambda text: None)


def test_a_stage_ends_when_its_worst_subtask_is_learnt_or_its_time_is_over() -> None:
    recipe = TinyRecipe()
    for accuracy, done, steps, stage in (
        (0.95, 0.0, 100, 1),
        (0.95, 0.0, 99, 0),  # too few steps
        (0.5, 0.0, 100, 0),
        (0.5, 0.9 * recipe.growth, 100, 1),
    ):
        progress = Progress(step=steps, accuracy={"a/b": 1.0, "c/d": accuracy})
        progress.maybe_next_stage(recipe, done)
        assert progress.stage == stage
    last = Progress(step=1000, stage=len(STAGES) - 1, accuracy={"a/b": 1.0})
    last.maybe_next_stage(recipe, 1.0)
    assert last.stage == len(STAGES) - 1


@pytest.mark.parametrize("stage", [3, 6])
def test_examples_fit_the_stage_and_mark_their_answers(stage: int) -> None:
    tokenizer = load_model("tiny").tokenizer
    maker = ExampleMaker(tokenizer, tokenizer.eos_token_id)
    examples = draw_examples(TinyRecipe(), Progress(stage=stage), maker)
    ids, answers = padded(examples, tokenizer.pad_token_id)
    assert ids.shape == answers.shape
    assert ids.shape[0] >= TinyRecipe().tokens_a_step // STAGES[stage]
    for example, next_answers in zip(examples, answers.tolist(), strict=True):
        assert len(example.ids) <= STAGES[stage]
        assert next_answers[: len(example.ids) - 1] == example.answers[1:]
        assert not any(next_answers[len(example.ids) - 1 :])
        number = max(example.answers)
        assert set(example.answers) == set(range(number + 1))
        ends = [i for i, id in enumerate(example.ids) if id == tokenizer.eos_token_id]
        assert [example.answers[i] for i in ends] == list(range(1, number + 1))
