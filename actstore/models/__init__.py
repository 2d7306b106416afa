"""Models: load one with its tokenizer, find what can be captured, run it.

`load` returns a `LanguageModel`; everything above this package works with that object and never
sees transformers, which only this package imports.
"""

from actstore.models.capture_points import CapturePoint, find_capture_points
from actstore.models.language_model import LanguageModel
from actstore.models.load import load
from actstore.models.text import Encoded

__all__ = ["CapturePoint", "Encoded", "LanguageModel", "find_capture_points", "load"]
