"""Capturing a cache: deterministic, resumable by shard, and at once loud when writing fails."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import signals_synthetic
from signals_synthetic import SHARD_ROWS, VOCAB, BigramEngine, capture, write_corpus

from lmdistill.errors import StageError
from lmdistill.signals import background as background_module
from lmdistill.signals import writer as writer_module
from lmdistill.signals.background import BackgroundWriter
from lmdistill.signals.inspect import verify
from lmdistill.signals.reader import SignalsReader


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    teacher = BigramEngine()
    write_corpus(folder, {"train": teacher.text(1, 22), "valid": teacher.text(2, 5)})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(corpus, variant, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    capture(corpus, out, BigramEngine(), ("train", "valid"), variant).run()
    return contents(out)


def test_capture_is_what_the_teacher_says(corpus, variant, tmp_path):
    """Statistics equal those computed from the exact predictions, and the rows are the corpus' rows."""
    teacher = BigramEngine()
    manifest = capture(corpus, tmp_path, teacher, variant=variant).run()
    tokens = np.load(corpus / "train.tokens.npy").astype(np.int32)
    exact = teacher.score(tokens, tokens > VOCAB)
    figures = manifest.splits["train"].statistics
    assert (SignalsReader(tmp_path).read(slice(None)).tokens_RT == tokens).all()
    assert figures["teacher_nll"] == pytest.approx(-np.nanmean(exact.lp_next_BT), rel=1e-5)
    assert figures["head_mass"] == pytest.approx(np.exp(exact.logp_BTK.astype("f8")).sum(-1).mean(), rel=1e-5)
    among = (exact.ids_BTK[:, :-1] == tokens[:, 1:, None]).any(-1)
    assert figures["observed_in_top_k"] == pytest.approx(among.mean())
    assert 0 < figures["kl_mean"] <= figures["kl_p99"] <= 1e-4
    assert figures["sum_error_max"] < 1e-3
    assert verify(tmp_path) == []


def test_finished_shards_are_never_scored_again(corpus, variant, undisturbed, tmp_path):
    """A second capture scores nothing; a lost or damaged shard is scored alone; the bytes are the same throughout."""
    capture(corpus, tmp_path, BigramEngine(), ("train", "valid"), variant).run()
    again = BigramEngine()
    capture(corpus, tmp_path, again, ("train", "valid"), variant).run()
    assert again.rows_scored == 0
    damaged = tmp_path / "train-00002.sig"
    data = bytearray(damaged.read_bytes())
    data[100] ^= 4
    damaged.write_bytes(data)
    (tmp_path / "train-00000.json").unlink()
    (tmp_path / ".train-00000.sig.tmp").write_bytes(b"half")
    repair = BigramEngine()
    capture(corpus, tmp_path, repair, ("train", "valid"), variant).run()
    assert repair.rows_scored == 2 * SHARD_ROWS
    assert contents(tmp_path) == undisturbed


def test_shards_of_other_tokens_are_not_kept(corpus, tmp_path):
    """What an earlier capture of another corpus left is not taken for this one's."""
    other = tmp_path / "corpus"
    write_corpus(other, {"train": BigramEngine().text(99, 22), "valid": BigramEngine().text(98, 5)})
    capture(other, tmp_path / "out", BigramEngine()).run()
    engine = BigramEngine()
    capture(corpus, tmp_path / "out", engine).run()
    assert engine.rows_scored == 22


def test_killed_at_any_moment_gives_the_same_bytes(corpus, variant, undisturbed, tmp_path):
    """kill -9 again and again, then once to the end: every file equals an undisturbed run's."""
    command = [sys.executable, signals_synthetic.__file__, str(corpus), str(tmp_path), variant]
    kills = 0
    for seconds in (0.03, 0.06, 0.1):
        with subprocess.Popen(command) as process:
            have = len(list(tmp_path.glob("*.json")))
            while process.poll() is None and len(list(tmp_path.glob("*.json"))) <= have:
                time.sleep(0.002)
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2
    subprocess.run(command, check=True)
    assert contents(tmp_path) == undisturbed


def test_a_dead_writer_stops_the_run_at_once():
    """After a failing call the next put raises its error: nobody waits on a queue that nothing drains."""
    error = ValueError("broken")

    def fail():
        raise error

    calls = []
    with pytest.raises(ValueError, match="broken"), BackgroundWriter() as background:
        background.put(fail)
        for _ in range(1000):
            time.sleep(0.001)
            background.put(lambda: calls.append(1))
    assert len(calls) == 0


def test_a_full_queue_does_not_hide_a_dead_writer(monkeypatch):
    """A put that waits on a full queue is woken by the writer's failure."""
    monkeypatch.setattr(background_module, "POLL_SECONDS", 0.01)
    release = threading.Event()

    def slow_failure():
        release.wait()
        raise OSError("gone")

    started = time.monotonic()
    with pytest.raises(OSError, match="gone"), BackgroundWriter() as background:
        for index in range(50):
            if index == background_module.DEPTH:
                release.set()
            background.put(slow_failure)
    assert time.monotonic() - started < 5


def test_a_failing_engine_ends_the_writer(corpus, tmp_path):
    """The teacher's own failure comes through, and no thread is left behind."""

    class Failing(BigramEngine):
        def score(self, tokens_BT, starts_BT):
            if self.rows_scored >= 6:
                raise StageError("the teacher is gone")
            return super().score(tokens_BT, starts_BT)

    with pytest.raises(StageError, match="the teacher is gone"):
        capture(corpus, tmp_path, Failing()).run()
    assert not [thread for thread in threading.enumerate() if thread.name == "signals-writer"]


@pytest.mark.parametrize("shard", [0, 2])
def test_disk_full(corpus, variant, undisturbed, tmp_path, monkeypatch, shard):
    """ENOSPC is one clear message that gives the unfinished shard's space back; a resumed run completes."""
    write = writer_module.ShardWriter._write_block

    def full(self, file, data):
        if self.job.index == shard:
            file.write(data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, file, data)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.ShardWriter, "_write_block", full)
        with pytest.raises(StageError, match=f"shard train-0000{shard}.*No space left on device") as caught:
            capture(corpus, tmp_path, BigramEngine(), ("train", "valid"), variant).run()
    assert "free some space" in caught.value.fix
    assert len(contents(tmp_path)) == 2 * shard
    capture(corpus, tmp_path, BigramEngine(), ("train", "valid"), variant).run()
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize(("spoil", "message"), [
    ({"ids_BTK": lambda ids: ids + VOCAB}, "ids outside the vocabulary"),
    ({"logp_BTK": lambda logp: logp[..., ::-1]}, "unsorted"),
    ({"logp_BTK": lambda logp: logp * np.nan}, "not finite"),
    ({"lp_next_BT": lambda lp: lp * np.nan}, "not finite"),
])  # fmt: skip
def test_an_engine_that_gives_nonsense_is_refused(corpus, tmp_path, spoil, message):
    """Ids outside the vocabulary, unsorted entries and NaN never reach a shard."""

    class Broken(BigramEngine):
        def score(self, tokens_BT, starts_BT):
            good = super().score(tokens_BT, starts_BT)
            return replace(good, **{name: change(getattr(good, name)) for name, change in spoil.items()})

    with pytest.raises(StageError, match=message):
        capture(corpus, tmp_path, Broken()).run()
    assert not list(tmp_path.glob("*.sig"))
