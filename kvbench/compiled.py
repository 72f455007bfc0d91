"""Attention of single tokens on a CPU, compiled from `token.c` by the machine's C compiler.

PyTorch's own kernels take up to twice as long for the few queries of a query group. They do the
work where there is no compiler. What is compiled is kept in the user's cache folder.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).parent / "token.c"
AT_ONCE = 4  # as in token.c: queries that share a pass over the keys
# Linked apart from -ffast-math, which would make the whole process flush denormal numbers.
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
LINK = ("-shared", "-fopenmp", "-lm")

# (queries [U, G, D], keys [U, S, D], values [U, S, Dv], lengths [U], at most `seen`, scaling)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


@cache
def token_kernel() -> Kernel | None:
    """The kernel, compiled if it has not been on this machine; None if it cannot be."""
    try:
        function = ctypes.CDLL(str(library())).kvbench_token
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    pointers, sizes = [ctypes.c_void_p] * 6, [ctypes.c_int64] * 6
    function.argtypes = [*pointers, *sizes, ctypes.c_float, ctypes.c_int]
    function.restype = None

    def kernel(
        queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, seen: int, scaling: float
    ) -> Tensor:
        queries = queries.contiguous()
        count, group, size = queries.shape
        room, value_size = values.shape[1:]
        threads = torch.get_num_threads()
        out = queries.new_empty((count, group, value_size))
        scratch = queries.new_empty((threads, AT_ONCE * seen))
        tensors = (queries, keys, values, lengths, out, scratch)
        sizes = (count, group, room, size, value_size, seen)
        function(*(tensor.data_ptr() for tensor in tensors), *sizes, scaling, threads)
        return out

    return kernel


def library() -> Path:
    """The compiled file; OSError or SubprocessError if there is none and none can be made."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    made_from = [SOURCE.read_text(), *compiler, *COMPILE, *LINK, processor()]
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
        for step in ([*COMPILE, str(SOURCE), "-o", made], [made, *LINK, "-o", linked]):
            subprocess.run([*compiler, *step], check=True, capture_output=True, timeout=60)
        os.replace(linked, path)
    return path


def processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(
        sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))})
    )
