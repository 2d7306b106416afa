"""Make the pictures of the README and the docs: ``python -m docs.pictures [STORE]``.

Takes the demo's store, or the one given, and writes ``docs/pictures/*.png`` with a real browser.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import actstore
from tests.browser import Browser

ROOT = "document.querySelector('[data-actstore-view]').shadowRoot"
PICTURES = Path(__file__).parent / "pictures"


def main() -> None:
    """Draw the factor and the similarity view of a store."""
    store = actstore.open(sys.argv[1] if len(sys.argv) > 1 else "actstore-demo/store")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        page = store.factors().to_html(Path(folder) / "factors.html")
        browser.viewport(1280, 1010, scale=1.5)
        browser.open(page)
        # The first factor is mostly the size of activations; a later one shows more.
        browser.evaluate(f"{ROOT}.querySelector('#factor-3, .factor:last-child').click()")
        browser.screenshot(PICTURES / "factors.png", whole=False)
        page = store.similarity_result().to_html(Path(folder) / "similarity.html")
        browser.viewport(1000, 800, scale=1.5)
        browser.open(page)
        height = browser.evaluate("Math.ceil(document.querySelector('main').scrollHeight)")
        browser.viewport(1000, height, scale=1.5)
        browser.screenshot(PICTURES / "similarity.png", whole=False)
    for path in sorted(PICTURES.glob("*.png")):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
