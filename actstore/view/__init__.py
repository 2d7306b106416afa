"""Views of results in notebooks and as single HTML files, and notebooks that show them."""

from actstore.view.factor_table import factor_table, headline
from actstore.view.factors import factor_view
from actstore.view.neuron import Neuron, neuron_view
from actstore.view.notebook import (
    factors_notebook,
    neuron_notebook,
    overview_notebook,
    similarity_notebook,
    to_notebook,
)
from actstore.view.overview import overview
from actstore.view.page import View
from actstore.view.results import Factors, Similarity
from actstore.view.similarity import similarity_view

__all__ = [
    "Factors",
    "Neuron",
    "Similarity",
    "View",
    "factor_table",
    "factor_view",
    "factors_notebook",
    "headline",
    "neuron_notebook",
    "neuron_view",
    "overview",
    "overview_notebook",
    "similarity_notebook",
    "similarity_view",
    "to_notebook",
]
