"""The Ray cluster a capture runs on: connect or start one, and what each of its workers is given.

A cluster that is started here lives in this process' own session: it ends with it, listens on no public port, and
keeps its sockets and logs in a folder that is removed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill.errors import LmdistillError, PreflightError, StageError

OBJECT_STORE_BYTES = 80_000_000  # the least Ray takes: records of shards are all that travels
PREFIX = "r-"  # of the folders of clusters that are started
LONGEST_FOLDER = 43  # characters: names of Unix sockets hold 107, and Ray adds up to 64
CONNECT_SECONDS = 5.0
QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}
SETTLED_SECONDS = 60.0  # old enough for a folder to be locked by whoever made it
STARTS = 3  # of a cluster: Ray waits 30 s for its own processes, which a busy machine may exceed


@dataclass(frozen=True)
class Crew:
    """How many workers, and what each is given of its machine."""

    workers: int
    cpus: int
    gpus: int

    @property
    def options(self) -> dict[str, Any]:
        """Ray's options of one actor; a lost one is replaced by the driver, not by Ray."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 0, "max_task_retries": 0}


def check(address: str | None) -> None:
    """Raise PreflightError where `runtime.ray` cannot work: Ray is not installed, or nothing listens there."""
    if address is None:
        return
    if importlib.util.find_spec("ray") is None:
        raise PreflightError("runtime.ray needs the package ray", fix="pip install 'lmdistill[ray]', or drop the key")
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), CONNECT_SECONDS):
            pass
    except (OSError, ValueError) as error:
        raise _no_cluster(address, str(error)) from error


@contextlib.contextmanager
def connected(address: str, least_cpus: int) -> Iterator[Any]:
    """The module `ray`, connected; what was started here is stopped again.

    `auto` joins a cluster that runs on this machine (or RAY_ADDRESS), else starts one of at least `least_cpus` CPUs.
    Raises StageError where there is no cluster at an address, or one of another version of Ray or Python.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # says nothing at every start
    import ray

    if ray.is_initialized():  # by the program that uses this as a library: its cluster is not ours to stop
        yield ray
        return
    with contextlib.ExitStack() as stack:
        _init(ray, address, least_cpus, stack)
        stack.callback(ray.shutdown)  # before the folder goes
        yield ray


def _init(ray: Any, address: str, least_cpus: int, stack: contextlib.ExitStack) -> None:
    """Join, or start in a folder that `stack` removes."""
    try:
        ray.init(address=address, **QUIET)
        return
    except ConnectionError as error:
        if address != "auto":
            raise _no_cluster(address, str(error)) from error
    except (RuntimeError, ValueError, TimeoutError) as error:  # other versions of Ray or Python, a bad address
        raise _no_cluster(address, _first_line(error)) from error
    for _ in range(STARTS - 1):
        with contextlib.suppress(StageError):
            return _start(ray, least_cpus, stack.enter_context(_folder()))
    _start(ray, least_cpus, stack.enter_context(_folder()))


def _start(ray: Any, least_cpus: int, folder: Path) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, least_cpus),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=str(folder),
            **QUIET,
        )
    except Exception as error:  # Ray raises a bare Exception where a busy machine keeps it waiting
        ray.shutdown()
        fix = "run without runtime.ray, or start a cluster with `ray start --head`"
        raise StageError("no Ray cluster could be started here", why=_first_line(error), fix=fix) from error


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder for a cluster, removed with what is in it; those of drivers that were killed are removed first."""
    from filelock import FileLock, Timeout

    parent = _short_folder()
    for old in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(Timeout, FileNotFoundError):
            if time.time() - old.stat().st_mtime > SETTLED_SECONDS:  # its driver has had the time to take the lock
                with FileLock(old / "lock", timeout=0):
                    shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with FileLock(folder / "lock"):
            yield folder
    finally:
        for _ in range(20):  # Ray's processes write their last words for a moment
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.2)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _short_folder() -> Path:
    """Where a cluster's folder can be: the cache, unless its path is too long for the names of sockets."""
    from lmdistill.assets.cache import cache_dir, make_folder

    cache = cache_dir()
    fits = len(f"{cache}/{PREFIX}12345678") <= LONGEST_FOLDER
    return make_folder(cache) if fits else Path(tempfile.gettempdir())


def size_crew(nodes: list[dict[str, Any]], device: str, threads: int | None, workers: int | None) -> Crew:
    """Fit workers to the cluster: one for each GPU, else one for each machine's CPUs, or for each `threads` of them.

    `nodes` as `ray.nodes()` gives them. Raises StageError where no machine has what one worker needs.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [int(resources.get("CPU", 0)) for resources in alive if resources.get("CPU", 0) >= 1]
    gpus = [int(resources.get("GPU", 0)) for resources in alive]
    if device.startswith("cuda") or (device == "auto" and sum(gpus) > 0):
        if sum(gpus) < 1:
            raise _too_small("a GPU", "the cluster has none", "set runtime.device to cpu or auto")
        return Crew(min(workers or sum(gpus), sum(gpus)), 1, 1)
    if not cpus:
        raise _too_small("a CPU", "no machine of the cluster offers any", "start its nodes with CPUs")
    share = threads or min(min(cpus), max(1, sum(cpus) // (workers or len(cpus))))
    room = sum(each // share for each in cpus)
    if room < 1:
        why = f"its largest machine has {max(cpus)}"
        raise _too_small(f"{share} CPUs (runtime.threads)", why, "lower runtime.threads")
    return Crew(min(workers or room, room), share, 0)


def _too_small(need: str, why: str, fix: str) -> LmdistillError:
    return StageError(f"the Ray cluster cannot hold a worker: it needs {need}", why=why, fix=fix)


def _no_cluster(address: str, why: str) -> PreflightError:
    return PreflightError(
        f"no Ray cluster can be used at {address}",
        why=why,
        fix="start it with `ray start --head`, correct runtime.ray, or set it to auto",
    )
