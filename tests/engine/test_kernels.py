"""Kernels for single tokens: compared with float64, and without a compiler."""

import ctypes
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import loaded_model
from helpers.process import kvbench_here
from helpers.sequences import Made

from kvbench.engine.kernels import cpu
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


def test_a_compiler_that_is_no_command_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", 'gcc "-O2')
    monkeypatch.setattr("kvbench.engine.kernels.cpu.token_kernel", token_kernel.__wrapped__)
    done = kvbench_here("run", "--task", "rag", "--samples", "1", "--out", "r", folder=tmp_path)
    assert done.returncode == 2
    assert "CC is 'gcc \"-O2', which is not a command (No closing quotation)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that copies what the compiler makes, which takes seconds, to its last argument."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        made = place(library(8, 8))
    program = folder / "cc"
    program.write_text(f'#!/bin/sh\nfor last; do :; done\ncp {shlex.quote(str(made))} "$last"\n')
    program.chmod(0o700)
    return program


@pytest.fixture
def kernels(compiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of compiled files, not made yet, in an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(compiled))
    return tmp_path / "kvbench" / "kernels"


def place(loaded: ctypes.CDLL) -> Path:
    return Path(loaded._name)


@without_compiler
def test_a_compiled_file_is_kept_and_found_again(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = place(library(8, 8))
    assert list(kernels.iterdir()) == [kept]
    assert kernels.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(subprocess, "run", None)
    assert place(library(8, 8)) == kept


@without_compiler
@pytest.mark.parametrize(
    "damage",
    [
        lambda contents: b"",
        lambda contents: contents[:5000],
        lambda contents: contents[:-1],
        lambda contents: contents + b"\0",
        lambda contents: contents[:5000] + bytes([contents[5000] ^ 1]) + contents[5001:],
        lambda contents: b"not a library",
    ],
)
def test_a_damaged_file_is_compiled_anew(kernels: Path, damage: Callable[[bytes], bytes]) -> None:
    kept = place(library(8, 8))
    whole = kept.read_bytes()
    kept.unlink()  # this process has loaded it
    kept.write_bytes(damage(whole))
    again = place(library(8, 8))
    assert list(kernels.iterdir()) == [again]
    assert cpu.named_after(again.read_bytes(), kernels, again.name.split("-")[1]) == again


def open_to_all(kernels: Path) -> None:
    kernels.mkdir(parents=True)
    kernels.chmod(0o777)


def open_to_a_group(kernels: Path) -> None:
    kernels.mkdir(parents=True)
    kernels.chmod(0o770)


def below_an_open_one(kernels: Path) -> None:
    kernels.mkdir(parents=True, mode=0o700)
    kernels.parent.chmod(0o777)


def a_link(kernels: Path) -> None:
    kernels.parent.mkdir(parents=True)
    (kernels.parent / "other").mkdir(mode=0o700)
    kernels.symlink_to("other")


def a_file(kernels: Path) -> None:
    kernels.parent.mkdir(parents=True)
    kernels.write_text("")


@without_compiler
@pytest.mark.parametrize("make", [open_to_all, open_to_a_group, below_an_open_one, a_link, a_file])
def test_nothing_is_loaded_from_a_folder_that_others_can_change(
    kernels: Path, make: Callable[[Path], None]
) -> None:
    make(kernels)
    before = sorted(kernels.parent.rglob("*"))
    assert not place(library(8, 8)).is_relative_to(kernels.parents[1])
    assert token_kernel.__wrapped__(8, 8) is not None
    assert sorted(kernels.parent.rglob("*")) == before


@without_compiler
def test_nothing_is_loaded_from_a_folder_of_another_user(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = place(library(8, 8))
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert place(library(8, 8)) != kept


@without_compiler
def test_a_relative_cache_folder_is_ignored(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CC", str(compiled))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert place(library(8, 8)).is_relative_to(tmp_path / "home" / ".cache" / "kvbench" / "kernels")
    assert not (tmp_path / "cache").exists()


@without_compiler
def test_a_full_disk_costs_the_cache_alone(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, contents: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cpu, "write_atomically", full)
    assert token_kernel.__wrapped__(8, 8) is not None
    assert not list(kernels.iterdir())


@without_compiler
def test_the_kernel_has_no_threads_of_its_own() -> None:
    """Two OpenMP libraries in a process are two pools, and each waits for the other's cores."""
    assert token_kernel(8, 8) is not None
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what is loaded")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(loaded) == 1
