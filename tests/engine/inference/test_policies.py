"""Each policy on small examples, and the mistakes it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusedacl.engine.model.exit_policies import (
    POLICIES,
    Entropy,
    ExitReading,
    FixedLayer,
    Learned,
    MaximumProbability,
    Memory,
    Patience,
    PatienceConfidence,
    Policy,
    Voting,
    make_policy,
    parse_policy,
    policy_from_record,
)
from torch import Tensor

SETTINGS: dict[str, dict[str, Any]] = {
    "max_probability": {"threshold": 0.9},
    "entropy": {"threshold": 0.4},
    "patience": {"patience": 2},
    "patience_confidence": {"patience": 2, "threshold": 0.6},
    "voting": {"votes": 2},
    "learned": {"threshold": 0.5},
    "fixed_layer": {"layer": 3},
}


def logits_of(*answers: int) -> Tensor:
    """Logits of 3 classes for these answers: [N, 3]."""
    return 4.0 * torch.nn.functional.one_hot(torch.tensor(answers), 3).float()


def leaving_exits(policy: Policy, exits: list[Tensor], several: bool = False) -> list[int]:
    """The exit (1 = first) where each text leaves; 0: at none."""
    found = torch.zeros(len(exits[0]), dtype=torch.int64)
    memory: Memory = {}
    for number, logits in enumerate(exits, start=1):
        leaving, memory = policy.leaves(ExitReading(number, logits, several=several), memory)
        found[leaving & (found == 0)] = number
    return found.tolist()


def test_maximum_probability_and_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    reading = ExitReading(1, logits)
    probability = math.exp(2) / (math.exp(2) + 2)
    assert MaximumProbability.signal(reading)[1].item() == pytest.approx(probability)
    assert MaximumProbability(0.7).leaves(reading, {})[0].tolist() == [False, True, True]
    rest = (1 - probability) / 2
    entropy = -probability * math.log(probability) - 2 * rest * math.log(rest)
    signal = Entropy.signal(reading)
    assert signal[1].item() == pytest.approx(entropy / math.log(3))
    assert signal[0].item() == pytest.approx(1)
    assert Entropy(0.5).leaves(reading, {})[0].tolist() == [False, False, True]


def test_signals_where_texts_may_have_several_labels() -> None:
    logits = torch.tensor([[9.0, -9.0, 0.0], [2.0, -3.0, 4.0], [9.0, 9.0, 9.0]])
    reading = ExitReading(1, logits, several=True)
    chances = torch.sigmoid(logits)
    least = torch.maximum(chances, 1 - chances).amin(dim=-1)
    torch.testing.assert_close(MaximumProbability.signal(reading), least)
    assert MaximumProbability(0.8).leaves(reading, {})[0].tolist() == [False, True, True]
    bits = -(chances * chances.log2() + (1 - chances) * (1 - chances).log2()).mean(dim=-1)
    torch.testing.assert_close(Entropy.signal(reading), bits, atol=1e-5, rtol=1e-4)
    assert Entropy(0.32).leaves(reading, {})[0].tolist() == [False, True, True]
    extreme = ExitReading(1, torch.tensor([[1e30, -1e30], [0.0, 0.0]]), several=True)
    assert Entropy.signal(extreme).tolist() == pytest.approx([0, 1])
    assert MaximumProbability.signal(extreme).tolist() == pytest.approx([1, 0.5])


def test_patience_counts_equal_sets_of_labels() -> None:
    first = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, -1.0]])
    second = torch.tensor([[2.0, 3.0, -1.0], [1.0, 1.0, -1.0]])
    # The most probable label is the same one throughout.
    assert leaving_exits(Patience(1), [first, second, second], several=True) == [2, 3]
    assert leaving_exits(PatienceConfidence(2, 0.7), [first, second], several=True) == [2, 2]


def test_only_voting_refuses_several_labels() -> None:
    for name, parameters in SETTINGS.items():
        policy = make_policy(name, **parameters)
        if name != "voting":
            policy.check([1, 2, 3], several=True)
            continue
        with pytest.raises(ValueError, match="voting counts votes for one class.*Use one of max_"):
            policy.check([1, 2, 3], several=True)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_signals_of_extreme_logits_are_finite(size: float) -> None:
    reading = ExitReading(1, torch.tensor([[size, -size, 0.0], [-size, -size, -size]]))
    assert Entropy.signal(reading).tolist() == pytest.approx([0, 1])
    assert MaximumProbability.signal(reading).tolist() == pytest.approx([1, 1 / 3])


@pytest.mark.parametrize("everybody", [False, True])
def test_the_ends_of_the_thresholds(everybody: bool) -> None:
    logits = torch.tensor([[50.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    reading = ExitReading(1, logits, certainty=torch.tensor([1.0, 0.1]))
    low, high = (0.0, 1.0) if everybody else (1.0, 0.0)
    for policy in (MaximumProbability(low), Entropy(high), Learned(low)):
        assert policy.leaves(reading, {})[0].tolist() == [everybody, everybody]


def test_patience_counts_agreements_with_the_exit_before() -> None:
    exits = [logits_of(0, 0, 0), logits_of(0, 1, 1), logits_of(0, 1, 0), logits_of(0, 1, 1)]
    assert leaving_exits(Patience(1), exits) == [2, 3, 0]
    assert leaving_exits(Patience(2), exits) == [3, 4, 0]


def test_patience_with_confidence_counts_confident_exits() -> None:
    confident, unsure = 4.0 * torch.eye(3)[:1], 0.1 * torch.eye(3)[:1]
    first, second = torch.cat([confident, confident]), torch.cat([confident, unsure])
    exits = [first, second, first, first]
    assert leaving_exits(PatienceConfidence(2, 0.9), exits) == [2, 4]
    # The answers may differ.
    assert leaving_exits(PatienceConfidence(2, 0.9), [logits_of(0), logits_of(1)]) == [2]
    by_probability = [MaximumProbability(0.9).leaves(ExitReading(1, x), {})[0] for x in exits]
    once = [PatienceConfidence(1, 0.9).leaves(ExitReading(1, x), {})[0] for x in exits]
    assert all(map(torch.equal, by_probability, once))


def test_voting_counts_answers_in_a_row_or_not() -> None:
    exits = [logits_of(0, 0, 2), logits_of(1, 0, 1), logits_of(0, 1, 0), logits_of(0, 1, 2)]
    assert leaving_exits(Voting(2), exits) == [3, 2, 4]
    assert leaving_exits(Voting(3), exits) == [4, 0, 0]


def test_fixed_layer_reads_one_exit() -> None:
    assert leaving_exits(FixedLayer(2), [logits_of(0, 1)] * 3) == [2, 2]
    assert [FixedLayer(2).reads(layer) for layer in (1, 2, 3)] == [False, True, False]


@pytest.mark.parametrize("name", POLICIES)
def test_records_bring_a_policy_back(name: str) -> None:
    policy = make_policy(name, **SETTINGS[name])
    assert policy.parameters == SETTINGS[name]
    assert policy_from_record({"name": name, "parameters": policy.parameters}) == policy
    assert str(policy).startswith(name.split("_")[0])


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("entrophy", {}, "policy='entrophy' is not a policy. Did you mean 'entropy'"),
        ("entropy", {}, "needs a value for threshold"),
        ("patience_confidence", {}, "needs a value for patience and threshold"),
        ("entropy", {"treshold": 0.5}, "no parameter 'treshold'. Did you mean 'threshold'"),
        ("entropy", {"threshold": -0.1}, "entropy: threshold=-0.1 is out of range.*from 0 to 1"),
        ("entropy", {"threshold": float("nan")}, "threshold=nan is out of range"),
        ("learned", {"threshold": "0.5"}, "threshold='0.5' is out of range"),
        ("max_probability", {"threshold": 1.5}, "max_probability: threshold=1.5"),
        ("patience", {"patience": 0}, "patience: patience=0 is out of range.*1 or more"),
        ("patience", {"patience": 1.5}, "patience=1.5"),
        ("voting", {"votes": True}, "votes=True"),
        ("fixed_layer", {"layer": 0}, "layer=0"),
    ],
)
def test_mistakes(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(name, **parameters)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # The three exits are on layers 2, 4 and 6.
        (Patience(3).check, "patience=3 can never be reached with 3 exits: use 2 or less"),
        (PatienceConfidence(4, 0.5).check, "patience=4 can never be reached with 3 exits: use 3"),
        (Voting(4).check, "votes=4 can never be reached"),
        (FixedLayer(3).check, "layer=3 carries no exit; the exits are on layers 2, 4, 6"),
        (lambda _: policy_from_record({"name": "entropy"}), "describes no policy"),
        (lambda _: parse_policy("entropy"), "needs a value for threshold"),
        (lambda _: parse_policy("entropy:0.3"), "'0.3' is not of the form parameter=number"),
        (lambda _: parse_policy("entropy:threshold=high"), "is not of the form"),
        (lambda _: parse_policy("entropy:threshold=0.3, threshold=0.9"), "gives threshold twice"),
    ],
)
def test_what_the_exits_a_file_or_a_command_cannot_carry(
    call: Callable[[list[int]], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call([2, 4, 6])


def test_policies_on_the_command_line() -> None:
    parsed = parse_policy("patience_confidence:patience=2, threshold=0.9")
    assert parsed == PatienceConfidence(2, 0.9)
    assert parse_policy("max_probability:threshold=1") == MaximumProbability(1)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_entropy_lets_nobody_leave_at_0_and_everybody_at_1(classes: int) -> None:
    # Sure answers have the entropy 0, equal probabilities 1 or a little more.
    logits = torch.zeros(3, classes)
    logits[0, 0], logits[1, 0] = 200.0, float("nan")
    reading = ExitReading(1, logits)
    for threshold, leaving in ((0.0, [False, False, False]), (1.0, [True, False, True])):
        found, _ = make_policy("entropy", threshold=threshold).leaves(reading, None)
        assert found.tolist() == leaving
