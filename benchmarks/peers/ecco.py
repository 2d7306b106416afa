"""Ecco: ``lm(inputs)`` with activations and hidden states, a batch a call.

Its activations come as (batch, layer, neuron, position), layers in the order of their numbers as
strings, its hidden states without the embedding.  Its last hidden state of a GPT-2 is the normed
one, not the block's output: so it is compared on a BERT.
"""

from __future__ import annotations

from importlib.metadata import version

import matplotlib
import matplotlib.cm
import torch
from transformers import BatchEncoding

from benchmarks.peers.harness import Rows, measure, start

# Ecco asks for what matplotlib 3.9 took away.
matplotlib.cm.get_cmap = lambda name=None, lut=None: matplotlib.colormaps[name]

import ecco  # noqa: E402

CONFIG = {
    "embedding": "embeddings.word_embeddings",
    "type": "mlm",
    "activations": [r"\d+\.output\.dense"],
    "token_prefix": "",
    "partial_token_prefix": "##",
}


def main() -> None:
    """Run the job."""
    job = start()
    lm = ecco.from_pretrained(
        job.model,
        model_config=CONFIG,
        activations=True,
        hidden_states=True,
        gpu=False,
        verbose=False,
    )

    def capture(input_ids: torch.Tensor) -> Rows:
        mask = torch.ones_like(input_ids)
        output = lm(BatchEncoding({"input_ids": input_ids, "attention_mask": mask}))
        neurons = torch.from_numpy(output.activations["encoder"])
        order = sorted(range(neurons.shape[1]), key=str)
        rows = {}
        for site in job.dtypes:
            hook_point, layer = site.split(".")[0], int(site.split(".")[1])
            if hook_point == "mlp_post":
                values = neurons[:, order.index(layer)].transpose(1, 2)
            elif hook_point == "resid_post":
                values = output.decoder_hidden_states[layer]
            else:
                values = output.embedding_states
            rows[site] = values.reshape(-1, values.shape[-1])
        return rows

    measure(job, version("ecco"), capture)


if __name__ == "__main__":
    main()
