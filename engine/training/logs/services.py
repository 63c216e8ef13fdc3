"""Services that receive a run's metrics beside metrics.jsonl: TensorBoard, W&B, Trackio, MLflow.

A resumed run continues its run in the service. What the service is, where it is and who may write
there is said by its own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, …).
"""

import contextlib
import inspect
import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...config.run_options import SERVICES, RunOptions, named_services
from ...runtime import processes
from ...runtime.files import write_json

# Schemes of the places in which MLflow keeps files.
_FILES = ("", "file", "sqlite")
# The runs in the services that a run of ours has begun there.
RUNS_FILE = "services.json"
# How a run ended, in the words of MLflow.
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"


class Service(ABC):
    """One service, in process 0."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send values of a step; their names are paths such as validation/exit2/accuracy."""

    @abstractmethod
    def close(self, status: str) -> None:
        """End the run there, as `FINISHED`, `FAILED` or `KILLED`."""


class TensorBoard(Service):
    def __init__(self, output_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer: Any = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        self._writer.close()


class WandB(Service):
    """Weights & Biases; of a resumed run it drops the steps that it has already."""

    def __init__(self, settings: Mapping[str, Any], runs: dict[str, str], directory: Path) -> None:
        wandb: Any = import_module("wandb")
        runs.setdefault("wandb", secrets.token_hex(4))
        self._run = wandb.init(id=runs["wandb"], resume="allow", dir=str(directory), **settings)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=int(status != FINISHED))


class Trackio(Service):
    def __init__(self, settings: Mapping[str, Any], runs: dict[str, str]) -> None:
        self._trackio: Any = import_module("trackio")
        # Its runs are known by their names, which others of the project may have too.
        name = runs.setdefault("trackio", f"{settings['name']}-{secrets.token_hex(4)}")
        self._trackio.init(**{**settings, "name": name}, resume="allow", embed=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self, status: str) -> None:
        self._trackio.finish()


class MLflow(Service):
    def __init__(self, settings: Mapping[str, Any], runs: dict[str, str], directory: Path) -> None:
        tracking: Any = import_module("mlflow.tracking")
        where = (
            None
            if os.environ.get("MLFLOW_TRACKING_URI")
            else f"sqlite:///{directory.resolve()}/mlflow.db"
        )
        self._client = tracking.MlflowClient(where)
        project = settings["project"]
        experiment = self._client.get_experiment_by_name(project)
        number = (
            self._client.create_experiment(project)
            if experiment is None
            else experiment.experiment_id
        )
        if "mlflow" not in runs:
            made = self._client.create_run(number, run_name=settings["name"])
            runs["mlflow"] = made.info.run_id
            for name, value in settings["config"].items():
                self._client.log_param(runs["mlflow"], name, value)
        self._id = runs["mlflow"]

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name.replace(" ", "_"), value, step=step)

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, status)


def chosen_services(options: RunOptions) -> list[str]:
    """Names of the services that `report_to` means.

    Raises:
        ValueError: it is "all", and none is installed.
    """
    named = named_services(options.report_to)
    if named is not None:
        return named
    found = [name for name in SERVICES if find_spec(name) is not None]
    if not found:
        raise ValueError(
            f"report_to=all: none of {', '.join(SERVICES)} is installed. Install one, or leave "
            "report_to out."
        )
    return found


def require_services(options: RunOptions) -> None:
    """Check, before any work and before an old run is deleted, that the services can be used.

    The first process alone opens them, so it alone calls their servers here.

    Raises:
        ValueError: a package is not installed, W&B would prompt for a login, or a server cannot be
            reached or refuses the user.
    """
    for name in chosen_services(options):
        if find_spec(name) is None:
            raise ValueError(
                f"report_to={name}: the package is not installed. "
                f"Run: pip install 'fusedacl[{name}]'"
            )
        if name == "wandb":
            _require_login()
        # Files would be made here, perhaps in the directory that the run is to take.
        is_server = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "")).scheme not in _FILES
        if name == "mlflow" and is_server and processes.rank() == 0:
            with _called("mlflow", "Check MLFLOW_TRACKING_URI"):
                tracking: Any = import_module("mlflow.tracking")
                tracking.MlflowClient().get_experiment_by_name(options.project)


@contextlib.contextmanager
def _called(name: str, remedy: str) -> Iterator[None]:
    """Name the service whose server fails; each package raises errors of its own."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"report_to={name}: the server cannot be used: {error}. {remedy}, or leave {name} out "
            "of report_to."
        ) from error


def _require_login() -> None:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun", "shared"):
        return
    wandb: Any = import_module("wandb")
    if "prompt" in inspect.signature(wandb.login).parameters:
        with _called("wandb", "Check WANDB_API_KEY and the network, set WANDB_MODE=offline"):
            is_known = wandb.login(prompt=False, verify=processes.rank() == 0)
    else:
        is_known = wandb.api.api_key is not None
    if not is_known:
        raise ValueError(
            "report_to=wandb: nobody is logged in. Run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline and upload the run later (`wandb sync`)."
        )


def _read_runs(file: Path) -> dict[str, str]:
    """The run in each service, by its name; empty if none was begun."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{str(file)!r} is damaged: it should name this run's runs in the services of "
            "report_to. Delete it, and they begin new ones."
        )
    return found


def open_services(
    options: RunOptions,
    config: Mapping[str, Any],
    output_dir: Path,
    resume_step: int | None,
) -> list[Service]:
    """Begin the run in each service, or continue it.

    Args:
        config: all options of the run, for the services to show.
        resume_step: the step from which the run continues; None for a new run.

    Raises:
        ValueError: a service cannot be reached, or does not take the run; or the file with the
            runs there is damaged.
    """
    names = chosen_services(options)
    file = output_dir / RUNS_FILE
    runs = _read_runs(file)
    settings = {
        "project": options.project,
        "name": options.run_name or output_dir.resolve().name,
        "config": dict(config),
    }
    makers: dict[str, Callable[[], Service]] = {
        "tensorboard": lambda: TensorBoard(output_dir, resume_step),
        "wandb": lambda: WandB(settings, runs, output_dir),
        "trackio": lambda: Trackio(settings, runs),
        "mlflow": lambda: MLflow(settings, runs, output_dir),
    }
    opened: list[Service] = []
    for name in names:
        try:
            opened.append(makers[name]())
            if runs:
                write_json(file, runs)
        except Exception as error:
            # Each package raises errors of its own, those of its network included.
            for service in opened:
                with contextlib.suppress(Exception):
                    service.close(FAILED)
            raise ValueError(f"report_to={name}: the run cannot be begun: {error}") from error
    return opened
