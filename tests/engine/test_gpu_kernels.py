"""The GPU's kernels without a GPU: Triton compiles them for one, and its interpreter runs them.

A new Triton can refuse what an older one compiled. Only these tests notice that without a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton: Any = pytest.importorskip("triton", reason="needs Triton: pip install triton")

from kvbench.engine.kernels import gpu  # noqa: E402  (imports Triton)

SIZES = {"SIZE": 80, "VALUE_SIZE": 64, "GROUP": 3}
ROOMS = {"SIZE_ROOM": 128, "VALUE_ROOM": 64, "GROUP_ROOM": 16}
ADDRESSES = ("here", "keys", "values", "positions", "lengths", "slots")
FLOATS = ("sums", "totals", "mosts", "sinks")
INTERPRETED = """
import torch
from helpers.sequences import Made
from kvbench.engine.kernels.gpu import token_kernel
for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
    for sliding in (None, 50):
        for softcap, sinks in ((None, False), (0.7, True)):
            made = Made([1, 300, 64, 65], 24, 16, 3, dtype)
            made.check(token_kernel, sliding, tolerance, softcap, sinks)
print("equal")
"""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("sliding", "softcap"), [(0, 0.0), (50, 30.0)])
def test_they_compile(capability: int, dtype: torch.dtype, sliding: int, softcap: float) -> None:
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    common = {**SIZES, **ROOMS, "SLIDING": sliding, "SOFTCAP": softcap, "TYPE": gpu.TYPES[dtype]}
    for kernel, more in (
        (gpu._read, {"BLOCK": gpu.BLOCK, "ALIGNED": 16}),
        (gpu._join, {"SINKS": bool(sliding), "PARTS_ROOM": 4}),
    ):
        constants, names = common | more, kernel.arg_names
        kinds = dict.fromkeys(names, element) | dict.fromkeys(constants, "constexpr")
        kinds |= dict.fromkeys(ADDRESSES, "*i64") | dict.fromkeys(FLOATS, "*fp32")
        kinds |= {"scaling": "fp32", "parts": "i32"}
        source = triton.compiler.ASTSource(
            fn=kernel,
            signature={name: kinds[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        assert "cubin" in triton.compile(source, target=target).asm


def test_they_agree_with_float64() -> None:
    # Triton decides when it is imported whether it interprets.
    tests = str(Path(__file__).parent.parent)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": tests}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr
