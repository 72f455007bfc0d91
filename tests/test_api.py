"""The Python face, from a wheel that is installed elsewhere: in a script and in a notebook."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from helpers.warm import python
from nbclient import NotebookClient

import kvbench
from kvbench.errors import InputError

ROOT = Path(__file__).parent.parent
PROMPT = (
    "The secret word for blue fox is lemon.\\n"
    "Question: What is the secret word for blue fox?\\nAnswer:"
)
LINES = [
    "import kvbench\n"
    'result = kvbench.run(model="tiny", methods=["snapkv", "snapkv-patched"], tasks=["rerank"], '
    'budgets=[0.3, 0.7], samples=2, out="results/runs/demo")',
    "result.records",
    "result.report()",
    'kvbench.load_records("results/runs/demo")',
    f'kvbench.generate("tiny", "{PROMPT}", method="snapkv-patched", budget=0.3)',
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which kvbench is installed from its wheel."""
    folder, build = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("source")
    files = subprocess.run(
        [
            "git",
            "ls-files",
            "kvbench",
            "methods",
            "tasks",
            "pyproject.toml",
            "README.md",
            "LICENSE",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        (build / name).parent.mkdir(parents=True, exist_ok=True)
        (build / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    local = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *local, "-w", folder, build], check=True)
    (found,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *local, "--target", folder / "lib", found], check=True)
    return folder / "lib"


@pytest.fixture
def elsewhere(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where the installed kvbench is the one that is imported."""
    monkeypatch.setenv("PYTHONPATH", str(wheel))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_in_a_script(elsewhere: Path, wheel: Path) -> None:
    (elsewhere / "script.py").write_text(
        "\n".join(LINES)
        + "\nfrom pathlib import Path"
        + f"\nassert Path(kvbench.__file__).is_relative_to({str(wheel)!r})"
        + "\nassert len(result.records) == 10"
        + '\nkvbench.report("results/runs/demo").save("pictures")'
    )
    done = python("script.py", folder=elsewhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""  # nothing is printed unless it is asked for
    assert (elsewhere / "pictures" / "report.html").is_file()


def test_in_a_notebook(elsewhere: Path) -> None:
    v4: Any = nbformat.v4  # its functions have no types
    notebook = v4.new_notebook(cells=[v4.new_code_cell(line) for line in LINES])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert [output.output_type for output in outputs] == ["execute_result"] * 4, outputs
    shown: list[dict[str, Any]] = [output.data for output in outputs]
    frame, report, again, answer = shown
    assert "<table" in frame["text/html"]
    assert "snapkv-patched" in report["text/html"]
    assert "data:image/png" in report["text/html"]
    assert "10 rows" in again["text/html"]
    assert "Generation(text=" in answer["text/plain"]


def test_importing_is_fast_since_names_load_later() -> None:
    code = (
        "import sys, kvbench\n"
        "assert set(kvbench.__all__) <= set(dir(kvbench))\n"
        "assert not {'torch', 'pandas', 'numpy', 'transformers'} & set(sys.modules)\n"
        "from kvbench import Method, Sample, register_method\n"
        "assert not {'torch', 'pandas', 'transformers'} & set(sys.modules)\n"
        "import kvbench.report.build\n"
        "assert 'torch' not in sys.modules\n"
        "assert callable(kvbench.report)\n"
        "kvbench.run\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_every_public_name_has_a_docstring() -> None:
    for name in kvbench.__all__:
        if name != "__version__":
            assert getattr(kvbench, name).__doc__, name


def test_an_answer_says_what_was_held() -> None:
    prompt = PROMPT.replace("\\n", "\n")
    full = kvbench.generate("tiny", prompt, max_new_tokens=8)
    assert full.footprint == full.peak == full.reads == 1
    tokens = len(full.kept[0][0])
    assert full.kept == [[list(range(tokens))] * 4] * 4
    model = kvbench.load_model("tiny")
    half = kvbench.generate(
        model, prompt, method="snapkv", budget=0.5, max_new_tokens=8, options={"window": 4}
    )
    assert half.footprint < 1
    for kept in (positions for layer in half.kept for positions in layer):
        assert len(kept) == round(0.5 * tokens)
        assert kept[-4:] == list(range(tokens - 4, tokens))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "snapkv"}, "list of names"),
        ({"methods": ["snapk"]}, "did you mean 'snapkv'"),
        ({"methods": ["snapkv"], "options": {"windo": 3}}, "did you mean 'window'"),
        ({"budgets": [1.5]}, "1.5"),
        ({"budgets": []}, "budget"),
        ({"samples": 0}, "samples"),
        ({"context": 0}, "context"),
        ({"prefill_chunk": 0}, "prefill"),
        ({"chat_template": "maybe"}, "chat_template"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        kvbench.run(out=tmp_path / "r", **{"tasks": ["rag"], **arguments})
    assert not (tmp_path / "r").exists()


def test_a_run_is_continued_with_more_samples(tmp_path: Path) -> None:
    how: dict[str, Any] = {"methods": ["recency"], "tasks": ["rag"], "budgets": [0.5]}
    first = kvbench.run(**how, samples=1, context=256, out=tmp_path / "r")
    more = kvbench.run(**how, samples=3, context=256, out=tmp_path / "r")
    assert (first.sweep.measured, more.sweep.measured, more.sweep.reused) == (2, 4, 2)
    assert isinstance(more.records, pd.DataFrame)
    assert more.records["sample"].nunique() == 3
    assert more.failed.empty


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": 0.5}, r"budgets .*write \[0.5\]"),
        ({"budgets": ["half"]}, "budgets: .*'half'"),
        ({"samples": "2"}, "samples must be a whole"),
        ({"samples": True}, "samples must be a whole"),
        ({"context": "abc"}, "context must be a whole"),
        ({"seed": 1.5}, "seed must be a whole"),
        ({"prefill_chunk": 1.5}, "prefill_chunk must be a whole"),
        ({"options": ["window=8"]}, "options must be a dict"),
        ({"methods": [None]}, "methods must be a list"),
        ({"methods": []}, "methods is empty"),
        ({"methods": "snapkv,knorm"}, r"\['snapkv', 'knorm'\]"),
        ({"model": None}, "model must be"),
        ({"memory_limit": "8GiB"}, "memory_limit must be .*bytes"),
        ({"samples": 10**30}, "samples is too large"),
    ],
)
def test_wrong_types_are_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        kvbench.run(out=tmp_path / "r", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": ["snapkv"]}, "method must be"),
        ({"prompt": ""}, "prompt must be"),
        ({"prompt": 5}, "prompt must be"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"method": "snapkv"}, "give a budget, like 0.3"),
    ],
)
def test_a_wrong_generation_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kvbench.generate(**{"model": "tiny", "prompt": "a", **arguments})


def test_a_wrong_report_is_refused() -> None:
    wrong: Any = ["r"]
    with pytest.raises(InputError, match="report takes folders"):
        kvbench.report(wrong)
    for threshold in ("0.9", 2):
        bad: Any = threshold
        with pytest.raises(InputError, match="threshold must be"):
            kvbench.report("r", threshold=bad)
