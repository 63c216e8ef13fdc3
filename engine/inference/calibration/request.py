"""The request of `fusedacl exits`: policies, target and promise, and whether they can be had."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ...config.commands import ExitsConfig
from ...data.columns import TextSplit
from ...data.record import DataRecord, content
from ...model.exit_policies import policy_class
from .guarantee import Promise
from .search import Target

logger = logging.getLogger("fusedacl")
DEFAULT_MAX_QUALITY_LOSS = 0.01


def policy_names(config: ExitsConfig) -> list[str]:
    """The policies to try, with the one to store.

    Raises:
        ValueError: there is none, or one is unknown.
    """
    names = [name.strip() for name in config.exits.policies.split(",") if name.strip()]
    if config.exits.policy is not None:
        names.append(config.exits.policy)
    if not names:
        raise ValueError("policies is empty: name at least one policy.")
    for name in names:
        policy_class(name)
    return list(dict.fromkeys(names))


def for_several_labels(names: list[str], config: ExitsConfig) -> list[str]:
    """Those policies that can decide where a text may have several labels.

    Raises:
        ValueError: one that cannot was asked for by name.
    """
    fitting = [name for name in names if policy_class(name).takes_several]
    left_out = [name for name in names if name not in fitting]
    for name in left_out:
        if name == config.exits.policy or config.exits.policies != ExitsConfig().exits.policies:
            policy_class(name).check_several()
    if left_out:
        logger.info(f"{', '.join(left_out)}: left out, as a text may have several labels.")
    return fitting


def target_of(config: ExitsConfig) -> Target:
    """The target that is given, or the default one.

    Raises:
        ValueError: several are given, or one is out of range.
    """
    given = {
        name: getattr(config.exits, name)
        for name in ("max_quality_loss", "max_mean_layer", "max_flops_share")
        if getattr(config.exits, name) is not None
    }
    return Target(**(given or {"max_quality_loss": DEFAULT_MAX_QUALITY_LOSS}))


def promise_of(config: ExitsConfig, target: Target) -> Promise | None:
    """The promise that `confidence` asks for; None without it.

    Raises:
        ValueError: an option that needs another one, or a value out of range.
    """
    options = config.exits
    if options.confidence is None:
        if options.risk != ExitsConfig().exits.risk:
            raise ValueError(f"risk={options.risk} belongs to confidence: add --confidence 0.95.")
        return None
    if target.max_quality_loss is None:
        raise ValueError(
            "confidence bounds max_quality_loss: give that target, or leave confidence out."
        )
    return Promise(target.max_quality_loss, options.confidence, options.risk)


def check_risk(risk: str, metric: str, metrics: Sequence[str]) -> None:
    """Refuse a metric whose loss the risk does not bound.

    Raises:
        ValueError: naming the options that go together.
    """
    # An answer is right or wrong as a whole.
    bounded = "exact_match" if "exact_match" in metrics else "accuracy"
    if risk == "lost_answers" and metric != bounded:
        other = f"--metric {bounded}, or " if bounded in metrics else ""
        raise ValueError(
            f"risk={risk} bounds the loss of {bounded}, not of {metric}, which is no mean over "
            f"texts: add {other}--risk changed_answers."
        )


def check_new(model: DataRecord, texts: TextSplit, name: str, promise: Promise | None) -> None:
    """Refuse a guarantee from the texts that the model was trained on; warn without one.

    Raises:
        ValueError: the texts are those of the model's training split, and there is a promise.
    """
    trained_on = model.splits.get("train", {}).get("texts")
    if trained_on is None or content(texts)["texts"] != trained_on:
        return
    if promise is not None:
        raise ValueError(
            f"{name}: the model was trained on these texts, and a guarantee needs texts that are "
            "new to it: name others, or leave confidence out."
        )
    logger.warning(
        f"{name}: the model was trained on these texts. Its scores and the chosen settings will "
        "look better than they are on others."
    )
