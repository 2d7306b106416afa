"""Capture points: which tensor of which module is a site.

Nothing here knows the name of a module.  What transformers share is structure:

- the *blocks* are the one `torch.nn.ModuleList` with as many members as the config has layers,
  all of one class;
- inside a block the *last projection of the FFNN* is the last two-dimensional weight registered,
  whether it is called ``output.dense``, ``c_proj``, ``lin2``, ``wo``, ``fc2`` or ``down_proj``.
  What goes into it is `mlp_post`: behind the activation function and, in a gated FFNN, behind
  the product with the gate.  Hooking the *first* projection instead records hidden states under
  the name of neurons; so the width of what was found must be the config's intermediate size.

A structure that breaks these rules is refused and described, never guessed at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from actstore.errors import ArgumentError, ModelError, did_you_mean
from actstore.site import HOOKS, Site, summarize

# What configs call the number of neurons of one FFNN.  DistilBERT's `hidden_dim` comes last: it is
# the least telling of these names.
_INTERMEDIATE_SIZE = (
    "intermediate_size",
    "ffn_dim",
    "d_ff",
    "n_inner",
    "d_inner",
    "ffn_hidden_size",
    "encoder_ffn_dim",
    "dff",
    "hidden_dim",
)


@dataclass(frozen=True)
class CapturePoint:
    """Where in a model a site is read."""

    site: Site
    """The site."""
    module: str
    """Dotted name of the module, as in ``model.get_submodule``."""
    side: Literal["input", "output"]
    """Whether the module's first input or its (first) output is the activation."""
    width: int
    """Number of columns: neurons of the FFNN, or channels of the residual stream."""


def find_capture_points(model: nn.Module, hooks: Iterable[str] = HOOKS) -> dict[Site, CapturePoint]:
    """Find the capture points of a model by its structure.

    Looks at modules and shapes only; runs nothing.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model with its ``config``; with or without a head.
    hooks : iterable of str, default all of `actstore.site.HOOKS`
        Hook points to find.

    Returns
    -------
    dict of Site to CapturePoint
        One for every hook point and layer, sorted by site.

    Raises
    ------
    ModelError
        If the blocks cannot be told from other modules; if the model has an encoder and a
        decoder; or if ``mlp_post`` is wanted and the last projection of a block is not what the
        config promises (experts, shared layers).  The message names what can be captured.
    ArgumentError
        If a hook point is unknown.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=24, intermediate_size=96))
    >>> find_capture_points(model)[Site("mlp_post", 1)]  # doctest: +NORMALIZE_WHITESPACE
    CapturePoint(site=Site(hook='mlp_post', layer=1, space=''),
                 module='encoder.layer.1.output.dense', side='input', width=96)
    """
    hooks = list(hooks)
    for hook in hooks:
        if hook not in HOOKS:
            raise ArgumentError(
                f"hooks has {hook!r}; hook points are {', '.join(HOOKS)}."
                f"{did_you_mean(hook, HOOKS)}"
            )
    blocks_name, blocks = _find_blocks(model)
    hidden_size = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    points = []
    for layer, block in enumerate(blocks):
        block_name = f"{blocks_name}.{layer}"
        if "resid_pre" in hooks:
            points.append(CapturePoint(Site("resid_pre", layer), block_name, "input", hidden_size))
        if "resid_post" in hooks:
            points.append(
                CapturePoint(Site("resid_post", layer), block_name, "output", hidden_size)
            )
        if "mlp_post" in hooks:
            width = _intermediate_size(model.config, layer)
            projection = _last_projection(model, block, block_name, width, len(blocks))
            points.append(
                CapturePoint(Site("mlp_post", layer), f"{block_name}.{projection}", "input", width)
            )
    return {point.site: point for point in sorted(points, key=lambda point: point.site)}


def _intermediate_size(config: Any, layer: int) -> int:
    """Return the number of FFNN neurons a config promises for a layer.

    Four times the hidden size where the config names none, which is what GPT-2's descendants do.
    """
    for name in _INTERMEDIATE_SIZE:
        value = getattr(config, name, None)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = value[layer]
        if isinstance(value, int):
            return value
    return int(getattr(config, "expansion_ratio", 4) * config.hidden_size)


def refuse_two_stacks(config: Any, name: str) -> None:
    """Raise ModelError if a config describes an encoder with a decoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} has an encoder and a decoder; a capture runs one stack over one text. "
            "Capture its encoder: pass the module model.get_encoder() and its tokenizer."
        )


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    name = type(model).__name__
    config = getattr(model, "config", None)
    n_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(n_layers, int) or not isinstance(getattr(config, "hidden_size", None), int):
        raise ModelError(
            f"{name} has no config with num_hidden_layers and hidden_size; expected the text stack "
            "of a transformers model. Pass that submodule itself, for instance "
            "model.language_model."
        )
    if hasattr(model, "encoder") and hasattr(model, "decoder"):
        # One stack of such a model shares the config of the whole; the modules tell them apart.
        refuse_two_stacks(config, name)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in lists:
        inside = any(path.startswith(f"{outer}.") for outer, _ in found)
        # A list inside a block (experts, sublayers) may have the same length by chance.
        if len(module) == n_layers and len({type(item) for item in module}) == 1 and not inside:
            found.append((path, module))
    if len(found) == 1:
        return found[0]
    seen = ", ".join(f"{path} ({len(items)} x {type(items[0]).__name__})" for path, items in lists)
    if found:
        problem = "several lists fit: " + ", ".join(path for path, _ in found)
    else:
        problem = f"it has {seen or 'no list of modules'}"
    raise ModelError(
        f"the blocks of {name} cannot be told: expected one list of {n_layers} modules of one "
        f"class (config.num_hidden_layers = {n_layers}), {problem}. Layers "
        "that share their weights, as in ALBERT, have no site of their own. Nothing of this model "
        "can be captured; give a model with one list of blocks, or the submodule that holds it."
    )


def _last_projection(
    model: nn.Module, block: nn.Module, block_name: str, width: int, n_layers: int
) -> str:
    """Return the dotted name, inside the block, of the FFNN's last projection."""
    hidden_size = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    weights: list[tuple[str, nn.Module]] = [
        (path, module)
        for path, module in block.named_modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.ndim == 2
    ]
    stacked = [path for path, parameter in block.named_parameters() if parameter.ndim > 2]
    fitting = [path for path, module in weights if _in_out(module) == (width, hidden_size)]
    if stacked:
        found = f"a weight of more than two dimensions, {stacked[0]} (experts or a convolution)"
    elif not weights:
        found = "no two-dimensional weight"
    elif weights[-1][0] not in fitting:
        path, module = weights[-1]
        shape = _in_out(module)
        found = (
            f"{path}, a {type(module).__name__} from {shape[0]} to {shape[1]}"
            if shape
            else f"{path}, a {type(module).__name__}, which is no projection"
        )
    elif len(fitting) > 1 and width != hidden_size:
        found = f"{len(fitting)} such projections ({', '.join(fitting)}), as in a list of experts"
    else:
        return weights[-1][0]
    others = summarize(
        Site(hook, layer) for hook in HOOKS if hook != "mlp_post" for layer in range(n_layers)
    )
    raise ModelError(
        f"mlp_post cannot be captured in {type(model).__name__}: in {block_name} expected the last "
        f"two-dimensional weight to project {width} neurons (the config's intermediate size) to "
        f"{hidden_size} channels, found {found}. What can be captured: {others}."
    )


def _in_out(module: nn.Module) -> tuple[int, int] | None:
    """Return a projection's input and output width, None for a module that is none."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        # Read from the attributes: the weights of a quantised Linear are packed.
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if type(module).__name__ == "Conv1D":  # GPT-2's, whose weight is (in, out)
        weight: Any = module.weight
        return int(weight.shape[0]), int(weight.shape[1])
    return None
