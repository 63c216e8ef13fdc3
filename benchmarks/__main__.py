"""`python -m fusedacl.benchmarks`, the same as `fusedacl bench`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
