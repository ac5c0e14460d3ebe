"""The on_policy stage: it learns from its own completions, a stop changes nothing, and ids stay the ids they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from on_policy_toys import EOS, KEYS, VOCAB, context, files, save_tokenizer, train, word

from lmdistill.errors import IntegrityError
from lmdistill.pipeline.stage import Artefact, ModelRef


def test_the_student_comes_nearer_to_its_teacher_on_its_own_completions(
    chats: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    record = train(tmp_path, chats, student, teacher, steps=24, warmup=0.1)
    log = record["log"]
    assert sum(line["loss"] for line in log[-3:]) / 3 < 0.75 * log[0]["loss"]
    assert log[-1]["loss"] == pytest.approx(log[-1]["kd"], rel=1e-3)
    assert record["tokens"] == log[-1]["tokens"] <= 24 * KEYS["batch_prompts"] * KEYS["max_new_tokens"]
    assert all(1 <= line["completion"] <= KEYS["max_new_tokens"] for line in log)


@pytest.mark.parametrize("keys", [{"student_share": 0.5}, {"precision": "bfloat16", "loss": "skew_reverse_kl", "k": 8}])
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(
    keys: dict[str, Any], chats: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    train(tmp_path / "whole", chats, student, teacher, **keys)
    kept = tmp_path / "whole" / "work" / "checkpoints"
    newest = max(kept.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(kept, tmp_path / "resumed" / "work" / "checkpoints")
    shutil.rmtree(tmp_path / "resumed" / "work" / "checkpoints" / newest.name)
    torch.manual_seed(99)
    train(tmp_path / "resumed", chats, student, teacher, **keys)
    assert files(tmp_path / "whole" / "out") == files(tmp_path / "resumed" / "out")


def test_the_teacher_sees_exactly_the_ids_that_the_student_sampled(
    chats: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmdistill.corpus.format import CorpusReader
    from lmdistill.on_policy.prompts import of_corpus
    from lmdistill.on_policy.trainer import OnPolicyTrainer
    from lmdistill.training.live_teacher import LiveEngine

    sampled: list[list[int]] = []
    seen: list[list[int]] = []
    sample, speak = OnPolicyTrainer._sampled, LiveEngine.speak

    def keep(self: Any, asked: list[list[int]], seed: int) -> list[list[int]]:
        said = sample(self, asked, seed)
        sampled.extend(prompt + completion for prompt, completion in zip(asked, said, strict=True))
        return said

    def listen(self: Any, tokens_RT: torch.Tensor, positions_RT: Any, counted_N: torch.Tensor) -> Any:
        counts_RT = torch.zeros(tokens_RT.shape, dtype=torch.bool)
        counts_RT.view(-1)[counted_N] = True
        for tokens, counts in zip(tokens_RT, counts_RT, strict=True):
            seen.append(tokens[: int(counts.nonzero().max()) + 2].tolist())
        return speak(self, tokens_RT, positions_RT, counted_N)

    monkeypatch.setattr(OnPolicyTrainer, "_sampled", keep)
    monkeypatch.setattr(LiveEngine, "speak", listen)
    train(tmp_path, chats, student, teacher, micro_prompts=2, steps=2)
    assert sorted(seen) == sorted(sampled) and len(seen) == 8
    prompts = of_corpus(CorpusReader(chats.out).split("train"), 8, 20, 32, 0)
    assert all(ids[: len(prompt.ids)] == list(prompt.ids) for ids, prompt in zip(sampled, prompts, strict=True))
    assert all(EOS not in ids[len(p.ids) : -1] for ids, p in zip(sampled, prompts, strict=True))


def test_without_a_share_of_its_own_the_student_learns_from_the_corpus_completions(
    chats: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmdistill.on_policy.trainer import OnPolicyTrainer

    monkeypatch.delattr(OnPolicyTrainer, "_sampled")
    off = train(tmp_path / "off", chats, student, teacher, student_share=0, max_new_tokens=40, steps=12, lr=0.2)
    assert off["log"][-1]["loss"] < 0.9 * off["log"][0]["loss"]
    assert 5 <= off["log"][0]["completion"] <= 9  # as long as the conversations' answers


def test_parts_of_a_step_change_nothing_but_rounding(
    chats: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", chats, student, teacher, steps=2)
    parts = train(tmp_path / "parts", chats, student, teacher, steps=2, micro_prompts=1, chunk=5)
    assert whole["log"][0]["loss"] == pytest.approx(parts["log"][0]["loss"], rel=1e-4)
    assert whole["tokens"] == parts["tokens"]


def test_the_saved_model_differs_from_the_student_in_its_weights_alone(
    chats: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    train(tmp_path, chats, student, teacher, steps=2)
    before, after = files(student.out / "model"), files(tmp_path / "out" / "model")
    assert set(before) - {"chat_template.jinja"} <= set(after)
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
    assert not list((tmp_path / "work").rglob("README.md"))


def test_another_prompt_order_or_teacher_refuses_to_resume(
    chats: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    train(tmp_path, chats, student, teacher, steps=2)
    with pytest.raises(IntegrityError, match="made with other prompts, settings"):
        train(tmp_path, chats, student, teacher, steps=2, seed=1)
    with pytest.raises(IntegrityError, match="made with other teacher"):
        train(tmp_path, chats, student, ModelRef("teacher", teacher.path, "b" * 64), steps=2)


def test_a_student_with_another_tokenizer_than_the_corpus_is_refused(
    chats: Artefact, student: Artefact, teacher: ModelRef, tmp_path: Path
) -> None:
    shutil.copytree(student.path, tmp_path / "other")
    save_tokenizer(tmp_path / "other/out/model", prefix="x")
    other = Artefact("student", "student", "student", "d" * 64, tmp_path / "other")
    with pytest.raises(IntegrityError, match="made with another tokenizer"):
        train(tmp_path / "run", chats, other, teacher)


def test_records_of_the_stages_own_serve_as_prompts(
    student: Artefact, teacher: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMDISTILL_CACHE", str(tmp_path / "cache"))
    lines = [f'{{"ask": [{{"role": "user", "content": "{word(i)} {word(i + 1)}"}}]}}' for i in range(4, 14)]
    (tmp_path / "ask.jsonl").write_text("\n".join(lines) + "\n")
    source = {"source": str(tmp_path / "ask.jsonl"), "messages": "ask"}
    ctx = context(tmp_path / "run", None, student, teacher, prompts=source)
    from lmdistill.on_policy.gathering import gather

    prompts = gather(ctx, student.out / "model", "train")
    assert len(prompts) == KEYS["steps"] * KEYS["batch_prompts"]
    assert all(p.ids[0] == 2 and p.ids[-1] == 3 and p.ids[2] == p.ids[1] + 1 and not p.answer for p in prompts)
    assert len({p.ids for p in prompts[:10]}) == 10 and max(max(p.ids) for p in prompts) < VOCAB
    assert train(tmp_path / "run", None, student, teacher, prompts=source)["steps"] == KEYS["steps"]
