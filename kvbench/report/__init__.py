"""From records to curves, critical footprints, tables, figures and a page.

The package is called like the public function `kvbench.report(...)`, so it can be called too.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvbench.report.show import Report


class _Package(ModuleType):
    def __call__(
        self, *folders: str | Path, threshold: float = 0.9, latest: bool = False
    ) -> "Report":
        """As `kvbench.report.show.report`."""
        from kvbench.report.show import report

        return report(*folders, threshold=threshold, latest=latest)


sys.modules[__name__].__class__ = _Package
