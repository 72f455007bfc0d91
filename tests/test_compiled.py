"""The compiled attention of single tokens: against float64, and where there is no compiler."""

import subprocess
from pathlib import Path

import pytest
import torch
from models import loaded_model

from kvbench.attention import Reference
from kvbench.compiled import library, token_kernel
from kvbench.engine import Row, run_rows
from kvbench.spec import parse_method

without_compiler = pytest.mark.skipif(token_kernel() is None, reason="there is no C compiler")


@without_compiler
@pytest.mark.parametrize("group", range(1, 10))
@pytest.mark.parametrize(("size", "value_size"), [(8, 8), (32, 24), (5, 7)])
def test_the_kernel_agrees_with_the_float64_reference(
    group: int, size: int, value_size: int
) -> None:
    kernel = token_kernel()
    assert kernel is not None
    torch.manual_seed(group)
    lengths = torch.tensor([1, 40, 17, 33, 2])
    queries = 3 * torch.randn(5, group, size)
    keys, values = torch.randn(5, 41, size), torch.randn(5, 41, value_size)
    keys[0, 1:] = values[0, 1:] = torch.nan  # beyond its length nothing is read
    got = kernel(queries, keys, values, lengths, 40, 0.7)
    keys[0, 1:] = values[0, 1:] = 0
    want = Reference().token(
        queries, keys, values, scaling=0.7, lengths=lengths, seen=40, mask=None, sliding=None
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@without_compiler
def test_rows_decode_the_same_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = loaded_model(), torch.arange(1, 90).tolist()
    names = ("full", "recency", "snapkv")
    rows = [Row(prompt, 8, parse_method(name, {}), 0.5) for name in names]
    compiled = run_rows(model, rows, prefill_chunk=30)
    monkeypatch.setattr("kvbench.attention.token_kernel", lambda: None)
    for a, b in zip(compiled, run_rows(model, rows, prefill_chunk=30), strict=True):
        assert a.tokens == b.tokens


@without_compiler
def test_large_logits_do_not_overflow() -> None:
    kernel = token_kernel()
    assert kernel is not None
    keys = torch.tensor([[[1.0], [2.0], [-300.0]]])
    got = kernel(torch.tensor([[[500.0]]]), keys, keys, torch.tensor([3]), 3, 1.0)
    torch.testing.assert_close(got, torch.tensor([[[2.0]]]))


@without_compiler
def test_loading_it_leaves_denormal_numbers_alone() -> None:
    assert token_kernel() is not None
    assert (torch.tensor([1e-39]) * 1.0).item() != 0


def test_a_compiler_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler in ("false", "no-such-compiler", ""):
        monkeypatch.setenv("CC", compiler)
        assert token_kernel.__wrapped__() is None
        with pytest.raises((OSError, subprocess.SubprocessError)):
            library()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
