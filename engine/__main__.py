"""`python -m fusedacl.engine` is the `fusedacl` command, for launchers that want a module."""

import sys

from .cli.main import main

sys.exit(main())
