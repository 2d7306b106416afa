"""nnsight: ``tracer.cache`` of the wanted modules, left where they are."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import nnsight
import torch
from transformers import AutoModel

from benchmarks.peers.harness import Rows, measure, start
from benchmarks.peers.hooks import modules


def main() -> None:
    """Run the job."""
    job = start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that BERT names a module "output"
        model = nnsight.NNsight(AutoModel.from_pretrained(job.model).eval())
    names = {site: f"model.{name}" for site, name in modules(job).items()}

    def capture(input_ids: torch.Tensor) -> Rows:
        with model.trace(input_ids=input_ids) as tracer:
            cache = tracer.cache(modules=list(names.values()), device=None)
        found = {site: cache[name].output for site, name in names.items()}
        return {
            site: (value if isinstance(value, torch.Tensor) else value[0]).flatten(0, 1)
            for site, value in found.items()
        }

    measure(job, version("nnsight"), capture)


if __name__ == "__main__":
    main()
