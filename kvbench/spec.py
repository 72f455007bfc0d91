"""Parses a method's name and options, as users type them: registered, chunked or combined.

`snapkv-patched` is post-fill eviction after every prefill chunk; `prulong+snapkv` is a head split
whose retrieval heads are evicted by a post-fill method.
"""

import hashlib
import itertools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from kvbench.arguments import LARGEST
from kvbench.errors import InputError, did_you_mean
from kvbench.files import read_regular
from kvbench.method import (
    EVERY_QUERY,
    Competition,
    DecodingMethod,
    Family,
    Method,
    Need,
    option_name,
)
from kvbench.registry import hint, methods

T = TypeVar("T")


class Chunking(StrEnum):
    """When a post-fill method evicts, and whose queries it observes (docs/methods.md)."""

    NONE = "none"  # once, after the whole prompt
    NAIVE = "naive"  # after each prefill chunk, by the chunk's own last queries
    PATCHED = "patched"  # after each prefill chunk, by the prompt's last queries
    BOUNDED = "bounded"  # after each prefill chunk, of all entries, by the chunk's last queries


POST_FILL_BUDGET = "post_fill_budget"
HEAD_SHARE = "head_share"
ADA = "ada-"  # before the name of a method: the KV heads of a layer compete
CHUNKED = (Chunking.NAIVE, Chunking.PATCHED, Chunking.BOUNDED)
SCORED = (Family.POST_FILL, Family.DECODING)  # families of methods that score entries


@dataclass(frozen=True)
class MethodSpec:
    """A method ready to run.

    In a combination such as `prulong+snapkv`, `method` splits the heads and `post_fill` evicts from
    the retrieval heads, with the budget `post_fill_budget`. With `ada_share` (0..1), as in
    `ada-snapkv`, the KV heads of a layer compete for the budget, and each keeps at least this share
    of the mean (Ada-KV, Feng et al., arXiv 2407.11550).
    """

    name: str
    method: Method
    chunking: Chunking = Chunking.NONE
    post_fill: Method | None = None
    post_fill_budget: float = 0.5
    ada_share: float | None = None

    @property
    def scorer(self) -> Method | None:
        """The method that scores entries, if any does."""
        if self.post_fill is not None:
            return self.post_fill
        return self.method if self.method.family in SCORED else None

    def scorer_budget(self, budget: float) -> float:
        """The budget that the scorer gets when the whole method gets `budget`."""
        return budget if self.post_fill is None else self.post_fill_budget

    @property
    def observation_window(self) -> int:
        """W, the observation window of the scorer in tokens; 0 without one."""
        return self.scorer.observation_window if self.scorer else 0

    @property
    def interval(self) -> int:
        """Decoded tokens between evictions; 0 if nothing is evicted while decoding."""
        return self.scorer.interval if isinstance(self.scorer, DecodingMethod) else 0

    @property
    def protected(self) -> int:
        """How many of the last entries always stay."""
        return self.scorer.protected if self.scorer else 0

    @property
    def competition(self) -> Competition:
        """Which entries compete for the budget."""
        if self.ada_share is not None:
            return Competition.LAYER
        return self.scorer.competition if self.scorer else Competition.HEAD

    @property
    def head_share(self) -> float:
        """The share of the mean capacity that each KV head keeps at least, if heads compete."""
        if self.ada_share is not None:
            return self.ada_share
        return self.scorer.head_share if self.scorer else 0.0

    @property
    def uneven(self) -> bool:
        """Whether the KV heads of a layer may keep different numbers of entries by score."""
        return self.competition is not Competition.HEAD

    @property
    def family(self) -> str:
        """The paper's family; for chunked eviction, with the variant."""
        if self.chunking is not Chunking.NONE and self.post_fill is None:
            decodes = ", while decoding" if self.method.family is Family.DECODING else ""
            return f"chunked eviction ({self.chunking}{decodes})"
        return str(self.method.family)

    @property
    def options(self) -> dict[str, Any]:
        """All options, for the record; a file as its name and a hash of its content."""
        return self._options(recorded)

    @property
    def values(self) -> dict[str, Any]:
        """All options as the methods hold them; a file as its path."""
        return self._options(option_values)

    def _options(self, of: Callable[[Method], dict[str, Any]]) -> dict[str, Any]:
        options = of(self.method)
        if self.post_fill is not None:
            options |= {f"post_fill.{key}": value for key, value in of(self.post_fill).items()}
            options[POST_FILL_BUDGET] = self.post_fill_budget
        if self.ada_share is not None:
            options[HEAD_SHARE] = self.ada_share
        return options

    @property
    def depends_on_chunk(self) -> bool:
        """Whether results depend on the size of the prefill chunk."""
        streams = self.method.family in (Family.RECENCY, Family.HEAD_SPLIT)
        return streams or self.chunking is not Chunking.NONE


def option_values(method: Method) -> dict[str, Any]:
    """A method's options by the names that users type."""
    return {option_name(field): getattr(method, field.name) for field in fields(method)}


def recorded(method: Method) -> dict[str, Any]:
    """A method's options and remarks, JSON-serialisable; OSError if a file cannot be read."""
    options = option_values(method)
    for name, value in options.items():
        if isinstance(value, Path):
            digest = hashlib.sha256(read_regular(value)).hexdigest()[:12]
            options[name] = f"{value.name} sha256:{digest}"
    return options | method.remarks()


def labels_of(specs: Sequence[MethodSpec]) -> list[str]:
    """A label for each method: its name, and the options that tell it from others of that name."""
    labels = []
    for spec in specs:
        same = [each.values for each in specs if each.name == spec.name]
        parts = [
            f"{name}={value}"
            for name, value in spec.values.items()
            if any(each.get(name) != value for each in same)
        ]
        labels.append(f"{spec.name} ({', '.join(parts)})" if parts else spec.name)
    return labels


def method_names() -> list[str]:
    """All names of methods without `+`: the registered ones and their chunked forms, sorted."""
    names = []
    for name in methods.names():
        names.append(name)
        cls = methods.get(name)
        family = cls.family
        competition: Any = cls.competition  # an attribute, or a property
        by_head = competition is not Competition.LAYER and cls.select is Method.select
        if family is Family.POST_FILL and by_head:
            names.append(f"{ADA}{name}")
        if Need.REPLAY in cls.needs or cls.competition is not Method.competition:
            continue
        if family in SCORED:
            names.append(f"{name}-{Chunking.BOUNDED}")
        if family is Family.POST_FILL:
            names.append(f"{name}-{Chunking.NAIVE}")
            if has_observation_window(name):
                names.append(f"{name}-{Chunking.PATCHED}")
    return sorted(names)


def has_observation_window(name: str) -> bool:
    """Whether the post-fill method `name` uses the prompt's last queries, and not all of them."""
    cls = methods.get(name)
    return cls.observation_window is not Method.observation_window and cls.gather is Method.gather


def parse_methods(
    name: str,
    options: Mapping[str, Any],
    card_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[MethodSpec]:
    """The method called `name`, once for each combination of the options that are tuples of values.

    Options that change nothing for this method add nothing. InputError as in `parse_method`.
    """
    first = {key: each[0] if isinstance(each, tuple) else each for key, each in options.items()}
    specs = [parse_method(name, first, card_options)]
    axes = {}
    for key, values in options.items():
        if isinstance(values, tuple):
            tried = [parse_method(name, {**first, key: value}, card_options) for value in values]
            if any(spec != specs[0] for spec in tried):
                axes[key] = values
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        spec = parse_method(name, {**first, **chosen}, card_options)
        if spec not in specs:
            specs.append(spec)
    return specs


def parse_method(
    name: str,
    options: Mapping[str, Any],
    card_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> MethodSpec:
    """The method called `name` with its options; InputError if the name or an option is wrong.

    An option such as `window` applies to every method that has it, `snapkv.window` to one method.
    `card_options` are a model's defaults by registered name; `options` override them.
    """
    if name in methods.names():
        return checked(MethodSpec(name, build(name, options, card_options)))
    if name.startswith(ADA):
        inner = parse_method(name.removeprefix(ADA), options, card_options)
        if inner.scorer is None or inner.post_fill is not None:
            raise InputError(f"method '{name}': '{inner.name}' does not score entries")
        if inner.competition is Competition.LAYER:
            raise InputError(f"method '{name}': the KV heads of '{inner.name}' compete already")
        if type(inner.scorer).select is not Method.select:
            raise InputError(
                f"method '{name}': '{inner.name}' selects entries in each KV head, so KV heads "
                f"cannot compete; use {inner.name}"
            )
        share = convert(float, options.get(HEAD_SHARE, 0.2), f"{name}: option {HEAD_SHARE}")
        if not 0 <= share <= 1:
            raise InputError(f"{name}: {HEAD_SHARE} must be from 0 to 1, not {share}")
        return checked(replace(inner, name=name, ada_share=share))
    split, plus, rest = name.partition("+")
    if plus:
        if split not in methods.names() or methods.get(split).family is not Family.HEAD_SPLIT:
            raise InputError(f"method '{name}': '{split}' is not a head split")
        inner = parse_method(rest, options, card_options)
        if inner.scorer is None or inner.scorer.family is not Family.POST_FILL or inner.uneven:
            raise InputError(
                f"method '{name}': '{rest}' is not a post-fill method whose KV heads keep equal "
                "numbers of entries"
            )
        own = options.get(f"{split}.{POST_FILL_BUDGET}", options.get(POST_FILL_BUDGET, 0.5))
        budget = convert(float, own, f"{name}: option {POST_FILL_BUDGET}")
        if not 0 < budget <= 1:
            raise InputError(f"{name}: {POST_FILL_BUDGET} must be above 0 and at most 1, not {own}")
        method = build(split, options, card_options)
        return MethodSpec(name, method, inner.chunking, inner.method, budget)
    base, dash, variant = name.rpartition("-")
    if dash and base in methods.names() and variant in CHUNKED:
        method = build(base, options, card_options)
        bounded = variant == Chunking.BOUNDED and method.family is Family.DECODING
        if method.family is not Family.POST_FILL and not bounded:
            raise InputError(f"method '{name}': only post-fill methods are chunked, not '{base}'")
        window = of_method(name, lambda: method.observation_window)
        if variant == Chunking.PATCHED and not 0 < window < EVERY_QUERY:
            raise InputError(
                f"method '{name}': '{base}' observes no last queries, so patching would change "
                f"nothing; use {base}-{Chunking.NAIVE}"
            )
        return checked(MethodSpec(name, method, Chunking(variant)))
    raise InputError(f"unknown method '{name}': {hint(name, method_names())}")


def checked(spec: MethodSpec) -> MethodSpec:
    """The method; InputError if its form is one that cannot be measured."""
    scorer = spec.scorer
    if scorer is None:
        return spec
    share = of_method(spec.name, lambda: float(spec.head_share))
    if not (isinstance(spec.competition, Competition) and 0 <= share <= 1):
        raise InputError(
            f"method '{spec.name}' has the competition {spec.competition!r} and the head_share "
            f"{spec.head_share!r}; expected a kvbench.method.Competition and a number from 0 to 1"
        )
    if spec.uneven and (spec.chunking is not Chunking.NONE or spec.interval):
        turned_off = "" if spec.chunking is not Chunking.NONE else " (interval=0 turns that off)"
        raise InputError(
            f"method '{spec.name}': KV heads of different lengths are evicted once, after the "
            f"prompt: not after each chunk, nor while decoding{turned_off}"
        )
    if Need.REPLAY in scorer.needs and spec.chunking is not Chunking.NONE:
        raise InputError(f"method '{spec.name}': a replay needs the whole prompt in the cache")
    return spec


def check_option_names(options: Mapping[str, Any], specs: Sequence[MethodSpec]) -> None:
    """InputError for an option that none of the methods has."""
    used: set[str] = set()
    for spec in specs:
        for method in (spec.method, spec.post_fill):
            if method is not None:
                used |= set(type(method).options())
                used |= {f"{method.name}.{key}" for key in type(method).options()}
        if spec.post_fill is not None:
            used |= {POST_FILL_BUDGET, f"{spec.method.name}.{POST_FILL_BUDGET}"}
        if spec.ada_share is not None:
            used.add(HEAD_SHARE)
    for key in options:
        if key not in used:
            hint = did_you_mean(key, used) if used else "the chosen methods have no options"
            raise InputError(f"no chosen method has an option '{key}': {hint}")


def build(
    name: str,
    options: Mapping[str, Any],
    card_options: Mapping[str, Mapping[str, Any]] | None,
) -> Method:
    """The registered method `name`, with options converted to the types of its fields."""
    cls = methods.get(name)
    known = cls.options()
    hints = typing.get_type_hints(cls)
    given = dict((card_options or {}).get(name, {}))
    for option in given:
        if option not in known:
            hint = did_you_mean(option, known) if known else "it has none"
            raise InputError(f"the model's card gives {name} an option '{option}': {hint}")
    given |= {key: value for key, value in options.items() if key in known}
    prefix = f"{name}."
    for key, value in options.items():
        if key.startswith(prefix):
            option = key.removeprefix(prefix)
            if option == POST_FILL_BUDGET:
                continue
            if option not in known:
                raise InputError(f"{name} has no option '{option}': {did_you_mean(option, known)}")
            given[option] = value
    names = {option_name(field): field.name for field in fields(cls)}
    values = {
        names[key]: convert(hints[names[key]], value, f"{name}: option {key}")
        for key, value in given.items()
    }
    missing = [key for key, default in known.items() if default is MISSING and key not in given]
    if missing:
        raise InputError(f"{name} needs --option {missing[0]}=...")
    check_family(cls)
    return of_method(name, lambda: cls(**values))


def of_method(name: str, ask: Callable[[], T]) -> T:
    """What a method answers; InputError, naming it, if it raises."""
    try:
        return ask()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"method '{name}' raises {type(error).__name__}: {reason}") from None


def check_family(cls: type[Method]) -> None:
    """InputError for a method that would keep everything, whatever it is asked for."""
    if not isinstance(cls.family, Family):
        known = ", ".join(f"Family.{family.name}" for family in Family)
        raise InputError(f"method '{cls.name}' has the family {cls.family!r}; expected {known}")
    only_scores = cls.scores is not Method.scores and cls.windows is Method.windows
    if only_scores and cls.family not in SCORED:
        raise InputError(
            f"method '{cls.name}' overrides scores, which is asked of Family.POST_FILL only; its "
            f"family is Family.{cls.family.name}"
        )


def convert(kind: Any, value: Any, where: str) -> Any:
    """`value` (text, or from YAML) as a `kind`; InputError if it cannot be converted."""
    if isinstance(kind, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not types.NoneType]
        return None if value is None else convert(kinds[0], value, where)
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and isinstance(value, float):
            raise ValueError
        converted = kind(value)
        if isinstance(converted, float) and not math.isfinite(converted):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        name = getattr(kind, "__name__", str(kind))
        raise InputError(f"{where} must be {name}, not {json.dumps(value, default=str)}") from None
    if kind is int and abs(converted) > LARGEST:
        raise InputError(f"{where} is too large: give at most {LARGEST}")
    return converted
