"""What candidates cost on the device that a search is for: timed shapes, the model fitted to them, the budgets.

The profile is the one thing in a search that is measured and not computed. It lies in the artefact; given it, all that
follows is the same every time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmdistill.pipeline.stage import Progress
from lmdistill.search import device, feasible, on_device
from lmdistill.search.candidate import Candidate
from lmdistill.search.keys import DeviceSearchConfig
from lmdistill.search.latency import LatencyModel
from lmdistill.search.profile import DECODE, Profile, Request, prefill_task
from lmdistill.search.space import Space
from lmdistill.search.sub_space import SubSpace

PROFILE, FINALISTS = "profile.json", "finalists.json"


class ModelledDevice:
    """Figures by the latency model of a profile, and by how much they exceed the budgets."""

    def __init__(self, config: DeviceSearchConfig, teacher: Mapping[str, Any], profile: Profile) -> None:
        self.profile, self._config, self._bounds = profile, config, config.bounds
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
        figures = self.figures(candidate)
        return {str(bound): round(bound.violation(figures, self.teacher), 6) for bound in self._bounds}

    def check_budgets(self, subs: Sequence[SubSpace]) -> None:
        """Raise PreflightError, with the nearest point, where no candidate keeps the budgets."""
        refusal = feasible.infeasible(self._bounds, subs, self.model, self.teacher)
        if refusal is not None:
            raise refusal

    def measure(self, candidates: Sequence[Candidate], work: Path) -> dict[str, dict[str, float]]:
        """Measured figures by candidates' digests, where the device is this machine; kept in `work`."""
        if isinstance(self._config.device, Path):
            return {}
        request = Request(self.profile.plan, self.profile.reference, tuple(candidates))
        timed = device.run(request, work / FINALISTS, work / "timed")
        return {one.digest: _measured(timed, one) for one in candidates}


def with_decode_ms(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures with the time of a token, to six digits: candidates of one shape have the same."""
    both = {**figures, "decode_ms": 1e3 / figures["decode_tps"]}
    return {name: float(f"{value:.6g}") for name, value in both.items()}


def _measured(profile: Profile, candidate: Candidate) -> dict[str, float]:
    found = profile.measured[candidate.shape_digest]
    first = min(profile.plan.prompts)
    return with_decode_ms(
        {
            "decode_tps": profile.plan.decode / profile.seconds(found, DECODE),
            "ttft_ms": 1e3 * profile.seconds(found, prefill_task(first)),
            "ram_mb": found.peak_rss_bytes / 1e6,
            "file_mb": found.file_bytes / 1e6,
        }
    )


def open_device(config: DeviceSearchConfig, space: Space, out: Path, work: Path, progress: Progress) -> ModelledDevice:
    """The device's model, from its profile or from timing shapes of the space here; the profile goes to `out`."""

    def report(done: int, total: int) -> None:
        progress.update(done, total, "shapes timed")

    profile = on_device.profile_of(config.device, space, config.timing, work, report)
    source = config.device if isinstance(config.device, Path) else work / PROFILE
    shutil.copyfile(source, out / PROFILE)
    return ModelledDevice(config, space.teacher, profile)
