"""Hashes of everything that can change a measurement: `docs/records.md`, "Fingerprint".

A cell is measured again if and only if its fingerprint is new. So the fingerprint holds the code of
kvbench that measures, and the source of the method and of the task: every class they inherit from,
and every module of their own package that these import.
"""

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import kvbench

# The folders and modules of kvbench that can change a record. The others show, store or order.
MEASURING = (
    "engine",
    "models",
    "sweep/chat.py",
    "sweep/fingerprint.py",
    "sweep/plan.py",
    "sweep/runner.py",
    "heads.py",
    "method.py",
    "metrics.py",
    "registry.py",
    "spec.py",
    "task.py",
)
SOURCES = (".py", ".c", ".h", ".cpp", ".cu")
HOME = Path(kvbench.__file__).parent
BUILT_IN = ("kvbench.methods", "kvbench.tasks")


def digest(value: Any) -> str:
    """A hash of JSON-serialisable data, 20 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@cache
def measuring_code() -> str:
    """A hash of the code of kvbench that measures, 8 hexadecimal digits."""
    found = hashlib.sha256()
    for name in MEASURING:
        for path in sorted([HOME / name, *(HOME / name).rglob("*")]):
            if path.suffix in SOURCES:
                found.update(path.relative_to(HOME).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:8]


@cache
def source_code(*classes: type[Any]) -> str:
    """A hash of the source of some methods or tasks, 8 hexadecimal digits.

    It is kept while the process runs, as the loaded code is: a file that is edited meanwhile counts
    when it is loaded again. A class that was typed in and has no file is hashed as it was compiled.
    """
    parts: dict[str, bytes] = {}
    for cls in dict.fromkeys(base for each in classes for base in each.__mro__):
        module = sys.modules.get(cls.__module__)
        if module is None or not _is_plugin(module.__name__):
            continue
        if _file_of(module) is None:
            parts[f"{cls.__module__}.{cls.__qualname__}"] = repr(_compiled(cls)).encode()
        else:
            parts |= {name: path.read_bytes() for name, path in _own_modules(module)}
    found = hashlib.sha256()
    for name, content in sorted(parts.items()):
        found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()[:8]


def _is_plugin(name: str) -> bool:
    """Whether a module belongs to a plug-in: not to Python, nor to what is hashed by itself."""
    if name.startswith(BUILT_IN):
        return True
    top = name.partition(".")[0]
    return top not in {*sys.stdlib_module_names, "kvbench", "torch", "transformers"}


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


def _own_modules(start: ModuleType) -> Iterator[tuple[str, Path]]:
    """The module and, recursively, the modules of its package that it imports."""
    packages = {_package_of(start.__name__)}
    home = _file_of(start)
    alone = "." not in start.__name__ and not hasattr(start, "__path__")
    # A plug-in that is one file may import what lies beside it, unless all packages lie there.
    beside = home.parent if alone and home and home.parent.name != "site-packages" else None
    waiting, seen = [(start.__name__, home)], {start.__name__}
    while waiting:
        name, path = waiting.pop()
        if path is None:
            continue
        yield name, path
        for imported in _imports(name, path):
            if imported in seen:
                continue
            seen.add(imported)
            if _package_of(imported) in packages:
                waiting.append((imported, _find(imported)))
            elif beside is not None and "." not in imported:
                found = _find(imported)
                if found is not None and beside in (found.parent, found.parent.parent):
                    packages.add(imported)
                    waiting.append((imported, found))


def _package_of(name: str) -> str:
    """The package that a module belongs to, `kvbench.methods` and `kvbench.tasks` by themselves."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "kvbench" else 1])


def _imports(name: str, path: Path) -> Iterator[str]:
    """The names of modules that a Python file imports, wherever in it; some may be attributes."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _find(name: str) -> Path | None:
    """The file of a module, loaded or not; None for what is no Python module."""
    if (module := sys.modules.get(name)) is not None:
        return _file_of(module)
    try:
        spec = find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return None
    path = Path(spec.origin) if spec is not None and spec.origin else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


def _compiled(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """What a class or function without a file does, with those that it calls from its module."""
    if id(value) in seen:
        return None
    seen = seen | {id(value)}
    if isinstance(value, CodeType):
        return (
            value.co_code.hex(),
            value.co_names,
            [_compiled(each, seen) for each in value.co_consts],
        )
    function: Any = value.fget if isinstance(value, property) else value
    function = inspect.unwrap(function)
    function = getattr(function, "__func__", getattr(function, "func", function))
    if isinstance(function, FunctionType):
        used = {name: function.__globals__.get(name) for name in function.__code__.co_names}
        near = {
            name: _compiled(each, seen)
            for name, each in sorted(used.items())
            if getattr(each, "__module__", None) == function.__module__
        }
        return _compiled(function.__code__, seen), repr(function.__defaults__), near
    if isinstance(value, type):
        return {
            name: _compiled(each, seen)
            for name, each in sorted(vars(value).items())
            if not name.startswith("__") or isinstance(each, FunctionType)
        }
    text = repr(value)
    return text if " at 0x" not in text else type(value).__qualname__
