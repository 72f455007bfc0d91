"""A cell is measured again when anything that can change it was edited, and only then."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.process import kvbench

from kvbench.method import Family, LayerView, Method
from kvbench.sweep.fingerprint import source_code

ROOT = Path(__file__).parent.parent.parent

# Prints a hash of everything after each edit of a copy of kvbench, in one process.
EDITS = """
import json, sys
from pathlib import Path
from kvbench.registry import methods, tasks
from kvbench.sweep import fingerprint

def codes():
    fingerprint.source_code.cache_clear()
    fingerprint.measuring_code.cache_clear()
    found = {name: fingerprint.source_code(methods.get(name)) for name in methods.names()}
    found |= {name: fingerprint.source_code(tasks.get(name)) for name in tasks.names()}
    return found | {"kvbench": fingerprint.measuring_code()}

before, changed = codes(), {}
for name in sys.argv[1:]:
    path = fingerprint.HOME / name
    old = path.read_bytes() if path.exists() else None
    path.write_bytes((old or b"") + b"\\n# edited\\n")
    after = codes()
    changed[name] = sorted(key for key in before if before[key] != after[key])
    path.unlink() if old is None else path.write_bytes(old)
print(json.dumps(changed))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kvbench as it installs, without the weights of the embedded model."""
    home = tmp_path_factory.mktemp("copy")
    without = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "kvbench", home / "kvbench", ignore=without)
    for name in ("methods", "tasks"):
        shutil.copytree(ROOT / name, home / "kvbench" / name, ignore=without)
    return home


def test_an_edit_changes_the_hash_of_what_it_can_change(copy: Path) -> None:
    measuring = [
        "engine/attention.py",
        "engine/kernels/cpu.c",
        "engine/kernels/gpu.py",
        "engine/kernels/new.py",
        "models/load.py",
        "sweep/runner.py",
        "method.py",
        "spec.py",
        "heads.py",
        "metrics.py",
    ]
    showing = ["cli/app.py", "report/build.py", "reproduce/claims.py", "sweep/progress.py"]
    plugins = {
        "methods/snapkv.py": ["pyramidkv", "snapkv"],
        "methods/pyramidkv.py": ["pyramidkv"],
        "methods/knorm.py": ["knorm"],
        "tasks/_metrics.py": ["html_to_tsv", "needle", "rag", "recall", "rerank"],
        "tasks/_synthetic.py": ["html_to_tsv", "needle", "rag", "recall", "rerank"],
        "tasks/_words.py": ["html_to_tsv", "needle", "rag", "recall", "rerank"],
        "tasks/rag.py": ["rag"],
    }
    done = subprocess.run(
        [sys.executable, "-c", EDITS, *measuring, *showing, *plugins],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = {
        **{name: ["kvbench"] for name in measuring},
        **{name: [] for name in showing},
        **plugins,
    }
    assert json.loads(done.stdout) == expected


METHOD = '''
from dataclasses import dataclass
from kvbench.method import Family, Method
from kvbench.registry import register_method
{imported}

@register_method("edited")
@dataclass(frozen=True)
class Edited(Method):
    """Keep the entries that came first."""
    family = Family.POST_FILL

    def scores(self, view):
        return sign(view.positions)
'''


def plug_in(folder: Path, value: str) -> None:
    """A distribution whose entry point names a module in `folder`."""
    info = folder / "edited-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edited\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvbench.plugins]\nedited = {value}\n")


@pytest.mark.parametrize("form", ["package", "module"])
def test_an_edited_helper_of_a_plug_in_is_measured_anew(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path
    if form == "package":
        home = tmp_path / "edited_package"
        home.mkdir()
        (home / "__init__.py").write_text("from . import method\n")
        (home / "method.py").write_text(METHOD.format(imported="from .helper import sign"))
        plug_in(tmp_path, "edited_package")
    else:
        (home / "edited_module.py").write_text(METHOD.format(imported="from helper import sign"))
        plug_in(tmp_path, "edited_module")
    helper, unused = home / "helper.py", home / "unused.py"
    helper.write_text("def sign(values):\n    return -values.double()\n")
    unused.write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sweep = "run --method edited --task rag --context 256 --budgets 0.3 --out r --samples"

    def measured(samples: int) -> list[dict[str, Any]]:
        done = kvbench(*sweep.split(), str(samples), folder=tmp_path)
        assert done.returncode == 0, done.stderr
        files = (tmp_path / "r").glob("samples-*.jsonl")
        lines = [json.loads(line) for f in files for line in f.read_text().splitlines()]
        return [line for line in lines if line["method"] == "edited"]

    assert len(measured(2)) == 2
    unused.write_text("# edited\n")
    assert len(measured(2)) == 2  # nothing that the method uses was edited
    helper.write_text(helper.read_text().replace("-values", "values"))
    records = measured(1)
    assert len(records) == 3
    old, new = records[0]["method_code"], {r["method_code"] for r in records}
    assert old
    assert len(new) == 2


def typed_in(sign: float) -> type[Any]:
    """A class without a file, as in a notebook."""
    text = f"""
def signed(values):
    return {sign} * values

@dataclass(frozen=True)
class Typed(Method):
    family = Family.POST_FILL

    def scores(self, view):
        return signed(view.positions)
"""
    import types

    module = types.ModuleType("typed_in")
    sys.modules["typed_in"] = module
    vars(module).update(dataclass=dataclass, Method=Method, Family=Family, LayerView=LayerView)
    exec(compile(text, "<cell>", "exec"), vars(module))
    cls: type[Any] = vars(module)["Typed"]
    return cls


def test_a_class_without_a_file_is_hashed_as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typed_in", sys)  # restored afterwards
    hashed: Any = source_code
    assert hashed(typed_in(1.0)) == hashed(typed_in(1.0))
    assert hashed(typed_in(1.0)) != hashed(typed_in(-1.0))
