"""`kd_weight: auto`: the share of the text in the target that held-out text is most likely under."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_toys import LENGTH, ROWS, VOCAB, folder_bytes, train_toy

from lmdistill.checkpoints import load_model
from lmdistill.corpus.format import CorpusReader, tokens_digest
from lmdistill.pipeline.keys import semantic
from lmdistill.pipeline.stage import Artefact, ModelRef, Planned, PreflightContext, Runtime, StageContext
from lmdistill.stages.corpus import CorpusConfig
from lmdistill.stages.distill import DistillStage
from lmdistill.stages.teach import TeachConfig, TeachStage
from lmdistill.training import ground_truth
from lmdistill.training.config import DistillConfig
from lmdistill.training.ground_truth import best_share

LOGS = st.lists(st.floats(-30, -0.01), min_size=1, max_size=30)
GRID = np.linspace(0, 1, 201)


def _likelihood(alpha: float, log_q1_N: Any, log_q0_N: Any) -> float:
    with np.errstate(divide="ignore"):
        return float(np.logaddexp(np.log(alpha) + log_q1_N, np.log1p(-alpha) + log_q0_N).sum())


@settings(max_examples=60, deadline=None)
@given(LOGS, st.randoms())
def test_no_other_share_is_likelier(log_q1: list[float], random: Any) -> None:
    log_q1_N = np.array(log_q1)
    log_q0_N = np.array([random.uniform(-30, -0.01) for _ in log_q1])
    best = _likelihood(best_share(log_q1_N, log_q0_N), log_q1_N, log_q0_N)
    assert all(_likelihood(alpha, log_q1_N, log_q0_N) <= best + 1e-6 for alpha in GRID)


def test_a_probe_that_is_better_everywhere_has_all() -> None:
    good_N, bad_N = np.full(9, -1.0), np.full(9, -2.0)
    assert best_share(good_N, bad_N) == 1.0
    assert best_share(bad_N, good_N) == 0.0


def test_the_share_that_text_was_made_with_is_found() -> None:
    """Tokens drawn from 0.3·q1 + 0.7·q0."""
    generator = np.random.default_rng(0)
    q1_V, q0_V = generator.dirichlet(np.ones(50)), generator.dirichlet(np.ones(50))
    drawn_N = generator.choice(50, 40_000, p=0.3 * q1_V + 0.7 * q0_V)
    assert best_share(np.log(q1_V)[drawn_N], np.log(q0_V)[drawn_N]) == pytest.approx(0.3, abs=0.02)


@pytest.fixture(scope="module")
def both(teacher: ModelRef, corpus: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """The teacher's cache of the corpus' rows and of as many held-out ones."""
    path = tmp_path_factory.mktemp("both")
    shutil.copytree(corpus.out, path / "corpus/out")
    meta = CorpusReader(corpus.out).meta
    torch.manual_seed(9)
    start = torch.randint(VOCAB, (ROWS, 1))
    model = load_model(teacher.path)
    said = model.generate(start, max_length=LENGTH, min_length=LENGTH, do_sample=True, pad_token_id=0, top_k=0)
    tokens, flags = said.numpy().astype("<u2"), np.load(corpus.out / "train.flags.npy")
    for kind, array in {"tokens": tokens, "flags": flags, "bytes": np.load(corpus.out / "train.bytes.npy")}.items():
        np.save(path / f"corpus/out/valid.{kind}.npy", array)
    valid = replace(meta.splits["train"], digest=tokens_digest(tokens, flags))
    (path / "corpus/out/corpus.json").write_text(replace(meta, splits={**meta.splits, "valid": valid}).to_json())
    (path / "signals/out").mkdir(parents=True)
    config = TeachConfig(k=8, shard_rows=8, batch_rows=4, splits=("train", "valid"))
    whole = Artefact("corpus", "corpus", "corpus", "4" * 64, path / "corpus")
    place = path / "signals/out", path / "signals/work"
    TeachStage().run(StageContext("teach", config, {"corpus": [whole]}, teacher, *place, runtime=Runtime("cpu")))
    return Artefact("teach", "teach", "signals", "3" * 64, path / "signals")


KEYS = {"kd_weight": "auto", "probe_share": 0.5, "tokens": LENGTH * 8 * 6}


@pytest.fixture(scope="module")
def whole(both: Artefact, student: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose λ is estimated."""
    path = tmp_path_factory.mktemp("auto")
    train_toy(path, both, student, **KEYS)
    return path


def test_the_estimate_trains_the_model_that_its_number_trains(
    whole: Path, both: Artefact, student: Artefact, tmp_path: Path
) -> None:
    record = json.loads((whole / "out/training.json").read_text())
    found = record["kd_weight_estimate"]
    assert found["kd_weight"] == pytest.approx(1 - found["alpha"]) and found["held_out_tokens"] == ROWS * (LENGTH - 1)
    assert record["settings"]["kd_weight"] == "auto"
    train_toy(tmp_path, both, student, **{**KEYS, "kd_weight": found["kd_weight"]})
    model = "out/model/model.safetensors"
    assert (whole / model).read_bytes() == (tmp_path / model).read_bytes()


def test_the_longer_a_few_rows_are_learnt_the_less_their_text_is_worth(
    whole: Path, both: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """Three steps a probe against ten epochs: by then a token is learnt by heart, a distribution still is not."""
    long = train_toy(tmp_path, both, student, **{**KEYS, "tokens": LENGTH * ROWS * 10, "probe_share": 1.0})
    short = json.loads((whole / "out/training.json").read_text())["kd_weight_estimate"]
    assert long["kd_weight_estimate"]["probe_nll"]["teacher"] < long["kd_weight_estimate"]["probe_nll"]["text"]
    assert long["kd_weight_estimate"]["kd_weight"] > max(0.5, short["kd_weight"])


def test_killed_after_a_probe_it_ends_with_the_same_bytes(
    whole: Path, both: Artefact, student: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ground_truth, "_log_probs", killed)
        with pytest.raises(KeyboardInterrupt):
            train_toy(tmp_path, both, student, **KEYS)
    assert list(tmp_path.glob("work/checkpoints/probes/text/work/checkpoint-*"))
    train_toy(tmp_path, both, student, **KEYS)
    assert folder_bytes(whole / "out") == folder_bytes(tmp_path / "out")
    assert not (tmp_path / "work/checkpoints/probes").exists()


def test_resumed_in_the_middle_it_has_the_first_runs_weight(
    whole: Path, both: Artefact, student: Artefact, tmp_path: Path
) -> None:
    """Were it estimated again, the probes' folder would be there and the number that is put here would not count."""
    shutil.copytree(whole / "work", tmp_path / "work")
    for path in (tmp_path / "work/checkpoints").glob("checkpoint-*"):
        shutil.rmtree(path)
    kept = tmp_path / "work/checkpoints/kd_weight.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "kd_weight": 0.25}))
    record = train_toy(tmp_path, both, student, **KEYS)
    line = record["log"][0]
    assert line["loss"] == pytest.approx(0.25 * line["kd"] + 0.75 * line["ce"], rel=1e-3)


def _preflight(folder: Path, kind: str = "signals", splits: Any = ("train", "valid"), **keys: Any) -> Any:
    config: Any = TeachConfig(splits=splits)
    if kind == "corpus":
        config = CorpusConfig.model_validate({"sources": [{"source": "data.jsonl"}]})
    inputs = {"signals": [Planned("rows", "teach", kind, "e" * 64, config)]}
    ctx = PreflightContext("distill", DistillConfig.model_validate({"kd_weight": "auto", **keys}), inputs, None, folder)
    return [error.render() for error in DistillStage().preflight(ctx)]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"loss": "ce"}, "is not read by the loss 'ce'"),
        ({"mix": "additive"}, "set `mix: convex`"),
        ({"splits": ("train",)}, "add 'valid' to the teach stage's `splits`"),
        ({"loss": "full_kl", "kind": "corpus"}, "reads a teacher cache, and it has none"),
    ],
)
def test_an_estimate_that_cannot_be_made_is_named_before_work(keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    [problem] = _preflight(tmp_path, **keys)
    assert named in problem


def test_an_estimate_is_in_the_plan(tmp_path: Path) -> None:
    assert _preflight(tmp_path) == []
    auto = DistillConfig(kd_weight="auto", tokens=1000, probe_share=0.2)
    assert (auto.tokens_seen, DistillConfig(tokens=1000).tokens_seen) == (1400, 1000)
    assert "probe_share" not in semantic(DistillConfig(), str)
