"""Sites: parsing, printing, sorting, choosing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import SiteNotFound
from actstore.site import HOOKS, SPACES, Site, resolve_alias, select, summarize

SITES = st.builds(Site, st.sampled_from(HOOKS), st.integers(0, 130), st.sampled_from(["", *SPACES]))
MODEL = [Site(hook, layer) for hook in HOOKS for layer in range(12)]


@given(SITES)
def test_parse_is_the_inverse_of_print(site: Site) -> None:
    """A site's name stands for that site."""
    assert Site.parse(str(site)) == site
    assert Site.parse(f"  {site} ") == site
    assert str(site).endswith(f".{site.layer}")
    assert site.folder == str(site).replace(".", "/")


@given(st.lists(SITES))
def test_layers_sort_as_integers(sites: list[Site]) -> None:
    """Space, then hook point in the order of a block, then layer: 2 before 10."""
    keys = [
        (["", *SPACES].index(site.space), HOOKS.index(site.hook), site.layer)
        for site in sorted(sites)
    ]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("embed", "resid_pre.0"),
        ("embeddings", "resid_pre.0"),
        ("blocks.11.mlp.hook_post", "mlp_post.11"),
        ("blocks.3.hook_resid_pre", "resid_pre.3"),
        ("blocks.3.hook_resid_post", "resid_post.3"),
        ("layers_input[4]", "resid_pre.4"),
        ("layers_output[4]", "resid_post.4"),
        ("hidden_states[4]", "resid_pre.4"),
        ("mlp_post.4", "mlp_post.4"),
    ],
)
def test_names_of_other_libraries_are_known(alias: str, name: str) -> None:
    """TransformerLens, nnterp and Hugging Face names stand for the same place."""
    assert resolve_alias(alias) == name
    assert str(Site.parse(alias)) == name


@pytest.mark.parametrize(
    "text", ["mlp_pots.5", "mlp_post", "mlp_post.x", "mlp_post.-1", "", "5", "left.mlp_post.5"]
)
def test_what_is_no_site_is_refused(text: str) -> None:
    """The message says what a site looks like, and the hook points there are."""
    with pytest.raises(SiteNotFound, match=r"is not a site.*'mlp_post.5'.*resid_pre, mlp_post"):
        Site.parse(text)
    with pytest.raises(KeyError):
        Site.parse(text)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, "resid_pre.0–11, mlp_post.0–11, resid_post.0–11"),
        ("mlp_post", "mlp_post.0–11"),
        ("mlp_post.11", "mlp_post.11"),
        ("mlp_post.1", "mlp_post.1"),
        ("mlp_post.2-4", "mlp_post.2–4"),
        ("mlp_post.2–4", "mlp_post.2–4"),
        ("mlp_post.10-11", "mlp_post.10–11"),
        ("embed, mlp_post.3, mlp_post.1", "resid_pre.0, mlp_post.1, mlp_post.3"),
        (["mlp_post.3", Site("resid_post", 0), "mlp_post.2-3"], "mlp_post.2–3, resid_post.0"),
        (Site("resid_post", 7), "resid_post.7"),
    ],
)
def test_patterns_choose_sites(wanted: object, chosen: str) -> None:
    """Names, families, ranges, aliases, lists of them; the answer is sorted, none twice."""
    found = select(wanted, MODEL, "gpt2")
    assert summarize(found) == chosen
    assert found == sorted(set(found))


def test_spaces_are_told_apart() -> None:
    """Without a space a pattern stands for both; with one, for its own."""
    sites = [Site("mlp_post", layer, space) for space in SPACES for layer in range(2)]
    assert len(select("mlp_post.1", sites, "t5")) == 2
    assert summarize(select("decoder.mlp_post", sites, "t5")) == "decoder.mlp_post.0–1"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("mlp_pots", r"'mlp_pots' is not in gpt2; it has resid_pre.0–11, .* mean 'mlp_post'\?"),
        ("mlp_post.12", r"'mlp_post.12' is not in gpt2; .*mlp_post.0–11.* Did you mean 'mlp_post"),
        ("mlp_pots.5", r"Did you mean 'mlp_post.5'\?"),
        ("mlp_post.5-3", "is not in gpt2"),
        ("mlp_post.10-30", "'mlp_post.10-30' is not in gpt2; it has .*mlp_post.0–11"),
        ("encoder.mlp_post.5", "is not in gpt2"),
        ("attention", r"it has resid_pre.0–11, mlp_post.0–11, resid_post.0–11\.$"),
        ([], "no site was named"),
        (" , ", "no site was named"),
    ],
)
def test_what_the_model_lacks_is_refused_with_what_it_has(wanted: object, message: str) -> None:
    """A site or layer that is not there names what is, and the nearest name."""
    with pytest.raises(SiteNotFound, match=message):
        select(wanted, MODEL, "gpt2")


@given(st.sets(SITES, min_size=1))
def test_summaries_name_every_site(sites: set[Site]) -> None:
    """What a summary says, read back as patterns, is the sites it was made of."""
    text = summarize(sites)
    found = [site for part in text.split(", ") for site in sites if _covers(part, site)]
    assert sorted(found) == sorted(sites)


def _covers(part: str, site: Site) -> bool:
    family, _, layers = part.rpartition(".")
    first, _, last = layers.partition("–")
    return family == site.family and int(first) <= site.layer <= int(last or first)


def test_a_hidden_state_under_another_name_is_pointed_to() -> None:
    """Where resid_pre.i was not kept, resid_post.(i-1) holds the same values."""
    kept = [Site("resid_pre", 0), Site("resid_post", 0), Site("resid_post", 1)]
    with pytest.raises(SiteNotFound, match=r"The same values are stored as 'resid_post\.0'"):
        select("hidden_states[1]", kept, "gpt2")
