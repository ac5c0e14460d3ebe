"""From data and a teacher to a recommended recipe: measure, propose, sweep, write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmdistill import assets
from lmdistill.pipeline.events import Sink
from lmdistill.pipeline.files import fsync
from lmdistill.pipeline.keys import canonical
from lmdistill.pipeline.lock import run_lock
from lmdistill.pipeline.stage import Artefact, ModelRef, Progress, Runtime
from lmdistill.recommend import features as measured
from lmdistill.recommend import plan as plans
from lmdistill.recommend import rules, sweep
from lmdistill.recommend.evidence import conclude, words
from lmdistill.recommend.recipe_text import compose
from lmdistill.recommend.request import Request, asset, check
from lmdistill.recommend.samples import Bench, K, separator_of, source_keys

ROW_TOKENS, VALID_TOKENS = 256, 4_096  # of the sample; of the held-out text that trials are scored on
JOURNAL, PRECISION = "study.journal", "bfloat16"


@dataclass(frozen=True)
class Recommendation:
    """The recipe's text, and what was found."""

    text: str
    proposal: rules.Proposal
    features: measured.Features
    outcomes: Sequence[sweep.Outcome]


def recommend(request: Request, progress: Progress, sinks: Sequence[Sink] = ()) -> Recommendation:
    """Write a recipe to `request.out`. Killed, the same call goes on.

    Raises LmdistillError for a request that cannot be met, AssetError where data or teacher are missing.
    """
    check(request)
    if request.sweep:
        sweep.check_optuna()
    with run_lock(request.work):
        for source in request.sources:
            assets.fetch(asset("data", source), progress)
        teacher = assets.model_folder(asset("--teacher", request.teacher), progress)
        shape = measured.teacher_shape(teacher)
        rules.depths(request, shape)
        rules.grown_architecture(shape)
        found = _recommend(request, teacher, shape, progress, sinks)
    request.out.parent.mkdir(parents=True, exist_ok=True)
    partial = request.out.with_name(request.out.name + ".tmp")
    partial.write_text(found.text, encoding="utf-8")
    fsync(partial)
    partial.rename(request.out)
    return found


def _recommend(
    request: Request, teacher: ModelRef, shape: dict[str, Any], progress: Progress, sinks: Sequence[Sink]
) -> Recommendation:
    bench = Bench(request, PRECISION, separator_of(teacher.path), sinks)
    made = bench.make("sample", bench.sample(ROW_TOKENS, request.sample_tokens, ROW_TOKENS))
    features = measured.measure(request, made["corpus"], made["teach"])
    proposal = rules.propose(features, shape, request, PRECISION, bench.separator)
    evidence = list(measured.describe(features, K))
    outcomes: list[sweep.Outcome] = []
    if request.sweep:
        planned = plans.plan(request, proposal, shape, made["teach"])
        lab = Laboratory.open(bench, proposal, planned, shape)
        outcomes, doubled = lab.run(proposal, progress)
        proposal, said = conclude(proposal, outcomes, doubled, planned, request)
        proposal = rules.sized(proposal, features, shape)
        evidence += said
    else:
        evidence.append("Nothing was trained: loss, λ, τ, layers and tokens follow from rules, not from measurements.")
    text = compose(request.out.stem, request, proposal, source_keys(request), evidence)
    return Recommendation(text, proposal, features, outcomes)


@dataclass(frozen=True)
class Laboratory:
    """Students, cache and held-out text of a sweep."""

    bench: Bench
    planned: plans.SweepPlan
    made: dict[str, Artefact]
    shape: dict[str, Any]

    @classmethod
    def open(cls, bench: Bench, first: rules.Proposal, planned: plans.SweepPlan, shape: dict[str, Any]) -> Laboratory:
        """Make what trials need, or take what is there."""
        students = {depth: rules.student_keys(first.architecture, depth) for depth in planned.tokens}
        sample = bench.sample(first.sequence_length, planned.rows_tokens, VALID_TOKENS)
        return cls(bench, planned, bench.make("sweep", [*sample, *bench.students(students)]), shape)

    def run(self, first: rules.Proposal, progress: Progress) -> tuple[list[sweep.Outcome], sweep.Outcome]:
        """All trials, and the winner once more at twice its tokens."""
        request, depths = self.bench.request, tuple(self.planned.tokens)
        start = {"loss": first.loss, "layers": first.layers, "kd_weight": first.kd_weight}
        fixed: list[sweep.Params] = [
            {**start, "temperature": first.temperature},
            {"loss": "ce", "layers": first.layers},
        ]
        identity = self._identity(fixed)
        journal = request.work / JOURNAL
        trials = sweep.Sweep(journal, identity, request.seed, depths)
        run = self._attempt(first, 1)
        outcomes = trials.run(fixed, self.planned.trials, run, self._teller(progress, self.planned.trials))
        chosen, _ = sweep.winner(outcomes)
        again = sweep.Sweep(journal, f"{identity}-doubled", request.seed, depths)
        last = again.run([chosen.params], 1, self._attempt(first, plans.DOUBLED), self._teller(progress, 1))
        return outcomes, last[0]

    def _identity(self, fixed: list[sweep.Params]) -> str:
        """What the study's trials depend on."""
        # Not all of `made`: the teacher is among it only in a run that had something to make.
        names = ["corpus", "teach", *(name for name in self.made if name.startswith("student_"))]
        inputs = {name: self.made[name].fingerprint for name in names}
        space = [sweep.LOSSES, sweep.WEIGHTS, sweep.TEMPERATURES, sweep.STARTUP]
        tokens = {str(depth): tokens for depth, tokens in self.planned.tokens.items()}
        key = {"inputs": inputs, "tokens": tokens, "fixed": fixed, "space": space, "seed": self.bench.request.seed}
        return hashlib.sha256(canonical(key).encode()).hexdigest()[:16]

    def _attempt(self, first: rules.Proposal, times: int) -> sweep.Try:
        """Train one point of the space at `times` a trial's tokens."""
        from lmdistill.evaluation.heldout import read_heldout
        from lmdistill.recommend.trial import train_and_score
        from lmdistill.training.config import DistillConfig

        device = Runtime(self.bench.request.device).resolve_device()
        heldout = read_heldout(self.made["corpus"].out, "valid", VALID_TOKENS)

        def attempt(params: sweep.Params) -> sweep.Outcome:
            keys = {key: value for key, value in params.items() if key != "layers"}
            tokens = times * self.planned.tokens[params["layers"]]
            config = DistillConfig(**keys, tokens=tokens, batch_rows=first.batch_rows, seed=self.bench.request.seed)
            student = self.made[f"student_{params['layers']}"].model()
            scratch = self.bench.request.work / "trial"
            scored = train_and_score(config, student, self.made["teach"].out, heldout, scratch, device)
            size = rules.parameters(first, self.shape, params["layers"])
            return sweep.Outcome(params, scored.tokens, size, scored.rows.sums["nll"], scored.rows.predictions)

        return attempt

    def _teller(self, progress: Progress, trials: int) -> Callable[[int, sweep.Outcome], None]:
        def tell(number: int, outcome: sweep.Outcome) -> None:
            progress.update(number + 1, trials, "trials", nll=outcome.nll)
            progress.note(f"trial {number + 1} of {trials}: {words(outcome.params)}: {outcome.nll:.4f} nats")

        return tell
