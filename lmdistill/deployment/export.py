"""A checkpoint into files with their proofs: what the export stage runs and verifies.

What is particular to a runtime is in `targets/`. A file is made in the scratch folder, fsynced, its sha256 recorded
there, and renamed into place: after a kill at any moment the next run takes what is whole and makes the rest, to the
same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.corpus.format import PAD, TRAIN, CorpusReader
from lmdistill.deployment.architectures import ARCHITECTURES
from lmdistill.deployment.formats import Format, weight_count
from lmdistill.deployment.gguf_writer import read_config
from lmdistill.deployment.golden import accepted_conversations
from lmdistill.deployment.imatrix import importance_of
from lmdistill.deployment.parity import Parity, measure_parity, write_reference
from lmdistill.deployment.targets import Target, by_target, format_of, target_of
from lmdistill.deployment.tokenizer_proof import held_out
from lmdistill.errors import IntegrityError
from lmdistill.pipeline.files import fsync, sha256_file, write_json, write_text
from lmdistill.pipeline.stage import ModelRef, Progress
from lmdistill.quantization.placement import Placement

if TYPE_CHECKING:
    from lmdistill.deployment.imatrix import Importance

RECORD = "deployment.json"
_SEQUENCE = 256  # tokens of a sequence of built-in text


@dataclass(frozen=True)
class Export:
    """One export: which model, under which name, into which files."""

    model: ModelRef
    name: str
    formats: tuple[str, ...]
    conversations: int
    parity_tokens: int
    out: Path
    work: Path
    corpus: CorpusReader | None = None
    threads: int | None = None
    imatrix_tokens: int | None = None  # of the training split; None: llama.cpp weighs all inputs alike
    context: int | None = None  # positions of a `.pte`'s caches; None: what the model knows, within reason
    min_delegated: float = 0.95  # share of a `.pte`'s compute in its accelerated backend

    def file(self, format_: Format) -> Path:
        """Where a format's file goes."""
        return self.out / f"{self.name}-{format_.suffix.removeprefix('PTE_')}{target_of(format_.name).suffix}"

    @cached_property
    def placement(self) -> Placement | None:
        """Where the model lies, if it was trained on grids."""
        return Placement.load(self.model.path)

    def run(self, progress: Progress) -> dict[str, Any]:
        """Write every file and measure it; deployment.json's contents, which are also written."""
        self.work.mkdir(parents=True, exist_ok=True)
        wanted = {one: [format_of(name) for name in names] for one, names in by_target(self.formats).items()}
        for target, formats in wanted.items():
            target.write(self, formats, progress)
        sequences = self.sequences()
        formats = [format_of(name) for name in self.formats]
        entries = []
        for done, format_ in enumerate(formats):
            progress.update(done, len(formats), "files measured")
            parity = self._parity(format_, sequences, progress)
            entries.append(self._entry(format_) | {"parity": target_of(format_.name).parity_entry(parity)})
        progress.update(len(formats), len(formats), "files measured")
        record = self._record(entries, self._tokenizers(wanted))
        write_json(self.out / RECORD, record)
        return record

    def _parity(self, format_: Format, sequences: list[list[int]], progress: Progress) -> Parity:
        """A file's distance from the checkpoint, which runs once for all files that compute alike."""
        target = target_of(format_.name)
        rounded = target.rounds_activations(self, format_)
        reference = self.work / ("reference_on_grid.f32" if rounded else "reference.f32")
        if reference not in self._written:
            progress.note(f"the checkpoint's own predictions of {sum(map(len, sequences)):,} tokens")
            write_reference(self.model.path, sequences, reference, self.threads, on_grid=rounded)
            self._written.add(reference)
        with target.opened(self.file(format_), max(map(len, sequences)), self.threads) as source:
            return measure_parity(source, self.file(format_).name, sequences, reference)

    @cached_property
    def _written(self) -> set[Path]:
        """References of this run; one of an earlier run may be of other sequences."""
        return set()

    def _tokenizers(self, wanted: dict[Target, list[Format]]) -> dict[str, Any]:
        """The proofs of all targets: llama.cpp's as it always was, others by their names."""
        proofs = {target.name: target.prove_tokenizer(self, formats) for target, formats in wanted.items()}
        return {**proofs.pop("llama.cpp", {}), **proofs}

    @cached_property
    def importance(self) -> Importance:
        """Of the inputs of all layers, on the text for it."""
        return importance_of(self.model.path, self.imatrix_text(), self.threads)

    def imatrix_text(self) -> list[list[int]]:
        """The first tokens of the training split, that inputs are measured on."""
        assert self.corpus is not None and self.imatrix_tokens is not None  # the stage asks for both
        split = self.corpus.split(TRAIN)
        rows = zip(split.tokens_RT, split.flags_RT, strict=True)
        text = ([int(token) for token in tokens[flags & PAD == 0]] for tokens, flags in rows)
        return _first(text, self.imatrix_tokens)

    def weighs(self, format_: Format) -> bool:
        """Whether a file's scales are to fit the inputs of its layers."""
        return bool(self.imatrix_tokens) and format_.quantized and self.placement is None

    def imatrix_note(self, format_: Format) -> dict[str, Any]:
        """What deployment.json says of that."""
        return {"note": f"imatrix of {self.imatrix_tokens:,} tokens"} if self.weighs(format_) else {}

    def ensure(self, path: Path, progress: Progress, make: Callable[[Path], object]) -> None:
        """Have `path` whole: keep it where its recorded sha256 still holds, else make it."""
        record = self.work / f"{path.name}.sha256"
        if path.exists() and record.exists() and sha256_file(path) == record.read_text().strip():
            return
        unfinished = self.work / f"{path.name}.partial"
        make(unfinished)
        fsync(unfinished)
        write_text(record, sha256_file(unfinished) + "\n")
        unfinished.replace(path)
        fsync(path.parent)
        progress.note(f"{path.name}: {path.stat().st_size:,} bytes")

    def _entry(self, format_: Format) -> dict[str, Any]:
        path = self.file(format_)
        return {
            "file": path.name,
            "format": format_.name,
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
            **target_of(format_.name).entry(self, format_),
        }

    def _record(self, entries: list[dict[str, Any]], tokenizer: dict[str, Any]) -> dict[str, Any]:
        config = read_config(self.model.path)
        architecture = ARCHITECTURES[config["model_type"]](config)
        return {
            "model": {"name": self.model.name, "digest": self.model.digest},
            "architecture": architecture.gguf_name,
            "params": weight_count(architecture),
            "files": entries,
            "tokenizer": tokenizer,
        }

    def sequences(self) -> list[list[int]]:
        """Token ids to measure on: rows of the held-out split, else the golden conversations one after the other."""
        if self.corpus is not None:
            split = held_out(self.corpus)
            rows = zip(split.tokens_RT, split.flags_RT, strict=True)
            return _first([[int(t) for t in tokens[flags & PAD == 0]] for tokens, flags in rows], self.parity_tokens)
        from lmdistill.checkpoints import load_tokenizer
        from lmdistill.deployment.probes import probe_texts

        tokenizer = load_tokenizer(self.model.path)
        golden = accepted_conversations(tokenizer, self.conversations)
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in golden] or probe_texts()
        ids = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]
        length = min(_SEQUENCE, int(read_config(self.model.path)["max_position_embeddings"]))
        return _first([ids[at : at + length] for at in range(0, len(ids), length)], self.parity_tokens)


def _first(sequences: Iterable[list[int]], tokens: int) -> list[list[int]]:
    """The first sequences, cut to `tokens` tokens together."""
    taken: list[list[int]] = []
    for sequence in sequences:
        if tokens > 0 and sequence:
            taken.append(sequence[:tokens])
            tokens -= len(taken[-1])
    return taken


@dataclass(frozen=True)
class Limits:
    """How far a file may be from its checkpoint."""

    kl_f32: float
    kl_f16: float
    top1: float
    kl: float | None
    abs_f32: float = 1e-4

    def breaches(self, entry: dict[str, Any]) -> list[str]:
        """What of a file's measured parity is beyond its limit, in words."""
        name, parity, found = entry["format"], entry["parity"], []
        limit = {"f32": self.kl_f32, "pte_f32": self.kl_f32, "f16": self.kl_f16}.get(name, self.kl)
        if limit is not None and not parity["mean_kl"] <= limit:
            found.append(f"mean KL {parity['mean_kl']:.3g} is above {limit:.3g}")
        if name in ("f32", "pte_f32", "f16") and parity["top1_decided"] < self.top1:
            found.append(f"top-1 agreement {parity['top1_decided']:.4f} is below {self.top1}")
        if name == "pte_f32" and not parity["max_abs"] <= self.abs_f32:
            off = f"a logit is {parity['max_abs']:.3g} off, above {self.abs_f32:.3g}"
            found.append(f"{off} (they reach {parity['largest']:.3g}, and float32 has seven digits)")
        return found


def verify_deployment(out: Path, limits: Limits, model: Path | None = None) -> None:
    """Check that the files are those recorded and stay within `limits`; raises IntegrityError with the numbers."""
    record = json.loads((out / RECORD).read_text("utf-8"))
    for entry in record["files"]:
        if sha256_file(out / entry["file"]) != entry["sha256"]:
            raise IntegrityError(f"{entry['file']} changed after it was measured", fix="run the stage again")
        if "bit_equal" in entry and model is not None:
            target_of(entry["format"]).verify_weights(out / entry["file"], model, format_of(entry["format"]))
    problems = [f"{entry['file']}: {text}" for entry in record["files"] for text in limits.breaches(entry)]
    if problems:
        raise IntegrityError(
            f"{len(problems)} of the exported files do not compute what {record['model']['name']} computes",
            why="; ".join(problems),
            fix="if the loss is acceptable, raise the limit in the export stage; otherwise choose a larger format",
        )
