"""A disk that is full: one message, exit status 2, and the same command completes when there is room again."""

from __future__ import annotations

import errno
import os

import pytest
from robust import full_disk
from signals_synthetic import BATCH_ROWS, BigramEngine, capture, write_corpus

from lmdistill.errors import StageError
from lmdistill.signals import capture as capture_module
from lmdistill.signals import writer as writer_module


@pytest.mark.parametrize("fill", [full_disk.fill_tmpfs, full_disk.limit_file_size])
def test_a_disk_that_fills_up_is_said_and_the_run_goes_on(undisturbed, fill):
    """Through the command line, on a small tmpfs or with files that may not grow: message, status, equal bytes."""
    found = fill(undisturbed.toy, undisturbed.base, undisturbed.files(), undisturbed.scratch)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    if "before_work" in found:
        assert found["before_work"]["exit_status"] == 2
        assert found["before_work"]["message"][0].startswith("error: too little disk")
    assert found["exit_status"] == 2
    assert found["message"][0].startswith("error: ")
    assert "cannot write" in found["message"][0]
    assert any(line.strip().startswith("do:") for line in found["message"])
    assert not found["traceback"]
    assert found["resumed_exit_status"] == 0
    assert found["same_bytes"]


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus", {"train": BigramEngine().text(1, 40)})
    return tmp_path / "corpus"


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_teacher_stops_within_a_batch_of_the_writers_failure(corpus, tmp_path, monkeypatch):
    """Of twenty batches at most three are scored when the first cannot be written."""

    def fails(self, *_):
        raise self._disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    monkeypatch.setattr(writer_module.ShardWriter, "append", fails)
    engine = BigramEngine(seconds=0.05)
    with pytest.raises(StageError, match="No space left on device"):
        capture(corpus, tmp_path / "out", engine).run()
    assert engine.rows_scored <= 3 * BATCH_ROWS
    assert list((tmp_path / "out").iterdir()) == []


def test_no_room_for_the_manifest_is_said_too(corpus, tmp_path, monkeypatch):
    """All shards are there and kept; the next run writes what is missing and scores nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "write_text", no_space)
        with pytest.raises(StageError, match=r"cannot write signals\.json .*No space left on device"):
            capture(corpus, tmp_path / "out", BigramEngine()).run()
    engine = BigramEngine()
    capture(corpus, tmp_path / "out", engine).run()
    assert engine.rows_scored == 0


def test_a_full_disk_costs_no_other_writer_its_work(corpus, tmp_path, monkeypatch):
    """Several processes write into one folder: the one that fails removes its own unfinished file alone."""
    (tmp_path / "out").mkdir()
    made = capture(corpus, tmp_path / "out", BigramEngine())
    jobs = made.jobs()
    writers = [
        writer_module.ShardWriter(made.folder, job, made.layout, made.work.source(made.corpus, job), f"-{number}")
        for number, job in enumerate([jobs[0], jobs[0], jobs[1]])
    ]
    tokens, flags = made.corpus.split("train").tokens_RT, made.corpus.split("train").flags_RT
    for writer in writers:
        rows = tokens[writer.job.span].astype("int32")
        writer.append(rows, flags[writer.job.span], BigramEngine().score(rows, flags[writer.job.span] > 9))
    with monkeypatch.context() as patch:
        patch.setattr(writer_module.os, "fsync", no_space)
        with pytest.raises(StageError, match="No space left on device"):
            writers[0].commit()
    records = [writer.commit() for writer in writers[1:]]
    assert [record.entry.file for record in records] == [jobs[0].file, jobs[1].file]
    assert not list(made.folder.glob(".*"))
