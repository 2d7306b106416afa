"""Keeping all rows, none, or one sample of them: what is stored, what is the same all the same."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tensorstore
import zarr
from click.testing import CliRunner

import actstore.bfloat16  # noqa: F401 - teaches zarr-python the data type
from actstore.api import Store
from actstore.capturing import Limits, Settings, keep, run, run_capture
from actstore.capturing.corpus import open_corpus
from actstore.capturing.keep import choose_keeps, named_keeps, projected_rows
from actstore.capturing.run import bytes_needed, new_meta
from actstore.capturing.sampled import SampledBands, sampled_bytes
from actstore.capturing.worker import spare_bands
from actstore.cli import main
from actstore.decompose import nmf, similarity
from actstore.errors import (
    ArgumentError,
    BudgetExceeded,
    DamagedFile,
    RowNotFound,
    SiteNotFound,
    StoreMismatch,
)
from actstore.models import LanguageModel, load
from actstore.site import Site, select
from actstore.store import FIRST, SPECIAL, CoreStore, Rows, StoreMeta
from tests.captured import DOCUMENTS, Captured, all_tokens, stored_bytes
from tests.toys import toy_model

KEEPS: list[Any] = [
    2**-2,
    "2^-6",
    {"mlp_post": "1/4", "resid_post.1": "1/2", "resid_post.2": "none"},
    "none",
]


@pytest.fixture(scope="module", params=[("bert", "auto"), ("gpt2", "bfloat16")])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that captures with some `keep`; the widths are not all whole chunks."""
    kind, dtype = request.param
    model = load(*toy_model(kind, ffn=302))
    path = tmp_path_factory.mktemp("kept")
    done: dict[str, CoreStore] = {}

    def capture_with(kept: Any) -> CoreStore:
        if str(kept) not in done:
            with (
                mock.patch.object(run, "segment_rows", return_value=64),
                mock.patch.object(run, "chunk_rows", return_value=16),
            ):
                settings = Settings(context=24, batch_tokens=96, dtype=dtype, keep=kept)
                done[str(kept)], _ = run_capture(
                    model, DOCUMENTS, path / str(len(done)), settings=settings
                )
        return done[str(kept)]

    return capture_with


def bits(values: np.ndarray) -> np.ndarray:
    """Return values as unsigned integers of their size."""
    return values.view(f"u{values.dtype.itemsize}")


def content_rows(store: CoreStore, segment: int) -> np.ndarray:
    """Return the row_ids of the content rows of a segment, read past the store's own readers."""
    tokens = all_tokens(store)
    ids, flags = tokens["row_id"].to_numpy(), tokens["flags"].to_numpy()
    return ids[((flags & (SPECIAL | FIRST)) == 0) & (ids // store.meta.segment_rows == segment)]


@pytest.mark.parametrize("kept", KEEPS, ids=str)
def test_what_is_kept_is_what_a_capture_of_all_keeps_there(made: Any, kept: Any) -> None:
    """The stored rows are so many content rows of each segment, and hold the same bits."""
    whole, store = made("all"), made(kept)
    assert store.planned == whole.planned
    for info in store.meta.sites:
        ids = store[info.site].row_ids()
        expected = 0
        for segment in store.committed:
            content = content_rows(store, segment)
            mine = ids[ids // store.meta.segment_rows == segment]
            if info.keep < 1:
                assert set(mine) <= set(content)
                assert len(mine) == math.ceil(len(content) * info.keep)
            expected += len(mine)
        assert len(ids) == expected == (len(ids) if info.keep < 1 else store.n_rows())
        assert np.array_equal(bits(store[info.site][ids]), bits(whole[info.site][ids]))
        if info.keep > 0:
            assert np.array_equal(bits(store[info.site][:]), bits(whole[info.site][ids]))
            some = np.random.default_rng(5).permutation(ids)[: len(ids) // 2]
            assert np.array_equal(bits(store[info.site][some]), bits(whole[info.site][some]))


@pytest.mark.parametrize("kept", KEEPS, ids=str)
def test_index_and_tokens_do_not_depend_on_what_is_kept(made: Any, kept: Any) -> None:
    """Statistics and exemplars are of every row: the same bytes."""

    def beside_rows(store: CoreStore) -> dict[str, bytes]:
        names = ("activations/", "stored_rows/")
        return {n: data for n, data in stored_bytes(store).items() if not n.startswith(names)}

    assert beside_rows(made(kept)) == beside_rows(made("all"))


def test_samples_are_nested_and_the_same_at_all_sites(made: Any) -> None:
    """A smaller fraction's rows are among a larger one's, also across stores."""
    mixed = made(KEEPS[2])
    half, quarter = (set(mixed[site].row_ids()) for site in ("resid_post.1", "mlp_post.2"))
    assert set(made("2^-6")["mlp_post.0"].row_ids()) < quarter < half
    assert set(made(2**-2)["resid_post.1"].row_ids()) == quarter
    assert mixed["resid_pre.0"].row_ids().tolist() == made("all")["mlp_post.0"].row_ids().tolist()


def test_zarr_readers_find_the_samples(made: Any) -> None:
    """Arrays of S x 2^-j rows a segment, the stored rows in order, then NaN; nothing for none."""
    store = made(KEEPS[2])
    group = zarr.open_group(store.path, mode="r")
    for info in store.meta.sites:
        if info.keep == 0:
            assert not (store.path / info.path).exists()
            continue
        rows = int(64 * info.keep)
        array = group[info.path]
        spec = {"driver": "file", "path": str(store.path / info.path)}
        other = tensorstore.open({"driver": "zarr3", "kvstore": spec}).result()
        assert array.shape == other.shape == (len(store.planned) * rows, info.width)
        for values in (np.asarray(array[:]), np.asarray(other[:].read().result())):
            for segment in store.committed:
                shard = values[segment * rows : (segment + 1) * rows]
                ids = segment * 64 + store.stored_offsets(info, segment)
                assert np.array_equal(bits(shard[: len(ids)]), bits(store[info.site][ids]))
                assert np.isnan(shard[len(ids) :].astype(np.float32)).all()


def test_the_file_says_what_is_stored(made: Any) -> None:
    """Offsets stand in one file for each fraction and segment, which the commit vouches for."""
    store = made(KEEPS[2])
    for info in store.meta.sites:
        if not 0 < info.keep < 1:
            continue
        for segment in store.committed:
            name = f"stored_rows/{round(-math.log2(info.keep))}/{segment:08d}.npy"
            assert name in store.commit_of(segment).files
            offsets = np.load(store.path / name)
            assert offsets.dtype == np.uint32
            ids = store[info.site].row_ids(slice(segment * 64, (segment + 1) * 64))
            assert (offsets + segment * 64).tolist() == ids.tolist()
    folders = {path.name for path in (store.path / "stored_rows").iterdir()}
    assert folders == {"1", "2"}


def test_a_damaged_sample_is_found(toy_capture: Callable[..., Captured]) -> None:
    """A flipped bit in the file of the stored rows is found before a value is read by it."""
    store = toy_capture(keep="1/4").store
    file = store.path / "stored_rows/2/00000001.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedFile, match=r"stored_rows/2/00000001\.npy in .* has changed"):
        CoreStore(store.path)["mlp_post.0"][:]


def test_rows_that_are_not_stored_are_refused_by_name_and_skipped_in_slices(made: Any) -> None:
    """An unkept row asked for raises, with what computes it; a slice leaves it out."""
    store = made(2**-2)
    site = store["mlp_post.1"]
    ids = site.row_ids()
    everything = made("all")["mlp_post.1"].row_ids()
    unkept = int(np.setdiff1d(everything, ids)[7])
    remedy = r"store\.replay\(rows, sites\) computes any rows again from the stored tokens"
    for wanted in (unkept, [int(ids[3]), unkept]):
        with pytest.raises(RowNotFound, match=rf"row_id = {unkept} is not stored at .*{remedy}"):
            site[wanted]
    with pytest.raises(RowNotFound, match=r"which keeps 1/4 of the content rows: those that"):
        site[unkept]
    with pytest.raises(RowNotFound, match="is a hole"):
        site[store.planned[0].rows[""]]
    low, high = int(ids[5]) + 1, int(ids[40])
    expected = [i for i in ids if low <= i < high]
    assert site.row_ids(slice(low, high)).tolist() == expected
    assert np.array_equal(bits(site[low:high]), bits(made("all")["mlp_post.1"][expected]))
    assert (
        repr(site) == f"<mlp_post.1: 1/4 of {store.n_rows()} rows x 302 neurons, {site.info.dtype}>"
    )


def test_a_site_without_rows_says_so(made: Any) -> None:
    """Reading what was never kept raises, however it is asked for."""
    store = Store(made("none").path)
    site = store["mlp_post.1"]
    assert site.row_ids().tolist() == []
    assert site[[]].shape == (0, 302)
    for read in (
        lambda: site[0],
        lambda: site[0:5],
        lambda: store.dask("mlp_post.1"),
        lambda: store.read(site.info, 0, 0, 1),
        lambda: store.read_column(site.info, 0, 0),
    ):
        with pytest.raises(RowNotFound, match=r"no rows of mlp_post\.1 are stored .*store\.replay"):
            read()
    assert store.n_bytes() == 0
    assert not (store.path / "activations").exists()
    assert not (store.path / "stored_rows").exists()


def test_dask_and_columns_hold_the_stored_rows(made: Any) -> None:
    """The plain array and its row_ids agree, and so does a column."""
    store = Store(made(2**-2).path)
    array, ids = store.dask("mlp_post.1")
    assert ids.tolist() == store["mlp_post.1"].row_ids().tolist()
    assert array.shape == (len(ids), 302)
    values = array.compute()
    assert np.array_equal(bits(values), bits(store["mlp_post.1"][:]))
    columns = [store.read_column(store.site("mlp_post.1"), s, 301) for s in store.committed]
    assert np.array_equal(bits(np.concatenate(columns)), bits(values[:, 301]))


def test_factors_and_similarity_are_those_of_the_stored_rows(tmp_path: Path) -> None:
    """NMF and CKA of a sampled store are those of a whole one on the same rows, to the bit."""
    model = load(*toy_model("gpt2"))
    stores = {}
    for kept in ("all", "1/2"):
        settings = Settings(context=24, batch_tokens=96, keep=kept)
        with (
            mock.patch.object(run, "segment_rows", return_value=128),
            mock.patch.object(run, "chunk_rows", return_value=32),
        ):
            stores[kept], _ = run_capture(
                model, DOCUMENTS * 3, tmp_path / kept.replace("/", "-"), settings=settings
            )
    sampled, whole = stores["1/2"], stores["all"]
    ids = sampled["mlp_post.0"].row_ids()
    rows = Rows.from_row_ids("the same", whole.meta.segment_rows, ids)

    factors, expected = nmf(sampled, "mlp_post", 3), nmf(whole, "mlp_post", 3, rows=rows)
    assert factors.summary["rows"] == "content, 1/2 of the content rows stored"
    assert factors.summary["n_rows"] == len(ids)
    assert np.array_equal(factors.loadings, expected.loadings)
    everything = whole["mlp_post.0"].row_ids()
    scores = factors.scores(everything)
    assert np.array_equal(scores, expected.scores(everything), equal_nan=True)
    assert np.array_equal(everything[~np.isnan(scores[:, 0])], ids)
    shards = (factors.result.path / "scores/c").rglob("0")
    assert max(f.stat().st_size for f in shards if f.is_file()) < 1000, "64 of 128 rows"

    found, expected = similarity(sampled, None), similarity(whole, None, rows=rows)
    assert found.summary["rows"] == "content, 1/2 of the content rows stored"
    table, other = (s.to_arrow()["value"].to_numpy() for s in (found, expected))
    assert np.array_equal(table, other)


def test_a_capture_goes_on_with_what_it_keeps(
    toy_capture: Callable[..., Captured], toy_bert: LanguageModel
) -> None:
    """Called again without keep, or with the same, it goes on; another is refused."""
    store = toy_capture(keep={"mlp_post": "1/4"}).store
    before = stored_bytes(store)
    (store.path / "commits/00000003.json").unlink()
    toy_capture()
    for same in ({"mlp_post": 2**-2}, "mlp_post=1/4,resid_post=all"):
        toy_capture(keep=same)
    again = stored_bytes(store)
    assert {n: d for n, d in again.items() if "/newest/" not in n} == {
        n: d for n, d in before.items() if "/newest/" not in n
    }
    with pytest.raises(StoreMismatch, match=r"another keep of mlp_post\.0: it has 1/4, now .* all"):
        toy_capture(keep="all")
    with pytest.raises(
        StoreMismatch, match=r"another keep of resid_post\.2: it has all, now .* no"
    ):
        toy_capture(keep={"resid_post.2": "none"})


def test_fractions_are_named_by_site(toy_bert: LanguageModel) -> None:
    """One for all, or one for some sites and patterns, of which the last that fits counts."""
    sites = list(toy_bert.points)
    mlp, resid = select("mlp_post", sites, ""), select("resid_post", sites, "")
    assert named_keeps(None, sites, "it") == {}
    assert named_keeps("1/8", sites, "it") == dict.fromkeys(sites, 1 / 8)
    text = "mlp_post=1/64, resid_post=all ,mlp_post.1=none"
    mapping = {"mlp_post": 2**-6, "resid_post": 1, "mlp_post.1": "none"}
    expected = dict.fromkeys(mlp, 1 / 64) | dict.fromkeys(resid, 1.0) | {Site("mlp_post", 1): 0.0}
    assert named_keeps(text, sites, "it") == named_keeps(mapping, sites, "it") == expected
    with pytest.raises(SiteNotFound, match=r"'mlp_pots' is not in it.*Did you mean 'mlp_post'"):
        named_keeps("mlp_pots=1/2", sites, "it")
    with pytest.raises(ArgumentError, match=r"names no site for '1/2'; expected one fraction for"):
        named_keeps("mlp_post=1/4,1/2", sites, "it")
    with pytest.raises(
        ArgumentError, match=r"keep = 'half' is not 'all', 'none' or a power of two"
    ):
        named_keeps("mlp_post=half", sites, "it")


def test_what_a_corpus_would_take_is_projected_as_far_as_it_is_known(tmp_path: Path) -> None:
    """Bytes of text make tokens; a limit caps them; of a stream nothing is known but its limit."""
    texts, stream = open_corpus(["12345678" * 100]), open_corpus(iter(["a"]))
    assert projected_rows(texts, Limits()) == 200
    assert projected_rows(texts, Limits(max_tokens=77)) == 77
    assert projected_rows(texts, Limits(max_tokens=7777)) == 200
    assert projected_rows(texts, Limits(max_document_tokens=50)) == 50
    (tmp_path / "long.txt").write_text("x" * 400)
    (tmp_path / "short.txt").write_text("x" * 40)
    files = open_corpus(tmp_path)
    assert projected_rows(files, Limits()) == 110
    assert projected_rows(files, Limits(max_document_tokens=50)) == 60
    assert projected_rows(stream, Limits()) is None
    assert projected_rows(stream, Limits(max_tokens=77)) == 77


def test_above_ten_gigabytes_a_sample_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user names stands; the rest becomes 2^-8, with a warning that says why."""
    sites = {Site("mlp_post", 0): 30_000, Site("resid_post", 0): 10_000}
    corpus = open_corpus(["x" * 4_000_000])  # a million tokens: 40 GB
    with pytest.warns(
        UserWarning, match=r"1/256 of the rows of mlp_post\.0, resid_post\.0 is kept"
    ):
        assert set(choose_keeps(None, sites, corpus, Limits(), "it").values()) == {2**-8}
    with pytest.warns(UserWarning, match=r"take about 40 GB, and above 10 GB a .* keep='all'"):
        found = choose_keeps({"resid_post": "all"}, sites, corpus, Limits(), "it")
    assert found == {Site("mlp_post", 0): 2**-8, Site("resid_post", 0): 1.0}
    for kept, limits in [
        ("all", Limits()),
        (None, Limits(max_tokens=249_000)),
        ({"mlp_post": "1/64"}, Limits(max_tokens=900_000)),
    ]:
        assert 2**-8 not in choose_keeps(kept, sites, corpus, limits, "it").values()


def test_the_default_is_told(
    texts_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line prints what it keeps, and why, to stderr; info and estimate show it."""
    monkeypatch.setattr(keep, "DEFAULT_BYTES", 1000)
    arguments = ["capture", str(model_folder), str(texts_folder), str(tmp_path / "s")]
    dry = CliRunner().invoke(main, [*arguments, "--context", "16", "--dry-run"])
    ran = CliRunner().invoke(main, [*arguments, "--context", "16"])
    for result in (dry, ran):
        assert result.exit_code == 0, result.output
        assert "warning: 1/256 of the rows of " in result.stderr
        assert "Give keep='all' (--keep all) to keep every row." in result.stderr
        assert "kept       1/256" in result.stdout
    assert CoreStore(tmp_path / "s").meta.keep == "1/256"
    arguments[-1] = str(tmp_path / "all")
    told = CliRunner().invoke(main, [*arguments, "--context", "16", "--keep", "mlp_post=none,"])
    assert told.exit_code == 1
    assert "names no site for ''" in told.stderr
    told = CliRunner().invoke(main, [*arguments, "--context", "16", "--keep", "all"])
    assert "warning" not in told.stderr
    assert "kept       all" in told.stdout


def test_segments_are_sized_by_what_is_kept(
    minilm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes kept of a row decide: where a sample is kept, or nothing, segments are longer."""
    monkeypatch.setattr("actstore.capturing.run.SEGMENT_BYTES", 2**29)
    corpus = open_corpus(["x" * 10**6])
    sizes = {}
    fractions = {"all": 1.0, "1/4": 2**-2, "1/256": 2**-8, "none": 0.0}
    for kept, fraction in fractions.items():
        meta = new_meta(minilm, corpus, Settings(keep=kept), 2**30)
        sizes[kept] = meta.segment_rows
        assert meta.keep == kept
        assert {info.keep for info in meta.sites} == {fraction}
    assert sizes == {"all": 16_384, "1/4": 65_536, "1/256": 65_536, "none": 65_536}


@pytest.mark.parametrize("kept", ["1/2", "1/256", {"mlp_post": "1/2"}])
def test_the_bands_of_samples_are_in_the_budget(kept: Any, minilm: LanguageModel) -> None:
    """What is chosen for a budget fits it, and what is held for samples is counted."""
    corpus = open_corpus(["x" * 10**6])
    for budget in (2**28, 2**29, 2**31):
        meta = new_meta(minilm, corpus, Settings(keep=kept, dtype="float16"), budget)
        assert spare_bands(meta, budget) >= 3
    whole = replace(meta, sites=tuple(replace(info, keep=1.0) for info in meta.sites))
    held = sum(band.nbytes for band in SampledBands(meta)._bands.values())
    assert least_budget(meta) - least_budget(whole) == sampled_bytes(meta) == held > 0


def least_budget(meta: StoreMeta) -> int:
    """Return the smallest budget that a capture can be made within."""

    def refused(budget: int) -> bool:
        try:
            return spare_bands(meta, budget) < 1
        except BudgetExceeded:
            return True

    return bisect.bisect_left(range(2**33), True, key=lambda budget: not refused(budget))


def test_the_bytes_that_are_asked_of_the_disk_suffice(made: Any) -> None:
    """What is refused before the capture is what would not fit: little more than is written."""
    for kept in ["all", *KEEPS]:
        store = made(kept)
        index = bytes_needed(store, [])
        needed = bytes_needed(store, store.planned) - index
        content = store.rows().n_rows / store.n_rows()
        assert store.n_bytes() <= needed <= store.n_bytes() / content * 1.5


@pytest.mark.parametrize("rows", [2, 1])
def test_segments_without_content_store_nothing(
    toy_gpt2: LanguageModel, tmp_path: Path, rows: int
) -> None:
    """Where every token is the first of its window there is nothing to sample."""
    words = ["war"] * 20
    first = toy_gpt2.encode("war").ids[:1]
    assert len(first) == 1
    settings = Settings(context=8, keep="1/2", limits=Limits(max_document_tokens=rows))
    with (
        mock.patch.object(run, "segment_rows", return_value=8),
        mock.patch.object(run, "chunk_rows", return_value=4),
    ):
        store, _ = run_capture(toy_gpt2, words, tmp_path / "s", settings=settings)
    n_content = store.rows().n_rows
    ids = store["mlp_post.0"].row_ids()
    assert (len(ids) > 0) == (n_content > 0) == (rows > 1 and len(toy_gpt2.encode("war").ids) > 1)
    assert store["mlp_post.0"][:].shape == (len(ids), 64)
    assert Store(store.path).dask("mlp_post.0")[0].compute().shape == (len(ids), 64)
    columns = [store.read_column(store.site("mlp_post.0"), s, 0) for s in store.committed]
    assert sum(map(len, columns)) == len(ids)
