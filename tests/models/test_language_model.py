from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers

from actstore.errors import ArgumentError, ModelError, SiteNotFound
from actstore.models import LanguageModel, load
from actstore.site import Site
from tests.toys import ARCHITECTURES, TEXT, toy_model


def batch(model: LanguageModel, lengths: Sequence[int]) -> torch.Tensor:
    """Return rows of different text, right padded."""
    ids = torch.from_numpy(model.encode(TEXT).ids).long()
    rows = torch.full((len(lengths), max(lengths)), model.pad_id)
    for row, n in enumerate(lengths):
        rows[row, :n] = ids[3 * row : 3 * row + n]
    return rows


def capture(
    model: LanguageModel, input_ids: torch.Tensor, lengths: Sequence[int], sites: Any = None
) -> dict[Site, torch.Tensor]:
    """Return copies of the activations, in the order they came."""
    values: dict[Site, torch.Tensor] = {}

    def sink(site: Site, tensor: torch.Tensor) -> None:
        assert not tensor.requires_grad
        values[site] = tensor.clone()

    model.forward(input_ids, lengths, sites or model.sites, sink)
    return values


def golden(model: LanguageModel, input_ids: torch.Tensor, **options: Any) -> Any:
    """Return transformers' own output with its hidden states."""
    with torch.no_grad():
        return model.module(input_ids=input_ids, output_hidden_states=True, **options)


def assert_equals_hidden_states(model: LanguageModel) -> None:
    """Compare both ends of every block to transformers' own record, bit for bit."""
    input_ids = batch(model, [7, 7])
    values = capture(model, input_ids, [7, 7])
    states = golden(model, input_ids).hidden_states
    n_layers = len(states) - 1
    for layer in range(n_layers):
        assert torch.equal(values[Site("resid_pre", layer)], states[layer])
    for layer in range(n_layers - 1):
        assert torch.equal(values[Site("resid_post", layer)], states[layer + 1])


@pytest.mark.parametrize("toy", ARCHITECTURES, indirect=True)
def test_the_residual_stream_equals_hidden_states(toy: LanguageModel) -> None:
    """resid_pre.i is transformers' hidden_states[i], bit for bit."""
    assert_equals_hidden_states(toy)


def test_the_residual_stream_of_a_real_model_equals_hidden_states(minilm: LanguageModel) -> None:
    """The same holds for MiniLM; BERT's last hidden state is its last resid_post."""
    assert_equals_hidden_states(minilm)
    input_ids = batch(minilm, [7, 7])
    last = capture(minilm, input_ids, [7, 7])[Site("resid_post", 5)]
    assert torch.equal(last, golden(minilm, input_ids).hidden_states[-1])


@pytest.mark.parametrize(("toy", "norm"), [("gpt2", "ln_f"), ("llama", "norm")], indirect=["toy"])
def test_the_last_resid_post_is_not_normed(toy: LanguageModel, norm: str) -> None:
    """The last resid_post is what goes into the final norm, not what transformers returns."""
    input_ids = batch(toy, [7, 7])
    inputs = []
    handle = toy.module.get_submodule(norm).register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    states = golden(toy, input_ids).hidden_states
    handle.remove()
    last = capture(toy, input_ids, [7, 7])[Site("resid_post", 2)]
    assert torch.equal(last, inputs[0])
    assert not torch.allclose(last, states[-1])


def assert_neurons_equal_a_hook(model: LanguageModel, path: str) -> None:
    """Compare mlp_post of every layer to the input of the module of that name."""
    input_ids = batch(model, [5, 5])
    layers = [site.layer for site in model.select("mlp_post")]
    values = capture(model, input_ids, [5, 5])
    for layer in layers:
        seen: list[torch.Tensor] = []
        projection = model.module.get_submodule(path.format(layer))
        handle = projection.register_forward_pre_hook(lambda m, args, seen=seen: seen.extend(args))
        golden(model, input_ids)
        handle.remove()
        assert torch.equal(values[Site("mlp_post", layer)], seen[0])


@pytest.mark.parametrize(
    ("toy", "path"),
    [
        ("bert", "encoder.layer.{}.output.dense"),
        ("gpt2", "h.{}.mlp.c_proj"),
        ("llama", "layers.{}.mlp.down_proj"),
    ],
    indirect=["toy"],
)
def test_neurons_are_the_input_of_the_last_projection(toy: LanguageModel, path: str) -> None:
    """mlp_post equals what an independent hook sees."""
    assert_neurons_equal_a_hook(toy, path)


def test_neurons_of_a_real_model(minilm: LanguageModel) -> None:
    """The same holds for MiniLM, whose neurons never fall below the minimum of GELU."""
    assert_neurons_equal_a_hook(minilm, "encoder.layer.{}.output.dense")
    values = capture(minilm, batch(minilm, [9]), [9], minilm.select("mlp_post"))
    assert {value.shape for value in values.values()} == {(1, 9, 1536)}
    assert all(value.min() > -0.171 for value in values.values())


def test_gated_neurons_are_behind_the_product() -> None:
    """In a gated FFNN a neuron is act(gate(x)) * up(x)."""
    model = load(*toy_model("llama"))
    mlp = model.module.layers[1].mlp
    inputs = []
    handle = mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    values = capture(model, batch(model, [6]), [6])
    handle.remove()
    with torch.no_grad():
        expected = mlp.act_fn(mlp.gate_proj(inputs[0])) * mlp.up_proj(inputs[0])
    assert torch.equal(values[Site("mlp_post", 1)], expected)


def test_layer_eleven_of_twelve_is_layer_eleven() -> None:
    """The values of every layer are that layer's own."""
    model = load(*toy_model("gpt2", n_layers=12))
    assert_neurons_equal_a_hook(model, "h.{}.mlp.c_proj")
    assert_equals_hidden_states(model)


def test_opt_gives_windows_and_positions() -> None:
    """OPT flattens rows inside its FFNN; the sink sees windows and positions all the same."""
    config = transformers.OPTConfig(
        vocab_size=320,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        ffn_dim=84,
        num_attention_heads=4,
        pad_token_id=1,
    )
    model = load(transformers.AutoModel.from_config(config), toy_model("gpt2")[1])
    values = capture(model, batch(model, [7, 4]), [7, 4])
    assert values[Site("mlp_post", 1)].shape == (2, 7, 84)
    alone = capture(model, batch(model, [7, 4])[1:, :4], [4])
    torch.testing.assert_close(
        values[Site("mlp_post", 1)][1, :4], alone[Site("mlp_post", 1)][0], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("toy", ARCHITECTURES, indirect=True)
def test_sites_come_in_the_order_of_the_forward(toy: LanguageModel) -> None:
    """Exactly the wanted sites arrive, in the order they are computed, however they are named."""
    wanted = [Site("resid_post", 1), Site("mlp_post", 1), Site("mlp_post", 0), Site("resid_pre", 2)]
    values = capture(toy, batch(toy, [4]), [4], wanted)
    assert [str(site) for site in values] == [
        "mlp_post.0",
        "mlp_post.1",
        "resid_post.1",
        "resid_pre.2",
    ]


@pytest.mark.parametrize("toy", ARCHITECTURES, indirect=True)
def test_blocks_above_the_highest_site_do_not_run(toy: LanguageModel) -> None:
    """A forward ends behind the last wanted site, and gives the same bits as a whole one."""
    input_ids = batch(toy, [7, 5])
    whole = capture(toy, input_ids, [7, 5])
    block = toy.module.get_submodule(toy.points[Site("resid_post", 2)].module)
    ran = []
    handle = block.register_forward_pre_hook(lambda module, args: ran.append(True))
    for site in (Site("resid_pre", 1), Site("mlp_post", 1), Site("resid_post", 1)):
        part = capture(toy, input_ids, [7, 5], [site])
        assert list(part) == [site]
        assert torch.equal(part[site], whole[site])
    handle.remove()
    assert not ran


@pytest.mark.parametrize("toy", ARCHITECTURES, indirect=True)
def test_padding_changes_real_positions_only_by_rounding(toy: LanguageModel) -> None:
    """A window in a padded batch has the activations it has alone."""
    lengths = [9, 4, 6]
    input_ids = batch(toy, lengths)
    together = capture(toy, input_ids, lengths)
    for row, n in enumerate(lengths):
        alone = capture(toy, input_ids[row : row + 1, :n], [n])
        for site, value in alone.items():
            torch.testing.assert_close(together[site][row, :n], value[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("toy", ARCHITECTURES, indirect=True)
def test_a_mask_of_ones_is_no_mask(toy: LanguageModel) -> None:
    """Equal lengths run without a mask, which is the same bits as a mask of ones."""
    input_ids = batch(toy, [8, 8])
    masks = []
    handle = toy.module.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    values = capture(toy, input_ids, [8, 8])
    capture(toy, batch(toy, [8, 3]), [8, 3])
    handle.remove()
    assert masks[0] is None
    assert masks[1].tolist() == [[1] * 8, [1] * 3 + [0] * 5]
    states = golden(toy, input_ids, attention_mask=torch.ones_like(input_ids)).hidden_states
    for layer in range(3):
        assert torch.equal(values[Site("resid_pre", layer)], states[layer])


def count_hooks(model: LanguageModel) -> int:
    """Return the number of forward hooks on all modules."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in model.module.modules()
    )


def test_hooks_are_gone_after_a_forward_and_after_an_error() -> None:
    """Nothing stays on the module, whether the sink returns or raises."""
    model = load(*toy_model("bert"))
    before = count_hooks(model)
    capture(model, batch(model, [3]), [3])
    assert count_hooks(model) == before

    def broken(site: Site, tensor: torch.Tensor) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        model.forward(batch(model, [3]), [3], model.sites, broken)
    assert count_hooks(model) == before


def test_two_models_over_one_module_do_not_see_each_other() -> None:
    """A forward inside another's sink, or in another thread, delivers to its own sink only."""
    module, tokenizer = toy_model("gpt2")
    first, second = load(module, tokenizer), load(module, tokenizer)
    expected = capture(second, batch(second, [5]), [5])
    inner: list[dict[Site, torch.Tensor]] = []
    outer: list[tuple[Site, int]] = []

    def sink(site: Site, tensor: torch.Tensor) -> None:
        outer.append((site, tensor.shape[1]))
        if site == Site("mlp_post", 1):
            thread = threading.Thread(
                target=lambda: inner.append(capture(second, batch(second, [5]), [5]))
            )
            thread.start()
            thread.join()

    first.forward(batch(first, [8]), [8], first.sites, sink)
    assert [n for _, n in outer] == [8] * len(first.sites)
    assert inner[0].keys() == expected.keys()
    assert all(torch.equal(inner[0][site], expected[site]) for site in expected)


def test_forwards_are_counted() -> None:
    """One batch is one forward, whatever the number of sites; the proof at load is not counted."""
    model = load(*toy_model("llama"))
    assert model.n_forwards == 0
    capture(model, batch(model, [3, 2]), [3, 2])
    assert model.n_forwards == 1


def test_a_module_run_in_pieces_is_refused() -> None:
    """A site must be passed once per forward; the error names the setting that breaks it."""
    module, tokenizer = toy_model("bert")
    for block in module.encoder.layer:
        block.chunk_size_feed_forward = 1
    with pytest.raises(ModelError, match=r"gave \(1, 1, 64\).*|passed twice"):
        load(module, tokenizer)


def test_a_block_run_twice_is_refused() -> None:
    """A module shared between layers would give two values for one site."""
    module, tokenizer = toy_model("gpt2")
    module.h[2] = module.h[1]
    with pytest.raises(ModelError, match=r"mlp_post\.1|resid_pre\.1.*passed twice|gave"):
        load(module, tokenizer)


def test_a_block_that_is_not_run_is_refused() -> None:
    """A site that is never passed is an error, not an absence."""
    model = load(*toy_model("bert"))
    block = model.module.encoder.layer[1]
    block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(ModelError, match=r"^mlp_post\.1 of toy-bert was not passed in a forward"):
        capture(model, batch(model, [3]), [3])


@pytest.mark.parametrize(
    ("input_ids", "lengths", "message"),
    [
        (torch.ones(3, dtype=torch.int64), [3], r"shape \(3,\); expected int64"),
        (torch.ones(1, 3, dtype=torch.int32), [3], "input_ids is torch.int32"),
        (
            torch.ones(2, 3, dtype=torch.int64),
            [3],
            "expected one number of 1 … 3 for each of",
        ),
        (torch.ones(1, 3, dtype=torch.int64), [4], r"lengths = \[4\]"),
        (torch.ones(1, 3, dtype=torch.int64), [0], r"lengths = \[0\]"),
        (torch.full((1, 3), 320), [3], "token id 320; toy-gpt2 has ids 0 … 319"),
        (torch.full((1, 3), -1), [3], "token id -1"),
        (torch.ones(1, 513, dtype=torch.int64), [513], "513 positions; toy-gpt2 takes 512"),
    ],
)
@pytest.mark.parametrize("toy", ["gpt2"], indirect=True)
def test_batches_that_do_not_fit_are_refused(
    toy: LanguageModel, input_ids: torch.Tensor, lengths: list[int], message: str
) -> None:
    """Shapes, lengths, ids and context are checked before the model runs."""
    with pytest.raises(ArgumentError, match=message):
        capture(toy, input_ids, lengths)


@pytest.mark.parametrize("toy", ["gpt2"], indirect=True)
def test_sites_that_the_model_lacks_are_refused(toy: LanguageModel) -> None:
    """An unknown site is named with what there is; no site at all is an error too."""
    with pytest.raises(SiteNotFound, match=r"'mlp_post\.3' is not in toy-gpt2; it has resid_pre\."):
        capture(toy, batch(toy, [3]), [3], [Site("mlp_post", 3)])
    with pytest.raises(ArgumentError, match="sites is empty"):
        toy.forward(batch(toy, [3]), [3], [], lambda site, tensor: None)
    with pytest.raises(SiteNotFound, match="Did you mean 'mlp_post'"):
        toy.select("mlp_pots")
    assert toy.select() == toy.sites
    assert toy.select("blocks.2.mlp.hook_post") == [Site("mlp_post", 2)]


def test_sixteen_bit_models_give_their_own_type() -> None:
    """Activations have the dtype of the model."""
    model = load(*toy_model("llama", dtype=torch.bfloat16))
    assert model.dtype == "bfloat16"
    assert {v.dtype for v in capture(model, batch(model, [4]), [4]).values()} == {torch.bfloat16}


def test_roberta_has_fewer_positions_than_rows_of_its_table() -> None:
    """RoBERTa counts positions from behind the padding index: 514 rows serve 512 positions."""
    config = transformers.RobertaConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=84,
        max_position_embeddings=514,
        pad_token_id=1,
    )
    model = load(transformers.AutoModel.from_config(config), toy_model("llama")[1])
    assert model.context_limit == 512
    ids = torch.full((1, 512), 7)
    assert capture(model, ids, [512])[Site("mlp_post", 0)].shape == (1, 512, 84)


def test_the_tokenizer_can_narrow_the_context() -> None:
    """The smaller of what model and tokenizer take is the limit."""
    module, tokenizer = toy_model("bert")
    tokenizer.model_max_length = 128
    assert load(module, tokenizer).context_limit == 128
    tokenizer.model_max_length = int(1e30)
    assert load(module, tokenizer).context_limit == 512


def test_weights_fingerprint() -> None:
    """It is of the weights that sites depend on: one bit changes it, the pooler does not."""
    module, tokenizer = toy_model("bert")
    first = load(module, tokenizer).weights_fingerprint
    assert first == load(*toy_model("bert")).weights_fingerprint
    assert first != load(*toy_model("bert", seed=1)).weights_fingerprint
    assert first != load(*toy_model("bert", dtype=torch.bfloat16)).weights_fingerprint
    module.pooler.dense.weight.data.zero_()
    assert first == load(module, tokenizer).weights_fingerprint
    module.encoder.layer[2].output.dense.bias.data[5] += 1e-6
    assert first != load(module, tokenizer).weights_fingerprint


@pytest.mark.slow
def test_smollm2_from_gguf(smollm2_path: Any) -> None:
    """A GGUF file loads as float32 and is captured as any other model."""
    model = load(smollm2_path, device="cpu")
    assert (model.architecture, model.dtype, len(model.sites)) == ("LlamaModel", "float32", 90)
    assert_equals_hidden_states(model)
