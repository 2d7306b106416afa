"""Run every benchmark: ``python -m benchmarks [--tiny]``."""

import importlib
import pkgutil
import sys

import benchmarks

for module in pkgutil.iter_modules(benchmarks.__path__):
    if not module.name.startswith("_"):
        importlib.import_module(f"benchmarks.{module.name}").main(sys.argv[1:])
