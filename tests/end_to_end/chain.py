"""The whole chain in small: a toy teacher with the real tokenizer, true text, every stage; run as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdistill.pipeline.files import sha256_file

STAGES = ("corpus", "teach", "student", "distill", "ce", "files", "teacher_files", "evaluate")

RECIPE = """\
name: chain
teacher: {teacher}
runtime: {{threads: 1, workers: 1, device: cpu}}
stages:
  - stage: corpus
    sources: [{text}]
    sequence_length: 64
    separator: "<|endoftext|>"
    valid_fraction: 0.15
    train_tokens: 8192
    valid_tokens: 1024
  - stage: teach
    k: 16
    shard_rows: 4
    batch_rows: 2
  - stage: student
    layers: 3
    attention_layers: 1
    selection_rows: 1
    selection_width: 1
    fit_rows: 8
    fit_steps: 2
    fit_batch_rows: 4
  - stage: distill
    tokens: 8192
    batch_rows: 4
    log_steps: 4
    checkpoint_steps: 4
  - stage: distill
    name: ce
    from: [student, teach]
    loss: ce
    tokens: 8192
    batch_rows: 4
    log_steps: 4
  - stage: export
    name: files
    from: [distill, corpus]
    formats: [f32, f16, q8_0, q4_0]
    golden_conversations: 4
    parity_tokens: 128
  - stage: export
    name: teacher_files
    from: [teacher, corpus]
    formats: [q4_0]
    golden_conversations: 4
    parity_tokens: 128
  - stage: evaluate
    suite: quick
    tokens: 512
    speed: {{prefill: 16, decode: 8, repeats: 2}}
"""


@dataclass(frozen=True)
class Chain:
    """A folder with a recipe, and the command line run in it."""

    folder: Path
    recipe: str = "chain.yaml"

    @property
    def run_dir(self) -> Path:
        """Where the artefacts come to lie."""
        return self.folder / "runs" / Path(self.recipe).stem

    def command(self, *arguments: str) -> dict[str, Any]:
        """Arguments of Popen for `lmdistill pipeline`."""
        command = [sys.executable, "-m", "lmdistill", "pipeline", self.recipe, *arguments]
        return {"args": command, "cwd": self.folder, "text": True}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run to the end, whatever that is."""
        return subprocess.run(**self.command(*arguments), capture_output=True, check=False)

    def succeed(self, *arguments: str) -> str:
        """Run to a good end; returns what was printed."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def fail(self, *arguments: str) -> str:
        """Run to a user's error: status 2, one message that says what to do, no traceback; returns the message."""
        done = self.run(*arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count("error: ") == 1 and done.stderr.startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr + done.stdout
        return done.stderr

    def artefact(self, name: str) -> Path:
        """The folder of a finished stage."""
        (found,) = self.run_dir.glob(f"[0-9][0-9]-{name}-????????????")
        return found

    def change(self, old: str, new: str) -> None:
        """Edit the recipe."""
        file = self.folder / self.recipe
        text = file.read_text()
        assert text.count(old) == 1, old
        file.write_text(text.replace(old, new))


def lay_out(folder: Path, teacher: Path, text: Path) -> Chain:
    """Write the recipe into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chain.yaml").write_text(RECIPE.format(teacher=teacher, text=text))
    return Chain(folder)


def digests(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Artefact folder → its files' sha256, read from disk, and its metrics; of a report only what is not timed."""
    found: dict[str, dict[str, Any]] = {}
    for manifest in sorted(run_dir.glob("[0-9]*/manifest.json")):
        out = manifest.parent / "out"
        files: dict[str, Any] = {
            path.relative_to(out).as_posix(): sha256_file(path) for path in sorted(out.rglob("*")) if path.is_file()
        }
        if "evaluation.json" in files:
            record = json.loads((out / "evaluation.json").read_text())
            files["evaluation.json"] = {key: record[key] for key in ("quality", "gates", "curves", "signals")}
        found[manifest.parent.name] = {"files": files, "metrics": json.loads(manifest.read_text())["metrics"]}
    return found
