"""Decompositions and similarities of sites: every one is a fold over blocks that one scan reads."""

from actstore.decompose.factors import Factors
from actstore.decompose.nmf import nmf
from actstore.decompose.similarity import MEASURES, Similarity, similarity

__all__ = ["MEASURES", "Factors", "Similarity", "nmf", "similarity"]
