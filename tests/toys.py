"""Small random models with real tokenizers, made from nothing but their configs."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (
    "The keys to the cabinet are on the table. It was the best of times, it was the worst of "
    "times, it was the age of wisdom, it was the age of foolishness. My fellow citizens, the "
    "state of the union is strong: in 1947 the war was over, and the people went back to work. "
    "All happy families are alike; every unhappy family is unhappy in its own way. "
)
"""Text the tokenizers know; other text becomes more and shorter tokens."""

ARCHITECTURES = ("bert", "gpt2", "llama")


def toy_model(
    architecture: str = "gpt2",
    n_layers: int = 3,
    hidden: int = 32,
    ffn: int = 64,
    vocab: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """Return a random model without head, and its tokenizer; the same for the same arguments.

    ``"bert"`` has WordPiece with ``[CLS]`` and ``[SEP]``, ``"gpt2"`` byte-level BPE without special
    tokens around a text, ``"llama"`` byte-level BPE with ``<s>`` before it.  `vocab` gives the rows
    of the embedding, by default the tokenizer's size.  Weights are ten times wider than usual, so
    that layers differ visibly.
    """
    tokenizer = toy_tokenizer(architecture)
    config = toy_config(architecture, n_layers, hidden, ffn, vocab or len(tokenizer), tokenizer)
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(config)
    model.config._name_or_path = f"toy-{architecture}"
    return model.to(dtype).eval(), tokenizer


def toy_causal_model(
    architecture: str = "gpt2",
    tied: bool = True,
    n_layers: int = 3,
    hidden: int = 32,
    ffn: int = 48,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """Return a random ``"gpt2"`` or ``"llama"`` with its head, and its tokenizer.

    Its final norm multiplies every channel by another number, as a trained one does.
    """
    tokenizer = toy_tokenizer(architecture)
    config = toy_config(architecture, n_layers, hidden, ffn, len(tokenizer), tokenizer)
    config.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        norm = model.transformer.ln_f if architecture == "gpt2" else model.model.norm
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter, 0.7, 0.4)
    return model, tokenizer


def toy_config(
    architecture: str, n_layers: int, hidden: int, ffn: int, vocab: int, tokenizer: Any
) -> transformers.PretrainedConfig:
    """Return the config of a toy model."""
    common = {
        "vocab_size": vocab,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if architecture == "gpt2":
        return transformers.GPT2Config(
            n_embd=hidden, n_layer=n_layers, n_head=4, n_inner=ffn, n_positions=512, **common
        )
    configs = {"bert": transformers.BertConfig, "llama": transformers.LlamaConfig}
    return configs[architecture](
        hidden_size=hidden,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        intermediate_size=ffn,
        max_position_embeddings=512,
        **common,
    )


def toy_tokenizer(architecture: str) -> transformers.PreTrainedTokenizerFast:
    """Return the tokenizer of a toy model, built from `TEXT`."""
    return _word_piece() if architecture == "bert" else _byte_level(architecture == "llama")


def _word_piece() -> transformers.PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    letters = [character for character in characters if character.isalnum()]
    words = sorted({word.strip(".,;:").lower() for word in TEXT.split()} - set(characters))
    pieces = [*special, *characters, *(f"##{letter}" for letter in letters), *words, "##ing"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _byte_level(with_prefix: bool) -> transformers.PreTrainedTokenizerFast:
    special = ["<s>", "</s>"] if with_prefix else ["<|endoftext|>"]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if with_prefix:
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
                ),
            ]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[-1]
    )
