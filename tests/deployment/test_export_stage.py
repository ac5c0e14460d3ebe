"""The export stage: proofs in deployment.json, limits that bind, the same bytes after any kill."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmdistill.checkpoints import copy_tokenizer, load_tokenizer
from lmdistill.corpus.format import (
    DOC_START,
    LOSS,
    TOKENIZER_FOLDER,
    CorpusMeta,
    CorpusReader,
    SplitMeta,
    tokens_digest,
)
from lmdistill.deployment.tokenizer_proof import whole_documents
from lmdistill.errors import IntegrityError
from lmdistill.pipeline.stage import (
    Artefact,
    ModelRef,
    Planned,
    PreflightContext,
    Runtime,
    StageConfig,
    StageContext,
)
from lmdistill.stages.export import ExportConfig, ExportStage

STAGE = ExportStage()
RUN = """
import sys
from pathlib import Path
from lmdistill.pipeline.stage import Artefact, Runtime, StageContext
from lmdistill.stages.export import ExportConfig, ExportStage
model, folder = Path(sys.argv[1]), Path(sys.argv[2])
(folder / "out").mkdir(parents=True, exist_ok=True)
parent = Artefact("student", "distill", "model", "f" * 64, model)
config = ExportConfig(formats=("f32", "q4_0"), parity_tokens=64, golden_conversations=2)
context = StageContext("toy", config, {"model": [parent]}, None, folder / "out", folder / "work",
                       runtime=Runtime(threads=1))
ExportStage().run(context)
"""


def artefact(name: str, stage: str, kind: str, path: Path) -> Artefact:
    return Artefact(name, stage, kind, "f" * 64, path)


@pytest.fixture
def parent(toy: Any, tmp_path: Path) -> Artefact:
    """A toy hybrid as a finished `model` artefact."""
    (tmp_path / "parent" / "out").mkdir(parents=True)
    (tmp_path / "parent" / "out" / "model").symlink_to(toy("lfm2"))
    return artefact("student", "distill", "model", tmp_path / "parent")


@pytest.fixture
def corpus(smollm_tokenizer_folder: Path, tmp_path: Path) -> Artefact:
    """Rows of 64 tokens of real text: documents with a separator after each, going on in the next row."""
    folder = tmp_path / "corpus" / "out"
    copy_tokenizer(smollm_tokenizer_folder, folder / TOKENIZER_FOLDER)
    tokenizer = load_tokenizer(smollm_tokenizer_folder)
    ids, flags = [], []
    for number in range(40):
        text = f"Document {number}: in {1900 + number} there were {number**3} foxes — naïve?\n" * (1 + number % 3)
        document = [*tokenizer.encode(text, add_special_tokens=False), 0]
        ids += document
        flags += [LOSS | DOC_START] + [LOSS] * (len(document) - 1)
    rows = len(ids) // 64
    tokens_RT = np.array(ids[: rows * 64], np.uint16).reshape(rows, 64)
    flags_RT = np.array(flags[: rows * 64], np.uint8).reshape(rows, 64)
    for kind, array in (("tokens", tokens_RT), ("flags", flags_RT), ("bytes", np.full(rows, 200, np.uint32))):
        np.save(folder / f"valid.{kind}.npy", array)
    split = SplitMeta(rows, 40, rows * 64, rows * 64, rows * 200, tokens_digest(tokens_RT, flags_RT))
    meta = CorpusMeta(64, "concat", 49152, "t", None, 0, 0, {"valid": split})
    (folder / "corpus.json").write_text(meta.to_json())
    return artefact("corpus", "corpus", "corpus", tmp_path / "corpus")


Run = Callable[..., tuple[StageContext[ExportConfig], dict[str, Any]]]


@pytest.fixture
def run(parent: Artefact, tmp_path: Path) -> Run:
    """Run the stage in this process; `runs/<place>` is its folder."""

    def go(place: str = "a", corpus: Artefact | None = None, **keys: Any) -> Any:
        folder = tmp_path / "runs" / place
        (folder / "out").mkdir(parents=True, exist_ok=True)
        inputs = {"model": [parent]} | ({"corpus": [corpus]} if corpus else {})
        config = ExportConfig(**({"parity_tokens": 300, "golden_conversations": 6} | keys))
        context = StageContext("toy", config, inputs, None, folder / "out", folder / "work", runtime=Runtime(threads=1))
        return context, STAGE.run(context)

    return go


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_every_file_is_proven(run: Run, corpus: Artefact, parent: Artefact) -> None:
    """All default formats: the record says what each is and how far from the checkpoint; a re-run changes none."""
    context, metrics = run(corpus=corpus)
    STAGE.verify(context, metrics)
    record = json.loads((context.out / "deployment.json").read_text())
    files = {entry["format"]: entry for entry in record["files"]}
    assert list(files) == ["f32", "f16", "q8_0", "q4_0", "q4_k_m"]
    assert {path.name for path in context.out.glob("*.gguf")} == {entry["file"] for entry in files.values()}
    assert record["model"] == {"name": "student", "digest": parent.fingerprint}
    assert record["architecture"] == "lfm2"
    assert {entry["params"] for entry in files.values()} == {record["params"]}
    assert record["tokenizer"]["conversations"] == 6
    assert record["tokenizer"]["training_documents"] == len(list(whole_documents(CorpusReader(corpus.out), 200))) > 5
    assert files["f32"]["parity"]["mean_kl"] < 1e-9 < files["f16"]["parity"]["mean_kl"] < 2e-5
    assert files["f16"]["parity"]["mean_kl"] < files["q8_0"]["parity"]["mean_kl"] < files["q4_0"]["parity"]["mean_kl"]
    assert files["q4_0"]["fallback_tensors"] == ["token_embd.weight"]  # 64 is no multiple of 256
    assert files["q8_0"]["fallback_tensors"] == []
    assert metrics["files"]["q4_0"]["mean_kl"] == files["q4_0"]["parity"]["mean_kl"]
    times = {path: path.stat().st_mtime_ns for path in context.out.glob("*.gguf")}
    assert run(corpus=corpus)[1] == metrics
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_limits_bind_and_name_the_numbers(run: Run) -> None:
    context, metrics = run(formats=["q4_0"], max_kl=1e-3)
    assert [path.name for path in context.out.glob("*.gguf")] == ["toy-Q4_0.gguf"]
    with pytest.raises(IntegrityError, match=r"toy-Q4_0\.gguf: mean KL 0\.\d+ is above 0\.001"):
        STAGE.verify(context, metrics)


def test_a_file_that_changed_is_found_and_made_again(run: Run) -> None:
    context, metrics = run(formats=["f16"])
    path, before = context.out / "toy-F16.gguf", digests(context.out)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="changed after it was measured"):
        STAGE.verify(context, metrics)
    run(formats=["f16"])
    assert digests(context.out) == before


def test_a_document_with_other_ids_than_in_training_is_found(run: Run, corpus: Artefact) -> None:
    """One token of a document replaced by two that spell the same."""
    tokens_RT = np.load(corpus.out / "valid.tokens.npy")
    vocabulary = json.loads((corpus.out / TOKENIZER_FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    row, column = np.argwhere(tokens_RT == vocabulary["Document"])[1]
    tokens_RT[row, column : column + 2] = [vocabulary["Doc"], vocabulary["ument"]]
    np.save(corpus.out / "valid.tokens.npy", tokens_RT)
    with pytest.raises(IntegrityError, match="gives a training document other ids"):
        run(corpus=corpus, formats=["f16"])


def test_a_kill_at_any_moment_leaves_the_same_bytes(toy: Any, parent: Artefact, tmp_path: Path) -> None:
    """kill -9 as the first file is written and while the checkpoint runs; then the run is let finish."""
    moments = (
        lambda folder: (folder / "work" / "toy-F32.gguf.partial").exists(),
        lambda folder: (folder / "work" / "reference.partial").exists(),
    )
    script = [sys.executable, "-c", RUN, str(parent.path)]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed"
    for reached in moments:
        process = subprocess.Popen([*script, str(killed)], env=environment, stderr=subprocess.PIPE)
        while not reached(killed) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    for folder in (killed, tmp_path / "undisturbed"):
        subprocess.run([*script, str(folder)], env=environment, check=True, capture_output=True)
    assert digests(killed / "out") == digests(tmp_path / "undisturbed" / "out")
    assert len(digests(killed / "out")) == 3


def planned(model: Artefact | None, student: StageConfig | None = None) -> Planned:
    above = {"student": [Planned("s", "student", "student", "0", student)]} if student else {}
    return Planned("student", "distill", "model", "f" * 64, StageConfig(), above, model)


def preflight(model: Planned, teacher: Path, tmp_path: Path) -> tuple[list[str], str]:
    context = PreflightContext("toy", ExportConfig(), {"model": [model]}, ModelRef("teacher", teacher, "0"), tmp_path)
    return [str(problem) for problem in STAGE.preflight(context)], STAGE.estimate(context).note


class StudentConfig(StageConfig):
    """The keys of a student stage that the export's preflight reads."""

    init: str = "grow"
    architecture: str = "lfm2"
    layers: int = 3
    attention_layers: int = 1
    kernel: int = 3
    hidden_size: int | None = None
    intermediate_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None


def test_preflight_lets_pass_what_can_be_written(toy: Any, parent: Artefact, tmp_path: Path) -> None:
    """A model that is there and a planned one of the same shape get the same notes."""
    notes = [preflight(planned(*model), toy("llama"), tmp_path) for model in ((parent,), (None, StudentConfig()))]
    assert notes[0] == notes[1]
    assert notes[0][0] == []
    assert "Q4_K_M 100%" in notes[0][1]  # widths of 64
    wide = StudentConfig(init="random", hidden_size=256, intermediate_size=512)
    assert preflight(planned(None, wide), toy("llama"), tmp_path) == ([], "")
    assert preflight(planned(None), toy("llama"), tmp_path) == ([], "")  # nothing is known


def test_planned_keys_are_those_of_the_student_stage() -> None:
    from lmdistill.stages.student import StudentConfig as Real

    assert set(StudentConfig.model_fields) <= set(Real.model_fields)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"architecture": "lfm3"}, "'lfm3'; did you mean 'lfm2'?"),
        ({"attention_layers": 3}, "no layer is conv"),
        ({"attention_layers": 0}, "no layer is full_attention"),
    ],
)
def test_preflight_refuses_before_training(keys: dict[str, Any], reason: str, toy: Any, tmp_path: Path) -> None:
    """A student without a writer and a tokenizer without a name, both at once."""
    import shutil

    teacher = Path(shutil.copytree(toy("llama"), tmp_path / "teacher"))
    content = json.loads((teacher / "tokenizer.json").read_text())
    content["model"]["type"] = "WordPiece"
    (teacher / "tokenizer.json").write_text(json.dumps(content))
    problems, _ = preflight(planned(None, StudentConfig(**keys)), teacher, tmp_path)
    assert len(problems) == 2
    assert reason in problems[0]
    assert "its model is WordPiece" in problems[1]


def test_the_real_teacher(teacher_folder: Path, tmp_path: Path) -> None:
    """SmolLM2-135M: f16 within its limits, q4_0 smaller than 100 MB, 134,515,008 weights in each."""
    (tmp_path / "teacher" / "out").mkdir(parents=True)
    (tmp_path / "teacher" / "out" / "model").symlink_to(teacher_folder)
    (tmp_path / "out").mkdir()
    config = ExportConfig(formats=("f16", "q4_0"), parity_tokens=128, golden_conversations=16)
    teacher = artefact("teacher", "teacher", "model", tmp_path / "teacher")
    context = StageContext("teacher_files", config, {"model": [teacher]}, None, tmp_path / "out", tmp_path / "work")
    metrics = STAGE.run(context)
    STAGE.verify(context, metrics)
    assert metrics["params"] == 134_515_008
    assert metrics["files"]["f16"]["mean_kl"] < 2e-5
    assert metrics["files"]["q4_0"]["bytes"] < 100_000_000
