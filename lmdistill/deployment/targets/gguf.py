"""llama.cpp: GGUF files, quantised by its own library or packed as trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.deployment.formats import FORMATS, Format, actual_fallbacks, fallback_share, weight_count
from lmdistill.deployment.targets import Target, target

if TYPE_CHECKING:
    from lmdistill.deployment.export import Export
    from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime
    from lmdistill.pipeline.stage import Planned, Progress
    from lmdistill.quantization.placement import Placement

NOTED_SHARE = 0.1  # of the weights: above it the plan says that a format is not what its name says
_CHUNK = 128  # rows of logits llama.cpp gives at a time: 24 MiB at V = 49,152


@target("llama.cpp")
class GgufTarget(Target):
    """Files of llama.cpp's types."""

    suffix = ".gguf"
    runtime = "llama.cpp"
    formats = FORMATS
    packages = ("gguf", "llama_cpp", "torch", "transformers")
    tools = ("gguf", "llama-cpp-python", "torch", "transformers")
    install = "pip install 'lmdistill[all]'"

    def check_runtime(self) -> object:
        """Raise PreflightError where llama.cpp's library does not load."""
        from lmdistill.deployment.llama_cpp_runtime import llama_library

        return llama_library()

    def check_config(self, config: Mapping[str, Any], formats: Sequence[str], context: int | None) -> object:
        """Raise PreflightError for an architecture that is not written."""
        from lmdistill.deployment.architectures import architecture_of

        return architecture_of(config)

    def check_tokenizer(self, folder: Path) -> object:
        """Raise PreflightError for a tokenizer that llama.cpp has no name for."""
        from lmdistill.deployment.vocabulary import check_tokenizer

        return check_tokenizer(folder)

    def packed_formats(self, model: Planned, preset: str) -> tuple[str, ...]:
        """The file type of the same name."""
        from lmdistill.quantization.plan import PRESETS

        return (preset,) if preset in PRESETS else ()

    def cost(self, config: Mapping[str, Any], formats: Sequence[str]) -> tuple[float, int, str]:
        """Files and their 32-bit base; says which formats will not be what they say."""
        from lmdistill.deployment.architectures import architecture_of

        architecture = architecture_of(config)
        weights = weight_count(architecture)
        wanted = [FORMATS[name] for name in formats]
        shares = {format_.suffix: fallback_share(format_, architecture) for format_ in wanted}
        wide = [f"{name} {share:.0%}" for name, share in shares.items() if share > NOTED_SHARE]
        note = f"weights in a larger type than the format's, for their widths: {', '.join(wide)}" if wide else ""
        disk = int(sum(format_.bits for format_ in {*wanted, FORMATS["f32"]}) / 8 * weights)
        return 10 + weights * 40 / 2e10, disk, note

    def write(self, export: Export, formats: Sequence[Format], progress: Progress) -> None:
        """Write what comes straight from the checkpoint, and have llama.cpp quantise the rest."""
        base = self._base(export, formats)
        if any(format_.ftype and not self._packed(export, format_) for format_ in formats):
            export.ensure(base, progress, partial(self._make, export, FORMATS["f32"], base))
        for format_ in formats:
            export.ensure(export.file(format_), progress, partial(self._make, export, format_, base))

    def _base(self, export: Export, formats: Sequence[Format]) -> Path:
        """The 32-bit file that others are quantised from."""
        if FORMATS["f32"] in formats:
            return export.file(FORMATS["f32"])
        return export.work / f"{export.name}-F32.gguf"

    def _make(self, export: Export, format_: Format, base: Path, target: Path) -> None:
        """Write one file: quantised from `base`, or straight from the checkpoint."""
        from lmdistill.deployment.gguf_writer import Precision, write_gguf
        from lmdistill.deployment.packed_gguf import write_packed_gguf
        from lmdistill.deployment.quantizer import quantize

        folder, names = export.model.path, {"name": export.name, "parent": export.model.digest}
        placement = self._packed(export, format_)
        if placement is not None:
            write_packed_gguf(folder, target, placement, format_.name, **names)
        elif format_.ftype:
            importance = export.importance if export.weighs(format_) else None
            quantize(base, target, format_, threads=export.threads, importance=importance)
        else:
            precision: Precision = "f32" if format_.name == "f32" else "f16"
            write_gguf(folder, target, precision, **names)

    def _packed(self, export: Export, format_: Format) -> Placement | None:
        """Where the model lies, if that is on this format's grids: the file is then packed, not quantised."""
        placement = export.placement if format_.quantized else None
        return placement if placement is not None and placement.preset == format_.name else None

    def opened(self, path: Path, longest: int, threads: int | None) -> LlamaCppRuntime:
        """With exact keys and values."""
        from lmdistill.deployment.llama_cpp_runtime import LlamaCppRuntime

        return LlamaCppRuntime(path, n_ctx=longest, n_batch=_CHUNK, n_threads=threads, exact=True)

    def entry(self, export: Export, format_: Format) -> dict[str, Any]:
        """Bits a weight, and tensors in a larger type."""
        from lmdistill.deployment.architectures import architecture_of
        from lmdistill.deployment.gguf_header import bits_per_weight, read_tensors
        from lmdistill.deployment.gguf_writer import read_config

        tensors = read_tensors(export.file(format_))
        fallbacks = actual_fallbacks(format_, architecture_of(read_config(export.model.path)), tensors)
        params = sum(tensor.weights for tensor in tensors.values())
        return {
            "bits_per_weight": round(bits_per_weight(tensors), 4),
            "params": params,
            "fallback_tensors": fallbacks,
            "fallback_share": round(sum(tensors[name].weights for name in fallbacks) / params, 4),
            **self._origin(export, format_),
        }

    def _origin(self, export: Export, format_: Format) -> dict[str, Any]:
        """How a quantised file came about, where llama.cpp did not make it alone."""
        if self._packed(export, format_) is not None:
            checked = self.verify_weights(export.file(format_), export.model.path, format_)
            return {"note": "trained on its grid", "bit_equal": checked}
        return export.imatrix_note(format_)

    def prove_tokenizer(self, export: Export, formats: Sequence[Format]) -> dict[str, Any]:
        """On the file that all others have their vocabulary from."""
        from lmdistill.deployment.tokenizer_proof import prove_tokenizer

        base = self._base(export, formats)
        file = base if base.exists() else export.file(formats[0])
        return prove_tokenizer(export.model.path, file, export.conversations, export.corpus)

    def verify_weights(self, path: Path, model: Path, format_: Format) -> int:
        """By the gguf package's own dequantisation."""
        from lmdistill.deployment.packed_gguf import verify_packed

        return verify_packed(path, model)
