"""The request of `fusedacl exits`: policies, target and promise, and whether they can be had."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...config.commands import ExitsConfig
from ...data.columns import TextSplit, seen_among
from ...data.record import DataRecord
from ...model.exit_policies import policy_class
from .guarantee import Promise
from .search import Target

logger = logging.getLogger("fusedacl")
DEFAULT_MAX_QUALITY_LOSS = 0.01
# Data sets repeat some texts by nature: texts have been seen if more than this share is repeated,
# with this error probability, since a sample of the texts is compared.
_REPEATED, _ERROR = 0.1, 0.01


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
        if _is_named(name, config):
            policy_class(name).check_several()
    if left_out:
        logger.info(f"{', '.join(left_out)}: left out, as a text may have several labels.")
    return fitting


def for_exits(names: list[str], config: ExitsConfig, num_exits: int) -> list[str]:
    """Those policies with which a text can leave before the last of so many exits.

    Raises:
        ValueError: one with which none can was asked for by name.
    """
    left_out = [name for name in names if policy_class(name).least_exits > num_exits]
    for name in left_out:
        least = policy_class(name).least_exits
        why = f"with {num_exits} exits no text leaves early: it needs at least {least}"
        if _is_named(name, config):
            raise ValueError(f"{name}: {why}. Name other policies.")
        logger.info(f"{name}: left out, as {why}.")
    return [name for name in names if name not in left_out]


def _is_named(name: str, config: ExitsConfig) -> bool:
    """True for a policy that the user has named, False for one of the default list."""
    options = config.exits
    return name == options.policy or options.policies != ExitsConfig().exits.policies


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
    if config.data.max_eval_samples is not None:
        raise ValueError(
            f"max_eval_samples={config.data.max_eval_samples} takes the first texts, which may be "
            "of one class: a guarantee needs texts drawn at random. Leave it out, or write a file "
            "of texts drawn at random."
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
    """Refuse a guarantee from texts that the model has seen; warn if it was trained on them.

    Raises:
        ValueError: there is a promise, and the model was trained on these texts, or on a part of
            them, or its checkpoint was chosen on them.
    """
    trained = max(_shares(texts, model.trained_on), default=0.0)
    if trained:
        part = "these texts" if trained == 1 else f"about {trained:.0%} of these texts"
        seen = f"the model was trained on {part}"
        if promise is None:
            logger.warning(
                f"{name}: {seen}. Its scores and the chosen settings will look better than they "
                "are on others."
            )
    elif any(_shares(texts, model.selected_on)):
        seen = "the checkpoint was chosen on these texts (load_best_model_at_end, early stopping)"
    else:
        return
    if promise is not None:
        raise ValueError(
            f"{name}: {seen}, and a guarantee needs texts that are new to it: name others, or "
            "leave confidence out."
        )


def _shares(texts: TextSplit, contents: Iterable[Mapping[str, Any]]) -> Iterator[float]:
    """For each of the contents, the share of the texts that it has, or 0 if that may be chance."""
    from scipy.special import bdtrc

    for recorded in contents:
        num_seen, num_compared = seen_among(texts, recorded)
        # The probability of so many repetitions if their share were _REPEATED.
        is_more = num_seen > 0 and bdtrc(num_seen - 1, num_compared, _REPEATED) <= _ERROR
        yield num_seen / num_compared if is_more else 0.0
