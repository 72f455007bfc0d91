"""A new method is one new file: next to the built-in ones, or in a package of its author."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

OLDEST = '''
"""Keep the oldest entries."""

from dataclasses import dataclass

from kvbench.method import Family, LayerView, Method
from kvbench.registry import register_method


@register_method("oldest")
@dataclass(frozen=True)
class Oldest(Method):
    """Keep the entries nearest to the position `skip * prompt`; by default the first ones."""

    family = Family.POST_FILL
    skip: float = 0.0

    def scores(self, view: LayerView):
        return -(view.positions - self.skip * view.prompt).abs()
'''

USE = """
from kvbench.spec import method_names, parse_method
from helpers.models import loaded_model
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
assert {"oldest", "oldest-naive"} <= set(method_names()), method_names()
spec = parse_method("oldest", {"skip": "0.0"})
rows = [Row([1] * 40, 2, spec, 0.25)]
kept = run_rows(loaded_model(), rows, prefill_chunk=None, keep_positions=True)[0].kept
assert kept[0][1] == list(range(10)), kept
print("works")
"""


def python(code: str, folder: Path) -> str:
    """Run code that imports from `folder` first."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{ROOT / 'tests'}", "PATH": "/usr/bin"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_new_file_beside_the_methods_is_enough(tmp_path: Path) -> None:
    # the repository's layout, as it installs
    package = tmp_path / "kvbench"
    shutil.copytree(ROOT / "kvbench", package)
    shutil.copytree(ROOT / "methods", package / "methods")
    shutil.copytree(ROOT / "tasks", package / "tasks")
    (package / "methods" / "oldest.py").write_text(OLDEST)
    assert python(USE, tmp_path) == "works\n"


def test_a_third_party_package_is_enough(tmp_path: Path) -> None:
    (tmp_path / "kv_oldest.py").write_text(OLDEST)
    info = tmp_path / "kv_oldest-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kv-oldest\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvbench.plugins]\noldest = kv_oldest\n")
    assert python(USE, tmp_path) == "works\n"


def test_the_tests_do_not_see_what_else_is_installed(tmp_path: Path) -> None:
    (tmp_path / "kv_oldest.py").write_text(OLDEST)
    info = tmp_path / "kv_oldest-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kv-oldest\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvbench.plugins]\noldest = kv_oldest\n")
    code = "from kvbench.spec import method_names\nprint('oldest' in method_names())"
    assert python(code, tmp_path) == "True\n"
    assert python(f"import conftest\n{code}", tmp_path) == "False\n"


def test_a_broken_plugin_is_named(tmp_path: Path) -> None:
    (tmp_path / "kv_broken.py").write_text("import no_such_module\n")
    info = tmp_path / "kv_broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kv-broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvbench.plugins]\nbroken = kv_broken\n")
    code = """
from kvbench.errors import InputError
from kvbench.spec import method_names
try:
    method_names()
except InputError as error:
    print(error)
"""
    message = python(code, tmp_path)
    assert "kv_broken" in message
    assert "no_such_module" in message


@pytest.mark.parametrize("file", sorted((ROOT / "methods").glob("[a-z]*.py")), ids=lambda f: f.stem)
def test_every_built_in_method_is_a_short_file(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 60


def test_the_core_imports_no_method_and_no_task() -> None:
    for file in (ROOT / "kvbench").rglob("*.py"):
        text = file.read_text()
        assert "import kvbench.methods" not in text, file
        assert "from kvbench.methods" not in text, file
        assert "from kvbench.tasks" not in text, file
