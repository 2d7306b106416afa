"""Make the pictures of the README and the docs: ``python -m docs.pictures [STORE]``.

Takes the demo's store, or the one given, and writes ``docs/pictures/*.png`` with a real browser.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import actstore
from tests.browser import Browser

ROOT = "document.querySelector('[data-actstore-view]').shadowRoot"
PICTURES = Path(__file__).parent / "pictures"
# The picture is the same wherever the store lies.
ANYWHERE = f"""(() => {{
  const texts = document.createTreeWalker({ROOT}, NodeFilter.SHOW_TEXT);
  for (let text; (text = texts.nextNode()); )
    text.data = text.data.replace(PATH, "actstore-demo/store");
}})()"""


def main() -> None:
    """Draw each view of a store."""
    store = actstore.open(sys.argv[1] if len(sys.argv) > 1 else "actstore-demo/store")
    PICTURES.mkdir(exist_ok=True)
    site = store.select("mlp_post")[-1].site
    views = {
        "factors": (store.factors(), 1280, 1010),
        "similarity": (store.similarity_result(), 1120, None),
        "neuron": (store.neuron(site, 77, by="metadata->>'$.party'"), 1280, 1000),
        "overview": (store, 1280, None),
    }
    # The first factor is mostly the size of activations; a later one shows more.
    choose = f"{ROOT}.querySelector('#factor-3, .factor:last-child').click()"
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        for name, (view, width, height) in views.items():
            page = view.to_html(Path(folder) / f"{name}.html")
            browser.viewport(width, 800, scale=1.5)
            browser.open(page)
            browser.evaluate(ANYWHERE.replace("PATH", json.dumps(str(store.path))))
            if name == "factors":
                browser.evaluate(choose)
            whole = browser.evaluate("Math.ceil(document.querySelector('main').scrollHeight)")
            browser.viewport(width, height or whole, scale=1.5)
            browser.settle()
            browser.screenshot(PICTURES / f"{name}.png", whole=False)
    for path in sorted(PICTURES.glob("*.png")):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
