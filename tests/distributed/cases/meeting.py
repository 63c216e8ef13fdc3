"""Processes that only meet: each adds its rank, counted from 1, and prints the sum or why not.

    MEETING_SECONDS=4 RANK=0 WORLD_SIZE=2 … python tests/distributed/cases/meeting.py

Importing what trains takes much longer.
"""

from __future__ import annotations

import os
import sys

import torch
from fusedacl.engine.runtime import processes

if __name__ == "__main__":
    processes.MEETING_SECONDS = float(os.environ.get("MEETING_SECONDS", processes.MEETING_SECONDS))
    try:
        processes.join("cpu")
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    total = torch.tensor(processes.rank() + 1)
    torch.distributed.all_reduce(total)
    print(f"{processes.world_size()} processes, sum {int(total)}")
    processes.leave()
