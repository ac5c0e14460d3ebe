"""The finalists: candidates of the lowest losses that keep the budgets once they are timed, not only as foretold.

The latency model is wrong by some percent, and evolution goes to where it is wrong in a candidate's favour. So shapes
that may win are timed beside the teacher before any of them is trained; those that miss a budget are set aside. A few
rounds of timing are wrong by some percent too: what is judged is the mean of both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lmdistill.search.candidate import Candidate
from lmdistill.search.costs import ModelledDevice
from lmdistill.search.finalists import chosen
from lmdistill.search.scored import RANKED, Scored

PASSES = 6  # of timing, each of as many shapes as there are finalists

Figures = Mapping[str, float]


@dataclass
class Shortlist:
    """Who goes on, and what was timed on the way."""

    best: list[Scored]
    timed: dict[str, Figures] = field(default_factory=dict)  # by shapes' digests; empty for a device that is not here
    excess: dict[str, dict[str, float]] = field(default_factory=dict)  # of each budget as judged, by the same
    foretold: dict[str, Mapping[str, float]] = field(default_factory=dict)  # and as the model alone has it

    def missed(self, candidate: Candidate) -> float:
        """By what share the worst budget is missed; not above zero where all are kept, or nothing is timed."""
        return max(self.excess.get(candidate.shape_digest, {}).values(), default=0.0)

    def expected(self, candidate: Candidate, costs: ModelledDevice) -> float:
        """The same as foretold, corrected by how much worse than foretold the timed ones came out (their median)."""
        if candidate.shape_digest in self.excess:
            return self.missed(candidate)
        foretold = costs.excess(candidate)
        worse = {
            budget: statistics.median(
                judged[budget] - self.foretold[shape][budget] for shape, judged in self.excess.items()
            )
            for budget in foretold
            if self.excess
        }
        return max((value + max(0.0, worse.get(budget, 0.0)) for budget, value in foretold.items()), default=0.0)

    def of(self, candidate: Candidate) -> Figures | None:
        """A candidate's figures as timed."""
        return self.timed.get(candidate.shape_digest)


def shortlist(
    everyone: Sequence[Scored],
    objectives: Sequence[str],
    count: int,
    costs: ModelledDevice,
    work: Path,
    note: Callable[[str], None],
) -> Shortlist:
    """At most `count` candidates, lowest losses first; none where nobody keeps the budgets as foretold.

    Where nobody timed keeps them, those that miss them least, with a note.
    """
    found = Shortlist([])
    left = list(everyone)
    for _ in range(PASSES):
        hopeful = [one for one in left if found.expected(one.candidate, costs) <= 0]
        found.best = chosen(hopeful, objectives, count)
        if len(found.best) < count:  # then those too that the model puts within the budgets
            found.best = chosen(left, objectives, count)
        asked = [one.candidate for one in found.best if one.candidate.shape_digest not in found.timed]
        if asked:
            found.timed |= costs.timed(asked, work)
            known = [one for one in asked if one.shape_digest in found.timed]
            found.foretold |= {one.shape_digest: costs.excess(one) for one in known}
            found.excess |= {one.shape_digest: costs.judged(one, found.timed[one.shape_digest]) for one in known}
        slow = [one for one in found.best if found.missed(one.candidate) > 0]
        if not slow:
            break
        for one in slow:
            note(f"set aside: {_said(one, found)}")
        left = [one for one in left if found.missed(one.candidate) <= 0]
    kept = [one for one in found.best if found.missed(one.candidate) <= 0]
    if not kept and found.timed:
        kept = _nearest(everyone, found)[:count]
        note(f"no shape of {len(found.timed)} keeps the budgets once timed; the nearest: {_said(kept[0], found)}")
    found.best = kept
    return found


def _nearest(everyone: Sequence[Scored], found: Shortlist) -> list[Scored]:
    """One candidate of each timed shape, its best; those that miss the budgets least first."""
    best: dict[str, Scored] = {}
    for one in sorted(everyone, key=lambda one: (one.loss[RANKED], one.candidate.digest)):
        if one.feasible and one.candidate.shape_digest in found.timed:
            best.setdefault(one.candidate.shape_digest, one)
    return sorted(best.values(), key=lambda one: (found.missed(one.candidate), one.loss[RANKED], one.candidate.digest))


def _said(one: Scored, found: Shortlist) -> str:
    excess = found.excess[one.candidate.shape_digest]
    budget = max(excess, key=lambda name: excess[name])
    candidate = one.candidate
    return (
        f"{candidate.depth} layers, {candidate.intermediate_size} inside the MLP miss `{budget}` by "
        f"{excess[budget]:.1%}, timed and foretold together"
    )
