"""Fingerprints: what is semantic changes them, where and how fast does not, nor the order of keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdistill.asset_spec import AssetSpec
from lmdistill.pipeline.keys import assets_in, fingerprint, semantic, stage_key, tool_versions
from lmdistill.pipeline.stage import AddedKey, Planned, StageConfig
from lmdistill.stages import load_stage

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SEMANTIC = {
    "text": st.text(max_size=8),
    "repeat": st.integers(1, 9),
    "mode": st.sampled_from(["upper", "lower"]),
    "parts": st.lists(st.fixed_dictionaries({"weight": st.floats(0, 9)}), max_size=3),
    "data": st.none() | st.sampled_from([{"source": "hf:a/b@c"}, {"source": "hf:a/b@d"}]),
}
RUNTIME = {
    "workers": st.none() | st.integers(1, 9),
    "disk": st.integers(0, 10**9),
    "memory": st.none() | st.integers(1, 10**9),
}


def identity(spec: AssetSpec) -> str:
    return f"identity of {spec.source}"


def key_of(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    stage = load_stage("gather")
    known = {"teacher": None, "tools": {}, "inputs": {}} | changes
    return stage_key(stage, "gather", stage.Config.model_validate(values), identity=identity, **known)


def digest_of(values: dict[str, Any], **changes: Any) -> str:
    return fingerprint(key_of(values, **changes))


@QUICK
@given(base=st.fixed_dictionaries(SEMANTIC), runtime=st.fixed_dictionaries(RUNTIME), batch=st.integers(1, 99))
def test_runtime_keys_never_change_it(base: dict[str, Any], runtime: dict[str, Any], batch: int) -> None:
    parts = [part | {"batch": batch} for part in base["parts"]]
    assert digest_of(base | runtime | {"parts": parts}) == digest_of(base)


@QUICK
@given(base=st.fixed_dictionaries(SEMANTIC), data=st.data())
def test_order_of_keys_never_changes_it(base: dict[str, Any], data: st.DataObject) -> None:
    shuffled = {key: base[key] for key in data.draw(st.permutations(list(base)))}
    assert digest_of(shuffled) == digest_of(base)


@QUICK
@given(base=st.fixed_dictionaries(SEMANTIC), key=st.sampled_from(sorted(SEMANTIC)), data=st.data())
def test_every_semantic_key_changes_it(base: dict[str, Any], key: str, data: st.DataObject) -> None:
    other = data.draw(SEMANTIC[key].filter(lambda value: value != base[key]))
    assert digest_of(base | {key: other}) != digest_of(base)


def test_an_asset_counts_by_identity_not_by_place() -> None:
    specs = [AssetSpec(source="here.txt", sha256="a" * 64), AssetSpec(source="there.txt", sha256="a" * 64)]
    same = [semantic(spec, lambda spec: str(spec.sha256)) for spec in specs]
    assert same[0] == same[1] == {"asset": "a" * 64}


def test_keys_of_an_asset_s_subclass_count() -> None:
    class Column(AssetSpec):
        text: str = "0"

    assert semantic(Column(source="a", text="1"), identity) != semantic(Column(source="a"), identity)


def test_paths_in_a_configuration_count_by_content() -> None:
    class Config(StageConfig):
        file: Path

    found = semantic(Config(file=Path("x.txt")), identity)
    assert found == {"file": {"asset": "identity of x.txt"}}


def test_a_key_added_later_counts_only_off_its_default() -> None:
    class Before(StageConfig):
        k: int = 32

    class After(Before):
        top_p: Annotated[float | None, AddedKey()] = None

    assert semantic(After(), identity) == semantic(Before(), identity)
    assert semantic(After(top_p=0.9), identity) == {"k": 32, "top_p": 0.9}


def test_version_inputs_and_tools_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    base = digest_of({})
    planned = Planned("c", "gather", "corpus", "f" * 64, StageConfig())
    assert digest_of({}, inputs={"corpus": [planned]}) != base
    assert digest_of({}, tools={"torch": "2"}) != digest_of({}, tools={"torch": "3"})
    assert digest_of({}, teacher="t") == base, "the toy stage does not use the teacher"
    monkeypatch.setattr(type(load_stage("gather")), "version", 2)
    assert digest_of({}) != base


def test_teacher_counts_where_it_is_used() -> None:
    stage = load_stage("learn")

    def of(teacher: str, uses: bool) -> str:
        config = stage.Config.model_validate({"with_teacher": uses})
        return fingerprint(stage_key(stage, "learn", config, {}, teacher, {}, identity))

    assert of("a", True) != of("b", True)
    assert of("a", False) == of("b", False)


@pytest.mark.parametrize(("stage", "counts"), [("learn", False), ("summary", True)])
def test_names_count_only_where_they_reach_the_output(stage: str, counts: bool) -> None:
    chosen = load_stage(stage)
    role = chosen.inputs[0].role

    def of(own: str, given: str) -> str:
        inputs = {role: [Planned(given, "gather", "corpus", "f" * 64, StageConfig())]}
        return fingerprint(stage_key(chosen, own, chosen.Config(), inputs, None, {}, identity))

    assert of("x", "a") == of("y", "a")
    assert (of("x", "a") != of("x", "b")) is counts


def test_uses_names_brings_names_into_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = load_stage("learn")
    monkeypatch.setattr(type(chosen), "uses_names", True)
    keys = [stage_key(chosen, name, chosen.Config(), {}, None, {}, identity) for name in ("a", "b")]
    assert fingerprint(keys[0]) != fingerprint(keys[1])


def test_key_survives_json() -> None:
    key = key_of({"parts": [{"weight": 0.1}]}, tools=tool_versions(("pydantic", "no-such-package")))
    assert fingerprint(json.loads(json.dumps(key))) == fingerprint(key)
    assert key["tools"]["no-such-package"] == "absent"
    assert key["tools"]["pydantic"] != "absent"


def test_assets_in_finds_nested_assets() -> None:
    config = load_stage("gather").Config.model_validate({"data": "hf:a/b@c"})
    assert [asset.source for asset in assets_in({"x": [config]})] == ["hf:a/b@c"]
