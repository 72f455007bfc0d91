"""The built-in tasks: each file of this package registers one."""

from kvbench.registry import import_submodules

import_submodules(__name__, __path__)
