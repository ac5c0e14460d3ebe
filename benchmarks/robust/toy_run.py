"""A real run of corpus and teach in small: a random Llama of 50,000 parameters reads made-up words."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lmdistill.pipeline.files import sha256_file

VOCAB = 512
RECIPE = """\
name: toy
teacher: teacher
runtime: {{device: cpu, threads: 1, workers: 1}}
stages:
  - stage: corpus
    sources: [text.txt]
    sequence_length: 64
    valid_fraction: 0.2
    train_tokens: {train_tokens}
    valid_tokens: {valid_tokens}
  - stage: teach
    k: 32
    variant: {variant}
    splits: [train, valid]
    shard_rows: {shard_rows}
    batch_rows: 2
"""


@dataclass(frozen=True)
class ToyRun:
    """A folder with a teacher, a text and a recipe; runs of it differ in their run folder alone."""

    folder: Path
    settings: tuple[str, ...] = ()  # more arguments for every command

    def command(self, run_dir: Path, *arguments: str) -> dict[str, Any]:
        """Arguments of Popen for `lmdistill pipeline` into `run_dir`."""
        base = [sys.executable, "-m", "lmdistill", "pipeline", "toy.yaml", "--run-dir", str(run_dir)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return {"args": [*base, *self.settings, *arguments], "cwd": self.folder, "text": True, "env": environment}

    def run(self, run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run to the end, whatever that is."""
        return subprocess.run(**self.command(run_dir, *arguments), capture_output=True, check=False)

    def succeed(self, run_dir: Path, *arguments: str) -> None:
        """Run to a good end; RuntimeError with what was printed otherwise."""
        done = self.run(run_dir, *arguments)
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)

    def start(self, run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
        """Start in the background, in a group of its own, where Ctrl-C is heard."""
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": heard}
        return subprocess.Popen(**self.command(run_dir, *arguments), **quiet)


def make(folder: Path, variant: str, rows: int, shard_rows: int) -> ToyRun:
    """Write teacher, text and recipe; `rows` of 64 tokens to train on, a quarter of that held out."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _text(rows * 64 * 2)
    (folder / "text.txt").write_text(text)
    _teacher(folder / "teacher", text)
    sizes = {"train_tokens": rows * 64, "valid_tokens": rows * 16, "shard_rows": shard_rows, "variant": variant}
    (folder / "toy.yaml").write_text(RECIPE.format(**sizes))
    return ToyRun(folder)


def _text(words: int) -> str:
    """Paragraphs of made-up words, few of them frequent."""
    chance = random.Random(0)
    stock = ["".join(chance.choices("abcdefghiklmnoprstuvw", k=chance.randint(2, 8))) for _ in range(800)]
    weights = [1 / (rank + 1) for rank in range(len(stock))]
    said = chance.choices(stock, weights, k=words)
    return "\n\n".join(" ".join(said[start : start + 40]) for start in range(0, words, 40)) + "\n"


def _teacher(folder: Path, text: str) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text[:100_000]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def cache_files(run_dir: Path) -> dict[str, str]:
    """File name → sha256 of a finished teach stage's out/."""
    (out,) = run_dir.glob("[0-9][0-9]-teach-*/out")
    return {path.relative_to(out).as_posix(): sha256_file(path) for path in sorted(out.rglob("*")) if path.is_file()}


def fresh_copy(source: Path, target: Path) -> Path:
    """A run folder as `source` is, for a run to go on in."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target


def kill_all(process: subprocess.Popen[str]) -> None:
    """kill -9 of a pipeline and of all that it started, and wait until they are gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(everyone, timeout=10)
    process.communicate()
