"""A capture on a real Ray cluster: the bytes of one process, whoever is killed; its errors are those of one process."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray_toys
from ray_toys import BrokenEngine, RecordedEngine, RefusingEngine, row_name
from signals_synthetic import SHARD_ROWS, BigramEngine, capture, write_corpus

from lmdistill.errors import StageError
from lmdistill.pipeline.stage import SilentProgress
from lmdistill.signals.ray_capture import RayExecutor
from lmdistill.signals.ray_cluster import connected

pytest.importorskip("ray")
SPLITS = ("train", "valid")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster of two CPUs whose workers can import these tests; captures find it and leave it running."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(ray_toys.__file__).parent))
        with connected("auto", 2) as ray:
            yield ray


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    teacher = BigramEngine()
    write_corpus(folder, {"train": teacher.text(1, 58), "valid": teacher.text(2, 5)})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_ray(corpus, out, engine, workers=2, progress=None, variant="mmap"):
    """A capture by two workers; each gets its own copy of the engine."""
    made = capture(corpus, out, BigramEngine(), SPLITS, variant)
    progress = progress or SilentProgress()
    return replace(made, open_engine=lambda: engine, executor=RayExecutor("auto", workers), progress=progress)


class Killer(SilentProgress):
    """Kills the first worker that has loaded its teacher, once some shards are there."""

    def __init__(self, out: Path) -> None:
        self.out, self.victim, self.notes, self.speeds = out, 0, [], []

    def note(self, text):
        self.notes.append(text)
        if not self.victim and (found := re.search(r"process (\d+): its teacher is loaded", text)):
            self.victim = int(found[1])

    def update(self, done, total, unit="", **figures):
        self.speeds.append((done, total, figures))
        if self.victim > 0 and len(list(self.out.glob("*-*.json"))) >= 4:
            os.kill(self.victim, signal.SIGKILL)
            self.victim = -1


def test_a_killed_workers_shard_is_done_again_and_no_finished_one(corpus, tmp_path, variant):
    """Two workers, one killed amid its work: every file as one process writes it; only the lost shard's rows twice."""
    capture(corpus, tmp_path / "alone", BigramEngine(), SPLITS, variant).run()
    log = tmp_path / "log"
    log.mkdir()
    killer = Killer(tmp_path / "out")
    on_ray(corpus, tmp_path / "out", RecordedEngine(log, 0.2), progress=killer, variant=variant).run()
    assert killer.victim == -1
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    [lost] = [match for note in killer.notes if (match := re.search(r"is lost with shard (\w+)-(\d+)\.sig", note))]
    tokens = {split: np.load(corpus / f"{split}.tokens.npy").astype(np.int32) for split in SPLITS}
    first = int(lost[2]) * SHARD_ROWS
    lost_rows = {row_name(row) for row in tokens[lost[1]][first : first + SHARD_ROWS]}
    scored = Counter(line for file in log.iterdir() for line in file.read_text().split())
    assert set(scored) == {row_name(row) for rows in tokens.values() for row in rows}
    assert {row for row, times in scored.items() if times > 1} <= lost_rows
    assert len(list(log.iterdir())) >= 2
    done, total, figures = killer.speeds[-1]
    assert 0 < done <= total == sum(rows.size for rows in tokens.values())
    assert figures["tokens_per_second"] > 0


def test_nothing_is_scored_again_by_a_second_capture(corpus, tmp_path):
    """A capture of which all shards are there asks no worker; one of which one is missing asks for that one."""
    on_ray(corpus, tmp_path, BigramEngine()).run()
    before = contents(tmp_path)
    (tmp_path / "train-00003.json").unlink()
    log = tmp_path.parent / f"{tmp_path.name}-log"
    log.mkdir()
    on_ray(corpus, tmp_path, RecordedEngine(log, 0.0)).run()
    assert sum(len(file.read_text().split()) for file in log.iterdir()) == SHARD_ROWS
    assert contents(tmp_path) == before


def test_a_workers_error_is_shown_as_it_is(corpus, tmp_path):
    """What an engine raises for the user comes through word for word, with no word of Ray."""
    with pytest.raises(StageError) as caught:
        on_ray(corpus, tmp_path, RefusingEngine()).run()
    assert caught.value.render() == StageError("the teacher is gone", why="a test", fix="nothing").render()


def test_a_shard_that_fails_again_and_again_stops_the_run(corpus, tmp_path):
    """Three crashes over one shard end the run, which names it and the last reason; other shards are kept."""
    row = row_name(np.load(corpus / "train.tokens.npy").astype(np.int32)[2 * SHARD_ROWS])
    with pytest.raises(StageError, match=r"shard train-00002\.sig failed 3 times\n.*ValueError: out of something"):
        on_ray(corpus, tmp_path, BrokenEngine(row), workers=1).run()
    on_ray(corpus, tmp_path, BigramEngine()).run()
    assert (tmp_path / "signals.json").exists()


def test_another_engine_version_is_refused(corpus, tmp_path):
    """A worker whose engine is not the driver's would write other bytes."""
    made = on_ray(corpus, tmp_path, BigramEngine())
    other = replace(made, teacher=replace(made.teacher, engine_version="2"))
    with pytest.raises(StageError, match=r"the teacher engine of the worker .* is not that of .*\n.*1 there, 2 here"):
        other.run()
