"""A run folder of small but real artefacts: toy Llama checkpoints, a corpus, GGUF files written from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmdistill.checkpoints import copy_tokenizer
from lmdistill.corpus.format import DOC_START, LOSS, PAD, CorpusMeta, SplitMeta, token_dtype, tokens_digest
from lmdistill.pipeline.stage import Artefact, ModelRef, Runtime, StageContext

VOCABULARY = 259  # 256 bytes, one merge (llama.cpp wants at least one), two special tokens
ROWS, LENGTH = 4, 24


def save_toy(folder: Path, seed: int) -> Path:
    """A random two-layer Llama with a byte-level tokenizer, in Hugging Face layout; kept where it is there already."""
    if folder.exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: id_ for id_, text in enumerate([*alphabet, "th"])}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,  # wide, so that predictions differ from one model to the next
        bos_token_id=257,
        eos_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def save_corpus(folder: Path, packing: str = "concat") -> Path:
    """Rows of random bytes as one split `valid`; the second row has two documents, the last ends in padding."""
    rng = np.random.default_rng(7)
    tokens_RT = rng.integers(0, 256, (ROWS, LENGTH)).astype(token_dtype(VOCABULARY))
    flags_RT = np.full((ROWS, LENGTH), LOSS, np.uint8)
    flags_RT[:, 0] |= DOC_START
    flags_RT[:, -1] &= ~np.uint8(LOSS)
    flags_RT[1, 10] |= DOC_START
    flags_RT[1, 9] &= ~np.uint8(LOSS)
    flags_RT[-1, 19:] = PAD
    flags_RT[-1, 18] = 0
    bytes_R = (flags_RT & LOSS).sum(1).astype(np.uint32)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in {"tokens": tokens_RT, "flags": flags_RT, "bytes": bytes_R}.items():
        np.save(folder / f"valid.{kind}.npy", array)
    targets = int((flags_RT & LOSS).astype(bool).sum())
    split = SplitMeta(
        ROWS, ROWS + 1, ROWS * LENGTH - 5, targets, int(bytes_R.sum()), tokens_digest(tokens_RT, flags_RT)
    )
    meta = CorpusMeta(LENGTH, packing, VOCABULARY, "t" * 64, None, None, 258, {"valid": split})
    (folder / "corpus.json").write_text(meta.to_json())
    return folder


def save_deployment(folder: Path, model: ModelRef, formats: tuple[str, ...]) -> None:
    """GGUF files of `model`, written and quantised as the export stage does; kept where they are there already."""
    if folder.exists():
        return
    from lmdistill.deployment.formats import FORMATS
    from lmdistill.deployment.gguf_writer import write_gguf
    from lmdistill.deployment.quantizer import quantize

    folder.mkdir(parents=True)
    entries = []
    for name in formats:
        target = folder / f"{model.name}-{name}.gguf"
        if name in ("f32", "f16"):
            write_gguf(model.path, target, name, name=model.name, parent=model.digest)
        else:
            write_gguf(model.path, folder / "whole.gguf", "f32", name=model.name, parent=model.digest)
            quantize(folder / "whole.gguf", target, FORMATS[name], threads=1)
            (folder / "whole.gguf").unlink()
        entries.append({"file": target.name, "format": name, "bytes": target.stat().st_size})
    record = {"model": {"name": model.name, "digest": model.digest}, "files": entries}
    (folder / "deployment.json").write_text(json.dumps(record))


@dataclass
class World:
    """A run folder with everything that evaluate takes."""

    root: Path
    teacher: ModelRef
    corpus: Artefact
    models: list[Artefact]
    deployments: list[Artefact]

    def context(self, config: Any, folder: str = "evaluate") -> StageContext[Any]:
        """A context to run the evaluate stage in, on one thread."""
        inputs = {"corpus": [self.corpus], "models": self.models, "deployments": self.deployments, "signals": []}
        out, work = self.root / folder / "out", self.root / folder / "work"
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
        return StageContext("evaluate", config, inputs, self.teacher, out, work, runtime=Runtime("cpu", 1, 1))


def build_world(root: Path) -> World:
    """Teacher, a student before training, a distilled model, a baseline; files of the teacher and of the model."""
    teacher = ModelRef("teacher", save_toy(root / "teacher", 0), "digest-of-teacher")

    def model(place: int, name: str, kind: str, training: dict[str, Any] | None) -> Artefact:
        path = root / f"{place:02d}-{name}-{name:f>12.12}"
        save_toy(path / "out" / "model", place)
        if training:
            (path / "out" / "training.json").write_text(json.dumps(training))
        return Artefact(name, "distill" if training else "student", kind, f"digest-of-{name}", path)

    log = [{"step": step, "tokens": 100 * step, "loss": 5.0 - 0.1 * step} for step in range(1, 6)]
    models = [
        model(2, "student", "student", None),
        model(3, "distill", "model", {"loss": "kd", "log": log}),
        model(4, "ce", "model", {"loss": "ce", "log": log}),
    ]
    corpus = Artefact("corpus", "corpus", "corpus", "digest-of-corpus", root / "01-corpus")
    save_corpus(corpus.out)
    copy_tokenizer(teacher.path, corpus.out / "tokenizer")
    deployments = []
    for name, parent, formats in (("teacher_files", teacher, ("f16",)), ("export", models[1].model(), ("f32", "f16"))):
        path = root / f"05-{name}"
        save_deployment(path / "out", parent, formats)
        deployments.append(Artefact(name, "export", "deployment", f"digest-of-{name}", path))
    return World(root, teacher, corpus, models, deployments)
