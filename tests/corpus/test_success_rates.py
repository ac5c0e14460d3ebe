"""`success:` of a source: a row's success rate is that of its items; a record without one is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lmdistill.corpus.config import CorpusConfig
from lmdistill.corpus.format import CorpusReader, success_file
from lmdistill.errors import PreflightError
from lmdistill.pipeline.keys import semantic

Make = Callable[..., CorpusReader]
Write = Callable[..., str]
ITEMS = [{"text": f"item {number}", "rate": number / 8} for number in range(9)]


def _rates(reader: CorpusReader) -> Any:
    return np.load(success_file(reader.folder))


def test_a_row_of_one_item_has_its_success_rate(make: Make, write: Write) -> None:
    source = {"source": write(ITEMS), "success": "rate"}
    reader = make(sources=[source], packing="single", separator="none")
    numbers = [bytes(int(token) for token in row if token < 256) for row in reader.split("train").tokens_RT]
    assert len(set(numbers)) == 9
    assert sorted(_rates(reader)) == [item["rate"] for item in ITEMS]
    plain = make(sources=[source["source"]], packing="single", separator="none")
    again = make(sources=[source], packing="single", separator="none", workers=2)
    assert plain.digest("train") == reader.digest("train") == again.digest("train")
    assert (_rates(again) == _rates(reader)).all()


def test_a_row_of_several_items_has_the_mean_over_its_targets(make: Make, write: Write) -> None:
    rated = [{"text": "aaaa", "rate": 1.0}, {"text": "bbbbbbbbbbbb", "rate": 0.0}]
    counts = [make(sources=[write([item])]).meta.splits["train"].targets for item in rated]
    reader = make(sources=[{"source": write(rated), "success": "rate"}], sequence_length=64)
    assert _rates(reader) == pytest.approx([counts[0] / sum(counts)])


def test_without_the_key_there_is_no_file(make: Make, write: Write) -> None:
    reader = make(sources=[write(ITEMS)])
    assert not success_file(reader.folder).exists()


@pytest.mark.parametrize("rate", [None, "often", 1.5, -0.1])
def test_a_record_without_a_success_rate_is_named(rate: Any, make: Make, write: Write) -> None:
    bad = [*ITEMS[:3], {"text": "another", "rate": rate}] if isinstance(rate, float) else [{"text": "x", "rate": rate}]
    with pytest.raises(PreflightError, match=r"record \d: .*no success rate from 0 to 1 in 'rate'"):
        make(sources=[{"source": write(bad), "success": "rate"}])


def test_a_field_that_is_not_there_is_named(make: Make, write: Write) -> None:
    with pytest.raises(PreflightError, match="did you mean 'rate'"):
        make(sources=[{"source": write(ITEMS), "success": "rates"}])


def test_the_key_leaves_older_fingerprints_as_they_are() -> None:
    def said(**keys: Any) -> Any:
        config = CorpusConfig.model_validate({"sources": [{"source": "data.jsonl", **keys}]})
        return semantic(config, lambda spec: spec.source)["sources"][0]

    assert said() == {**said(), "asset": "data.jsonl"} and "success" not in said()
    assert said(success="rate") == {**said(), "success": "rate"}
