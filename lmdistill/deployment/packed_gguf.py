"""A model that was trained on grids, packed straight into a GGUF file: no second quantisation, and the proof of it.

The file's tensors are the codes and scales that training ended with. The proof reads the file back with the gguf
package, whose dequantisation is not ours, and wants every weight of every tensor equal to the trained one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmdistill.deployment.architectures import Architecture, architecture_of
from lmdistill.deployment.gguf_header import TensorInfo, read_tensors
from lmdistill.deployment.gguf_writer import open_checkpoint, read_config, stored_as, write_gguf
from lmdistill.errors import IntegrityError
from lmdistill.quantization.placement import Placement


class PackedEncoding:
    """Tensors as they lie on their grids; `preset` is the file type's name."""

    def __init__(self, placement: Placement, architecture: Architecture, preset: str) -> None:
        """Keep what says where each tensor lies; raises IntegrityError where one has no place there."""
        import gguf

        self.placement, self.architecture, self.preset = placement, architecture, preset
        if missing := sorted(set(architecture.tensors()) - set(placement.grids)):
            raise IntegrityError(f"{len(missing)} tensors have no grid, the first is {missing[0]}")
        held = {kind.name.lower() for kind in gguf.GGMLQuantizationType}
        if foreign := sorted(set(placement.grids.values()) - held):
            raise IntegrityError(f"a GGUF file cannot hold grid '{foreign[0]}'", fix="export to the runtime it is for")

    @property
    def file_type(self) -> Any:
        """The file's type in its metadata."""
        import gguf

        return gguf.LlamaFileType[f"MOSTLY_{self.preset.upper()}"]

    def kind(self, source: str) -> str:
        """A tensor's type: what llama.cpp reads as float32 stays so."""
        shape = self.architecture.written_shape(self.architecture.tensors()[source])
        return "f32" if self.architecture.keeps_f32(shape) else self.placement.grids[source]

    def declaration(self, source: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Any, int, Any]:
        """Shape, numpy type, size in bytes and GGML type of a tensor."""
        return stored_as(self.kind(source), shape)

    def encode(self, source: str, tensor: Any) -> Any:
        """A tensor's bytes; raises IntegrityError where a weight does not lie where it should."""
        kind = self.kind(source)
        if kind == "f32":
            return tensor.numpy()
        if kind == "f16":
            if not (tensor.half().float() == tensor).all():
                raise IntegrityError(f"{source} has weights that float16 does not hold")
            return tensor.half().numpy()
        from lmdistill.quantization.registry import get

        scales = self.placement.scales.get(source)
        if scales is not None:
            scales = {name: self.architecture.convert(source, scale) for name, scale in scales.items()}
        return get(kind).pack_exactly(tensor, scales, source).numpy()


def write_packed_gguf(folder: Path, target: Path, placement: Placement, preset: str, *, name: str, parent: str) -> None:
    """Write the model in `folder`, whose weights lie on the grids of `placement`, to `target`.

    Raises IntegrityError, with the tensor's name, where weights do not lie on their grid.
    """
    encoding = PackedEncoding(placement, architecture_of(read_config(folder)), preset)
    write_gguf(folder, target, encoding, name=name, parent=parent)


def verify_packed(path: Path, folder: Path) -> int:
    """Check that every tensor of the file equals the checkpoint's in `folder`; returns how many there are.

    Raises IntegrityError with the tensors that differ, or that only one of them has.
    """
    architecture = architecture_of(read_config(folder))
    names, infos = architecture.gguf_names(), read_tensors(path)
    expected = set(names.values()) | set(architecture.extra_tensors())
    problems = [f"{name} is only in one of them" for name in sorted(expected ^ set(infos))]
    with open_checkpoint(folder) as checkpoint:
        for source, name in names.items():
            if name in infos:
                trained = architecture.convert(source, checkpoint.tensor(source)).contiguous().numpy()
                if wrong := int((_dequantised(path, infos[name]) != trained.ravel()).sum()):
                    problems.append(f"{wrong} of the {trained.size} weights of {source} differ")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise IntegrityError(f"{path.name} is not the trained model", why="; ".join(problems[:5]) + more)
    return len(infos)


def _dequantised(path: Path, tensor: TensorInfo) -> Any:
    """A tensor of the file as flat float32, by the gguf package."""
    import gguf
    import numpy as np

    rows = int(np.prod(tensor.shape[:-1]))
    stored = np.fromfile(path, np.uint8, count=tensor.bytes, offset=tensor.offset).reshape(rows, -1)
    kind = gguf.GGMLQuantizationType[tensor.type.upper()]
    return gguf.quants.dequantize(stored, kind).ravel()
