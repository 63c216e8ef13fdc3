"""The README.md of a final model: what it is, how it was made, what it scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .calibration import AREA_WORDS
from .config import TrainingConfig
from .gate_scope import scope_words
from .options import write_whole
from .report import markdown_table

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
# What `fusedacl exits` writes stands between these, and is replaced as a whole.
_EARLY_EXIT = ("<!-- fusedacl: early exit -->", "<!-- fusedacl: end of early exit -->")
_METADATA = {"library_name": "fusedacl", "pipeline_tag": "text-classification"}
_TAGS = ["text-classification", "aligned-contrastive-learning"]


def model_card(config: TrainingConfig, base_model: str, results: dict[str, Any]) -> str:
    """A model card with the hub's metadata, from a run's configuration and results."""
    objective = _OBJECTIVES[config.objective.objective]
    if config.gated:
        objective += f", gated at {config.objective.max_angle:g} degrees (ACL-Grad)"
        if config.objective.gate_scope != "all":
            objective += f", the angle over {scope_words(config.objective.gate_scope)}"
    names = {name for scores in _scores(results) for name in scores if name != "loss"}
    is_local = Path(base_model).exists()
    title = Path(base_model).name if is_local else base_model
    metadata = {
        **_METADATA,
        # The hub knows models by their names there.
        **({} if is_local else {"base_model": base_model}),
        "tags": _TAGS,
        "metrics": sorted(names),
    }
    lines = _head(metadata)
    lines += [f"# {title} fine-tuned on {results['data']}", ""]
    lines += [f"- Base model: {base_model}", f"- Data: {results['data']}"]
    lines += [f"- Objective: {objective}", *_strategy(config)]
    lines += [_terms(config), *_exits(config), _optimizer(config)]
    lines += [f"- Steps: {results['num_steps']}, seed {config.optimization.seed}", ""]
    best = results.get("best", {})
    is_best = best.get("step") is not None
    which = f"step {best['step']}, the best by {best['metric']}" if is_best else "the last step"
    lines += [f"## Scores after {which}", "", *_score_lines(results), ""]
    lines += ["## Made with", "", *_made_with(results)]
    lines += ["", "## Use", "", "```python"]
    lines += ["from fusedacl.engine import MultiExitForSequenceClassification", ""]
    lines += ['model = MultiExitForSequenceClassification.from_pretrained("this directory")', "```"]
    return "\n".join(lines) + "\n"


def write_early_exit(path: Path, study: Mapping[str, Any], policy: str) -> None:
    """Put what a study found on the policy that is stored with a model into the model's card.

    Written again it replaces itself. A model without a card gets one of this alone. `study`: as
    `exit_study.study_exits` returns it; `policy`: the stored one's name in it.
    """
    start, end = _EARLY_EXIT
    section = "\n".join([start, *_early_exit_lines(study, policy), end])
    if path.is_file():
        card = path.read_text(encoding="utf-8")
    else:
        card = "\n".join([*_head({**_METADATA, "tags": _TAGS}), f"# {path.parent.name}", ""])
    before, found, rest = card.partition(start)
    _, closed, after = rest.partition(end)
    card = before + section + after if found and closed else f"{card.rstrip()}\n\n{section}\n"
    write_whole(path, card)


def _early_exit_lines(study: Mapping[str, Any], policy: str) -> list[str]:
    stored = study["policies"][policy]
    facts, metric = stored["calibration"], study["metric"]
    setting = ", ".join(f"{name} {value:.4g}" for name, value in stored["parameters"].items())
    header = ["", "setting", metric]
    full = ["full model", "", f"{facts['full_score']:.4f}"]
    early = [f"`{policy}`", setting, f"{facts['score']:.4f}"]
    if facts["cross_fitted"] is not None:
        header.append(f"{metric}, cross-fitted")
        full.append(full[-1])
        early.append(f"{facts['cross_fitted']['score']:.4f}")
    header += ["mean layer", "FLOPs", "area under the curve"]
    full += [f"{study['exit_layers'][-1]:.2f}", "100%", ""]
    early += [f"{facts['mean_layer']:.2f}", f"{facts['flops_share']:.0%}"]
    early.append(f"{stored['area_under_curve']:.4f}")
    measured = stored.get("measured", [])
    for speed in measured:
        header.append(f"speed, batch {speed['batch_size']}")
        full.append("1.00x")
        early.append(f"{speed['speedup']:.2f}x")
    target = ", ".join(f"{name} {value:g}" for name, value in facts["target"].items())
    lines = ["## Early exit", "", markdown_table(header, [full, early]), ""]
    lines += [
        f"The setting was chosen for {target} on {facts['num_samples']} texts ({facts['data']}) in "
        f"{facts['dtype']}, at most {facts['max_seq_length']} tokens each. Area under the curve of "
        f"the settings of `{policy}`: {AREA_WORDS}."
    ]
    if facts["cross_fitted"] is not None:
        lines[-1] += (
            f" Cross-fitted: in {facts['cross_fitted']['num_folds']} folds, each scored with the "
            "setting that the rest of the texts chose."
        )
    if measured:
        lines[-1] += (
            f" Speed: of {measured[0]['num_texts']} texts against the full model, in turns with "
            f"it, median of {measured[0]['repeats']} passes, on {study['machine']}."
        )
    use = "Use: `fusedacl predict --policy stored`, or `model.early_exit(inputs)`."
    return [*lines, "", use, "", *_made_with(study)]


def _head(metadata: Mapping[str, Any]) -> list[str]:
    """The hub's metadata."""
    return ["---", yaml.safe_dump(dict(metadata), sort_keys=False).rstrip(), "---", ""]


def _score_lines(results: Mapping[str, Any]) -> list[str]:
    """A list of one exit's scores, a table of several exits'."""
    if not results["metrics"]:
        return ["There was no labelled split to evaluate on."]
    if all(len(by_layer) == 1 for by_layer in results["metrics"].values()):
        return [
            f"- {split}, exit at layer {layer}: "
            + ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            for split, by_layer in results["metrics"].items()
            for layer, scores in by_layer.items()
        ]
    names = list(dict.fromkeys(name for scores in _scores(results) for name in scores))
    rows = [
        [split, str(layer), *(f"{scores[name]:.4f}" for name in names)]
        for split, by_layer in results["metrics"].items()
        for layer, scores in by_layer.items()
    ]
    return [markdown_table(["split", "exit at layer", *names], rows)]


def _made_with(results: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return ["```", results["command"], "```", "", f"Versions: {versions}."]


def _strategy(config: TrainingConfig) -> list[str]:
    options = config.optimization
    lines = [f"- Strategy: {_STRATEGIES[options.strategy]}"]
    if options.stage1_model is not None:
        lines.append(f"- First stage: taken from {options.stage1_model}")
    return lines


def _optimizer(config: TrainingConfig) -> str:
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
    return f"{words}, {batch} texts a step, {precision}"


def _terms(config: TrainingConfig) -> str:
    objective = config.objective
    if objective.objective == "ce":
        return "- Contrastive term: none"
    return (
        f"- Contrastive term: lambda {objective.aux_weight:g}, tau {objective.temperature:g}, "
        f"{objective.contrastive_reduction} over anchors, denominator {objective.denominator}"
    )


def _exits(config: TrainingConfig) -> list[str]:
    """How the exits were made and trained."""
    lines = [f"- Exits: {config.model.exit_head} head"]
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


def _scores(results: Mapping[str, Any]) -> list[dict[str, float]]:
    return [scores for by_layer in results["metrics"].values() for scores in by_layer.values()]
