"""Hashes of everything that can change a measurement: `docs/records.md`, "Fingerprint".

A cell is measured again if and only if its fingerprint is new. So the fingerprint holds the code of
kvbench that measures, and the source of the method and of the task: every class they inherit from,
and every module of their own package that these import.
"""

import ast
import dis
import hashlib
import json
import sys
from collections.abc import Iterator
from functools import cache, cached_property, partial
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from importlib.util import resolve_name
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import kvbench

# The folders and modules of kvbench that can change a record. The others show, store or order.
MEASURING = (
    "engine",
    "models",
    "sweep/chat.py",
    "sweep/fingerprint.py",
    "sweep/length.py",
    "sweep/plan.py",
    "sweep/runner.py",
    "heads.py",
    "method.py",
    "judge.py",
    "metrics.py",
    "registry.py",
    "spec.py",
    "task.py",
)
SOURCES = (".py", ".c", ".h", ".cpp", ".cu")
HOME = Path(kvbench.__file__).parent
# In the order in which Python looks for a module.
SUFFIXES = (*EXTENSION_SUFFIXES, *SOURCE_SUFFIXES, *BYTECODE_SUFFIXES)
BUILT_IN = ("kvbench.methods", "kvbench.tasks")


def digest(value: Any) -> str:
    """A hash of JSON-serialisable data, 20 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def content_digest(value: Any) -> str:
    """A hash of any data: of objects by what they are made of, of tensors by their bytes."""
    return digest(repr(_compiled(value, {})))


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
def source_code(*things: Any) -> str:
    """A hash of the source of some methods, tasks or metrics, 8 hexadecimal digits.

    It is kept while the process runs, as the loaded code is: a file that is edited meanwhile counts
    when it is loaded again. A class that was typed in and has no file is hashed as it was compiled.
    """
    parts: dict[str, bytes] = {}
    bases = (base for each in things for base in getattr(each, "__mro__", (each,)))
    for cls in dict.fromkeys(bases):
        module = sys.modules.get(cls.__module__)
        if module is None or not _is_plugin(module.__name__):
            continue
        if _file_of(module) is None:
            parts[f"{cls.__module__}.{cls.__qualname__}"] = repr(_compiled(cls, {})).encode()
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
    """The module, its parent packages and, recursively, the modules of its package they import."""
    # What `python -m package.module` runs is called `__main__`, but it imports as its own name.
    spec = start.__spec__ if start.__name__ == "__main__" else None
    start_name = start.__name__ if spec is None else spec.name
    packages = {_package_of(start_name)}
    home = _file_of(start)
    alone = "." not in start_name and not hasattr(start, "__path__")
    # A plug-in that is one file may import what lies beside it, unless all packages lie there.
    beside = home.parent if alone and home and home.parent.name != "site-packages" else None
    waiting, seen = [(start_name, home)], {start_name}
    while waiting:
        name, path = waiting.pop()
        if path is None:
            continue
        yield name, path
        for whole in (name, *_imports(name, path)):
            for used in _with_parents(whole):
                if used in seen:
                    continue
                seen.add(used)
                if beside is not None and "." not in used and _lies_in(beside, used):
                    packages.add(used)
                if _package_of(used) in packages:
                    waiting.append((used, _find(used)))


def _with_parents(name: str) -> list[str]:
    """`a`, `a.b` and `a.b.c` for `a.b.c`: importing the last runs them all."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _lies_in(folder: Path, name: str) -> bool:
    """Whether a module or package, with or without an `__init__.py`, lies in a folder."""
    found = _find(name)
    files = [found] if found is not None else []
    return any(path.parent == folder for path in [*files, *_folders(name)])


def _package_of(name: str) -> str:
    """The package that a module belongs to, `kvbench.methods` and `kvbench.tasks` by themselves."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "kvbench" else 1])


def _imports(name: str, path: Path) -> Iterator[str]:
    """The names of modules that a Python file imports, wherever in it; some may be attributes."""
    if path.suffix != ".py":
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # it cannot run, so it imports nothing
        return
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                base = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # above the top of the package
                continue
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _find(name: str) -> Path | None:
    """The file of a module, loaded or not; None for what is none. It imports nothing."""
    if (module := sys.modules.get(name)) is not None:
        return _file_of(module)
    parent, _, last = name.rpartition(".")
    for folder in _folders(parent):
        for start in (folder / last / "__init__", folder / last):
            for suffix in SUFFIXES:
                if (path := start.with_name(start.name + suffix)).is_file():
                    return path
    return None


def _folders(package: str) -> list[Path]:
    """Where the modules of a package lie, loaded or not; `sys.path` for those of no package."""
    if not package:
        return [Path(each).absolute() for each in sys.path]
    if (module := sys.modules.get(package)) is not None:
        return [Path(each) for each in getattr(module, "__path__", [])]
    parent, _, last = package.rpartition(".")
    found = [each / last for each in _folders(parent) if (each / last).is_dir()]
    regular = [each for each in found if (each / "__init__.py").is_file()]
    return regular[:1] or found


def _compiled(value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    """What a value, or a class or function without a file, is made of, with all that it uses.

    `seen` numbers the objects met so far, and keeps them alive so that their ids stay theirs.
    """
    import numpy as np
    import torch

    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, tuple):
        return [type(value).__qualname__, [_compiled(each, seen) for each in value]]
    if isinstance(value, set | frozenset):
        return ["set", sorted(repr(_compiled(each, dict(seen))) for each in value)]
    if isinstance(value, torch.Tensor | np.ndarray):
        return _numbers(value)
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, _compiled(value.co_consts, seen)]
    if isinstance(value, FunctionType | type) and not _is_typed_in(value):
        return [value.__module__, value.__qualname__, _own_file(value.__module__)]
    if (parts := _parts(value)) is None:
        text = repr(value)
        return text if " at 0x" not in text else type(value).__qualname__
    if id(value) in seen:
        return seen[id(value)][0]
    seen[id(value)] = len(seen), value
    return [type(value).__qualname__, [_compiled(each, seen) for each in parts]]


def _parts(value: Any) -> list[Any] | None:
    """What an object is made of; None if only its text is known."""
    import torch

    if isinstance(value, FunctionType):
        used = [name for name in _global_names(value.__code__) if name in value.__globals__]
        near = [(name, value.__globals__[name]) for name in used]
        defaults = [value.__defaults__, value.__kwdefaults__]
        return [value.__code__, *defaults, _closure(value), *near]
    if isinstance(value, type):
        own = [
            (name, each)
            for name, each in sorted(vars(value).items())
            if not name.startswith("__")
            or isinstance(each, FunctionType | staticmethod | classmethod | property)
        ]
        return [value.__bases__, *own]
    if isinstance(value, list):
        return list(value)
    if isinstance(value, dict):
        return sorted(value.items(), key=lambda item: repr(item[0]))
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, cached_property):
        return [value.func]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    kind = type(value)
    own_kind = _is_typed_in(kind) or _own_file(kind.__module__)
    if hasattr(value, "__dict__") and (own_kind or isinstance(value, torch.nn.Module)):
        return [kind, vars(value)]
    if callable(value) and (wrapped := getattr(value, "__wrapped__", None)) is not None:
        return [wrapped]
    return None


def _global_names(code: CodeType) -> list[str]:
    """The globals that code reads, also in the functions and comprehensions inside it."""
    reads = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
    found = {each.argval for each in dis.get_instructions(code) if each.opname in reads}
    for each in code.co_consts:
        if isinstance(each, CodeType):
            found.update(_global_names(each))
    return sorted(found)


def _closure(function: FunctionType) -> list[Any]:
    """The values of outer functions that a function uses; None for one that is not set yet."""
    found: list[Any] = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            found.append(None)
    return found


def _is_typed_in(value: Any) -> bool:
    """Whether a class or function belongs to a plug-in and has no file."""
    name = value.__module__ or ""
    module = sys.modules.get(name)
    return _is_plugin(name) and (module is None or _file_of(module) is None)


@cache
def _own_file(name: str) -> str:
    """A hash of a module that is a file of the user's, with what it imports; else nothing."""
    module = sys.modules.get(name)
    file = None if module is None else _file_of(module)
    installed = ("site-packages", "dist-packages")
    if module is None or file is None or not _is_plugin(name):
        return ""
    if any(each in file.parts for each in installed):
        return ""
    return digest(sorted((each, path.read_bytes().hex()) for each, path in _own_modules(module)))


def _numbers(value: Any) -> Any:
    """A tensor or array by its bytes, of which its text would show only some."""
    import numpy as np
    import torch

    kind = [type(value).__qualname__, str(value.dtype), tuple(value.shape)]
    if isinstance(value, np.ndarray):
        content = repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes()
    else:
        try:
            flat = value.detach().cpu().contiguous().reshape(-1)
            content = flat.view(torch.uint8).numpy().tobytes()
        except (RuntimeError, NotImplementedError, TypeError):  # without plain memory
            return kind
    return [*kind, hashlib.sha256(content).hexdigest()]
