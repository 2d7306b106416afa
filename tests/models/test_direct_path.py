"""The direct path from FFNN neurons to logits, against plain NumPy and against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from actstore.errors import ModelError
from actstore.models import LanguageModel, load
from actstore.site import Site
from tests.toys import toy_causal_model, toy_model, toy_tokenizer

N_LAYERS, FFN = 3, 48


def plain(model: Any) -> tuple[list[np.ndarray], np.ndarray, bool]:
    """Return each layer's output weights (neurons, channels), gain times head, and centring."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    if "lm_head.weight" in state and "transformer.ln_f.weight" in state:
        down = [state[f"transformer.h.{i}.mlp.c_proj.weight"] for i in range(N_LAYERS)]
        return down, state["transformer.ln_f.weight"] * state["lm_head.weight"], True
    down = [state[f"model.layers.{i}.mlp.down_proj.weight"].T for i in range(N_LAYERS)]
    return down, state["model.norm.weight"] * state["lm_head.weight"], False


def effects(model: LanguageModel, layer: int) -> np.ndarray:
    """Return the direct effect of each neuron of a layer on each token, (neurons, tokens)."""
    return model.direct_path.effects(model.written(Site("mlp_post", layer), np.eye(FFN)))


def toy_gemma(config: type[transformers.PreTrainedConfig]) -> tuple[Any, Any]:
    """Return a small Gemma of random weights, and its tokenizer."""
    tokenizer = toy_tokenizer("llama")
    made = config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=48,
    )
    return transformers.AutoModel.from_config(made).eval(), tokenizer


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("given", ["module", "directory", "shards"])
def test_effects_are_output_weights_times_norm_times_head(
    architecture: str, tied: bool, given: str, tmp_path: Path
) -> None:
    """Every neuron has its own direction and every token its own logit, of a module or of files."""
    module, tokenizer = toy_causal_model(architecture, tied)
    if given != "module":
        module.save_pretrained(tmp_path, max_shard_size="5GB" if given == "directory" else "50KB")
        assert len(list(tmp_path.glob("*.safetensors"))) == 1 or given == "shards"
        tokenizer.save_pretrained(tmp_path)
        model = load(tmp_path, device="cpu")
    else:
        model = load(module, tokenizer, device="cpu")
    down, head, centred = plain(module)
    for layer, weight in enumerate(down):
        written = weight - weight.mean(axis=1, keepdims=True) if centred else weight
        expected = written @ head.T
        np.testing.assert_allclose(
            effects(model, layer), expected, rtol=0, atol=2e-5 * np.abs(expected).max()
        )


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_an_effect_is_what_the_logits_do_when_the_norm_divides_by_what_it_did(
    architecture: str,
) -> None:
    """A little of a last-layer neuron moves transformers' own logits along its direct effect."""
    module, tokenizer = toy_causal_model(architecture, tied=False)
    model = load(module, tokenizer, device="cpu")
    point = model.points[Site("mlp_post", N_LAYERS - 1)]
    projection = model.module.get_submodule(point.module)
    norm = module.transformer.ln_f if architecture == "gpt2" else module.model.norm
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    ids = torch.from_numpy(model.encode("the keys").ids.astype(np.int64))[None]
    neuron = 17

    def logits(step: float) -> torch.Tensor:
        def more(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            changed = args[0].clone()
            changed[..., neuron] += step
            return (changed,)

        handle = projection.register_forward_pre_hook(more)
        with torch.no_grad():
            found = module(input_ids=ids).logits[0, -1]
        handle.remove()
        return found

    module.double()
    slope = ((logits(1e-3) - logits(-1e-3)) / 2e-3).numpy()
    x = seen[0][0, -1].numpy()
    _, head, centred = plain(module)
    x = x - x.mean() if centred else x
    size = np.sqrt((x * x).mean())
    weight = plain(module)[0][-1][neuron]
    weight = weight - weight.mean() if centred else weight
    # The norm's divisor changes too, which the direct path does not have.
    divided = head @ x * (x @ weight) / (len(x) * size**3)
    direct = effects(load(module.float(), tokenizer, device="cpu"), N_LAYERS - 1)[neuron]
    np.testing.assert_allclose(direct / size - divided, slope, atol=1e-3 * np.abs(slope).max())


def test_a_tied_model_without_its_head_has_one_and_an_untied_one_says_how_to_give_it() -> None:
    """The embedding stands for a tied head only; never for one that is not there."""
    tied, tokenizer = toy_model("gpt2")
    path = load(tied, tokenizer, device="cpu").direct_path
    assert path.unembedding.data_ptr() == tied.get_input_embeddings().weight.data_ptr()
    untied, tokenizer = toy_model("llama")
    with pytest.raises(ModelError, match=r"not tied to the embedding.*Give a module.*as model="):
        _ = load(untied, tokenizer, device="cpu").direct_path


def test_what_is_no_direct_path_is_refused() -> None:
    """A model that sees both sides, and one whose blocks norm what the FFNN gives, are refused."""
    bert = load(*toy_model("bert"), device="cpu")
    with pytest.raises(ModelError, match=r"BertModel is not causal.*leave out model="):
        _ = bert.direct_path
    gemma, tokenizer = toy_gemma(transformers.Gemma2Config)
    with pytest.raises(ModelError, match="do not add the output of their FFNN"):
        _ = load(gemma, tokenizer, device="cpu").direct_path
    with pytest.raises(ModelError, match=r"'resid_post.1' .* no output weights"):
        load(*toy_model("gpt2"), device="cpu").written(Site("resid_post", 1), np.eye(32))


def test_a_norm_that_keeps_its_weight_less_one_is_taken_for_what_it_does() -> None:
    """Gemma multiplies by 1 + weight; the gain found is that, since it is measured, not read."""
    gemma, tokenizer = toy_gemma(transformers.GemmaConfig)
    torch.nn.init.normal_(gemma.norm.weight, 0.1, 0.5)
    path = load(gemma, tokenizer, device="cpu").direct_path
    assert not path.centred
    torch.testing.assert_close(path.gain, 1 + gemma.norm.weight.detach(), rtol=1e-4, atol=1e-5)
