"""A checkpoint into GGUF files with their proofs: what the export stage runs and verifies.

A file is made in the scratch folder, fsynced, its sha256 recorded there, and renamed into place: after a kill at any
moment the next run takes what is whole and makes the rest, to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.corpus.format import PAD, TRAIN, CorpusReader
from lmdistill.deployment.architectures import architecture_of
from lmdistill.deployment.formats import FORMATS, Format, actual_fallbacks, weight_count
from lmdistill.deployment.gguf_header import bits_per_weight, read_tensors
from lmdistill.deployment.gguf_writer import Precision, read_config, write_gguf
from lmdistill.deployment.golden import accepted_conversations
from lmdistill.deployment.imatrix import importance_of
from lmdistill.deployment.packed_gguf import verify_packed, write_packed_gguf
from lmdistill.deployment.parity import measure_parity, write_reference
from lmdistill.deployment.quantizer import quantize
from lmdistill.deployment.tokenizer_proof import held_out, prove_tokenizer
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

    def file(self, format_: Format) -> Path:
        """Where a format's file goes."""
        return self.out / f"{self.name}-{format_.suffix}.gguf"

    def run(self, progress: Progress) -> dict[str, Any]:
        """Write every file and measure it; deployment.json's contents, which are also written."""
        self.work.mkdir(parents=True, exist_ok=True)
        formats = [FORMATS[name] for name in self.formats]
        base = self._write_files(formats, progress)
        sequences = self._sequences()
        reference = self.work / "reference.f32"
        progress.note(f"the checkpoint's own predictions of {sum(map(len, sequences)):,} tokens")
        write_reference(self.model.path, sequences, reference, self.threads)
        entries = []
        for done, format_ in enumerate(formats):
            progress.update(done, len(formats), "files measured")
            parity = measure_parity(self.file(format_), sequences, reference, self.threads)
            entries.append(self._entry(format_) | {"parity": parity.to_json()})
        progress.update(len(formats), len(formats), "files measured")
        record = self._record(entries, prove_tokenizer(self.model.path, base, self.conversations, self.corpus))
        write_json(self.out / RECORD, record)
        return record

    def _write_files(self, formats: Sequence[Format], progress: Progress) -> Path:
        """Make the files that are not there; returns the one all tokenizers are copied from."""
        base = self.file(FORMATS["f32"]) if "f32" in self.formats else self.work / f"{self.name}-F32.gguf"
        if any(format_.ftype and not self._packed(format_) for format_ in formats):
            self._ensure(base, progress, partial(self._make, FORMATS["f32"], base))
        for format_ in formats:
            self._ensure(self.file(format_), progress, partial(self._make, format_, base))
        return base if base.exists() else self.file(formats[0])

    def _make(self, format_: Format, base: Path, target: Path) -> None:
        """Write one file: quantised from `base`, or straight from the checkpoint."""
        placement = self._packed(format_)
        if placement is not None:
            write_packed_gguf(
                self.model.path, target, placement, format_.name, name=self.name, parent=self.model.digest
            )
        elif format_.ftype:
            importance = self._importance if self.imatrix_tokens and format_.quantized else None
            quantize(base, target, format_, threads=self.threads, importance=importance)
        else:
            precision: Precision = "f32" if format_.name == "f32" else "f16"
            write_gguf(self.model.path, target, precision, name=self.name, parent=self.model.digest)

    def _packed(self, format_: Format) -> Placement | None:
        """Where the model lies, if that is on this format's grids: the file is then packed, not quantised."""
        placement = Placement.load(self.model.path) if format_.quantized else None
        return placement if placement is not None and placement.preset == format_.name else None

    @cached_property
    def _importance(self) -> Importance:
        """Of the inputs of all layers, on the first tokens of the training split."""
        assert self.corpus is not None and self.imatrix_tokens is not None  # the stage asks for both
        split = self.corpus.split(TRAIN)
        rows = zip(split.tokens_RT, split.flags_RT, strict=True)
        text = ([int(token) for token in tokens[flags & PAD == 0]] for tokens, flags in rows)
        return importance_of(self.model.path, _first(text, self.imatrix_tokens), self.threads)

    def _ensure(self, path: Path, progress: Progress, make: Callable[[Path], object]) -> None:
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
        path, architecture = self.file(format_), architecture_of(read_config(self.model.path))
        tensors = read_tensors(path)
        fallbacks = actual_fallbacks(format_, architecture, tensors)
        return {
            "file": path.name,
            "format": format_.name,
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
            "bits_per_weight": round(bits_per_weight(tensors), 4),
            "params": sum(tensor.weights for tensor in tensors.values()),
            "fallback_tensors": fallbacks,
            "fallback_share": round(
                sum(tensors[name].weights for name in fallbacks) / sum(t.weights for t in tensors.values()), 4
            ),
            **self._origin(format_),
        }

    def _origin(self, format_: Format) -> dict[str, Any]:
        """How a quantised file came about, where llama.cpp did not make it alone."""
        if self._packed(format_) is not None:
            return {"note": "trained on its grid", "bit_equal": verify_packed(self.file(format_), self.model.path)}
        if self.imatrix_tokens and format_.quantized:
            return {"note": f"imatrix of {self.imatrix_tokens:,} tokens"}
        return {}

    def _record(self, entries: list[dict[str, Any]], tokenizer: dict[str, Any]) -> dict[str, Any]:
        architecture = architecture_of(read_config(self.model.path))
        return {
            "model": {"name": self.model.name, "digest": self.model.digest},
            "architecture": architecture.gguf_name,
            "params": weight_count(architecture),
            "files": entries,
            "tokenizer": tokenizer,
        }

    def _sequences(self) -> list[list[int]]:
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

    def breaches(self, entry: dict[str, Any]) -> list[str]:
        """What of a file's measured parity is beyond its limit, in words."""
        name, parity, found = entry["format"], entry["parity"], []
        limit = {"f32": self.kl_f32, "f16": self.kl_f16}.get(name, self.kl)
        if limit is not None and not parity["mean_kl"] <= limit:
            found.append(f"mean KL {parity['mean_kl']:.3g} is above {limit:.3g}")
        if name in ("f32", "f16") and parity["top1_decided"] < self.top1:
            found.append(f"top-1 agreement {parity['top1_decided']:.4f} is below {self.top1}")
        return found


def verify_deployment(out: Path, limits: Limits, model: Path | None = None) -> None:
    """Check that the files are those recorded and stay within `limits`; raises IntegrityError with the numbers."""
    record = json.loads((out / RECORD).read_text("utf-8"))
    for entry in record["files"]:
        if sha256_file(out / entry["file"]) != entry["sha256"]:
            raise IntegrityError(f"{entry['file']} changed after it was measured", fix="run the stage again")
        if "bit_equal" in entry and model is not None:
            verify_packed(out / entry["file"], model)
    problems = [f"{entry['file']}: {text}" for entry in record["files"] for text in limits.breaches(entry)]
    if problems:
        raise IntegrityError(
            f"{len(problems)} of the exported files do not compute what {record['model']['name']} computes",
            why="; ".join(problems),
            fix="if the loss is acceptable, raise the limit in the export stage; otherwise choose a larger format",
        )
