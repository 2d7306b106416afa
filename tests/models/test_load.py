from __future__ import annotations

import importlib
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from actstore.errors import ArgumentError, ModelError
from actstore.models import LanguageModel, load
from actstore.site import Site
from tests.toys import toy_config, toy_model, toy_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the directory of a saved toy model with its tokenizer."""
    module, tokenizer = toy_model("bert")
    module.save_pretrained(tmp_path / "toy")
    tokenizer.save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


def test_a_directory_is_the_module_that_was_saved(saved: Path) -> None:
    """Saving and loading changes neither weights nor tokenizer."""
    model, original = load(str(saved), device="cpu"), load(*toy_model("bert"))
    assert model.weights_fingerprint == original.weights_fingerprint
    assert model.tokenizer_fingerprint == original.tokenizer_fingerprint
    assert model.n_parameters == original.n_parameters
    assert (model.dtype, model.architecture) == ("float32", "BertModel")
    # The name is recorded in stores, which travel: no more of the path than tells what it is.
    assert model.name == f"{saved.parent.name}/toy"
    assert not model.module.training


def test_loading_is_silent_and_leaves_the_settings_alone(
    saved: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """No bar and no warning; verbosity and bars are as before."""
    settings = transformers.logging
    before = (settings.get_verbosity(), settings.is_progress_bar_enabled())
    load(saved, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert (settings.get_verbosity(), settings.is_progress_bar_enabled()) == before
    assert logging.getLogger().level == logging.WARNING


def test_the_real_model(minilm: LanguageModel) -> None:
    """MiniLM is six blocks of 1,536 neurons."""
    assert (minilm.architecture, minilm.dtype) == ("BertModel", "float32")
    assert minilm.n_parameters == 22_713_216
    assert minilm.context_limit == 512
    assert minilm.points[Site("mlp_post", 5)].width == 1536
    assert (minilm.prefix_ids, minilm.suffix_ids, minilm.pad_id) == ([101], [102], 0)
    assert minilm.special_ids == {0, 101, 102, 103}


@pytest.mark.parametrize(
    ("saved_as", "asked", "expected"),
    [
        (torch.float32, None, "float32"),
        (torch.bfloat16, None, "bfloat16"),
        (torch.float16, None, "float16"),
        (torch.float32, "bfloat16", "bfloat16"),
        (torch.float16, torch.float32, "float32"),
    ],
)
def test_the_checkpoint_decides_the_dtype_unless_told(
    tmp_path: Path, saved_as: torch.dtype, asked: Any, expected: str
) -> None:
    """16-bit weights stay 16-bit, float32 stays float32."""
    module, tokenizer = toy_model("llama", n_layers=1, dtype=saved_as)
    module.config.dtype = saved_as
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path, dtype=asked, device="cpu").dtype == expected


def test_a_head_is_left_aside(tmp_path: Path) -> None:
    """A causal model and its saved form give the base model, with the same weights."""
    tokenizer = toy_tokenizer("gpt2")
    config = toy_config("gpt2", 2, 32, 64, len(tokenizer), tokenizer)
    module = transformers.GPT2LMHeadModel(config)
    module.train()
    model = load(module, tokenizer)
    assert model.architecture == "GPT2Model"
    assert not model.module.training
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").weights_fingerprint == model.weights_fingerprint


def test_the_text_stack_of_a_model_that_sees() -> None:
    """Of a vision-language model the text stack is captured."""
    tokenizer = toy_tokenizer("llama")
    config = transformers.Gemma3Config(
        text_config={
            "vocab_size": 320,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 84,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 84,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=5,
        mm_tokens_per_image=1,
    )
    model = load(transformers.Gemma3ForConditionalGeneration(config), tokenizer)
    assert model.architecture == "Gemma3TextModel"
    assert model.points[Site("mlp_post", 1)].module == "layers.1.mlp.down_proj"


def test_another_tokenizer_can_be_named(saved: Path, tmp_path: Path) -> None:
    """A tokenizer may come from another directory, and is asked for where there is none."""
    shutil.copytree(saved, tmp_path / "tokenizer")
    for file in saved.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has 0 tokens besides special ones.*give tokenizer="):
        load(saved, device="cpu")
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded from .*Give tokenizer="):
        load(saved, tmp_path / "nowhere", device="cpu")
    assert load(saved, tmp_path / "tokenizer", device="cpu").prefix_ids == [2]
    assert load(saved, toy_tokenizer("bert"), device="cpu").prefix_ids == [2]


@pytest.mark.parametrize(
    "name", ["./nothing", "/nothing/here", "~/nothing-here", "a/b/c", "x.gguf"]
)
def test_a_path_that_does_not_exist_is_said_to_be_one(name: str) -> None:
    """What looks like a path is not looked up on the hub."""
    with pytest.raises(ModelError, match=f"model '{name}' does not exist; expected a directory"):
        load(name)


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model"])
def test_a_hub_name_that_cannot_be_fetched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub, one sentence says so and what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as raised:
        load(name)
    message = str(raised.value)
    assert message.startswith(f"model '{name}' is neither a directory here nor could it be fetched")
    assert message.endswith("download the model and give its local directory.")
    assert "\n" not in message


def test_directories_and_files_that_hold_no_model(tmp_path: Path) -> None:
    """An empty directory, two GGUF files and a file of another kind are told apart."""
    with pytest.raises(ModelError, match=r"a directory with neither; expected config\.json"):
        load(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelError, match=r"2 \.gguf files \(a\.gguf, b\.gguf\)"):
        load(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"is a file; .* Give the directory"):
        load(tmp_path / "model.safetensors")


def test_a_config_of_no_known_model(tmp_path: Path) -> None:
    """A config.json that transformers does not know is not taken for a missing hub name."""
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ModelError, match=r"the config of model .* cannot be read"):
        load(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    """Custom code is refused, naming the argument that allows it."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Own"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load(tmp_path)


def test_pickled_weights_are_not_opened(saved: Path) -> None:
    """A directory with pytorch_model.bin alone is refused with the remedy."""
    module, _ = toy_model("bert")
    torch.save(module.state_dict(), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"Expected model\.safetensors.*save_pretrained"):
        load(saved, device="cpu")


def test_damaged_weights(saved: Path) -> None:
    """A cut file is an error of actstore's, not of a library below."""
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"the weights of model .* cannot be read"):
        load(saved, device="cpu")


def test_missing_weights_are_not_replaced_by_random_ones(saved: Path) -> None:
    """A config with more layers than the file has weights is refused."""
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text(
        config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with pytest.raises(ModelError, match=r"lack 16 of the tensors of BertModel.*layer\.3"):
        load(saved, device="cpu")


def test_a_missing_pooler_is_of_no_consequence(tmp_path: Path) -> None:
    """Checkpoints of masked language models have no pooler; two loads are the same model."""
    module, tokenizer = toy_model("bert")
    transformers.BertModel(module.config, add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    first, second = load(tmp_path, device="cpu"), load(tmp_path, device="cpu")
    assert first.weights_fingerprint == second.weights_fingerprint


def test_two_stacks_are_refused_before_their_weights_are_read(tmp_path: Path) -> None:
    """An encoder-decoder model is refused by its config."""
    transformers.T5Config(num_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has an encoder and a decoder"):
        load(tmp_path)


def test_missing_packages_for_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file without the packages that read it says which to install."""
    (tmp_path / "model.gguf").touch()
    module = importlib.import_module("actstore.models.load")
    monkeypatch.setattr(module, "find_spec", lambda package: package == "gguf" or None)
    with pytest.raises(ModelError, match=r"reading it needs accelerate, .*install accelerate"):
        load(tmp_path)


def test_arguments() -> None:
    """A dtype, device, tokenizer or module that cannot be used is refused."""
    module, tokenizer = toy_model("bert")
    with pytest.raises(ArgumentError, match=r"dtype = 'float61'.*Did you mean 'float64'"):
        load(module, tokenizer, dtype="float61")
    with pytest.raises(ArgumentError, match="device = 'gpu' is not here"):
        load(module, tokenizer, device="gpu")
    with pytest.raises(ArgumentError, match="tokenizer is None; expected the tokenizer of"):
        load(module)
    with pytest.raises(ModelError, match="model is a Linear; expected a transformers model"):
        load(torch.nn.Linear(2, 3), tokenizer)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    """A tokenizer with more tokens than the model has rows cannot be the model's."""
    module, _ = toy_model("bert")
    with pytest.raises(ModelError, match=r"320 tokens, its model 152.*tokenizer="):
        load(module, toy_tokenizer("gpt2"))


def test_a_module_keeps_its_place_and_type_unless_told() -> None:
    """Dtype casts, device moves; by default neither happens."""
    module, tokenizer = toy_model("gpt2", dtype=torch.float16)
    assert load(module, tokenizer).dtype == "float16"
    assert load(module, tokenizer, dtype="float32", device="cpu").dtype == "float32"


def test_toys_are_the_same_every_time() -> None:
    """Toy models and tokenizers depend on their arguments alone, and do not touch the generator."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load(*toy_model("llama"))
    assert torch.equal(torch.rand(3), expected)
    second = load(*toy_model("llama"))
    assert first.weights_fingerprint == second.weights_fingerprint
    assert first.tokenizer_fingerprint == second.tokenizer_fingerprint
