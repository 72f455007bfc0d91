"""Kernels for single tokens: compared with float64, and without a compiler."""

import subprocess
from pathlib import Path

import pytest
import torch
from helpers.models import loaded_model
from helpers.sequences import Made

from kvbench.engine.kernels.cpu import library, token_kernel
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.spec import parse_method

without_compiler = pytest.mark.skipif(token_kernel(8, 8) is None, reason="there is no C compiler")


@without_compiler
@pytest.mark.parametrize("group", range(1, 10))
@pytest.mark.parametrize(("size", "value_size"), [(8, 8), (32, 24), (5, 7)])
@pytest.mark.parametrize("sliding", [None, 20])
def test_the_kernel_agrees_with_float64(
    group: int, size: int, value_size: int, sliding: int | None
) -> None:
    kernel = token_kernel(size, value_size)
    assert kernel is not None
    Made([1, 40, 600, 33, 256], size, value_size, group).check(kernel, sliding, 2e-5)


@without_compiler
@pytest.mark.parametrize("group", [1, 3, 6])
@pytest.mark.parametrize(("softcap", "sinks"), [(0.7, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("sliding", [None, 20])
def test_the_kernel_caps_logits_and_has_sinks(
    group: int, softcap: float | None, sinks: bool, sliding: int | None
) -> None:
    kernel = token_kernel(8, 8)
    assert kernel is not None
    Made([1, 40, 600, 33, 256], 8, 8, group).check(kernel, sliding, 2e-5, softcap, sinks)


@without_compiler
def test_rows_decode_the_same_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = loaded_model(), torch.arange(1, 90).tolist()
    names = ("full", "recency", "snapkv")
    rows = [Row(prompt, 8, parse_method(name, {}), 0.5) for name in names]
    compiled = run_rows(model, rows, prefill_chunk=30)
    monkeypatch.setattr("kvbench.engine.kernels.cpu.token_kernel", lambda *_: None)
    for a, b in zip(compiled, run_rows(model, rows, prefill_chunk=30), strict=True):
        assert a.tokens == b.tokens


@without_compiler
def test_large_logits_do_not_overflow() -> None:
    kernel = token_kernel(8, 8)
    assert kernel is not None
    made = Made([40, 600], 8, 8, 2)
    made.queries *= 500
    made.check(kernel, None, 1e-4)


@without_compiler
def test_loading_it_leaves_denormal_numbers_alone() -> None:
    assert token_kernel(8, 8) is not None
    assert (torch.tensor([1e-39]) * 1.0).item() != 0


def test_a_compiler_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler in ("false", "no-such-compiler", ""):
        monkeypatch.setenv("CC", compiler)
        assert token_kernel.__wrapped__(8, 8) is None
        with pytest.raises((OSError, subprocess.SubprocessError)):
            library(8, 8)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
