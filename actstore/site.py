"""Sites: where in a model an activation is read.

A *site* is a hook point plus a layer, ``mlp_post.5``; in models with two spaces the space comes
first, ``encoder.mlp_post.5``.  Layers are integers and sort as integers.  This module parses,
prints, sorts and selects sites; it knows no model and no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from actstore.errors import SiteNotFound, did_you_mean

HOOKS = ("resid_pre", "mlp_post", "resid_post")
"""Hook points that can be captured, in the order a block computes them."""

SPACES = ("encoder", "decoder")
"""Names of the spaces of encoder-decoder models; other models have one unnamed space."""

# TransformerLens, nnterp and Hugging Face names of the same places.
_ALIASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"embed(?:dings)?"), "resid_pre.0"),
    (re.compile(r"blocks\.(\d+)\.mlp\.hook_post"), r"mlp_post.\1"),
    (re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_post)"), r"\2.\1"),
    (re.compile(r"layers_input\[(\d+)\]"), r"resid_pre.\1"),
    (re.compile(r"layers_output\[(\d+)\]"), r"resid_post.\1"),
    (re.compile(r"hidden_states\[(\d+)\]"), r"resid_pre.\1"),
)
_SITE = re.compile(r"(?:(encoder|decoder)\.)?([a-z_]+)\.(\d+)")
_RANGE = re.compile(r".*\.(\d+)\s*[-–]\s*(\d+)")
_PATTERN = re.compile(r"(?:(encoder|decoder)\.)?([a-z_]+)(?:\.(\d+)(?:\s*[-–]\s*(\d+))?)?")


@dataclass(frozen=True, order=True)
class Site:
    """A hook point of one layer; sorts by space, hook point and integer layer."""

    space_rank: int = field(init=False, repr=False)
    """Position of the space in `SPACES`; only there to sort by."""
    hook_rank: int = field(init=False, repr=False)
    """Position of the hook point in `HOOKS`; only there to sort by."""
    hook: str
    """Name of the hook point, one of `HOOKS`."""
    layer: int
    """Number of the block, from 0."""
    space: str = ""
    """``"encoder"``, ``"decoder"``, or empty where the model has one space."""

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "space_rank", SPACES.index(self.space) if self.space in SPACES else -1
        )
        object.__setattr__(
            self, "hook_rank", HOOKS.index(self.hook) if self.hook in HOOKS else len(HOOKS)
        )

    def __str__(self) -> str:
        return f"{self.family}.{self.layer}"

    @property
    def family(self) -> str:
        """The site without its layer: ``mlp_post`` or ``encoder.mlp_post``."""
        return f"{self.space}.{self.hook}" if self.space else self.hook

    @property
    def folder(self) -> str:
        """Relative folder of the site's array: ``mlp_post/5`` or ``encoder/mlp_post/5``."""
        return f"{self.family.replace('.', '/')}/{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Return the site a name stands for.

        Parameters
        ----------
        text : str
            ``"mlp_post.5"``, ``"encoder.mlp_post.5"``, ``"embed"``, or the same place as
            TransformerLens, nnterp or Hugging Face name it: ``"blocks.5.mlp.hook_post"``,
            ``"layers_output[5]"``, ``"hidden_states[5]"`` (= ``resid_pre.5``).

        Raises
        ------
        SiteNotFound
            If the text names no hook point and layer.

        Examples
        --------
        >>> Site.parse("blocks.5.mlp.hook_post")
        Site(hook='mlp_post', layer=5, space='')
        """
        name = resolve_alias(text)
        match = _SITE.fullmatch(name)
        if not match or match[2] not in HOOKS:
            hint = did_you_mean(name.split(".")[0], HOOKS)
            raise SiteNotFound(
                f"{text!r} is not a site. A site is a hook point and a layer, such as "
                f"'mlp_post.5'; hook points are {', '.join(HOOKS)}.{hint}"
            )
        return cls(match[2], int(match[3]), match[1] or "")


def resolve_alias(text: str) -> str:
    """Return actstore's name for a name of TransformerLens, nnterp or Hugging Face."""
    text = text.strip()
    for pattern, name in _ALIASES:
        if match := pattern.fullmatch(text):
            return match.expand(name)
    return text


def select(
    wanted: str | Site | Iterable[str | Site] | None, available: Sequence[Site], where: str
) -> list[Site]:
    """Return the available sites that the wanted names or patterns stand for, sorted.

    Parameters
    ----------
    wanted : str, Site, iterable of these, or None
        ``"mlp_post"`` (all layers), ``"mlp_post.5"``, ``"mlp_post.2-4"``, aliases, several in one
        string separated by commas; None means all.
    available : sequence of Site
        What there is to choose from.
    where : str
        What has these sites, for the message: ``"runs/gpt2"``.

    Raises
    ------
    SiteNotFound
        If a name stands for none of the available sites.
    """
    if wanted is None:
        return sorted(available)
    if isinstance(wanted, (str, Site)):
        wanted = [wanted]
    names = [part for item in wanted for part in str(item).split(",") if part.strip()]
    chosen: set[Site] = set()
    for name in names:
        pattern = resolve_alias(name)
        found = [site for site in available if _matches(pattern, site)]
        ends = _RANGE.fullmatch(pattern)
        layers = {site.layer for site in found}
        if not found or (ends and not {int(ends[1]), int(ends[2])} <= layers):
            known = {site.family for site in available} | {str(site) for site in available}
            alone = _SITE.fullmatch(pattern)
            raise SiteNotFound(
                f"site {name.strip()!r} is not in {where}; it has {summarize(available)}."
                + (
                    (alone and alone[2] in HOOKS and _same_values(Site.parse(pattern), available))
                    or did_you_mean(name.strip(), sorted(known))
                )
            )
        chosen.update(found)
    if not chosen:
        raise SiteNotFound(f"no site was named; {where} has {summarize(available)}.")
    return sorted(chosen)


def _same_values(site: Site, available: Sequence[Site]) -> str:
    """Return where the values of a residual site stand under another name, if they do."""
    after = Site("resid_post", site.layer - 1, site.space)
    if site.hook == "resid_pre" and after in available:
        return f" The same values are stored as '{after}'."
    return ""


def _matches(pattern: str, site: Site) -> bool:
    match = _PATTERN.fullmatch(pattern)
    if not match or match[2] != site.hook or (match[1] and match[1] != site.space):
        return False
    if match[3] is None:
        return True
    first = int(match[3])
    last = int(match[4]) if match[4] else first
    return first <= site.layer <= last


def summarize(sites: Iterable[Site]) -> str:
    """Return sites as people write them: ``"mlp_post.0–5, resid_pre.0"``."""
    layers: dict[str, list[int]] = {}
    for site in sorted(sites):
        layers.setdefault(site.family, []).append(site.layer)
    parts = []
    for family, numbers in layers.items():
        start = previous = numbers[0]
        runs = []
        for number in [*numbers[1:], None]:
            if number is not None and number == previous + 1:
                previous = number
                continue
            last = "" if start == previous else f"–{previous}"
            runs.append(f"{family}.{start}{last}")
            if number is not None:
                start = previous = number
        parts.append(", ".join(runs))
    return ", ".join(parts)
