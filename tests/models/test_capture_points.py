from __future__ import annotations

from typing import Any

import pytest
import transformers
from torch import nn

from actstore.errors import ArgumentError, ModelError
from actstore.models import find_capture_points, load
from actstore.site import HOOKS, Site
from tests.toys import toy_model

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 84,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = BASE | {"num_key_value_heads": 2}

FAMILIES = {
    "bert": (transformers.BertConfig(**BASE), "encoder.layer.{}.output.dense"),
    "roberta": (transformers.RobertaConfig(**BASE), "encoder.layer.{}.output.dense"),
    "electra": (transformers.ElectraConfig(**BASE), "encoder.layer.{}.output.dense"),
    "deberta": (transformers.DebertaV2Config(**BASE), "encoder.layer.{}.output.dense"),
    "mpnet": (transformers.MPNetConfig(**BASE), "encoder.layer.{}.output.dense"),
    "modernbert": (transformers.ModernBertConfig(**BASE), "layers.{}.mlp.Wo"),
    "distilbert": (
        transformers.DistilBertConfig(vocab_size=320, dim=32, n_layers=3, n_heads=4, hidden_dim=84),
        "transformer.layer.{}.ffn.lin2",
    ),
    "gpt2": (
        transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4, n_inner=84),
        "h.{}.mlp.c_proj",
    ),
    "gpt_neo": (
        transformers.GPTNeoConfig(
            vocab_size=320,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=84,
            attention_types=[[["global", "local"], 1]],
        ),
        "h.{}.mlp.c_proj",
    ),
    "gpt_neox": (transformers.GPTNeoXConfig(**BASE), "layers.{}.mlp.dense_4h_to_h"),
    "opt": (
        transformers.OPTConfig(
            vocab_size=320,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=3,
            ffn_dim=84,
            num_attention_heads=4,
        ),
        "decoder.layers.{}.fc2",
    ),
    "llama": (transformers.LlamaConfig(**GQA), "layers.{}.mlp.down_proj"),
    "qwen2": (transformers.Qwen2Config(**GQA), "layers.{}.mlp.down_proj"),
    "mistral": (transformers.MistralConfig(**GQA), "layers.{}.mlp.down_proj"),
    "gemma": (transformers.GemmaConfig(**GQA, head_dim=8), "layers.{}.mlp.down_proj"),
    "gemma3": (transformers.Gemma3TextConfig(**GQA, head_dim=8), "layers.{}.mlp.down_proj"),
    "phi3": (transformers.Phi3Config(**GQA), "layers.{}.mlp.down_proj"),
}


def random_model(config: Any) -> Any:
    """Return the base model of a config."""
    return transformers.AutoModel.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_projection_is_found_in_every_layer_and_fires(family: str) -> None:
    """Known families give all hook points by structure, and a forward proves them."""
    config, path = FAMILIES[family]
    module = random_model(config)
    points = find_capture_points(module)
    n_layers = config.num_hidden_layers
    assert list(points) == sorted(Site(hook, i) for hook in HOOKS for i in range(n_layers))
    for layer in range(n_layers):
        point = points[Site("mlp_post", layer)]
        assert (point.module, point.side, point.width) == (path.format(layer), "input", 84)
        before, after = points[Site("resid_pre", layer)], points[Site("resid_post", layer)]
        assert (before.side, after.side) == ("input", "output")
        assert before.module == after.module
        assert before.width == after.width == 32
    assert load(module, toy_model("llama")[1]).points == points


def test_a_head_does_not_hide_the_blocks() -> None:
    """A model with a head has the same points under the names it uses."""
    module = transformers.GPT2LMHeadModel(FAMILIES["gpt2"][0])
    assert find_capture_points(module)[Site("mlp_post", 2)].module == "transformer.h.2.mlp.c_proj"


def test_layers_sort_as_integers_beyond_ten() -> None:
    """Layer 11 follows layer 10, not layer 1."""
    module, _ = toy_model("gpt2", n_layers=12)
    points = find_capture_points(module, ["mlp_post"])
    assert [site.layer for site in points] == list(range(12))
    assert points[Site("mlp_post", 11)].module == "h.11.mlp.c_proj"


def test_four_times_the_hidden_size_where_the_config_is_silent() -> None:
    """GPT-2 without n_inner has FFNNs of four times its hidden size."""
    module = random_model(transformers.GPT2Config(vocab_size=99, n_embd=12, n_layer=1, n_head=3))
    assert find_capture_points(module)[Site("mlp_post", 0)].width == 48


@pytest.mark.parametrize(
    "config",
    [
        transformers.MixtralConfig(**GQA, num_local_experts=4),
        transformers.Qwen2MoeConfig(
            **GQA, num_experts=4, moe_intermediate_size=20, shared_expert_intermediate_size=84
        ),
    ],
    ids=["mixtral", "qwen2_moe"],
)
def test_experts_are_refused_but_the_residual_stream_is_not(config: Any) -> None:
    """A block of experts has no mlp_post; the error names what was found and what is left."""
    module = random_model(config)
    with pytest.raises(ModelError) as raised:
        find_capture_points(module)
    message = str(raised.value)
    assert "in layers.0 expected the last two-dimensional weight to project 84 neurons" in message
    assert "found a weight of more than two dimensions, mlp.experts.gate_up_proj" in message
    assert message.endswith("What can be captured: resid_pre.0–2, resid_post.0–2.")
    model = load(module, toy_model("llama")[1])
    assert {site.hook for site in model.sites} == {"resid_pre", "resid_post"}
    with pytest.raises(ModelError, match="mlp_post cannot be captured in"):
        model.select("resid_post, mlp_post.1")
    assert model.select("resid_post.1-2") == [Site("resid_post", 1), Site("resid_post", 2)]


def test_a_list_of_experts_is_refused() -> None:
    """Several projections of the right widths in one block are experts, not one FFNN."""
    module = random_model(FAMILIES["llama"][0])
    block = module.layers[1]
    block.expert = nn.ModuleList([nn.Linear(84, 32, bias=False) for _ in range(2)])
    with pytest.raises(ModelError, match=r"layers\.1 .*found 3 such projections .*list of experts"):
        find_capture_points(module)


def test_another_width_than_the_config_promises_is_refused() -> None:
    """The first projection, or any other, is never taken for the last."""
    module = random_model(transformers.BertConfig(**BASE))
    module.config.intermediate_size = 85
    with pytest.raises(ModelError) as raised:
        find_capture_points(module)
    assert "to project 85 neurons (the config's intermediate size) to 32 channels" in str(
        raised.value
    )
    assert "found output.dense, a Linear from 84 to 32" in str(raised.value)


def test_shared_layers_are_refused() -> None:
    """ALBERT's layers are one module; no layer of it has a site of its own."""
    module = random_model(transformers.AlbertConfig(**BASE, embedding_size=16))
    with pytest.raises(ModelError) as raised:
        find_capture_points(module)
    message = str(raised.value)
    assert "expected one list of 3 modules of one class (config.num_hidden_layers = 3)" in message
    assert "encoder.albert_layer_groups (1 x AlbertLayerGroup)" in message
    assert "as in ALBERT, have no site of their own" in message


def test_parallel_lists_are_refused() -> None:
    """XLM keeps sublayers in parallel lists; none of them is the list of blocks."""
    config = transformers.XLMConfig(vocab_size=99, emb_dim=32, n_layers=3, n_heads=4)
    with pytest.raises(ModelError, match="several lists fit: attentions, layer_norm1, ffns"):
        find_capture_points(random_model(config))


def test_two_stacks_are_refused_and_the_encoder_alone_is_not() -> None:
    """T5 and BART are refused with the remedy, which works."""
    t5 = transformers.T5Config(
        vocab_size=320, d_model=32, d_kv=8, d_ff=84, num_layers=3, num_heads=4
    )
    bart = transformers.BartConfig(
        vocab_size=320,
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_ffn_dim=84,
        decoder_ffn_dim=52,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    tokenizer = toy_model("llama")[1]
    for config, last in (
        (t5, "block.2.layer.1.DenseReluDense.wo"),
        (bart, "layers.2.fc2"),
    ):
        module = random_model(config)
        with pytest.raises(ModelError, match=r"an encoder and a decoder.*model\.get_encoder\(\)"):
            load(module, tokenizer)
        model = load(module.get_encoder(), tokenizer)
        assert model.points[Site("mlp_post", 2)].module == last


def test_another_layout_is_refused_by_the_proof() -> None:
    """XLNet puts positions before windows; two tokens run at load show it."""
    config = transformers.XLNetConfig(vocab_size=320, d_model=32, n_layer=3, n_head=4, d_inner=84)
    with pytest.raises(ModelError, match=r"gave \(2, 1, 32\) .*= \(1, 2, 32\).*cannot be captured"):
        load(random_model(config), toy_model("llama")[1])


def test_a_model_without_layers_in_its_config_is_refused() -> None:
    """A bare module has nothing to go by."""
    with pytest.raises(ModelError, match="no config with num_hidden_layers"):
        find_capture_points(nn.Linear(2, 3))


def test_an_unknown_hook_point_is_refused() -> None:
    """A misspelt hook point is named with the nearest one."""
    with pytest.raises(ArgumentError, match="Did you mean 'mlp_post'"):
        find_capture_points(toy_model("bert")[0], ["mlp_pots"])
