"""Questions to a store: SQL over its tables, neurons and their strongest rows, text around rows."""

from actstore.query.answer import Answer, is_hidden, visible
from actstore.query.columns import Activations
from actstore.query.condition import Condition
from actstore.query.context import Snippet, snippets
from actstore.query.database import Database
from actstore.query.neuron import Kin, NeuronIndex
from actstore.query.portrait import Portrait, Shown
from actstore.query.promoted import promoted
from actstore.query.schema import MACROS, VIEWS
from actstore.query.top import Top, top

__all__ = [
    "MACROS",
    "VIEWS",
    "Activations",
    "Answer",
    "Condition",
    "Database",
    "Kin",
    "NeuronIndex",
    "Portrait",
    "Shown",
    "Snippet",
    "Top",
    "is_hidden",
    "promoted",
    "snippets",
    "top",
    "visible",
]
