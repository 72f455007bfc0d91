"""`python -m kvbench` is `kvbench`."""

import sys

from kvbench.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
