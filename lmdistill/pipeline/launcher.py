"""The process in which `accelerate launch` runs a stage as several processes; started by the pipeline, never by hand.

It stands where a worker stands: one job on stdin, messages on stdout. Its children (`rank.py`) read the same job from
a file; the first passes on its progress, and each leaves what came of it in a file. This one reads those and sends the
one result, or the one error that came first. It dies with its parent, and its children die with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

from lmdistill.pipeline.jobs import Json
from lmdistill.pipeline.launch_keys import LaunchSection
from lmdistill.pipeline.worker import die_with_parent

FOLDER = "LMDISTILL_LAUNCH"  # names the folder of job and outcomes to the children
JOB = "job.json"


def main() -> int:
    """Launch one job; 0 when its result was sent."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    sys.stdout = sys.stderr  # what is printed goes to the log; the children inherit the real one, for the first's use
    job = json.load(sys.stdin)
    die_with_parent(job["parent"])
    folder = Path(job["partial"]) / "work" / "launch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / JOB).write_text(json.dumps(job | {"parent": os.getpid()}))
    launch = LaunchSection.model_validate(job["runtime"]["launch"])
    failed: dict[int, int] = {}
    try:
        _launch(launch, folder, job["runtime"]["device"] == "cpu")
    except BaseException as error:
        failed = exit_codes(error)
        if not failed:
            messages.write(json.dumps(_crash(f"{type(error).__name__}: {error}")) + "\n")
            traceback.print_exc()
            return 4
    final = outcome(folder, failed, launch.num_processes)
    messages.write(json.dumps(final) + "\n")
    return 0 if final["type"] == "result" else 3


def _launch(launch: LaunchSection, folder: Path, cpu: bool) -> None:
    """Run the children to their end; raises what torch's elastic launcher raises where one fails."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    os.environ |= {FOLDER: str(folder), "PYTHONSAFEPATH": "1", "ACCELERATE_USE_CPU": str(cpu).lower()}
    count = ["--num_processes", str(launch.num_processes), "--num_machines", "1", "--main_process_port", "0"]
    # accelerate starts several processes without MPI only where it is told of several GPUs; gloo serves CPUs as well.
    several = ["--multi_gpu"] if launch.way == "ddp" and launch.num_processes > 1 else []
    where = ["--config_file", str(launch.file(folder))]
    launch_command(
        launch_command_parser().parse_args([*where, *count, *several, "--module", "lmdistill.pipeline.rank"])
    )


def exit_codes(error: BaseException) -> dict[int, int]:
    """Rank → exit code of the children that failed, as the launcher's error tells; empty where it is another error."""
    return {rank: failure.exitcode for rank, failure in getattr(error, "failures", {}).items()}


def outcome(folder: Path, failed: dict[int, int], processes: int) -> Json:
    """The message that speaks for all ranks: the first one's result, or what went wrong first.

    A rank that raised or was killed leaves the others with a broken connection, and they crash: so an error of ours
    says more than a death without a word, and that says more than a crash; the earliest of a kind is the cause.
    """
    told: dict[int, Json] = {
        int(path.stem.split("-")[1]): json.loads(path.read_text()) for path in folder.glob("rank-*.json")
    }
    in_time = sorted(told.values(), key=lambda message: message.pop("time"))
    silent = {rank: code for rank, code in failed.items() if rank not in told and code != -signal.SIGTERM}
    if errors := [message for message in in_time if message["type"] == "error"]:
        return errors[0]
    if silent:
        return _crash(_death(*min(silent.items()), processes))
    if crashes := [message for message in in_time if message["type"] == "crash"]:
        return crashes[0]
    if failed or 0 not in told:
        return _crash(f"the {processes} processes ended without a result")
    return told[0]


def _death(rank: int, code: int, processes: int) -> str:
    if code >= 0:
        return f"process {rank + 1} of {processes} ended with status {code}"
    return f"process {rank + 1} of {processes} was killed by signal {-code} ({signal.Signals(-code).name})"


def _crash(text: str) -> Json:
    return {"type": "crash", "error": text, "traceback": ""}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
