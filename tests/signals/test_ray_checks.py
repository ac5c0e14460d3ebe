"""What is checked before a worker may score, and how a cluster is shared out; no cluster runs here."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signals_synthetic import BigramEngine, capture, write_corpus

from lmdistill.errors import PreflightError, StageError
from lmdistill.recipe.schema import RuntimeSection
from lmdistill.signals import ray_cluster, ray_worker
from lmdistill.signals.ray_cluster import check, size_crew
from lmdistill.signals.ray_worker import ShardWorker, expectations, same_files, same_software, software


@pytest.fixture
def work(tmp_path):
    """The work of a capture whose teacher is a folder of one file."""
    write_corpus(tmp_path / "corpus", {"train": BigramEngine().text(1, 6)})
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"weights")
    made = capture(tmp_path / "corpus", tmp_path / "out", BigramEngine())
    (tmp_path / "out").mkdir()
    return replace(made.work, teacher_files=(tmp_path / "teacher",))


@pytest.fixture
def expected(work):
    """What the driver holds true, with its probe in the run folder."""
    probe = work.folder / ".probe.tmp"
    probe.write_text("token")
    return expectations(work, probe, "token")


def test_the_drivers_own_machine_passes(work, expected):
    answer = ShardWorker(work, {}).open(expected)
    assert answer["host"] == socket.gethostname()


@pytest.mark.parametrize("seen", [None, "another run's"])
def test_a_worker_that_does_not_see_the_run_folder_is_told_so(work, expected, seen):
    probe = work.folder / ".probe.tmp"
    probe.unlink() if seen is None else probe.write_text(seen)
    with pytest.raises(StageError, match="does not see the run folder") as caught:
        same_files(work, expected)
    assert "mounts at the same path" in caught.value.fix


def test_a_worker_needs_the_very_teacher(work, expected):
    """A folder that is missing, and one with other weights of the same size."""
    weights = work.teacher_files[0] / "model.safetensors"
    weights.write_bytes(b"WEIGHTS")
    with pytest.raises(StageError, match=r"the teacher of the worker on .* is not that"):
        same_files(work, expected)
    weights.unlink()
    work.teacher_files[0].rmdir()
    with pytest.raises(StageError, match="has no teacher at"):
        same_files(work, expected)


@pytest.mark.parametrize("name", sorted(software()))
def test_every_difference_in_software_is_refused(name):
    """lmdistill's code to the last byte, Python, numpy and the coders."""
    same_software(software())
    with pytest.raises(StageError, match=f"{name} .* there, other here"):
        same_software(software() | {name: "other"})


def test_a_worker_with_another_corpus_scores_nothing(work, expected):
    """The identity of what a shard is made from is compared for each shard."""
    worker = ShardWorker(work, {})
    worker.open(expected)
    [job, *_] = capture(work.corpus, work.folder, BigramEngine()).jobs()
    assert "the corpus" in worker.score(job, "0" * 64)["error"]["what"]
    assert not list(work.folder.glob("*.sig"))
    assert worker.score(job, work.source(ray_worker.CorpusReader(work.corpus), job))["record"].entry.rows == job.rows


def test_an_address_where_nothing_listens_is_refused_before_work():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(PreflightError, match=f"no Ray cluster can be used at 127.0.0.1:{port}"):
            check(f"127.0.0.1:{port}")
    check(None)


def test_ray_must_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PreflightError, match="needs the package ray") as caught:
        check("auto")
    assert "lmdistill[ray]" in caught.value.fix


@pytest.mark.parametrize(("address", "good"), [
    ("auto", True), ("10.0.0.1:6379", True), ("ray://head:10001", True), ("head", False), ("auto:", False), ("", False)
])  # fmt: skip
def test_what_an_address_is(address, good):
    if good:
        assert RuntimeSection(ray=address).for_stages().ray == address
    else:
        with pytest.raises(ValueError, match="ray"):
            RuntimeSection(ray=address)


def node(cpus: int, gpus: int, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}


@pytest.mark.parametrize(("nodes", "device", "threads", "workers", "crew"), [
    ([node(8, 0), node(8, 0)], "auto", None, None, (2, 8, 0)),  # one a machine
    ([node(8, 0), node(4, 0)], "auto", None, None, (3, 4, 0)),  # alike on unlike machines
    ([node(2, 0)], "cpu", None, 2, (2, 1, 0)),
    ([node(8, 0)], "cpu", 3, None, (2, 3, 0)),
    ([node(8, 2), node(8, 4)], "auto", None, None, (6, 1, 1)),
    ([node(8, 2), node(8, 4)], "cuda:1", 4, 3, (3, 1, 1)),
    ([node(8, 2), node(8, 4, alive=False)], "auto", None, None, (2, 1, 1)),
    ([node(8, 2)], "cpu", None, None, (1, 8, 0)),
])  # fmt: skip
def test_workers_fit_the_cluster(nodes, device, threads, workers, crew):
    found = size_crew(nodes, device, threads, workers)
    assert (found.workers, found.cpus, found.gpus) == crew


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=5),
    st.none() | st.integers(1, 64),
    st.none() | st.integers(1, 99),
)
def test_a_crew_always_has_room(machines, threads, workers):
    """What is asked for all workers together is there, machine by machine, and there is at least one."""
    nodes = [node(cpus, gpus) for cpus, gpus in machines]
    if threads is not None and threads > max(cpus for cpus, _ in machines):
        with pytest.raises(StageError, match="cannot hold a worker"):
            size_crew(nodes, "cpu", threads, workers)
        return
    crew = size_crew(nodes, "cpu", threads, workers)
    assert 1 <= crew.workers <= sum(cpus // crew.cpus for cpus, _ in machines)


@pytest.mark.parametrize(("nodes", "device", "message"), [
    ([node(8, 0)], "cuda", "needs a GPU"), ([node(0, 0)], "cpu", "needs a CPU"), ([], "auto", "needs a CPU")
])  # fmt: skip
def test_a_cluster_without_what_a_worker_needs_is_refused(nodes, device, message):
    with pytest.raises(StageError, match=message):
        size_crew(nodes, device, None, None)


def test_what_a_killed_driver_left_is_removed(tmp_path, monkeypatch):
    """Folders of clusters that nobody holds go when the next one starts; one that is held, or quite new, stays."""
    from filelock import FileLock

    monkeypatch.setattr(ray_cluster, "_short_folder", lambda: tmp_path)
    left, held, new = (tmp_path / f"r-{name}" for name in ("left", "held", "new"))
    for folder in (left, held, new):
        (folder / "session").mkdir(parents=True)
    with FileLock(held / "lock"):
        for folder in (left, held):
            os.utime(folder, (0, 0))
        with ray_cluster._folder() as mine:
            assert sorted(tmp_path.iterdir()) == sorted([held, new, mine])
    assert sorted(tmp_path.iterdir()) == sorted([held, new])
