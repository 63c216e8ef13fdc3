"""The section of a model card on calibrated early exit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...model.card import front_matter, made_with
from ...runtime.files import write_whole
from ...runtime.text import markdown_table
from .guarantee import words
from .search import AREA_WORDS

# `fusedacl exits` replaces everything between these two lines.
_EARLY_EXIT = ("<!-- fusedacl: early exit -->", "<!-- fusedacl: end of early exit -->")


def write_early_exit(path: Path, study: Mapping[str, Any], policy: str) -> None:
    """Write the section on the stored policy into a model card, in place of an earlier one.

    Args:
        path: of the card; a model without one gets a card with this section alone.
        study: as `study_exits` returns it.
        policy: name, in the study, of the policy that is stored with the model.
    """
    start, end = _EARLY_EXIT
    section = "\n".join([start, *_early_exit_lines(study, policy), end])
    if path.is_file():
        card = path.read_text(encoding="utf-8")
    else:
        card = "\n".join([*front_matter(), f"# {path.parent.name}", ""])
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
    if "guarantee" in facts:
        lines[-1] += f" {words(facts['guarantee'])}"
    if measured:
        lines[-1] += (
            f" Speed: measured on {measured[0]['num_texts']} texts, in turns with the full model; "
            f"median of {measured[0]['repeats']} passes on {study['machine']}."
        )
    use = "Use: `fusedacl predict --policy stored`, or `model.early_exit(inputs)`."
    return [*lines, "", use, "", *made_with(study)]
