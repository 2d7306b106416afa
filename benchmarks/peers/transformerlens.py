"""TransformerLens: ``run_with_cache`` of the wanted hook points, without attention patterns.

`stop_at_layer` would leave out the last block, so its head runs, as it does for its users.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.peers.harness import Rows, measure, start

_HOOKS = {
    "mlp_post": "blocks.{}.mlp.hook_post",
    "resid_post": "blocks.{}.hook_resid_post",
    "resid_pre": "blocks.{}.hook_resid_pre",
}


def main() -> None:
    """Run the job."""
    job = start()
    model = TransformerBridge.boot_transformers(job.model, device="cpu")
    names = {site: _HOOKS[site.split(".")[0]].format(site.split(".")[1]) for site in job.dtypes}

    def capture(input_ids: torch.Tensor) -> Rows:
        _, cache = model.run_with_cache(
            input_ids,
            names_filter=list(names.values()),
            return_type=None,
            return_cache_object=False,
            output_attentions=False,
        )
        return {site: cache[name].flatten(0, 1) for site, name in names.items()}

    measure(job, version("transformer-lens"), capture)


if __name__ == "__main__":
    main()
