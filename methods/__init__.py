"""The built-in methods: one file each, registered by being here."""

from kvbench.registry import import_submodules

import_submodules(__name__, __path__)
