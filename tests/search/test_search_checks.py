"""What is said of a search before anything runs: names, rows, relation heads, the space."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from supernet_toys import KEYS, SHAPE, save_teacher

from lmdistill.corpus.config import CorpusConfig
from lmdistill.pipeline.stage import ModelRef, Planned, PreflightContext
from lmdistill.search.config import SearchConfig
from lmdistill.search.space import Space
from lmdistill.search.sub_space import whole
from lmdistill.stages.distill import DistillStage
from lmdistill.stages.search import SearchStage
from lmdistill.stages.teach import TeachConfig
from lmdistill.training.config import DistillConfig


def planned(
    teacher: ModelRef, profile: Path, teach: dict[str, Any] | None = None, **keys: Any
) -> PreflightContext[SearchConfig]:
    config = SearchConfig.model_validate({**KEYS, "device": str(profile), **keys})
    sources = [{"source": "text.txt"}]
    corpus = CorpusConfig.model_validate({"sources": sources, "sequence_length": 24, "train_tokens": 24 * 16})
    inputs = {
        "corpus": [Planned("corpus", "corpus", "corpus", "c" * 64, corpus)],
        "signals": [Planned("teach", "teach", "signals", "e" * 64, TeachConfig.model_validate(teach or {}))],
    }
    return PreflightContext("search", config, inputs, teacher, profile.parent)


def said(teacher: ModelRef, profile: Path, teach: dict[str, Any] | None = None, **keys: Any) -> list[str]:
    return [problem.render() for problem in SearchStage().preflight(planned(teacher, profile, teach, **keys))]


def test_a_search_that_can_work_has_no_problem(teacher: ModelRef, profile: Path) -> None:
    assert said(teacher, profile, supernet={"relations": {"relation_heads": 4}}) == []


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"method": "supernets"}, "no method of search is called 'supernets'; did you mean 'supernet'?"),
        ({"training": {"loss": "decoupled_topkk"}}, "did you mean 'decoupled_topk'?"),
        ({"training": {"loss": "full_kl"}}, "does not learn from a cache"),
        ({"training": {"loss": "none"}}, "does not learn from a cache"),
        ({"heldout_rows": 16}, "heldout_rows 16 leaves none of 16 rows"),
        ({"supernet": {"relations": {"relation_heads": 3}}}, "3 relation heads do not divide"),
        ({"space": {"vocabularies": [32]}}, "drop `vocabularies`"),
        ({"space": {"hidden_sizes": [40, 64]}}, "hidden_sizes: no candidate can have 40"),
        ({"space": {"depth": [2, 9]}}, "more than the teacher's 4"),
        ({"budgets": ["decode >= 900x teacher"]}, "the nearest point is decode_tps"),
        ({"weights": "tuned", "finalists": {"count": 1}}, "a single one has none"),
        ({"weights": "fitted", "finalists": {"fit_steps": 0}}, "`finalists.fit_steps` is 0"),
        ({"supernet": {"keep": True}, "method": "prune"}, "`method: prune` trains none"),
        (
            {"device": "local", "space": {"sub_spaces": {"giant": {"parameters": [900, 901]}}}},
            "sub-space 'giant' has no candidate: the nearest has",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_work_is_one_message(teacher: ModelRef, profile: Path, keys: dict[str, Any], what: str) -> None:
    (text,) = said(teacher, profile, **keys)
    assert what in text and "do:" in text


def test_a_cache_of_drawn_ids_is_refused(teacher: ModelRef, profile: Path) -> None:
    (text,) = said(teacher, profile, teach={"variant": "sampled"})
    assert "ranks students on the teacher's top K, and 'teach' draws ids" in text


def test_a_teacher_whose_config_speaks_other_words_is_refused(profile: Path, tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = ModelRef("teacher", tmp_path, "b" * 64)
    (text,) = said(teacher, profile)
    assert "cannot be grown from a teacher of type 'gpt2'" in text
    assert SearchStage().estimate(planned(teacher, profile)).seconds is None


def test_what_is_not_installed_is_said(teacher: ModelRef, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("scipy", "gguf") else there(name))
    (text,) = said(teacher, profile)
    assert "needs the package scipy" in text
    assert len(said(teacher, profile, device="local")) == 2  # what times shapes here, too


def test_the_versions_of_all_that_decides_are_in_the_fingerprint() -> None:
    assert {"optuna", "scipy", "llama-cpp-python", "gguf"} <= set(SearchStage().tools)


def test_a_teacher_with_a_head_of_its_own_is_refused(profile: Path, tmp_path: Path) -> None:
    untied = save_teacher(tmp_path, tie_word_embeddings=False)
    assert any("tied" in text for text in said(untied, profile))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "space", "what"),
    [
        ({"attention_bias": True}, ["attention"], "projections have biases"),
        ({"head_dim": 32}, ["attention"], "the teacher has 4 × 32"),
        ({"rope_parameters": LLAMA3}, ["attention", "conv"], "of type 'llama3', which llama.cpp's lfm2 lacks"),
    ],
)
def test_a_teacher_that_candidates_have_no_place_for_is_refused(
    config: dict[str, Any], space: list[str], what: str, profile: Path, tmp_path: Path
) -> None:
    odd = save_teacher(tmp_path, **config)
    (text,) = said(odd, profile, space={**KEYS["space"], "operators": space})
    assert what in text and "do:" in text


def test_a_candidate_has_the_teachers_rotary_embeddings(tmp_path: Path) -> None:
    from transformers import AutoConfig

    teacher = AutoConfig.from_pretrained(save_teacher(tmp_path, rope_parameters=LLAMA3).path)
    space = Space(SearchConfig.model_validate({"space": {"operators": ["attention"]}}).space, teacher.to_dict(), "q4_0")
    assert whole(space).largest().config(teacher).rope_parameters == teacher.rope_parameters


@pytest.mark.parametrize("key", ["rounds", "bursts", "candidates", "decode"])
def test_more_timing_is_estimated_to_take_longer(teacher: ModelRef, profile: Path, key: str) -> None:
    def seconds(**timing: int) -> float:
        keys = {"device": "local", "timing": {**KEYS["timing"], **timing}}
        return SearchStage().estimate(planned(teacher, profile, **keys)).seconds or 0.0

    few, many = seconds(**{key: 20}), seconds(**{key: 200})
    without = SearchStage().estimate(planned(teacher, profile)).seconds or 0.0  # a profile is there already
    assert 0 < without < few < many


def test_shared_weights_take_more_memory_than_cut_ones(teacher: ModelRef, profile: Path) -> None:
    shared, cut = (
        SearchStage().estimate(planned(teacher, profile, method=method)).memory_bytes
        for method in ("supernet", "prune")
    )
    assert shared is not None and cut is not None and shared > cut


def test_what_comes_after_a_search_is_estimated_for_the_largest_student(teacher: ModelRef, tmp_path: Path) -> None:
    config = SearchConfig.model_validate(KEYS)
    searched = Planned("search", "search", "student", "s" * 64, config)
    ctx = PreflightContext("distill", DistillConfig(tokens=1000), {"student": [searched]}, teacher, tmp_path)
    space = Space(config.space, SHAPE, config.timing.format)
    most = max(candidate.parameters for candidate in whole(space).one_of_each_shape())
    estimate = DistillStage().estimate(ctx)
    assert estimate.note.startswith("at most") and estimate.disk_bytes == 28 * most
