"""Every activation of a transformer over a whole corpus.

A store holds, for every site of a model, a matrix of activations (rows = tokens, columns =
neurons); every question about it is either a read of some of it or a one-pass fold over all of it,
inside a memory budget the user chose.

>>> import actstore
>>> store = actstore.capture(model, text="The keys to the cabinet", tokenizer=tokenizer)
>>> len(store.top("mlp_post.1", neuron=3, k=2))
2
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actstore.api import Store, capture, estimate, open
    from actstore.errors import ActstoreError
    from actstore.site import Site
    from actstore.view import Factors, Similarity

_WHERE = {
    "ActstoreError": "actstore.errors",
    "Factors": "actstore.view",
    "Similarity": "actstore.view",
    "Site": "actstore.site",
    "Store": "actstore.api",
    "capture": "actstore.api",
    "estimate": "actstore.api",
    "open": "actstore.api",
}

__all__ = [
    "ActstoreError",
    "Factors",
    "Similarity",
    "Site",
    "Store",
    "capture",
    "estimate",
    "open",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: `import actstore` itself loads next to nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module 'actstore' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
