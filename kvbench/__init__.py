"""Fair comparison of KV-cache eviction methods by KV footprint: see `docs/python.md`.

The names of this module load when they are first used, so `import kvbench` is fast.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbench.api import Generation, RunResult, generate, run
    from kvbench.errors import InputError
    from kvbench.method import Family, KVShape, LayerView, Method, Window
    from kvbench.models.load import LoadedModel, load_model
    from kvbench.registry import open_task, register_method, register_task, register_task_source
    from kvbench.report.frames import load_records
    from kvbench.report.show import Report, report
    from kvbench.task import Sample, Task

__version__ = "0.1.0"

# How often a waiting thread of OpenMP looks for work before it sleeps, 20 to 70 ns each. With GNU's
# default, 300,000, threads take the cores of those they wait for as soon as another process needs
# one too; see `benchmarks/threads.py`. OpenMP reads this when PyTorch is imported.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "5000"

_HOMES = {
    "kvbench.api": ("Generation", "RunResult", "generate", "run"),
    "kvbench.errors": ("InputError",),
    "kvbench.method": ("Family", "KVShape", "LayerView", "Method", "Window"),
    "kvbench.models.load": ("LoadedModel", "load_model"),
    "kvbench.registry": ("open_task", "register_method", "register_task", "register_task_source"),
    "kvbench.report.frames": ("load_records",),
    "kvbench.report.show": ("Report",),
    "kvbench.task": ("Sample", "Task"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  (the order of the documentation)
    "run",
    "RunResult",
    "load_records",
    "report",
    "Report",
    "generate",
    "Generation",
    "load_model",
    "LoadedModel",
    "Method",
    "LayerView",
    "Family",
    "KVShape",
    "Window",
    "register_method",
    "Task",
    "Sample",
    "register_task",
    "register_task_source",
    "open_task",
    "InputError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "report":
        return import_module("kvbench.report")  # a package that can be called
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kvbench' has no attribute '{name}'")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
