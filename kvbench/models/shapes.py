"""A model's shapes without its weights: what `kvbench plan` computes costs from.

The model is built on PyTorch's meta device, which allocates nothing. Its attention is learnt as for
a loaded model (`kvbench.models.layers`), from a copy with the same layers and heads but a narrow
hidden state, so that an 8B model takes a few megabytes.
"""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvbench.errors import InputError
from kvbench.files import read_regular
from kvbench.models.card import model_folder
from kvbench.models.files import CONFIG
from kvbench.models.load import DTYPES, LoadedModel, load_model, quiet, told, wrap_model
from kvbench.models.wheel import WHEELS

NARROW = 16  # hidden size of the copy
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size")
# Keys of a configuration whose numbers are at least 1: transformers takes less for some of them.
SIZES = (
    *WIDTHS,
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "sliding_window"),
)


def read_shapes(name: str, config: Path | None, dtype: str) -> LoadedModel:
    """A model as loaded, but without weights: nothing can be run, all shapes are true.

    `config` is the model's config.json; None finds it by `name`: a model that kvbench knows, a
    folder, or a model of the Hugging Face hub, of which only config.json is fetched. `dtype` "auto"
    is bfloat16. InputError if there is no such configuration, or kvbench cannot measure the model.
    """
    kind = DTYPES.get("bfloat16" if dtype == "auto" else dtype)
    if kind is None:
        raise InputError(f"unknown dtype '{dtype}': use auto, {', '.join(DTYPES)}")
    if config is None and name in WHEELS:  # a GGUF file holds no config.json; the model is small
        return replace(load_model(name, device="cpu"), dtype=kind)
    quiet()
    source = config or (model_folder(name) and Path(str(model_folder(name))) / CONFIG)
    try:
        if source is None:
            found = AutoConfig.from_pretrained(name, trust_remote_code=False)
        else:
            given = json.loads(read_regular(source).decode("utf-8-sig"))
            if not isinstance(given, dict) or not isinstance(given.get("model_type"), str):
                raise InputError(
                    f"the configuration {source} has no key 'model_type'; give a model's "
                    "config.json"
                )
            check_sizes(given, source)
            found = AutoConfig.for_model(given.pop("model_type"), **given)
        check_sizes(found.to_dict(), source or name)
        return shapes_of(found, name, kind)
    except InputError:
        raise
    except KeyError as error:  # of a table of transformers, such as that of activations
        raise InputError(
            f"transformers knows no {error}, which the configuration {source or name} asks for; "
            "is it spelt right there?"
        ) from None
    except Exception as error:
        if source is not None and source.is_dir():
            raise InputError(f"{source} is a folder; give the config.json in it") from None
        hint = "give its config.json with --model-config" if source is None else "is it a model's?"
        raise InputError(
            f"cannot read the configuration {source or name} ({hint}): {told(error)}"
        ) from None


def check_sizes(config: dict[str, Any], source: Path | str) -> None:
    """InputError if a size of a configuration, as in config.json, is below 1 or not a number."""
    for part in (config, config.get("text_config")):
        sizes = {key: part.get(key) for key in SIZES} if isinstance(part, dict) else {}
        for key, value in sizes.items():
            if isinstance(value, int | float) and not value >= 1:
                raise InputError(
                    f"the configuration {source} says {key} {value}; expected at least 1"
                )


def shapes_of(config: Any, name: str, dtype: torch.dtype) -> LoadedModel:
    """The model that a transformers configuration describes, in `dtype`, without weights."""
    narrow = deepcopy(config)
    text = narrow.get_text_config(decoder=True)
    if getattr(text, "head_dim", None) is None:
        text.head_dim = text.hidden_size // text.num_attention_heads
    for width in WIDTHS:
        if isinstance(getattr(text, width, None), int):
            setattr(text, width, NARROW)
    probed = wrap_model(AutoModelForCausalLM.from_config(narrow), None, name=name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return replace(probed, model=model.eval(), dtype=dtype)


def parameters(model: LoadedModel) -> tuple[int, int, int]:
    """Parameters that are stored, that a token of the prompt goes through, and of the output.

    The second leaves out the table of embeddings and the output, and counts the experts of a
    mixture as far as a token goes through them. The third are those of the output's matrix.
    """
    config = model.model.config.get_text_config(decoder=True)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    table, output = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    apart = {id(table.weight), id(output.weight)}
    weights = list(model.model.named_parameters())
    body = sum(
        round(weight.numel() * (used if ".experts." in key else 1))
        for key, weight in weights
        if id(weight) not in apart
    )
    return sum(weight.numel() for _, weight in weights), body, output.weight.numel()
