"""A cache from elsewhere in a recipe: `cached_corpus` and `cached_signals` in place of `corpus` and `teach`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_toys import save_word_tokenizer

from lmdistill.corpus.format import CorpusReader
from lmdistill.errors import IntegrityError, PreflightError
from lmdistill.pipeline.stage import Artefact, Planned, PreflightContext, Runtime, StageContext
from lmdistill.recipe import load_recipe
from lmdistill.signals.exchange.importing import ImportOptions, import_cache
from lmdistill.signals.exchange.merge import merge
from lmdistill.signals.reader import SignalsReader
from lmdistill.stages.cached_corpus import CachedCorpusConfig, CachedCorpusStage
from lmdistill.stages.cached_signals import CachedSignalsConfig, CachedSignalsStage
from lmdistill.stages.distill import DistillStage
from lmdistill.stages.evaluate import EvaluateConfig, EvaluateStage
from lmdistill.training.config import DistillConfig


def context(config: Any, inputs: dict[str, list[Artefact]], path: Path) -> Any:
    (path / "out").mkdir(parents=True)
    return StageContext(path.name, config, inputs, None, path / "out", path / "work", runtime=Runtime("cpu"))


def run(stage: Any, config: Any, inputs: dict[str, list[Artefact]], path: Path) -> tuple[Artefact, dict[str, Any]]:
    """Run a stage as the pipeline does, and verify it."""
    ctx = context(config, inputs, path)
    metrics = stage.run(ctx)
    stage.verify(ctx, metrics)
    return Artefact(path.name, stage.name, stage.output, "f" * 64, path), metrics


def objections(stage: Any, config: Any, inputs: dict[str, Any], path: Path) -> str:
    found = stage.preflight(PreflightContext("stage", config, inputs, None, path))
    return "\n".join(error.render() for error in found)


@pytest.fixture
def exported(signals: Artefact, tmp_path: Path) -> Callable[[], Path]:
    """The toy teacher's predictions as prepared axolotl data."""

    def export() -> Path:
        batch = SignalsReader(signals.out).read(slice(None))
        with (tmp_path / "data.jsonl").open("w") as file:
            for row in range(len(batch.tokens_RT)):
                tokens = batch.tokens_RT[row].tolist()
                record = {"input_ids": tokens, "labels": tokens}
                record["target_token_ids"] = batch.ids_RTK[row].tolist()
                record["target_logprobs"] = batch.logp_RTK[row].tolist()
                file.write(json.dumps(record) + "\n")
        return tmp_path / "data.jsonl"

    return export


def word_tokenizer(folder: Path) -> Path:
    save_word_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def test_imported_log_probs_train_a_student(exported, signals, student, tmp_path):
    """Import, corpus, signals, distillation: the student's loss falls, without a teacher anywhere."""
    options = ImportOptions("axolotl", word_tokenizer(tmp_path / "tokenizer"))
    import_cache(exported(), tmp_path / "imported", options)
    cache = str(tmp_path / "imported")
    corpus, counts = run(CachedCorpusStage(), CachedCorpusConfig(cache=cache), {}, tmp_path / "corpus")
    taken, figures = run(
        CachedSignalsStage(), CachedSignalsConfig(cache=cache), {"corpus": [corpus]}, tmp_path / "taken"
    )
    ours, theirs = SignalsReader(taken.out).read(slice(None)), SignalsReader(signals.out).read(slice(None))
    assert (ours.tokens_RT == theirs.tokens_RT).all()
    np.testing.assert_allclose(np.exp(ours.logp_RTK[:, :-1]), np.exp(theirs.logp_RTK[:, :-1]), atol=3e-3)
    assert (CorpusReader(corpus.out).split("train").tokens_RT == ours.tokens_RT).all()
    assert counts["tokens"] == ours.tokens_RT.size
    assert (figures["k"], figures["teacher_nll"]) == (8, None)
    config = DistillConfig(tokens=32 * 8 * 12, batch_rows=8, lr=0.2, precision="float32", log_steps=2)
    _, metrics = run(DistillStage(), config, {"signals": [taken], "student": [student]}, tmp_path / "model")
    log = json.loads((tmp_path / "model/out/training.json").read_text())["log"]
    assert log[-1]["kd"] < 0.9 * log[0]["kd"]
    assert metrics["steps"] == 12


def test_a_captured_cache_is_taken_as_it_is(signals, corpus, tmp_path):
    """Its tokenizer is named, as a capture keeps the digest only; corpus and signals are those of the capture."""
    tokenizer = str(corpus.out / "tokenizer")
    named = CachedCorpusConfig(cache=str(signals.out), tokenizer=tokenizer)
    found, _ = run(CachedCorpusStage(), named, {}, tmp_path / "corpus")
    taken, figures = run(
        CachedSignalsStage(), CachedSignalsConfig(cache=str(signals.path)), {"corpus": [found]}, tmp_path / "taken"
    )
    for path in signals.out.iterdir():
        assert (taken.out / path.name).read_bytes() == path.read_bytes()
    assert CorpusReader(found.out).digest("train") == CorpusReader(corpus.out).digest("train")
    assert figures["digest"] == SignalsReader(signals.out).digest


def test_the_rows_of_a_merged_cache_become_one_corpus(signals, corpus, tmp_path):
    merge(tmp_path / "both", [signals.out, signals.out])
    named = CachedCorpusConfig(cache=str(tmp_path / "both"), tokenizer=str(corpus.out / "tokenizer"))
    found, _ = run(CachedCorpusStage(), named, {}, tmp_path / "corpus")
    config = CachedSignalsConfig(cache=str(tmp_path / "both"))
    taken, _ = run(CachedSignalsStage(), config, {"corpus": [found]}, tmp_path / "taken")
    assert len(CorpusReader(found.out).split("train")) == SignalsReader(taken.out).rows == 48


def test_a_cache_of_other_rows_than_the_corpus_is_refused(signals, corpus, tmp_path):
    merge(tmp_path / "both", [signals.out, signals.out])
    config = CachedSignalsConfig(cache=str(tmp_path / "both"))
    with pytest.raises(PreflightError, match=r"rows of split 'train' are not the corpus'(.|\n)*cached_corpus"):
        run(CachedSignalsStage(), config, {"corpus": [corpus]}, tmp_path / "taken")
    planned = Planned("corpus", "corpus", "corpus", "c" * 64, config, artefact=corpus)
    assert "are not the corpus'" in objections(CachedSignalsStage(), config, {"corpus": [planned]}, tmp_path)


def test_what_is_missing_is_known_before_a_run(signals, tmp_path):
    def told(**keys: Any) -> str:
        return objections(CachedCorpusStage(), CachedCorpusConfig(**keys), {}, tmp_path)

    assert "no tokenizer beside it" in told(cache=str(signals.out))
    assert "there is no file or folder" in told(cache=str(tmp_path / "nowhere"))
    assert "no teacher cache in" in told(cache=str(tmp_path))
    save_word_tokenizer(tmp_path / "other", prefix="v")
    assert "is not the one of the cache" in told(cache=str(signals.out), tokenizer=str(tmp_path / "other"))
    save_word_tokenizer(tmp_path / "same")
    assert not told(cache=str(signals.out), tokenizer=str(tmp_path / "same"))


def test_evaluate_and_distill_know_what_the_cache_has(signals, corpus, tmp_path):
    """Its splits and its variant, before anything runs."""
    cached = CachedCorpusConfig(cache=str(signals.out))
    planned = {"corpus": [Planned("cached", "cached_corpus", "corpus", "c" * 64, cached)]}
    found = objections(EvaluateStage(), EvaluateConfig(split="valid"), planned, tmp_path)
    assert "will have no split 'valid'" in found
    assert "--valid-fraction" in found
    assert "will have no split" not in objections(EvaluateStage(), EvaluateConfig(split="train"), planned, tmp_path)
    assert CachedSignalsConfig(cache=str(signals.out)).variant == "mmap"
    assert CachedSignalsConfig(cache=str(tmp_path / "none")).variant == ""


def test_a_damaged_cache_is_not_taken(signals, corpus, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in signals.out.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    data = bytearray((bad / "train-00001.sig").read_bytes())
    data[100] ^= 1
    (bad / "train-00001.sig").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"train-00001.sig of .*bad is damaged"):
        run(CachedSignalsStage(), CachedSignalsConfig(cache=str(bad)), {"corpus": [corpus]}, tmp_path / "taken")


def test_a_recipe_of_cached_stages_needs_no_teacher(signals, corpus, tmp_path):
    text = f"""
name: imported
stages:
- {{stage: cached_corpus, cache: {signals.out}, tokenizer: {corpus.out}/tokenizer}}
- {{stage: cached_signals, cache: {signals.out}}}
- {{stage: student, init: checkpoint, source: {tmp_path}}}
- {{stage: distill, tokens: 1000}}
"""
    (tmp_path / "imported.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "imported.yaml")
    assert recipe.entry("distill").inputs["signals"] == ("cached_signals",)
    assert recipe.entry("cached_signals").inputs["corpus"] == ("cached_corpus",)
