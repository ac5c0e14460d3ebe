"""A device's pace at each kind of work, fitted to its profile, and with it the cost of any candidate.

A cost is a sum of amounts of work times paces that are not negative (non-negative least squares on relative errors,
so that small candidates count as much as large ones). Its interval is the spread of relative errors that candidates
have when they are left out of the fit. Axes: N measurements, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmdistill.errors import LmdistillError
from lmdistill.search import features
from lmdistill.search.candidate import Candidate
from lmdistill.search.profile import DECODE, Profile, prefill_task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LEAST = 12  # measurements for a fit
_COVERAGE = 0.9  # share of left-out candidates within the interval
_LEAST_SHARE = 0.01  # of a value, at which its interval begins at the lowest: no cost is zero, however noisy its fit
_MEGA = 1e6


@dataclass(frozen=True)
class Interval:
    """A predicted figure and where it lies with a probability of 90%."""

    value: float
    low: float
    high: float

    def inverse(self, numerator: float = 1.0) -> Interval:
        """numerator / self; raises ZeroDivisionError where self is zero, which no fitted figure is."""
        return Interval(numerator / self.value, numerator / self.high, numerator / self.low)

    def times(self, factor: float) -> Interval:
        """Self in another unit."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Prediction:
    """A candidate on the device."""

    decode_tps: Interval
    ttft_ms: dict[int, Interval]  # by tokens of the prompt
    rss_bytes: Interval
    file_bytes: Interval

    @property
    def figures(self) -> dict[str, float]:
        """The figures that budgets bound; `ttft_ms` alone is that of the shortest prompt."""
        prompts = {f"ttft_ms@{tokens}": interval.value for tokens, interval in self.ttft_ms.items()}
        return {
            "decode_tps": self.decode_tps.value,
            "ttft_ms": self.ttft_ms[min(self.ttft_ms)].value,
            **prompts,
            "ram_mb": self.rss_bytes.value / _MEGA,
            "file_mb": self.file_bytes.value / _MEGA,
        }


@dataclass(frozen=True)
class Fit:
    """Paces of one figure `[F]`, and the relative half-width of its interval."""

    paces_F: tuple[float, ...]
    half_width: float

    @staticmethod
    def of(amounts: Sequence[Sequence[float]], measured: Sequence[float]) -> Fit:
        """Fit to N measurements with their amounts of work `[N, F]`."""
        import numpy as np

        amounts_NF, measured_N = np.array(features.matrix(amounts)), np.array(measured, np.float64)
        errors_N = np.array(
            [
                abs(_solve(np.delete(amounts_NF, n, 0), np.delete(measured_N, n)) @ amounts_NF[n] / measured_N[n] - 1)
                for n in range(len(measured_N))
            ]
        )
        paces_F = _solve(amounts_NF, measured_N)
        return Fit(tuple(float(pace) for pace in paces_F), float(np.quantile(errors_N, _COVERAGE, method="higher")))

    def value(self, amounts_F: Sequence[float]) -> float:
        """The figure of a candidate with these amounts."""
        return sum(pace * amount for pace, amount in zip(self.paces_F, amounts_F, strict=True))

    def interval(self, amounts_F: Sequence[float]) -> Interval:
        """The figure with its interval."""
        value = self.value(amounts_F)
        return Interval(value, value * max(1 - self.half_width, _LEAST_SHARE), value * (1 + self.half_width))


def _solve(amounts_NF: Array, measured_N: Array) -> Array:
    """Paces ≥ 0 with the least squares of relative errors; columns scaled alike, for the solver's sake."""
    import numpy as np
    from scipy.optimize import nnls

    scale_F = amounts_NF.max(0)
    scale_F[scale_F == 0] = 1.0
    paces_F, _ = nnls(amounts_NF / scale_F / measured_N[:, None], np.ones(len(measured_N)))
    return np.asarray(paces_F / scale_F, np.float64)


@dataclass(frozen=True)
class LatencyModel:
    """Foretells what a candidate costs on the device of a profile."""

    decode: Fit
    prefill: Fit
    memory: Fit
    file: Fit
    prompts: tuple[int, ...]

    @staticmethod
    def fit(profile: Profile) -> LatencyModel:
        """The model of a profile; raises LmdistillError where it holds too few candidates."""
        rows = list(profile.measured.values())
        if len(rows) < LEAST:
            raise LmdistillError(
                f"{len(rows)} timed candidates do not tell a device's paces",
                fix=f"time at least {LEAST}: run `lmdistill profile-device` to its end",
            )
        prompts, context = profile.plan.prompts, max(profile.plan.prompts)

        def fitted(amounts: Callable[[Candidate], Sequence[float]], measured: Sequence[float]) -> Fit:
            return Fit.of([amounts(row.candidate) for row in rows], measured)

        return LatencyModel(
            decode=fitted(features.decode, [profile.seconds(row, DECODE) / profile.plan.decode for row in rows]),
            prefill=Fit.of(
                [features.prefill(row.candidate, tokens) for tokens in prompts for row in rows],
                [profile.seconds(row, prefill_task(tokens)) for tokens in prompts for row in rows],
            ),
            memory=fitted(lambda each: features.memory(each, context), [row.peak_rss_bytes for row in rows]),
            file=fitted(features.file, [row.file_bytes for row in rows]),
            prompts=prompts,
        )

    def decode_seconds(self, candidate: Candidate) -> float:
        """Seconds a generated token takes: the `Cost` by which sub-spaces are cut."""
        return self.decode.value(features.decode(candidate))

    def ttft_seconds(self, candidate: Candidate, tokens: int) -> float:
        """Seconds to the first token after a prompt of `tokens` tokens."""
        return self.prefill.value(features.prefill(candidate, tokens))

    def predict(self, candidate: Candidate) -> Prediction:
        """All figures of a candidate, with intervals."""
        return Prediction(
            decode_tps=self.decode.interval(features.decode(candidate)).inverse(),
            ttft_ms={t: self.prefill.interval(features.prefill(candidate, t)).times(1e3) for t in self.prompts},
            rss_bytes=self.memory.interval(features.memory(candidate, max(self.prompts))),
            file_bytes=self.file.interval(features.file(candidate)),
        )

    def to_json(self) -> dict[str, Any]:
        """Paces and half-widths, for the record."""
        from dataclasses import asdict

        return asdict(self)
