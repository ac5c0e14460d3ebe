"""λ and τ that change in training: where they start and end, what lies between, and what the steps are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_toys import LENGTH, train_toy

from lmdistill.errors import LmdistillError
from lmdistill.pipeline.keys import semantic
from lmdistill.pipeline.stage import Artefact, PreflightContext
from lmdistill.stages.distill import DistillStage
from lmdistill.training.config import DistillConfig
from lmdistill.training.schedules import Change, shapes, value_at

SHARES = st.floats(0, 1)
CHANGES = st.builds(
    lambda to, shape, span: Change(to=to, shape=shape, after=min(span), until=max(span)),
    st.floats(0, 10),
    st.sampled_from(sorted(shapes())),
    st.tuples(SHARES, SHARES),
)


@settings(max_examples=60, deadline=None)
@given(CHANGES, st.floats(0, 10), st.integers(2, 50))
def test_a_schedule_stays_between_its_ends_and_never_turns_back(change: Change, start: float, steps: int) -> None:
    values = [value_at(start, change, step, steps) for step in range(steps)]
    assert all(min(start, change.to) <= value <= max(start, change.to) for value in values)
    assert values in (sorted(values), sorted(values, reverse=True))


@settings(max_examples=60, deadline=None)
@given(CHANGES, st.floats(0, 10), st.integers(2, 50))
def test_before_its_span_nothing_has_changed_and_after_it_everything(change: Change, start: float, steps: int) -> None:
    for step in range(steps):
        at, value = step / (steps - 1), value_at(start, change, step, steps)
        if at < change.after:
            assert value == start
        if at >= change.until and change.shape != "constant":
            assert value == change.to


@pytest.mark.parametrize("shape", sorted(set(shapes()) - {"constant"}))
def test_the_first_step_has_the_start_and_the_last_one_the_end(shape: str) -> None:
    change = Change(to=0.25, shape=shape)
    assert value_at(0.75, change, 0, 9) == 0.75
    assert value_at(0.75, change, 8, 9) == 0.25


def test_shapes_are_what_their_names_say() -> None:
    ways = {shape: [value_at(0.0, Change(to=1.0, shape=shape), step, 5) for step in range(5)] for shape in shapes()}
    assert ways["linear"] == [0, 0.25, 0.5, 0.75, 1]
    assert ways["step"] == [0, 0, 1, 1, 1]
    assert ways["cosine"] == pytest.approx([0, 0.146447, 0.5, 0.853553, 1], abs=1e-6)
    assert ways["constant"] == [0, 0, 0, 0, 0]


def test_a_span_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="later than until"):
        Change(to=1.0, after=0.6, until=0.5)


KEYS = {"log_steps": 1, "kd_weight": 0.9, "tokens": LENGTH * 8 * 6}


def test_every_step_is_made_with_the_weight_of_its_place(signals: Artefact, student: Artefact, tmp_path: Path) -> None:
    log = train_toy(tmp_path, signals, student, **KEYS, kd_weight_schedule={"to": 0.4})["log"]
    assert [line["kd_weight"] for line in log] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    for line in log:
        assert line["loss"] == pytest.approx(
            line["kd_weight"] * line["kd"] + (1 - line["kd_weight"]) * line["ce"], rel=1e-3
        )


def test_every_step_is_made_with_the_temperature_of_its_place(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    change = {"to": 1.0, "shape": "step"}
    keys = {**KEYS, "temperature": 4.0, "lr": 1e-9}  # the student stays, so that a step's loss is that of its τ
    moving = train_toy(tmp_path / "moving", signals, student, **keys, temperature_schedule=change)["log"]
    for tau, steps in ((4.0, range(3)), (1.0, range(3, 6))):
        still = train_toy(tmp_path / str(tau), signals, student, **{**keys, "temperature": tau})["log"]
        assert all(moving[step]["kd"] == still[step]["kd"] for step in steps)
        assert all(moving[step]["temperature"] == tau for step in steps)
        assert "temperature" not in still[0]


def test_a_schedule_to_the_same_value_trains_the_same_model(
    signals: Artefact, student: Artefact, tmp_path: Path
) -> None:
    train_toy(tmp_path / "plain", signals, student, **KEYS)
    train_toy(tmp_path / "same", signals, student, **KEYS, kd_weight_schedule={"to": 0.9, "shape": "cosine"})
    models = [(tmp_path / name / "out/model/model.safetensors").read_bytes() for name in ("plain", "same")]
    assert models[0] == models[1]


def _preflight(folder: Path, **keys: Any) -> list[LmdistillError]:
    return DistillStage().preflight(PreflightContext("distill", DistillConfig(**keys), {}, None, folder))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"kd_weight_schedule": {"to": 0.1, "shape": "linaer"}}, "did you mean 'linear'"),
        ({"loss": "forward_kl", "temperature_schedule": {"to": 2.0}}, "does not read `temperature_schedule`"),
        ({"loss": "ce", "kd_weight_schedule": {"to": 0.5}}, "does not read `kd_weight_schedule`"),
    ],
)
def test_a_schedule_that_cannot_be_is_named_before_work(keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    [problem] = _preflight(tmp_path, **keys)
    assert named in problem.render()


def test_schedules_are_in_the_fingerprint_only_where_there_are_any() -> None:
    assert not {"kd_weight_schedule", "temperature_schedule"} & set(semantic(DistillConfig(), str))
    said = semantic(DistillConfig.model_validate({"kd_weight_schedule": {"to": 0.2}}), str)
    assert said["kd_weight_schedule"]["to"] == 0.2
    assert json.dumps(said)
