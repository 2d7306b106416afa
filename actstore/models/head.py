"""The weight of a model's head, which captures leave aside: what turns channels into logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from actstore.errors import ModelError


def head_of_module(module: nn.Module) -> torch.Tensor:
    """Return the weight of a given model's head; of one without a head, what it is tied to.

    Raises
    ------
    ModelError
        If the model has no head and its config ties none to the embedding.
    """
    head: Any = module.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return _tied(module, type(module).__name__)
    weight: torch.Tensor = head.weight
    return weight


def head_of_files(
    stack: nn.Module, config: Any, path: str, name: str, options: dict[str, Any]
) -> torch.Tensor:
    """Return the weight of the head that a model's files hold; without one, what it is tied to.

    Reads that tensor alone.

    Parameters
    ----------
    stack : torch.nn.Module
        The loaded model without its head.
    config : PretrainedConfig
        Its config.
    path : str
        Directory or hub name.
    name : str
        Name to show.
    options : dict
        What it was loaded with: revision or gguf_file, trust_remote_code.

    Raises
    ------
    ModelError
        If the files hold no such tensor, and the config ties the head to nothing.
    """
    if "gguf_file" not in options:
        tensor = _tensor_name(config, options["trust_remote_code"])
        file = None if tensor is None else _file_of(path, tensor, options["revision"])
        if tensor is not None and file is not None:
            with safe_open(file, framework="pt") as opened:
                if tensor in opened.keys():  # noqa: SIM118 - it is no mapping
                    weight: torch.Tensor = opened.get_tensor(tensor)
                    return weight
    return _tied(stack, name)


def _tied(stack: Any, name: str) -> torch.Tensor:
    if not stack.config.tie_word_embeddings:
        raise ModelError(
            f"the head of {name} is not there: it is not tied to the embedding, and was not given "
            "or is not in its safetensors. Give a module with its head as model=, such as "
            "AutoModelForCausalLM.from_pretrained(…), and its tokenizer=."
        )
    weight: torch.Tensor = stack.get_input_embeddings().weight
    return weight


def _tensor_name(config: Any, trust_remote_code: bool) -> str | None:
    """Return what the weight of the head is called; None if no causal model has this config."""
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except (ValueError, KeyError, AttributeError):
        return None
    head = model.get_output_embeddings()
    named = model.named_parameters(remove_duplicate=False)
    names = [name for name, weight in named if head is not None and weight is head.weight]
    return names[-1] if names else None  # a tied one has the embedding's name too, which is first


def _file_of(path: str, tensor: str, revision: str) -> str | None:
    """Return the safetensors file that may hold a tensor; None if there is none."""
    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(path, "model.safetensors.index.json", **options)
    name: str | None = "model.safetensors"
    if index is not None:
        name = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].get(tensor)
    file: str | None = None if name is None else cached_file(path, name, **options)
    return file
