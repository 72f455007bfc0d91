"""A new method is one new file: next to the built-in ones, or in a package of its author."""

import shutil
from pathlib import Path

import pytest
from helpers import warm

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
    """What code that imports from `folder` first prints."""
    return run(code, folder)[0]


# A note would say so if other work leaves fewer cores free.
ONE_THREAD = {"PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}


def run(code: str, folder: Path, **environment: str) -> tuple[str, str]:
    """What code that imports from `folder` first prints on stdout and on stderr."""
    environment = {"PYTHONPATH": f"{folder}:{ROOT / 'tests'}", **environment}
    done = warm.python("-c", code, folder=folder, environment={**ONE_THREAD, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_new_file_beside_the_methods_is_enough(tmp_path: Path) -> None:
    # the repository's layout, as it installs
    package = tmp_path / "kvbench"
    shutil.copytree(ROOT / "kvbench", package)
    shutil.copytree(ROOT / "methods", package / "methods")
    shutil.copytree(ROOT / "tasks", package / "tasks")
    (package / "methods" / "oldest.py").write_text(OLDEST)
    assert python(USE, tmp_path) == "works\n"


def install(folder: Path, name: str, code: str) -> None:
    """A package of one module, as pip installs it."""
    (folder / f"kv_{name}.py").write_text(code)
    info = folder / f"kv_{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kv-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvbench.plugins]\n{name} = kv_{name}\n")


def test_a_third_party_package_is_enough(tmp_path: Path) -> None:
    install(tmp_path, "oldest", OLDEST)
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


BROKEN = {
    "module": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": ("def (:", "SyntaxError: "),
    "attribute": ("import json; json.no", "AttributeError: module 'json' has no attribute 'no'"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "other": ("class Odd(BaseException): pass\nraise Odd('a\\nb')", "Odd: a b"),
    "twice": (
        OLDEST.replace('"oldest"', '"snapkv"'),
        "ValueError: two methods are called 'snapkv'",
    ),
    "function": (
        "from kvbench import register_method\n@register_method('f')\ndef f(): pass",
        "TypeError: method 'f' is not a subclass of Method",
    ),
    "family": (
        "from kvbench import Method, register_method\n@register_method('m')\nclass M(Method): pass",
        "TypeError: method 'm' does not say its family",
    ),
    "half": (f"{OLDEST.replace('oldest', 'half-made')}\n1 / 0\n", "ZeroDivisionError: division"),
}


def test_broken_plugins_are_named_once_and_left_out(tmp_path: Path) -> None:
    for name, (code, _) in BROKEN.items():
        install(tmp_path, name, code)
    install(tmp_path, "oldest", OLDEST)
    code = """
import sys, warnings
from kvbench.cli.app import main
assert main(["list", "methods", "--format", "json"]) == 0
assert main(["list", "tasks", "--format", "json"]) == 0
assert main(["check", "half-mad"]) == 2
assert main(["run", "--method", "half-made", "--task", "rag"]) == 2
assert main(["run", "--task", "half-made"]) == 2
assert main(["report", "no-such-run"]) == 2
small = ["--task", "rag", "--context", "256", "--samples", "1", "--budgets", "0.5"]
assert main(["run", "--method", "oldest", *small, "--dry-run"]) == 0
"""
    out, errors = run(code, tmp_path)
    assert '"oldest"' in out
    assert '"half-made"' not in out
    lines = errors.splitlines()
    for name, (_, reason) in BROKEN.items():
        (line,) = [line for line in lines if line.startswith(f"kvbench: plug-in {name} ")]
        assert f"({f'kv_{name}'}) cannot be loaded and is left out: {reason}" in line
    hints = [line for line in lines if "not loaded: " in line]
    assert len(hints) == 3
    for line in hints:
        assert "half-mad" in line
        assert "half (kv_half): ZeroDivisionError: division by zero" in line
    assert len(lines) == len(BROKEN) + 4, errors
    assert "Traceback" not in errors


def test_a_script_is_warned_and_the_traceback_is_there_for_the_asking(tmp_path: Path) -> None:
    install(tmp_path, "syntax", "def (:")
    code = """
import warnings
from kvbench.registry import PluginWarning, methods
with warnings.catch_warnings(record=True) as caught:
    assert "snapkv" in methods.names()
    assert "snapkv" in methods.names()
(one,) = caught
assert one.category is PluginWarning
print(one.message)
"""
    out, errors = run(code, tmp_path)
    assert out.startswith("plug-in syntax (kv_syntax) cannot be loaded and is left out: Syntax")
    assert errors == ""
    _, errors = run(code, tmp_path, KVBENCH_DEBUG="1")
    assert "Traceback" in errors
    assert "kv_syntax.py" in errors


def test_without_pytorch_the_message_says_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
import kvbench.registry as registry
registry.find_spec = lambda name: None
from kvbench.cli.app import main
assert main(["list"]) == 2
"""
    _, errors = run(code, tmp_path)
    assert "kvbench's own methods cannot be imported: " in errors
    assert "pip install 'kvbench[run]'" in errors
    assert len(errors.splitlines()) == 1


def test_a_broken_file_beside_the_methods_is_left_out_too(tmp_path: Path) -> None:
    package = tmp_path / "kvbench"
    shutil.copytree(ROOT / "kvbench", package)
    shutil.copytree(ROOT / "methods", package / "methods")
    shutil.copytree(ROOT / "tasks", package / "tasks")
    (package / "methods" / "oldest.py").write_text(OLDEST)
    (package / "methods" / "broken.py").write_text("def (:")
    out, errors = run(USE, tmp_path)
    assert out == "works\n"
    assert "plug-in kvbench.methods.broken cannot be loaded" in errors


@pytest.mark.parametrize("file", sorted((ROOT / "methods").glob("[a-z]*.py")), ids=lambda f: f.stem)
def test_every_built_in_method_is_a_short_file(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 60


def test_the_core_imports_no_method_and_no_task() -> None:
    for file in (ROOT / "kvbench").rglob("*.py"):
        text = file.read_text()
        assert "import kvbench.methods" not in text, file
        assert "from kvbench.methods" not in text, file
        assert "from kvbench.tasks" not in text, file
