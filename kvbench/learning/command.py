"""Training head scores, from a user's choices to a file of scores.

Behind `kvbench train prulong`, `duoattention` and `saliency`. The steps are: load the model
(`kvbench.models`), fix the recipe (`recipe.py`), make the data (`rows.py`), train (`loop.py`, with
the objective of the module of that name), write scores and pictures.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import kvbench
from kvbench.engine.self_check import self_check
from kvbench.errors import InputError
from kvbench.files import write_atomically
from kvbench.heads import Table
from kvbench.learning.checkpoint import holding, save_model, seconds_of, writing
from kvbench.learning.corpus import STANDARD_LIBRARY
from kvbench.learning.duoattention import DuoAttention
from kvbench.learning.loop import learn
from kvbench.learning.objective import Objective
from kvbench.learning.pictures import save_training_pictures
from kvbench.learning.prulong import PruLong
from kvbench.learning.recipe import HeadRecipe, make_recipe
from kvbench.learning.rows import Rows, make_rows
from kvbench.learning.saliency import Saliency
from kvbench.method import KVShape
from kvbench.models.card import model_folder, read_card
from kvbench.models.load import LoadedModel, load_model

OBJECTIVES: dict[str, Callable[[KVShape, HeadRecipe, torch.device], Objective]] = {
    "prulong": PruLong,
    "duoattention": DuoAttention,
    "saliency": Saliency,
}
METHODS = {"saliency": "saliency-heads"}  # what uses the scores, where it has another name
LONGEST = 8192  # tokens of a row, for a model whose card gives no length
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class HeadChoices:
    """A user's choices for a training of head scores."""

    method: str  # prulong, duoattention or saliency
    model: str
    targets: tuple[float, ...] | None  # sparsities, each learnt separately; None: the recipe's
    settings: Mapping[str, Any]  # other fields of a HeadRecipe, as values or text
    out: Path
    device: str
    dtype: str


@dataclass(frozen=True)
class LearntSet:
    """The head scores learnt for one target."""

    target: float | None  # None for a method without a target
    sparsity: float | None  # reached, 0..1; None if no heads are chosen
    seconds: float | None  # None: not known, its log was damaged
    scores: Table  # [L][K], larger for heads that need the whole cache


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training of head scores."""

    scores: Path | None  # the file of scores; None if interrupted, or not written by this process
    sets: tuple[LearntSet, ...]  # in the order of the targets; only finished ones if interrupted
    interrupted: bool = False


def train_heads(choices: HeadChoices, say: Callable[[str], None]) -> TrainingResult:
    """Learn head scores and write them to `choices.out`; `say` gets a line of progress at times.

    The same choices continue an interrupted training. Under `accelerate launch` every process calls
    this, and the first one writes and reports. InputError for choices that cannot be used.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=choices.device == "cpu" or not torch.cuda.is_available())
    several = accelerator.num_processes > 1
    device = str(accelerator.device) if several else choices.device
    model = load_model(choices.model, device=device, dtype=chosen_dtype(choices))
    self_check(model)
    recipes = make_recipes(choices, model)
    if recipes[0].batch % accelerator.num_processes:
        raise InputError(
            f"a batch of {recipes[0].batch} rows cannot be shared by {accelerator.num_processes} "
            "processes: give a --batch that they divide"
        )
    rows = make_rows(recipes[0], model.tokenizer)
    recipes = [replace(recipe, data_hash=rows.data_hash) for recipe in recipes]
    net = network(model, recipes[0], accelerator)
    with writing(choices.out):
        choices.out.mkdir(parents=True, exist_ok=True)
    sets: list[LearntSet] = []
    try:
        for recipe in recipes:
            folder = choices.out if len(recipes) == 1 else choices.out / f"target-{recipe.target:g}"
            sets.append(learn_set(recipe, model, net, rows, folder, accelerator, say))
    except KeyboardInterrupt:
        return TrainingResult(None, tuple(sets), interrupted=True)
    named = METHODS.get(choices.method, choices.method)
    path = choices.out / f"scores-{named}.json" if accelerator.is_main_process else None
    if path:
        how = {"processes": accelerator.num_processes, "dtype": str(model.dtype)[6:]}
        with writing(choices.out):  # the scores last: where they are, all is done
            if recipes[0].weights_rate:
                save_model(choices.out / "model", model.model, model.tokenizer)
            write_atomically(path, score_file(recipes[0], sets, how))
    accelerator.end_training()
    return TrainingResult(path, tuple(sets))


def learn_set(
    recipe: HeadRecipe,
    model: LoadedModel,
    net: Any,
    rows: Rows,
    folder: Path,
    accelerator: Any,
    say: Callable[[str], None],
) -> LearntSet:
    """Learn the scores of one recipe; checkpoint, log and pictures are written to `folder`."""
    objective = OBJECTIVES[recipe.method](model.shape, recipe, model.device)
    lines = progress_lines(recipe, say)
    with holding(folder) if accelerator.is_main_process else nullcontext():
        log = learn(net, objective, rows, recipe, folder, accelerator, lines, say)
        scores = [[float(f"{s:.7g}") for s in row] for row in objective.scores().tolist()]
        if accelerator.is_main_process:
            with writing(folder):
                save_training_pictures(log, scores, folder / "training", recipe)
    end = objective.state(recipe.steps - 1)
    return LearntSet(
        target=recipe.target,
        sparsity=round(end["sparsity"], 6) if "sparsity" in end else None,
        seconds=seconds_of(log, recipe.steps),
        scores=scores,
    )


def chosen_dtype(choices: HeadChoices) -> str:
    """The user's dtype, or the one that the model's card has for this training."""
    folder = model_folder(choices.model)
    if choices.dtype != "auto" or folder is None:
        return choices.dtype
    return str(read_card(folder).training.get(choices.method, {}).get("dtype", "auto"))


def make_recipes(choices: HeadChoices, model: LoadedModel) -> list[HeadRecipe]:
    """A recipe for each target sparsity: the paper's settings, the model card's, the user's."""
    common = {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "data": STANDARD_LIBRARY,
        "length": min(model.max_context, LONGEST),
        "seed": 0,
    }
    of_card = dict(model.card.training.get(choices.method, {}))
    of_card.pop("dtype", None)  # the model is loaded by now
    try:
        make_recipe(choices.method, common, of_card)
    except InputError as error:
        raise InputError(f"'{model.card.file}' is not a model card: {error}") from None
    layers = [common, of_card, choices.settings]
    recipe = make_recipe(choices.method, *layers)
    if recipe.length > model.max_context:
        raise InputError(
            f"--length {recipe.length} is longer than model '{model.name}' supports: choose at "
            f"most {model.max_context}"
        )
    if choices.targets is None:
        return [recipe]
    if recipe.weights_rate and len(choices.targets) > 1:
        raise InputError("weights are trained for one --target at a time")
    return [make_recipe(choices.method, *layers, {"target": t}) for t in choices.targets]


def network(model: LoadedModel, recipe: HeadRecipe, accelerator: Any) -> Any:
    """The model, prepared for training: sharded, checkpointing gradients or frozen as asked."""
    net = model.model
    if recipe.gradient_checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
        net.train()  # transformers recomputes in training mode only
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    net.requires_grad_(bool(recipe.weights_rate))
    if recipe.shard or str(accelerator.distributed_type).endswith("FSDP"):
        shard(net, recipe, accelerator)
    return net


def shard(net: Any, recipe: HeadRecipe, accelerator: Any) -> None:
    """Shard a model's weights over all processes, one decoder layer at a time (FSDP).

    This calls PyTorch directly, because accelerate's FSDP2 needs an optimizer of the weights, which
    are frozen here.
    """
    from torch.distributed.fsdp import fully_shard

    if accelerator.num_processes == 1:
        raise InputError("shard=true needs several processes: accelerate launch -m kvbench ...")
    if recipe.weights_rate:
        raise InputError("weights cannot be trained while they are sharded: set weights_rate=0")
    blocks = set(net._no_split_modules or ())  # transformers' name for the decoder's layers
    for module in net.modules():
        if type(module).__name__ in blocks:
            fully_shard(module)
    fully_shard(net)


def score_file(recipe: HeadRecipe, sets: Sequence[LearntSet], how: Mapping[str, Any]) -> str:
    """The file of scores, as `kvbench.heads.read_scores` reads it, with all settings."""
    settings = {key: value for key, value in asdict(recipe).items() if value is not None}
    if len(sets) > 1:
        del settings["target"]
    content = {
        **settings,
        **how,
        "date": datetime.now(UTC).date().isoformat(),
        "kvbench": kvbench.__version__,
        "torch": str(torch.__version__),
        "sets": [asdict(each) for each in sets],
    }
    return json.dumps(content, indent=1) + "\n"


def progress_lines(
    recipe: HeadRecipe, say: Callable[[str], None]
) -> Callable[[dict[str, float]], None]:
    """A function of a log line that tells `say` how far the training is, every few seconds."""
    started = last = time.monotonic()
    first: int | None = None

    def show(line: dict[str, float]) -> None:
        nonlocal last, first
        step, now = int(line["step"]), time.monotonic()
        first = step if first is None else first
        done = step + 1
        if now - last < SECONDS_BETWEEN_LINES and done < recipe.steps:
            return
        last = now
        left = (now - started) / (done - first) * (recipe.steps - done)
        shown = [f"{key} {line[key]:.3f}" for key in line if key not in ("step", "seconds")]
        say(f"step {done} of {recipe.steps}, {', '.join(shown)}; {left / 60:.1f} min left")

    return show
