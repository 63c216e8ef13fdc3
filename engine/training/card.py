"""The model card (README.md) of a final model, from the configuration and results of its run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.fields import flatten
from ..config.gate_scope import scope_words
from ..config.sections import MULTI_LABEL
from ..config.training import TrainingConfig
from ..model.card import front_matter, made_with
from ..runtime.text import markdown_table

_OBJECTIVES = {
    "ce": "cross-entropy",
    "scl": "cross-entropy and supervised contrastive loss (CE+SCL)",
    "acl": "cross-entropy and aligned contrastive loss (ACL, arXiv 2602.03563)",
}
_STRATEGIES = {
    "single": "single (backbone and last exit)",
    "joint": "joint (all exits at once)",
    "two_stage": "two_stage (backbone and last exit, then the other exits on the frozen backbone)",
    "alternating": "alternating (the last exit alone in odd epochs, all exits in even ones)",
}

# Options that are named on the card where they differ from their defaults.
_NOTED = (
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "label_smoothing_factor",
    "class_weights", "sampler", "samples_per_class", "freeze_layers", "early_stopping_patience",
)  # fmt: skip


def model_card(config: TrainingConfig, base_model: str, results: dict[str, Any]) -> str:
    """The text of the card; base_model: name or path of the model that the run started from."""
    objective = _OBJECTIVES[config.objective.objective]
    if results.get("problem_type") == MULTI_LABEL:
        objective = objective.replace("cross-entropy", "binary cross-entropy of each label")
    if config.gated:
        objective += f", gated at {config.objective.max_angle:g} degrees (ACL-Grad)"
        if config.objective.gate_scope != "all":
            objective += f", the angle over {scope_words(config.objective.gate_scope)}"
    splits = results["metrics"].values()
    names = {name for by_layer in splits for scores in by_layer.values() for name in scores}
    is_local = Path(base_model).exists()
    title = Path(base_model).name if is_local else base_model
    # The hub knows a model by its name, not by a path.
    lines = front_matter(
        base_model=None if is_local else base_model, metrics=sorted(names - {"loss"})
    )
    lines += [f"# {title} fine-tuned on {results['data']}", ""]
    lines += [f"- Base model: {base_model}", f"- Data: {results['data']}"]
    lines += [f"- Objective: {objective}"]
    lines += [f"- Strategy: {_STRATEGIES[config.optimization.strategy]}"]
    if config.optimization.stage1_model is not None:
        lines += [f"- First stage: taken from {config.optimization.stage1_model}"]
    lines += [_terms(config, results.get("temperature")), *_exits(config)]
    lines += [_optimizer(config, results["num_processes"])]
    lines += [f"- Steps: {results['num_steps']}, seed {config.optimization.seed}", ""]
    best = results.get("best", {})
    is_best = best.get("step") is not None
    which = f"step {best['step']}, the best by {best['metric']}" if is_best else "the last step"
    lines += [f"## Scores after {which}", "", *_score_lines(results), ""]
    lines += ["## Made with", "", *made_with(results)]
    lines += ["", "## Use", "", "```python"]
    lines += ["from fusedacl.engine import MultiExitForSequenceClassification", ""]
    lines += ['model = MultiExitForSequenceClassification.from_pretrained("this directory")', "```"]
    return "\n".join(lines) + "\n"


def _score_lines(results: Mapping[str, Any]) -> list[str]:
    """The scores of one exit as a list, those of several exits as a table."""
    if not results["metrics"]:
        return ["There was no labelled split to evaluate on."]
    rows = [
        (split, layer, scores)
        for split, by_layer in results["metrics"].items()
        for layer, scores in by_layer.items()
    ]
    if len(rows) == len(results["metrics"]):
        return [
            f"- {split}, exit at layer {layer}: "
            + ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            for split, layer, scores in rows
        ]
    names = list(dict.fromkeys(name for _, _, scores in rows for name in scores))
    cells = [
        [split, str(layer), *(f"{scores[name]:.4f}" for name in names)]
        for split, layer, scores in rows
    ]
    return [markdown_table(["split", "exit at layer", *names], cells)]


def _optimizer(config: TrainingConfig, num_processes: int) -> str:
    options = config.optimization
    precision = "float16" if options.fp16 else "bfloat16" if options.bf16 else "float32"
    words = f"- AdamW, peak learning rate {options.learning_rate:g}"
    if options.stage2_learning_rate is not None:
        words += f" (second stage {options.stage2_learning_rate:g})"
    if options.max_steps < 0:
        words += f", {options.num_train_epochs:g} epoch{'s' * (options.num_train_epochs != 1)}"
        if options.stage2_epochs is not None:
            words += f" (second stage {options.stage2_epochs:g})"
    batch = options.per_device_train_batch_size * options.gradient_accumulation_steps
    words += f", {num_processes * batch} texts a step, {precision}"
    values, default = flatten(config), flatten(TrainingConfig())
    changed = [f"{name} {values[name]}" for name in _NOTED if values[name] != default[name]]
    return "; ".join([words, *changed])


def _terms(config: TrainingConfig, learned: float | None) -> str:
    """The contrastive term; learned: the temperature at the end, if it was."""
    objective = config.objective
    if objective.objective == "ce":
        return "- Contrastive term: none"
    tau = f"tau {objective.temperature:g}"
    if learned is not None:
        tau = f"tau {learned:.4g} (learned, from {objective.temperature:g})"
    words = (
        f"- Contrastive term: lambda {objective.aux_weight:g}, {tau}, "
        f"{objective.contrastive_reduction} over anchors, denominator {objective.denominator}"
    )
    if objective.positives == "each":
        words += ", every label an anchor"
    if objective.memory_size:
        words += f", a memory of {objective.memory_size} samples per process"
        if objective.memory_warmup_steps:
            words += f", read after {objective.memory_warmup_steps} steps"
        if config.optimization.strategy == "two_stage":
            words += ", in the first stage"
    return words


def _exits(config: TrainingConfig) -> list[str]:
    """The architecture and the training of the exits."""
    mean = ", mean of the tokens" if config.model.exit_pooling == "mean" else ""
    lines = [f"- Exits: {config.model.exit_head} head{mean}"]
    if config.optimization.strategy == "single":
        return lines
    layers = config.model.exit_layers or "all"
    lines[0] += " on all layers" if layers == "all" else f" on layers {layers}"
    if config.objective.cross_layer:
        lines.append("- The other exits are contrasted with the frozen last one (ACL-CL)")
    if config.objective.distill_weight > 0:
        lines.append(
            f"- Distilled from the last exit: weight {config.objective.distill_weight:g}, "
            f"temperature {config.objective.distill_temperature:g}"
        )
    return lines
