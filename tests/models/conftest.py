"""Toy models for the tests of this folder."""

from __future__ import annotations

import pytest

from actstore.models import LanguageModel, load
from tests.toys import toy_model


@pytest.fixture(scope="session")
def toy(request: pytest.FixtureRequest) -> LanguageModel:
    """Return a toy model of the architecture the test names by indirect parameter."""
    return load(*toy_model(request.param))
