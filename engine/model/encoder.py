"""Encoders of transformers: their weights, dropout and token types, and what makes one usable."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..runtime.device import evaluating

logger = logging.getLogger("fusedacl")

# Names of dropout probabilities in the configurations of transformers.
_DROPOUT_NAMES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "dropout_rate",
    "attention_dropout",
    "activation_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "hidden_dropout",
    "embd_pdrop",
)
# Put before the names of weights by DistributedDataParallel, torch.compile, sentence-transformers,
# PEFT and Lightning, also several at once.
_WRAPPERS = ("module.", "_orig_mod.", "0.auto_model.", "auto_model.", "base_model.model.", "model.")
_WRAPPED = rf"^(?:{'|'.join(map(re.escape, _WRAPPERS))})+"
# Parts that a file may lack: no exit reads them.
_UNREAD = ("pooler.", "decoder.")
# Tokens of the two texts on which an encoder is tried.
_LENGTH = 7
_TOKENS_OF_SHORT = 5


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Set every dropout probability in an encoder's configuration.

    Raises:
        ValueError: the configuration has no dropout setting of a known name.
    """
    names = [
        name for name in _DROPOUT_NAMES if isinstance(getattr(config, name, None), float | int)
    ]
    if not names:
        raise ValueError(
            f"dropout={probability}: a {config.model_type} encoder has no dropout setting that is "
            "known here; leave dropout out."
        )
    for name in names:
        setattr(config, name, probability)


def truncate(config: PretrainedConfig, num_hidden_layers: int) -> None:
    """Keep only the first layers in an encoder's configuration.

    Raises:
        ValueError: it has fewer, or its number of layers cannot be set.
    """
    number = config.num_hidden_layers
    if num_hidden_layers > number:
        raise ValueError(
            f"num_hidden_layers={num_hidden_layers}: the encoder has {number} layers only."
        )
    try:
        config.num_hidden_layers = num_hidden_layers
    except NotImplementedError as error:
        raise ValueError(
            f"num_hidden_layers={num_hidden_layers}: the layers of a {config.model_type} encoder "
            f"cannot be counted by one number ({error}) Leave it out, and save a shorter encoder."
        ) from None
    # Such as layer_types of ModernBERT and attention_window of Longformer: an entry per layer.
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == number:
            setattr(config, name, value[:num_hidden_layers])


def random_encoder(config: PretrainedConfig) -> PreTrainedModel:
    """Make an encoder with random weights."""
    return _encoder_half(AutoModel.from_config(config, **_encoder_options(config)))


def pretrained_encoder(
    name_or_path: str, config: PretrainedConfig, **loading: Any
) -> PreTrainedModel:
    """Load an encoder's weights in float32, from the hub or a local directory.

    loading: options of `from_pretrained`.

    Raises:
        ValueError: weights of the encoder are missing.
    """
    options = _encoder_options(config) | loading
    return _encoder_half(load_complete(AutoModel, name_or_path, _UNREAD, config=config, **options))


def load_complete(
    model_class: Any, name_or_path: str, unread: tuple[str, ...], **options: Any
) -> PreTrainedModel:
    """Load a model in float32; its weights may be named under the prefix of a known wrapper.

    model_class: a class with `from_pretrained`; `options` are its. unread: first words of the names
    of weights that may be missing.

    Raises:
        ValueError: other weights are missing, which transformers would draw at random.
    """

    def load(**names: Any) -> tuple[PreTrainedModel, list[str], list[str]]:
        # transformers would report the weights of the pooler and the pretraining head as unused.
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            with warnings.catch_warnings():
                model, report = model_class.from_pretrained(
                    name_or_path, dtype=torch.float32, output_loading_info=True, **options, **names
                )
        finally:
            transformers_logging.set_verbosity(level)
        missing = [name for name in sorted(report["missing_keys"]) if not name.startswith(unread)]
        return model, missing, sorted(report["unexpected_keys"])

    model, missing, unused = load()
    prefixes = {found[0] for name in unused if (found := re.match(_WRAPPED, name))}
    if missing and prefixes:
        model, missing, left = load(key_mapping={_WRAPPED: ""})
        if not missing:
            words = " and ".join(repr(prefix) for prefix in sorted(prefixes))
            logger.info("%s: its weights are named with the prefix %s.", name_or_path, words)
        unused = left or unused
    if missing:
        raise ValueError(
            f"{len(missing)} of the model's {len(model.state_dict())} weights are not in the file: "
            f"{_first(missing)}. {_names_in_file(unused)}"
        )
    return model


def checkpoint_layers(
    encoder: PreTrainedModel, again: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> None:
    """Keep only the states between layers in training; backward passes recompute the rest.

    again: makes the context of the recomputation, which must be that of the forward pass.

    Non-reentrant checkpoints: the reentrant ones of PyTorch refuse the second backward pass of the
    gate.

    Raises:
        ValueError: transformers has no checkpoints for this encoder.
    """
    if not encoder.supports_gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing: transformers has none for {encoder.config.model_type} "
            "encoders. Leave it out; contrastive_batch_size and smaller batches save memory too."
        )
    current: Any = encoder  # transformers 4 has the second name only
    name = "activation_checkpointing_enable"
    getattr(current, name if hasattr(encoder, name) else "gradient_checkpointing_enable")(
        {"use_reentrant": False, "context_fn": lambda: (nullcontext(), again())}
    )
    if getattr(current, "_require_grads_hooks", None):
        # Made for reentrant checkpoints: they would build a graph through frozen layers.
        encoder.disable_input_require_grads()


def fitting_token_types(encoder: PreTrainedModel, token_type_ids: Tensor | None) -> Tensor | None:
    """Return the token types that the encoder takes; None where it takes none or has one type."""
    if token_type_ids is None or _num_token_types(encoder) > 1:
        return token_type_ids
    _note_left_out(encoder.config.model_type)
    return None


def _num_token_types(encoder: PreTrainedModel) -> int:
    """Number of token types that an encoder tells apart."""
    encoder_class: Any = type(encoder)
    if not _takes_token_types(encoder_class):
        return 0
    config = encoder.config
    # XLNet compares types with each other. XLM and GPT look types up in the word embeddings, so
    # types numbered by another family's tokenizer would select arbitrary words.
    unlimited = 2 if config.model_type == "xlnet" else 0
    return getattr(config, "type_vocab_size", None) or unlimited


@functools.cache
def _takes_token_types(encoder_class: type[PreTrainedModel]) -> bool:
    return "token_type_ids" in inspect.signature(encoder_class.forward).parameters


@functools.cache
def _note_left_out(model_type: str) -> None:
    logger.info("The tokenizer's token types are left out: a %s encoder takes none.", model_type)


def _encoder_options(config: PretrainedConfig) -> dict[str, Any]:
    """Options that leave out the pooler: it would be saved with the model and never trained."""
    if getattr(config, "attention_type", None) == "block_sparse":
        # BigBird changes to full attention for good at the first batch of short texts.
        config.attention_type = "original_full"
        logger.info("%s: attention is full, not block_sparse.", config.model_type)
    encoder_class: Any = AutoModel._model_mapping.get(type(config), None)
    if encoder_class is None:
        raise ValueError(f"a {config.model_type} model is no encoder that AutoModel makes.")
    if isinstance(encoder_class, tuple):  # Funnel: with and without its decoder
        encoder_class = encoder_class[0]
    has_pooler = "add_pooling_layer" in inspect.signature(encoder_class).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def _encoder_half(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder of an encoder-decoder; another model as it is."""
    encoder = getattr(model, "encoder", None)
    if isinstance(encoder, PreTrainedModel) and hasattr(model, "decoder"):
        return encoder
    return model


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")


def _names_in_file(unused: list[str]) -> str:
    if any("lora_" in name for name in unused):
        return "The file holds an adapter: merge it into its encoder first (merge_and_unload)."
    if not unused:
        return "Copy the file again, or correct config.json."
    return (
        f"The file has names that the encoder does not have: {_first(unused)}. Save the encoder "
        "alone with its save_pretrained."
    )


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
            "its first token, which exits read by default, does not see the tokens after it, as in "
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
