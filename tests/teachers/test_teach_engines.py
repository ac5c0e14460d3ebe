"""The teach stage with other teachers than one checkpoint: a GGUF, an ensemble, and with hidden states kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from teach_contexts import before, contents, running
from teachers_toys import VOCAB, save_corpus, save_tokenizer, save_toy

from lmdistill.asset_spec import AssetSpec
from lmdistill.assets import model_folder
from lmdistill.checkpoints import copy_tokenizer, load_tokenizer
from lmdistill.errors import IntegrityError, PreflightError
from lmdistill.pipeline.jobs import model_from_json, model_to_json
from lmdistill.pipeline.keys import assets_in, semantic
from lmdistill.pipeline.plan import make_plan
from lmdistill.pipeline.stage import ModelRef, SilentProgress
from lmdistill.recipe import load_recipe
from lmdistill.signals.reader import SignalsReader
from lmdistill.stages.teach import TeachConfig, TeachStage
from lmdistill.teachers.llama_cpp_engine import QUANTISED_BOUND

STAGE = TeachStage()
ROWS, LENGTH = 5, 12
TEXT = "The capital of France is Paris, which lies on the Seine. Water boils at 100 degrees at sea level. " * 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    save_tokenizer(folder / "out/tokenizer")
    return save_corpus(folder, np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)), VOCAB)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> list[ModelRef]:
    return [save_toy(tmp_path_factory.mktemp(f"other{seed}"), seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def real(embedded_gguf: Path, teacher_folder: Path) -> ModelRef:
    """The embedded teacher as the asset layer gives it."""
    teacher = model_folder(AssetSpec(source=str(embedded_gguf)), SilentProgress())
    assert (teacher.path, teacher.gguf) == (teacher_folder, embedded_gguf)
    return teacher


def test_a_real_gguf_is_scored_as_the_quantised_model_it_is(real, tmp_path):
    """Preflight, run, proof, verify; the manifest says q4_1; the same bytes again."""
    ids = load_tokenizer(real.path)(TEXT)["input_ids"]
    copy_tokenizer(real.path, tmp_path / "corpus/out/tokenizer")
    corpus = save_corpus(tmp_path / "corpus", np.array(ids[: 2 * 24]).reshape(2, 24), 49152)
    assert STAGE.preflight(before(real, corpus, tmp_path, engine="llama_cpp")) == []
    first, second = (running(real, corpus, tmp_path / name, k=32, engine="llama_cpp") for name in ("one", "two"))
    metrics = STAGE.run(first)
    STAGE.verify(first, metrics)
    assert STAGE.run(second) == metrics
    assert contents(first.out) == contents(second.out)
    assert 0.001 < metrics["parity"]["max_delta_logprob"] < metrics["parity"]["bound"] == QUANTISED_BOUND
    assert 0.5 < metrics["teacher_nll"] < 5
    said = SignalsReader(first.out).manifest.teacher
    assert (said.engine, said.precision, said.digest) == ("llama_cpp", "q4_1", real.digest)
    assert said.engine_version.startswith("llama-cpp-python ")


def test_what_llama_cpp_cannot_do_is_refused_first(real, toy, corpus, tmp_path):
    """A folder of float weights, a precision the file has not: before any work."""
    [error] = STAGE.preflight(before(toy, corpus, tmp_path, k=8, engine="llama_cpp"))
    assert "is a model folder" in error.what
    errors = STAGE.preflight(before(real, corpus, tmp_path, k=8, engine="llama_cpp", precision="bfloat16"))
    assert "cannot score in bfloat16" in errors[0].what


def test_llama_cpp_s_version_is_in_the_key_and_transformers_s_is_not():
    """And the other way round for the default engine, whose key is as it was."""
    assert STAGE.tools_used(TeachConfig(engine="llama_cpp")) == ("torch", "llama-cpp-python")
    assert STAGE.tools_used(TeachConfig()) == ("torch", "transformers")


def test_an_ensemble_from_the_recipe(toy, others, corpus, tmp_path):
    """Its teachers are assets of the stage; the manifest names each with digest and weight; the same bytes again."""
    members = [str(other.path) for other in others]
    keys = {"ensemble": members, "ensemble_weights": [2, 1, 1]}
    ctx = before(toy, corpus, tmp_path, k=8, **keys)
    assert STAGE.preflight(ctx) == []
    assert [asset.source for asset in assets_in(ctx.config)] == members
    assert STAGE.estimate(ctx).memory_bytes > STAGE.estimate(before(toy, corpus, tmp_path, k=8)).memory_bytes
    first, second, plain = (running(toy, corpus, tmp_path / name, **keys) for name in ("one", "two", "plain"))
    metrics = STAGE.run(first)
    STAGE.verify(first, metrics)
    assert STAGE.run(second) == metrics
    assert contents(first.out) == contents(second.out)
    said = SignalsReader(first.out).manifest.teacher
    assert [member.weight for member in said.members] == [0.5, 0.25, 0.25]
    assert [member.source for member in said.members] == [
        f"local:{member.digest[-64:][:12]}" for member in said.members
    ]
    assert len({member.digest for member in said.members} | {said.digest}) == 4
    plain = replace(plain, config=TeachConfig(k=8, shard_rows=4, batch_rows=2))
    assert STAGE.run(plain)["digest"] != metrics["digest"]
    assert "members" not in json.loads((plain.out / "signals.json").read_text())["teacher"]


def test_members_of_another_vocabulary_are_listed(toy, corpus, tmp_path):
    """Ids that stand for other words are named before anything runs, and again at its start."""
    other = save_toy(tmp_path / "other", seed=3)
    save_tokenizer(other.path, prefix="x")
    [error] = STAGE.preflight(before(toy, corpus, tmp_path, k=8, ensemble=[str(other.path)]))
    assert isinstance(error, PreflightError)
    assert "3: 'w3' / 'x3'" in error.why
    assert "drop this one from `ensemble`" in error.fix
    with pytest.raises(PreflightError, match="different token maps"):
        STAGE.run(running(toy, corpus, tmp_path, ensemble=[str(other.path)]))


def test_ensembles_that_cannot_be_are_refused(real, toy, corpus, tmp_path):
    """Weights for other teachers than there are, and a folder among GGUF files."""
    for wrong in ({"ensemble_weights": [1]}, {"ensemble": ["a"], "ensemble_weights": [1]}, {"ensemble_weights": [0]}):
        with pytest.raises(ValidationError):
            TeachConfig(**wrong)
    errors = STAGE.preflight(before(real, corpus, tmp_path, k=8, engine="llama_cpp", ensemble=[str(toy.path)]))
    assert any(f"{toy.path} is a model folder" in error.what for error in errors)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_hidden_states_are_kept_beside_the_log_probs(toy, corpus, tmp_path, dtype):
    """Foreseen in the estimate, read back by row, the same bytes again; a damaged file is named."""
    keys = {"hidden_layers": [-1, 0], "hidden_dtype": dtype}
    ctx, plain = before(toy, corpus, tmp_path, k=8, **keys), before(toy, corpus, tmp_path, k=8)
    assert STAGE.preflight(ctx) == []
    first, second = (running(toy, corpus, tmp_path / name, **keys) for name in ("one", "two"))
    metrics = STAGE.run(first)
    STAGE.verify(first, metrics)
    assert STAGE.run(second) == metrics
    assert contents(first.out) == contents(second.out)
    files = sorted(first.out.glob("*.hid"))
    added = STAGE.estimate(ctx).disk_bytes - STAGE.estimate(plain).disk_bytes
    assert added == sum(file.stat().st_size for file in files) == ROWS * LENGTH * 2 * (64 if dtype == "float16" else 34)
    assert SignalsReader(first.out).hidden([4, 0]).shape == (2, LENGTH, 2, 32)
    files[1].write_bytes(b"\xff" * files[1].stat().st_size)
    with pytest.raises(IntegrityError, match=r"train-00001\.hid: block 0"):
        STAGE.verify(first, metrics)


def test_hidden_states_that_cannot_be_are_refused_first(toy, others, corpus, tmp_path):
    """A layer the teacher has not, an ensemble, an engine that tells log-probs only."""
    for keys, message in (
        ({"hidden_layers": [3]}, "hidden_layers [3] cannot be kept"),
        ({"hidden_layers": [0], "ensemble": [str(others[0].path)]}, "an ensemble has no hidden states"),
    ):
        [error] = STAGE.preflight(before(toy, corpus, tmp_path, k=8, **keys))
        assert message in error.what
    errors = STAGE.preflight(before(toy, corpus, tmp_path, k=8, hidden_layers=[0], engine="llama_cpp"))
    assert any("engine 'llama_cpp' cannot give hidden states" in error.what for error in errors)


def test_keys_at_their_defaults_leave_the_fingerprint_alone():
    """So that caches made before these keys were added stay valid."""
    plain = semantic(TeachConfig(), lambda asset: asset.source)
    assert not {name for name in plain if name.startswith(("ensemble", "hidden"))}
    kept = semantic(TeachConfig(hidden_layers=(1,), ensemble=("a",)), lambda asset: asset.source)
    assert kept["hidden_layers"] == [1]
    assert kept["ensemble"] == [{"asset": "a"}]


def test_a_plan_brings_the_ensemble_s_teachers_as_models(toy, others, tmp_path):
    """With the recipe's teacher first, each once, and not among the data; a GGUF's path goes with the job."""
    recipe = tmp_path / "recipe.yaml"
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "w1 w2"}\n')
    recipe.write_text(
        f"name: mean\nteacher: {toy.path}\nstages:\n"
        f"- {{stage: corpus, sources: [{{source: {source}, text: text}}]}}\n"
        f"- {{stage: teach, ensemble: [{others[0].path}, {toy.path}]}}\n"
    )
    plan = make_plan(load_recipe(recipe), tmp_path / "run")
    assert [spec.source for spec in plan.model_assets()] == [str(toy.path), str(others[0].path)]
    assert [spec.source for spec in plan.data_assets()] == [str(source)]
    for model in (replace(toy, gguf=tmp_path / "a.gguf"), toy, None):
        assert model_from_json(json.loads(json.dumps(model_to_json(model)))) == model
