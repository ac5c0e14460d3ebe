"""The tests of the teacher cache run on every variant of the top-K cache."""

from __future__ import annotations

import pytest
from captured_toy import captured
from foreign_data import LENGTHS, save_tokenizer, spoken
from signals_synthetic import always

from lmdistill.signals.exchange.importing import ImportOptions
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


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A toy run with its corpus and its capture; tests copy what they spoil."""
    return captured(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Of the captures that other programs wrote."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def documents():
    """What they captured."""
    return spoken(3, LENGTHS, 16)


@pytest.fixture
def options(tokenizer):
    """How it is imported."""
    return ImportOptions("distillkit", tokenizer, teacher="toy")
