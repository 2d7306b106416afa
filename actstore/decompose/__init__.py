"""Decompositions and similarities of sites: every one is a fold over blocks that one scan reads."""

from actstore.decompose.factors import Factors
from actstore.decompose.loader import Batch, Loader
from actstore.decompose.nmf import nmf
from actstore.decompose.project import Projection, project
from actstore.decompose.shuffle import shuffle
from actstore.decompose.similarity import MEASURES, Similarity, similarity
from actstore.decompose.stability import Stability, stability

__all__ = [
    "MEASURES",
    "Batch",
    "Factors",
    "Loader",
    "Projection",
    "Similarity",
    "Stability",
    "nmf",
    "project",
    "shuffle",
    "similarity",
    "stability",
]
