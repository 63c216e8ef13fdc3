"""Running an encoder layer by layer equals running it whole, for every supported family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusedacl.engine.model.encoder_layers import FAMILIES, EncoderLayers, Flops
from fusedacl.engine.model.generic_layers import GenericLayers, encoder_layers
from tiny_runs import BERT_SIZES
from torch import Tensor
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedModel

SIZES: dict[str, Any] = {**BERT_SIZES, "pad_token_id": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
    "electra": {"embedding_size": 24},
    # A window that is shorter than the texts, and both kinds of layers.
    "modernbert": {
        "local_attention": 4,
        "global_attn_every_n_layers": 2,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
}
LENGTHS = (11, 7, 3)
IMPLEMENTATIONS = {
    "deberta-v2": ("eager",),
    "electra": ("eager",),
    "mpnet": ("eager",),
    "splinter": ("eager",),
}


def tiny_encoder(model_type: str, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    options = {**SIZES, **OPTIONS.get(model_type, {})}
    if model_type == "distilbert":
        options = {k: v for k, v in options.items() if k in ("vocab_size", "pad_token_id")}
        options.update(OPTIONS["distilbert"], max_position_embeddings=40)
    config = AutoConfig.for_model(model_type, **options)
    return AutoModel.from_config(config, attn_implementation=implementation).eval()


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    width = max(lengths)
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    tokens = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(1))
    return tokens.where(mask.bool(), 1), mask


def states(layers: EncoderLayers, tokens: Tensor, mask: Tensor) -> list[Tensor]:
    hidden = layers.embed(tokens, mask)
    context = layers.context(hidden, mask, padded=not mask.all())
    found = [hidden]
    for layer in range(1, layers.num_layers + 1):
        found.append(layers.run(layer, found[-1], context))
    return found


CASES = [
    (model_type, implementation)
    for model_type in FAMILIES
    for implementation in IMPLEMENTATIONS.get(model_type, ("eager", "sdpa"))
]


@torch.inference_mode()
@pytest.mark.parametrize(("model_type", "implementation"), CASES)
@pytest.mark.parametrize("lengths", [LENGTHS, (9, 9)], ids=["padded", "full"])
def test_states_are_the_encoders_own(
    model_type: str, implementation: str, lengths: tuple[int, ...]
) -> None:
    encoder = tiny_encoder(model_type, implementation)
    layers = encoder_layers(encoder)
    assert layers.num_layers == 3
    tokens, mask = batch(lengths)
    expected = encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    found = states(layers, tokens, mask)
    # The last state is read after the final norm, the others before it.
    for own, whole in zip(
        found, [*expected.hidden_states[:3], expected.last_hidden_state], strict=True
    ):
        torch.testing.assert_close(own[mask.bool()], whole[mask.bool()], rtol=0, atol=2e-6)


@torch.inference_mode()
@pytest.mark.parametrize(("model_type", "implementation"), CASES)
def test_rows_and_padding_may_be_dropped_on_the_way(model_type: str, implementation: str) -> None:
    layers = encoder_layers(tiny_encoder(model_type, implementation))
    tokens, mask = batch()
    whole = states(layers, tokens, mask)
    hidden, kept_mask = whole[1][1:, : LENGTHS[1]], mask[1:, : LENGTHS[1]]
    context = layers.context(hidden, kept_mask, padded=True)
    for layer in (2, 3):
        hidden = layers.run(layer, hidden, context)
    real = kept_mask.bool()
    expected = whole[3][1:, : LENGTHS[1]]
    torch.testing.assert_close(hidden[real], expected[real], rtol=0, atol=2e-6)


@torch.inference_mode()
def test_token_types_and_position_ids_reach_the_embeddings() -> None:
    tokens, mask = batch()
    roberta = tiny_encoder("roberta", "sdpa")
    expected = roberta(tokens, mask, output_hidden_states=True).hidden_states[0]
    assert torch.equal(encoder_layers(roberta).embed(tokens, mask), expected)
    bert = tiny_encoder("bert", "sdpa")
    types = torch.arange(11).expand(3, -1) % 2
    expected = bert(tokens, mask, token_type_ids=types, output_hidden_states=True).hidden_states[0]
    assert torch.equal(encoder_layers(bert).embed(tokens, mask, types), expected)


def test_flops_by_hand() -> None:
    layers = encoder_layers(tiny_encoder("bert", "sdpa"))
    hidden, inner = 32, 48
    expected = [
        length * (8 * hidden**2 + 4 * hidden * inner) + 4 * length**2 * hidden for length in LENGTHS
    ]
    assert layers.flops(1).at(torch.tensor(LENGTHS)).tolist() == expected
    assert layers.embedding_flops() == Flops()
    electra = encoder_layers(tiny_encoder("electra", "eager"))
    assert (electra.embedding_flops() + Flops(per_text=1)) == Flops(1, 2 * 24 * 32, 0)


def test_a_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="is a decoder"):
        encoder_layers(BertModel(BertConfig(**SIZES, is_decoder=True)))


def test_another_implementation_of_attention_takes_the_general_path() -> None:
    bert = BertModel(BertConfig(**SIZES))
    assert not isinstance(encoder_layers(bert), GenericLayers)
    mpnet = tiny_encoder("mpnet", "eager")
    assert not isinstance(encoder_layers(mpnet), GenericLayers)
    mpnet.config._attn_implementation = "sdpa"
    assert isinstance(encoder_layers(mpnet), GenericLayers)
