"""Attention of single tokens on a CPU, compiled from `cpu.c` by the machine's C compiler.

Unlike PyTorch's kernels, it reads every sequence where it is stored. Without a compiler, the rows
attend one after the other. The compiled file is kept in the user's cache folder.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kvbench.engine.kernels.interface import Sequences, TokenKernel, sinks_of
from kvbench.models.attention import Rules

SOURCE = Path(__file__).parent / "cpu.c"
# Linked without -ffast-math, which would make the whole process flush denormal numbers.
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
LINK = ("-shared", "-fopenmp", "-lm")


@cache
def token_kernel(size: int, value_size: int) -> TokenKernel | None:
    """The kernel for float32 keys and values of these sizes; None if it cannot be compiled.

    It is compiled once on each machine.
    """
    try:
        function = ctypes.CDLL(str(library(size, value_size))).kvbench_token
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError):
        return None  # RuntimeError: the user has no home folder
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


def library(size: int, value_size: int) -> Path:
    """The compiled file; OSError or SubprocessError if it cannot be compiled."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    compile_ = [*COMPILE, f"-DSIZE={size}", f"-DVALUE_SIZE={value_size}"]
    made_from = [SOURCE.read_text(), *compiler, *compile_, *LINK, processor()]
    name = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvbench"
    path = folder / f"token-{name}.so"
    if path.exists():
        return path
    if not compiler or shutil.which(compiler[0]) is None:
        raise FileNotFoundError("no C compiler")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as drafts:
        made, linked = f"{drafts}/token.o", f"{drafts}/token.so"
        for step in ([*compile_, str(SOURCE), "-o", made], [made, *LINK, "-o", linked]):
            subprocess.run([*compiler, *step], check=True, capture_output=True, timeout=60)
        os.replace(linked, path)
    return path


def processor() -> str:
    """What `-march=native` depends on, because different machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(
        sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))})
    )
