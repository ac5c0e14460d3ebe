"""The teach stage with engines that must prove themselves: what is kept, what is refused, before and during a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from teachers_toys import VOCAB, save_corpus, save_tokenizer, save_toy
from test_vllm_prompts import Plain

from lmdistill.errors import IntegrityError, LmdistillError
from lmdistill.pipeline.keys import semantic
from lmdistill.pipeline.stage import Planned, PreflightContext, Runtime, StageConfig, StageContext
from lmdistill.stages.teach import TeachConfig, TeachStage
from lmdistill.teachers import registry

ROWS, LENGTH, STARTS = 6, 24, (5, 11)


class Sound(Plain):
    """An engine that computes what the teacher computes."""

    def version(self) -> str:
        return "sound 1"


class Unsound(Sound):
    """One that reads the prompt's first token as another: wrong log-probs that look right."""

    def ask(self, prompts, k):
        for tokens, entries in zip(prompts, super().ask([[1, *tokens[1:]] for tokens in prompts], k), strict=True):
            assert tokens[1:] == entries.token_N.tolist()
            yield entries


@pytest.fixture(params=["concat", "isolate"])
def corpus(request, tmp_path):
    """Rows of three documents, packed with and without isolation."""
    save_tokenizer(tmp_path / "corpus/out/tokenizer")
    tokens = np.random.default_rng(0).integers(2, VOCAB, (ROWS, LENGTH))
    return save_corpus(tmp_path / "corpus", tokens, packing=request.param, starts=STARTS)


@pytest.fixture
def engines(monkeypatch):
    """The two are registered beside the real ones."""
    for name, kind in {"sound": Sound, "unsound": Unsound}.items():
        monkeypatch.setitem(registry.ENGINES, name, registry.EngineEntry(__name__, (), "", tools=()))
        monkeypatch.setitem(registry._classes, name, kind)


def running(teacher, corpus, folder: Path, **config):
    settings = TeachConfig(**{"k": 8, "shard_rows": 4, "batch_rows": 2, **config})
    (folder / "out").mkdir(parents=True, exist_ok=True)
    return StageContext(
        "teach",
        settings,
        {"corpus": [corpus]},
        teacher,
        folder / "out",
        folder / "work",
        runtime=Runtime(device="cpu"),
    )


def test_a_sound_engine_writes_a_cache_with_its_proof(toy, corpus, engines, tmp_path):
    """The proof's figures are among the metrics; statistics are the transformers engine's; a resume changes nothing."""
    ctx = running(toy, corpus, tmp_path / "sound", engine="sound")
    metrics = TeachStage().run(ctx)
    TeachStage().verify(ctx, metrics)
    assert 0 < metrics["parity"]["max_delta_logprob"] < 1e-4
    assert metrics["parity"]["tokens"] == 2 * LENGTH
    whole = running(toy, corpus, tmp_path / "whole")
    expected = TeachStage().run(whole)
    assert "parity" not in expected
    for name in ("head_mass", "teacher_nll"):
        assert metrics[name] == pytest.approx(expected[name], abs=1e-4)
    before = {path.name: path.read_bytes() for path in ctx.out.iterdir()}
    (ctx.out / "train-00001.sig").unlink()
    assert TeachStage().run(ctx) == metrics
    assert {path.name: path.read_bytes() for path in ctx.out.iterdir()} == before


def test_an_unsound_engine_scores_nothing(toy, corpus, engines, tmp_path):
    """It is refused before the first shard, unless the recipe says how far it may be off or asks for no proof."""
    with pytest.raises(IntegrityError, match="does not compute what the teacher computes"):
        TeachStage().run(running(toy, corpus, tmp_path / "a", engine="unsound"))
    assert not list((tmp_path / "a/out").glob("*.sig"))
    allowed = TeachStage().run(running(toy, corpus, tmp_path / "b", engine="unsound", parity_bound=50.0))
    assert allowed["parity"]["max_delta_logprob"] > 0.01
    assert "parity" not in TeachStage().run(running(toy, corpus, tmp_path / "c", engine="unsound", parity_rows=0))


def test_a_teacher_that_leaks_can_be_asked_document_by_document(corpus, engines, tmp_path):
    """Convolutions reach over packed documents in one forward; separate requests do not, and prove it."""
    layers = ["conv", "full_attention"]
    teacher = save_toy(tmp_path / "lfm2", "lfm2", layer_types=layers, block_auto_adjust_ff_dim=False)
    ctx = running(teacher, corpus, tmp_path / "run", engine="sound")
    assert TeachStage().run(ctx)["parity"]["max_delta_logprob"] < 1e-4


def test_the_keys_of_servers_and_proofs():
    """Where it runs leaves the fingerprint alone, as defaults do; a bound of one's own does not; keys are tight."""

    def key(**config):
        return semantic(TeachConfig(**config), lambda spec: "")

    url = {"url": "http://localhost:8000"}
    assert key(vllm={"tensor_parallel_size": 4}, endpoint=url, parity_rows=2) == key()
    assert key(parity_bound=0.5) != key()
    for wrong in (
        {"endpoint": {"url": "localhost:8000"}},
        {"endpoint": {}},
        {"vllm": {"tensor_parallel_size": 0}},
        {"parity_bound": 0},
    ):
        with pytest.raises(ValidationError):
            TeachConfig(**wrong)


@pytest.mark.parametrize(("config", "message"), [
    ({}, "needs a server to ask"),
    ({"endpoint": {"url": "http://127.0.0.1:9", "retries": 0}}, "no answer from the teacher's server"),
])  # fmt: skip
def test_a_server_that_is_not_there_is_said_before_any_work(toy, corpus, tmp_path, config, message):
    """No endpoint, or nobody behind it: one message in the preflight."""
    config = {"engine": "vllm_server", **config}
    planned = Planned("corpus", "corpus", "corpus", "f" * 64, StageConfig(), artefact=corpus)
    ctx = PreflightContext("teach", TeachConfig(k=8, **config), {"corpus": [planned]}, toy, tmp_path)
    [error] = TeachStage().preflight(ctx)
    assert message in error.render()
    assert error.fix
    with pytest.raises(LmdistillError, match=message):
        TeachStage().run(running(toy, corpus, tmp_path / "run", **config))
