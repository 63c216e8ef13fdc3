"""Representations of texts at a model's exits, label embeddings, and their alignment.

    h_i    sample representation, the input of an exit's classifier
    l_k    label embedding, the classifier's weight for class k
    both normalised to length 1, as in the contrastive loss

Source: arXiv 2602.03563, section 5.7 and Figure 6 (pictures only). The numbers here do not depend
on t-SNE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from ...config.commands import TSNEConfig
from ...config.training import TrainingConfig
from ...data.batching import EncodedSplit
from ...data.dataset import TextData
from ...experiments.runs import load_data, load_model
from ...inference.logits import exit_outputs
from ...model.multi_exit import parse_layers
from ...model.saved import TrainedModel


@dataclass(frozen=True)
class Representations:
    """Representations at an exit of a run: n texts, K classes, d dimensions; rows of length 1 or 0.

    label: that of the run; data: data set and split; layer: that of the exit (1 = first).
    samples [n, d]; label_embeddings [K, d]; classes [n], the true class of each text.
    """

    label: str
    data: str
    layer: int
    samples: np.ndarray
    label_embeddings: np.ndarray
    classes: np.ndarray
    class_names: list[str]


@dataclass(frozen=True)
class Alignment:
    """Alignment of the texts at an exit with the label embeddings, as cosines in [-1, 1].

    own: mean cosine of a text to the label embedding of its class; nearest_other: to the nearest
    other one; margin: own minus nearest_other; nearest_is_own: share of the texts with no other
    label embedding nearer than their own.
    silhouette: mean silhouette of the true classes by cosine distance; None for a single class, or
    a class per text.
    """

    own: float
    nearest_other: float
    margin: float
    nearest_is_own: float
    silhouette: float | None


def read_representations(
    run: Path, given: TrainingConfig, label: str, config: TSNEConfig, exit_layers: Sequence[int]
) -> list[Representations]:
    """Representations of the first evaluation split's texts at exits of a run, one per layer.

    Args:
        given: options of the run.
        exit_layers: layers of the exits, which the model must have.

    Raises:
        ValueError: no model, no such exit, no labelled evaluation split, or the data are gone.
        FloatingPointError: a representation or label embedding is NaN or infinite.
    """
    trained = load_model(run, config.device.device)
    model = trained.model
    for layer in exit_layers:
        if layer not in model.exit_layers:
            raise ValueError(
                f"exit_layers: run {str(run)!r} has no exit on layer {layer}; it has "
                f"{', '.join(map(str, model.exit_layers))}."
            )
    if trained.record.several_labels:
        raise ValueError(
            f"Run {str(run)!r}: its texts may have several labels, and the figure gives a text the "
            "colour of one. `fusedacl angles` reads such runs."
        )
    # Texts are drawn from the whole split, even if the run was evaluated on a part of it.
    whole = dataclasses.replace(given, data=dataclasses.replace(given.data, max_eval_samples=None))
    data = load_data(run, whole, trained.record, vars(config.data), needs_train=False)
    encoded, split = _drawn_texts(data, trained, config)
    assert encoded.labels is not None  # `load_splits` evaluates labelled splits only.
    positions = [model.exit_layers.index(layer) for layer in exit_layers]
    places, parts = [], []
    for of_batch, output in exit_outputs(
        model,
        encoded,
        config.tsne.per_device_eval_batch_size,
        pad_token_id=trained.tokenizer.pad_token_id,
        positions=positions,
        progress=None if config.device.disable_tqdm else f"representations of {run.name}",
    ):
        places.append(of_batch)
        parts.append(functional.normalize(output.exit_embeddings.float(), dim=-1).cpu())
    # [E, n, d], in the order of the texts.
    samples = torch.cat(parts, dim=1)[:, torch.cat(places).argsort()].numpy()
    where, classes, names = f"{data.name}, {split}", encoded.labels.numpy(), trained.label_names
    found = []
    for position, layer, vectors in zip(positions, exit_layers, samples, strict=True):
        weight = model.label_embeddings_of([position])[0].detach().float()
        label_embeddings = functional.normalize(weight, dim=-1).cpu().numpy()
        for what, rows in (("representation", vectors), ("label embedding", label_embeddings)):
            bad = ~np.isfinite(rows).all(axis=1)
            if bad.any():
                raise FloatingPointError(
                    f"run {str(run)!r}, exit {layer}: {bad.sum()} of {len(bad)} {what}s are NaN or "
                    "infinite. The run has diverged: use an earlier checkpoint of it."
                )
        found.append(
            Representations(label, where, layer, vectors, label_embeddings, classes, names)
        )
    return found


def measure_alignment(exit_of_run: Representations) -> Alignment:
    """Measure the alignment of the texts with the label embeddings."""
    from sklearn.metrics import silhouette_score

    samples, classes = exit_of_run.samples, exit_of_run.classes
    cosines = samples @ exit_of_run.label_embeddings.T  # [n, K]
    rows = np.arange(len(samples))
    own = cosines[rows, classes]
    others = cosines.copy()
    others[rows, classes] = -np.inf
    nearest_other = others.max(axis=1)
    num_classes = len(np.unique(classes))
    silhouette = None
    if 2 <= num_classes < len(samples):
        silhouette = float(silhouette_score(samples, classes, metric="cosine"))
    return Alignment(
        own=float(own.mean()),
        nearest_other=float(nearest_other.mean()),
        margin=float((own - nearest_other).mean()),
        nearest_is_own=float((own >= nearest_other).mean()),
        silhouette=silhouette,
    )


def choose_layers(text: str | None, available: Sequence[Sequence[int]]) -> list[int]:
    """The layers that `exit_layers` names; None: first, middle and last of the common layers.

    Raises:
        ValueError: it does not name layers, or the runs have no layer in common.
    """
    if text is not None and (layers := parse_layers(text)):
        return sorted(set(layers))
    common = sorted(set(available[0]).intersection(*available[1:]))
    if not common:
        raise ValueError(
            "exit_layers: the runs have no exit layer in common ("
            + "; ".join(", ".join(map(str, layers)) for layers in available)
            + "). Draw them separately."
        )
    if text is not None:
        return common
    return sorted({common[0], common[len(common) // 2], common[-1]})


def _drawn_texts(
    data: TextData, trained: TrainedModel, config: TSNEConfig
) -> tuple[EncodedSplit, str]:
    """At most `max_samples` random texts of the first evaluation split, and its name."""
    if not data.evaluation_splits:
        raise ValueError(f"{data.name} has no labelled evaluation split to take texts from.")
    name = data.evaluation_splits[0]
    split = data.splits[name]
    number = min(config.tsne.max_samples, len(split))
    random = np.random.default_rng(config.tsne.seed)
    rows = np.sort(random.choice(len(split), number, replace=False))
    return trained.encode(split.take(rows.tolist()), name), name
