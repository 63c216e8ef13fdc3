"""The README.md of a final model: what it is, how it was made, what it scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .config import TrainingConfig

_OBJECTIVES = {
    "ce": "cross-entropy",
    "scl": "cross-entropy and supervised contrastive loss (CE+SCL)",
    "acl": "cross-entropy and aligned contrastive loss (ACL, arXiv 2602.03563)",
}


def model_card(config: TrainingConfig, base_model: str, results: dict[str, Any]) -> str:
    """A model card with the hub's metadata, from a run's configuration and results."""
    objective = _OBJECTIVES[config.objective.objective]
    if config.gated:
        objective += f", gated at {config.objective.max_angle:g} degrees (ACL-Grad)"
    names = {name for scores in _scores(results) for name in scores if name != "loss"}
    is_local = Path(base_model).exists()
    title = Path(base_model).name if is_local else base_model
    metadata = {
        "library_name": "fusedacl",
        "pipeline_tag": "text-classification",
        # The hub knows models by their names there.
        **({} if is_local else {"base_model": base_model}),
        "tags": ["text-classification", "aligned-contrastive-learning"],
        "metrics": sorted(names),
    }
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).rstrip(), "---", ""]
    lines += [f"# {title} fine-tuned on {results['data']}", ""]
    lines += [f"- Base model: {base_model}", f"- Data: {results['data']}"]
    lines += [f"- Objective: {objective}", f"- Strategy: {config.optimization.strategy}"]
    lines += [_terms(config), *_exits(config)]
    lines += [f"- Steps: {results['num_steps']}, seed {config.optimization.seed}", ""]
    lines += ["## Scores after the last step", ""]
    for split, by_layer in results["metrics"].items():
        for layer, scores in by_layer.items():
            words = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            lines.append(f"- {split}, exit at layer {layer}: {words}")
    if not results["metrics"]:
        lines.append("There was no labelled split to evaluate on.")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines += [
        "",
        "## Made with",
        "",
        "```",
        results["command"],
        "```",
        "",
        f"Versions: {versions}.",
    ]
    lines += ["", "## Use", "", "```python"]
    lines += ["from fusedacl.engine import MultiExitForSequenceClassification", ""]
    lines += ['model = MultiExitForSequenceClassification.from_pretrained("this directory")', "```"]
    return "\n".join(lines) + "\n"


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
    lines[0] += f" on layers {config.model.exit_layers or 'all'}"
    if config.objective.cross_layer:
        lines.append("- The other exits are contrasted with the frozen last one (ACL-CL)")
    if config.objective.distill_weight > 0:
        lines.append(
            f"- Distilled from the last exit: weight {config.objective.distill_weight:g}, "
            f"temperature {config.objective.distill_temperature:g}"
        )
    return lines


def _scores(results: dict[str, Any]) -> list[dict[str, float]]:
    return [scores for by_layer in results["metrics"].values() for scores in by_layer.values()]
