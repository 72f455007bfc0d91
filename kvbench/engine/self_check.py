"""Checks, before anything is measured, that full attention here is the model's own (`self_check`).

Two short prompts are read in chunks and continued, in one batch, and the model computes the same
tokens by its own attention, without chunks and without a cache. Their logits must agree. Limits and
thresholds that act only on long inputs are lowered for both, so that short prompts cross them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvbench.engine.graph import Repeated
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.errors import InputError
from kvbench.models.attention import ATTENTION
from kvbench.models.load import LoadedModel, wrap_model
from kvbench.records import BASELINE
from kvbench.spec import parse_method

PROMPTS = (45, 38)  # tokens
CHUNK = 16
ANSWER = 5  # tokens
# Largest difference of logits, as a share of the standard deviation of the model's own. Attention
# that is computed wrongly differs by more than a tenth. In half precision it is at least what the
# model's own two ways to compute attention differ by.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.35, torch.float16: 0.05}
# Numbers of tokens from which on a model computes otherwise, by their names in configurations and
# modules, and what they are for the check.
THRESHOLDS = {
    "sliding_window": 12,
    "attention_chunk_size": 12,
    "floor_scale": 12,
}


@dataclass
class Recorder:
    """A model that remembers the logits of the last token of each sequence, by its position."""

    model: Any
    generation_config: Any = field(default_factory=lambda: SimpleNamespace(eos_token_id=None))
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, **arguments: Any) -> Any:
        """The model's output."""
        out = self.model(**arguments)
        logits = out.logits[:, -1]
        self.found.append((arguments["position_ids"][:, -1].clone(), logits.float().clone()))
        return out


@dataclass(frozen=True)
class Check:
    """How far the logits were from the model's own."""

    difference: float  # the largest, as a share of the standard deviation of the model's own logits
    tolerance: float
    tokens: int  # whose logits were compared


def self_check(model: LoadedModel) -> Check:
    """Compare full attention in the harness with the model's own attention.

    InputError that names the token and the difference if they do not agree to the tolerance of the
    model's dtype.
    """
    try:
        return checked(model)
    except InputError as error:
        text = str(error)
        named = text if model.name in text else f"model '{model.name}' cannot be measured: {text}"
        raise InputError(named) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model '{model.name}' cannot be checked against its own attention "
            f"({type(error).__name__}: {reason})"
        ) from None


def checked(model: LoadedModel) -> Check:
    """As `self_check`; errors of the model come as they are."""
    rope = model.long_rope
    with lowered(model.model, THRESHOLDS):
        lower = wrap_model(model.model, None, name=model.name, attention=model.attention)
        lower = replace(lower, long_rope=rope)
        if rope is None:
            return worst_of(*differences(lower), lower)
        found: list[tuple[int, float]] = []
        rounding = 0.0
        try:
            for length in (1, rope.threshold + 1):
                rope.choose(length, fix=True)
                more, apart = differences(lower)
                found, rounding = found + more, max(rounding, apart)
        finally:
            rope.release()
        return worst_of(found, rounding, lower)


def worst_of(found: Sequence[tuple[int, float]], rounding: float, model: LoadedModel) -> Check:
    """The largest of the differences at positions; InputError if they are too large.

    `rounding` is what the model's own logits differ by. In half precision a quarter of the tokens
    may differ more: a mixture of experts may choose another one where two are close.
    """
    tolerance = max(TOLERANCE[model.dtype], rounding)
    allowed = 0 if model.dtype == torch.float32 else len(found) // 4
    over = [(position, far) for position, far in found if not far <= tolerance]
    if len(over) > allowed:
        position, far = over[0]
        raise InputError(
            f"model '{model.name}' is not computed right: at token {position} of a short prompt, "
            f"logits differ from the model's own attention by {far:.2g} of their standard "
            f"deviation (at most {tolerance:g} is rounding); the architecture computes something "
            "that kvbench does not know"
        )
    return Check(max((far for _, far in found), default=0.0), tolerance, len(found))


def differences(model: LoadedModel) -> tuple[list[tuple[int, float]], float]:
    """For each token whose logits were compared: its position, and how far they were apart.

    Also how far the model's own logits are apart in half precision, see `rounding_of`.
    """
    if model.max_context <= ANSWER:
        raise InputError(
            f"model '{model.name}' takes {model.max_context} tokens (max_position_embeddings); "
            f"kvbench needs more than {ANSWER}"
        )
    vocabulary = model.vocabulary
    draw = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(min(1, vocabulary - 1), min(vocabulary, 1000), (n,), generator=draw).tolist()
        for n in (min(n, model.max_context - ANSWER) for n in PROMPTS)
    ]
    rows = [Row(prompt, ANSWER, parse_method(BASELINE, {}), 1.0) for prompt in prompts]
    recorder = Recorder(model.model)
    outcomes = run_rows(
        replace(model, model=recorder),
        rows,
        prefill_chunk=CHUNK,
        repeat=lambda step, _: Repeated(step, capturable=False),
    )
    own = [
        own_logits(model, [*prompt, *outcome.tokens[:-1]])
        for prompt, outcome in zip(prompts, outcomes, strict=True)
    ]
    if any(outcome.failure for outcome in outcomes):
        if all(logits.isfinite().all() for logits in own):
            raise InputError(
                f"model '{model.name}' is not computed right: logits are not finite where the "
                "model's own are"
            )
        return [], 0.0  # the model's own are not finite either; each cell will say so
    result = [
        (position, float(apart(logits, own[row][position])))
        for row, position, logits in found_rows(recorder.found, len(rows))
    ]
    if model.dtype == torch.float32:
        return result, 0.0
    text = [*prompts[0], *outcomes[0].tokens[:-1]]
    return result, rounding_of(model, text, own[0])


def apart(logits: Tensor, expected: Tensor) -> Tensor:
    """[...], how far logits [..., V] are from others, as a share of their standard deviation."""
    return (logits - expected).abs().amax(-1) / expected.std(-1).clamp(min=1e-6)


def rounding_of(model: LoadedModel, text: Sequence[int], own: Tensor) -> float:
    """The largest difference between the model's own logits [T, V] and those of its sdpa attention.

    0 if the model has no other attention than "eager".
    """
    try:
        return float(apart(own_logits(model, text, "sdpa"), own).max())
    except (ValueError, ImportError):
        return 0.0


def found_rows(
    found: Sequence[tuple[Tensor, Tensor]], rows: int
) -> Iterator[tuple[int, int, Tensor]]:
    """(row, position, logits [V]) of each forward: prompts come one after another, then steps."""
    row = -1
    for positions, logits in found:
        if len(positions) == rows:
            places = list(range(rows))
        else:
            row += int(positions[0] < CHUNK)
            places = [row]
        for index, place in enumerate(places):
            yield place, int(positions[index]), logits[index]


def own_logits(model: LoadedModel, text: Sequence[int], attention: str = "eager") -> Tensor:
    """The logits [T, V] of all tokens by the model's own attention, in one forward."""
    model.model.set_attn_implementation(attention)
    ids = torch.tensor([list(text)], device=model.device)
    try:
        with torch.inference_mode():
            logits: Tensor = model.model(input_ids=ids, use_cache=False).logits
    finally:
        model.model.set_attn_implementation(ATTENTION)
    return logits[0].float()


@contextmanager
def lowered(model: Any, thresholds: dict[str, int]) -> Iterator[None]:
    """Lower the thresholds of a model that are numbers above these, for a while."""
    config = model.config.get_text_config(decoder=True)
    changed: list[tuple[Any, str, Any]] = []
    try:
        for owner in [config, *model.modules()]:
            for name, low in thresholds.items():
                value = vars(owner).get(name)
                if isinstance(value, int | float) and value > low:
                    setattr(owner, name, low)
                    changed.append((owner, name, value))
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
