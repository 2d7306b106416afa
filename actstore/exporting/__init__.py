"""Exports: neurons, factors and rows of a store as files of the tools people already use."""

from actstore.exporting.feature import (
    FORMS,
    Feature,
    check_form,
    factor_feature,
    neuron_feature,
    new_json,
)
from actstore.exporting.slice import export_slice
from actstore.query import Shown

__all__ = [
    "FORMS",
    "Feature",
    "Shown",
    "check_form",
    "export_slice",
    "factor_feature",
    "neuron_feature",
    "new_json",
]
