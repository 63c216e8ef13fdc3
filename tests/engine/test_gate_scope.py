"""Which parameters the gate's angle is measured over."""

from __future__ import annotations

import pytest
from fusedacl.engine import MultiExitForSequenceClassification
from fusedacl.engine.gate_scope import parse_scope, scope_parameters


def names(model: MultiExitForSequenceClassification, scope: str) -> set[str]:
    chosen = {id(parameter) for parameter in scope_parameters(model, scope)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def test_scopes(exit_model: MultiExitForSequenceClassification) -> None:
    everything = {name for name, _ in exit_model.named_parameters()}
    head = {name for name in everything if name.startswith("exits.")}
    top = {name for name in everything if ".layer.2." in name or ".layer.3." in name}
    assert len(top) == 2 * 16
    assert names(exit_model, "all") == everything
    assert names(exit_model, "head") == head
    assert names(exit_model, "top:2") == head | top
    exit_model.exits[0].requires_grad_(False)
    assert names(exit_model, "head") == {n for n in head if not n.startswith("exits.0.")}


def test_refused(exit_model: MultiExitForSequenceClassification) -> None:
    for scope in ("", "top", "top:0", "top:-1", "top:x", "heads"):
        with pytest.raises(ValueError, match=f"gate_scope='{scope}' is not one of all, head"):
            parse_scope(scope)
    with pytest.raises(ValueError, match="gate_scope=top:5: the encoder has 4 layers"):
        scope_parameters(exit_model, "top:5")
    exit_model.exits.requires_grad_(False)
    with pytest.raises(ValueError, match="gate_scope=head: none of these parameters is trained"):
        scope_parameters(exit_model, "head")
