"""What another device's profile tells of a search before it runs: a wrong format, untimed prompts, hopeless budgets."""

from __future__ import annotations

from pathlib import Path

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.search.feasible import infeasible, teacher_figures, unmeasured
from lmdistill.search.keys import DeviceSearchConfig
from lmdistill.search.latency import LEAST, LatencyModel
from lmdistill.search.on_device import read_for, request_for
from lmdistill.search.profile import Profile
from lmdistill.search.space import Space
from lmdistill.search.sub_space import sub_spaces


def profile_problems(config: DeviceSearchConfig, space: Space) -> list[LmdistillError]:
    """Every problem that a profile's file tells of a possible space; raises nothing.

    This machine has no file yet: all that is known is whether the space has enough shapes to time.
    """
    if not isinstance(config.device, Path):
        return _too_few(config, space)
    try:
        return _problems(config, space, read_for(config.device, config.timing))
    except LmdistillError as error:
        return [error]


def _too_few(config: DeviceSearchConfig, space: Space) -> list[LmdistillError]:
    count = len(request_for(space, config.timing).candidates)
    if count >= LEAST:
        return []
    what = f"the space has too few shapes: {count}, with the teacher's, do not tell this machine's paces"
    return [PreflightError(what, fix=f"widen a range of `space`, so that at least {LEAST} unlike shapes can be timed")]


def _problems(config: DeviceSearchConfig, space: Space, profile: Profile) -> list[LmdistillError]:
    """Budgets that the profile cannot judge, or that no candidate of any sub-space can keep."""
    if untimed := unmeasured(config.bounds, profile):
        fix = "take a prompt that it has, or profile the device again with this one in timing.prompts"
        return [PreflightError(text, fix=fix) for text in untimed]
    model = LatencyModel.fit(profile)
    subs = sub_spaces(space, model.decode_seconds)
    hopeless = infeasible(config.bounds, subs, model, teacher_figures(profile, model, space.teacher))
    return [] if hopeless is None else [hopeless]
