"""RoPE that depends on the length of the input, and the longest input that RoPE allows."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvbench.errors import InputError

LONGROPE = "longrope"


class LongRope:
    """LongRoPE's two sets of frequencies (Phi-3 and Phi-4-mini, arXiv 2402.13753): one for a run.

    transformers takes the short set for inputs up to `threshold` tokens and the long one above, for
    each forward anew. Keys are cached after RoPE, so a run must take one set for all of its rows:
    `choose` fixes it by the run's longest input.
    """

    def __init__(self, model: Any, threshold: int) -> None:
        self.threshold = threshold
        self.fixed = False
        self._sets: list[tuple[Any, dict[str, Tensor]]] = []
        for module in model.modules():
            if getattr(module, "rope_type", None) != LONGROPE:
                continue
            short = module.original_inv_freq
            make = ROPE_INIT_FUNCTIONS[LONGROPE]
            long, _ = make(module.config, short.device, seq_len=threshold + 1)
            self._sets.append((module, {"short": short.clone(), "long": long}))

    def name_for(self, tokens: int) -> str:
        """The set for inputs of `tokens` tokens."""
        return "long" if tokens > self.threshold else "short"

    def choose(self, tokens: int, *, fix: bool = False) -> str:
        """Use the set for inputs of `tokens` tokens; returns its name, 'short' or 'long'.

        With `fix`, later calls without it change nothing.
        """
        name = self.name_for(tokens)
        if fix or not self.fixed:
            self.fixed = self.fixed or fix
            for module, sets in self._sets:
                module.original_inv_freq = module.long_inv_freq = sets[name]
        return name

    def release(self) -> None:
        """Leave the choice to transformers and to later calls of `choose`."""
        self.fixed = False
        for module, sets in self._sets:
            module.original_inv_freq, module.long_inv_freq = sets["short"], sets["long"]


def rope_kinds(config: Any) -> Iterator[dict[str, Any]]:
    """The parameters of RoPE: one dictionary, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    yield from nested or [parameters]


def check_rope(config: Any, name: str) -> None:
    """InputError for a type of RoPE that transformers does not have."""
    for parameters in rope_kinds(config.get_text_config(decoder=True)):
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise InputError(
                f"model '{name}' has RoPE of the unknown type '{kind}'; known are default, "
                f"{', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
            )


def longest_input(config: Any) -> int:
    """Tokens that a model takes at most.

    YaRN reaches `factor` times the length that the model was trained on, and published recipes
    leave `max_position_embeddings` at the latter (arXiv 2309.00071).
    """
    limit = int(config.max_position_embeddings)
    for parameters in rope_kinds(config):
        trained = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") == "yarn" and trained:
            limit = max(limit, int(parameters.get("factor", 1) * trained))
    return limit


def length_dependent_rope(model: Any, config: Any, name: str) -> LongRope | None:
    """The choice that a model with LongRoPE needs, None for others.

    InputError for other RoPE that depends on the length: keys that are cached would be wrong, and
    so would rows of different lengths that share a forward.
    """
    kinds = list(rope_kinds(config))
    if any(str(kind.get("rope_type")) == "dynamic" for kind in kinds):
        raise InputError(
            f"model '{name}' has RoPE of type dynamic, which depends on the length of the input: "
            "its cached keys would be wrong after eviction or in chunks"
        )
    if all(kind.get("rope_type") != LONGROPE for kind in kinds):
        return None
    found = LongRope(model, int(kinds[0].get("original_max_position_embeddings") or 0))
    if len(kinds) > 1 or not found.threshold or not found._sets:
        raise InputError(
            f"model '{name}' has RoPE of type longrope in a form that kvbench does not know"
        )
    return found
