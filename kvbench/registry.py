"""Methods, tasks, sources of tasks and metrics by name.

The core imports no method and no task. They register themselves when `load_plugins` imports the
entry points of the group `kvbench.plugins`: the built-in ones and those of other packages alike
(`docs/architecture.md`).
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kvbench.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from kvbench.method import Method
    from kvbench.task import Task

PLUGIN_GROUP = "kvbench.plugins"

T = TypeVar("T")
C = TypeVar("C", bound=Any)


class Registry(Generic[T]):
    """The classes, or functions, of one kind (methods, tasks, metrics) by the name a user types."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Decorator that sets `name`; raises ValueError if something else already has the name."""

        def add(thing: C) -> C:
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
            hint = did_you_mean(name, self._known)
            raise InputError(f"unknown {self.kind} '{name}': {hint}") from None

    def names(self) -> list[str]:
        """All registered names, sorted."""
        load_plugins()
        return sorted(self._known)


methods: "Registry[type[Method]]" = Registry("method")
tasks: "Registry[type[Task]]" = Registry("task")
# A source makes a task of what a user writes after its name and a colon, as in `hf:NAME`.
task_sources: "Registry[Callable[[str], Task]]" = Registry("source of tasks")
register_method = methods.register
register_task = tasks.register
register_task_source = task_sources.register
PATHS = "file"  # the source that takes paths, also without its name before them

_loaded = False


def load_plugins() -> None:
    """Import every package of the entry-point group `kvbench.plugins`, once."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for entry in entry_points(group=PLUGIN_GROUP):
        try:
            entry.load()
        except ImportError as error:
            raise InputError(
                f"plug-in '{entry.name}' ({entry.value}) cannot be imported: {error}; "
                "install what it needs (for kvbench itself: pip install 'kvbench[run]')"
            ) from error


def open_task(text: str) -> "Task":
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


def import_submodules(package: str, path: Iterable[str]) -> list[Any]:
    """Import every module of a package, so that a new file in it registers itself."""
    return [
        importlib.import_module(f"{package}.{module.name}")
        for module in pkgutil.iter_modules(path)
        if not module.name.startswith("_")
    ]
