"""One fit of many dictionaries: a start from samples, online passes, batch passes, an exact pass.

1. *Start* (`start`), in this process: each seed has a sample of its own, which lies in memory.
2. *Online passes* over mixed rows (`online`), in super-steps that follow from the data alone.  The
   first leaves out as many rows as a sample has, so that both together are one read.
3. *Batch passes*, only where a tolerance is asked for: P and Q of all rows for fixed loadings,
   whose projected gradient says whether to go on.
4. *Exact pass* (`exact`) in row order.  The loadings stay; codes are solved to convergence and
   become the scores; error and certificates follow without a residual being formed.

After each super-step the state is what there is to go on from, and is saved every few seconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.checkpoint import Checkpoint
from actstore.decompose.clock import Clock
from actstore.decompose.engine import Engine, Sums
from actstore.decompose.exact import Exact, ExactWork
from actstore.decompose.matrix import Matrix
from actstore.decompose.online import Dictionary, SurrogateWork, product_dtype, take
from actstore.decompose.scan import BLOCK_ROWS, Form, Range, Sample, Scan
from actstore.decompose.start import Start, n_tried

SAMPLE_ROWS = 16_384
_WHOLE_ROWS = 32_768  # so few are a sample by themselves
_START_ROUNDS = 6
_TRIED_SWEEPS = 12  # so that what ends lower is told from what only gets there sooner
_WHOLE_ROUNDS = 14
_COMPARED_ROUNDS = 12
_SAMPLE_BYTES = 2**30
_LEAST_SAMPLE_ROWS = 4096
_STEPS = 64  # of an online pass
_STEP_ROWS = 1024  # at least
_RANGES = 16  # of a step, where it has so many blocks
_ONLINE_SWEEPS = 6
_IMPROVE_SWEEPS = 1
_FORGETTING = 2  # the surrogate is about half of the rows so far, the later ones
_BATCH_SWEEPS = 100
_BATCH_TOLERANCE = 1e-5
_REVIVING_ROWS = 512

State = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Settings:
    """What decides a fit, beside its rows."""

    fits: tuple[tuple[int, int], ...]
    """Number of factors and seed of each dictionary."""
    equal_energy: bool
    """Whether sites are scaled to equal energy."""
    active: float | None
    """The share of scores of a row that may be above zero; given for signed loadings only."""
    passes: int
    """Online passes."""
    tolerance: float | None
    """The KKT residual to run to."""
    max_passes: int
    """Batch passes at most."""

    @property
    def n_active(self) -> list[int | None]:
        """For each dictionary, the scores of a row that may be above zero; None is all."""
        if self.active is None:
            return [None] * len(self.fits)
        return [max(1, math.ceil(self.active * k)) for k, _ in self.fits]

    @property
    def tries(self) -> bool:
        """Whether the best of several beginnings is taken: with signed loadings, or more passes."""
        return self.active is not None or self.passes > 1

    @property
    def n_stacked(self) -> int:
        """Components that are worked on at a time, at most."""
        tried = [k * n_tried(k, signed=self.active is not None) for k, _ in self.fits]
        return max([sum(k for k, _ in self.fits), *(tried if self.tries else [])])


class Fit:
    """Many dictionaries of one scan, from their start to their certificates.

    Parameters
    ----------
    scan : Scan
        What serves the rows.
    settings : Settings
        What to fit.
    engine : Engine
        Where scans run.
    checkpoint : Checkpoint, optional
        Where the state is kept, entered; `run` needs one.
    clock : Clock
        Told of every stage.
    start : Tensor (k, width), optional
        Loadings to start from, for all dictionaries; before online passes improved on a sample.
    """

    def __init__(
        self,
        scan: Scan,
        settings: Settings,
        engine: Engine,
        checkpoint: Checkpoint | None,
        clock: Clock,
        start: torch.Tensor | None,
    ) -> None:
        self._scan = scan
        self._settings = settings
        self._engine = engine
        self._checkpoint = checkpoint
        self._clock = clock
        self._start = start
        self._mean = torch.zeros(scan.width, dtype=torch.float64)  # the sum of rows
        self._n_summed = 0
        self._n_done = {"online": 0, "batch": 0, "exact": 0}
        self.rows_read = 0
        """Rows read so far, each time they were."""
        self.n_batch_passes = 0
        """Batch passes made."""
        self.at_once = at_once(scan, sum(k for k, _ in settings.fits))
        """Threads that work on ranges in this process."""
        n_threads = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(n_threads, "actstore-improve")

    def run(self) -> list[Exact]:
        """Run the fit, or what is left of it; return what is known of each dictionary."""
        assert self._checkpoint is not None
        state = self._checkpoint.load()
        self._clock.start("start")
        with self._threads:
            self._begin(state)
            self._online()
            if self._settings.tolerance is not None:
                self._batch(self._settings.tolerance)
        return self._exact(state)

    def loadings(self) -> list[torch.Tensor]:
        """Return what the start and the online passes find, of unit length; there are no scores.

        For fits that are compared with each other: where a sample is all rows, fewer rounds settle
        which factors are found than it takes for the last of the error.
        """
        with self._threads:
            self._begin(None, _COMPARED_ROUNDS)
            self._online()
        return [dictionary.unit_loadings() for dictionary in self.dictionaries]

    # -- start ---------------------------------------------------------------------------------

    @property
    def _sample_rows(self) -> int:
        """Rows of a sample; they follow from the data alone, whatever the budget."""
        most = max(_LEAST_SAMPLE_ROWS, _SAMPLE_BYTES // self._scan.ranked.row_bytes)
        n_rows = self._scan.n_rows
        return n_rows if n_rows <= min(_WHOLE_ROWS, most) else min(SAMPLE_ROWS, most)

    def _begin(self, state: State | None, whole_rounds: int = _WHOLE_ROUNDS) -> None:
        settings, scan = self._settings, self._scan
        signed = settings.active is not None
        if state is not None:
            self.matrix = Matrix.scaled(scan, state["scales"].tolist(), signed)
            self.dictionaries = []
            for i, n in enumerate(settings.n_active):
                dictionary = Dictionary(torch.from_numpy(np.array(state[f"loadings {i}"])), n)
                dictionary.resume({name: state[f"{name} {i}"] for name in dictionary.state()})
                self.dictionaries.append(dictionary)
            self._mean = torch.from_numpy(state["mean"])
            self._n_summed = int(state["n_summed"])
            self._n_done = {name: int(state[f"done {name}"]) for name in self._n_done}
            self.n_batch_passes = self._n_done["batch"]
            self.rows_read = int(state["rows_read"])
            scan.ranked.n_reads = int(state["n_reads"])
            scan.ranked.bytes_read = int(state["bytes_read"])
            return
        # The scales are of one sample, whatever the seeds are.
        form = self._product_form
        sample = scan.sample(self._sample_rows, form=form)
        self.rows_read += len(sample)
        self.matrix, self._mean = Matrix.of(
            scan, sample, equal_energy=settings.equal_energy, signed=signed, at_once=self.at_once
        )
        self._n_summed = len(sample)
        self.dictionaries = [Dictionary(torch.zeros(k, scan.width)) for k, _ in settings.fits]
        if self._start is not None:
            self.dictionaries = [Dictionary(self._start.clone(), n) for n in settings.n_active]
            if not settings.passes:
                return  # batch passes go on from where it is
        seeds = list(dict.fromkeys(seed for _, seed in settings.fits))
        whole = len(sample) == scan.n_rows
        n_rounds = whole_rounds if whole else _START_ROUNDS
        # Samples of all rows are the same rows: seeds share them then, and the last rounds.
        for together in [seeds] if whole else [[seed] for seed in seeds]:
            if not whole and together[0]:
                del sample
                sample = scan.sample(self._sample_rows, number=together[0], form=form)
                self.rows_read += len(sample)
            self._begin_on(sample, together, n_rounds)

    def _begin_on(self, sample: Sample, seeds: Sequence[int], n_rounds: int) -> None:
        """Find where the dictionaries of some seeds start, on a sample of theirs."""
        settings = self._settings
        n_threads = at_once(self._scan, settings.n_stacked)
        start = Start(self.matrix, sample, self._product_form, self._threads, n_threads)
        for seed in seeds:
            mine = [i for i, (_, other) in enumerate(settings.fits) if other == seed]
            found = [self.dictionaries[i] for i in mine]
            if self._start is None:
                ks = [settings.fits[i][0] for i in mine]
                found = start.dictionaries(ks, [settings.n_active[i] for i in mine], seed)
            if self._start is None and settings.tries and settings.active is None:
                found = [
                    start.best_of_several(dictionary, seed, _START_ROUNDS, _TRIED_SWEEPS)
                    for dictionary in found
                ]
            else:
                start.improve_on_part(found, seed, _ONLINE_SWEEPS)
            for i, dictionary in zip(mine, found, strict=True):
                self.dictionaries[i] = dictionary
        here = [i for i, (_, seed) in enumerate(settings.fits) if seed in seeds]
        start.improve([self.dictionaries[i] for i in here], n_rounds, _ONLINE_SWEEPS)
        self.rows_read += start.rows_read

    @property
    def _product_form(self) -> Form:
        return Form(product_dtype(), self._settings.active is None)

    # -- online --------------------------------------------------------------------------------

    def _steps(self) -> Iterator[list[Range]]:
        """Return the super-steps of all online passes; they follow from the rows alone."""
        n_rows = self._scan.n_rows
        step_rows = max(_STEP_ROWS, n_rows // _STEPS)
        n_blocks = max(1, step_rows // BLOCK_ROWS)
        range_blocks = max(1, n_blocks // _RANGES)
        for epoch in range(self._settings.passes):
            # What a sample took of a read the first pass gives back.
            limit = n_rows - (self._sample_rows if epoch == 0 else 0)
            if limit <= 0:
                continue
            ranges = self._scan.mixed_ranges(
                BLOCK_ROWS, range_blocks=range_blocks, epoch=epoch, limit=limit
            )
            while step := list(itertools.islice(ranges, -(-n_blocks // range_blocks))):
                yield step

    def _online(self) -> None:
        done = self._n_done["online"]
        if self._n_done["batch"] or self._n_done["exact"]:
            return
        form = self._product_form
        n_rows = self._scan.n_rows
        total = n_rows * self._settings.passes - self._sample_rows
        if total <= 0:
            return
        self._clock.start("online passes", total)
        steps, ahead = itertools.tee(itertools.islice(self._steps(), done, None))
        self._clock.advance(sum(_n_rows(s) for s in itertools.islice(self._steps(), done)))
        with self._engine.steps(
            self._scan, ahead, form=form, at_once=self.at_once, progress=self._clock.advance
        ) as run:
            for number, step in enumerate(steps, done + 1):
                work = SurrogateWork.of(self.dictionaries, self.matrix, form, _ONLINE_SWEEPS)
                self._take(run.total(work), self._decay(_n_rows(step)))
                self.rows_read += _n_rows(step)
                for dictionary in self.dictionaries:
                    dictionary.improve(self._threads, _IMPROVE_SWEEPS)
                    if dictionary.dead:
                        dictionary.revive(self._some_rows(number))
                self._n_done["online"] = number
                self._save()

    def _decay(self, n_rows: int) -> float:
        """Return what the surrogate so far counts for when so many rows are added."""
        return max(0.0, 1 - _FORGETTING * n_rows / (self._n_summed + n_rows))

    def _take(self, sums: Sums, weight: float) -> None:
        self._mean += take(self.dictionaries, self.matrix, sums, weight)
        self._n_summed += int(sums["n_rows"])

    def _some_rows(self, number: int) -> torch.Tensor:
        """Return rows of the matrix to revive components from, others at every step."""
        rng = np.random.default_rng([2, number])
        n = min(_REVIVING_ROWS, self._scan.n_rows)
        ranks = np.sort(rng.choice(self._scan.n_rows, n, replace=False))
        kept = self._scan.kept(ranks)
        self.rows_read += n
        return torch.cat([self.matrix.rows(block.values) for block in kept.ordered(n)])

    # -- batch ---------------------------------------------------------------------------------

    def _batch(self, tolerance: float) -> None:
        if self._n_done["exact"]:
            return
        form = Form("float32", not self.matrix.signed)
        while self.n_batch_passes < self._settings.max_passes:
            work = SurrogateWork.of(
                self.dictionaries, self.matrix, form, _BATCH_SWEEPS, _BATCH_TOLERANCE
            )
            self._clock.start("batch passes", self._scan.n_rows)
            sums = self._engine.total(
                self._scan,
                work,
                list(self._scan.ordered_ranges()),
                form=form,
                at_once=self.at_once,
                progress=self._clock.advance,
            )
            self._take(sums, 0.0)
            self.rows_read += self._scan.n_rows
            self.n_batch_passes += 1
            self._n_done["batch"] = self.n_batch_passes
            if max(d.kkt_residual() for d in self.dictionaries) <= tolerance:
                return
            for dictionary in self.dictionaries:
                if dictionary.kkt_residual() > tolerance:
                    dictionary.improve(self._threads, 3)
                if dictionary.dead:
                    dictionary.revive(self._some_rows(-self.n_batch_passes % 2**31))
            self._save()

    # -- exact ---------------------------------------------------------------------------------

    def _exact(self, state: State | None) -> list[Exact]:
        loadings = [d.unit_loadings() for d in self.dictionaries]
        mean = (self._mean / max(1, self._n_summed)).float()
        assert self._checkpoint is not None
        folder = self._checkpoint.folder
        store = self._scan.store
        signed = self._settings.active is not None
        work = ExactWork.of(
            self.matrix, loadings, self._settings.n_active, mean, folder, store.meta.segment_rows
        )
        ranges = list(self._scan.ordered_ranges())
        done = self._n_done["exact"]
        total: Sums | None = None
        if done and state is not None:
            names = [name for name in state if name.startswith("exact ")]
            total = {n.removeprefix("exact "): torch.from_numpy(np.array(state[n])) for n in names}
        size = self._engine.n_at_once(self.at_once) * 2
        waves = [ranges[first : first + size] for first in range(done, len(ranges), size)]
        self._clock.start("exact pass", self._scan.n_rows)
        self._clock.advance(_n_rows(ranges[:done]))
        with self._engine.steps(
            self._scan, waves, at_once=self.at_once, progress=self._clock.advance
        ) as run:
            for wave in waves:
                sums = run.total(work)
                total = sums if total is None else {n: v + sums[n] for n, v in total.items()}
                self.rows_read += _n_rows(wave)
                self._n_done["exact"] += len(wave)
                self._save({f"exact {name}": value.numpy() for name, value in total.items()})
        assert total is not None
        names = [str(site) for site in self._scan.columns]
        return Exact.of(self.matrix, names, loadings, signed, total)

    # -- state ---------------------------------------------------------------------------------

    def _save(self, more: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
        if self._checkpoint is None:
            return
        ranked = self._scan.ranked
        state: State = {
            "scales": np.array(self.matrix.scales),
            "mean": self._mean.numpy(),
            "n_summed": np.array(self._n_summed),
            "rows_read": np.array(self.rows_read),
            "n_reads": np.array(ranked.n_reads),
            "bytes_read": np.array(ranked.bytes_read),
            **{f"done {name}": np.array(n) for name, n in self._n_done.items()},
            **(more or {}),
        }
        for i, dictionary in enumerate(self.dictionaries):
            state.update({f"{name} {i}": value for name, value in dictionary.state().items()})
        self._checkpoint.save(state)


def at_once(scan: Scan, n_factors: int) -> int:
    """Return how many threads work on ranges: each has a block, and sums of its own."""
    sums_bytes = 16 * (n_factors + 1) * scan.width
    block_bytes = BLOCK_ROWS * (4 * scan.width + 2 * scan.ranked.row_bytes)
    fit = scan.free_bytes // (sums_bytes + block_bytes) - 1
    return int(max(1, min(torch.get_num_threads(), fit)))


def _n_rows(ranges: Sequence[Range]) -> int:
    return sum(len(block) for blocks in ranges for block in blocks)
