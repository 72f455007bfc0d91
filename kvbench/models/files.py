"""A model's files: which are read, that they are safe and complete, and their hash."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvbench.errors import InputError
from kvbench.models.card import CARD

# Suffixes of files that transformers and tokenizers read; safetensors are the only weights.
READ = {".json", ".jinja", ".txt", ".model", ".safetensors", ".tiktoken", ".spm", ".bpe", ".vocab"}
INDEX = ".index.json"
# Tensors of old checkpoints that transformers computes by itself.
COMPUTED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
NAMED = 5  # tensors that a message names at most


def check_files(folder: Path, name: str) -> None:
    """InputError for a folder whose files are not all its own, or whose weights are no safetensors.

    Links are followed only within the folder and, in a cache of the Hugging Face hub, to its blobs.
    """
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    for path in read_files(folder):
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise InputError(
                f"model '{name}': {path.relative_to(folder)} lies outside the model's folder; copy "
                "it there"
            )
    for index in sorted(folder.glob(f"*{INDEX}")):
        for shard in shards(index):
            path = folder / shard
            if not path.resolve().is_relative_to(folder.resolve()) and path not in set(
                read_files(folder)
            ):
                raise InputError(
                    f"model '{name}': {index.name} names '{shard}', which lies outside the model's "
                    "folder; copy it there"
                )
            if path.suffix != ".safetensors":
                raise InputError(
                    f"model '{name}': {index.name} names '{shard}'; kvbench reads weights from "
                    "safetensors alone, so convert it"
                )
            if not path.is_file():
                raise InputError(f"model '{name}': {index.name} names '{shard}', which is missing")
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"model '{name}' is an adapter (adapter_config.json); merge it into its base model"
        )


def shards(index: Path) -> list[str]:
    """The files that an index of weights names; InputError if it is none."""
    try:
        return sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"'{index}' is not an index of weights") from None


def read_files(folder: Path) -> Iterator[Path]:
    """The files of a folder that loading a model may read, in order of name."""
    named = {folder / shard for index in folder.glob(f"*{INDEX}") for shard in shards(index)}
    found = {path for path in folder.iterdir() if path.suffix in READ}
    found |= set(folder.glob("additional_chat_templates/*.jinja"))
    found |= {path for path in named if path.suffix == ".safetensors"}
    for path in sorted(found):
        # the card and the head scores are kvbench's: their options are in every fingerprint
        if path.name != CARD and not path.name.startswith("scores-") and path.is_file():
            yield path


def folder_digest(folder: Path) -> str:
    """A hash of the names and contents of all files that loading a model may read."""
    return digest_of((path.relative_to(folder).as_posix(), path) for path in read_files(folder))


def digest_of(files: Iterable[tuple[str, Path]]) -> str:
    """A hash, 16 hexadecimal digits, of files under the names given."""
    digest = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def check_weights(found: dict[str, Any], name: str) -> None:
    """InputError, naming them, if tensors were missing, left over or of another shape.

    `found` is the loading info of transformers, which does not count tied weights as missing. What
    is missing would be random.
    """
    left_over = [key for key in found["unexpected_keys"] if not key.endswith(COMPUTED)]
    faults = {
        "lack": sorted(found["missing_keys"]),
        "hold, and the model has no place for,": sorted(left_over),
        "hold in another shape": sorted(str(key[0]) for key in found["mismatched_keys"]),
    }
    for what, keys in faults.items():
        if keys:
            more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
            raise InputError(
                f"model '{name}' does not fit its files: the weights {what} "
                f"{', '.join(keys[:NAMED])}{more}"
            )
