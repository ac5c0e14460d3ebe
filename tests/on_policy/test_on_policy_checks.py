"""What is wrong with an on-policy stage is said before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from on_policy_toys import KEYS, STAGE
from pydantic import ValidationError

from lmdistill.corpus.config import CorpusConfig
from lmdistill.errors import LmdistillError, PreflightError
from lmdistill.on_policy import samplers
from lmdistill.on_policy.config import OnPolicyConfig
from lmdistill.on_policy.samplers import choose
from lmdistill.pipeline.stage import Artefact, ModelRef, Planned, PreflightContext, Runtime
from lmdistill.training.config import DistillConfig


def _problems(teacher: ModelRef, tmp_path: Path, corpus: dict[str, Any] | None = None, **keys: Any) -> list[str]:
    config = CorpusConfig(**{"sources": ["x.txt"], "sequence_length": 32} | (corpus or {}))
    inputs = {"corpus": [Planned("corpus", "corpus", "corpus", "c" * 64, config)]}
    ctx = PreflightContext(
        "on_policy", OnPolicyConfig(**KEYS | {"prompt_tokens": 8} | keys), inputs, teacher, tmp_path, Runtime("cpu")
    )
    return [error.what for error in STAGE.preflight(ctx)]


def test_a_stage_that_is_right_has_no_problem(teacher: ModelRef, tmp_path: Path) -> None:
    assert _problems(teacher, tmp_path) == []


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"loss": "full_revers_kl"}, "did you mean 'full_reverse_kl'"),
        ({"loss": "ce"}, "does not compare with what a live teacher says"),
        ({"loss": "sampled_kd"}, "does not compare"),
        ({"loss": "full_reverse_kl", "skew_alpha": 0.3}, "does not read `skew_alpha`"),
        ({"sampler": "vlm"}, "did you mean 'vllm'"),
        ({"max_new_tokens": 50}, "above the teacher's maximum of 64"),
        ({"prompt_tokens": 32}, "takes all of a row of 32 tokens"),
        ({"prompts": {"source": "ask.jsonl", "text": "question"}}, "has no field 'question'"),
    ],
)
def test_each_mistake_is_one_message(
    keys: dict[str, Any], words: str, teacher: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ask.jsonl").write_text('{"ask": "why"}\n')
    [problem] = _problems(teacher, tmp_path, **keys)
    assert words in problem


def test_conversations_need_no_prompt_tokens(teacher: ModelRef, tmp_path: Path) -> None:
    chat = {"sources": [{"source": "x.jsonl", "messages": "m"}]}
    assert _problems(teacher, tmp_path, chat, prompt_tokens=99) == []


def test_a_corpus_in_other_tokens_than_the_teachers_is_named(teacher: ModelRef, tmp_path: Path) -> None:
    from on_policy_toys import save_tokenizer

    save_tokenizer(tmp_path / "other", prefix="x")
    [problem] = _problems(teacher, tmp_path, {"tokenizer": str(tmp_path / "other")})
    assert "different token maps" in problem


def test_a_teacher_without_an_end_of_sequence_is_named(teacher: ModelRef, tmp_path: Path) -> None:
    shutil.copytree(teacher.path, tmp_path / "endless")
    config = tmp_path / "endless" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": None}))
    [problem] = _problems(ModelRef("teacher", tmp_path / "endless", "b" * 64), tmp_path)
    assert "no end-of-sequence token" in problem


@pytest.mark.parametrize(
    "keys", [{"micro_prompts": 3}, {"prompts": "ask.jsonl", "student_share": 0.5}, {"warmup": 1.0}, {"k": 0}]
)
def test_keys_that_contradict_each_other_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OnPolicyConfig(**KEYS | keys)


def test_prompts_of_its_own_need_no_corpus() -> None:
    wanted = [STAGE.inputs_for(OnPolicyConfig(**keys))[1].optional for keys in ({}, {"prompts": "ask.jsonl"})]
    assert wanted == [False, True]


def test_auto_takes_vllm_on_a_gpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "_missing", lambda name: [])
    assert [choose("auto", device) for device in ("cpu", "cuda")] == ["transformers", "vllm"]
    assert choose("auto", "cuda", on_grid=True) == "transformers"
    with pytest.raises(PreflightError, match="would sample from another model"):
        choose("vllm", "cuda", on_grid=True)
    with pytest.raises(PreflightError, match="needs a GPU"):
        choose("vllm", "cpu")
    monkeypatch.setattr(samplers, "_missing", lambda name: ["vllm"])
    assert choose("auto", "cuda") == "transformers"
    with pytest.raises(LmdistillError, match="needs vllm"):
        choose("vllm", "cuda")


def test_vllms_version_is_part_of_the_result_where_it_may_sample() -> None:
    tools = {name: STAGE.tools_used(OnPolicyConfig(sampler=name)) for name in ("auto", "vllm", "transformers")}
    assert "vllm" in tools["auto"] and "vllm" in tools["vllm"] and "vllm" not in tools["transformers"]


def test_losses_and_samplers_are_told() -> None:
    choices = STAGE.choices()
    assert {"full_reverse_kl", "skew_reverse_kl"} <= set(choices["loss"]) and "ce" not in choices["loss"]
    assert set(choices["sampler"]) == {"auto", "transformers", "vllm"} and all(choices["sampler"].values())


def test_a_student_that_vllm_or_training_cannot_have_is_named(
    teacher: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a grid: vLLM would get other weights; packed integers: nothing can learn."""
    monkeypatch.setattr(samplers, "_missing", lambda name: [])
    config = OnPolicyConfig(**KEYS | {"prompt_tokens": 8, "sampler": "vllm"})
    trained = Planned("qad", "distill", "model", "q" * 64, DistillConfig.model_validate({"quantize": {}}))
    inputs = {"student": [trained], "corpus": []}
    found = STAGE.preflight(PreflightContext("on_policy", config, inputs, teacher, tmp_path, Runtime("cuda")))
    assert any("the student lies on a grid, and vLLM would sample from another model" in one.what for one in found)
    packed = tmp_path / "packed/out/model"
    shutil.copytree(teacher.path, packed)
    config_json = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config_json | {"quantization_config": {"quant_method": "gptq"}}))
    artefact = Artefact("student", "student", "student", "s" * 64, tmp_path / "packed")
    inputs["student"] = [Planned("student", "student", "student", "s" * 64, DistillConfig(), {}, artefact)]
    found = STAGE.preflight(PreflightContext("on_policy", config, inputs, teacher, tmp_path, Runtime("cpu")))
    assert any("its weights are packed integers" in one.what for one in found)
