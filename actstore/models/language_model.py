"""A model with its tokenizer, ready to be captured.

One forward pass calls a sink from inside the hooks, so that an activation can be reduced or copied
and then forgotten before the next block runs.  Hooks exist only while a forward runs, and only see
the thread that runs it.  Blocks above the highest wanted site are not run.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from actstore.errors import ArgumentError, ModelError, SiteNotFound
from actstore.models.capture_points import CapturePoint, find_capture_points
from actstore.models.direct_path import DirectPath, find_direct_path, written
from actstore.models.text import Encoded, TextCodec
from actstore.site import Site, resolve_alias, select, summarize

Sink = Callable[[Site, torch.Tensor], None]
"""Called with a site and its activations, (windows, positions, width), during a forward."""

_NO_LIMIT = 2**20


class _Reached(Exception):
    """Ends a forward behind the last wanted site; never leaves `LanguageModel.forward`."""


class LanguageModel:
    """A transformers model without its head, its tokenizer and its capture points.

    Made by `actstore.models.load`.  Creating one runs two tokens through the model, to prove that
    every capture point is passed exactly once and has the shape it should have.

    Parameters
    ----------
    module : torch.nn.Module
        The text stack, in eval mode, on its device.
    tokenizer : transformers.PreTrainedTokenizerFast
        Its tokenizer; it is not changed.
    name : str
        Name to show and record.
    revision : str, optional
        Revision of the weights, where they have one.
    head : callable
        Returns the weight of the head, (tokens, channels), or raises ModelError.

    Raises
    ------
    ModelError
        If no site can be captured, the tokenizer has no offsets or more tokens than the model.

    Attributes
    ----------
    module, tokenizer, name, revision
        As given.
    points : dict of Site to CapturePoint
        What can be captured, sorted by site.
    sites : list of Site
        The keys of `points`.
    device : torch.device
    dtype : str
        Type of the weights: ``"float32"``, ``"bfloat16"``, ``"float16"``.
    architecture : str
        Class name of the module: ``"BertModel"``.
    n_parameters : int
        Parameters of the module, its head not counted.
    n_embeddings : int
        Rows of the token embedding; token ids are below it.
    context_limit : int
        Most positions of one window, special tokens included; 2**20 where the model names no limit.
    prefix_ids, suffix_ids : list of int
        Special tokens that the tokenizer puts before and behind one text.
    special_ids : set of int
        Ids of special tokens.  An unknown token that ordinary text can produce is content.
    pad_id : int
        Id to pad a batch with.
    n_forwards : int
        Forwards run so far by `forward`.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        head: Callable[[], torch.Tensor],
        revision: str | None = None,
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self._head = head
        self._codec = TextCodec(tokenizer)
        self._refusal: ModelError | None = None
        points = find_capture_points(module, ("resid_pre", "resid_post"))
        try:
            points |= find_capture_points(module, ("mlp_post",))
        except ModelError as error:
            # A model with experts still has a residual stream; what is missing is told when asked.
            self._refusal = error.with_traceback(None)
        self.points: dict[Site, CapturePoint] = dict(sorted(points.items()))
        self.sites: list[Site] = list(self.points)
        parameter = next(p for p in module.parameters() if p.is_floating_point())
        self.device = parameter.device
        self.dtype = str(parameter.dtype).removeprefix("torch.")
        self.architecture = type(module).__name__
        self.n_parameters = sum(p.numel() for p in module.parameters())
        embedding: Any = module.get_input_embeddings()  # type: ignore[operator]
        self.n_embeddings = int(embedding.weight.shape[0])
        if self._codec.n_base_tokens > self.n_embeddings:
            raise ModelError(
                f"the tokenizer of {name} has {self._codec.n_base_tokens} tokens, its model "
                f"{self.n_embeddings}; expected a tokenizer of this model. Give the right one as "
                "tokenizer=."
            )
        self.context_limit = min(
            _most_positions(module), self._codec.max_length or _NO_LIMIT, _NO_LIMIT
        )
        self.prefix_ids = self._codec.prefix_ids
        self.suffix_ids = self._codec.suffix_ids
        self.special_ids = self._codec.special_ids
        pad_id = self._codec.pad_id
        self.pad_id = pad_id if pad_id < self.n_embeddings else 0
        self._options = _forward_options(module)
        self.n_forwards = 0
        self._prove()

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.name!r}, {self.architecture}, {self.dtype}, {self.device}, "
            f"{summarize(self.sites)})"
        )

    def select(self, wanted: str | Site | Iterable[str | Site] | None = None) -> list[Site]:
        """Return the sites that names or patterns stand for, sorted; None means all.

        As `actstore.site.select`, but a hook point that this model cannot give is refused with
        the reason.

        Raises
        ------
        SiteNotFound
            If a name stands for no site of the model.
        ModelError
            If ``mlp_post`` is named and cannot be captured in this model.
        """
        items = [wanted] if isinstance(wanted, (str, Site)) else list(wanted or [])
        names = [part for item in items for part in str(item).split(",")]
        if self._refusal and any("mlp_post" in resolve_alias(name) for name in names):
            raise ModelError(str(self._refusal))
        return select(items if wanted is not None else None, self.sites, self.name)

    # -- text -----------------------------------------------------------------------------

    def encode(self, text: str) -> Encoded:
        """Return the tokens of a text, without special tokens, never truncated.

        Returns
        -------
        Encoded
            Token ids and their first and last code points in the text.

        Examples
        --------
        >>> model.encode("the keys").ids  # doctest: +SKIP
        array([1996, 6309], dtype=int32)
        """
        return self._codec.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Return the tokens of several texts; uses all cores."""
        return self._codec.encode_batch(texts)

    def vocabulary(self) -> tuple[list[int], list[str], list[str]]:
        r"""Return every token id below the rows of the embedding, with its text and piece.

        Returns
        -------
        token_id : list of int
            0 … n_embeddings - 1.
        text : list of str
            What the token stands for, with real white space (``" war"``).  Bytes that are no
            UTF-8 by themselves are shown as ``\xe2``.  WordPiece keeps its ``##``.  Empty for
            rows of the embedding that no token uses.
        piece : list of str
            The token as the tokenizer's own files have it: ``"Ġwar"``, ``"▁war"``, ``"##ing"``.
        """
        return self._codec.vocabulary(self.n_embeddings)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the tokenizer, its truncation and padding settings left out."""
        return self._codec.fingerprint

    @cached_property
    def weights_fingerprint(self) -> str:
        """SHA-256 over name, dtype, shape and CRC-32C of every saved tensor, sorted by name.

        One read of all weights on first use; does not depend on the device.  What is computed from
        the config (rotary frequencies) is not part of it, nor is a pooler: no site depends on it,
        and a checkpoint without one gets a random one at each load.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            if not isinstance(tensor, torch.Tensor) or name.startswith("pooler."):
                continue
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            crc = google_crc32c.value(flat.numpy())
            dtype = str(tensor.dtype).removeprefix("torch.")
            digest.update(f"{name} {dtype} {tuple(tensor.shape)} {crc:08x}\n".encode())
        return digest.hexdigest()

    # -- output weights -------------------------------------------------------------------

    @cached_property
    def direct_path(self) -> DirectPath:
        """What turns directions of the residual stream into logits; found and proved on first use.

        Three forwards of two tokens, and one read of the head.

        Raises
        ------
        ModelError
            If there is none (the model is not causal, has no head at hand, puts more between its
            FFNNs and its logits than one norm) or ``mlp_post`` cannot be captured.
        """
        blocks = [self.points[site] for site in self.select("resid_post")]
        projections = [self.points[site] for site in self.select("mlp_post")]
        content = [i for i in range(self.n_embeddings) if i not in self.special_ids][:2]
        return find_direct_path(
            self.module,
            self._last_hidden_state,
            self.module.get_submodule(blocks[-1].module),
            self.module.get_submodule(projections[-1].module),
            (content[0], content[-1]),
            self._head,
        )

    def written(self, site: Site, activations: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return what neurons of a site write into the residual stream, its bias left out.

        One product with the output weights of the neurons that are not zero.

        Parameters
        ----------
        site : Site
            A site of ``mlp_post``.
        activations : ndarray
            Of its neurons, (n, width).

        Returns
        -------
        ndarray of float32
            (n, channels).

        Raises
        ------
        ModelError
            If the site is not of ``mlp_post``, or the weight is packed.
        SiteNotFound
            If the model has no such site.
        """
        (found,) = self.select(site)
        if found.hook != "mlp_post":
            raise ModelError(
                f"site {str(found)!r} of {self.name} has no output weights; those of mlp_post do."
            )
        point = self.points[found]
        return written(self.module.get_submodule(point.module), activations, point.module)

    def _last_hidden_state(self, input_ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            output = self.module(input_ids=input_ids.to(self.device), **self._options)
        hidden: torch.Tensor = output[0]
        return hidden.detach()

    # -- forward --------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor,
        lengths: Sequence[int],
        sites: Iterable[Site],
        sink: Sink,
    ) -> None:
        """Run one batch of windows and hand the activations of the wanted sites to a sink.

        One forward pass up to the highest wanted site; keeps no activation.

        Parameters
        ----------
        input_ids : torch.Tensor
            Token ids, int64, shape (windows, positions), on the CPU, padded on the right.
        lengths : sequence of int
            Tokens of each window, padding not counted.
        sites : iterable of Site
            The wanted sites, of `sites`.
        sink : callable
            ``sink(site, tensor)`` is called once for each wanted site, in the order in which the
            model computes them, with a detached tensor of shape (windows, positions, width) on the
            model's device.  The tensor is the model's own: copy what is to outlive the call, do
            not write to it.  Positions of padding hold values of no meaning.

        Raises
        ------
        ArgumentError
            If shapes, lengths or ids do not fit each other and the model.
        SiteNotFound
            If a site is not one of the model's.
        ModelError
            If a wanted site was not passed exactly once, or has another shape than it should.

        Notes
        -----
        The attention mask is passed only when some window is padded.  Equal lengths thus run as a
        single window does, without a mask; for transformers' attention this is the same, bit for
        bit, as a mask of ones.
        """
        wanted = set(sites)
        self._check(input_ids, lengths, wanted)
        self.n_forwards += 1
        self._run(input_ids, lengths, wanted, sink, stop=True)

    def _run(
        self,
        input_ids: torch.Tensor,
        lengths: Sequence[int],
        wanted: set[Site],
        sink: Sink,
        stop: bool,
    ) -> None:
        n_windows, n_positions = input_ids.shape
        last = max(wanted, key=lambda site: (site.layer, site.hook_rank))
        passed: set[Site] = set()

        def receive(site: Site, value: Any) -> None:
            if site in passed:
                raise ModelError(
                    f"site {str(site)!r} of {self.name} was passed twice in one forward; expected "
                    f"once. Its module {self.points[site].module} is shared between layers or run "
                    "in pieces (config.chunk_size_feed_forward must be 0)."
                )
            passed.add(site)
            sink(site, self._shaped(site, value, n_windows, n_positions))
            if stop and site == last:
                raise _Reached

        options = dict(self._options)
        if min(lengths) < n_positions:
            mask = torch.arange(n_positions) < torch.as_tensor(list(lengths))[:, None]
            options["attention_mask"] = mask.long().to(self.device)
        try:
            with torch.no_grad(), self._hooked(wanted, receive):
                self.module(input_ids=input_ids.to(self.device), **options)
        except _Reached:
            pass
        if missed := sorted(wanted - passed):
            raise ModelError(
                f"{summarize(missed)} of {self.name} was not passed in a forward; expected every "
                "site once. The model runs without calling the modules that hold them: load it "
                "without fused kernels, or leave these sites out."
            )

    @contextmanager
    def _hooked(self, wanted: set[Site], receive: Callable[[Site, Any], None]) -> Iterator[None]:
        # Another thread may run the same module; its values are not ours.
        owner = threading.get_ident()

        def hook(point: CapturePoint) -> Any:
            module = self.module.get_submodule(point.module)
            site = point.site

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if threading.get_ident() == owner:
                    receive(site, args[0] if args else kwargs.get("hidden_states"))

            def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if threading.get_ident() == owner:
                    receive(site, output[0] if isinstance(output, (tuple, list)) else output)

            if point.side == "input":
                return module.register_forward_pre_hook(before, with_kwargs=True)
            return module.register_forward_hook(after)

        handles: list[Any] = []
        try:
            for site in sorted(wanted):
                handles.append(hook(self.points[site]))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _shaped(self, site: Site, value: Any, n_windows: int, n_positions: int) -> torch.Tensor:
        shape = (n_windows, n_positions, self.points[site].width)
        if isinstance(value, torch.Tensor):
            # OPT runs its FFNN on flattened rows.
            if value.shape == (n_windows * n_positions, shape[2]):
                value = value.reshape(shape)
            if value.shape == shape:
                activations: torch.Tensor = value.detach()
                return activations
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ModelError(
            f"site {str(site)!r} of {self.name} gave {found} at module "
            f"{self.points[site].module}; expected (windows, positions, width) = {shape}. "
            f"{self.architecture} lays out its activations in another way and cannot be captured."
        )

    def _check(self, input_ids: torch.Tensor, lengths: Sequence[int], wanted: set[Site]) -> None:
        if unknown := sorted(site for site in wanted if site not in self.points):
            raise SiteNotFound(
                f"site {str(unknown[0])!r} is not in {self.name}; it has {summarize(self.sites)}."
            )
        if not wanted:
            raise ArgumentError(f"sites is empty; {self.name} has {summarize(self.sites)}.")
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
            raise ArgumentError(
                f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; expected int64 "
                "of shape (windows, positions), none of them 0."
            )
        n_windows, n_positions = input_ids.shape
        if len(lengths) != n_windows or not all(1 <= n <= n_positions for n in lengths):
            raise ArgumentError(
                f"lengths = {list(lengths)}; expected one number of 1 … {n_positions} for each of "
                f"the {n_windows} rows of input_ids."
            )
        if n_positions > self.context_limit:
            raise ArgumentError(
                f"input_ids has {n_positions} positions; {self.name} takes {self.context_limit}. "
                "Use a shorter context."
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.n_embeddings:
            raise ArgumentError(
                f"input_ids has token id {low if low < 0 else high}; {self.name} has ids "
                f"0 … {self.n_embeddings - 1}. Use the tokenizer of this model."
            )

    def _prove(self) -> None:
        # One window of two tokens: were positions first and windows second, (1, 2) would show it.
        token = next((id for id in range(self.n_embeddings) if id not in self.special_ids), 0)
        probe = torch.full((1, min(2, self.context_limit)), token)
        self._run(probe, [probe.shape[1]], set(self.sites), lambda site, tensor: None, stop=False)


def _most_positions(module: nn.Module) -> int:
    """Return the number of positions a model has, or a large number if it names none."""
    for name, part in module.named_modules():
        # RoBERTa's kind numbers positions from behind its padding index: 514 rows serve 512.
        if (
            isinstance(part, nn.Embedding)
            and name.rpartition(".")[2] == "position_embeddings"
            and part.padding_idx is not None
        ):
            return part.num_embeddings - part.padding_idx - 1
    limit = getattr(module.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else _NO_LIMIT


def _forward_options(module: nn.Module) -> dict[str, Any]:
    """Return the arguments that keep a forward from collecting what nobody reads."""
    options: dict[str, Any] = {}
    if "use_cache" in inspect.signature(module.forward).parameters:
        options["use_cache"] = False
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(module.config, name, False):
            options[name] = False
    return options
