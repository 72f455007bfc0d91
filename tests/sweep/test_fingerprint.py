"""A cell is measured again when anything that can change it was edited, and only then."""

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers.process import kvbench

from kvbench.method import Family, LayerView, Method
from kvbench.models.load import load_model
from kvbench.spec import parse_method
from kvbench.sweep.fingerprint import _compiled, _own_file, source_code
from kvbench.sweep.plan import Settings, make_plan
from kvbench.task import Sample, Task, Tokenizer

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
    generated = ["facts", "html_to_tsv", "needle", "rag", "recall", "rerank", "yaml_to_tsv"]
    plugins = {
        "methods/snapkv.py": ["chunkkv", "criticalkv", "pyramidkv", "snapkv"],
        "methods/pyramidkv.py": ["pyramidkv"],
        "methods/knorm.py": ["knorm"],
        "tasks/_metrics.py": generated,
        "tasks/_synthetic.py": generated,
        "tasks/_words.py": generated,
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

@register_method("{name}")
@dataclass(frozen=True)
class Edited(Method):
    """Keep the entries that came first."""
    family = Family.POST_FILL

    def scores(self, view):
        return sign(view.positions)
'''
HELPER = "def sign(values):\n    return -values.double()\n"


def plug_in(folder: Path, value: str) -> None:
    """A distribution whose entry point names a module in `folder`."""
    info = folder / f"{value}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {value}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvbench.plugins]\n{value} = {value}\n")


def test_an_edited_helper_of_a_plug_in_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two plug-ins, one a package and one a module, whose helpers lie beside them."""
    of_package = METHOD.format(name="edited-package", imported="from .helper import sign")
    of_module = METHOD.format(name="edited-module", imported="from helper import sign")
    package = tmp_path / "edited_package"
    written(package, {"__init__.py": "from . import method\n", "method.py": of_package})
    written(tmp_path, {"edited_module.py": of_module})
    homes = (package, tmp_path)
    for name, home in zip(("edited_package", "edited_module"), homes, strict=True):
        written(home, {"helper.py": HELPER, "unused.py": ""})
        plug_in(tmp_path, name)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sweep = "--task rag --context 256 --budgets 0.3 --device cpu --out r --samples"
    names = ("edited-package", "edited-module")

    def measured(samples: int) -> list[list[dict[str, Any]]]:
        """The records of each of both methods."""
        command = ["run", "--method", ",".join(names), *sweep.split(), str(samples)]
        done = kvbench(*command, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        files = (tmp_path / "r").glob("samples-*.jsonl")
        lines = [json.loads(line) for f in files for line in f.read_text().splitlines()]
        return [[line for line in lines if line["method"] == name] for name in names]

    assert [len(records) for records in measured(2)] == [2, 2]
    for home in homes:
        written(home, {"unused.py": "# edited\n"})
    # nothing that the methods use was edited
    assert [len(records) for records in measured(2)] == [2, 2]
    for home in homes:
        written(home, {"helper.py": HELPER.replace("-values", "values")})
    for records in measured(1):
        assert len(records) == 3
        old, new = records[0]["method_code"], {r["method_code"] for r in records}
        assert old
        assert len(new) == 2


def written(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def hash_of(cls: Any) -> str:
    """A hash of a class that is not kept."""
    source_code.cache_clear()
    _own_file.cache_clear()
    return source_code(cls)


def changes(folder: Path, names: list[str], cls: Any) -> list[str]:
    """The files among `names` whose edit changes the hash of a class."""
    before, found = hash_of(cls), []
    for name in names:
        old = (folder / name).read_bytes()
        (folder / name).write_bytes(old + b"\n# edited\n")
        if hash_of(cls) != before:
            found.append(name)
        (folder / name).write_bytes(old)
    return found


@pytest.fixture
def imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module from the test's folder, with none of its modules loaded afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield import_module
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {"pkg", "one", "own", "exq"}:
            del sys.modules[name]


def test_modules_that_are_imported_late_are_hashed_and_not_loaded(
    tmp_path: Path, imports: Any
) -> None:
    lazy = "class Edited:\n    def scores(self):\n        from pkg import lazy, broken, native\n"
    written(
        tmp_path,
        {
            "pkg/__init__.py": "from . import parent\n",
            "pkg/parent.py": "",
            "pkg/method.py": lazy + "        from pkg.lazy import attribute\n",
            "pkg/lazy.py": "raise RuntimeError('loaded')\n",
            "pkg/broken.py": "import pkg.unused (\n",
            "pkg/native.abi3.so": "\0 no Python",
            "pkg/unused.py": "",
        },
    )
    used = ["pkg/__init__.py", "pkg/parent.py", "pkg/lazy.py", "pkg/broken.py"]
    names = [*used, "pkg/native.abi3.so", "pkg/unused.py"]
    assert changes(tmp_path, names, imports("pkg.method").Edited) == names[:-1]
    assert "pkg.lazy" not in sys.modules


@pytest.mark.parametrize("line", ["from pkg.h import f", "import pkg.h", "import pkg.h as h"])
@pytest.mark.parametrize("regular", [True, False])
def test_a_package_beside_a_module_is_followed(
    tmp_path: Path, imports: Any, line: str, regular: bool
) -> None:
    written(tmp_path, {"one.py": f"{line}\nclass Edited: pass\n", "pkg/h.py": "f = 1\n"})
    names = ["pkg/h.py"]
    if regular:
        written(tmp_path, {"pkg/__init__.py": ""})
        names.append("pkg/__init__.py")
    assert changes(tmp_path, names, imports("one").Edited) == names


def test_a_module_that_is_run_imports_as_its_own_name(
    tmp_path: Path, imports: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from .h import f\nclass Edited: pass\n"
    written(tmp_path, {"exq/__init__.py": "", "exq/ex.py": text, "exq/h.py": "f = 1\n"})
    module = imports("exq.ex")
    module.__name__ = module.Edited.__module__ = "__main__"  # as `python -m exq.ex` calls it
    monkeypatch.setitem(sys.modules, "__main__", module)
    assert changes(tmp_path, ["exq/h.py"], module.Edited) == ["exq/h.py"]


# Pairs of what a notebook may hold beside its class, each of which changes `used`.
CELLS = {
    "constant": ("A = 0.3\ndef used(v): return A * v", "0.3", "0.4"),
    "comprehension": ("def h(v): return 1 * v\ndef used(v): return [h(x) for x in v]", "1", "2"),
    "lambda": ("def h(v): return 1 * v\nused = lambda v: map(lambda x: h(x), v)", "1", "2"),
    "keyword": ("def used(v, *, a=1): return a * v", "1", "2"),
    "closure": ("def make(a):\n  def f(v): return a * v\n  return f\nused = make(1)", "1", "2"),
    "partial": ("from functools import partial\nused = partial(max, 1)", "1", "2"),
    "base": ("class B:\n  a = 1\nclass C(B): pass\ndef used(v): return C().a", "1", "2"),
    "tensor": ("import torch\nT = torch.ones(5000)\nT[9] = 3\ndef used(v): return T", "= 3", "= 2"),
    "array": ("import numpy\nT = numpy.zeros(5000)\nT[9] = 1\ndef used(v): return T", "= 1", "= 2"),
    "attribute": (
        "import torch\nclass C:\n  def __init__(self): self.t = torch.full((5000,), 1)\n"
        "c = C()\ndef used(v): return c.t",
        "1)",
        "2)",
    ),
    "set": ("S = {'a', 'b'}\ndef used(v): return v in S or v in {'e', 'f'}", "'a'", "'h'"),
}  # fmt: skip


def hash_of_cell(text: str) -> str:
    """The hash of a class that uses `used`, after `text` was typed in."""
    text += "\nclass Typed:\n  def scores(self, v): return used(v)\n"
    module = ModuleType("notebook")
    sys.modules["notebook"] = module
    names = vars(module)
    exec(text, names)
    return hash_of(names["Typed"])


@pytest.mark.parametrize("case", CELLS)
def test_all_that_a_typed_in_class_uses_is_hashed(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "notebook", sys)  # restored afterwards
    cell, old, new = CELLS[case]
    assert hash_of_cell(cell) == hash_of_cell(cell) != hash_of_cell(cell.replace(old, new))


def test_the_order_of_a_set_is_not_hashed() -> None:
    # 0 and 8 collide in a small table, so they lie in the order in which they were added
    one, other = {0}, {8}
    one.add(8)
    other.add(0)
    assert list(one) != list(other)
    assert _compiled(one, {}) == _compiled(other, {})


def test_a_helper_from_a_file_of_the_user_is_hashed_by_its_file(
    tmp_path: Path, imports: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "notebook", sys)  # restored afterwards
    written(tmp_path, {"own.py": "def used(v): return v\n"})
    imports("own")
    hash_of_cell("from own import used")
    cls = vars(sys.modules["notebook"])["Typed"]
    assert changes(tmp_path, ["own.py"], cls) == ["own.py"]


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


class Given(Task):
    """Samples with the same prompt, and what each test gives them beside it."""

    name, metric, subtasks = "given", "exact match", ("any",)
    beside: ClassVar[dict[str, Any]] = {}

    def sample(self, index: int, *, seed: int, context: int, tokenizer: Tokenizer) -> Sample:
        """The same words."""
        sample = Sample("given", "any", index, "the badger and the crane", "x", 4)
        return replace(sample, **self.beside)

    def score(self, prediction: str, sample: Sample) -> float:
        """Half."""
        return 0.5


def test_what_scoring_is_given_is_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("tiny", device="cpu")
    settings = Settings(64, 0, 1, (16,), (0.5,), chat_template=False)

    def fingerprint(**beside: Any) -> str:
        monkeypatch.setattr(Given, "beside", beside)
        (cell,) = make_plan(model, [Given()], [parse_method("full", {})], settings)
        return cell.fingerprint

    kinds: list[dict[str, Any]] = [
        {},
        {"reference": "y"},
        {"reference": ["x"]},
        {"subtask": "other"},
        {"metadata": {"answers": {"b", "a"}}},
        {"metadata": {"answers": {"b", "c"}}},
        {"metadata": {"table": np.arange(2000)}},
        {"metadata": {"table": np.arange(2000)[::-1].copy()}},
    ]
    first = [fingerprint(**kind) for kind in kinds]
    assert len(set(first)) == len(kinds)
    assert [fingerprint(**deepcopy(kind)) for kind in kinds] == first
