"""Export to ExecuTorch on toys: what ships is proven, and spoilt files, models and programs are found out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid_models import on_grid
from safetensors.torch import load_file, save_file

from lmdistill.deployment.executorch.delegation import Work, check_share, delegated_work
from lmdistill.deployment.executorch.runtime import ExecutorchRuntime
from lmdistill.deployment.executorch.shipped_tokenizer import ShippedTokenizer
from lmdistill.errors import IntegrityError, LmdistillError
from lmdistill.evaluation.runtimes import RuntimeOptions, runtime_class
from lmdistill.evaluation.speed import SpeedPlan, SpeedTarget, measure
from lmdistill.pipeline.stage import Artefact, Planned, PreflightContext, Runtime, StageConfig, StageContext
from lmdistill.quantization.keys import QuantizeKeys
from lmdistill.stages.export import ExportConfig, ExportStage
from lmdistill.training.config import DistillConfig

pytest.importorskip("executorch")
STAGE = ExportStage()
TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
W1 = "model.layers.1.feed_forward.w1.weight"
FOLDER = Path(__file__).parents[2] / "export/executorch"


def _context(model: Path, folder: Path, **keys: Any) -> StageContext[ExportConfig]:
    (folder / "model" / "out").mkdir(parents=True)
    (folder / "model" / "out" / "model").symlink_to(model)
    (folder / "out").mkdir()
    config = ExportConfig(**({"parity_tokens": 100, "golden_conversations": 4, "context": 256} | keys))
    parent = Artefact("student", "distill", "model", "f" * 64, folder / "model")
    return StageContext(
        "toy", config, {"model": [parent]}, None, folder / "out", folder / "work", runtime=Runtime(threads=1)
    )


Exported = tuple[StageContext[ExportConfig], dict[str, Any]]


@pytest.fixture(scope="module")
def floats(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A toy hybrid exported as pte_f32 beside a GGUF."""
    context = _context(toy("lfm2", **TWO_LAYERS), tmp_path_factory.mktemp("floats"), formats=("f16", "pte_f32"))
    return context, STAGE.run(context)


@pytest.fixture(scope="module")
def packed(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A toy hybrid that was trained on 8da4w, embeddings and all."""
    folder = tmp_path_factory.mktemp("packed")
    keys = QuantizeKeys(grid="8da4w", embeddings="8da4w")
    model = on_grid(toy("lfm2", **TWO_LAYERS), folder / "grid", keys)
    context = _context(model, folder, formats=("pte_8da4w_all",))
    return context, STAGE.run(context)


def _entries(exported: Exported) -> dict[str, Any]:
    record = json.loads((exported[0].out / "deployment.json").read_text())
    return {entry["format"]: entry for entry in record["files"]} | {"tokenizer": record["tokenizer"]}


def test_a_float_program_is_proven(floats: Exported) -> None:
    STAGE.verify(*floats)
    found = _entries(floats)
    entry = found["pte_f32"]
    assert entry["file"] == "toy-F32.pte" and entry["context"] == 256
    assert entry["parity"]["max_abs"] < 1e-4 and entry["parity"]["mean_kl"] < 1e-9
    assert entry["bit_equal"] == len(load_file(floats[0].one("model").model().path / "model.safetensors"))
    assert entry["delegated"] >= 0.95
    assert "max_abs" not in found["f16"]["parity"]
    assert found["tokenizer"]["executorch"] == {"texts": 1200, "conversations": 4, "differing": 0}


def test_a_program_trained_on_its_grid_has_its_very_codes_and_scales(packed: Exported) -> None:
    """Every tensor bit for bit, and predictions are those of training, rounded activations included."""
    STAGE.verify(*packed)
    entry = _entries(packed)["pte_8da4w_all"]
    trained = load_file(packed[0].one("model").model().path / "model.safetensors")
    assert entry["bit_equal"] == len(trained) and entry["note"] == "trained on its grid"
    assert (
        entry["parity"]["mean_kl"] < 1e-5
    )  # an activation between two codes may fall to the other side here and there
    assert entry["delegated"] >= 0.95 and entry["fallback_share"] == 0
    assert entry["bits_per_weight"] < 5


def test_weights_that_were_changed_afterwards_are_found(packed: Exported, tmp_path: Path) -> None:
    """One weight moved to the next point of its grid: still on the grid, no longer what the file has."""
    context = packed[0]
    source, folder = context.one("model").model().path, tmp_path / "model"
    shutil.copytree(source, folder)
    weights, scales = load_file(folder / "model.safetensors"), load_file(folder / "grids/scales.safetensors")
    step = scales[f"{W1}|d"][0, 0].float()
    weights[W1][0, 0] += step if weights[W1][0, 0] <= 0 else -step
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    from lmdistill.deployment.targets import format_of, target_of

    target, format_ = target_of("pte_8da4w_all"), format_of("pte_8da4w_all")
    file = context.out / "toy-8DA4W_ALL.pte"
    assert target.verify_weights(file, source, format_) == len(weights)
    with pytest.raises(IntegrityError, match=f"{W1} is not in it"):
        target.verify_weights(file, folder, format_)


def test_limits_bind(floats: Exported) -> None:
    context, metrics = floats
    strict = StageContext(
        "toy", context.config.model_copy(update={"max_abs_f32": 1e-12}), context.inputs, None, context.out, context.work
    )
    with pytest.raises(IntegrityError, match=r"toy-F32\.pte: a logit is .* off, above 1e-12"):
        STAGE.verify(strict, metrics)


def test_sequences_do_not_see_each_other_and_single_tokens_are_a_prompt(floats: Exported, sequences: Any) -> None:
    with ExecutorchRuntime(floats[0].out / "toy-F32.pte", n_threads=1) as runtime:
        whole = [np.concatenate([chunk for _, chunk in runtime.logit_chunks(ids)]) for ids in sequences]
        again = np.concatenate([chunk for _, chunk in runtime.logit_chunks(sequences[0])])
        assert np.array_equal(again, whole[0])
        single = torch.cat([runtime.evaluate([id_], at, all_logits=True) for at, id_ in enumerate(sequences[1])])
        assert float((single - torch.from_numpy(whole[1])).abs().max()) < 1e-4
        assert torch.allclose(runtime.read(sequences[0]), torch.from_numpy(whole[0][-1]), atol=1e-4)
        with pytest.raises(LmdistillError, match="does not fit the 256 positions"):
            list(runtime.logit_chunks([1] * 300))
        with pytest.raises(LmdistillError, match="outside the vocabulary"):
            list(runtime.logit_chunks([49152]))


def test_the_scorer_and_the_speed_benchmark_run_it_beside_a_gguf(floats: Exported, tmp_path: Path) -> None:
    out = floats[0].out
    tokens = np.arange(60, dtype=np.int64) * 37 % 49152
    options = RuntimeOptions(64, 1)
    scores = {}
    for name, file in (("executorch", "toy-F32.pte"), ("llama.cpp", "toy-F16.gguf")):
        opened = runtime_class(name).open(out / file, options, exact=True)
        scores[name] = opened.log_probs(tokens, 49152)
        opened.close()
    assert np.abs(scores["executorch"] - scores["llama.cpp"]).max() < 0.05
    targets = [
        SpeedTarget("pte", "executorch", out / "toy-F32.pte"),
        SpeedTarget("gguf", "llama.cpp", out / "toy-F16.gguf"),
    ]
    rows = measure(targets, SpeedPlan(16, 4, 1, 1), tmp_path)
    assert all(rows[name]["decode_tps"]["median"] > 0 and rows[name]["peak_rss_bytes"] > 0 for name in ("pte", "gguf"))


def test_a_file_that_is_no_program_is_one_clear_message(floats: Exported, tmp_path: Path) -> None:
    (tmp_path / "broken.pte").write_bytes((floats[0].out / "toy-F32.pte").read_bytes()[:1000])
    with pytest.raises(IntegrityError, match=r"ExecuTorch cannot load .*broken\.pte"):
        ExecutorchRuntime(tmp_path / "broken.pte", n_threads=1)


def test_work_that_is_left_to_slow_kernels_is_counted() -> None:
    """A product in the delegate, a sort outside of it: the share says so, and a limit above it refuses."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    class Sorted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 16, bias=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.cumsum(self.linear(hidden), 1)

    program = torch.export.export(Sorted(), (torch.ones(4, 8),))
    bare = delegated_work(to_edge_transform_and_lower(program).exported_program())
    lowered = delegated_work(
        to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).exported_program()
    )
    assert bare.share == 0 and bare.left["cumsum"] == 64
    assert lowered.delegated == 2 * 4 * 8 * 16 and lowered.left == {"cumsum": 64}
    with pytest.raises(
        IntegrityError, match=r"only 94\.1% of the program's compute runs in XNNPACK, not 95%"
    ) as caught:
        check_share(lowered, 0.95)
    assert "cumsum (64 operations)" in str(caught.value)
    check_share(Work(delegated=1.0), 0.95)


def _refusals(model: Planned, tmp_path: Path, **keys: Any) -> list[str]:
    context = PreflightContext("toy", ExportConfig(**keys), {"model": [model]}, None, tmp_path)
    return [str(problem) for problem in STAGE.preflight(context)]


def _planned(artefact: Artefact | None, config: StageConfig) -> Planned:
    return Planned("qad", "distill", "model", "f" * 64, config, {}, artefact)


def test_what_cannot_be_lowered_is_said_before_anything_runs(toy: Any, tmp_path: Path) -> None:
    q4_0 = _planned(None, DistillConfig.model_validate({"quantize": {"grid": "q4_0"}}))
    [problem] = _refusals(q4_0, tmp_path, formats=("pte_8da4w",))
    assert "a PTE file cannot hold a model trained on grid 'q4_0'" in problem
    on_8da4w = _planned(None, DistillConfig.model_validate({"quantize": {"grid": "8da4w"}}))
    [problem] = _refusals(on_8da4w, tmp_path, formats=("pte_f32", "pte_8da4w_all"))
    assert "`formats: pte_8da4w_all` would quantise a model a second time" in problem and "[pte_8da4w]" in problem
    assert _refusals(on_8da4w, tmp_path, formats=("pte_f32", "pte_8da4w")) == []
    odd = _planned(None, DistillConfig.model_validate({"quantize": {"grid": "8da4w", "group": 16}}))
    [problem] = _refusals(odd, tmp_path, formats=("pte_8da4w",))
    assert "XNNPACK cannot hold grid '8da4w' with groups of 16" in problem


def _artefact(folder: Path, tmp_path: Path, **config: Any) -> Artefact:
    """A finished model whose config.json says something else too."""
    model = tmp_path / "changed" / "out" / "model"
    shutil.copytree(folder, model)
    keys = json.loads((model / "config.json").read_text()) | config
    (model / "config.json").write_text(json.dumps(keys))
    return Artefact("student", "distill", "model", "f" * 64, tmp_path / "changed")


@pytest.mark.parametrize(
    ("config", "keys", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, {}, "is converted: its weights are packed integers"),
        ({"conv_bias": True}, {}, "conv_bias is on"),
        ({"hidden_size": 48}, {"formats": ("pte_8da4w",)}, "rows of 48 weights cannot be put on grid '8da4w'"),
        ({}, {"context": 4096}, "`context: 4096` is longer than the 512 positions the model knows"),
    ],
)
def test_finished_models_are_looked_at(
    config: dict[str, Any], keys: dict[str, Any], reason: str, toy: Any, tmp_path: Path
) -> None:
    model = _planned(_artefact(toy("lfm2"), tmp_path, **config), DistillConfig())
    [problem] = _refusals(model, tmp_path, **({"formats": ("pte_f32",)} | keys))
    assert reason in problem


def test_programs_too_short_for_what_is_scored_or_timed_are_named_before_anything_runs(tmp_path: Path) -> None:
    """512 tokens of a prompt are timed where nothing else is said."""
    from lmdistill.stages.evaluate import EvaluateConfig, EvaluateStage

    def problems(context: int) -> list[str]:
        keys = ExportConfig(formats=("pte_f32",), context=context)
        files = Planned("files", "export", "deployment", "e" * 64, keys)
        ctx = PreflightContext("evaluate", EvaluateConfig(), {"deployments": [files]}, None, tmp_path)
        return [str(one) for one in EvaluateStage().preflight(ctx) if "positions" in str(one)]

    assert problems(512) == []
    [problem] = problems(256)
    assert "needs 512 positions, the programs of 'files' hold 256" in problem


def test_without_executorch_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "executorch" else found(name))
    [problem] = _refusals(_planned(None, DistillConfig()), tmp_path, formats=("f16", "pte_f32"))
    assert "stage 'toy': files for executorch need executorch" in problem and "lmdistill[executorch]" in problem
    assert _refusals(_planned(None, DistillConfig()), tmp_path, formats=("f16",)) == []


def test_the_shipped_tokenizer_ends_answers_where_the_template_does(floats: Exported) -> None:
    shipped = ShippedTokenizer(floats[0].out / "tokenizer")
    assert shipped.ends == {2}  # <|im_end|>
    assert shipped.decode(shipped.encode("Hello <|im_end|>")) == "Hello "


def script(name: str, *arguments: Any, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True)


def test_chat_answers_and_forgets(floats: Exported) -> None:
    file = floats[0].out / "toy-F32.pte"
    one = script("chat.py", file, "--preset", "greedy", "--prompt", "Hello", "--max-tokens", 3)
    assert one.returncode == 0, one.stderr
    done = script("chat.py", file, "--preset", "greedy", "--max-tokens", 3, stdin="Hello\n/new\nHello\n/quit\n")
    answers = [line.lstrip("> ") for line in done.stdout.splitlines()]
    assert done.returncode == 0 and answers[0] == answers[1]
    assert answers[0].strip() == one.stdout.strip() != ""


def test_chat_says_what_is_wrong(floats: Exported, tmp_path: Path) -> None:
    file = floats[0].out / "toy-F32.pte"
    (tmp_path / "mine.yaml").write_text((FOLDER / "presets/greedy.yaml").read_text() + "temprature: 1\n")
    for arguments, message in (
        ((tmp_path / "none.pte",), "no such file"),
        ((file, "--preset", "gredy"), "did you mean 'greedy'?"),
        ((file, "--preset", tmp_path / "mine.yaml"), "did you mean 'temperature'?"),
        ((file, "--preset", "greedy", "--prompt", "word " * 300), "the file holds 256"),
    ):
        done = script("chat.py", *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_bench_times_programs_beside_ggufs(floats: Exported) -> None:
    out = floats[0].out
    done = script(
        "bench.py",
        out / "toy-F32.pte",
        out / "toy-F16.gguf",
        "--prefill",
        16,
        "--decode",
        4,
        "--rounds",
        1,
        "--threads",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in ("toy-F32.pte", "toy-F16.gguf", "prefill", "peak"))
