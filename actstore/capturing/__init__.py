"""Capture: a corpus through a model, once, into a store."""

from actstore.capturing.alike import capture_alike
from actstore.capturing.compact import compact
from actstore.capturing.estimate import Estimate, run_estimate
from actstore.capturing.plan import ORDERS, Limits
from actstore.capturing.replay import Replayed, Replayer, model_of
from actstore.capturing.run import DEFAULT_SITES, DTYPES, Settings, run_capture
from actstore.capturing.verify import Verification, run_verify
from actstore.capturing.worker import Timing

__all__ = [
    "DEFAULT_SITES",
    "DTYPES",
    "ORDERS",
    "Estimate",
    "Limits",
    "Replayed",
    "Replayer",
    "Settings",
    "Timing",
    "Verification",
    "capture_alike",
    "compact",
    "model_of",
    "run_capture",
    "run_estimate",
    "run_verify",
]
