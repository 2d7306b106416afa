"""The public face: open a store or make one by capture, then ask.

`Store` is the core store with one-line methods that call the packages below it; the same calls
stand behind the command line.
"""

from actstore.api.making import capture, estimate, open
from actstore.api.store import Store

__all__ = ["Store", "capture", "estimate", "open"]
