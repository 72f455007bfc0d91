"""A model's files: which are read, that they are safe and complete, and their hash."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kvbench.errors import InputError
from kvbench.files import read_regular
from kvbench.models.card import CARD

# Suffixes of files that transformers and tokenizers read; safetensors are the only weights.
READ = {".json", ".jinja", ".txt", ".model", ".safetensors", ".tiktoken", ".spm", ".bpe", ".vocab"}
INDEX = ".index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
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

    def inside(path: Path) -> bool:
        return any(path.resolve().is_relative_to(place) for place in allowed)

    for index in sorted(folder.glob(f"*{INDEX}")):
        for shard in shards(index):
            path = folder / shard
            if path.suffix != ".safetensors":
                raise InputError(
                    f"model '{name}': {index.name} names '{shard}'; kvbench reads weights from "
                    "safetensors alone, so convert it"
                )
            if Path(shard).is_absolute() or not inside(path):
                raise InputError(
                    f"model '{name}': {index.name} names '{shard}', which lies outside the model's "
                    "folder; copy it there"
                )
            if not path.is_file():
                raise InputError(f"model '{name}': {index.name} names '{shard}', which is missing")
    for path in read_files(folder):
        if not inside(path):
            raise InputError(
                f"model '{name}': {path.relative_to(folder)} lies outside the model's folder; copy "
                "it there"
            )
    for file in (CONFIG, GENERATION):  # transformers ignores a broken one of the latter
        if (folder / file).is_file() and not is_json_object(folder / file):
            raise InputError(f"model '{name}': {file} is not a JSON object; copy it anew")
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"model '{name}' is an adapter (adapter_config.json); merge it into its base model"
        )


def is_json_object(path: Path) -> bool:
    """Whether a file can be read as a JSON object."""
    try:
        return isinstance(json.loads(read_regular(path)), dict)
    except ValueError:
        return False


def shards(index: Path) -> list[str]:
    """The files that an index of weights names; InputError if it is none."""
    try:
        return sorted(set(map(str, json.loads(read_regular(index))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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


def check_tensors(folder: Path, name: str, model: Any) -> None:
    """InputError for tensors that loading would change in silence.

    These are whole numbers where the model has fractions, unless transformers unpacks them (a
    quantised model), and tensors that two files hold.
    """
    whole = {key for key, buffer in model.named_buffers() if not buffer.is_floating_point()}
    unpacked = getattr(model, "hf_quantizer", None) is not None
    place: dict[str, str] = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                dtype = file.get_slice(key).get_dtype()
                fraction = dtype == "BF16" or dtype.startswith("F")
                if not fraction and not unpacked and not key.endswith((*COMPUTED, *whole)):
                    raise InputError(
                        f"model '{name}': {path.name} holds {key} as {dtype}, and {CONFIG} does "
                        "not say how to unpack it; kvbench needs floating-point weights"
                    )
                if key in place:
                    raise InputError(
                        f"model '{name}': both {place[key]} and {path.name} hold {key}; remove it "
                        "from one of them"
                    )
                place[key] = path.name


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that transformers reads: one, or else those of the index."""
    single = folder / "model.safetensors"
    index = folder / f"{single.name}{INDEX}"
    if single.is_file():
        return [single]
    return [folder / shard for shard in shards(index)] if index.is_file() else []


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
