"""Methods, tasks and metrics by name.

The core imports no method and no task. They register themselves when `load_plugins` imports the
entry points of the group `kvbench.plugins`: the built-in ones and those of other packages alike
(`docs/architecture.md`).
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
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
register_method = methods.register
register_task = tasks.register

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


def import_submodules(package: str, path: Iterable[str]) -> list[Any]:
    """Import every module of a package, so that a new file in it registers itself."""
    return [
        importlib.import_module(f"{package}.{module.name}")
        for module in pkgutil.iter_modules(path)
        if not module.name.startswith("_")
    ]
