"""Recipes: YAML files that define the runs of an experiment.

    defaults: {model_name_or_path: bert-base-uncased, learning_rate: 2e-5}
    seeds: [1, 2, 3]
    tasks:
      mrpc: {}
      cola: {seeds: [1], methods: [CE]}
    methods:
      CE: {objective: ce}
      ACL: {stage1: CE, strategy: two_stage, objective: acl}
      CE+SCL sweep: {objective: scl, aux_weight: [0.005, 0.02, 0.1]}

A cell is one run: a task, a method, a value for each option with a list of values, and a seed.
`stage1` names the method whose run with the same task and seed is the first stage. The layers of
`exit_layers: [2, 4, 6]` are a single value; a list of such lists, or of strings, has several.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.run_options import RunOptions, named_services
from ..config.training import TrainingConfig
from ..runtime.files import read_file
from ..runtime.text import did_you_mean

_SHIPPED = Path(__file__).with_name("recipes")
_KEYS = ("defaults", "seeds", "share_features", "tasks", "methods", "report")
_TASK_KEYS = ("seeds", "methods")
# Options that name the data; without them, the name of the task does.
_DATA_OPTIONS = ("task_name", "dataset_name", "train_file")
# Options of the model, which a second stage takes from its first stage.
_MODEL_OPTIONS = ("model_name_or_path", "num_hidden_layers")
# Options that a second stage's exits must share with their teacher.
_EXIT_OPTIONS = {
    "mha": ("exit_head", "exit_width", "exit_attention_heads"),
    "linear": ("exit_head", "exit_pooling"),
}
# Options that determine the features, beside the first stage.
_FEATURE_OPTIONS = (
    "exit_layers", "max_seq_length", "max_train_samples", "max_train_samples_per_class",
    "validation_split_percentage", "subset_seed", "tokenizer_name", "fp16", "bf16",
)  # fmt: skip
_CELLS = "cells/"
# Options that the sweep sets itself.
_OWN_OPTIONS = ("seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")


@dataclass(frozen=True)
class Cell:
    """A run of a sweep.

    grid: values of the options for which the method has a list; options: those of `fusedacl train`,
    without paths that the sweep sets. Directories within the sweep: directory: that of the run;
    stage1: that of the first stage's run; features: that of the feature cache.
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
        """Name for messages: "mrpc, ACL, aux_weight 0.1, seed 2"."""
        values = [f"{option} {value}" for option, value in self.grid.items()]
        return ", ".join([self.task, self.method, *values, f"seed {self.seed}"])

    def config(self, sweep_dir: Path) -> TrainingConfig:
        """The configuration of the run, for a sweep in that directory."""
        names = "output_dir", "stage1_model", "feature_cache"
        places = zip(names, (self.directory, self.stage1, self.features), strict=True)
        paths = {name: str(sweep_dir / place) for name, place in places if place is not None}
        own = {**paths, "seed": self.seed, "disable_tqdm": True}
        config = TrainingConfig.create(**{**self.options, **own})
        if named_services(config.run.report_to) == [] or config.run.run_name is not None:
            return config
        # The last part of output_dir, "seed-1", is that of many runs.
        run = dataclasses.replace(config.run, run_name=self.directory.removeprefix(_CELLS))
        return dataclasses.replace(config, run=run)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """Read a recipe by its file or by the name of a shipped one; `plan_cells` checks its contents.

    Raises:
        ValueError: there is no such file, or it or its `defaults` is not a YAML mapping.
    """
    path, known = Path(name), shipped_recipes()
    if not path.exists() and path.name == str(name) and not path.suffix:
        if str(name) not in known:
            raise ValueError(
                f"recipe={str(name)!r} is neither a file nor a shipped recipe."
                f"{did_you_mean(str(name), known)}"
            )
        path = _SHIPPED / f"{name}.yaml"
    recipe = read_file(path)
    _defaults(recipe)
    return recipe


def plan_cells(recipe: Mapping[str, Any]) -> list[Cell]:
    """All runs of a recipe, first stages before the runs that build on them.

    Raises:
        ValueError: an unknown key, method or option, a value out of range, or options that
            contradict each other; the message names the cell.
    """
    check_keys(recipe, _KEYS, "the recipe")
    tasks, methods = _mapping(recipe, "tasks"), _mapping(recipe, "methods")
    if not isinstance(recipe.get("share_features", False), bool):
        raise ValueError(f"share_features={recipe['share_features']!r}: write true or false.")
    for name, method in methods.items():
        _check_stage1(name, methods)
        for option, value in method.items():
            if value == []:
                raise ValueError(
                    f"methods: {name}: {option} has an empty list of values: give it at least one, "
                    "or leave it out."
                )
    seeds = {
        task: _seeds(tasks[task].get("seeds", recipe.get("seeds", [42])), task) for task in tasks
    }
    cells: list[Cell] = []
    # Seed by seed, so that a stopped sweep already compares all tasks and methods.
    for turn in range(max(map(len, seeds.values()))):
        for task, of_task in tasks.items():
            if turn < len(seeds[task]):
                names = _names(of_task.get("methods", list(methods)), methods, f"tasks: {task}")
                for name in names:
                    cells += _cells(recipe, task, of_task, name, methods, seeds[task][turn])
    _check_cells(cells)
    return cells


def _cells(
    recipe: Mapping[str, Any],
    task: str,
    of_task: Mapping[str, Any],
    name: str,
    methods: Mapping[str, Any],
    seed: int,
) -> list[Cell]:
    """The cells of a task, method and seed, one per point of the method's grid."""
    method = dict(methods[name])
    first = method.pop("stage1", None)
    inherited = _defaults(recipe)
    inherited |= {key: value for key, value in of_task.items() if key not in _TASK_KEYS}
    if inherited.keys().isdisjoint(_DATA_OPTIONS):
        inherited["task_name"] = task
    for option in _MODEL_OPTIONS if first is not None else ():
        inherited.pop(option, None)
    options = inherited | method
    shares = options.get("strategy") == "two_stage" and recipe.get("share_features", False)
    refused = _OWN_OPTIONS if first is None else (*_OWN_OPTIONS, "stage1_model")
    for option in (*refused, "feature_cache") if shares else refused:
        if option in options:
            raise ValueError(f"{option} is the sweep's own: leave it out of the recipe.")
    lists = {option: method[option] for option in listed_options(method)}
    cells = []
    for values in itertools.product(*lists.values()):
        grid = dict(zip(lists, map(_one_value, values), strict=True))
        # A slug, because a value may be a path that leads out of the sweep.
        place = "".join(f"/{option}-{slug(str(value))}" for option, value in grid.items())
        stage1 = None if first is None else f"{_CELLS}{slug(task)}/{slug(first)}/seed-{seed}"
        directory = f"{_CELLS}{slug(task)}/{slug(name)}{place}/seed-{seed}"
        features = None
        if shares:
            # Shared by all second stages with the same first stage and the same kind of exit.
            head = options.get("exit_head", "mha")
            head += "-mean" if options.get("exit_pooling") == "mean" else ""
            own = {name: (options | grid)[name] for name in _FEATURE_OPTIONS if name in method}
            words = "".join(f"-{name}-{slug(str(_one_value(own[name])))}" for name in own)
            features = f"features/{slug(stage1 or directory)}-{head}{words}"
        cells.append(Cell(task, name, seed, grid, options | grid, directory, stage1, features))
    return cells


def listed_options(method: Mapping[str, Any]) -> list[str]:
    """The options with a list of values; a list of exit layers is a single value."""
    lists = {option: value for option, value in method.items() if isinstance(value, list)}
    if all(type(layer) is int for layer in lists.get("exit_layers", ())):
        lists.pop("exit_layers", None)
    return list(lists)


def _one_value(value: Any) -> Any:
    """A value unchanged; a list of layers as text, "2,4,6"."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _check_cells(cells: Sequence[Cell]) -> None:
    configs: dict[str, TrainingConfig] = {}
    seen: dict[Any, Cell] = {}
    for cell in cells:
        try:
            config = cell.config(Path("sweep")).resolved()
            if config.run.push_to_hub:
                raise ValueError(
                    "push_to_hub=True: the runs of a sweep would all go to one repository, each "
                    "over the one before. Leave it out, and upload the run that you choose: "
                    "`hf upload REPOSITORY DIRECTORY`."
                )
            if cell.stage1 is not None:
                _check_teacher(config, configs[cell.stage1])
        except ValueError as error:
            raise ValueError(f"{cell.name}: {error}") from None
        optimization = dataclasses.replace(config.optimization, feature_cache=None)
        run = RunOptions(**config.run.choice)
        what = dataclasses.replace(config, optimization=optimization, run=run)
        other = seen.setdefault((cell.method, what), cell)
        if other.task != cell.task:
            raise ValueError(
                f"{other.name} and {cell.name} are the same run: the tasks name the same data. "
                "Take one of them out; train_file, dataset_name and task_name in the defaults, or "
                "on the command line, are the data of every task."
            )
        for key in (cell.directory, (cell.method, what)):
            other = seen.setdefault(key, cell)
            if other is not cell:
                raise ValueError(
                    f"{other.name} and {cell.name} are the same run, or would share a directory: "
                    "take one value out of the list."
                )
        configs[cell.directory] = config


def _check_teacher(config: TrainingConfig, first: TrainingConfig) -> None:
    for name in _EXIT_OPTIONS[config.model.exit_head]:
        ours, theirs = getattr(config.model, name), getattr(first.model, name)
        if ours != theirs:
            raise ValueError(
                f"{name}={ours!r}, and its stage1 has {theirs!r}: name a stage1 with the same kind "
                "of exit."
            )


def _check_stage1(name: str, methods: Mapping[str, Any]) -> None:
    first = methods[name].get("stage1")
    if first is None:
        return
    where = f"methods: {name}: stage1={first!r}"
    if first not in methods:
        raise ValueError(f"{where} is no method of the recipe.{did_you_mean(first, methods)}")
    if listed_options(methods[first]):
        raise ValueError(f"{where} has a list of values; name a method of one run.")
    if "stage1" in methods[first]:
        raise ValueError(f"{where} has a stage1 itself: one is enough.")


def _names(names: Any, methods: Mapping[str, Any], where: str) -> list[str]:
    """The methods of a task, preceded by the first stages that they need."""
    if not isinstance(names, list) or not names:
        raise ValueError(f"{where}: expected a list of methods, got {names!r}.")
    wanted: dict[str, None] = {}
    for name in map(str, names):
        if name not in methods:
            raise ValueError(
                f"{where}: {name!r} is no method of the recipe.{did_you_mean(name, methods)}"
            )
        wanted |= dict.fromkeys([methods[name].get("stage1", name), name])
    return list(wanted)


def _seeds(seeds: Any, task: str) -> list[int]:
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds of {task}: expected a list of different integers, got {seeds!r}.")
    return list(seeds)


def _mapping(recipe: Mapping[str, Any], key: str) -> dict[str, Any]:
    values = recipe.get(key)
    if not values:
        raise ValueError(f"tasks and methods are needed: the recipe has no {key}.")
    if not isinstance(values, Mapping):
        raise ValueError(f"{key}: expected `name: options` lines, got {values!r}.")
    for name, value in values.items():
        if name is None or isinstance(name, bool):
            raise ValueError(
                f"{key}: YAML reads one of the names as {name!r}: put on, off, yes, no, true, "
                "false and null in quotes."
            )
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{key}: {name}: expected options, got {value!r}.")
    found = {str(name): dict(value or {}) for name, value in values.items()}
    slugs: dict[str, str] = {}
    for name, value in found.items():
        other = slugs.setdefault(slug(name), name)
        if other != name:
            raise ValueError(f"{key}: {other!r} and {name!r} would share a directory: rename one.")
        # YAML reads a method's name such as 1 as a number.
        first = value.pop("stage1", None)
        if first is not None:
            value["stage1"] = str(first)
    return found


def _defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    values = recipe.get("defaults") or {}
    if not isinstance(values, Mapping):
        raise ValueError(f"defaults: expected `option: value` lines, got {values!r}.")
    return dict(values)


def check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse keys that are not among the known ones."""
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}.{did_you_mean(str(key), known)}")


def slug(name: str) -> str:
    """Directory name for a name: 2st-mha-kd for "2ST-MHA + KD"."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "unnamed"
