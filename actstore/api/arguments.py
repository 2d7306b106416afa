"""What arguments may be, and what they become before anything is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from actstore.site import Site
from actstore.store.budget import as_count

if TYPE_CHECKING:
    from actstore.exporting import Shown

Sites = str | Site | Iterable[str | Site] | None
"""Sites as names, patterns or objects; None is all, or what the call says."""
Keep = str | float | Mapping[str, str | float] | None
"""What of the rows is stored, of all sites or by site."""


def listed(sites: Sites) -> Sites:
    """Return sites that can be gone through twice."""
    return sites if sites is None or isinstance(sites, (str, Site)) else list(sites)


def settings(
    sites: Sites,
    dtype: str,
    context: int | None,
    overlap: int | None,
    batch_tokens: int | None,
    max_tokens: int | None,
    max_document_tokens: int | None,
    keep: Keep,
    grams: Sites,
) -> Any:
    """Return the settings of a capture."""
    from actstore.capturing import Limits, Settings

    for name, value in (
        ("context", context),
        ("overlap", overlap),
        ("batch_tokens", batch_tokens),
        ("max_tokens", max_tokens),
        ("max_document_tokens", max_document_tokens),
    ):
        if value is not None:
            as_count(name, value, 0, 2**62)
    wanted = [sites] if isinstance(sites, (str, Site)) else sites
    folded = [grams] if isinstance(grams, (str, Site)) else grams or ()
    return Settings(
        None if wanted is None else tuple(wanted),
        dtype,
        context,
        overlap,
        batch_tokens,
        Limits(max_tokens, max_document_tokens),
        keep,
        tuple(map(str, folded)),
    )


def shown(k: int, n_bins: int, n_each: int, n_random: int, before: int, after: int) -> Shown:
    """Return how many rows an export shows, and how much around them."""
    from actstore.exporting import Shown

    return Shown(
        as_count("k", k, 0),
        as_count("n_bins", n_bins, 1),
        as_count("n_each", n_each, 1),
        as_count("n_random", n_random, 0),
        as_count("before", before, 0),
        as_count("after", after, 0),
    )
