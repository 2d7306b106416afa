"""SAELens: a run of ``CacheActivationsRunner`` for each site, over the tokenised windows.

It writes Arrow shards itself, of at most its own 2 GB; the highest values of the neurons are taken
from each shard on its way there.  In RAM is what its `ActivationsStore` gives the runner.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from safetensors.torch import save_file

from benchmarks.peers.harness import TORCH, Highest, Job, Report, finish, memory, start, sync
from benchmarks.peers.hooks import modules

_BUFFER_BYTES = 2e9


class _Runner(CacheActivationsRunner):
    """The runner, with the highest values taken on the way."""

    def watch(self, site: str, highest: Highest) -> None:
        self.site, self.highest, self.first_row, self.seconds = site, highest, 0, 0.0

    def _create_shard(self, buffer):
        started = time.perf_counter()
        self.highest.add({self.site: buffer[0]}, self.first_row)
        self.first_row += len(buffer[0])
        self.seconds += time.perf_counter() - started
        return super()._create_shard(buffer)


def _runner(job: Job, site: str, name: str) -> _Runner:
    windows = torch.cat(job.batches())
    n_batches = len(windows) // job.batch_windows
    row_bytes = job.widths[site] * TORCH[job.dtypes[site]].itemsize
    batch_bytes = job.batch_windows * job.context * row_bytes
    # It would fill up a last buffer from the beginning of the corpus: no buffer is a last one.
    in_buffer = max(
        n
        for n in range(1, n_batches + 1)
        if n_batches % n == 0 and (n == 1 or n * batch_bytes <= _BUFFER_BYTES)
    )
    config = CacheActivationsRunnerConfig(
        dataset_path="windows",
        model_name=job.model,
        model_class_name="AutoModelForCausalLM",
        model_batch_size=job.batch_windows,
        hook_name=name,
        d_in=job.widths[site],
        training_tokens=windows.numel(),
        context_size=job.context,
        new_cached_activations_path=str(Path(job.folder, site)),
        shuffle=False,
        dtype=job.dtypes[site],
        device="cpu",
        buffer_size_gb=(in_buffer * batch_bytes + 1) / 1e9,
        prepend_bos=False,
        streaming=False,
    )
    data = Dataset.from_dict({"input_ids": windows.tolist()})
    return _Runner(config, override_dataset=data)


def _in_ram(runner: _Runner, n_batches: int) -> float:
    runner.activations_store.get_raw_llm_batch()
    started = time.perf_counter()
    with torch.no_grad():
        for _ in range(n_batches):
            runner.activations_store.get_raw_llm_batch()
    return time.perf_counter() - started


def main() -> None:
    """Run the job."""
    job = start()
    folder = Path(job.folder)
    names = {site: f"transformer.{name}" for site, name in modules(job).items()}
    report = Report(version("sae-lens"), parts=dict.fromkeys(("capture + write", "top-k"), 0.0))
    highest = Highest(job)
    sample: dict[str, torch.Tensor] = {}
    for site, name in names.items():
        runner = _runner(job, site, name)
        report.loaded_bytes = report.loaded_bytes or memory("VmRSS")
        report.in_ram += _in_ram(runner, len(job.batches()))
        runner = _runner(job, site, name)
        runner.watch(site, highest)
        started = time.perf_counter()
        data = runner.run()
        sync(folder / site)
        seconds = time.perf_counter() - started
        report.on_disk += seconds
        report.parts["top-k"] += runner.seconds
        report.parts["capture + write"] += seconds - runner.seconds
        found = data.with_format("torch")[job.sampled()][name]
        sample[site] = found.flatten(0, 1).to(TORCH[job.dtypes[site]])
    started = time.perf_counter()
    highest.save(folder / "highest.safetensors")
    seconds = time.perf_counter() - started
    report.on_disk += seconds
    report.parts["top-k"] += seconds
    report.peak_bytes = memory("VmHWM")
    report.n_bytes = sum(path.stat().st_size for path in folder.glob("*/*.arrow"))
    save_file(sample, folder / "sample.safetensors")
    finish(job, report)


if __name__ == "__main__":
    main()
