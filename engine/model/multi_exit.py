"""A Hugging Face encoder with classifiers ("exits") on its layers, as a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from ..config.sections import check_pooling
from ..data.batching import EncodedSplit
from ..runtime.text import did_you_mean, nearest_directory
from .answers import has_several_labels, training_loss
from .early_exit import EarlyExitOutput, early_exit
from .encoder import (
    check_encoder,
    fitting_token_types,
    load_complete,
    pretrained_encoder,
    random_encoder,
    set_dropout,
    truncate,
)
from .exit_policies import Policy
from .exits import Exit, ExitModel, Exits, LinearExit, MHAExit, check_padding, checked_attentions
from .exits import MultiExitOutput as MultiExitOutput

EXIT_HEADS = ("mha", "linear")


class MultiExitConfig(PretrainedConfig):
    """Configuration of `MultiExitForSequenceClassification`.

    Args:
        backbone_config: the encoder's configuration, or its dictionary (with `model_type`).
        exit_layers: layers (1 = first) that carry an exit, ascending; None: the last layer only.
        exit_head: "mha" or "linear".
        exit_pooling: what a linear head reads: "first" token, or "mean" over the tokens.
        exit_width: width of the mha head's representation.
        exit_attention_heads: attention heads of the mha head.
        exit_dropout: dropout probability of the exits.
        max_seq_length: maximum tokens per text in training; evaluation and serving use it too.
        exit_policy: the calibrated early-exit policy, as written by `calibration_record`.
        learned_exit: whether the model has the layer that the policy "learned" reads.
        data_record: `DataRecord.to_dict()` of the training data; None for a model that an earlier
            version saved, or that was not trained by `fusedacl train`.

    Raises:
        ValueError: an unknown head or pooling, the mean for the mha head, a layer that the backbone
            does not have, or repeated layers.
    """

    model_type = "fusedacl_multi_exit"
    # from_pretrained hands dtype and attn_implementation on to the configurations named here.
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012
    # Outputs that Trainer leaves out of its predictions, so that these are the logits.
    keys_to_ignore_at_inference = ["logits_by_text", "embeddings_by_text"]  # noqa: RUF012

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        exit_layers: Sequence[int] | None = None,
        exit_head: str = "mha",
        exit_pooling: str = "first",
        exit_width: int = 64,
        exit_attention_heads: int = 4,
        exit_dropout: float = 0.1,
        max_seq_length: int | None = None,
        exit_policy: dict[str, Any] | None = None,
        learned_exit: bool = False,
        data_record: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            values = dict(backbone_config)
            backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        # transformers also creates configurations without arguments, to read the defaults.
        self.backbone_config = backbone_config
        self.exit_head = exit_head
        self.exit_pooling = exit_pooling
        self.exit_width = exit_width
        self.exit_attention_heads = exit_attention_heads
        self.exit_dropout = exit_dropout
        self.max_seq_length = max_seq_length
        self.exit_policy = exit_policy
        self.learned_exit = learned_exit
        self.data_record = data_record
        self.exit_layers = list(exit_layers) if exit_layers is not None else None
        if exit_head not in EXIT_HEADS:
            raise ValueError(f"exit_head={exit_head!r}.{did_you_mean(exit_head, EXIT_HEADS)}")
        check_pooling(exit_head, exit_pooling)
        if backbone_config is not None:
            self.exit_layers = self._checked_layers(backbone_config.num_hidden_layers)
            # Unless told otherwise, transformers would reset the encoder's choice.
            if kwargs.get("attn_implementation") is None:
                kwargs["attn_implementation"] = backbone_config._attn_implementation
        super().__init__(**kwargs)

    def _checked_layers(self, num_layers: int) -> list[int]:
        layers = [num_layers] if self.exit_layers is None else self.exit_layers
        if not layers or layers != sorted(set(layers)):
            raise ValueError(f"exit_layers={layers} must be ascending layers without repetition.")
        if layers[0] < 1 or layers[-1] > num_layers:
            raise ValueError(
                f"exit_layers={layers}: the backbone has layers 1 to {num_layers} only."
            )
        return layers

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The encoder's configuration, in which `resize_token_embeddings` sets `vocab_size`."""
        return self if self.backbone_config is None else self.backbone_config

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary, the backbone's nested in it."""
        values = super().to_dict()
        if self.backbone_config is not None:
            values["backbone_config"] = self.backbone_config.to_dict()
        return values


class MultiExitForSequenceClassification(ExitModel):
    """A text encoder of transformers with an exit on each of `config.exit_layers`.

    The exits read the first token ([CLS], <s>) or the mean over the tokens; padding must be on the
    right.
    """

    config_class = MultiExitConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    supports_gradient_checkpointing = True
    # The loss is a mean: with gradient accumulation Trainer has to divide it.
    accepts_loss_kwargs = False

    def __init__(self, config: MultiExitConfig, backbone: PreTrainedModel | None = None) -> None:
        """Put new exits on `backbone`, or on an encoder with random weights where it is None."""
        super().__init__(config)
        if config.backbone_config is None or config.exit_layers is None:
            raise ValueError("backbone_config is missing: MultiExitConfig(backbone_config, …).")
        self.num_labels = cast(int, config.num_labels)
        self.exit_layers = config.exit_layers
        self.backbone = backbone if backbone is not None else random_encoder(config.backbone_config)
        self.exits = Exits(self._new_exit() for _ in config.exit_layers)
        # Fitted by `fit_learned_exit`; created here only so that from_pretrained can load it.
        self.learned_exit = None
        if config.learned_exit:
            width = self.exits.heads[0].classifier.in_features
            self.learned_exit = nn.Linear(width, 1).to(self.backbone.dtype)
        # The encoder's is that of its configuration or of its weights.
        self.exits.to(self.backbone.dtype)
        self.post_init()

    def _new_exit(self) -> Exit:
        config = self.config
        hidden_size = config.backbone_config.hidden_size
        if config.exit_head == "linear":
            pooling = config.exit_pooling
            return LinearExit(hidden_size, self.num_labels, config.exit_dropout, pooling)
        return MHAExit(
            hidden_size,
            self.num_labels,
            config.exit_dropout,
            config.exit_width,
            config.exit_attention_heads,
        )

    def _init_weights(self, module: nn.Module) -> None:
        # Called for the exits only; the backbone initialises itself. Xavier keeps the variance:
        # with the encoders' standard deviation of 0.02, the mha head's representation would shrink
        # to about 0.01.
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str,
        *,
        label_names: Sequence[str],
        dropout: float | None = None,
        num_hidden_layers: int | None = None,
        loading: Mapping[str, Any] | None = None,
        **exit_options: Any,
    ) -> MultiExitForSequenceClassification:
        """Put new exits on a pretrained encoder (hub name, local directory, or a model of ours).

        Args:
            label_names: one name per class; K = len(label_names).
            dropout: dropout probability of the encoder and the exits; None keeps the encoder's
                and 0.1 for the exits.
            num_hidden_layers: keep only the first layers (BERT-6L); None keeps all.
            loading: options of `from_pretrained`, such as revision and attn_implementation.
            exit_options: exit_layers (empty: every layer), exit_head, problem_type, … of
                `MultiExitConfig`.

        Raises:
            ValueError: the encoder cannot be loaded, lacks weights, cannot carry these exits, has
                no dropout to set, or fewer layers.
        """
        if not name_or_path:
            raise ValueError("model_name_or_path is empty: name an encoder, or leave it out.")
        try:
            config = AutoConfig.from_pretrained(name_or_path, **(loading or {}))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model_name_or_path={name_or_path!r} cannot be loaded: it is neither a local "
                "directory with config.json and weights nor a model that the hub could provide."
                f"{nearest_directory(name_or_path)} ({error})"
            ) from None
        except Exception as error:
            # The checks of a configuration's fields raise errors of their own.
            raise ValueError(
                f"model_name_or_path={name_or_path!r} has no config.json that can be used: {error}"
            ) from None
        is_ours = isinstance(config, MultiExitConfig)
        if num_hidden_layers is not None and is_ours:
            raise ValueError(
                f"num_hidden_layers={num_hidden_layers}: model_name_or_path is a model with exits "
                "already. Truncate the encoder that it was made from."
            )
        if num_hidden_layers is not None:
            truncate(config, num_hidden_layers)
        if dropout is not None:
            set_dropout(config.backbone_config if is_ours else config, dropout)
            exit_options.setdefault("exit_dropout", dropout)
        try:
            if is_ours:
                unread = ("exits.", "learned_exit.")
                ours = load_complete(cls, name_or_path, unread, config=config, **(loading or {}))
                backbone = cast(ExitModel, ours).backbone
            else:
                backbone = pretrained_encoder(name_or_path, config, **(loading or {}))
        except Exception as error:
            # safetensors, the hub client and transformers each raise errors of their own here.
            raise ValueError(
                f"model_name_or_path={name_or_path!r}: the weights cannot be loaded: {error}"
            ) from None
        if exit_options.get("exit_layers") == []:
            exit_options["exit_layers"] = list(range(1, backbone.config.num_hidden_layers + 1))
        layers = exit_options.get("exit_layers")
        early = layers is not None and layers != [backbone.config.num_hidden_layers]
        check_encoder(backbone, early_exits=early)
        made = MultiExitConfig(
            backbone.config,
            id2label=dict(enumerate(label_names)),
            label2id={name: index for index, name in enumerate(label_names)},
            **exit_options,
        )
        try:
            MultiExitConfig.from_dict(made.to_dict())
        except Exception as error:
            # Better known now than when the trained model is loaded.
            raise ValueError(
                f"A {backbone.config.model_type} model cannot be trained here: its configuration "
                f"could not be read again once saved ({error}). Correct its config.json."
            ) from None
        return cls(made, backbone)

    @property
    def label_embeddings(self) -> Tensor:
        """The classifiers' weights [E, K, d] (a view, not a copy, where there is one exit)."""
        return self.label_embeddings_of(range(len(self.exit_layers)))

    def label_embeddings_of(self, positions: Sequence[int]) -> Tensor:
        """The classifiers' weights [E, K, d] of the exits at these positions of `exit_layers`."""
        heads = self.exits.heads
        weights = [heads[position].classifier.weight for position in positions]
        return weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(weights)

    def forward(
        self,
        input_ids: Tensor,  # [N, T]
        attention_mask: Tensor | None = None,  # [N, T], 1 for tokens, 0 for padding
        token_type_ids: Tensor | None = None,  # [N, T]
        labels: Tensor | None = None,  # [N], or [N, K] zeros and ones
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **backbone_options: Any,
    ) -> MultiExitOutput | tuple[Any, ...]:
        """Logits and representations of every exit; one pass through the backbone.

        None for an `output_…` option or `return_dict`: as in the configuration.

        Raises:
            ValueError: padding on the left; labels of another form than `config.problem_type`
                says; attentions that the encoder does not give.
        """
        check_padding(attention_mask)
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_attentions:
            backbone_options["output_attentions"] = True
        encoded = self._encode(
            input_ids,
            attention_mask,
            token_type_ids,
            output_hidden_states or self._reads_below_the_last(self.exit_layers),
            backbone_options,
        )
        states = self._states_of(encoded, self.exit_layers)
        output = self.classify(states, attention_mask, labels)
        if output_hidden_states:
            output["hidden_states"] = encoded.hidden_states
        if output_attentions:
            output["attentions"] = checked_attentions(encoded, self.backbone.config)
        if return_dict is None:
            return_dict = config.return_dict
        return output if return_dict else output.to_tuple()

    def early_exit(
        self,
        inputs: Mapping[str, Tensor] | EncodedSplit,
        policy: Policy | str | None = None,
        **options: Any,
    ) -> EarlyExitOutput:
        """Answer with early exit: each text leaves at the first exit that the policy accepts.

            model.early_exit(tokenizer(texts, padding=True, return_tensors="pt")).predictions

        `policy`: a name, with its parameters (`threshold=0.3`) among the options; a `Policy`; or
        None, for the one that `fusedacl exits` stored. The options are those of the function
        `fusedacl.engine.early_exit`.

        Raises:
            ValueError: the model has one exit or stores no policy; a mistake in the policy.
        """
        return early_exit(self, inputs, policy, **options)

    def exit_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        positions: Sequence[int] | None = None,
        **backbone_options: Any,
    ) -> list[Tensor]:
        """Hidden states [N, T, H] of the exits' layers; one pass through the backbone.

        positions: indices into `exit_layers`; None: all exits.
        """
        layers = self.exit_layers
        if positions is not None:
            layers = [self.exit_layers[position] for position in positions]
        encoded = self._encode(
            input_ids,
            attention_mask,
            token_type_ids,
            self._reads_below_the_last(layers),
            backbone_options,
        )
        return self._states_of(encoded, layers)

    def _reads_below_the_last(self, layers: Sequence[int]) -> bool:
        # All layers' states are kept only if an exit below the last layer reads them.
        return list(layers) != [self.config.backbone_config.num_hidden_layers]

    def _encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        output_hidden_states: bool,
        options: Mapping[str, Any],
    ) -> Any:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        token_type_ids = fitting_token_types(self.backbone, token_type_ids)
        if token_type_ids is not None:
            options = {**options, "token_type_ids": token_type_ids}
        return self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            **{**options, "return_dict": True},
        )

    def _states_of(self, encoded: Any, layers: Sequence[int]) -> list[Tensor]:
        num_layers = self.config.backbone_config.num_hidden_layers
        # The last exit reads the output of the final norm, where the encoder has one.
        return [
            encoded.last_hidden_state if layer == num_layers else encoded.hidden_states[layer]
            for layer in layers
        ]

    def classify(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        positions: Sequence[int] | None = None,
    ) -> MultiExitOutput:
        """Run the exits at `positions` on their hidden states, as `exit_states` returns them."""
        if attention_mask is None:
            attention_mask = hidden_states[0].new_ones(hidden_states[0].shape[:2])
        positions = range(len(self.exit_layers)) if positions is None else positions
        exits = self.exits(hidden_states, attention_mask, positions)
        exit_logits = torch.stack([output.logits for output in exits])
        loss = None
        if labels is not None:
            loss = training_loss(exit_logits, labels, has_several_labels(self.config))
        return MultiExitOutput(
            loss=loss,
            logits=exit_logits[-1],
            exit_logits=exit_logits,
            exit_embeddings=torch.stack([output.embeddings for output in exits]),
        )


def parse_layers(text: str | None) -> list[int]:
    """Parse `exit_layers`: 'all' or None give the empty list, '2,4,6' the three layers.

    Raises:
        ValueError: it is neither.
    """
    if text is None or text.strip().lower() == "all":
        return []
    parts = text.strip("[] ").split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"exit_layers={text!r} is neither 'all' nor a list such as 2,4,6.")
    return [int(part) for part in parts]


def label_names(config: PretrainedConfig) -> list[str]:
    """Names of the classes, in the order of the logits."""
    names = cast(dict[int, str], config.id2label)
    return [names[index] for index in sorted(names)]


AutoConfig.register(MultiExitConfig.model_type, MultiExitConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    MultiExitConfig, MultiExitForSequenceClassification, exist_ok=True
)
