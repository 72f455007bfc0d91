"""Model cards: the default context, prefill chunk and options of a model (`kvbench.json`)."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvbench.arguments import check_options, check_whole
from kvbench.errors import InputError
from kvbench.models.wheel import WHEELS

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}
CARD = "kvbench.json"


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
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model folder '{name}' has no config.json")
        return folder
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists()
    if looks_like_path or "/" not in name:
        known = ", ".join([*EMBEDDED, *WHEELS])
        raise InputError(
            f"no model '{name}': give one by name ({known}), a folder or a hub id like "
            "organisation/name"
        )
    return None


def check_card(card: ModelCard) -> None:
    """InputError for a card with a value that cannot be a default."""
    for name in ("context", "prefill_chunk"):
        check_whole(name, getattr(card, name), least=0)
    for name in ("options", "training"):
        check_options(name, getattr(card, name))
        for method, values in getattr(card, name).items():
            check_options(f"{name}.{method}", values)


def read_card(folder: Path) -> ModelCard:
    """The card in a model's folder; ModelCard() if there is none.

    A file `scores-METHOD.json` or `.tsv` in the folder becomes the default of that method's option
    `scores`. InputError if the card cannot be read.
    """
    path = folder / CARD
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
        card = ModelCard(**data)
        check_card(card)
    except (ValueError, TypeError, OSError, RecursionError, InputError) as error:
        raise InputError(f"'{path}' is not a model card: {error}") from None
    options = {name: dict(values) for name, values in card.options.items()}
    for scores in sorted([*folder.glob("scores-*.tsv"), *folder.glob("scores-*.json")]):
        method = scores.stem.removeprefix("scores-")
        options.setdefault(method, {})["scores"] = str(scores)
    return replace(card, options=options)
