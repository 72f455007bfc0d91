"""Model cards: the default context, prefill chunk and options of a model (`kvbench.json`)."""

import json
import os
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any

from kvbench.arguments import check_options, check_whole
from kvbench.errors import InputError, did_you_mean
from kvbench.models.wheel import WHEELS
from kvbench.registry import methods
from kvbench.spec import parse_method

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}
CARD = "kvbench.json"
KEYS = ("context", "prefill_chunk", "options", "training", "notes")


@dataclass(frozen=True)
class ModelCard:
    """Defaults for a model; 0 means no default.

    `options` are the options of each registered method, `training` those of `kvbench train`. Models
    with a short context have smaller sinks and windows; records contain the values that were used.
    """

    context: int = 0  # tokens of a prompt and its answer
    prefill_chunk: int = 0  # tokens
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    file: Path | None = field(default=None, compare=False)  # where the card is, or would be


def model_folder(name: str) -> Path | None:
    """The folder of a model's card; None for a name of the Hugging Face hub.

    For embedded and local models it also contains the model. InputError if there is no such folder,
    or records could not hold its name.
    """
    if not name.isprintable():
        raise InputError(f"the name of the model, {name!a}, cannot be shown; rename its folder")
    if name in EMBEDDED:
        return EMBEDDED[name]
    if name in WHEELS:
        return WHEELS[name].folder
    folder = Path(name).expanduser()
    if os.path.isdir(folder):  # `Path.is_dir` raises OSError for a name that is too long
        if not (folder / "config.json").is_file():
            raise InputError(f"model folder '{name}' has no config.json")
        return folder
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    looks_like_path = looks_like_path or os.path.exists(folder)
    if looks_like_path or "/" not in name:
        known = ", ".join([*EMBEDDED, *WHEELS])
        raise InputError(
            f"no model '{name}': give one by name ({known}), a folder or a hub id like "
            "organisation/name"
        )
    return None


def check_card(card: ModelCard) -> None:
    """InputError for a card with a value that cannot be a default.

    Options of methods that are not registered are passed over: a plug-in may be missing here.
    """
    for name in ("context", "prefill_chunk"):
        check_whole(name, getattr(card, name), least=0)
    for name in ("options", "training", "notes"):
        check_options(name, given := getattr(card, name))
        if given is None:
            raise InputError(f"{name} is null; leave it out")
    for name in ("options", "training"):
        for method, values in getattr(card, name).items():
            check_options(f"{name}.{method}", values)
            if values is None:
                raise InputError(f"{name}.{method} is null; leave it out")
    for method in set(card.options) & set(methods.names()):
        known, given = methods.get(method).options(), card.options[method]
        # A user may give what is missing, so it is too early to build such a method.
        if all(default is not MISSING for key, default in known.items() if key not in given):
            parse_method(method, {}, card.options)


def read_card(folder: Path) -> ModelCard:
    """The card in a model's folder; ModelCard() if there is none.

    A file `scores-METHOD.json` or `.tsv` in the folder becomes the default of that method's option
    `scores`. InputError if the card cannot be read.
    """
    path = folder / CARD
    try:
        card = parse_card(path) if os.path.lexists(path) else ModelCard()
        check_card(card)
    except (OSError, ValueError, InputError) as error:
        raise InputError(f"'{path}' is not a model card: {error}") from None
    options = {name: dict(values) for name, values in card.options.items()}
    found: dict[str, Path] = {}
    for scores in sorted([*folder.glob("scores-*.tsv"), *folder.glob("scores-*.json")]):
        method = scores.stem.removeprefix("scores-")
        if (other := found.setdefault(method, scores)) != scores:
            raise InputError(
                f"'{other}' and '{scores}' are both head scores of {method}; remove one of them"
            )
        options.setdefault(method, {})["scores"] = str(scores)
    return replace(card, options=options, file=path)


def parse_card(path: Path) -> ModelCard:
    """The card in a file; OSError, ValueError or InputError if it cannot be read as one."""
    if not path.is_file():
        raise InputError("it is no regular file")

    def unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"it has '{twice[0]}' twice")
        return dict(pairs)

    def constant(text: str) -> None:
        raise InputError(f"{text} is not a value of JSON")

    text = path.read_text("utf-8-sig")  # editors may put a byte-order mark at the start
    try:
        data = json.loads(text, object_pairs_hook=unlike, parse_constant=constant)
    except RecursionError:
        raise InputError("it is nested too deeply") from None
    if not isinstance(data, dict):
        raise InputError('it must be a JSON object, like {"context": 1024}')
    for name in data:
        if name not in KEYS:
            raise InputError(f"it has no key '{name}': {did_you_mean(name, KEYS)}")
    return ModelCard(**data)
