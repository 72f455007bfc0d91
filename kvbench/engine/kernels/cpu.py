"""Attention of single tokens on a CPU, compiled from `cpu.c` by the machine's C compiler.

Unlike PyTorch's kernels, it reads every sequence where it is stored. Without a compiler, the rows
attend one after the other. The compiled file is kept in the user's cache folder. It is loaded from
there only if nobody else can write to the folder, and if the file holds what was compiled.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kvbench.engine.kernels.interface import Sequences, TokenKernel, sinks_of
from kvbench.errors import InputError
from kvbench.files import write_atomically
from kvbench.models.attention import Rules

SOURCE = Path(__file__).parent / "cpu.c"
# Linked without -ffast-math, which would make the whole process flush denormal numbers.
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
LINK = ("-shared", "-lm")


@cache
def token_kernel(size: int, value_size: int) -> TokenKernel | None:
    """The kernel for float32 keys and values of these sizes; None if it cannot be compiled.

    It is compiled once on each machine. InputError if `CC` is no command.
    """
    try:
        function = library(size, value_size).kvbench_token
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    pointers, sizes = [ctypes.c_void_p] * 16, [ctypes.c_int64] * 3
    function.argtypes = [*pointers, *sizes, ctypes.c_float, ctypes.c_float, ctypes.c_int]
    function.restype = None

    def kernel(
        queries: Tensor, keys: Tensor, values: Tensor, sequences: Sequences, rules: Rules
    ) -> Tensor:
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        count, group = queries.shape[:2]
        out = queries.new_empty((count, group, value_size))
        sinks = None if rules.sinks is None else sinks_of(rules, count)
        paged = (None,) * 5 if sequences.pages is None else sequences.pages.tensors
        tensors = (queries, keys, values, *sequences.tensors, sinks, *paged, out)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        numbers = (count, group, rules.sliding or 0, rules.scaling, rules.softcap or 0.0)
        function(*pointers, *numbers, torch.get_num_threads())
        return out

    return kernel


def library(size: int, value_size: int) -> ctypes.CDLL:
    """The compiled code, loaded; OSError or SubprocessError if it cannot be compiled."""
    command = compiler()
    compile_ = [*COMPILE, f"-DSIZE={size}", f"-DVALUE_SIZE={value_size}"]
    link = [*openmp(), *LINK]
    made_from = [SOURCE.read_text(), *command, *compile_, *link, processor()]
    name = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]
    folder = private_folder()
    if folder is not None:
        for path in sorted(folder.glob(f"token-{name}-*.so")):
            with suppress(OSError):
                if path == named_after(path.read_bytes(), folder, name):
                    return ctypes.CDLL(str(path))
                path.unlink()  # truncated, or changed
    if not command or shutil.which(command[0]) is None:
        raise FileNotFoundError("no C compiler")
    with tempfile.TemporaryDirectory() as drafts:
        made, linked = f"{drafts}/token.o", Path(f"{drafts}/token.so")
        for step in ([*compile_, str(SOURCE), "-o", made], [made, *link, "-o", str(linked)]):
            subprocess.run([*command, *step], check=True, capture_output=True, timeout=60)
        if folder is not None:
            contents = linked.read_bytes()
            with suppress(OSError):  # this process can do without: the folder may be full
                path = named_after(contents, folder, name)
                write_atomically(path, contents)
                return ctypes.CDLL(str(path))
        return ctypes.CDLL(str(linked))


def compiler() -> list[str]:
    """The command of the C compiler; InputError if `CC` is none."""
    given = os.environ.get("CC", "cc")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise InputError(
            f"the environment variable CC is {given!r}, which is not a command ({error}); set it "
            "to a C compiler, such as gcc"
        ) from None


def openmp() -> list[str]:
    """The linker's arguments for the OpenMP library that PyTorch has loaded.

    PyTorch's wheels carry a copy, under a name of its own in some. Another library would have a
    second pool of threads, and the threads of each would take the cores of the other's.
    """
    home = Path(torch.__file__).parent
    found = [*home.glob("lib/libgomp*.so*"), *home.with_name("torch.libs").glob("libgomp*.so*")]
    return ["-Wl,--as-needed", *map(str, sorted(found)), "-fopenmp"] if found else ["-fopenmp"]


def private_folder() -> Path | None:
    """The folder of compiled files, which only this user can write to; None if there is none."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not base.is_absolute():  # such a path is to be ignored, says the XDG specification
            base = Path.home() / ".cache"
        folder = base.resolve() / "kvbench" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if folder.resolve() != folder or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return None
        # Whoever may rename a folder above it can put another in its place.
        safe = all(at.stat().st_uid in (0, os.geteuid()) and closed(at) for at in folder.parents)
    except (OSError, RuntimeError, AttributeError):
        return None  # RuntimeError: the user has no home folder; AttributeError: Windows
    return folder if safe else None


def closed(folder: Path) -> bool:
    """Whether not everybody can rename what is in a folder."""
    mode = folder.stat().st_mode
    return not mode & stat.S_IWOTH or bool(mode & stat.S_ISVTX)


def named_after(contents: bytes, folder: Path, name: str) -> Path:
    """The path of a compiled file: its name holds a hash of its contents."""
    return folder / f"token-{name}-{hashlib.sha256(contents).hexdigest()}.so"


def processor() -> str:
    """What `-march=native` depends on, because different machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(
        sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))})
    )
