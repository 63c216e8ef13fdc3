"""The logs of a run while it trains: metrics.jsonl, and services that receive the same."""

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from ...runtime.files import disk_remedy, write_whole
from ...runtime.signals import Interrupted
from .services import FAILED, FINISHED, KILLED, Service

METRICS_FILE = "metrics.jsonl"
logger = logging.getLogger("fusedacl")


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Appends records to `metrics.jsonl`, one JSON object per line, and to services if asked.

    Args:
        output_dir: None, in a process that is not the first one: nothing is written.
        services: get the numbers of every record too, and are closed at the end.
        resume_step: records after this step are dropped.
        keep_evaluations: whether the evaluations of the step itself stay. If they came after its
            checkpoint, they may be incomplete.
    """

    def __init__(
        self,
        output_dir: Path | None,
        services: Sequence[Service] = (),
        resume_step: int | None = None,
        keep_evaluations: bool = True,
    ) -> None:
        self._file: IO[str] | None = None
        self._services = list(services)
        if output_dir is None:
            return
        path = output_dir / METRICS_FILE
        if resume_step is not None and path.exists():
            last_evaluated = resume_step if keep_evaluations else resume_step - 1
            kept = [
                json.dumps(record) + "\n"
                for record in read_records(path)
                if record["step"] <= (last_evaluated if "exit" in record else resume_step)
            ]
            write_whole(path, "".join(kept))
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
                f"{self._file.name} could not be written: {error}. {disk_remedy(error)}; a run "
                "with checkpoints goes on with --resume_from_checkpoint latest."
            ) from error
        place = record["split"] + (f"/exit{record['exit']}" if "exit" in record else "")
        values = {
            f"{place}/{name}": value
            for name, value in (record | record.get("metrics", {})).items()
            if isinstance(value, (int, float)) and name not in ("step", "exit")
        }
        for service in list(self._services):
            self._call(service, lambda to: to.log(values, record["step"]))

    def _call(self, service: Service, action: Callable[[Service], None]) -> None:
        """Call a service; one that fails receives nothing more, and the run goes on."""
        try:
            action(service)
        except Exception as error:
            # Each package raises errors of its own.
            self._services.remove(service)
            logger.warning(f"{type(service).__name__} receives no more metrics: {error}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status = FINISHED if kind is None else FAILED
        if kind is not None and issubclass(kind, (Interrupted, KeyboardInterrupt)):
            status = KILLED
        for service in list(self._services):
            self._call(service, lambda to: to.close(status))
        if self._file is not None:
            # After a write that failed, closing tries it again and would hide its message.
            with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):
                self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a last line that a killed run left unfinished.

    Raises:
        ValueError: another line is not a record.
    """
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            is_record = isinstance(record["step"], int) and isinstance(record["split"], str)
        except (KeyError, TypeError, ValueError):
            is_record = False
        if is_record:
            records.append(record)
        elif number < len(lines):
            raise ValueError(
                f"{str(path)!r}, line {number}, is not a record of a run: the file is damaged. "
                "Take the line out, or move the file away."
            )
    return records
