"""The tests of the teacher cache run on every variant of the top-K cache."""

from __future__ import annotations

import pytest
from signals_synthetic import always

from lmdistill.signals.variants import compact


@pytest.fixture(params=["mmap", "compact"], scope="session")
def variant(request):
    """Each variant's name in turn."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def toys_are_packed():
    """Caches of a few rows are packed too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "pays", always)
        yield
