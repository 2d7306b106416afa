"""The factor page: time to build, its size, first paint, and hover: ``python -m benchmarks.view``.

10 factors over 50 documents of 1,000 tokens. First paint is measured beside a bare page of one of
the texts, in the same browser, alternating; a hover is the time from the pointer's event to the end
of the layout it causes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from actstore.decompose import Factors, nmf
from actstore.view import factor_view
from tests.browser import Browser, find_chromium
from tests.synthetic import synthetic_store

_PAINT = """new Promise((resolve) => new PerformanceObserver((list) => {
  for (const entry of list.getEntriesByName('first-contentful-paint')) resolve(entry.startTime);
}).observe({ type: 'paint', buffered: true }))"""
_HOVER = """(() => {
  const root = document.querySelector('[data-actstore-view]').shadowRoot;
  const options = [...root.querySelectorAll('[role=option]')];
  return options.map((option) => {
    const start = performance.now();
    option.dispatchEvent(new PointerEvent('pointerover', { bubbles: true }));
    root.querySelector('.text').offsetHeight;
    return performance.now() - start;
  });
})()"""


def made_up_factors(folder: Path, n_documents: int, n_tokens: int) -> Factors:
    """Return ten factors of a store of made-up documents."""
    rng = np.random.default_rng(0)
    n_rows = n_documents * n_tokens
    scores = rng.gamma(0.2, 1.0, (n_rows, 10))
    values = scores @ rng.gamma(0.2, 1.0, (10, 64)) + rng.gamma(0.1, 0.1, (n_rows, 64))
    store = synthetic_store(
        folder,
        {f"mlp_post.{layer}": values[:, 16 * layer : 16 * (layer + 1)] for layer in range(4)},
        documents=[n_tokens] * n_documents,
        context=256,
        segment_rows=8192,
    )
    return nmf(store, "mlp_post", 10)


def measure(n_documents: int, n_tokens: int, repeats: int) -> Table:
    """Return the table of all measurements."""
    rows: list[tuple[str, str, str, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        factors = made_up_factors(folder / "store", n_documents, n_tokens)
        builds = []
        for _ in range(repeats):
            started = time.perf_counter()
            page = factor_view(factors.store, factors).to_html(folder / "factors.html")
            builds.append(time.perf_counter() - started)
        rows.append(("build and write", f"{statistics.median(builds):.2f} s", "", "2 s"))
        rows.append(("size", f"{page.stat().st_size / 1e6:.2f} MB", "", "3 MB"))
        if find_chromium() is None:
            rows.append(("first paint, hover", "no chromium", "", ""))
        else:
            bare = folder / "bare.html"
            bare.write_text(f"<!DOCTYPE html><p>{factors.store.document(0)['text']}")
            paints: dict[Path, list[float]] = {page: [], bare: []}
            with Browser() as browser:
                browser.viewport(1280, 900)
                for _ in range(repeats):
                    for path, times in paints.items():
                        browser.open(path)
                        times.append(browser.evaluate(_PAINT))
                browser.open(page)
                hovers = browser.evaluate(_HOVER)
            ours, theirs = (statistics.median(times) for times in paints.values())
            ratio = f"{ours / theirs:.1f} x bare text"
            rows.append(("first paint", f"{ours:.0f} ms", ratio, "1,000 ms"))
            hover = f"{statistics.median(hovers):.1f} ms, worst {max(hovers):.1f}"
            rows.append(("hover", hover, "", "50 ms"))
    table = Table(title=f"10 factors x {n_documents} documents x {n_tokens:,} tokens")
    for column in ("what", "measured", "ratio", "at most"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    table.caption = f"Python {platform.python_version()}, {platform.machine()}"
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small page, once")
    tiny = parser.parse_args(argv).tiny
    Console().print(measure(3, 100, 1) if tiny else measure(50, 1000, 5))


if __name__ == "__main__":
    main()
