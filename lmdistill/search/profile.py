"""What a device was asked to time, and what it measured: two JSON files, the same for this machine and any other.

A request names the candidates and how to time them; a profile adds the device and, for each candidate, the seconds of
every task in every round beside those of the reference, a file that was open and timed in the same rounds. Ratios to
it cancel what drifts: heat, clocks, other work.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lmdistill.errors import IntegrityError
from lmdistill.search.candidate import Candidate

VERSION = 1
DECODE = "decode"
_MEGA = 1e6
_AGAIN = "take the file as it was written, or make it again with `lmdistill profile-device`"


def prefill_task(tokens: int) -> str:
    """The name of the task that reads a prompt of so many tokens."""
    return f"prefill_{tokens}"


@dataclass(frozen=True)
class TimingPlan:
    """How candidates are timed."""

    format: str = "q4_0"  # of the files, by llama.cpp's name: the one that will ship
    prompts: tuple[int, ...] = (512,)  # tokens read before the first one comes out
    decode: int = 32  # tokens of one burst of generation
    rounds: int = 8  # in which the files take turns
    together: int = 4  # files that are open beside the reference
    threads: int | None = None  # null: the physical cores
    bursts: int = 4  # of generation in a round: each is so short that what else a machine does is 5 to 10% of it

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TimingPlan:
        """What `asdict` gave; profiles from before bursts were counted have one."""
        return TimingPlan(**{"bursts": 1, **data, "prompts": tuple(data["prompts"])})

    @property
    def tasks(self) -> dict[str, int]:
        """Tokens of every task by its name."""
        return {**{prefill_task(tokens): tokens for tokens in self.prompts}, DECODE: self.decode}


@dataclass(frozen=True)
class Request:
    """What a device shall time; the reference is timed with each group of candidates."""

    plan: TimingPlan
    reference: Candidate
    candidates: tuple[Candidate, ...]

    def to_json(self) -> dict[str, Any]:
        """The request as JSON."""
        return {
            "version": VERSION,
            "plan": asdict(self.plan),
            "reference": self.reference.to_json(),
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }

    @staticmethod
    def read(path: Path) -> Request:
        """The request in a file; raises IntegrityError where it is none."""
        what = "profile request"
        data = _read(path, what, ("plan", "reference", "candidates"))
        with _damage_named(path, what):
            return Request(
                TimingPlan.from_json(data["plan"]),
                Candidate.from_json(data["reference"]),
                tuple(Candidate.from_json(each) for each in data["candidates"]),
            )


@dataclass(frozen=True)
class Measured:
    """One candidate on the device: seconds of each task by round, and the reference's in the same rounds."""

    candidate: Candidate
    seconds: dict[str, list[float]]
    reference: dict[str, list[float]]
    peak_rss_bytes: int
    file_bytes: int

    def ratio(self, task: str) -> float:
        """Median over the rounds of the candidate's time to the reference's."""
        return statistics.median(a / b for a, b in zip(self.seconds[task], self.reference[task], strict=True))

    def ratios(self, task: str) -> list[float]:
        """The same ratio in every round, for its spread."""
        return [a / b for a, b in zip(self.seconds[task], self.reference[task], strict=True)]

    def to_json(self) -> dict[str, Any]:
        """As it stands in a profile."""
        return {**asdict(self), "candidate": self.candidate.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Measured:
        """What `to_json` gave; ValueError for times and sizes that nothing can have."""
        found = Measured(**{**data, "candidate": Candidate.from_json(data["candidate"])})
        times = [value for each in (found.seconds, found.reference) for task in each.values() for value in task]
        for value in (*times, found.peak_rss_bytes, found.file_bytes):
            if not 0 < value < math.inf:
                raise ValueError(f"{value} among the times and sizes of {found.candidate.depth} layers")
        return found


@dataclass
class Profile:
    """All that a device measured, by the candidates' shapes."""

    plan: TimingPlan
    reference: Candidate
    device: dict[str, Any]
    measured: dict[str, Measured] = field(default_factory=dict)
    checked: dict[str, Measured] = field(default_factory=dict)  # finalists, beside the teacher: no part of any fit

    @cached_property
    def _reference_seconds(self) -> dict[str, float]:
        return {
            task: statistics.median(s for each in self.measured.values() for s in each.reference[task])
            for task in self.plan.tasks
        }

    def seconds(self, measured: Measured, task: str, beside: Measured | None = None) -> float:
        """A candidate's time for a task, as it would be at the reference's median speed over the whole profile.

        Where `measured` was timed beside another of the profile's shapes, at the speed that this one has in it. The
        reference's own is that median: what it measures beside itself is noise.
        """
        if measured.candidate.shape_digest == self.reference.shape_digest and beside is None:
            return self._reference_seconds[task]
        return measured.ratio(task) * (self._reference_seconds[task] if beside is None else self.seconds(beside, task))

    def figures(self, measured: Measured, beside: Measured | None = None) -> dict[str, float]:
        """What budgets bound, as measured at that speed; `ttft_ms` alone is that of the shortest prompt."""
        ttft_ms = {tokens: self.seconds(measured, prefill_task(tokens), beside) * 1e3 for tokens in self.plan.prompts}
        return {
            "decode_tps": self.plan.decode / self.seconds(measured, DECODE, beside),
            "ttft_ms": ttft_ms[min(ttft_ms)],
            **{f"ttft_ms@{tokens}": value for tokens, value in ttft_ms.items()},
            "ram_mb": measured.peak_rss_bytes / _MEGA,
            "file_mb": measured.file_bytes / _MEGA,
        }

    def add(self, measured: Iterable[Measured]) -> None:
        """Take in more candidates."""
        self.measured.update({each.candidate.shape_digest: each for each in measured})
        self.__dict__.pop("_reference_seconds", None)

    def to_json(self) -> dict[str, Any]:
        """The profile as JSON."""
        return {
            "version": VERSION,
            "device": self.device,
            "plan": asdict(self.plan),
            "reference": self.reference.to_json(),
            "measured": [each.to_json() for each in self.measured.values()],
            **({"checked": [each.to_json() for each in self.checked.values()]} if self.checked else {}),
        }

    @staticmethod
    def read(path: Path) -> Profile:
        """The profile in a file; raises IntegrityError where it is none."""
        what = "device profile"
        data = _read(path, what, ("plan", "reference", "device", "measured"))
        with _damage_named(path, what):
            plan = TimingPlan.from_json(data["plan"])
            profile = Profile(plan, Candidate.from_json(data["reference"]), dict(data["device"]))
            profile.add(map(Measured.from_json, data["measured"]))
            checked = map(Measured.from_json, data.get("checked", ()))
            profile.checked = {each.candidate.shape_digest: each for each in checked}
            for each in (*profile.measured.values(), *profile.checked.values()):
                profile.figures(each)  # every task has its times, of candidate and reference alike
        return profile


@contextmanager
def _damage_named(path: Path, what: str) -> Iterator[None]:
    """What is wrong inside a file that somebody sent, or edited, as one message."""
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(f"{path} is a damaged {what}", why=error.why or error.what, fix=_AGAIN) from error
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path} is a damaged {what}", why=repr(error), fix=_AGAIN) from error


def _read(path: Path, what: str, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON file of this version with these keys."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise IntegrityError(f"there is no {what} {path}", fix="make one with `lmdistill profile-device`") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path} is no {what}", why=str(error)) from error
    if not isinstance(data, dict) or (missing := [key for key in keys if key not in data]):
        raise IntegrityError(f"{path} is no {what}", why=f"it has no '{missing[0] if isinstance(data, dict) else ''}'")
    if data.get("version") != VERSION:
        raise IntegrityError(f"{path} is a {what} of version {data.get('version')}, not {VERSION}")
    return data
