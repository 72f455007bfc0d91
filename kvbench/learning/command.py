"""`kvbench train prulong` and `kvbench train duoattention`, from choices to a file of scores."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import kvbench
from kvbench.engine.self_check import self_check
from kvbench.errors import InputError
from kvbench.learning.corpus import STANDARD_LIBRARY, Corpus
from kvbench.learning.duoattention import DuoAttention
from kvbench.learning.loop import learn
from kvbench.learning.objective import Objective
from kvbench.learning.pictures import save_training_pictures
from kvbench.learning.prulong import PruLong
from kvbench.learning.recipe import Recipe, make_recipe
from kvbench.learning.rows import (
    TASKS,
    PackedRows,
    PasskeyRows,
    Rows,
    TaskRows,
    read_tokens,
    task_filler,
)
from kvbench.models.load import LoadedModel, load_model
from kvbench.records import write_atomically

LONGEST = 8192  # tokens of a row, for a model whose card says nothing
FILLER_TOKENS = 1_000_000
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class HeadChoices:
    """What the command line gave; `settings` are fields of a recipe."""

    method: str
    model: str
    targets: tuple[float, ...] | None
    settings: Mapping[str, Any]
    out: Path
    device: str
    dtype: str


def train_heads(choices: HeadChoices) -> int:
    """Learn head scores and write them to `choices.out`; the same command continues a training.

    Under `accelerate launch` every process calls this; the first of them writes. InputError for
    choices that cannot be trained with.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=choices.device == "cpu" or not torch.cuda.is_available())
    several = accelerator.num_processes > 1
    device = str(accelerator.device) if several else choices.device
    model = load_model(choices.model, device=device, dtype=choices.dtype)
    self_check(model)
    recipes = make_recipes(choices, model)
    if recipes[0].batch % accelerator.num_processes:
        raise InputError(
            f"a batch of {recipes[0].batch} rows cannot be shared by {accelerator.num_processes} "
            "processes: give a --batch that they divide"
        )
    rows = make_rows(recipes[0], model)
    net = network(model, recipes[0], accelerator)
    try:
        choices.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to '{choices.out}': {error.strerror}; choose another --out"
        ) from None
    try:
        sets = [
            learn_set(
                recipe, model, net, rows, folder_of(recipe, recipes, choices.out), accelerator
            )
            for recipe in recipes
        ]
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from the checkpoint in {choices.out}")
        return 130
    if accelerator.is_main_process:
        path = choices.out / f"scores-{choices.method}.json"
        how = {"processes": accelerator.num_processes, "dtype": str(model.dtype)[6:]}
        write_atomically(path, score_file(recipes[0], sets, how))
        if recipes[0].weights_rate:
            model.model.save_pretrained(choices.out / "model")
            model.tokenizer.save_pretrained(choices.out / "model")
        say(f"scores are in {path}: kvbench run --method {choices.method} --option scores={path}")
    accelerator.end_training()
    return 0


def folder_of(recipe: Recipe, recipes: Sequence[Recipe], out: Path) -> Path:
    """Where a training keeps its checkpoint, log and picture: of several targets each its own."""
    return out if len(recipes) == 1 else out / f"target-{recipe.target:g}"


def learn_set(
    recipe: Recipe, model: LoadedModel, net: Any, rows: Rows, folder: Path, accelerator: Any
) -> dict[str, Any]:
    """Learn the scores of one recipe; what the file of scores says of them."""
    objective = make_objective(recipe, model)
    log = learn(net, objective, rows, recipe, folder, accelerator, progress_lines(recipe))
    scores = [[round(s, 6) for s in row] for row in objective.scores().tolist()]
    if accelerator.is_main_process:
        save_training_pictures(log, scores, folder / "training", recipe)
    return {
        "target": recipe.target,
        "sparsity": round(objective.state(recipe.steps - 1)["sparsity"], 6),
        "seconds": round(sum(line["seconds"] for line in log), 1),
        "scores": scores,
    }


def make_recipes(choices: HeadChoices, model: LoadedModel) -> list[Recipe]:
    """One recipe for each target sparsity: the paper's settings, the model card's, the user's."""
    card = model.card.training.get(choices.method, {})
    common = {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "data": STANDARD_LIBRARY,
        "length": min(model.max_context, LONGEST),
        "seed": 0,
    }
    layers = [common, card, choices.settings]
    recipe = make_recipe(choices.method, *layers)
    if recipe.length > model.max_context:
        raise InputError(
            f"--length {recipe.length} is more than model '{model.name}' takes: at most "
            f"{model.max_context}"
        )
    if choices.targets is None:
        return [recipe]
    if recipe.weights_rate and len(choices.targets) > 1:
        raise InputError("weights are trained for one --target at a time")
    return [make_recipe(choices.method, *layers, {"target": t}) for t in choices.targets]


def make_objective(recipe: Recipe, model: LoadedModel) -> Objective:
    """What is minimised."""
    kind = PruLong if recipe.method == "prulong" else DuoAttention
    return kind(model.shape, recipe, model.device)


def make_rows(recipe: Recipe, model: LoadedModel) -> Rows:
    """What it is minimised on."""
    tasks = recipe.data == TASKS
    if recipe.method == "prulong":
        if tasks:
            return TaskRows(model.tokenizer, recipe.length, recipe.seed)
        return PackedRows(
            Corpus(recipe.data),
            model.tokenizer,
            recipe.length,
            recipe.steps,
            recipe.batch,
            recipe.seed,
        )
    if tasks:
        filler = task_filler(model.tokenizer, 64 * recipe.length, recipe.seed)
    else:
        filler = read_tokens(Corpus(recipe.data), model.tokenizer, FILLER_TOKENS, recipe.seed)
    if len(filler) < recipe.length:
        raise InputError(
            f"the data '{recipe.data}' has {len(filler)} tokens, less than one sequence of "
            f"{recipe.length}: give more data or a smaller --length"
        )
    assert recipe.passkeys is not None
    assert recipe.passkey_words is not None
    return PasskeyRows(
        filler, model.tokenizer, recipe.length, recipe.passkeys, recipe.passkey_words, recipe.seed
    )


def network(model: LoadedModel, recipe: Recipe, accelerator: Any) -> Any:
    """The model to train through: sharded, recomputing activations, its weights frozen or not."""
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


def shard(net: Any, recipe: Recipe, accelerator: Any) -> None:
    """Shard a model's weights over all processes, a decoder layer at a time (FSDP).

    By PyTorch itself, since accelerate's FSDP2 wants an optimizer of the weights, which are frozen.
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


def score_file(recipe: Recipe, sets: list[dict[str, Any]], how: Mapping[str, Any]) -> str:
    """The file of scores: how they were learnt, then a table [L][K] for each target."""
    settings = {key: value for key, value in asdict(recipe).items() if value is not None}
    if len(sets) > 1:
        del settings["target"]
    content = {
        **settings,
        **how,
        "date": datetime.now(UTC).date().isoformat(),
        "kvbench": kvbench.__version__,
        "torch": str(torch.__version__),
        "sets": sets,
    }
    return json.dumps(content, indent=1) + "\n"


def progress_lines(recipe: Recipe) -> Callable[[dict[str, float]], None]:
    """What prints a line on stderr every few seconds, and at the end."""
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


def say(text: str) -> None:
    """A line for the user, on stderr."""
    print(f"kvbench: {text}", file=sys.stderr, flush=True)
