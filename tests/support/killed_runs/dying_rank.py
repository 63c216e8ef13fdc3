"""`fusedacl train` in which rank 1 kills itself in its second save: the checkpoint is incomplete.

torchrun … tests/support/killed_runs/dying_rank.py --output_dir …
"""

from __future__ import annotations

import os
import sys

from forked import in_second_call
from fusedacl.engine.cli import main
from fusedacl.engine.training.storage import checkpoint

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        # Its file is written then, and its checksum is not.
        in_second_call(checkpoint, "sealed", before=True)
    sys.exit(main.main(["train", *sys.argv[1:]]))
