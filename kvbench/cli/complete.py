"""Shell completion: names of methods, tasks, models and runs, found without importing PyTorch.

The source files of the plug-ins are parsed, not imported, so that a press of the Tab key is fast.
"""

import ast
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from kvbench.escape import plain
from kvbench.models.card import EMBEDDED
from kvbench.models.wheel import WHEELS
from kvbench.registry import PLUGIN_GROUP
from kvbench.run_folder import find_runs
from kvbench.sweep.command import ALL, RUNS


def methods(incomplete: str) -> list[str]:
    """Completions of the methods of a run: a comma-separated list, chunked forms included."""
    return _in_list([ALL, *sorted(method_names())], incomplete)


def tasks(incomplete: str) -> list[str]:
    """Completions of a comma-separated list of tasks."""
    return _in_list(sorted(name for name, _ in _registered("task", plugin_classes())), incomplete)


def checkable(incomplete: str) -> list[str]:
    """Completions of a comma-separated list of methods and tasks."""
    return [*_in_list(sorted(method_names()), incomplete), *tasks(incomplete)]


def kinds(incomplete: str) -> list[str]:
    """Completions of what `kvbench list` lists."""
    return _in_list(("methods", "tasks", "sources", "metrics", "models"), incomplete)


def models(incomplete: str) -> list[str]:
    """Models known by name; where none fits, shells complete folders by themselves."""
    return [*EMBEDDED, *WHEELS]


def runs(incomplete: str) -> list[str]:
    """Runs in results/runs by name, the latest first, or in another folder by path."""
    if "/" in incomplete:
        folder = Path(incomplete.rpartition("/")[0] or "/")
        return _typable(str(run) for run in find_runs(folder))
    return _typable(run.name for run in reversed(find_runs(RUNS)))


def method_names() -> Iterator[str]:
    """What `kvbench.spec.method_names` returns, read off the source of the plug-ins."""
    classes = plugin_classes()
    for name, cls in _registered("method", classes):
        yield name
        source = "\n".join(ast.unparse(each) for each in _lineage(cls, classes))
        post_fill = "Family.POST_FILL" in source
        if post_fill and "def select(" not in source:
            yield f"ada-{name}"
        if "Need.REPLAY" in source or "def competition(" in source:
            continue
        if post_fill or "DecodingMethod" in source:
            yield f"{name}-bounded"
        if post_fill:
            yield f"{name}-naive"
            if "observation_window" in source and "def gather(" not in source:
                yield f"{name}-patched"


def plugin_classes() -> list[ast.ClassDef]:
    """The classes at the top of every module of the plug-ins; broken plug-ins are passed over."""
    classes = []
    for entry in entry_points(group=PLUGIN_GROUP):
        with suppress(Exception, SystemExit):
            spec = find_spec(entry.module)
            if spec is None or spec.origin is None:
                continue
            package = spec.submodule_search_locations is not None
            origin = Path(spec.origin)
            for file in sorted(origin.parent.glob("*.py")) if package else [origin]:
                body = ast.parse(file.read_bytes()).body
                classes += [node for node in body if isinstance(node, ast.ClassDef)]
    return classes


def _registered(kind: str, classes: Iterable[ast.ClassDef]) -> Iterator[tuple[str, ast.ClassDef]]:
    """The classes decorated with `register_<kind>("name")`, by that name."""
    for cls in classes:
        for call in cls.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(f"register_{kind}"):
                yield ast.literal_eval(call.args[0]), cls


def _lineage(cls: ast.ClassDef, classes: Iterable[ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """A class and the plug-ins' classes that it inherits from."""
    yield cls
    bases = {ast.unparse(base).rpartition(".")[2] for base in cls.bases}
    for base in classes:
        if base.name in bases and base is not cls:
            yield from _lineage(base, classes)


def _in_list(names: Iterable[str], incomplete: str) -> list[str]:
    """`names` as completions of the last item of a comma-separated list."""
    before, comma, _ = incomplete.rpartition(",")
    return _typable(before + comma + name for name in names if name not in before.split(","))


def _typable(names: Iterable[str]) -> list[str]:
    """The names that a shell can show and take as they are: no control characters."""
    return [name for name in names if name == plain(name)]
