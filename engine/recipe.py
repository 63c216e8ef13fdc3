"""Recipes: a YAML file that says which runs an experiment is made of.

    defaults: {model_name_or_path: bert-base-uncased, learning_rate: 2e-5}
    seeds: [1, 2, 3]
    tasks:
      mrpc: {}
      cola: {seeds: [1], methods: [CE]}
    methods:
      CE: {objective: ce}
      ACL: {stage1: CE, strategy: two_stage, objective: acl}
      CE+SCL sweep: {objective: scl, aux_weight: [0.005, 0.02, 0.1]}

A cell is one run: a task, a method, a value of each option that the method gives a list, and a
seed. `stage1` names the method whose run, of the same task and seed, is the first stage.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import TrainingConfig
from .options import did_you_mean, read_file

_SHIPPED = Path(__file__).with_name("recipes")
_KEYS = ("defaults", "seeds", "share_features", "tasks", "methods", "report")
_TASK_KEYS = ("seeds", "methods")
# Options that say what a task's data are: with one of them the task's name is only a name.
_DATA_OPTIONS = ("task_name", "dataset_name", "train_file")
# What belongs to the model that a first stage brings along.
_MODEL_OPTIONS = ("model_name_or_path", "num_hidden_layers")
# What the sweep itself decides.
_OWN_OPTIONS = ("seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    grid: the values of the options for which the method gives a list; directory: within the sweep;
    options: of `fusedacl train`, without the paths that the sweep gives; stage1: directory of the
    cell whose run is the first stage; features: directory of the feature cache.
    """

    task: str
    method: str
    seed: int
    grid: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    directory: str = ""
    stage1: str | None = None
    features: str | None = None

    @property
    def name(self) -> str:
        """What people call it: "mrpc, ACL, aux_weight 0.1, seed 2"."""
        values = [f"{option} {value}" for option, value in self.grid.items()]
        return ", ".join([self.task, self.method, *values, f"seed {self.seed}"])

    def config(self, sweep_dir: Path) -> TrainingConfig:
        """The configuration of its run, for a sweep in that directory."""
        paths = {"output_dir": str(sweep_dir / self.directory)}
        if self.stage1 is not None:
            paths["stage1_model"] = str(sweep_dir / self.stage1)
        if self.features is not None:
            paths["feature_cache"] = str(sweep_dir / self.features)
        return TrainingConfig.create(**self.options, **paths, seed=self.seed, disable_tqdm=True)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """A recipe, by its file or its shipped name; not yet checked: `plan_cells` does that.

    Raises:
        ValueError: there is no such file, or it is no YAML mapping.
    """
    path = Path(name)
    if not path.exists() and path.name == str(name) and not path.suffix:
        if str(name) not in shipped_recipes():
            raise ValueError(
                f"recipe={str(name)!r} is neither a file nor a shipped recipe."
                f"{did_you_mean(str(name), shipped_recipes())}"
            )
        path = _SHIPPED / f"{name}.yaml"
    return read_file(path)


def plan_cells(recipe: Mapping[str, Any]) -> list[Cell]:
    """Every run of a recipe, first stages before what builds on them.

    Raises:
        ValueError: an unknown key, method or option, a value out of range, or options that
            contradict each other, naming the cell.
    """
    _check_keys(recipe, _KEYS, "the recipe")
    tasks, methods = (_mapping(recipe, key) for key in ("tasks", "methods"))
    if not tasks or not methods:
        raise ValueError("tasks and methods are needed: see `fusedacl sweep --help`.")
    for name in methods:
        _check_stage1(name, methods)
    _check_slugs(methods, "methods")
    _check_slugs(tasks, "tasks")
    seeds = {
        task: _seeds(tasks[task].get("seeds", recipe.get("seeds", [42])), task) for task in tasks
    }
    cells: list[Cell] = []
    # Seed by seed, so that what is there when a sweep stops compares all tasks and methods.
    for turn in range(max(map(len, seeds.values()))):
        for task, of_task in tasks.items():
            if turn < len(seeds[task]):
                names = _names(of_task.get("methods", list(methods)), methods, f"tasks: {task}")
                for name in names:
                    cells += _cells(recipe, task, of_task, name, methods, seeds[task][turn])
    for cell in cells:
        try:
            cell.config(Path("sweep")).resolved()
        except ValueError as error:
            raise ValueError(f"{cell.name}: {error}") from None
    return cells


def _cells(
    recipe: Mapping[str, Any],
    task: str,
    of_task: Mapping[str, Any],
    name: str,
    methods: Mapping[str, Any],
    seed: int,
) -> list[Cell]:
    """The cells of one task, method and seed, one a point of the method's grid."""
    method = dict(methods[name])
    first = method.pop("stage1", None)
    inherited = dict(recipe.get("defaults") or {})
    inherited |= {key: value for key, value in of_task.items() if key not in _TASK_KEYS}
    if not any(option in inherited for option in _DATA_OPTIONS):
        inherited["task_name"] = task
    if first is not None:
        for option in _MODEL_OPTIONS:
            inherited.pop(option, None)
    options = inherited | method
    for option in _OWN_OPTIONS:
        if option in options:
            raise ValueError(f"{option} is the sweep's own: leave it out of the recipe.")
    lists = {option: value for option, value in method.items() if isinstance(value, list)}
    cells = []
    for values in itertools.product(*lists.values()):
        grid = dict(zip(lists, values, strict=True))
        place = "".join(f"/{option}-{value}" for option, value in grid.items())
        stage1 = None if first is None else f"cells/{slug(task)}/{slug(first)}/seed-{seed}"
        directory = f"cells/{slug(task)}/{slug(name)}{place}/seed-{seed}"
        features = None
        if options.get("strategy") == "two_stage" and recipe.get("share_features", False):
            # What one first stage gives, all second stages with that kind of exit can read.
            head = options.get("exit_head", "mha")
            features = f"features/{slug(stage1 or directory)}-{head}"
        cells.append(
            Cell(
                task,
                name,
                seed,
                grid,
                options | grid,
                directory,
                stage1,
                features,
            )
        )
    return cells


def _check_stage1(name: str, methods: Mapping[str, Any]) -> None:
    """Check what a method builds on."""
    method = methods[name]
    first = method.get("stage1")
    if first is None:
        return
    if first not in methods:
        raise ValueError(
            f"methods: {name}: stage1={first!r} is no method of the recipe."
            f"{did_you_mean(str(first), methods)}"
        )
    if any(isinstance(value, list) for value in methods[first].values()):
        raise ValueError(
            f"methods: {name}: stage1={first!r} has a list of values; name a method of one run."
        )
    if "stage1" in methods[first]:
        raise ValueError(f"methods: {name}: stage1={first!r} has a stage1 itself: one is enough.")


def _names(names: Any, methods: Mapping[str, Any], where: str) -> list[str]:
    """The methods of a task, and the first stages that they need, before them."""
    if not isinstance(names, list) or not names:
        raise ValueError(f"{where}: expected a list of methods, got {names!r}.")
    wanted: list[str] = []
    for name in names:
        if name not in methods:
            raise ValueError(
                f"{where}: {name!r} is no method of the recipe.{did_you_mean(str(name), methods)}"
            )
        wanted += [methods[name]["stage1"], name] if "stage1" in methods[name] else [name]
    return list(dict.fromkeys(wanted))


def _seeds(seeds: Any, task: str) -> list[int]:
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds of {task}: expected a list of different integers, got {seeds!r}.")
    return list(seeds)


def _mapping(recipe: Mapping[str, Any], key: str) -> dict[str, Any]:
    values = recipe.get(key) or {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{key}: expected `name: options` lines, got {values!r}.")
    for name, value in values.items():
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{key}: {name}: expected options, got {value!r}.")
    return {str(name): dict(value or {}) for name, value in values.items()}


def _check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}.{did_you_mean(str(key), known)}")


def slug(name: str) -> str:
    """A name as a directory's: "2ST-MHA + KD" is 2st-mha-kd."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "unnamed"


def _check_slugs(names: Iterable[str], key: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(slug(name), name)
        if other != name:
            raise ValueError(f"{key}: {other!r} and {name!r} would share a directory: rename one.")
