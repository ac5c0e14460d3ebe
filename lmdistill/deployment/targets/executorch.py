"""ExecuTorch: `.pte` programs for XNNPACK, in float32 or on the 8da4w grid; the tokenizer lies beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.deployment.formats import Format
from lmdistill.deployment.targets import Target, target
from lmdistill.errors import PreflightError

if TYPE_CHECKING:
    from lmdistill.deployment.executorch.runtime import ExecutorchRuntime
    from lmdistill.deployment.export import Export
    from lmdistill.deployment.parity import Parity
    from lmdistill.pipeline.stage import Planned, Progress
    from lmdistill.quantization.placement import Placement

FORMATS = {
    one.name: one
    for one in (
        Format("pte_f32", 32.0),
        Format("pte_8da4w", 4.5, 32),  # embeddings and head in float32, as the grid's preset has them
        Format("pte_8da4w_all", 4.5, 32, 32),  # embeddings and head too
    )
}
TOKENIZER = "tokenizer"  # folder beside the files
_LAYER_SECONDS = {"pte_f32": 8.0, "pte_8da4w": 16.0, "pte_8da4w_all": 16.0}  # of lowering, a layer, on two cores


@target("executorch")
class ExecutorchTarget(Target):
    """Programs for XNNPACK."""

    suffix = ".pte"
    runtime = "executorch"
    formats = FORMATS
    packages = ("executorch", "torchao", "torch", "transformers")
    tools = ("executorch", "torchao", "torch", "transformers")
    install = "pip install 'lmdistill[executorch]'"

    def check_runtime(self) -> object:
        """Raise PreflightError where ExecuTorch does not load or has no XNNPACK."""
        from lmdistill.deployment.executorch.runtime import executorch_runtime

        return executorch_runtime()

    def check_config(self, config: Mapping[str, Any], formats: Sequence[str], context: int | None) -> object:
        """Raise PreflightError for operators that are not lowered, widths no grid holds, a context it does not know."""
        from lmdistill.deployment.executorch.layouts import architecture_for_pte
        from lmdistill.deployment.executorch.places import context_of, quantised_places

        architecture = architecture_for_pte(config)
        for name in formats:
            if FORMATS[name].quantized:
                quantised_places(name, architecture)
        return context_of(config, context)

    def check_tokenizer(self, folder: Path) -> object:
        """Any fast tokenizer will do: it is shipped as it is."""
        if not (folder / "tokenizer.json").is_file():
            raise PreflightError(f"{folder} has no tokenizer.json", fix="save a fast tokenizer there")
        return None

    def check_model(self, model: Planned) -> None:
        """Raise PreflightError for scales or groups that XNNPACK does not have."""
        from lmdistill.deployment.executorch.places import check_checkpoint, check_grid_options
        from lmdistill.quantization.planned import folder_ahead, put_by, put_there

        first = put_there(model)
        folder = folder_ahead(model) or (folder_ahead(first) if first else None)
        if folder is not None:
            check_checkpoint(folder)
        elif first is not None and (keys := put_by(first)).grid == "8da4w":
            check_grid_options(keys.options())

    def packed_formats(self, model: Planned, preset: str) -> tuple[str, ...]:
        """8da4w, with embeddings on the grid or not as they were trained."""
        from lmdistill.deployment.executorch.places import packed_format

        return (packed_format(model),) if preset == "8da4w" else ()

    def cost(self, config: Mapping[str, Any], formats: Sequence[str]) -> tuple[float, int, str]:
        """Lowering takes minutes; a tied head in float32 lies beside the embeddings a second time."""
        from lmdistill.deployment.executorch.layouts import architecture_for_pte
        from lmdistill.deployment.executorch.places import file_bits

        architecture = architecture_for_pte(config)
        seconds = sum(_LAYER_SECONDS[name] * int(config["num_hidden_layers"]) for name in formats)
        disk = int(sum(file_bits(name, architecture) for name in formats) / 8)
        return seconds, disk, ""

    def write(self, export: Export, formats: Sequence[Format], progress: Progress) -> None:
        """Lower each format; the tokenizer goes beside them."""
        from lmdistill.checkpoints import copy_tokenizer

        for format_ in formats:
            progress.note(f"lowering to {export.file(format_).name}, which takes minutes for a real model")
            export.ensure(export.file(format_), progress, partial(self._make, export, format_))
        copy_tokenizer(export.model.path, export.out / TOKENIZER)

    def _make(self, export: Export, format_: Format, target: Path) -> None:
        """Write one program, and beside it in the scratch folder what was found out on the way."""
        from lmdistill.deployment.executorch.constants import verify_program
        from lmdistill.deployment.executorch.places import context_of
        from lmdistill.deployment.executorch.program import ProgramSizes, write_program
        from lmdistill.deployment.executorch.weighed import save_weighed
        from lmdistill.deployment.gguf_writer import read_config
        from lmdistill.pipeline.files import write_json

        folder, placement = export.model.path, self._placement(export, format_)
        weighed = export.work / f"{format_.name}-weighed"
        if export.weighs(format_):
            text = export.imatrix_text()
            placement, folder = save_weighed(folder, weighed, format_.name, text, export.threads), weighed
        sizes = ProgramSizes(context_of(read_config(folder), export.context))
        share = write_program(folder, target, placement, sizes, min_delegated=export.min_delegated)
        if folder == weighed:
            verify_program(target, weighed, placement)
            shutil.rmtree(weighed)
        write_json(self._record(export, format_), {"delegated": round(share, 4), "context": sizes.context})

    def _record(self, export: Export, format_: Format) -> Path:
        return export.work / f"{export.file(format_).name}.json"

    def _placement(self, export: Export, format_: Format) -> Placement:
        """Where tensors lie in a file: as trained, or as the format has it."""
        from lmdistill.deployment.executorch.places import placement_of
        from lmdistill.deployment.gguf_writer import read_config

        return placement_of(format_, read_config(export.model.path), export.placement)

    def opened(self, path: Path, longest: int, threads: int | None) -> ExecutorchRuntime:
        """There is one way to open a program."""
        from lmdistill.deployment.executorch.runtime import ExecutorchRuntime

        return ExecutorchRuntime(path, n_threads=threads)

    def rounds_activations(self, export: Export, format_: Format) -> bool:
        """Where the model was trained on 8da4w."""
        return format_.quantized and export.placement is not None

    def entry(self, export: Export, format_: Format) -> dict[str, Any]:
        """Bits a weight, the delegated share, and that the weights are the checkpoint's, bit for bit."""
        from lmdistill.deployment.executorch.places import weight_figures
        from lmdistill.deployment.gguf_writer import read_config

        placement = self._placement(export, format_)
        figures = weight_figures(placement, read_config(export.model.path), quantised=format_.quantized)
        made: dict[str, Any] = json.loads(self._record(export, format_).read_text("utf-8"))
        if export.weighs(format_):
            return figures | made | export.imatrix_note(format_)  # its points were compared when it was written
        checked = self.verify_weights(export.file(format_), export.model.path, format_)
        if format_.quantized and export.placement is None:
            return figures | made  # put on the grid here: no trained weights to equal
        return figures | made | ({"note": "trained on its grid"} if format_.quantized else {}) | {"bit_equal": checked}

    def parity_entry(self, parity: Parity) -> dict[str, Any]:
        """With the farthest logit, and how large they are."""
        figures = {"max_abs": parity.max_abs, "largest": parity.largest}
        return parity.to_json() | {name: float(f"{value:.6g}") for name, value in figures.items()}

    def prove_tokenizer(self, export: Export, formats: Sequence[Format]) -> dict[str, Any]:
        """What is shipped, read without transformers, gives the checkpoint's ids and renders its template."""
        from lmdistill.deployment.executorch.shipped_tokenizer import prove_shipped

        return prove_shipped(export.model.path, export.out / TOKENIZER, export.conversations, export.corpus)

    def verify_weights(self, path: Path, model: Path, format_: Format) -> int:
        """By reading the program's constants back."""
        from lmdistill.deployment.executorch.constants import verify_program
        from lmdistill.deployment.executorch.places import placement_of
        from lmdistill.deployment.gguf_writer import read_config
        from lmdistill.quantization.placement import Placement

        return verify_program(path, model, placement_of(format_, read_config(model), Placement.load(model)))
