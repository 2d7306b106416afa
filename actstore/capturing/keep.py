"""How much of the rows each site keeps: what the user named, and a default that disks can hold."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from actstore.capturing.corpus import Corpus
from actstore.capturing.plan import Limits
from actstore.errors import ArgumentError
from actstore.site import Site, select, summarize
from actstore.store import SiteInfo
from actstore.store.stored_rows import ALL, keep_text, parse_keep

DEFAULT_BYTES = 10 * 10**9
"""Where all rows would take more, `DEFAULT_SAMPLE` of them is the default."""

DEFAULT_SAMPLE = 2.0**-8
"""The part of the rows that is then kept."""

_TOKEN_BYTES = 4  # of text, on average


def named_keeps(keep: Any, sites: Sequence[Site], where: str) -> dict[Site, float]:
    """Return what part of its rows each site keeps, as far as the user names it.

    Parameters
    ----------
    keep : str, float, mapping or None
        One fraction for all sites: ``"all"``, ``"none"``, ``2**-8``, ``"1/256"``; or one for each
        of some sites or patterns, as a mapping or as ``"mlp_post=1/64,resid_post=all"``, of which
        the last that names a site counts.
    sites : sequence of Site
        The sites there are.
    where : str
        What has them, for messages.

    Raises
    ------
    ArgumentError
        If a fraction is none.
    SiteNotFound
        If a name stands for none of the sites.
    """
    if keep is None:
        return {}
    if isinstance(keep, str) and "=" in keep:
        keep = dict(_named(part, keep) for part in keep.split(","))
    if not isinstance(keep, Mapping):
        return dict.fromkeys(sites, parse_keep(keep))
    found: dict[Site, float] = {}
    for pattern, fraction in keep.items():
        found |= dict.fromkeys(select(pattern, sites, where), parse_keep(fraction))
    return found


def _named(part: str, keep: str) -> tuple[str, str]:
    name, equals, fraction = part.partition("=")
    if not equals:
        raise ArgumentError(
            f"keep = {keep!r} names no site for {part.strip()!r}; expected one fraction for all "
            "sites, or pieces such as 'mlp_post=1/64,resid_post=all'."
        )
    return name.strip(), fraction.strip()


def choose_keeps(
    keep: Any, row_bytes: Mapping[Site, int], corpus: Corpus, limits: Limits, where: str
) -> dict[Site, float]:
    """Return what part of its rows each site keeps; warn where that is not what one would expect.

    Sites that the user does not name keep all, or `DEFAULT_SAMPLE` if that would take more than
    `DEFAULT_BYTES`, as far as the corpus tells its size.

    Parameters
    ----------
    keep : str, float, mapping or None
        As for `named_keeps`.
    row_bytes : mapping of Site to int
        The sites, and the bytes a row takes at each.
    corpus, limits : Corpus, Limits
        What will be captured.
    where : str
        The model, for messages.
    """
    named = named_keeps(keep, list(row_bytes), where)
    unnamed = [site for site in row_bytes if site not in named]
    keeps = {site: named.get(site, ALL) for site in row_bytes}
    rows = projected_rows(corpus, limits)
    if rows is None or not unnamed:
        return keeps
    projected = rows * sum(row_bytes[site] * keeps[site] for site in row_bytes)
    if projected > DEFAULT_BYTES:
        keeps |= dict.fromkeys(unnamed, DEFAULT_SAMPLE)
        warnings.warn(
            f"{keep_text(DEFAULT_SAMPLE)} of the rows of {summarize(unnamed)} is kept: all of them "
            f"would take about {projected / 1e9:,.0f} GB, and above {DEFAULT_BYTES / 1e9:.0f} GB a "
            "sample is the default. Statistics and exemplars cover every row all the same. Give "
            "keep='all' (--keep all) to keep every row.",
            stacklevel=2,
        )
    return keeps


def projected_rows(corpus: Corpus, limits: Limits) -> int | None:
    """Return about how many rows a corpus will have at most; None if nobody knows."""
    most = limits.max_document_tokens
    n_bytes = corpus.text_bytes(None if most is None else most * _TOKEN_BYTES)
    known = [] if n_bytes is None else [n_bytes // _TOKEN_BYTES]
    known += [] if limits.max_tokens is None else [limits.max_tokens]
    return min(known, default=None)


def describe_keeps(infos: Iterable[SiteInfo]) -> str:
    """Return what sites keep: ``"all"``, or ``"mlp_post.0–5=1/64, resid_post.0–5=all"``."""
    by_keep: dict[float, list[Site]] = {}
    for info in infos:
        by_keep.setdefault(info.keep, []).append(info.site)
    if len(by_keep) == 1:
        return keep_text(next(iter(by_keep)))
    return ", ".join(f"{summarize(sites)}={keep_text(keep)}" for keep, sites in by_keep.items())
