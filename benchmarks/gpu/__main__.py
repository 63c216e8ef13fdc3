"""Ten minutes on a machine with an NVIDIA GPU: tests, benchmarks and tuning, each in its time.

    python -m fusedacl.benchmarks.gpu                   (make gpu)
    python -m fusedacl.benchmarks.gpu --budget 240
    python -m fusedacl.benchmarks.gpu --rehearse        tiny, on the CPU

Needs a checkout, torch, Triton, transformers and pytest, and no network:
pip install --no-deps --no-build-isolation -e . Every part writes its results as soon as they exist;
session.json says which parts were done. `fusedacl bench report` makes pages of the files.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..measuring.environment import environment, machine_name
from ..measuring.result_file import ResultFile
from .parts import BUDGET, PYTHON, ROOT, all_parts
from .session import gpu_answers, run_part, run_session

# Asked in another process, for this one must outlive the device.
DESCRIBE = """
import json, torch
from fusedacl.benchmarks.measuring.environment import environment, machine_name
device = torch.device("cuda")
print(json.dumps([machine_name(device), environment(device)]))
"""


def describe(*, rehearse: bool) -> tuple[str, dict[str, Any]]:
    """Return the machine's name and environment; ValueError where there is no GPU."""
    if rehearse:
        return f"rehearsal-{machine_name()}", environment()
    done = subprocess.run([PYTHON, "-c", DESCRIBE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"no NVIDIA GPU answers here: {reason} (--rehearse runs on the CPU)")
    name, found = json.loads(done.stdout.splitlines()[-1])
    return name, found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 if all parts were done, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedacl.benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS",
        help="time for everything; with less, the last parts are cut (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIRECTORY",
        help="of the result files (default: benchmarks/results/<GPU> in the checkout)",
    )  # fmt: skip
    parser.add_argument(
        "--rehearse", action="store_true", help="run tiny parts on the CPU, to try the session"
    )
    options = parser.parse_args(argv)
    try:
        if options.budget <= 0:
            raise ValueError(f"--budget is {options.budget}: it must be above 0")
        name, found = describe(rehearse=options.rehearse)
        results = ROOT / ("runs/bench" if options.rehearse else "benchmarks/results")
        directory = (options.output_dir or results / name).absolute()
        parts = all_parts(directory, "cpu" if options.rehearse else "cuda")
    except ValueError as error:
        print(f"fusedacl.benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    file = ResultFile(directory / "session.json", "session", f"{options.budget:.0f} s")
    file.result["environment"] |= found
    answers = (lambda: True) if options.rehearse else gpu_answers
    done = run_session(parts, options.budget, file, run=run_part, answers=answers)
    print(f"written: {directory}\nnext: fusedacl bench report")
    return 0 if done else 1


if __name__ == "__main__":
    # A session that is ended ends the part that runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
