"""What a device's profile tells of a search before it runs.

A wrong format, prompts or work that were not timed, budgets that no candidate can keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.search import features
from lmdistill.search.feasible import infeasible, teacher_figures, unmeasured
from lmdistill.search.keys import DeviceSearchConfig
from lmdistill.search.latency import LEAST, LatencyModel
from lmdistill.search.on_device import read_for, request_for
from lmdistill.search.profile import Profile, Request
from lmdistill.search.space import Space
from lmdistill.search.sub_space import SubSpace, sub_spaces

BEYOND = 2.0  # times the most of a kind of work that was timed: paces are trusted as far


def profile_problems(config: DeviceSearchConfig, space: Space) -> list[LmdistillError]:
    """Every problem that a profile's file tells of a possible space; raises nothing.

    This machine has no file yet: all that is known is whether the space has enough shapes to time.
    """
    if not isinstance(config.device, Path):
        return too_few(request_for(space, config.timing))
    try:
        return problems_of(read_for(config.device, config.timing), config, space)
    except LmdistillError as error:
        return [error]


def too_few(asked: Request) -> list[LmdistillError]:
    """Whether a device would be asked to time so few shapes that no paces can be fitted to them."""
    count = len(asked.candidates)
    if count >= LEAST:
        return []
    what = f"the space has too few shapes: {count}, with the teacher's, do not tell a device's paces"
    return [PreflightError(what, fix=f"widen a range of `space`, so that at least {LEAST} unlike shapes can be timed")]


def problems_of(profile: Profile, config: DeviceSearchConfig, space: Space) -> list[LmdistillError]:
    """Work and budgets that the profile cannot judge, or budgets that no candidate of any sub-space can keep."""
    if untimed := unmeasured(config.bounds, profile):
        fix = "take a prompt that it has, or profile the device again with this one in timing.prompts"
        return [PreflightError(text, fix=fix) for text in untimed]
    if unlike := _unlike_prompts(profile, config):
        return unlike
    model = LatencyModel.fit(profile)
    subs = sub_spaces(space, model.decode_seconds)
    if beyond := _untimed_work(subs, profile):
        what = f"the profile is of unlike students: {beyond}"
        return [PreflightError(what, fix="profile the device again with this recipe: `lmdistill profile-device`")]
    hopeless = infeasible(config.bounds, subs, model, teacher_figures(profile, model, space.teacher))
    return [] if hopeless is None else [hopeless]


def _unlike_prompts(profile: Profile, config: DeviceSearchConfig) -> list[LmdistillError]:
    """`ttft_ms` without a prompt is after the shortest one: the profile's must be the one that the recipe means."""
    timed, meant = min(profile.plan.prompts), min(config.timing.prompts)
    users = [f"'{budget}'" for budget in config.bounds if budget.figure == "ttft_ms"]
    users += ["the objective ttft_ms"] if "ttft_ms" in getattr(config, "objectives", ()) else []
    if timed == meant or not users:
        return []
    what = f"{' and '.join(users)}: the profile's shortest prompt has {timed} tokens, that of timing.prompts {meant}"
    fix = f"set timing.prompts to [{timed}], or profile the device again with this recipe"
    return [PreflightError(what, fix=fix)]


def _untimed_work(subs: Sequence[SubSpace], profile: Profile) -> str:
    """A kind of work of which a candidate has far more than any shape that was timed; nothing where there is none.

    What was not there when the paces were fitted would cost nothing, and be chosen for that.
    """
    timed = [features.decode(one.candidate) for one in profile.measured.values()]
    asked = [features.decode(candidate) for sub in subs for candidate in sub.one_of_each_shape()]
    for kind, most, wanted in zip(
        features.DECODE_KINDS, zip(*timed, strict=True), zip(*asked, strict=True), strict=True
    ):
        if max(wanted) > BEYOND * max(most):
            return f"it timed {max(most):.3g} {kind} at most, candidates have up to {max(wanted):.3g}"
    return ""
