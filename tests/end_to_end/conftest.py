"""Fixtures of the whole chain: its teacher and text, one undisturbed run, and copies of it to spoil."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from chain import Chain, lay_out

PASSAGES = {
    "source": "pypi:evals==3.0.1.post1/evals/registry/data/schelling_point/owt_5.jsonl",
    "sha256": "095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b",
}
RECORDS = 60
TEACHER_STEPS = 40


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty original passages of the embedded data, one a line."""
    from lmdistill.asset_spec import AssetSpec
    from lmdistill.assets import fetch
    from lmdistill.pipeline.stage import SilentProgress

    source = fetch(AssetSpec.model_validate(PASSAGES), SilentProgress())
    lines = source.read_text(encoding="utf-8").splitlines()[:RECORDS]
    file = tmp_path_factory.mktemp("text") / "passages.jsonl"
    file.write_text("".join(json.dumps({"text": json.loads(line)["0"]}) + "\n" for line in lines))
    return file


@pytest.fixture(scope="session")
def teacher(toy_llama: Callable[..., Path], text: Path) -> Path:
    """A teacher of four blocks that has learnt a little of the text, so that its likeliest tokens do occur in it."""
    import torch

    from lmdistill.checkpoints import load_model, load_tokenizer

    folder = toy_llama(seed=7, max_position_embeddings=256)
    model, tokenizer = load_model(folder).train(), load_tokenizer(folder)
    passages = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    ids = tokenizer("\n".join(passages), return_tensors="pt").input_ids[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(TEACHER_STEPS):
        batch = ids[step * 256 % (len(ids) - 256) :][:256].view(4, 64)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder, max_shard_size="1TB")
    return folder


@pytest.fixture(scope="session")
def finished(teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The chain, run once and undisturbed; tests only read it."""
    chain = lay_out(tmp_path_factory.mktemp("chain"), teacher, text)
    chain.succeed()
    return chain


@pytest.fixture
def fresh(teacher: Path, text: Path, tmp_path: Path) -> Chain:
    """The chain with nothing run yet."""
    return lay_out(tmp_path, teacher, text)


@pytest.fixture
def upto(finished: Chain, fresh: Chain) -> Callable[..., Chain]:
    """The chain as it stands after the named stages, to go on from or to spoil."""

    def make(*names: str) -> Chain:
        for name in names:
            source = finished.artefact(name)
            shutil.copytree(source, fresh.run_dir / source.name)
        return fresh

    return make


@pytest.fixture(scope="session")
def smoke(embedded_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """recipes/smoke.yaml, run once in a folder that holds what a checkout holds."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "export", "eval"):
        (folder / name).symlink_to(Path(__file__).parents[2] / name)
    chain = Chain(folder, "recipes/smoke.yaml")
    chain.succeed()
    return chain
