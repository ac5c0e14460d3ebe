"""From a recipe to a plan: each stage's key, fingerprint and state, known before anything runs or is downloaded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lmdistill.asset_spec import AssetSpec, ModelSpec
from lmdistill.errors import LmdistillError, PreflightError, nearest
from lmdistill.pipeline import origins
from lmdistill.pipeline.keys import SHORT, assets_in, fingerprint, stage_key, tool_versions
from lmdistill.pipeline.stage import Artefact, Planned, StageConfig
from lmdistill.pipeline.store import Store
from lmdistill.recipe import Entry, Recipe
from lmdistill.recipe.schema import TEACHER

State = Literal["cached", "resume", "run", "left out"]


@dataclass(frozen=True)
class Selection:
    """Which stages to run (a range, or one alone) and which to make again although they are there."""

    first: str | None = None
    last: str | None = None
    only: str | None = None
    force: tuple[str, ...] = ()

    def names(self, recipe: Recipe) -> set[str]:
        """The names in the range; LmdistillError for a name that the recipe lacks or an empty range."""
        order = [entry.name for entry in recipe.entries]
        for option, name in (("--from", self.first), ("--until", self.last), ("--only", self.only)):
            _known(option, name, order)
        for name in self.force:
            _known("--force", name, order)
        if self.only and (self.first or self.last):
            raise LmdistillError("--only does not go with --from or --until", fix="use one or the other")
        if self.only:
            return {self.only}
        start = order.index(self.first) if self.first else 0
        end = order.index(self.last) + 1 if self.last else len(order)
        if start >= end:
            raise LmdistillError(f"--from {self.first} comes after --until {self.last}", fix="swap them")
        return set(order[start:end])


def _once(specs: Iterable[AssetSpec]) -> list[AssetSpec]:
    return list(dict.fromkeys(AssetSpec(source=spec.source, sha256=spec.sha256) for spec in specs))


def _known(option: str, name: str | None, order: Sequence[str]) -> None:
    if name is not None and name not in order:
        what = f"{option} {name}: the recipe has no stage of this name{nearest(name, order)}"
        raise LmdistillError(what, fix=f"its stages are: {', '.join(order)}")


@dataclass(frozen=True)
class Step:
    """One stage of the plan."""

    number: int
    entry: Entry
    key: dict[str, Any]
    planned: Planned
    state: State
    python: str  # the interpreter that runs it

    @property
    def name(self) -> str:
        """The stage's name in the recipe."""
        return self.entry.name

    @property
    def short(self) -> str:
        """The fingerprint's first characters, as in the folder's name."""
        return self.planned.fingerprint[:SHORT]

    @property
    def runs(self) -> bool:
        """Whether this stage has work to do."""
        return self.state in ("run", "resume")


@dataclass(frozen=True)
class Plan:
    """Every stage of a recipe against what its run folder holds."""

    recipe: Recipe
    store: Store
    steps: tuple[Step, ...]
    teacher: Planned | None
    selection: Selection = field(default_factory=Selection)

    def running(self) -> list[Step]:
        """The steps that have work to do, in order."""
        return [step for step in self.steps if step.runs]

    def needs_teacher(self) -> bool:
        """Whether a stage that will run reads the teacher's weights."""
        return any(
            step.entry.stage.uses_teacher(step.entry.config) or TEACHER in _names(step.entry) for step in self.running()
        )

    def data_assets(self) -> list[AssetSpec]:
        """The assets, other than models, of the stages that will run; each once."""
        return _once(asset for asset in self._assets() if not isinstance(asset, ModelSpec))

    def model_assets(self) -> list[AssetSpec]:
        """The models that the stages that will run read, the recipe's teacher first; each once."""
        teacher = [self.recipe.teacher] if self.recipe.teacher and self.needs_teacher() else []
        return _once([*teacher, *(asset for asset in self._assets() if isinstance(asset, ModelSpec))])

    def _assets(self) -> list[AssetSpec]:
        return [asset for step in self.running() for asset in assets_in(step.entry.config)]


def make_plan(recipe: Recipe, run_dir: Path, selection: Selection | None = None) -> Plan:
    """Fingerprint every stage and look up what is there; downloads nothing, writes nothing.

    Raises PreflightError with everything that stands in the way: missing local files, a stage left out of the
    range whose result is not there.
    """
    from lmdistill import assets

    selection = selection or Selection()
    selected = selection.names(recipe)
    store = Store(run_dir)
    problems: list[LmdistillError] = []
    identities: dict[tuple[str, str | None], str] = {}

    def identity(spec: AssetSpec) -> str:
        asset = (spec.source, spec.sha256)
        if asset not in identities:
            try:
                identities[asset] = assets.identity(spec)
            except LmdistillError as error:
                problems.append(error)
                identities[asset] = "missing"
        return identities[asset]

    teacher = None
    if recipe.teacher is not None:
        teacher = Planned(TEACHER, TEACHER, "model", identity(recipe.teacher), StageConfig())
    planned: dict[str, Planned] = {TEACHER: teacher} if teacher else {}
    steps = []
    for number, entry in enumerate(recipe.entries, 1):
        inputs = {role: [planned[name] for name in names] for role, names in entry.inputs.items()}
        python = recipe.runtime.python.get(entry.name, sys.executable)
        tools = tool_versions(entry.stage.tools_used(entry.config), python)
        digest = teacher.fingerprint if teacher else None
        key = stage_key(entry.stage, entry.name, entry.config, inputs, digest, tools, identity)
        step = _step(number, entry, key, inputs, store, selection, selected, python)
        planned[entry.name] = step.planned
        steps.append(step)
    problems += _missing_inputs(steps)
    raise_all(problems)
    return Plan(recipe, store, tuple(steps), teacher, selection)


def _step(
    number: int,
    entry: Entry,
    key: dict[str, Any],
    inputs: dict[str, list[Planned]],
    store: Store,
    selection: Selection,
    selected: set[str],
    python: str,
) -> Step:
    stage = entry.stage
    artefact = store.find(entry.name, stage.name, stage.output, key)
    begun = store.partial(entry.name, key).exists() or (artefact is None and store.folder(key) is not None)
    if artefact and origins.others(artefact.path, origins.contents(_there(inputs))):
        artefact = None
    state: State = "cached" if artefact else "resume" if begun else "run"
    if entry.name in selection.force:
        state = "run"
    if entry.name not in selected and state != "cached":
        state = "left out"
    planned = Planned(entry.name, stage.name, stage.output, fingerprint(key), entry.config, inputs, artefact)
    return Step(number, entry, key, planned, state, python)


def _there(inputs: dict[str, list[Planned]]) -> list[Artefact]:
    return [one.artefact for many in inputs.values() for one in many if one.artefact]


def _missing_inputs(steps: Sequence[Step]) -> list[LmdistillError]:
    """Stages that were left out although one that runs needs their result."""
    left_out = {step.name for step in steps if step.state == "left out"}
    return [
        PreflightError(
            f"stage '{step.name}' needs the result of '{name}', which is not there (or was made"
            " from other bytes than its inputs have now) and is left out of this run",
            fix=f"run it first, for instance with --until {name}",
        )
        for step in steps
        if step.runs
        for name in _names(step.entry)
        if name in left_out
    ]


def _names(entry: Entry) -> list[str]:
    return [name for names in entry.inputs.values() for name in names]


def raise_all(problems: Iterable[LmdistillError]) -> None:
    """Raise what was found: one error as it is, several as one PreflightError that shows each once."""
    found = list({problem.render(): problem for problem in problems}.values())
    if len(found) == 1:
        raise found[0]
    if found:
        text = "\n".join(f"- {problem.render()}" for problem in found)
        raise PreflightError(f"{len(found)} things stand in the way of this run; nothing was started\n{text}")
