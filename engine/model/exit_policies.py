"""Early-exit policies: rules that decide for each text whether it leaves at an exit.

A policy sees the exits in the order of their layers. Its decision on a text depends only on that
text's own logits at this exit and the exits before, never on the rest of the batch.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..runtime.device import dtype_name
from ..runtime.text import did_you_mean
from .answers import answers_of, same_answers
from .exits import ExitModel

# State that a policy carries from exit to exit: tensors [N, …], one row per text.
Memory = dict[str, Tensor]


@dataclass(frozen=True)
class ExitReading:
    """Outputs of one exit for N texts.

    layer: the layer of the exit.  logits [N, K], float32.
    certainty [N]: the learned exit's probability that the answer is correct; None without one.
    several: whether a text may have several labels, each with a probability of its own.
    """

    layer: int
    logits: Tensor
    certainty: Tensor | None = None
    several: bool = False


@dataclass(frozen=True)
class Policy(ABC):
    """Rule with fixed parameters; texts that never satisfy it leave at the last exit."""

    name: ClassVar[str]
    needs_learned_exit: ClassVar[bool] = False
    # Whether it can decide on texts that may have several labels.
    takes_several: ClassVar[bool] = True
    # Exits that a model needs so that the policy can do more than run it whole.
    least_exits: ClassVar[int] = 2

    @abstractmethod
    def leaves(self, reading: ExitReading, memory: Memory) -> tuple[Tensor, Memory]:
        """Return which texts leave at this exit, bool [N], and the memory for the next exit.

        `memory` is empty at the first exit; at the others it is what the exit before returned.
        """

    def reads(self, layer: int) -> bool:
        """Return whether the policy needs the exit on `layer` to be computed."""
        return True

    def limits(self, num_exits: int) -> dict[str, int]:
        """Return the largest value that can be reached, for each parameter that counts exits."""
        return {}

    def check(self, exit_layers: Sequence[int], several: bool = False) -> None:
        """Refuse a model whose exits, or whose kind of answers, do not fit this policy.

        several: whether a text may have several labels.

        Raises:
            ValueError: naming the parameter.
        """
        if several:
            self.check_several()
        for name, most in self.limits(len(exit_layers)).items():
            if getattr(self, name) > most:
                raise ValueError(
                    f"{self.name}: {name}={getattr(self, name)} can never be reached with "
                    f"{len(exit_layers)} exits: use {most} or less."
                )

    @classmethod
    def check_several(cls) -> None:
        """Refuse a policy that cannot decide on texts that may have several labels.

        Raises:
            ValueError: naming the policies that can.
        """
        if not cls.takes_several:
            others = ", ".join(name for name, policy in POLICIES.items() if policy.takes_several)
            raise ValueError(
                f"The policy {cls.name} counts votes for one class, and this model gives a text "
                f"any number of labels. Use one of {others}."
            )

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters by name; `make_policy(name, **parameters)` restores the policy."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        words = ", ".join(f"{name} {value:g}" for name, value in self.parameters.items())
        return f"{self.name.replace('_', ' ')} ({words})"

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            if name not in self.parameters:
                continue
            value = getattr(self, name)
            if kind is float:
                _check_threshold(f"{self.name}: {name}", value)
            else:
                _check_count(f"{self.name}: {name}", value)


@dataclass(frozen=True)
class ThresholdPolicy(Policy):
    """Leave when a signal is above the threshold; with 1 no text leaves."""

    threshold: float

    @staticmethod
    @abstractmethod
    def signal(reading: ExitReading) -> Tensor:
        """Return the number in [0, 1] that is compared with the threshold, float32 [N]."""

    def leaves(self, reading: ExitReading, memory: Memory) -> tuple[Tensor, Memory]:
        return self.signal(reading) > self.threshold, memory


@dataclass(frozen=True)
class MaximumProbability(ThresholdPolicy):
    """Leave when the largest class probability is above the threshold; with 1 no text leaves.

    With several labels per text: the probability of the answer to the least certain label, which
    is min_k max(p_k, 1 - p_k).
    """

    name = "max_probability"

    @staticmethod
    def signal(reading: ExitReading) -> Tensor:
        if reading.several:
            return torch.sigmoid(reading.logits.abs().amin(dim=-1))
        return torch.softmax(reading.logits, dim=-1).amax(dim=-1)


@dataclass(frozen=True)
class Entropy(ThresholdPolicy):
    """Leave when the entropy of the class probabilities is below the threshold.

    With 0 no text leaves, with 1 every text does.

    H = -sum_k p_k log p_k, divided by log K so that thresholds are comparable between tasks. With
    several labels per text: the mean over the labels of the entropy of each, divided by log 2.
    After BranchyNet (arXiv 1709.01686) and DeeBERT (arXiv 2004.12993), which use nats.
    """

    name = "entropy"

    @staticmethod
    def signal(reading: ExitReading) -> Tensor:
        if reading.several:
            chances = torch.sigmoid(reading.logits)
            # 1 - p would be 0 for large logits.
            others = torch.sigmoid(-reading.logits)
            entropy = torch.special.entr(chances) + torch.special.entr(others)
            return entropy.mean(dim=-1).mul_(1 / math.log(2))
        # softmax subtracts the maximum and entr(0) is 0: finite whatever the logits.
        entropy = torch.special.entr(torch.softmax(reading.logits, dim=-1)).sum(dim=-1)
        return entropy.mul_(1 / math.log(reading.logits.shape[-1]))

    def leaves(self, reading: ExitReading, memory: Memory) -> tuple[Tensor, Memory]:
        signal = self.signal(reading)
        # Equal probabilities have the entropy 1, or a little more by rounding.
        return signal.isfinite() if self.threshold == 1 else signal < self.threshold, memory


@dataclass(frozen=True)
class Learned(ThresholdPolicy):
    """Leave when the learned exit's probability of a correct answer is above the threshold.

    The learned exit is one linear layer on the exits' representations h, shared by all exits, as in
    BERxiT (learning to exit; EACL 2021). `fit_learned_exit` fits it.
    """

    name = "learned"
    needs_learned_exit = True

    @staticmethod
    def signal(reading: ExitReading) -> Tensor:
        assert reading.certainty is not None  # EarlyExit refuses a model without a learned exit
        return reading.certainty


@dataclass(frozen=True)
class Patience(Policy):
    """Leave when `patience` exits in a row gave the same answer as the exit before them.

    PABEE (arXiv 2006.04152): the count is 0 at the first exit, grows by 1 at an exit that agrees
    with the one before, and is reset to 0 at any other. Patience 1 can leave at the second exit.
    With several labels per text an answer is the whole set of them.
    """

    name = "patience"
    # The earliest exit is the second, which must not be the last.
    least_exits = 3
    patience: int

    def leaves(self, reading: ExitReading, memory: Memory) -> tuple[Tensor, Memory]:
        answer = answers_of(reading.logits, reading.several)
        if memory:
            same = same_answers(answer, memory["answer"], reading.several)
            count = torch.where(same, memory["count"] + 1, 0)
        else:
            count = torch.zeros_like(reading.logits[:, 0], dtype=torch.int64)
        return count >= self.patience, {"answer": answer, "count": count}

    def limits(self, num_exits: int) -> dict[str, int]:
        return {"patience": num_exits - 1}


@dataclass(frozen=True)
class PatienceConfidence(Policy):
    """Leave when `patience` exits in a row were confident, whether or not they agree.

    After PCEE-BERT (Findings of NAACL 2022). An exit is confident if the signal of max_probability
    is above the threshold. Patience 1 is the policy max_probability.
    """

    name = "patience_confidence"
    # With two exits only patience 1 can leave early, which is max_probability.
    least_exits = 3
    patience: int
    threshold: float

    def leaves(self, reading: ExitReading, memory: Memory) -> tuple[Tensor, Memory]:
        confident = MaximumProbability.signal(reading) > self.threshold
        before = memory["count"] if memory else torch.zeros_like(confident, dtype=torch.int64)
        count = torch.where(confident, before + 1, 0)
        return count >= self.patience, {"count": count}

    def limits(self, num_exits: int) -> dict[str, int]:
        return {"patience": num_exits}


@dataclass(frozen=True)
class Voting(Policy):
    """Leave when `votes` of the exits so far gave the same answer, in a row or not.

    The voting criterion of "Early Exiting with Ensemble Internal Classifiers" (arXiv 2105.13792)
    without its scaling by the number of voters: max_c #{exits so far that answer c} >= votes. The
    deciding vote is the current exit's, so its answer is the majority class. A text that reaches
    the last exit gets that exit's own answer.
    """

    name = "voting"
    takes_several = False
    votes: int

    def leaves(self, reading: ExitReading, memory: Memory) -> tuple[Tensor, Memory]:
        num_classes = reading.logits.shape[-1]
        votes = functional.one_hot(reading.logits.argmax(dim=-1), num_classes)
        if memory:
            votes = votes + memory["votes"]
        return votes.amax(dim=-1) >= self.votes, {"votes": votes}

    def limits(self, num_exits: int) -> dict[str, int]:
        return {"votes": num_exits}


@dataclass(frozen=True)
class FixedLayer(Policy):
    """Every text leaves at the exit on `layer`; no other exit is computed."""

    name = "fixed_layer"
    layer: int

    def leaves(self, reading: ExitReading, memory: Memory) -> tuple[Tensor, Memory]:
        here = reading.layer == self.layer
        return torch.full_like(reading.logits[:, 0], here, dtype=torch.bool), memory

    def reads(self, layer: int) -> bool:
        return layer == self.layer

    def check(self, exit_layers: Sequence[int], several: bool = False) -> None:
        if self.layer not in exit_layers:
            layers = ", ".join(map(str, exit_layers))
            raise ValueError(
                f"fixed_layer: layer={self.layer} carries no exit; the exits are on layers "
                f"{layers}."
            )


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        MaximumProbability,
        Entropy,
        Patience,
        PatienceConfidence,
        Voting,
        Learned,
        FixedLayer,
    )
}


def policy_class(name: str) -> type[Policy]:
    """Return the policy class of that name.

    Raises:
        ValueError: there is none; the nearest name is offered.
    """
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} is not a policy.{did_you_mean(name, POLICIES)}")
    return POLICIES[name]


def make_policy(name: str, **parameters: Any) -> Policy:
    """Make a policy from its name and parameters, such as ("entropy", threshold=0.3).

    Raises:
        ValueError: an unknown name or parameter (the nearest is offered), a missing one, or a value
            out of range.
    """
    found = policy_class(name)
    known = [field.name for field in dataclasses.fields(found)]
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(
                f"{name} has no parameter {parameter!r}.{did_you_mean(parameter, known)}"
            )
    missing = [parameter for parameter in known if parameter not in parameters]
    if missing:
        raise ValueError(f"The policy {name} needs a value for {' and '.join(missing)}.")
    return found(**parameters)


def parse_policy(text: str) -> Policy:
    """Parse a policy from the command line: "patience_confidence:patience=2,threshold=0.9".

    Raises:
        ValueError: as `make_policy`, or the text has another form.
    """
    name, _, assignments = text.partition(":")
    parameters: dict[str, Any] = {}
    for assignment in filter(None, assignments.split(",")):
        parameter, _, value = assignment.partition("=")
        try:
            is_integer = value.strip().lstrip("+-").isdigit()
            number = int(value) if is_integer else float(value)
        except ValueError:
            raise ValueError(
                f"policy={text!r}: {assignment!r} is not of the form parameter=number, as in "
                "'entropy:threshold=0.3'."
            ) from None
        if parameter.strip() in parameters:
            raise ValueError(f"policy={text!r} gives {parameter.strip()} twice: leave one out.")
        parameters[parameter.strip()] = number
    return make_policy(name.strip(), **parameters)


def policy_from_record(record: Mapping[str, Any]) -> Policy:
    """Make the policy that a record {"name": …, "parameters": {…}} of a configuration describes.

    Raises:
        ValueError: it does not describe a policy.
    """
    name, parameters = record.get("name"), record.get("parameters")
    if not isinstance(name, str) or not isinstance(parameters, Mapping):
        raise ValueError(f"{dict(record)!r} describes no policy: it needs a name and parameters.")
    return make_policy(name, **parameters)


def _check_threshold(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{where}={value!r} is out of range: it must be a number from 0 to 1.")


def _check_count(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}={value!r} is out of range: it must be an integer of 1 or more.")


def calibration_mismatch(
    record: Mapping[str, Any], dtype: torch.dtype, max_seq_length: int, weights: str | None = None
) -> str | None:
    """Return a warning if this inference differs from the calibration in a record, else None.

    A value that the record lacks is not compared. weights: hash of the model's weights, which is
    recorded with a guarantee alone; None compares none.
    """
    made = record.get("calibration") or {}
    if weights is not None and (made.get("guarantee") or {}).get("weights", weights) != weights:
        return (
            "The stored policy was calibrated with other weights, so its guarantee does not hold, "
            "and score and speed may differ from the calibrated ones. Run `fusedacl exits` with "
            "this model."
        )
    now = {"dtype": dtype_name(dtype), "max_seq_length": max_seq_length}
    differing = [name for name in now if name in made and made[name] != now[name]]
    if not differing:
        return None
    then, here = (
        " and ".join(f"{name} {values[name]}" for name in differing) for values in (made, now)
    )
    lost = ", and its guarantee does not hold" if made.get("guarantee") else ""
    return (
        f"The stored policy was calibrated with {then}, this run has {here}: score and speed may "
        f"differ from the calibrated ones{lost}. Run `fusedacl exits` with the same options to "
        "calibrate for them."
    )


def stored_policy(model: ExitModel) -> Policy:
    """Return the policy that `fusedacl exits` stored in the model's configuration.

    Raises:
        ValueError: there is none, or it has been damaged.
    """
    record = getattr(model.config, "exit_policy", None)
    if record is None:
        raise ValueError(
            "The model stores no early-exit policy: run `fusedacl exits` to calibrate one, or name "
            "a policy with its parameters."
        )
    return policy_from_record(record)
