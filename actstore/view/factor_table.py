"""A factorisation on a terminal: how good it is, in a few lines, and its factors as a table."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from actstore import arrow
from actstore.counted import counted
from actstore.decompose import Factors
from actstore.query import Answer
from actstore.site import summarize

_TOKENS = 6
_SITES = 3
_LEAST = 0.005
_MUCH_CLIPPED = 1 / 3


def headline(factors: Factors) -> str:
    """Return what a factorisation is and how good it is, a line for each thing.

    What was thrown away comes first where it is much.
    """
    summary = factors.summary
    lines = []
    certificates: dict[str, Any] = summary.get("certificates", {})
    if certificates.get("clipped_energy", 0) > _MUCH_CLIPPED:
        lines.append(
            f"clipping at zero discarded {certificates['clipped_energy']:.0%} of the energy: these "
            "factors explain the positive part of the activations alone"
        )
    lines.append(
        f"{factors.name}: {counted(factors.n_components, 'factor')} of "
        f"{summarize(info.site for info in factors.sites)} "
        f"({counted(factors.n_neurons, 'neuron')}) over {counted(summary['n_rows'], 'row')} "
        f"({summary['rows']}) of {factors.store.path}"
    )
    quality = []
    if summary.get("error") is not None:
        quality.append(f"error {summary['error']:.4f}")
    names = {
        "signed_scores_error": "with signed scores {:.4f}",
        "one_factor_error": "of one factor {:.4f}",
        "svd_bound": "no factors below {:.4f}",
        "kkt_residual": "KKT residual {:.1g}",
    }
    quality += [
        text.format(certificates[name])
        for name, text in names.items()
        if certificates.get(name) is not None
    ]
    if certificates.get("unconverged_rows"):
        quality.append(f"{counted(certificates['unconverged_rows'], 'row')} not converged")
    lines.append(", ".join(quality))
    seconds = sum(summary["seconds"].values())
    read = f"{summary['bytes_read'] / 1e9:,.2f} GB read"
    if "reads" in summary:
        read += f", every row {summary['reads']:.2f} times"
    lines.append(f"{read}, {seconds:,.1f} s")
    return "\n".join(line for line in lines if line)


def factor_table(factors: Factors) -> Answer:
    """Return one row a factor: its share, neurons, where it lies and what it responds to."""
    types = factors.table("factor_tokens")
    types = types.filter(pa.compute.less_equal(types.column("rank"), _TOKENS))
    texts = factors.store.texts_of(arrow.numbers(types.column("token_id"))).to_pylist()
    tokens: list[list[str]] = [[] for _ in range(factors.n_components)]
    for factor, token_id, text in zip(
        types.column("factor").to_pylist(), types.column("token_id").to_pylist(), texts, strict=True
    ):
        tokens[factor].append(f"token {token_id}" if text is None else text.strip() or text)
    where = _where(factors)
    rows = []
    badges = factors.badges()
    for row in factors.table("factors").to_pylist():
        number = row["factor"]
        rows.append(
            {
                "factor": number,
                "share": f"{row['share']:.1%}",
                "neurons": round(row["effective_neurons"], 1),
                "where": where[number],
                "tokens": " · ".join(tokens[number]),
                "note": ", ".join(badges[number]),
            }
        )
    return Answer(pa.Table.from_pylist(rows))


def _where(factors: Factors) -> list[str]:
    """Return the sites that hold most of each factor, with their shares."""
    shares: list[list[tuple[float, str]]] = [[] for _ in range(factors.n_components)]
    for row in factors.table("factor_sites").to_pylist():
        shares[row["factor"]].append((row["share"], row["site"]))
    found = []
    for of in shares:
        # Sites in their order where shares are equal, as they are in a factor of nothing.
        most = sorted(of, key=lambda pair: -pair[0])[:_SITES]
        found.append(", ".join(f"{site} {share:.0%}" for share, site in most if share >= _LEAST))
    return found
