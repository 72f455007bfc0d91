"""The tests see the methods and tasks of this repository alone, whatever else is installed."""

import os
from importlib import metadata
from typing import Any

_entry_points: Any = metadata.entry_points


def entry_points(**which: Any) -> metadata.EntryPoints:
    """As in `importlib.metadata`, without the plug-ins of other packages."""
    found: metadata.EntryPoints = _entry_points(**which)
    if which.get("group") != "kvbench.plugins":
        return found
    return metadata.EntryPoints(each for each in found if each.value.startswith("kvbench."))


setattr(metadata, "entry_points", entry_points)  # noqa: B010  (before a test imports kvbench)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # whatever else runs on this machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
