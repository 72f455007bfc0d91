"""What a model's folder says of itself: a sensible context, chunk and options (`kvbench.json`)."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvbench.errors import InputError
from kvbench.models.wheel import WHEELS

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}
CARD = "kvbench.json"


@dataclass(frozen=True)
class ModelCard:
    """Defaults for a model; 0 where it has none.

    `options` are option defaults by registered method, `training` those of `kvbench train`. Models
    of short context scale sinks and windows with it; the scaled values are recorded with every
    result like any other.
    """

    context: int = 0  # tokens of a prompt and its answer
    prefill_chunk: int = 0  # tokens
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def model_folder(name: str) -> Path | None:
    """The folder of a model's card: None for a name that only a hub can know.

    Of embedded and local models it holds the model too. InputError for a path that does not exist.
    """
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


def read_card(folder: Path) -> ModelCard:
    """The card of a model's folder, and the head scores that lie beside it.

    A file `scores-METHOD.json` or `.tsv` becomes the default of that method's option `scores`.
    """
    path = folder / CARD
    try:
        data = json.loads(path.read_text()) if path.is_file() else {}
        card = ModelCard(**data)
    except (ValueError, TypeError) as error:
        raise InputError(f"'{path}' is not a model card: {error}") from None
    options = {name: dict(values) for name, values in card.options.items()}
    for scores in sorted([*folder.glob("scores-*.tsv"), *folder.glob("scores-*.json")]):
        method = scores.stem.removeprefix("scores-")
        options.setdefault(method, {})["scores"] = str(scores)
    return replace(card, options=options)
