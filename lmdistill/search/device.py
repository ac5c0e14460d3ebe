"""Times candidates in llama.cpp on the machine this runs on: the same program here and, packed, on any device.

Candidates come in groups; beside each group the reference is open, and all take turns (evaluation.speed). Every
group's result is written at once: killed, the same call goes on with the groups that are missing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmdistill.errors import PreflightError
from lmdistill.evaluation.speed import SpeedPlan, SpeedTarget, Task, Timed, time_in_turns
from lmdistill.pipeline.files import write_json
from lmdistill.search.candidate import Candidate, of_unlike_shapes
from lmdistill.search.profile import DECODE, Measured, Profile, Request
from lmdistill.search.random_gguf import write_random_gguf

RUNTIME = "llama.cpp"
_REFERENCE = "reference"
NOT_SPEED = ("system",)  # of a device's description: a kernel's update loses no timings
Report = Callable[[int, int], None]  # candidates measured, of how many


def describe() -> dict[str, Any]:
    """The machine, in the words that its owner knows it by."""
    import llama_cpp

    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "llama_cpp_python": llama_cpp.__version__,
    }


def _processor() -> str:
    """Its name where Linux says it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("model name", "hardware"))]
    return named[0] if named else platform.processor()


def run(request: Request, result: Path, work: Path, report: Report = lambda done, total: None) -> Profile:
    """Time what `request` asks and `result` does not hold yet; `work` is for the files while they are timed."""
    result.parent.mkdir(parents=True, exist_ok=True)  # before hours of timing, not after the first group
    profile = _begun(request, result)
    todo = [each for each in of_unlike_shapes(request.candidates) if each.shape_digest not in profile.measured]
    total = len(profile.measured) + len(todo)
    work.mkdir(parents=True, exist_ok=True)
    reference = work / "reference.gguf"
    if todo:
        write_random_gguf(request.reference, reference, request.plan.format)
    for start in range(0, len(todo), request.plan.together):
        report(len(profile.measured), total)
        profile.add(_time_group(todo[start : start + request.plan.together], reference, request, work))
        write_json(result, profile.to_json())
    reference.unlink(missing_ok=True)
    report(len(profile.measured), total)
    return profile


def check_result(request: Request, result: Path) -> None:
    """Raise LmdistillError where `result` is a folder, no profile, or one whose timings would be lost."""
    if result.is_dir():
        raise PreflightError(
            f"{result} is a folder", why="a profile is a file", fix="give a file's name: --out profile.json"
        )
    if not result.exists():
        return
    begun, fresh = Profile.read(result), Profile(request.plan, request.reference, describe())
    if unlike := _unlike(begun, fresh):
        what = f"{result} is a profile of something else, and would be lost"
        raise PreflightError(what, why="; ".join(unlike), fix="name another --out, or delete it")


def _unlike(begun: Profile, fresh: Profile) -> list[str]:
    """In what two profiles differ, so that one cannot be gone on with as the other."""
    pairs = {"device": (begun.device, fresh.device), "plan": (asdict(begun.plan), asdict(fresh.plan))}
    found = [
        f"its {kind} has {key} {was.get(key)}, this one {now.get(key)}"
        for kind, (was, now) in pairs.items()
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key not in NOT_SPEED
    ]
    if begun.reference != fresh.reference:
        found.append("its reference has another shape: another teacher or space was timed")
    return found


def _begun(request: Request, result: Path) -> Profile:
    """What was measured before with the same plan and reference on the same device, or nothing."""
    fresh = Profile(request.plan, request.reference, describe())
    if not result.exists():
        return fresh
    begun = Profile.read(result)
    return fresh if _unlike(begun, fresh) else begun


def _time_group(group: Sequence[Candidate], reference: Path, request: Request, work: Path) -> list[Measured]:
    plan = request.plan
    files = {candidate.shape_digest: work / f"{candidate.shape_digest[:16]}.gguf" for candidate in group}
    try:
        sizes = {c.shape_digest: write_random_gguf(c, files[c.shape_digest], plan.format) for c in group}
        targets = [SpeedTarget(_REFERENCE, RUNTIME, reference)]
        targets += [SpeedTarget(digest, RUNTIME, path) for digest, path in files.items()]
        tasks = [Task(name, "prefill", tokens) for name, tokens in plan.tasks.items() if name != DECODE]
        tasks += [Task(DECODE, "decode", plan.decode)] * plan.bursts
        context = SpeedPlan(max(plan.prompts), plan.decode, plan.rounds, plan.threads or _threads())
        timed = time_in_turns(targets, context, tasks, work / "logs")
    finally:
        for path in files.values():
            path.unlink(missing_ok=True)
    return [_measured(c, timed[c.shape_digest], timed[_REFERENCE], sizes[c.shape_digest]) for c in group]


def _measured(candidate: Candidate, timed: Timed, reference: Timed, file_bytes: int) -> Measured:
    return Measured(candidate, timed.seconds, reference.seconds, timed.peak_rss_bytes, file_bytes)


def _threads() -> int:
    from lmdistill.deployment.llama_cpp_runtime import default_threads

    return default_threads()
