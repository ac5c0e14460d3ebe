"""The formats that can be read give the same corpus, through the stage itself; groups and limits hold."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmdistill.corpus.config import CorpusConfig
from lmdistill.corpus.format import CorpusReader
from lmdistill.pipeline.stage import Runtime, StageContext
from lmdistill.stages.corpus import CorpusStage

RECORDS = [{"text": f"Document {n}: lazy dogs, {n} jumps.", "id": n} for n in range(20)]


@pytest.fixture
def digests(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., dict[str, Any]]:
    """Run the stage on one source; each split's digest, and the metrics."""
    runs = iter(range(100))

    def run(source: dict[str, Any]) -> dict[str, Any]:
        keys = {"sources": [source], "tokenizer": str(tokenizer_folder), "sequence_length": 16, "valid_fraction": 0.2}
        folder = tmp_path / f"run-{next(runs)}"
        config = CorpusConfig.model_validate(keys)
        ctx = StageContext("corpus", config, {}, None, folder / "out", folder / "work", runtime=Runtime(workers=1))
        ctx.out.mkdir(parents=True)
        ctx.work.mkdir()
        stage = CorpusStage()
        metrics = stage.run(ctx)
        stage.verify(ctx, metrics)
        reader = CorpusReader(ctx.out)
        return {**{name: reader.digest(name) for name in reader.splits}, "documents": metrics["documents"]}

    return run


def test_every_format_gives_the_same_corpus(tmp_path: Path, digests: Callable[..., dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("\n".join(str(record["text"]) for record in RECORDS))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "train.jsonl").write_text(lines)
    sources: list[dict[str, Any]] = [
        {"source": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")
    ]
    sources += [{"source": str(tmp_path / "d.txt"), "unit": "line"}, {"source": str(tmp_path / "e")}]
    found = [digests(source) for source in sources]
    assert all(one == found[0] for one in found)
    assert found[0]["documents"] == 20


def test_a_limit_reads_the_first_records(tmp_path: Path, digests: Callable[..., dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert digests({"source": str(path), "limit": 15})["documents"] == 15
    assert digests({"source": str(path), "limit": 150})["documents"] == 20


def test_text_by_paragraphs(tmp_path: Path, digests: Callable[..., dict[str, Any]]) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {n},\nsecond line." for n in range(20)))
    assert digests({"source": str(path)})["documents"] == 20
