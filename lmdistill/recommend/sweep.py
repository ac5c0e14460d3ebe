"""The sweep: Optuna proposes, short trainings answer, a journal keeps the answers.

Only finished trials are ever written down, and each proposal is drawn from them and a seed of its own: a sweep that was
killed goes on to the result it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.errors import LmdistillError, PreflightError, StageError
from lmdistill.evaluation.divergence import ratio_and_error
from lmdistill.losses import registry

if TYPE_CHECKING:
    import optuna

LOSSES = ("decoupled_topk", "bd_kd", "skew_kl", "ce")  # ce: what a sweep is there to doubt
WEIGHTS = (0.3, 0.5, 0.7, 0.9, 1.0)
TEMPERATURES = (1.0, 2.0)
STARTUP = 5  # trials before proposals follow what was found
ATTEMPTS, GUIDED = 40, 4  # at a combination that was not tried yet; so many of them follow what was found

Params = dict[str, Any]  # loss, layers, and kd_weight and temperature where the loss has them


@dataclass(frozen=True)
class Outcome:
    """One trial."""

    params: Params
    tokens: int
    parameters: int
    nll_R: list[float]  # sums over each held-out row
    predictions_R: list[int]

    @property
    def nll(self) -> float:
        """Nats a token."""
        return math.fsum(self.nll_R) / sum(self.predictions_R)

    def over(self, other: Outcome) -> tuple[float, float]:
        """How much more loss than `other` on the same predictions, and its standard error over rows."""
        differences_R = [ours - theirs for ours, theirs in zip(self.nll_R, other.nll_R, strict=True)]
        mean, error = ratio_and_error(differences_R, self.predictions_R)
        return mean, error or 0.0


Try = Callable[[Params], Outcome]


def check_optuna() -> None:
    """Raise PreflightError where it is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise PreflightError(
            "the sweep needs Optuna", fix="pip install 'lmdistill[recommend]', or use --no-sweep for rules alone"
        ) from error


def suggest(trial: optuna.trial.Trial, depths: tuple[int, ...]) -> Params:
    """A point of the search space."""
    loss = trial.suggest_categorical("loss", LOSSES)
    params: Params = {"loss": loss, "layers": trial.suggest_categorical("layers", depths)}
    if loss != "ce":
        params["kd_weight"] = trial.suggest_categorical("kd_weight", WEIGHTS)
    if "temperature" in registry.entry(loss).options:
        params["temperature"] = trial.suggest_categorical("temperature", TEMPERATURES)
    return params


class Sweep:
    """A study of `trials` trials in the journal at `file`, those of the same `identity` kept."""

    def __init__(self, file: Path, identity: str, seed: int, depths: tuple[int, ...]) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.seed, self.depths = seed, depths
        file.parent.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
        self.study = optuna.create_study(study_name=identity, storage=storage, load_if_exists=True)

    def run(
        self, fixed: list[Params], trials: int, attempt: Try, tell: Callable[[int, Outcome], None]
    ) -> list[Outcome]:
        """All outcomes in order; the first trials are `fixed`. StageError where none of them has a finite loss."""
        while (number := len(self.study.get_trials(deepcopy=False))) < trials:
            proposed = self._propose(fixed, number)
            if proposed is None:
                break  # everything was tried
            params, distributions = proposed
            outcome = attempt(params)
            self._keep(params, distributions, outcome)
            tell(number, outcome)
        outcomes = self.outcomes()
        if not outcomes:
            raise StageError(
                "no trial ended with a finite loss", fix="look at the data, or lower the teacher's precision"
            )
        return outcomes

    def outcomes(self) -> list[Outcome]:
        """Those of finished trials, in order."""
        import optuna

        done = (optuna.trial.TrialState.COMPLETE,)
        return [Outcome(**trial.user_attrs["outcome"]) for trial in self.study.get_trials(deepcopy=False, states=done)]

    def _propose(self, fixed: list[Params], number: int) -> tuple[Params, Mapping[str, Any]] | None:
        """The next point and the space it is from; None where nothing new is found."""
        import optuna

        done = self.study.get_trials(deepcopy=True)
        tried = [trial.user_attrs["params"] for trial in done]
        for attempt in range(ATTEMPTS):
            seed = (self.seed * 1009 + number) * ATTEMPTS + attempt
            guided = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
            sampler = guided if attempt < GUIDED else optuna.samplers.RandomSampler(seed=seed)
            memory = optuna.create_study(sampler=sampler)
            memory.add_trials(done)
            if number < len(fixed):
                memory.enqueue_trial(fixed[number])
            trial = memory.ask()
            params = suggest(trial, self.depths)
            if params not in tried:
                return params, trial.distributions
        return None

    def _keep(self, params: Params, distributions: Mapping[str, Any], outcome: Outcome) -> None:
        import optuna

        finite = math.isfinite(outcome.nll)
        self.study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if finite else optuna.trial.TrialState.FAIL,
                value=outcome.nll if finite else None,
                params=params,
                distributions=dict(distributions),
                user_attrs={"params": params, "outcome": asdict(outcome) if finite else None},
            )
        )


def winner(outcomes: list[Outcome]) -> tuple[Outcome, str]:
    """The smallest student that the text cannot tell from the best one, and why it was taken."""
    if not outcomes:
        raise LmdistillError("a sweep without outcomes has no winner")
    best = min(outcomes, key=lambda one: one.nll)
    level = [one for one in outcomes if one is best or one.over(best)[0] <= one.over(best)[1]]
    chosen = min(level, key=lambda one: (one.parameters, one.nll))
    if chosen is best:
        return best, "the lowest held-out loss"
    excess, error = chosen.over(best)
    return chosen, f"the smallest within one standard error of the lowest ({excess:+.4f} ± {error:.4f} nats)"
