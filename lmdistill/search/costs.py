"""What candidates cost on the device that a search is for: timed shapes, the model fitted to them, the budgets.

The profile is the one thing in a search that is measured and not computed. It lies in the artefact; given it, all that
follows is the same every time.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmdistill.errors import LmdistillError
from lmdistill.pipeline.stage import Progress
from lmdistill.search import device, feasible, on_device
from lmdistill.search.candidate import Candidate
from lmdistill.search.design import teacher_candidate
from lmdistill.search.keys import DeviceSearchConfig
from lmdistill.search.latency import LatencyModel
from lmdistill.search.profile import Profile, Request
from lmdistill.search.space import Space
from lmdistill.search.sub_space import SubSpace

PROFILE, FINALISTS = "profile.json", "finalists.json"


class ModelledDevice:
    """Figures by the latency model of a profile, and by how much they exceed the budgets."""

    def __init__(self, config: DeviceSearchConfig, teacher: Mapping[str, Any], profile: Profile) -> None:
        self.profile, self._config, self._bounds, self._teacher = profile, config, config.bounds, teacher
        self.model = LatencyModel.fit(profile)
        self.teacher = with_decode_ms(feasible.teacher_figures(profile, self.model, teacher))

    def cost(self, candidate: Candidate) -> float:
        """Predicted seconds of a generated token."""
        return self.model.decode_seconds(candidate)

    def figures(self, candidate: Candidate) -> Mapping[str, float]:
        """What the budgets bound, and decode_ms."""
        return with_decode_ms(self.model.predict(candidate).figures)

    def excess(self, candidate: Candidate) -> Mapping[str, float]:
        """By what share each budget is missed."""
        return self.excess_of(self.figures(candidate))

    def excess_of(self, figures: Mapping[str, float] | None) -> dict[str, float]:
        """The same of figures that are foretold or measured; nothing where there are none."""
        bounds = self._bounds if figures is not None else ()
        return {str(bound): round(bound.violation(figures or {}, self.teacher), 6) for bound in bounds}

    def judged(self, candidate: Candidate, timed: Mapping[str, float]) -> dict[str, float]:
        """By what share each budget is missed, by the means of what is foretold and what was timed.

        Either errs by some percent: a timing by the noise of few rounds, the model where shapes are unlike its own.
        """
        foretold = self.figures(candidate)
        return self.excess_of({name: math.sqrt(foretold[name] * value) for name, value in timed.items()})

    def within_budgets(self, subs: Sequence[SubSpace], note: Callable[[str], None]) -> list[SubSpace]:
        """The sub-spaces where some candidate keeps the budgets: no other can hold the winner; `note` gets why.

        Raises PreflightError, with the nearest point, where there is none.
        """

        def refusal(some: Sequence[SubSpace], where: str) -> LmdistillError | None:
            return feasible.infeasible(self._bounds, some, self.model, self.teacher, where)

        refusals = {sub.name: refusal([sub], f"sub-space '{sub.name}'") for sub in subs}
        kept = [sub for sub in subs if refusals[sub.name] is None]
        if not kept and (hopeless := refusal(subs, "the space")) is not None:
            raise hopeless
        for error in filter(None, refusals.values()):
            note(f"not searched: {error.what}: {error.why}; {error.fix}")
        return kept

    def timed(self, candidates: Sequence[Candidate], work: Path) -> dict[str, dict[str, float]]:
        """Figures by shapes' digests of those that are timed beside the teacher, here or in the profile before.

        At the speed that it has in the profile, so that budgets relative to it are judged by ratios of one moment.
        Where it could not be timed, the profile's reference stands for it. Kept in `work`, and in the profile.
        """
        beside = self.profile.measured.get(teacher_candidate(self._teacher).shape_digest)
        unknown = tuple(one for one in candidates if one.shape_digest not in self.profile.checked)
        if unknown and not isinstance(self._config.device, Path):
            reference = self.profile.reference if beside is None else beside.candidate
            request = Request(self.profile.plan, reference, unknown)
            self.profile.checked |= device.run(request, work / FINALISTS, work / "timed").measured
        shapes = {one.shape_digest for one in candidates} & self.profile.checked.keys()
        figures = {shape: self.profile.figures(self.profile.checked[shape], beside) for shape in sorted(shapes)}
        return {shape: with_decode_ms(each) for shape, each in figures.items()}


def with_decode_ms(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures with the time of a token, to six digits: candidates of one shape have the same."""
    both = {**figures, "decode_ms": 1e3 / figures["decode_tps"]}
    return {name: float(f"{value:.6g}") for name, value in both.items()}


def open_device(config: DeviceSearchConfig, space: Space, out: Path, work: Path, progress: Progress) -> ModelledDevice:
    """The device's model, from its profile or from timing shapes of the space here; the profile goes to `out`.

    An artefact that lost a file still has its profile: what was timed is not timed again, and the search comes out
    as it did.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not isinstance(config.device, Path) and (out / PROFILE).exists() and not (work / PROFILE).exists():
        shutil.copyfile(out / PROFILE, work / PROFILE)

    def report(done: int, total: int) -> None:
        progress.update(done, total, "shapes timed")

    profile = on_device.profile_of(config.device, space, config.timing, work, report)
    source = config.device if isinstance(config.device, Path) else work / PROFILE
    shutil.copyfile(source, out / PROFILE)
    return ModelledDevice(config, space.teacher, profile)
