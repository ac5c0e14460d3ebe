"""A whole recipe with an on-policy stage, run as users do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from on_policy_toys import save_toy, word

RECIPE = """\
name: toy
teacher: teacher
runtime: {device: cpu, threads: 1, workers: 1}
stages:
  - stage: corpus
    sources: [{source: chats.jsonl, messages: messages}]
    sequence_length: 16
    packing: single
    separator: none
    valid_fraction: 0
  - stage: student
    init: random
    architecture: llama
    layers: 1
    attention_layers: 1
  - stage: on_policy
    steps: 2
    batch_prompts: 2
    max_prompt_tokens: 12
    max_new_tokens: 4
    student_share: 0.5
    precision: float32
"""


def test_a_recipe_makes_a_model_from_its_own_completions(tmp_path: Path) -> None:
    save_toy(tmp_path / "teacher", 0, 0.2)
    chats = [
        [
            {"role": "user", "content": f"{word(i)} {word(i + 1)}"},
            {"role": "assistant", "content": f"{word(i + 2)} {word(i + 3)}"},
        ]
        for i in range(4, 20)
    ]
    lines = [json.dumps({"messages": messages}) for messages in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "toy.yaml").write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "-m", "lmdistill", "pipeline", "toy.yaml"],
        cwd=tmp_path,
        env={**os.environ, "LMDISTILL_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [made] = (tmp_path / "runs" / "toy").glob("03-on_policy-*")
    record = json.loads((made / "out" / "training.json").read_text())
    assert record["loss"] == "full_reverse_kl" and record["steps"] == 2
    assert (made / "out" / "model" / "model.safetensors").exists()
