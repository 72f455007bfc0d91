"""`python -m kvbench` is `kvbench`."""

import sys

from kvbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
