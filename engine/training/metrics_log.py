"""The logs of a run while it trains: metrics.jsonl and TensorBoard."""

import json
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from ..runtime.files import write_whole


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Appends records to `metrics.jsonl`, one JSON object per line, and to TensorBoard if asked.

    Args:
        output_dir: None, in a process that is not the first one: nothing is written.
        resume_step: records after this step are dropped.
        keep_evaluations: whether the evaluations of the step itself stay. If they came after its
            checkpoint, they may be incomplete.

    Raises:
        ValueError: report_to=tensorboard, and the package is not installed.
    """

    def __init__(
        self,
        output_dir: Path | None,
        report_to: str,
        resume_step: int | None = None,
        keep_evaluations: bool = True,
    ) -> None:
        self._file: IO[str] | None = None
        self._writer: Any = None
        if output_dir is None:
            return
        path = output_dir / "metrics.jsonl"
        if resume_step is not None and path.exists():
            last_evaluated = resume_step if keep_evaluations else resume_step - 1
            kept = [
                json.dumps(record) + "\n"
                for record in read_records(path)
                if record["step"] <= (last_evaluated if "exit" in record else resume_step)
            ]
            write_whole(path, "".join(kept))
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            purge_step = None if resume_step is None else resume_step + 1
            self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step)
        self._file = path.open("a", encoding="utf-8")

    def evaluations(self, step: int) -> dict[str, dict[int, dict[str, float]]]:
        """Split -> layer -> metrics of the evaluations already written for `step`."""
        found: dict[str, dict[int, dict[str, float]]] = {}
        for record in read_records(Path(self._file.name)) if self._file else []:
            if record["step"] == step and "exit" in record:
                found.setdefault(record["split"], {})[record["exit"]] = record["metrics"]
        return found

    def write(self, record: dict[str, Any]) -> None:
        """Write a step or an evaluation; every record has `step` and `split`."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"{self._file.name} could not be written: {error}. Free some space; a run with "
                "checkpoints goes on with --resume_from_checkpoint latest."
            ) from error
        if self._writer is None:
            return
        place = record["split"] + (f"/exit{record['exit']}" if "exit" in record else "")
        for name, value in (record | record.get("metrics", {})).items():
            if isinstance(value, (int, float)) and name not in ("step", "exit"):
                self._writer.add_scalar(f"{place}/{name}", value, record["step"])

    def __exit__(self, *exception: object) -> None:
        for opened in (self._file, self._writer):
            if opened is not None:
                opened.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a line that a killed run left unfinished."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def require_reporting(report_to: str) -> None:
    """Check, before any work, that the package named by `report_to` is installed.

    Raises:
        ValueError: it is not.
    """
    if report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise ValueError(
            "report_to=tensorboard: the package is not installed. "
            "Run: pip install 'fusedacl[tensorboard]'"
        )
