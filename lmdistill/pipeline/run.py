"""Run a plan: preflight, fetch, then each stage in a process of its own; what was finished before is kept."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmdistill.asset_spec import AssetSpec
from lmdistill.pipeline import origins
from lmdistill.pipeline.environment import write_environment, write_lock
from lmdistill.pipeline.events import EventFile, Events, Sink
from lmdistill.pipeline.files import write_json
from lmdistill.pipeline.jobs import Json, artefact_to_json, model_to_json
from lmdistill.pipeline.lock import run_lock
from lmdistill.pipeline.plan import Plan, Step, make_plan, raise_all
from lmdistill.pipeline.preflight import run_preflights, runtime_job
from lmdistill.pipeline.process import call
from lmdistill.pipeline.stage import Artefact, ModelRef
from lmdistill.pipeline.store import check, missing_files, read_manifest
from lmdistill.recipe.schema import TEACHER


def run_pipeline(plan: Plan, sinks: Sequence[Sink] = ()) -> dict[str, Artefact]:
    """Bring every selected stage's artefact about; returns them by name.

    Raises LockedError where another pipeline works in the run folder, PreflightError before anything has started,
    IntegrityError where an input is not what was written, StageError or the stage's own error where one fails,
    StageError after everything is done where the report breaks a gate of the recipe.
    """
    with run_lock(plan.store.root):
        plan.store.put_back()  # what a killed `--force` had set aside
        # planned again under the lock: another pipeline may have finished since
        plan = make_plan(plan.recipe, plan.store.root, plan.selection)
        events = Events([EventFile(plan.store.root / "events.jsonl"), *sinks])
        try:
            return Runner(plan, events).run()
        except KeyboardInterrupt:
            events.emit("run_interrupted")
            raise
        finally:
            events.close()


class Runner:
    """One run of one plan."""

    def __init__(self, plan: Plan, events: Events) -> None:
        """Nothing happens yet."""
        self.plan, self.events, self.root = plan, events, plan.store.root
        self.artefacts: dict[str, Artefact] = {}
        self.trusted: set[Path] = set()  # folders whose every byte was checked or written by this run
        self.made: set[Path] = set()  # folders that this run has made
        self.ran: list[str] = []  # stages that this run has worked on
        self.peaks: dict[str, int | None] = {}  # stage → peak resident bytes of its process
        self.teacher: ModelRef | None = None

    def run(self) -> dict[str, Artefact]:
        """Prepare, then go through the stages in order."""
        started = time.monotonic()
        names = [step.name for step in self.plan.running()]
        self.events.emit("run_started", recipe=self.plan.recipe.name, stages=names)
        for step in self.plan.steps:
            if step.state == "cached" and step.planned.artefact:
                check(step.planned.artefact.path, digests=False)
        write_lock(self.plan)
        if names:
            write_environment(self.plan)
            self._prepare()
        for step in self.plan.steps:
            self._step(step)
        self.events.emit("run_finished", seconds=round(time.monotonic() - started, 3), ran=self.ran)
        self._report()
        return self.artefacts

    def _prepare(self) -> None:
        """All preflights, then the assets, then all preflights once more if anything was fetched."""
        from lmdistill import assets

        plan, log = self.plan, self.root / "logs" / "preflight.log"
        teacher = plan.recipe.teacher
        self.teacher = assets.model_available(teacher) if teacher else None
        raise_all(run_preflights(plan, self.teacher, log).problems)
        absent = [spec for spec in plan.data_assets() if assets.available(spec) is None]
        models = [spec for spec in plan.model_assets() if assets.model_available(spec) is None]
        if absent or models:
            self._fetch(absent, models)
            self.teacher = assets.model_available(teacher) if teacher else None
            raise_all(run_preflights(plan, self.teacher, log).problems)
        if self.teacher is not None:
            self._place_teacher(self.teacher)

    def _fetch(self, data: Sequence[AssetSpec], models: Sequence[AssetSpec]) -> None:
        """Bring what is not on this machine yet, in a process of its own: converting a GGUF takes memory."""
        job = {
            "task": "fetch",
            "assets": [spec.model_dump() for spec in data],
            "models": [spec.model_dump() for spec in models],
            "runtime": runtime_job(self.plan),
        }
        started = time.monotonic()
        self.events.emit("fetch_started", sources=[spec.source for spec in (*data, *models)])
        call(job, "fetching the assets", sys.executable, self.root / "logs" / "assets.log", self._pass_on("assets"))
        self.events.emit("fetch_finished", seconds=round(time.monotonic() - started, 3))

    def _place_teacher(self, teacher: ModelRef) -> None:
        """A folder like an artefact's, whose out/model is the teacher, for stages that name it in `from:`."""
        assert self.plan.teacher is not None
        folder = self.root / ".teacher"
        (folder / "out").mkdir(parents=True, exist_ok=True)
        link = folder / "out" / "model"
        link.unlink(missing_ok=True)
        link.symlink_to(teacher.path.absolute(), target_is_directory=True)
        digest = self.plan.teacher.fingerprint
        write_json(folder / "key.json", {"name": TEACHER, "fingerprint": digest, "key": {"stage": TEACHER}})
        write_json(folder / "manifest.json", {"files": {}, "metrics": {}})
        self.artefacts[TEACHER] = Artefact(TEACHER, TEACHER, "model", digest, folder)

    def _step(self, step: Step) -> None:
        place = {"stage": step.name, "number": step.number, "of": len(self.plan.steps)}
        if step.state == "left out":
            return
        if step.name in self.plan.selection.force and step.planned.artefact:
            self._make_again(step, step.planned.artefact, place)
            return
        stage = step.entry.stage
        there = self.plan.store.find(step.name, stage.name, stage.output, step.key)
        if there is None or self._outdated(step, there):
            there = self._make(step, place)
        else:
            self.events.emit("stage_cached", **place, fingerprint=step.planned.fingerprint, folder=there.path.name)
        self.artefacts[step.name] = there

    def _inputs(self, step: Step) -> dict[str, list[Artefact]]:
        roles = step.entry.inputs.items()
        return {role: [self.artefacts[name] for name in names if name in self.artefacts] for role, names in roles}

    def _made_from(self, step: Step) -> origins.Contents:
        return origins.contents(one for many in self._inputs(step).values() for one in many)

    def _outdated(self, step: Step, there: Artefact) -> bool:
        """Whether a finished artefact is of other bytes than its inputs have now, and is to be made again; says so."""
        unlike = origins.others(there.path, self._made_from(step))
        if not unlike:
            return False
        names = [one.name for many in self._inputs(step).values() for one in many if one.fingerprint in unlike]
        again = step.name in self.plan.selection.names(self.plan.recipe)
        what = "is made again" if again else "is stale, and left out of this run"
        text = f"'{step.name}' was made from another {' and '.join(map(repr, names))} of the same key: it {what}"
        self.events.emit("note", stage=step.name, text=text)
        return again

    def _make_again(self, step: Step, old: Artefact, place: Json) -> None:
        """Make a finished artefact anew, and say if it is not the same: then the stage is not deterministic."""
        before = read_manifest(old.path)
        aside = self.plan.store.set_aside(old)
        shutil.rmtree(self.plan.store.partial(step.name, step.key), ignore_errors=True)
        try:
            new = self.artefacts[step.name] = self._make(step, place)
        except BaseException:  # an interruption too: the old one is still good
            self.plan.store.put_back()
            raise
        self._compare(step, before, new.path)
        shutil.rmtree(aside)

    def _compare(self, step: Step, before: Json | None, folder: Path) -> None:
        """Say so where an artefact was there before and has not come out the same; a report's timings never do."""
        if before is not None and step.entry.stage.output != "report" and read_manifest(folder) != before:
            text = f"'{step.name}' came out with other bytes than before from the same key"
            self.events.emit("note", stage=step.name, text=f"{text}; what depends on it is made again")

    def _make(self, step: Step, place: Json) -> Artefact:
        """Run one stage into its partial folder and publish that."""
        store, stage, started = self.plan.store, step.entry.stage, time.monotonic()
        self._check_inputs(step)
        made_from = self._made_from(step)
        before = store.reopen(step.name, step.key, made_from)
        begun = store.partial(step.name, step.key)
        resumed = begun.exists() and not origins.others(begun, made_from)
        folder = store.begin(step.name, step.key, made_from)
        self.events.emit("stage_started", **place, fingerprint=step.planned.fingerprint, resumed=resumed)
        if (folder / "manifest.json").is_file() and not missing_files(folder):  # killed between it and the rename
            final = store.finish(folder, step.number, step.name, step.short)
        else:
            metrics = self._work(step, folder)
            result = {"metrics": metrics, "resumed": resumed, "peak_rss_bytes": self.peaks.get(step.name)}
            final = store.publish(folder, step.number, step.name, result, time.monotonic() - started)
        self.trusted.add(final)
        self.made.add(final)
        self.ran.append(step.name)
        self._compare(step, before, final)
        seconds = round(time.monotonic() - started, 3)
        self.events.emit("stage_finished", stage=step.name, seconds=seconds, folder=final.name)
        return Artefact(step.name, stage.name, stage.output, step.planned.fingerprint, final)

    def _check_inputs(self, step: Step) -> None:
        """Compare what a stage is made from with what was written, to the last byte, once a run."""
        for artefact in (one for many in self._inputs(step).values() for one in many):
            if artefact.path not in self.trusted:
                check(artefact.path, digests=True)
                self.trusted.add(artefact.path)

    def _work(self, step: Step, folder: Path) -> Any:
        """The stage in its own process."""
        job = {
            "task": "run",
            "name": step.name,
            "stage": step.entry.stage.name,
            "config": step.entry.config.model_dump(mode="json", by_alias=True),
            "inputs": {role: [artefact_to_json(one) for one in many] for role, many in self._inputs(step).items()},
            "teacher": model_to_json(self.teacher),
            "partial": str(folder.absolute()),
            "runtime": runtime_job(self.plan) | ({} if step.entry.stage.launches else {"launch": None}),
        }
        log = self.root / "logs" / f"{step.number:02d}-{step.name}.log"
        try:
            several = self.plan.recipe.runtime.launch is not None and step.entry.stage.launches
            program = "launcher" if several else "worker"
            return call(job, f"stage '{step.name}'", step.python, log, self._pass_on(step.name), program)
        except Exception as error:
            what = getattr(error, "what", str(error))
            self.events.emit("stage_failed", stage=step.name, error=what, log=str(log))
            raise

    def _pass_on(self, stage: str) -> Any:
        def pass_on(message: Json) -> None:
            fields = {key: value for key, value in message.items() if key != "type"}
            if message["type"] == "memory":
                self.peaks[stage] = message["peak_rss_bytes"]
            self.events.emit(message["type"], stage=stage, **fields)

        return pass_on

    def _report(self) -> None:
        """Draw the report anew, cached stages included; StageError where it breaks a promise of the recipe."""
        from lmdistill.evaluation import gates, report

        finished = [step for step in self.plan.steps if step.name in self.artefacts]
        failed = report.refresh(self.root, [self._row(step) for step in finished])
        if failed:
            self.events.emit("gates_failed", gates=[result.gate for result in failed])
        gates.demand(failed, self.root / "report.html")

    def _row(self, step: Step) -> Json:
        """A stage as the report lists it; what it cost was written down when it was made."""
        folder = self.artefacts[step.name].path
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return {
            "name": step.name,
            "fingerprint": step.planned.fingerprint,
            "seconds": run["seconds"],
            "tokens": run.get("tokens"),
            "peak_rss_bytes": run.get("peak_rss_bytes"),
            "cached": folder not in self.made,
        }
