"""Decompositions and similarities of sites: every one is a fold over blocks that one scan reads."""

from actstore.decompose.clusters import cluster_neurons
from actstore.decompose.factors import KINDS, Factors
from actstore.decompose.ica import ica
from actstore.decompose.loader import Batch, Loader
from actstore.decompose.measuring import MEASURES
from actstore.decompose.nmf import nmf
from actstore.decompose.pca import pca
from actstore.decompose.project import Projection, project
from actstore.decompose.shuffle import shuffle
from actstore.decompose.similarity import similarity
from actstore.decompose.similarity_result import Similarity
from actstore.decompose.stability import Stability, stability

__all__ = [
    "KINDS",
    "MEASURES",
    "Batch",
    "Factors",
    "Loader",
    "Projection",
    "Similarity",
    "Stability",
    "cluster_neurons",
    "ica",
    "nmf",
    "pca",
    "project",
    "shuffle",
    "similarity",
    "stability",
]
