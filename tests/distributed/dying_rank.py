"""`fusedacl train` in which rank 1 kills itself in its second save, its file half the way there.

torchrun … tests/distributed/dying_rank.py --output_dir …
"""

from __future__ import annotations

import os
import sys

from forked_runs import in_second_call
from fusedacl.engine import checkpoint, cli

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        # After its file is written, before its checksum is noted.
        in_second_call(checkpoint, "sealed", before=True)
    sys.exit(cli.main(["train", *sys.argv[1:]]))
