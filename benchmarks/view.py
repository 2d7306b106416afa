"""Pages: time to build, size, first paint, response: ``python -m benchmarks.view``.

The factor page of 10 factors over 50 documents of 1,000 tokens, with the neurons that stand out at
each of them, and the page of a neuron of that store.  First paint is measured beside a bare page of
one of the texts, in the same browser, alternating; a response is the time from an event to the end
of the layout it causes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import actstore
from benchmarks._inputs import RandomText
from tests.browser import Browser, find_chromium
from tests.toys import toy_model

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


_DOCUMENT = """(() => {
  const root = document.querySelector('[data-actstore-view]').shadowRoot;
  const select = root.querySelector('.picker select');
  return [...select.options].slice(1, 6).map((option) => {
    const start = performance.now();
    select.value = option.value;
    select.dispatchEvent(new Event('change'));
    root.querySelector('.text').offsetHeight;
    return performance.now() - start;
  });
})()"""


def captured(folder: Path, n_documents: int, n_tokens: int) -> actstore.Store:
    """Return a store of a toy model over random texts, and ten factors of its 192 neurons."""
    module, tokenizer = toy_model("gpt2")
    store = actstore.capture(
        module,
        RandomText(n_documents, n_tokens),
        folder,
        tokenizer=tokenizer,
        context=256,
        max_document_tokens=n_tokens,
    )
    store.nmf("mlp_post", 10, name="ten")
    return store


def _built(make: Callable[[], Path], repeats: int) -> tuple[Path, str, str]:
    """Return a page, the median time to build it, and its size."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        page = make()
        times.append(time.perf_counter() - started)
    size = f"{page.stat().st_size / 1e6:.2f} MB"
    return page, f"{statistics.median(times):.2f} s, worst {max(times):.2f}", size


def measure(n_documents: int, n_tokens: int, repeats: int) -> Table:
    """Return the table of all measurements."""
    rows: list[tuple[str, str, str, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = captured(folder / "store", n_documents, n_tokens)
        factors = store.factors("ten")
        page, seconds, size = _built(lambda: factors.to_html(folder / "factors.html"), repeats)
        rows += [("build and write", seconds, "", "2 s"), ("size", size, "", "3 MB")]
        neuron = store.neuron("mlp_post.1", 7)
        other, seconds, size = _built(lambda: neuron.to_html(folder / "neuron.html"), repeats)
        rows += [("neuron: build and write", seconds, "", ""), ("neuron: size", size, "", "")]
        if find_chromium() is None:
            rows.append(("first paint, responses", "no chromium", "", ""))
        else:
            bare = folder / "bare.html"
            bare.write_text(f"<!DOCTYPE html><p>{store.document(0)['text']}")
            paints: dict[Path, list[float]] = {page: [], other: [], bare: []}
            with Browser() as browser:
                browser.viewport(1280, 900)
                for _ in range(repeats):
                    for path, times in paints.items():
                        browser.open(path)
                        times.append(browser.evaluate(_PAINT))
                browser.open(page)
                hovers, documents = browser.evaluate(_HOVER), browser.evaluate(_DOCUMENT)
            first, second, base = (statistics.median(times) for times in paints.values())
            for name, ours in (("first paint", first), ("neuron: first paint", second)):
                rows.append((name, f"{ours:.0f} ms", f"{ours / base:.1f} x bare text", "1,000 ms"))
            for name, times in (("hover", hovers), ("another document", documents)):
                said = f"{statistics.median(times):.1f} ms, worst {max(times):.1f}"
                rows.append((name, said, "", "50 ms" if name == "hover" else ""))
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
