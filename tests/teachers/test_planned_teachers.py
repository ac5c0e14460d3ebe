"""What a cache says of its teacher: the same wherever a local model lies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lmdistill.pipeline.stage import ModelRef
from lmdistill.stages.teach import TeachConfig
from lmdistill.teachers.planned import who_speaks

HERE = ModelRef("toy", Path("/models/toy"), "sha256:" + "d" * 64, "/models/toy")
MOVED = replace(HERE, path=Path("elsewhere"), source="elsewhere")


@pytest.mark.parametrize("others", [(), ("hf:org/other@1",)])
def test_a_moved_teacher_speaks_as_before(others: tuple[str, ...]) -> None:
    beside = [ModelRef("other", Path("other"), "e" * 64, source) for source in others]
    one, two = (who_speaks(TeachConfig(), [teacher, *beside], "1") for teacher in (HERE, MOVED))
    assert one == two and "local:dddddddddddd" in one.source
    assert all(source in one.source for source in others)
    assert who_speaks(TeachConfig(), [replace(HERE, digest="f" * 64)], "1") != one


def test_a_published_teacher_keeps_its_name() -> None:
    published = replace(HERE, source="hf:org/name@abc")
    assert who_speaks(TeachConfig(), [published], "1").source == "hf:org/name@abc"
