"""Properties of an encoder, found by running it on a few tokens, and what they rule out."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..runtime.device import evaluating

logger = logging.getLogger("fusedacl")

_LENGTH = 7
_TOKENS_OF_SHORT = 5


@dataclass(frozen=True)
class Behaviour:
    """Properties of an encoder.

    problem: why exits cannot read its states, or None. depends_on_batch: whether the states of a
    text depend on its padding, or on the other texts. has_layer_states: whether there is one state
    per layer, each as long as the text.
    """

    problem: str | None
    depends_on_batch: bool = False
    has_layer_states: bool = True


def probe_batch(encoder: PreTrainedModel) -> dict[str, Tensor]:
    """A text and its beginning, padded, on the encoder's device: input_ids [2, 7] and mask."""
    config = encoder.config
    pad = getattr(config, "pad_token_id", None) or 0
    tokens = [token for token in range(min(config.vocab_size, 3 * _LENGTH)) if token != pad]
    ids = torch.tensor(tokens[-_LENGTH:]).repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[1, _TOKENS_OF_SHORT:] = pad
    mask[1, _TOKENS_OF_SHORT:] = 0
    return {"input_ids": ids.to(encoder.device), "attention_mask": mask.to(encoder.device)}


def check_encoder(encoder: PreTrainedModel, *, early_exits: bool) -> None:
    """Refuse an encoder whose states the exits cannot read; log what is unusual about it.

    early_exits: whether there are exits below the last layer.

    Raises:
        ValueError: it is no encoder of texts; its first token does not see the others; it does not
            heed the attention mask; its answers are drawn at random; it has no states of its layers
            and `early_exits` are asked for.
    """
    model_type = encoder.config.model_type
    found = examine(encoder)
    if found.problem:
        raise ValueError(
            f"A {model_type} model cannot be trained here: {found.problem} Choose an encoder that "
            "docs/encoders.md lists."
        )
    if early_exits and not found.has_layer_states:
        raise ValueError(
            f"A {model_type} model has no states of each layer that are as long as the text: only "
            "its last layer can carry an exit. Use strategy=single."
        )
    if found.depends_on_batch:
        logger.warning(
            "The states of a %s encoder depend on the padding or on the other texts of a batch: so "
            "do the answers, slightly.",
            model_type,
        )


def examine(encoder: PreTrainedModel) -> Behaviour:
    """Run the encoder on texts of a few tokens; its weights and random numbers stay."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(encoder):
        return _examine(encoder)


def _examine(encoder: PreTrainedModel) -> Behaviour:
    config = encoder.config
    inputs: str = getattr(encoder, "main_input_name", "input_ids")
    if inputs != "input_ids" or not hasattr(config, "vocab_size"):
        return Behaviour(f"it reads {inputs}, not the token ids of a text.")
    if getattr(config, "is_decoder", False):
        return Behaviour("it is a decoder (is_decoder=True).")
    if getattr(config, "is_encoder_decoder", False) and hasattr(encoder, "decoder"):
        return Behaviour("it is an encoder-decoder whose encoder cannot be taken alone.")
    batch = probe_batch(encoder)
    # The same places in two passes are compared: there, equal operands give equal bits.
    changed = {name: value.clone() for name, value in batch.items()}
    changed["input_ids"][0, 1] = batch["input_ids"][0, 2]
    changed["attention_mask"].fill_(1)
    short = {name: value[1:, :_TOKENS_OF_SHORT] for name, value in batch.items()}
    try:
        output = encoder(**batch, output_hidden_states=True, return_dict=True)
        states: Tensor = output.last_hidden_state
        again, other, alone = (
            encoder(**inputs, return_dict=True).last_hidden_state
            for inputs in (batch, changed, short)
        )
    except Exception as error:
        # Each architecture fails in its own way on inputs that it does not take.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Behaviour(f"token ids and an attention mask alone do not run it ({reason}).")
    shape = (*batch["input_ids"].shape, config.hidden_size)
    if states.shape != shape:
        return Behaviour(f"its states are {list(states.shape)} for texts of {list(shape[:2])}.")
    if not torch.isfinite(states).all():
        return Behaviour("its states are not finite: its weights are damaged.")
    if not torch.equal(states, again):
        return Behaviour("its states are drawn at random, also in evaluation.")
    if torch.equal(states[0, 0], other[0, 0]):
        return Behaviour(
            "its first token, which the exits read, does not see the tokens after it, as in "
            "a causal decoder."
        )
    if torch.equal(states[1, :_TOKENS_OF_SHORT], other[1, :_TOKENS_OF_SHORT]):
        return Behaviour("it does not heed the attention mask, and would read padding as text.")
    layers = output.hidden_states
    difference = (states[1, :_TOKENS_OF_SHORT] - alone[0]).abs().max()
    return Behaviour(
        None,
        depends_on_batch=bool(difference > 1e-4 * alone.abs().max()),
        has_layer_states=layers is not None
        and len(layers) == config.num_hidden_layers + 1
        and all(state.shape == shape for state in layers[1:]),
    )
