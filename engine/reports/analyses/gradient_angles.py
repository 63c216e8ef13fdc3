"""Angles between the gradients of two losses, over a trained model's parameters and layers.

    g_ce, g_c      gradients of the cross-entropy and of the contrastive loss of one batch
    angle          acos(g_ce . g_c / (|g_ce| |g_c|)) in degrees

The parameters are fixed and dropout is off, so angles differ between batches only by the texts.
Figure 2 of arXiv 2602.03563 shows such angles without saying whether dropout was on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import Parameter
from tqdm import tqdm

from ....kernels import grad_dot_norm
from ....kernels.gradients.angle import angle_degrees, within_angle
from ...config.commands import AngleConfig
from ...config.training import TrainingConfig
from ...data.balance import BalancedBatches, balanced_batches
from ...data.batching import EncodedSplit, collate, epoch_batches
from ...experiments.runs import load_data, load_model, method_of, run_config
from ...model.encoder_layers import layer_modules
from ...model.multi_exit import MultiExitForSequenceClassification
from ...objectives.losses import exit_losses
from ...training.stages import Stage, plan_stages, prepare, stage_outputs
from ...training.storage.checkpoint import learned_temperature

ALL = "all parameters"
BACKBONE = "backbone"
EMBEDDINGS = "embeddings"
# Such as a final norm, DeBERTa's relative positions, or layers that share their weights.
REST = "rest of backbone"
MAX_BATCHES = 200
RIGHT_ANGLE = 90.0


@dataclass(frozen=True)
class AngleRecords:
    """The angles of a run for B batches and G disjoint groups of parameters.

    label: the run's method; data: its data set; contrastive: "SCL", "ACL" or "ACL-CL".
    settings: the other settings that the angles depend on, in words.
    groups: names of the groups, from the embeddings to the exits.
    stats [B, G, 3]: (g_ce . g_c, |g_ce|^2, |g_c|^2), float64.
    num_single_class: number of batches whose labels are all the same.
    """

    label: str
    data: str
    contrastive: str
    settings: str
    groups: tuple[str, ...]
    stats: np.ndarray
    num_single_class: int

    @property
    def num_batches(self) -> int:
        return len(self.stats)

    @property
    def names(self) -> list[str]:
        """All parameters, the backbone if it has several groups, and each group."""
        if len(self.groups) == 1:
            return list(self.groups)
        backbone = [BACKBONE] if len(self._members(BACKBONE)) > 1 else []
        return [ALL, *backbone, *self.groups]

    def totals(self, name: str) -> np.ndarray:
        """The stats [B, 3] of one of `names`, summed over its groups."""
        return self.stats[:, self._members(name)].sum(axis=1)

    def angles(self, name: str) -> np.ndarray:
        """Angles in degrees [B]; 90 if a gradient is zero."""
        return angle_degrees(torch.from_numpy(self.totals(name))).numpy()

    def cosines(self, name: str) -> np.ndarray:
        """Cosines [B]; 0 if a gradient is zero."""
        dot, main, auxiliary = self.totals(name).T
        product = np.sqrt(main) * np.sqrt(auxiliary)
        return np.divide(dot, product, out=np.zeros_like(dot), where=product > 0)

    def share_above(self, name: str, angle: float = RIGHT_ANGLE) -> float:
        """Share of the batches at which a gate with this limit would drop the term."""
        return float((~within_angle(torch.from_numpy(self.totals(name)), angle)).double().mean())

    def num_undefined(self, name: str) -> int:
        """Number of batches in which a gradient is zero, so that the angle is 90 by convention."""
        return int((self.totals(name)[:, 1:] == 0).any(axis=1).sum())

    def _members(self, name: str) -> list[int]:
        if name == ALL:
            return list(range(len(self.groups)))
        if name == BACKBONE:
            return [i for i, group in enumerate(self.groups) if not group.startswith("exit ")]
        return [self.groups.index(name)]


def measure_angles(run: Path, config: AngleConfig, label: str | None = None) -> AngleRecords:
    """Measure the angles of a trained run on training batches, in float32.

    Batches, sequence length, temperature, denominator and reduction are those of the run. The
    angles of the exit that `exit_layer` names are over the parameters that the strategy trains with
    it: backbone and exit, or, in the second stage of two_stage, the exit alone. The losses are
    without distillation, label smoothing, class weights and memory.

    Args:
        run: the output directory, or one of its checkpoints.
        label: name of the run in tables and figures; None: its method.

    Raises:
        ValueError: the run, exit, data or device does not exist.
        FloatingPointError: a gradient is NaN or infinite; the message names the batch.
    """
    options = config.angles
    given, trained = run_config(run), load_model(run, config.device.device)
    model = trained.model
    stage = choose_stage(given, model, options.exit_layer, run)
    contrasted = contrastive_config(given, stage, options.contrastive, learned_temperature(run))
    data = load_data(run, given, trained.record, vars(config.data), needs_train=True)
    split = trained.encode(data.splits["train"], "train")
    # The number of samples that are contrasted in a step.
    batch_size = (
        options.per_device_train_batch_size
        or given.optimization.contrastive_batch_size
        or given.optimization.per_device_train_batch_size
    )
    seed = given.optimization.seed if options.seed is None else options.seed
    wanted, by_length = options.num_batches, given.data.group_by_length
    balanced = None
    if given.data.sampler == "balanced" and split.labels is not None:
        per_class = given.data.samples_per_class
        balanced = balanced_batches(split.labels.numpy(), batch_size, per_class)
    batches = list(training_batches(split, batch_size, seed, wanted, by_length, balanced))
    prepare(model, stage, given.optimization.freeze_layers)
    model.eval()  # `prepare` turns dropout on.
    names, parameters, groups = parameter_groups(model)
    rows, reached, num_single_class = [], np.zeros(len(names), dtype=bool), 0
    hidden = True if config.device.disable_tqdm else None
    shown = tqdm(batches, desc=f"angles of {run.name}", leave=False, disable=hidden)
    for number, indices in enumerate(shown, start=1):
        batch = collate(split, indices, trained.tokenizer.pad_token_id)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        num_single_class += int(len(labels.unique(dim=0)) == 1)
        output, teacher = stage_outputs(model, stage, stage.exits, batch)
        label_embeddings = model.label_embeddings_of(stage.exits)
        losses = exit_losses(contrasted.objective, output, label_embeddings, labels, teacher)
        assert losses.auxiliary is not None  # `contrastive_config` asks for one.
        # Gradients summed over the exits; None for parameters that a loss does not reach.
        auxiliary = torch.autograd.grad(
            losses.auxiliary.sum(), parameters, retain_graph=True, allow_unused=True
        )
        main = torch.autograd.grad(losses.main.sum(), parameters, allow_unused=True)
        stats = grad_dot_norm(main, auxiliary, groups=groups).double().cpu().numpy()
        if not np.isfinite(stats).all():
            bad = names[int(np.flatnonzero(~np.isfinite(stats).all(axis=1))[0])]
            raise FloatingPointError(
                f"run {str(run)!r}, batch {number} of {len(batches)}: a gradient of {bad} is NaN "
                "or infinite. The run has diverged: measure an earlier checkpoint of it."
            )
        rows.append(stats)
        for group, left, right in zip(groups, main, auxiliary, strict=True):
            reached[group] |= left is not None or right is not None
    # Layers above an exit get no gradient from its losses.
    kept = np.flatnonzero(reached)
    objective = contrasted.objective
    contrastive = objective.objective.upper() + ("-CL" if objective.cross_layer else "")
    layers = ", ".join(str(model.exit_layers[position]) for position in stage.exits)
    settings = (
        f"{data.name}: {len(batches)} batches of {batch_size}, seed {seed}; exit {layers}, "
        f"cross-entropy against {contrastive}, temperature {objective.temperature:g}, "
        f"denominator {objective.denominator}, reduction {objective.contrastive_reduction}"
    )
    label = method_of(given) if label is None else label
    kept_names, stats = tuple(names[index] for index in kept), np.stack(rows)[:, kept]
    return AngleRecords(
        label, data.name, contrastive, settings, kept_names, stats, num_single_class
    )


def choose_stage(
    config: TrainingConfig,
    model: MultiExitForSequenceClassification,
    exit_layer: str | None,
    run: Path,
) -> Stage:
    """The stage of the run's strategy that trains the exit of `exit_layer`, for this exit only.

    exit_layer: a layer; "all": all exits of the last stage together; None: the last exit.

    Raises:
        ValueError: the model has no such exit.
    """
    stages = plan_stages(config, len(model.exit_layers))
    if exit_layer is not None and exit_layer.strip().lower() == "all":
        return dataclasses.replace(stages[-1], alternates=False)
    layers = [str(layer) for layer in model.exit_layers]
    wanted = layers[-1] if exit_layer is None else exit_layer.strip()
    if wanted not in layers:
        raise ValueError(
            f"exit_layer={exit_layer!r}: run {str(run)!r} has no exit there. Choose 'all' or one "
            f"of {', '.join(layers)}."
        )
    position = layers.index(wanted)
    stage = next(stage for stage in stages if position in stage.exits)
    return dataclasses.replace(stage, exits=(position,), alternates=False)


def contrastive_config(
    config: TrainingConfig, stage: Stage, contrastive: str | None, temperature: float | None = None
) -> TrainingConfig:
    """The options of a run, changed to the contrastive loss to measure and plain cross-entropy.

    contrastive: None: the run's own loss, or SCL if it has none. ACL of an exit with a teacher
    becomes ACL-CL, unless the run did not use that.
    temperature: the one that the run has learned; None: it was constant.
    """
    used_acl = config.objective.objective == "acl"
    chosen = contrastive or ("acl" if used_acl else "scl")
    with_teacher = stage.has_teacher and (config.contrasts_layers or not used_acl)
    objective = dataclasses.replace(
        config.objective,
        objective=chosen,
        cross_layer=chosen == "acl" and with_teacher,
        distill_weight=0.0,
        label_smoothing_factor=0.0,
        class_weights=None,
        temperature=config.objective.temperature if temperature is None else temperature,
        # The implementation of the run may not be available on this machine.
        impl="auto",
    )
    return dataclasses.replace(config, objective=objective)


def training_batches(
    split: EncodedSplit,
    batch_size: int,
    seed: int,
    num_batches: int | None,
    group_by_length: bool = False,
    balanced: BalancedBatches | None = None,
) -> Iterator[np.ndarray]:
    """Rows of the first training batches; by default those of an epoch, at most 200."""
    wanted, epoch = num_batches, 0
    while wanted is None or wanted > 0:
        batches = epoch_batches(
            split.lengths,
            batch_size,
            seed=seed,
            epoch=epoch,
            group_by_length=group_by_length,
            balanced=balanced,
        )
        if wanted is None:
            wanted = min(len(batches), MAX_BATCHES)
        yield from batches[:wanted]
        wanted, epoch = wanted - len(batches), epoch + 1


def parameter_groups(
    model: MultiExitForSequenceClassification,
) -> tuple[list[str], list[Parameter], list[int]]:
    """Names of the groups, the trained parameters, and the group of each parameter.

    Groups are the embeddings, "layer 1" to the last layer, the rest of the backbone, and "exit m"
    of layer m; those without a trained parameter are left out.
    """
    embeddings = getattr(model.backbone, "embeddings", model.backbone.get_input_embeddings())
    layers = enumerate(layer_modules(model.backbone), start=1)
    places = {f"layer {number}": layer for number, layer in layers}
    exits = zip(model.exit_layers, model.exits, strict=True)
    exit_places = {f"exit {number}": exit_module for number, exit_module in exits}
    homes: dict[Parameter, str] = {}
    for name, module in {**places, **exit_places, EMBEDDINGS: embeddings}.items():
        homes |= dict.fromkeys(module.parameters(), name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = [homes.get(parameter, REST) for parameter in parameters]
    names = [name for name in (EMBEDDINGS, *places, REST, *exit_places) if name in found]
    return names, parameters, [names.index(name) for name in found]
