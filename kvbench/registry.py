"""Methods, tasks, sources of tasks and metrics by name.

The core imports no method and no task. They register themselves when `load_plugins` imports the
entry points of the group `kvbench.plugins`: the built-in ones and those of other packages alike
(`docs/architecture.md`). A plug-in that cannot be loaded is named and left out.
"""

import importlib
import pkgutil
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from kvbench.errors import InputError, debugging, did_you_mean
from kvbench.method import Method
from kvbench.task import Task

PLUGIN_GROUP = "kvbench.plugins"

T = TypeVar("T")
C = TypeVar("C", bound=Any)


class PluginWarning(UserWarning):
    """A plug-in could not be loaded and is left out."""


class Registry(Generic[T]):
    """The classes, or functions, of one kind (methods, tasks, metrics) by the name a user types.

    With a `base`, they are subclasses of it that have the attributes `needed`.
    """

    def __init__(self, kind: str, base: type | None = None, needed: Sequence[str] = ()) -> None:
        self.kind, self.base, self.needed = kind, base, needed
        self._known: dict[str, T] = {}
        _registries.append(self)

    def register(self, name: str) -> Callable[[C], C]:
        """Decorator that sets `name`.

        Raises ValueError if something else already has the name, TypeError for what is none of the
        kind.
        """

        def add(thing: C) -> C:
            base = self.base
            if base is not None and not (isinstance(thing, type) and issubclass(thing, base)):
                raise TypeError(f"{self.kind} '{name}' is not a subclass of {base.__name__}")
            if missing := [each for each in self.needed if not hasattr(thing, each)]:
                raise TypeError(f"{self.kind} '{name}' does not say its {' and '.join(missing)}")
            known: Any = self._known.get(name)
            if known is not None and known.__qualname__ != thing.__qualname__:
                raise ValueError(f"two {self.kind}s are called '{name}': {known} and {thing}")
            self._known[name] = thing
            thing.name = name
            return thing

        return add

    def get(self, name: str) -> T:
        """What is called `name`; InputError, with the nearest name, if there is none."""
        load_plugins()
        try:
            return self._known[name]
        except KeyError:
            raise InputError(f"unknown {self.kind} '{name}': {hint(name, self._known)}") from None

    def names(self) -> list[str]:
        """All registered names, sorted."""
        load_plugins()
        return sorted(self._known)


_registries: list[Registry[Any]] = []
_left_out: dict[str, str] = {}  # plug-ins that could not be loaded, each with the reason

methods: Registry[type[Method]] = Registry("method", Method, ["family"])
tasks: Registry[type[Task]] = Registry("task", Task, ["metric", "subtasks"])
# A source makes a task of what a user writes after its name and a colon, as in `hf:NAME`.
task_sources: Registry[Callable[[str], Task]] = Registry("source of tasks")
register_method = methods.register
register_task = tasks.register
register_task_source = task_sources.register
PATHS = "file"  # the source that takes paths, also without its name before them

_loaded = False


def load_plugins() -> None:
    """Import every package of the entry-point group `kvbench.plugins`, once.

    kvbench's own come first. One of another package that fails, with whatever it raises, registers
    nothing, and a PluginWarning names it. InputError if kvbench's own lack a package.
    """
    global _loaded
    if _loaded:
        return
    _loaded = True
    try:
        for entry in sorted(entry_points(group=PLUGIN_GROUP), key=lambda entry: not _is_own(entry)):
            if _is_own(entry):
                entry.load()
            else:
                _load(f"{entry.name} ({entry.value})", entry.load)
    except BaseException as error:
        _loaded = False
        if not isinstance(error, ImportError):
            raise
        raise InputError(
            f"kvbench's own {entry.name} cannot be imported: {error}; install what they need: "
            "pip install 'kvbench[run]'"
        ) from error
    for name, reason in _left_out.items():
        warnings.warn(
            f"plug-in {name} cannot be loaded and is left out: {reason}; mend or uninstall it "
            "(KVBENCH_DEBUG=1 shows where)",
            PluginWarning,
            stacklevel=2,
        )


def _load(name: str, load: Callable[[], Any]) -> None:
    """Load a plug-in; if it fails, whatever it raises, it registers nothing and is left out."""
    before = [dict(registry._known) for registry in _registries]
    try:
        load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        for registry, known in zip(_registries, before, strict=False):
            registry._known = known
        if debugging():
            traceback.print_exception(error)
        _left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"


def _is_own(entry: EntryPoint) -> bool:
    return entry.value.startswith("kvbench.")


def hint(name: str, known: Iterable[str]) -> str:
    """`did_you_mean`, with the plug-ins that could not be loaded and may have had the name."""
    text = did_you_mean(name, known)
    if _left_out:
        text += f"; not loaded: {', '.join(f'{each}: {why}' for each, why in _left_out.items())}"
    return text


def open_task(text: str) -> Task:
    """The task that a user names: a registered one, SOURCE:REST, or a path.

    Raises InputError if there is no such task, and whatever the task or the source raises.
    """
    if (found := source_of(text)) is None:
        return tasks.get(text)()
    source, rest = found
    return task_sources.get(source)(rest)


def source_of(text: str) -> tuple[str, str] | None:
    """The source of tasks that a text names, and what the source is given; None: no source.

    A registered name comes first. A path contains a slash, ends in .jsonl, or is a folder.
    """
    if text in tasks.names():
        return None
    source, colon, rest = text.partition(":")
    if colon and source in task_sources.names():
        return source, rest
    is_path = "/" in text or text.endswith(".jsonl") or Path(text).is_dir()
    return (PATHS, text) if is_path else None


def import_submodules(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that a new file in it registers itself.

    A file that fails is left out, as a plug-in is. ImportError without PyTorch, which most need.
    """
    for module in pkgutil.iter_modules(path):
        name = f"{package}.{module.name}"
        if module.name.startswith("_"):
            continue
        if find_spec("torch") is None:
            importlib.import_module(name)
        else:
            _load(name, partial(importlib.import_module, name))
