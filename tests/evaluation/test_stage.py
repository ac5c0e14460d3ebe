"""The evaluate stage's keys and preflight: suites, gates that cannot be held, room on disk; the real teacher scored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lmdistill.corpus.config import CorpusConfig
from lmdistill.evaluation.suites import suite_folder
from lmdistill.pipeline.stage import ModelRef, Planned, PreflightContext, StageConfig
from lmdistill.stages.evaluate import EvaluateConfig, EvaluateStage
from lmdistill.stages.export import ExportConfig


def preflight(config: EvaluateConfig, run_dir: Path) -> list[str]:
    """The messages of evaluate's preflight after one model and one export in f16 and q4_0."""
    model = Planned("distill", "distill", "model", "1", StageConfig())
    export = Planned("export", "export", "deployment", "2", ExportConfig(formats=("f16", "q4_0")))
    inputs = {"models": [model], "deployments": [export]}
    ctx = PreflightContext("evaluate", config, inputs, None, run_dir)
    return [str(error) for error in EvaluateStage().preflight(ctx)]


@pytest.mark.parametrize("suite", sorted(path.stem for path in suite_folder().glob("*.yaml")))
def test_every_shipped_suite_is_a_config(suite: str) -> None:
    assert EvaluateConfig(suite=suite).tokens > 0


def test_a_suite_sets_defaults_and_the_recipe_wins(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "description: mine\ntokens: 100\nspeed: {prefill: 7, decode: 3}\nmetrics: [kl]\n"
    )
    config = EvaluateConfig.model_validate({"suite": str(tmp_path / "mine.yaml"), "tokens": 50, "speed": {"decode": 9}})
    assert (config.tokens, config.metrics) == (50, ("kl",))
    assert (config.speed.prefill, config.speed.decode, config.speed.repeats) == (7, 9, 5)


def test_a_config_written_out_reads_back_the_same() -> None:
    """What the lock and the worker are given is complete: no suite changes it any more."""
    config = EvaluateConfig.model_validate(
        {"suite": "quick", "tokens": 9, "gates": [{"of": "a", "metric": "nll", "at_most": {"of": "b", "plus": 1}}]}
    )
    assert EvaluateConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokenz: 3\n", "no key 'tokenz'; did you mean 'tokens'?"),
        ("- 1\n", "is not a mapping"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_wrong_suite_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValidationError) as caught:
        EvaluateConfig(suite=str(tmp_path / "mine.yaml"))
    assert message in str(caught.value)


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(ValidationError, match="no suite 'defualt'; did you mean 'default'"):
        EvaluateConfig(suite="defualt")
    with pytest.raises(ValidationError, match=r"no suite file gone\.yaml"):
        EvaluateConfig(suite="gone.yaml")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gates": [{"of": "distil", "metric": "nll", "at_most": 1}]}, "will not have; did you mean 'distill'?"),
        (
            {"gates": [{"of": "export/q4_0", "metric": "nll", "at_most": {"of": "export/q8_0"}}]},
            "a gate reads 'export/q8_0', which the ladder will not have",
        ),
        (
            {"gates": [{"of": "distill", "metric": "kl_to_parent", "at_most": 1}], "metrics": ["speed"]},
            "'kl_to_parent', which is not measured",
        ),
        (
            {"gates": [{"of": "export/f16", "metric": "decode_tps", "at_least": 1}], "metrics": ["kl"]},
            "'decode_tps', which is not measured",
        ),
    ],
)
def test_gates_that_cannot_be_held_are_refused_before_work(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    found = preflight(EvaluateConfig.model_validate(keys), tmp_path)
    assert any(message in text for text in found)


def test_gates_that_can_be_held_pass(tmp_path: Path) -> None:
    gates = [
        {"of": "distill", "metric": "nll", "at_most": {"of": "teacher", "plus": 0.7}},
        {"of": "export/q4_0", "metric": "decode_tps", "at_least": {"of": "export/f16", "times": 1.1}},
    ]
    assert preflight(EvaluateConfig.model_validate({"gates": gates}), tmp_path / "not" / "there" / "yet") == []


@pytest.mark.parametrize(
    ("fraction", "split", "told"),
    [(0, "valid", 1), (0, "train", 0), (0.1, "valid", 0), (0.1, "test", 1), (0.1, "tset", 1)],
)
def test_a_split_that_the_corpus_will_not_have_is_told(tmp_path: Path, fraction: float, split: str, told: int) -> None:
    keys = {"sources": [{"source": "a.txt"}], "valid_fraction": fraction}
    corpus = Planned("corpus", "corpus", "corpus", "1", CorpusConfig.model_validate(keys))
    ctx = PreflightContext("evaluate", EvaluateConfig(split=split), {"corpus": [corpus]}, None, tmp_path)
    assert len([error for error in EvaluateStage().preflight(ctx) if f"no split '{split}'" in str(error)]) == told


@pytest.mark.parametrize(("name", "evaluated", "told"), [("ce", False, 1), ("ce", True, 0), ("teacher", False, 0)])
def test_an_export_without_its_model_is_told(tmp_path: Path, name: str, evaluated: bool, told: int) -> None:
    model = Planned(name, "distill", "model", "1", StageConfig())
    export = Planned("files", "export", "deployment", "2", ExportConfig(), {"model": [model]})
    inputs = {"deployments": [export], "models": [model] if evaluated else []}
    ctx = PreflightContext("evaluate", EvaluateConfig(), inputs, None, tmp_path)
    found = [str(error) for error in EvaluateStage().preflight(ctx)]
    assert len([text for text in found if "'files' come from 'ce', which is not evaluated" in text]) == told


def test_the_estimate_counts_the_references_on_disk(tmp_path: Path) -> None:
    """Log-probabilities over the whole vocabulary, teacher's and a parent's, four bytes each; none without KL."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50_000}))
    teacher = ModelRef("teacher", tmp_path, "d")

    def disk(**keys: Any) -> int | None:
        ctx = PreflightContext("evaluate", EvaluateConfig.model_validate(keys), {}, teacher, tmp_path)
        return EvaluateStage().estimate(ctx).disk_bytes

    assert disk(tokens=1000) == pytest.approx(2 * 4 * 1000 * 50_000, rel=0.01)
    assert disk(tokens=1000, metrics=("speed",)) == 0


def test_importing_the_stage_is_light() -> None:
    code = (
        "import sys, lmdistill.stages.evaluate; lmdistill.stages.evaluate.EvaluateConfig();"
        "print([name for name in ('torch', 'transformers', 'numpy', 'llama_cpp', 'jinja2') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_both_runtimes_agree_on_the_real_teacher(teacher_folder: Path, embedded_gguf: Path) -> None:
    """The embedded Q4_1 file in llama.cpp against the checkpoint read from it: only 8-bit activations differ."""
    import torch

    from lmdistill.checkpoints import load_tokenizer
    from lmdistill.evaluation import divergence
    from lmdistill.evaluation.runtimes import RuntimeOptions, runtime_class

    text = "The river rises in the mountains and flows 120 km to the north, where it meets the sea near an old harbour."
    tokens_T = np.array(load_tokenizer(teacher_folder).encode(text, add_special_tokens=False))
    logs = []
    for name, path in {"transformers": teacher_folder, "llama.cpp": embedded_gguf}.items():
        model = runtime_class(name).open(path, RuntimeOptions(64, 1), exact=True)
        logs.append(torch.from_numpy(model.log_probs(tokens_T, 49_152)))
        model.close()
    targets_N = torch.from_numpy(tokens_T[1:])
    nlls = [float(divergence.nll(log_TV[:-1], targets_N).mean()) for log_TV in logs]
    assert 2 < nlls[0] < 5 and abs(nlls[0] - nlls[1]) < 0.05
    assert 1e-5 < float(divergence.kl(*logs).mean()) < 0.02
    assert float(divergence.agrees(*logs).mean()) > 0.85
