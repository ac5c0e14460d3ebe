"""Every key that a recipe may hold is read by something: none is accepted and then ignored."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

import lmdistill
from lmdistill.asset_spec import AssetSpec
from lmdistill.recipe.problems import models_in
from lmdistill.recipe.schema import RuntimeSection
from lmdistill.stages import load_stage, stage_files

ROOT = Path(lmdistill.__file__).parent
# What instances of a model nested in a stage's keys are called where they are read; a stage's own keys: `config`.
NAMES = {
    "AssetSpec": {"spec", "asset", "source", "teacher"},
    "ModelSpec": {"spec", "asset", "source", "teacher", "member"},
    "Source": {"source", "spec", "asset"},
    "SpeedConfig": {"speed"},
    "Gate": {"gate"},
    "IntermediateKeys": {"keys"},
    "Bound": {"bound"},
    "RuntimeSection": {"runtime"},
    "VllmOptions": {"vllm"},
    "EndpointOptions": {"options"},
    "CurriculumConfig": {"config", "curriculum"},
    "TokenWeights": {"keys"},
    "WeightChange": {"change"},
    "TemperatureChange": {"change"},
    "LoraKeys": {"keys", "lora"},
    "QuantizeKeys": {"keys", "quantize"},
    "LaunchSection": {"launch"},
    "FsdpKeys": {"fsdp"},
    "DeepspeedKeys": {"deepspeed"},
    "SpaceConfig": {"keys", "space"},
    "BandConfig": {"band"},
    "TimingConfig": {"timing"},
    "TrainingKeys": {"training"},
    "SupernetKeys": {"keys", "shared", "supernet"},
    "RelationKeys": {"keys"},
    "EvolutionKeys": {"keys", "evolution"},
    "FinalistKeys": {"finalists"},
}
# Written out whole into a dataclass or a call (vllm.LLM) with the same fields, which refuses one that it lacks.
DUMPED = ("SpeedConfig", "RuntimeSection", "VllmOptions")


def nested(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The model and all models in its fields."""
    yield model
    for info in model.model_fields.values():
        for inner in models_in(info.annotation):
            yield from nested(inner)


STAGES = {type(stage).Config: name for name in stage_files() for stage in [load_stage(name)]}
MODELS = list(dict.fromkeys([one for model in (*STAGES, RuntimeSection) for one in nested(model)]))
FIELDS = [(model, name) for model in MODELS for name in model.model_fields]


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def rooms(model: type[BaseModel]) -> frozenset[Path]:
    """The files in which a key may be read: the stage's own and those of the folders it imports; else all."""
    if model not in STAGES:
        return frozenset(ROOT.rglob("*.py"))
    file = stage_files()[STAGES[model]]
    modules = [node.module for node in ast.walk(tree(file)) if isinstance(node, ast.ImportFrom) and node.module]
    folders = {ROOT / module.split(".")[1] for module in modules if module.count(".") > 1}
    return frozenset({file, *(inner for folder in folders for inner in folder.rglob("*.py"))})


def reads(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(what is read from, attribute) of every attribute access in `node`; `ctx.config.k` gives ("config", "k")."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Load):
            value = inner.value
            if isinstance(value, ast.Name):
                yield value.id, inner.attr
            elif isinstance(value, ast.Attribute) and not (value.attr == "config" and _is_foreign(value)):
                yield value.attr, inner.attr


def _is_foreign(value: ast.Attribute) -> bool:
    """`model.config` and the like: a configuration of transformers."""
    return not (isinstance(value.value, ast.Name) and value.value.id in ("ctx", "self", "entry", "step", "planned"))


@cache
def read_in(file: Path) -> frozenset[tuple[str, str]]:
    return frozenset(reads(tree(file)))


@cache
def read_outside(model: type[BaseModel]) -> frozenset[tuple[str, str]]:
    """What is read in the files in which a key of `model` may be."""
    return frozenset(read for file in rooms(model) for read in read_in(file))


def own_class(model: type[BaseModel]) -> ast.ClassDef:
    file = Path(inspect.getfile(model))
    return next(node for node in ast.walk(tree(file)) if isinstance(node, ast.ClassDef) and node.name == model.__name__)


def methods(model: type[BaseModel]) -> Iterator[ast.FunctionDef]:
    """The model's own methods and properties, but for validators: a check is no use."""
    for node in own_class(model).body:
        if isinstance(node, ast.FunctionDef) and "validator" not in " ".join(map(ast.unparse, node.decorator_list)):
            yield node


def is_read(model: type[BaseModel], name: str) -> bool:
    """Read from an instance outside the class, written out as a whole, or read by a method that is itself used."""
    receivers = NAMES[model.__name__] if model not in STAGES else {"config"}
    whole = ["model_dump"] if model.__name__ in DUMPED else []
    if any((receiver, attribute) in read_outside(model) for receiver in receivers for attribute in (name, *whole)):
        return True
    inside = [method.name for method in methods(model) if ("self", name) in reads(method)]
    return any(is_read(model, method) for method in inside)


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=[f"{model.__name__}.{name}" for model, name in FIELDS])
def test_every_key_is_read(model: type[BaseModel], name: str) -> None:
    assert is_read(model, name), f"nothing reads `{name}` of {model.__name__}"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_key_that_nothing_reads_is_noticed(model: type[BaseModel]) -> None:
    """The test above can fail: for a model that is read key by key, a key that is not there is not read."""
    assert is_read(model, "a_key_that_nothing_reads") == (model.__name__ in DUMPED)


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=[f"{model.__name__}.{name}" for model, name in FIELDS])
def test_every_key_says_what_it_means(model: type[BaseModel], name: str) -> None:
    assert model.model_fields[name].description


def test_the_models_are_found() -> None:
    assert {"TeachConfig", "DistillConfig", "Source", "Gate", "SpeedConfig"} <= {model.__name__ for model in MODELS}
    assert AssetSpec in MODELS
