"""A Hugging Face encoder with classifiers ("exits") on its layers, as a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from ..data.batching import EncodedSplit
from ..runtime.text import did_you_mean, nearest_directory
from .early_exit import EarlyExitOutput, early_exit
from .encoder import (
    check_encoder,
    fitting_token_types,
    load_complete,
    pretrained_encoder,
    random_encoder,
    set_dropout,
)
from .exit_policies import Policy
from .exits import Exit, ExitModel, LinearExit, MHAExit, check_padding

EXIT_HEADS = ("mha", "linear")


class MultiExitConfig(PretrainedConfig):
    """Configuration of `MultiExitForSequenceClassification`.

    Args:
        backbone_config: the encoder's configuration, or its dictionary (with `model_type`).
        exit_layers: layers (1 = first) that carry an exit, ascending; None: the last layer only.
        exit_head: "mha" or "linear".
        exit_width: width of the mha head's representation.
        exit_attention_heads: attention heads of the mha head.
        exit_dropout: dropout probability of the exits.
        max_seq_length: maximum tokens per text in training; evaluation and serving use it too.
        exit_policy: the calibrated early-exit policy, as written by `calibration_record`.
        learned_exit: whether the model has the layer that the policy "learned" reads.

    Raises:
        ValueError: an unknown head, a layer that the backbone does not have, or repeated layers.
    """

    model_type = "fusedacl_multi_exit"

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        exit_layers: Sequence[int] | None = None,
        exit_head: str = "mha",
        exit_width: int = 64,
        exit_attention_heads: int = 4,
        exit_dropout: float = 0.1,
        max_seq_length: int | None = None,
        exit_policy: dict[str, Any] | None = None,
        learned_exit: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            values = dict(backbone_config)
            backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        # transformers also creates configurations without arguments, to read the defaults.
        self.backbone_config = backbone_config
        self.exit_head = exit_head
        self.exit_width = exit_width
        self.exit_attention_heads = exit_attention_heads
        self.exit_dropout = exit_dropout
        self.max_seq_length = max_seq_length
        self.exit_policy = exit_policy
        self.learned_exit = learned_exit
        self.exit_layers = list(exit_layers) if exit_layers is not None else None
        if exit_head not in EXIT_HEADS:
            raise ValueError(f"exit_head={exit_head!r}.{did_you_mean(exit_head, EXIT_HEADS)}")
        if backbone_config is not None:
            self.exit_layers = self._checked_layers(backbone_config.num_hidden_layers)
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

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary, the backbone's nested in it."""
        values = super().to_dict()
        if self.backbone_config is not None:
            values["backbone_config"] = self.backbone_config.to_dict()
        return values


@dataclass
class MultiExitOutput(ModelOutput):
    """Outputs of E exits for N samples and K labels.

    loss: sum of the exits' mean cross-entropies, None without labels.
    logits [N, K]: those of the last exit.  exit_logits [E, N, K].
    exit_embeddings [E, N, d]: the representations that the classifiers read.
    """

    loss: Tensor | None = None
    # Always set; ModelOutput requires a default for every field but the first.
    logits: Tensor = None  # type: ignore[assignment]
    exit_logits: Tensor = None  # type: ignore[assignment]
    exit_embeddings: Tensor = None  # type: ignore[assignment]


class MultiExitForSequenceClassification(ExitModel):
    """A text encoder of transformers with an exit on each of `config.exit_layers`.

    The exits read the first token ([CLS], <s>), so padding must be on the right.
    """

    config_class = MultiExitConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MultiExitConfig, backbone: PreTrainedModel | None = None) -> None:
        """Put new exits on `backbone`, or on an encoder with random weights where it is None."""
        super().__init__(config)
        if config.backbone_config is None or config.exit_layers is None:
            raise ValueError("backbone_config is missing: MultiExitConfig(backbone_config, …).")
        self.num_labels = cast(int, config.num_labels)
        self.exit_layers = config.exit_layers
        self.backbone = backbone if backbone is not None else random_encoder(config.backbone_config)
        self.exits = nn.ModuleList(self._new_exit() for _ in config.exit_layers)
        # Fitted by `fit_learned_exit`; created here only so that from_pretrained can load it.
        self.learned_exit = None
        if config.learned_exit:
            width = cast(Exit, self.exits[0]).classifier.in_features
            self.learned_exit = nn.Linear(width, 1)
        self.post_init()

    def _new_exit(self) -> Exit:
        config = self.config
        hidden_size = config.backbone_config.hidden_size
        if config.exit_head == "linear":
            return LinearExit(hidden_size, self.num_labels, config.exit_dropout)
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
        **exit_options: Any,
    ) -> MultiExitForSequenceClassification:
        """Put new exits on a pretrained encoder (hub name, local directory, or a model of ours).

        Args:
            label_names: one name per class; K = len(label_names).
            dropout: dropout probability of the encoder and the exits; None keeps the encoder's
                and 0.1 for the exits.
            num_hidden_layers: keep only the first layers (BERT-6L); None keeps all.
            exit_options: exit_layers (empty: every layer), exit_head, … of `MultiExitConfig`.

        Raises:
            ValueError: the encoder cannot be loaded, lacks weights, cannot carry these exits, has
                no dropout to set, or fewer layers.
        """
        if not name_or_path:
            raise ValueError("model_name_or_path is empty: name an encoder, or leave it out.")
        try:
            config = AutoConfig.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model_name_or_path={name_or_path!r} cannot be loaded: it is neither a local "
                "directory with config.json and weights nor a model that the hub gave."
                f"{nearest_directory(name_or_path)} ({error})"
            ) from None
        is_ours = isinstance(config, MultiExitConfig)
        if num_hidden_layers is not None:
            _truncate(config, num_hidden_layers)
        if dropout is not None:
            set_dropout(config.backbone_config if is_ours else config, dropout)
            exit_options.setdefault("exit_dropout", dropout)
        try:
            if is_ours:
                unread = ("exits.", "learned_exit.")
                ours = load_complete(cls, name_or_path, unread, config=config)
                backbone = cast(ExitModel, ours).backbone
            else:
                backbone = pretrained_encoder(name_or_path, config)
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
        return cls(made, backbone)

    @property
    def label_embeddings(self) -> Tensor:
        """The classifiers' weights [E, K, d] (a view, not a copy, where there is one exit)."""
        return self.label_embeddings_of(range(len(self.exits)))

    def label_embeddings_of(self, positions: Sequence[int]) -> Tensor:
        """The classifiers' weights [E, K, d] of the exits at these positions of `exit_layers`."""
        weights = [cast(Exit, self.exits[position]).classifier.weight for position in positions]
        return weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(weights)

    def forward(
        self,
        input_ids: Tensor,  # [N, T]
        attention_mask: Tensor | None = None,  # [N, T], 1 for tokens, 0 for padding
        token_type_ids: Tensor | None = None,  # [N, T]
        labels: Tensor | None = None,  # [N]
        **backbone_options: Any,
    ) -> MultiExitOutput:
        """Logits and representations of every exit; one pass through the backbone.

        Raises:
            ValueError: padding on the left.
        """
        check_padding(attention_mask)
        states = self.exit_states(input_ids, attention_mask, token_type_ids, **backbone_options)
        return self.classify(states, attention_mask, labels)

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
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        token_type_ids = fitting_token_types(self.backbone, token_type_ids)
        if token_type_ids is not None:
            backbone_options["token_type_ids"] = token_type_ids
        num_layers = self.config.backbone_config.num_hidden_layers
        states = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            # All layers' states are kept only if an exit below the last layer reads them.
            output_hidden_states=layers != [num_layers],
            **{**backbone_options, "return_dict": True},
        )
        # The last exit reads the output of the final norm, where the encoder has one.
        return [
            states.last_hidden_state if layer == num_layers else states.hidden_states[layer]
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
        positions = range(len(self.exits)) if positions is None else positions
        exits = [
            self.exits[position](hidden, attention_mask)
            for position, hidden in zip(positions, hidden_states, strict=True)
        ]
        exit_logits = torch.stack([output.logits for output in exits])
        loss = None
        if labels is not None:
            repeated = labels.repeat(len(exits))
            loss = len(exits) * functional.cross_entropy(exit_logits.flatten(0, 1), repeated)
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


def _truncate(config: PretrainedConfig, num_hidden_layers: int) -> None:
    if isinstance(config, MultiExitConfig):
        raise ValueError(
            f"num_hidden_layers={num_hidden_layers}: model_name_or_path is a model with exits "
            "already. Truncate the encoder that it was made from."
        )
    if num_hidden_layers > config.num_hidden_layers:
        raise ValueError(
            f"num_hidden_layers={num_hidden_layers}: the encoder has {config.num_hidden_layers} "
            "layers only."
        )
    config.num_hidden_layers = num_hidden_layers


AutoConfig.register(MultiExitConfig.model_type, MultiExitConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    MultiExitConfig, MultiExitForSequenceClassification, exist_ok=True
)
