"""Loads a model unchanged, with its attention routed to the engine (`models.attention`)."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
)
from transformers.utils import cached_file

from kvbench.errors import InputError, did_you_mean
from kvbench.machine import limit_threads
from kvbench.method import KVShape
from kvbench.models.attention import ATTENTION, KVAttention, LayerShape
from kvbench.models.card import ModelCard, model_folder, read_card
from kvbench.models.files import (
    CONFIG,
    check_files,
    check_tensors,
    check_weights,
    digest_of,
    folder_digest,
)
from kvbench.models.layers import check_kinds, kv_shape, probe_layers
from kvbench.models.rotation import LongRope, check_rope, length_dependent_rope, longest_input
from kvbench.models.wheel import WHEELS


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, and what the engine needs to know about it."""

    name: str
    model: Any
    tokenizer: Any
    shape: KVShape
    max_context: int
    device: torch.device
    dtype: torch.dtype
    attention: str
    fingerprint: str
    layers: tuple[LayerShape, ...]
    vocabulary: int  # tokens that the model can read
    card: ModelCard = field(default_factory=ModelCard)
    long_rope: LongRope | None = None

    @property
    def shares_keys(self) -> bool:
        """Whether some layers read the keys of other layers."""
        return any(layer.source != index for index, layer in enumerate(self.layers))

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that the layers are on, the one that reads tokens first."""
        return tuple(dict.fromkeys([self.device, *(layer.device for layer in self.layers)]))

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset(end_tokens(self.model, self.tokenizer))

    def check_ids(self, ids: Sequence[int]) -> None:
        """InputError for tokens that the model does not have."""
        lowest, highest = min(ids), max(ids)
        if lowest < 0 or highest >= self.vocabulary:
            raise InputError(
                f"token {lowest if lowest < 0 else highest} of a prompt is none of the "
                f"{self.vocabulary} of model '{self.name}'; does its tokenizer belong to it?"
            )


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "sdpa",
    gpus: int = 1,
) -> LoadedModel:
    """Load a model by a name that kvbench knows, from a local folder, or from the Hugging Face hub.

    `dtype` "auto" is float32 on a CPU and the checkpoint's dtype on a GPU. With `gpus`, the layers
    are split over that many GPUs, the first that are visible. Threads are
    limited to the cores that are free (`kvbench.machine`). InputError if the model
    cannot be loaded: no such model, hub not reachable, no GPU, weights that are not safetensors, or
    an architecture that kvbench does not measure.
    """
    where = resolve_device(device, gpus)
    kind = resolve_dtype(dtype, where)
    folder = model_folder(name)
    quiet()
    limit_threads()
    try:
        model, tokenizer = read_model(
            name, attn_implementation=ATTENTION, dtype=kind, **placement(gpus)
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
        reason = told(error)
        if gpus > 1 and "offload" in reason:  # what transformers asks for where GPUs are too small
            raise InputError(too_large(name, gpus)) from None
        hint = (
            "is it a model folder with config.json, safetensors weights and a tokenizer?"
            if folder
            else "is the name right, and can the hub be reached?"
        )
        raise InputError(f"model '{name}' cannot be loaded ({hint}): {reason}") from None
    except Exception as error:  # tokenizers and safetensors raise plain Exceptions
        raise InputError(f"model '{name}' has a broken file: {told(error)}") from None
    check_placement(getattr(model, "hf_device_map", {}), name, gpus)
    model.eval()
    if gpus == 1:
        model.to(where)
    return wrap_model(
        model,
        tokenizer,
        name=name,
        attention=attention,
        fingerprint=fingerprint(name, model.config),
        card=read_card(folder) if folder else ModelCard(),
    )


def placement(gpus: int) -> dict[str, Any]:
    """What `from_pretrained` is told, so that it splits a model over the first `gpus` GPUs."""
    if gpus == 1:
        return {}
    memory = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus)}
    return {"device_map": "auto", "max_memory": memory}


def check_placement(places: Mapping[str, Any], name: str, gpus: int) -> None:
    """InputError if a part of a split model is on no GPU; `places` is transformers' device map."""
    if gpus > 1 and {"cpu", "disk", "meta"} & set(map(str, places.values())):
        raise InputError(too_large(name, gpus))


def too_large(name: str, gpus: int) -> str:
    """What to say of a model whose weights do not fit."""
    return (
        f"model '{name}' does not fit on {gpus} GPUs, and kvbench keeps no weights elsewhere; give "
        "more --gpus-per-worker, or a smaller --dtype such as bfloat16"
    )


def told(error: Exception) -> str:
    """An error of a library on one line, with its type where the message needs it."""
    text = " ".join(str(error).split())[:240]
    speaks = isinstance(error, OSError | ImportError) or type(error) in (ValueError, Exception)
    return text if text and speaks else f"{type(error).__name__}: {text}"


def read_model(name: str, **options: Any) -> tuple[Any, Any]:
    """A model as transformers loads it, and its tokenizer.

    `options` go to `from_pretrained`. InputError if the path does not exist or a package is not
    installed.
    """
    if name in WHEELS:
        path = WHEELS[name].installed(name)
        from kvbench.models.gguf import read_gguf

        return read_gguf(path, **options)
    folder = model_folder(name)
    if folder is not None:
        check_files(folder, name)
    source = str(folder or name)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_rope(config, name)
    several = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    several = several and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = AutoModelForMultimodalLM if several else AutoModelForCausalLM
    model, found = model_class.from_pretrained(
        source,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_weights` names them
        **options,
    )
    check_weights(found, name)
    # a model of the hub lies in the cache by now
    check_tensors(folder or Path(cached_file(name, CONFIG)).parent, name, model)
    return model, tokenizer


def wrap_model(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    attention: str = "sdpa",
    fingerprint: str = "",
    card: ModelCard | None = None,
) -> LoadedModel:
    """Make a LoadedModel of a transformers model; this switches its attention to the engine's.

    The tokenizer may be None if the model is only given token ids. InputError for an architecture
    that kvbench does not measure.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"model '{name}' is an encoder-decoder; kvbench measures decoders")
    check_kinds(config, name)
    try:
        count, limit = int(config.num_hidden_layers), longest_input(config)
    except AttributeError as error:
        raise InputError(f"model '{name}' is not an attention-only decoder: {error}") from None
    if limit < 1:
        raise InputError(f"model '{name}' takes {limit} tokens (max_position_embeddings)")
    layers = probe_layers(model, count, name)
    weight = next(model.parameters())
    vocabulary = len(model.get_input_embeddings().weight)
    check_end_tokens(end_tokens(model, None), vocabulary, name)
    return LoadedModel(
        name,
        model,
        tokenizer,
        kv_shape(layers, name),
        limit,
        weight.device,
        weight.dtype,
        attention,
        fingerprint,
        layers,
        vocabulary,
        card or ModelCard(),
        length_dependent_rope(model, config, name),
    )


def end_tokens(model: Any, tokenizer: Any) -> list[Any]:
    """What the generation configuration, or else the tokenizer, names as ids that end an answer."""
    ids = model.generation_config.eos_token_id
    if ids is None and tokenizer is not None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def check_end_tokens(ids: Sequence[Any], vocabulary: int, name: str) -> None:
    """InputError for an end token that no answer can contain."""
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise InputError(
                f"model '{name}' has the end token {token!r}; expected ids from 0 to "
                f"{vocabulary - 1} (eos_token_id in generation_config.json)"
            )


def resolve_device(device: str, gpus: int = 1) -> torch.device:
    """The device that `--device` names, with `gpus` GPUs the first of them.

    InputError if the machine does not have it.
    """
    if gpus > 1:
        there = torch.cuda.device_count()
        if there < gpus:
            raise InputError(f"a worker needs {gpus} GPUs, this machine has {there}")
        return torch.device("cuda", 0)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device '{device}': use auto, cpu, cuda or cuda:N") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device '{device}': no GPU that this PyTorch can use; use --device cpu")
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device '{device}' is not supported: use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device '{device}': there are {torch.cuda.device_count()} GPUs")
    return found


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """The dtype that `--dtype` names; "auto" if the checkpoint decides."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}': {did_you_mean(dtype, ['auto', *DTYPES])}")
    return DTYPES[dtype]


def fingerprint(name: str, config: Any) -> str:
    """A hash of all that is read of a model; for a model of the hub, of its commit."""
    if name in WHEELS:
        return digest_of([("", WHEELS[name].installed(name))])
    folder = model_folder(name)
    if folder is not None:
        return folder_digest(folder)
    commit = str(getattr(config, "_commit_hash", None))
    text = commit + json.dumps(config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def quiet() -> None:
    """Turn off the progress bars and notes of transformers and of the hub's client."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity(logging.CRITICAL)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


NOT_FINITE = -1  # stands for a token where the logits are not finite


def best_tokens(logits: Tensor) -> Tensor:
    """The token of the largest logit of each row of [R, V]; NOT_FINITE where that is not finite."""
    best = logits.max(-1)
    return torch.where(best.values.isfinite(), best.indices, NOT_FINITE)


def forward(
    model: LoadedModel,
    ids: Tensor,
    positions: Tensor,
    kv: KVAttention,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """Logits after the tokens `ids` [B, T] at `positions` [B, T]; `kv` computes attention.

    Returns [B, V], after the last token of each sequence. With `ends` (indices into T), B is 1 and
    the sequence packs several ones: returns [len(ends), V], after each of these tokens.
    """
    keep: int | list[int] = 1  # a list, because a tensor would have to be on the last device
    # With a number, models that share keys drop all other tokens before the layers that share.
    if ends is not None and (len(ends) > 1 or model.shares_keys):
        keep = list(ends)
    elif ends is not None:
        keep = ids.shape[1] - ends[0]
    out = model.model(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=keep,
        kv=kv,
        kv_layers=model.layers,
        kv_positions=positions,
    )
    logits: Tensor = out.logits
    if ends is None:
        return logits[:, -1]
    return logits[0] if len(ends) > 1 else logits[0, :1]
