"""The core store: the folder of facts every other package meets in."""

from actstore.store.core import CoreStore
from actstore.store.facts import is_vacant
from actstore.store.generations import Generation
from actstore.store.meta import (
    FIRST,
    GENERATED,
    SPECIAL,
    Commit,
    Part,
    Segment,
    SiteCounts,
    SiteInfo,
    StoreMeta,
)
from actstore.store.results import Result, ResultWriter
from actstore.store.rows import Rows, Run, SiteRows
from actstore.store.segment_writer import SegmentWriter

__all__ = [
    "FIRST",
    "GENERATED",
    "SPECIAL",
    "Commit",
    "CoreStore",
    "Generation",
    "Part",
    "Result",
    "ResultWriter",
    "Rows",
    "Run",
    "Segment",
    "SegmentWriter",
    "SiteCounts",
    "SiteInfo",
    "SiteRows",
    "StoreMeta",
    "is_vacant",
]
