"""Load a model and its tokenizer from the hub, a directory, a GGUF file or a module.

Weights are read from safetensors or GGUF; nothing is unpickled, and code that comes with a model
runs only where the caller allows it.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils.tqdm import enable_progress_bars
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from actstore.errors import ArgumentError, ModelError, did_you_mean
from actstore.models.capture_points import refuse_two_stacks
from actstore.models.head import head_of_files, head_of_module
from actstore.models.language_model import LanguageModel

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def load(
    model: str | os.PathLike[str] | nn.Module,
    tokenizer: Any = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a model without its head, which is read only when somebody asks, and its tokenizer.

    Parameters
    ----------
    model : str, path or torch.nn.Module
        A name on the Hugging Face hub; a directory with ``config.json`` and safetensors, or with
        one ``.gguf`` file; a ``.gguf`` file; or a transformers model, whose head is left aside.
        A module is put into eval mode, and moved or cast where `device` or `dtype` say so.
    tokenizer : tokenizer, str or path, optional
        A fast tokenizer of transformers, or where to load one; default: the model's own.  Needed
        with a module.
    dtype : str or torch.dtype, optional
        Type of the weights; default: the checkpoint's own, float32 for GGUF.
    device : str or torch.device, default "auto"
        Where to run; ``"auto"`` is the GPU if there is one, and where it already is for a module.
    revision : str, optional
        Branch, tag or commit on the hub.
    trust_remote_code : bool, default False
        Whether code that comes with the model may run.

    Returns
    -------
    LanguageModel
        In eval mode, with its capture points found and proved by a forward of two tokens.

    Raises
    ------
    ModelError
        If the model or tokenizer cannot be found or read, lacks weights, or cannot be captured.
    ArgumentError
        If dtype or device do not exist, or a module comes without a tokenizer.

    Examples
    --------
    >>> model = load("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
    >>> model.points[model.sites[0]]  # doctest: +SKIP
    CapturePoint(site=Site(hook='resid_pre', layer=0, space=''), module='encoder.layer.0', ...)
    """
    wanted_dtype = _parse_dtype(dtype)
    if isinstance(model, nn.Module):
        return _wrap(model, tokenizer, wanted_dtype, device, revision, trust_remote_code)
    target = _parse_device(device)
    source = _locate(os.fspath(model))
    if source.gguf:
        _require_gguf_packages(source.name)
    common = {**source.options(revision), "trust_remote_code": trust_remote_code}
    with _quiet(gguf=source.gguf is not None):
        config = _load_config(source, common)
        refuse_two_stacks(config, source.name)
        text = _load_tokenizer(source if tokenizer is None else tokenizer, common)
        module = _load_module(source, config, wanted_dtype, common)
    module = _text_stack(module).to(target).eval()
    commit = getattr(config, "_commit_hash", None)
    # A store is shared; where the model lay on this machine is nobody's business.
    name = "/".join(Path(source.name).parts[-2:]) if source.local else source.name

    def head() -> torch.Tensor:
        with _quiet():
            return head_of_files(module, config, source.path, source.name, common)

    return LanguageModel(module, text, name=name, revision=revision or commit, head=head)


@dataclass(frozen=True)
class _Source:
    """Where a model is loaded from."""

    name: str
    """As the user gave it."""
    path: str
    """Directory or hub name for transformers."""
    gguf: str | None = None
    """Name of the GGUF file in the directory."""
    local: bool = True
    """Whether the path is a directory, not a name on the hub."""

    def options(self, revision: str | None) -> dict[str, Any]:
        return {"gguf_file": self.gguf} if self.gguf else {"revision": revision or "main"}


def _locate(name: str) -> _Source:
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"model {name!r} is a file; expected a directory with config.json and safetensors, "
                f"or a .gguf file. Give the directory: {str(path.parent)!r}."
            )
        return _Source(name, str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return _Source(name, str(path))
        files = sorted(item.name for item in path.glob("*.gguf"))
        if len(files) == 1:
            return _Source(name, str(path), files[0])
        found = f"{len(files)} .gguf files ({', '.join(files)})" if files else "neither"
        raise ModelError(
            f"model {name!r} is a directory with {found}; expected config.json with safetensors, "
            "or one .gguf file. Give the path of the file or of another directory."
        )
    if (
        name.startswith((".", "~", "/"))
        or "\\" in name
        or name.count("/") > 1
        or path.suffix
        in (
            ".gguf",
            ".safetensors",
        )
    ):
        raise ModelError(
            f"model {name!r} does not exist; expected a directory with config.json and "
            "safetensors, a .gguf file, or a name on the Hugging Face hub. Check the path "
            f"(from {Path.cwd()})."
        )
    return _Source(name, name, local=False)


def _load_config(source: _Source, options: dict[str, Any]) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(source.path, **options)
    except ImportError as error:
        raise _needs_package(source.name, error) from error
    except Exception as error:
        if _is_about_remote_code(error):
            raise ModelError(
                f"model {source.name!r} comes with its own code, which is not run; expected a "
                "model that transformers knows. If you trust it, pass trust_remote_code=True."
            ) from error
        if source.local:
            raise ModelError(
                f"the config of model {source.name!r} cannot be read: {_first_line(error)} "
                "Expected a config of a model that transformers "
                f"{transformers.__version__} knows. Check the file, or update transformers."
            ) from error
        raise ModelError(
            f"model {source.name!r} is neither a directory here nor could it be fetched from the "
            "Hugging Face hub (no such name, no access, or offline). Check the name, or download "
            "the model and give its local directory."
        ) from error


def _load_tokenizer(source: Any, options: dict[str, Any]) -> Any:
    """Return the tokenizer at a `_Source`, at a path or hub name, or itself."""
    if isinstance(source, (str, os.PathLike)):
        # Files of its own: the model's revision and GGUF file are not the tokenizer's.
        options = {"trust_remote_code": options["trust_remote_code"]}
        source = _Source(os.fspath(source), str(Path(source).expanduser()))
    elif not isinstance(source, _Source):
        return source
    try:
        return transformers.AutoTokenizer.from_pretrained(source.path, **options)
    except ImportError as error:
        raise _needs_package(source.name, error) from error
    except Exception as error:
        raise ModelError(
            f"no tokenizer could be loaded from {source.name!r}: {_first_line(error)} Expected a "
            "tokenizer.json. Give tokenizer= a tokenizer, a directory or a hub name that has one."
        ) from error


def _load_module(
    source: _Source, config: Any, dtype: torch.dtype | None, options: dict[str, Any]
) -> nn.Module:
    default = torch.float32 if source.gguf else "auto"
    try:
        module, report = transformers.AutoModel.from_pretrained(
            source.path,
            config=config,
            dtype=dtype or default,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        raise _needs_package(source.name, error) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the weights of model {source.name!r} cannot be read: {_first_line(error)} Expected "
            "model.safetensors (or its shards) or a .gguf file; other files are not opened, "
            "because they can run code. Save the model anew with "
            "model.save_pretrained(directory), which writes safetensors."
        ) from error
    # Weights that the files lack are random; only a pooler is of no consequence to any site.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ModelError(
            f"the weights of model {source.name!r} lack {len(missing)} of the tensors of "
            f"{type(module).__name__}, such as {missing[0]!r}; expected all, for the others would "
            "be random. Give a directory whose config.json belongs to its weights."
        )
    return module  # type: ignore[no-any-return]


def _wrap(
    module: nn.Module,
    tokenizer: Any,
    dtype: torch.dtype | None,
    device: str | torch.device,
    revision: str | None,
    trust_remote_code: bool,
) -> LanguageModel:
    if not isinstance(module, transformers.PreTrainedModel):
        raise ModelError(
            f"model is a {type(module).__name__}; expected a transformers model "
            "(PreTrainedModel). Pass the model it wraps, or its name or directory."
        )
    if tokenizer is None:
        raise ArgumentError(
            f"tokenizer is None; expected the tokenizer of the given {type(module).__name__}, "
            "which a module does not carry. Pass tokenizer=."
        )
    with _quiet():
        text = _load_tokenizer(tokenizer, {"trust_remote_code": trust_remote_code})
    name = module.config._name_or_path or type(module).__name__
    stack = _text_stack(module)
    if dtype is not None:
        stack = stack.to(dtype)
    if str(device) != "auto":
        stack = stack.to(_parse_device(device))
    revision = revision or getattr(module.config, "_commit_hash", None)
    return LanguageModel(
        stack.eval(), text, name=name, revision=revision, head=lambda: head_of_module(module)
    )


def _text_stack(model: nn.Module) -> nn.Module:
    """Return a model without its head and, where it also sees or hears, its text stack."""
    base: Any = getattr(model, "base_model", model)
    if getattr(base.config, "is_encoder_decoder", False):
        return base  # type: ignore[no-any-return]
    text_config = base.config.get_text_config()
    if text_config is base.config:
        return base  # type: ignore[no-any-return]
    for module in base.modules():
        if type(getattr(module, "config", None)) is type(text_config):
            return module  # type: ignore[no-any-return]
    return base  # type: ignore[no-any-return]


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ArgumentError(
            f"dtype = {name!r}; expected one of {', '.join(_DTYPES)}, or None for the "
            f"checkpoint's own.{did_you_mean(name, _DTYPES)}"
        )
    return _DTYPES[name]


def _parse_device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(
            f"device = {str(device)!r} is not here: {_first_line(error)} Expected 'auto', 'cpu', "
            "or a device this PyTorch can use, such as 'cuda:0'."
        ) from error
    return target


def _needs_package(name: str, error: ImportError) -> ModelError:
    return ModelError(
        f"model {name!r} needs a package that is not installed: {_first_line(error)} Install it."
    )


def _require_gguf_packages(name: str) -> None:
    missing = [package for package in ("gguf", "accelerate") if not find_spec(package)]
    if missing:
        raise ModelError(
            f"model {name!r} is a GGUF file; reading it needs {' and '.join(missing)}, which is "
            f"not installed. Run: pip install {' '.join(missing)}."
        )


def _is_about_remote_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?")) else f"{line}."


@contextmanager
def _quiet(gguf: bool = False) -> Iterator[None]:
    """Keep transformers' bars and warnings off the terminal; what matters is raised instead."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()
        # Bars of the download stay: a user who waits for gigabytes should see them.
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if gguf:
                # The bar of the conversion obeys no switch.
                with redirect_stderr(io.StringIO()):
                    yield
            else:
                yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
