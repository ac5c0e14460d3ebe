"""What reaches vLLM, from a stand-in for TRL's side of it: weights before every step, ids, a seed a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from on_policy_toys import EOS, KEYS, train

from lmdistill.on_policy import samplers
from lmdistill.pipeline.stage import Artefact, ModelRef


class Recorder:
    """Has the part of `trl.generation.vllm_generation.VLLMGeneration` that a trainer calls."""

    made: list[Recorder]

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.options, self.generation_kwargs = model, options, {}
        self.weights: list[torch.Tensor] = []
        self.asked: list[list[list[int]]] = []
        self.seeds: list[int] = []
        Recorder.made.append(self)

    def sync_weights(self) -> None:
        self.weights.append(self.model.model.embed_tokens.weight.detach().clone())

    def generate(self, prompts: list[list[int]], **_: Any) -> tuple[Any, list[list[int]], None, None]:
        assert len(self.weights) == len(self.asked) + 1, "weights are loaded before a step samples"
        self.asked.append(prompts)
        self.seeds.append(self.generation_kwargs["seed"])
        return prompts, [[7, 8, EOS]] * len(prompts), None, None


def test_vllm_gets_the_weights_the_ids_and_a_seed_of_every_step(
    chats: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.trainer import distillation_trainer

    Recorder.made = []
    monkeypatch.setattr(distillation_trainer, "VLLMGeneration", Recorder)
    monkeypatch.setattr(distillation_trainer, "is_vllm_available", lambda: True)
    monkeypatch.setitem(samplers.SAMPLERS, "vllm", replace(samplers.SAMPLERS["vllm"], packages=(), gpu=False))
    record = train(tmp_path, chats, student, teacher, sampler="vllm", steps=3, micro_prompts=2, log_steps=1)
    [vllm] = Recorder.made
    assert vllm.options["mode"] == "colocate" and vllm.options["gpu_memory_utilization"] == 0.3
    assert vllm.options["max_model_length"] == KEYS["max_prompt_tokens"] + KEYS["max_new_tokens"]
    assert [len(prompts) for prompts in vllm.asked] == [KEYS["batch_prompts"]] * 3
    assert len(set(vllm.seeds)) == 3
    assert not torch.equal(vllm.weights[0], vllm.weights[2])
    assert [line["completion"] for line in record["log"]] == [3.0] * 3
