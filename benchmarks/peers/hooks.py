"""No peer, but the plainest capture there is: a forward hook for each site, by hand."""

from __future__ import annotations

import torch
from transformers import AutoModel

from benchmarks.peers.harness import Job, Rows, measure, start

_MODULES = {
    "bert": {
        "mlp_post": "encoder.layer.{}.intermediate",
        "resid_post": "encoder.layer.{}",
        "resid_pre": "embeddings",
    },
    "gpt2": {"mlp_post": "h.{}.mlp.act", "resid_post": "h.{}", "resid_pre": "drop"},
}


def modules(job: Job) -> dict[str, str]:
    """Return the module whose output is each site; of ``resid_pre`` there is layer 0 alone."""
    names = _MODULES[job.architecture]
    return {site: names[site.split(".")[0]].format(site.split(".")[1]) for site in job.dtypes}


def main() -> None:
    """Run the job."""
    job = start()
    model = AutoModel.from_pretrained(job.model).eval()
    caught: dict[str, torch.Tensor] = {}

    def hook(site: str):
        def catch(module, inputs, output):
            caught[site] = output if isinstance(output, torch.Tensor) else output[0]

        return catch

    for site, name in modules(job).items():
        model.get_submodule(name).register_forward_hook(hook(site))

    def capture(input_ids: torch.Tensor) -> Rows:
        model(input_ids=input_ids)
        return {site: values.flatten(0, 1) for site, values in caught.items()}

    measure(job, torch.__version__, capture)


if __name__ == "__main__":
    main()
