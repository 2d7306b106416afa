"""The direct path: from what an FFNN writes into the residual stream straight to the logits.

Every FFNN adds ``activations @ W`` to the residual stream, so the row of W that belongs to a neuron
is what the neuron writes; and nothing need read it on its way, for every block passes the stream
on.  The final norm and the unembedding then turn it into logits: its *direct effect*.  A norm
divides by a number of the token at hand and is linear otherwise; here it stands without the
division (and without its bias, which is no neuron's doing), so that effects compare with each
other and are no logits.

It is one path of many.  Later attention and FFNNs read the same direction, and what they make of it
can be more and opposite.  That is not told here.

Nothing is read off names or settings that a short forward can prove: that the model is causal, that
the blocks add what their FFNN gives as it is, which norm is the last and what it does.

References
----------
nostalgebraist, interpreting GPT: the logit lens, LessWrong (2020).
Elhage et al., A Mathematical Framework for Transformer Circuits (2021): the direct path; what the
final norm can be folded into.
Geva et al., Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the
Vocabulary Space, EMNLP 2022: output weights times unembedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from actstore.errors import ModelError

Float32 = npt.NDArray[np.float32]
Run = Callable[[torch.Tensor], torch.Tensor]
"""Runs windows of token ids, (windows, positions), to the last hidden state."""

_BLOCK = 8192
_ALIKE = 0.99


@dataclass(frozen=True)
class DirectPath:
    """What turns directions of the residual stream into logits, without the norm's division."""

    gain: torch.Tensor
    """What the final norm multiplies each channel by, float32, (channels,)."""
    centred: bool
    """Whether it subtracts the mean over channels first: LayerNorm does, RMSNorm does not."""
    unembedding: torch.Tensor
    """Weight of the head, (tokens, channels)."""

    def effects(self, directions: Float32) -> Float32:
        """Return the direct effect of directions on each token.

        One product with the unembedding, by blocks of tokens.

        Parameters
        ----------
        directions : ndarray of float32
            What is written into the residual stream, (n, channels).

        Returns
        -------
        ndarray of float32
            (n, tokens): column i is token id i.
        """
        written = torch.from_numpy(directions).to(self.gain)
        if self.centred:
            written = written - written.mean(dim=1, keepdim=True)
        scaled = written * self.gain
        blocks = torch.split(self.unembedding, _BLOCK)
        return torch.cat([(scaled @ block.to(scaled).T).cpu() for block in blocks], dim=1).numpy()


def written(projection: nn.Module, activations: npt.NDArray[Any], name: str) -> Float32:
    """Return what neurons write into the residual stream, with no bias.

    Parameters
    ----------
    projection : torch.nn.Module
        The last projection of their FFNN.
    activations : ndarray
        (n, width).
    name : str
        Name of the projection to show.

    Returns
    -------
    ndarray of float32
        (n, channels).

    Raises
    ------
    ModelError
        If its weight is packed, as quantised ones are.
    """
    weight: Any = projection.weight
    # GPT-2's projection keeps its weight the other way round.
    of_neurons = weight if type(projection).__name__ == "Conv1D" else weight.T
    width = activations.shape[1]
    if not weight.is_floating_point() or of_neurons.shape[0] != width:
        raise ModelError(
            f"the output weights of {name} are {weight.dtype} of shape {tuple(weight.shape)}; "
            f"expected floating-point ones of {width} neurons. Give the model without quantisation "
            "as model=."
        )
    active = torch.from_numpy(np.ascontiguousarray(activations, np.float32)).to(weight.device)
    used = (active != 0).any(dim=0)  # of one neuron, one row of the weight
    found: Float32 = (active[:, used] @ of_neurons.detach()[used].float()).cpu().numpy()
    return found


def find_direct_path(
    module: nn.Module,
    run: Run,
    last_block: nn.Module,
    last_projection: nn.Module,
    tokens: tuple[int, int],
    unembedding: Callable[[], torch.Tensor],
) -> DirectPath:
    """Find a model's direct path and prove it; three forwards of two tokens.

    Parameters
    ----------
    module : torch.nn.Module
        The text stack.
    run : callable
        Runs it.
    last_block, last_projection : torch.nn.Module
        Its last block and that block's last projection of the FFNN.
    tokens : (int, int)
        Two different token ids.
    unembedding : callable
        Returns the weight of the head, or says why there is none.

    Raises
    ------
    ModelError
        If the model is not causal, does not add what its FFNNs give to the residual stream as it
        is, does something else than one norm behind its last block, or has no head of its width.
    """
    name = type(module).__name__
    a, b = tokens
    later: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
    plain, hidden = _watched(module, run, last_block, torch.tensor([[a, b]]), later)
    other = run(torch.tensor([[a, a]])).float()
    if (hidden[:, 0] - other[:, 0]).abs().max() > 1e-3 * (hidden[:, 1] - other[:, 1]).abs().max():
        raise ModelError(
            f"{name} is not causal: a token changes what stands before it. What output weights "
            "promote and suppress is known of models that predict the next token; leave out model=."
        )
    _prove_added(name, module, run, last_block, last_projection, torch.tensor([[a, b]]), plain)
    norm = _final_norm(name, later, plain, hidden)
    gain, centred = torch.ones(plain.shape[-1], device=plain.device), False
    if norm is not None:
        gain, centred = _linear_part(name, norm, plain)
    head = unembedding()
    if head.shape[1] != len(gain):
        raise ModelError(
            f"the head of {name} takes {head.shape[1]} channels, its residual stream has "
            f"{len(gain)}; expected as many. There is more between them than a norm: leave out "
            "model=."
        )
    return DirectPath(gain, centred, head.detach())


def _watched(
    module: nn.Module,
    run: Run,
    last_block: nn.Module,
    input_ids: torch.Tensor,
    later: list[tuple[nn.Module, torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last block's output and the last hidden state; collect what runs in between."""
    found: list[torch.Tensor] = []

    def behind(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if found and isinstance(output, torch.Tensor) and args:
            later.append((part, args[0].detach(), output.detach()))

    def block(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        found.append(first.detach().float())

    inside = set(last_block.modules())
    with ExitStack() as hooks:
        for part in module.modules():
            if part not in inside and not list(part.children()):
                hooks.enter_context(_hook(part, behind))
        hooks.enter_context(_hook(last_block, block))
        hidden = run(input_ids).float()
    return found[0], hidden


def _hook(part: nn.Module, hook: Callable[..., Any]) -> ExitStack:
    stack = ExitStack()
    stack.callback(part.register_forward_hook(hook).remove)
    return stack


def _prove_added(
    name: str,
    module: nn.Module,
    run: Run,
    last_block: nn.Module,
    projection: nn.Module,
    input_ids: torch.Tensor,
    plain: torch.Tensor,
) -> None:
    """Raise ModelError unless what is added to the FFNN's output is added to the block's."""
    signs = torch.rand(plain.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    size = plain.square().mean().sqrt()
    change = torch.where(signs.to(plain.device), size, -size)

    def more(part: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + change.to(output).reshape(output.shape)

    with _hook(projection, more):
        changed, _ = _watched(module, run, last_block, input_ids, [])
    seen = (changed - plain).flatten()
    alike = torch.dot(seen, change.flatten()) / (change.norm() * seen.norm()).clamp_min(1e-30)
    ratio = seen.norm() / change.norm()
    if alike < _ALIKE or not _ALIKE < ratio < 2 - _ALIKE:
        raise ModelError(
            f"the blocks of {name} do not add the output of their FFNN to the residual stream as "
            "it is (a norm or a factor stands between), so that its output weights are not what "
            "its neurons write there. What they promote is not known; leave out model=."
        )


def _final_norm(
    name: str,
    later: list[tuple[nn.Module, torch.Tensor, torch.Tensor]],
    plain: torch.Tensor,
    hidden: torch.Tensor,
) -> nn.Module | None:
    """Return the one module between the last block and the last hidden state, None for none."""
    # Dropout and the like do nothing here.
    acting = [
        step for step in later if step[1].shape != step[2].shape or not step[1].equal(step[2])
    ]
    if not acting and hidden.equal(plain):
        return None
    if (
        len(acting) == 1
        and acting[0][1].float().equal(plain)
        and acting[0][2].float().equal(hidden)
    ):
        return acting[0][0]
    found = ", ".join(type(part).__name__ for part, _, _ in acting) or "no module"
    raise ModelError(
        f"between the last block of {name} and its last hidden state there is {found}; expected "
        "one norm, or nothing. What its output weights promote is not known; leave out model=."
    )


def _linear_part(name: str, norm: nn.Module, seen: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return what a norm multiplies each channel by, and whether it subtracts their mean.

    Found from what it does, for some keep their weight as it is, some less one, and some have none:
    of x and -x the difference is twice the linear part, and x has mean 0 and mean square 1.
    """
    norm = copy.deepcopy(norm).float()
    n = seen.shape[-1]

    def odd(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            part: torch.Tensor = (norm(x) - norm(-x)) / 2
        return part

    x = torch.ones(n, device=seen.device)
    level = odd(x)
    x[1::2] = -1
    x = x - x.mean()
    x = x / x.square().mean().sqrt()
    gain = odd(x) / x
    centred = bool(level.norm() < 0.01 * gain.norm())
    rows = seen.reshape(-1, n)
    expected = gain * (rows - rows.mean(dim=1, keepdim=True) if centred else rows)
    if nn.functional.cosine_similarity(odd(rows), expected).min() < 0.999:
        raise ModelError(
            f"the final norm of {name}, a {type(norm).__name__}, is not a multiple of each channel "
            "over a number of the token. What its output weights promote is not known; leave out "
            "model=."
        )
    return gain, centred
