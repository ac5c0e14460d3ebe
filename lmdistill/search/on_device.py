"""A search's device: this machine, timed now, or another one's profile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lmdistill.errors import PreflightError
from lmdistill.search import design, device
from lmdistill.search.keys import TimingConfig
from lmdistill.search.profile import Profile, Request
from lmdistill.search.space import Space
from lmdistill.search.sub_space import whole

SEED = 0  # of the shapes that are timed: the same for the same space, so that a profile can be gone on with


def request_for(space: Space, timing: TimingConfig) -> Request:
    """What any device shall time for a search."""
    return design.request(whole(space), space.teacher, timing.plan, timing.candidates, SEED)


def profile_of(
    where: Literal["local"] | Path,
    space: Space,
    timing: TimingConfig,
    work: Path,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """The profile of a device: read from its file, or measured here into `work`/profile.json, resumably.

    `report` gets shapes timed, and how many there are. Raises PreflightError where a profile is of another format.
    """
    if isinstance(where, Path):
        return read_for(where, timing)
    return device.run(request_for(space, timing), work / "profile.json", work / "timed", report)


def read_for(path: Path, timing: TimingConfig) -> Profile:
    """A profile that another machine sent; raises PreflightError where it is of another format."""
    profile = Profile.read(path)
    if profile.plan.format != timing.format:
        raise PreflightError(
            f"the profile {path} is of files in {profile.plan.format}, timing.format is {timing.format}",
            fix="set timing.format to the profile's, or make a profile of this format",
        )
    return profile
