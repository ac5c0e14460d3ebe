"""Writes a model folder as a GGUF file, tensor by tensor, never holding the whole model.

Norms, biases and convolution taps stay 32-bit in every file, as llama.cpp wants them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from lmdistill.deployment.architectures import Architecture, architecture_of
from lmdistill.deployment.vocabulary import read_vocabulary
from lmdistill.errors import IntegrityError, LmdistillError

Precision = Literal["f32", "f16"]


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


class Checkpoint:
    """The tensors of a model folder's safetensors files, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """Open every safetensors file below `folder`; `stack` closes them."""
        from safetensors import safe_open

        self.folder = folder
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened = stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(opened.keys(), opened))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: tuple(opened.get_slice(name).get_shape()) for name, opened in self._files.items()}

    def tensor(self, name: str) -> Any:
        """One tensor in float32."""
        return self._files[name].get_tensor(name).float()


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """A model folder's tensors, for as long as the `with` lasts."""
    with ExitStack() as stack:
        yield Checkpoint(folder, stack)


def check_tensors(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Raise IntegrityError where the checkpoint lacks a tensor, has one too many, or one of another shape."""
    expected, found = architecture.tensors(), checkpoint.shapes
    if architecture.tied:
        found.pop("lm_head.weight", None)  # some checkpoints keep a copy of the embeddings
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not known" for name in found if name not in expected]
    problems += [f"{n} is {found[n]}, config.json says {s}" for n, s in expected.items() if found.get(n, s) != s]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise IntegrityError(
            f"the weights in {checkpoint.folder} do not fit its config.json", why="; ".join(problems[:5]) + more
        )


class Declaration(Protocol):
    """What tensors look like in a file."""

    def declaration(self, source: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Any, int, Any]:
        """Shape, numpy type, bytes and GGML type (None: by the numpy type) of the checkpoint's tensor `source`."""


class Encoding(Declaration, Protocol):
    """How tensors are stored in a file."""

    @property
    def file_type(self) -> Any:
        """The file's type in its metadata, a `gguf.LlamaFileType`."""

    def encode(self, source: str, tensor: Any) -> Any:
        """The array to write for a finite float32 torch tensor laid out as llama.cpp wants it."""


def stored_as(kind: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Any, int, Any]:
    """An encoding's declaration of a tensor of `shape` in GGML's type `kind`; one of blocks is declared as bytes."""
    import gguf
    import numpy as np

    type_ = gguf.GGMLQuantizationType[kind.upper()]
    block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    stored = (*shape[:-1], shape[-1] // block * block_bytes)
    size = int(np.prod(stored))
    return (shape, np.dtype(np.float32), size, type_) if block == 1 else (stored, np.dtype(np.uint8), size, type_)


class FloatEncoding:
    """Everything in one float type, but norms, biases and taps in f32."""

    def __init__(self, precision: Precision, architecture: Architecture) -> None:
        """Keep both."""
        self.precision, self.architecture = precision, architecture

    @property
    def file_type(self) -> Any:
        """ALL_F32 or MOSTLY_F16."""
        import gguf

        return {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}[self.precision]

    def declaration(self, source: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Any, int, Any]:
        """As numpy says it."""
        import numpy as np

        whole = self.precision == "f32" or self.architecture.keeps_f32(shape)
        dtype = np.dtype(np.float32 if whole else np.float16)
        return shape, dtype, int(np.prod(shape)) * dtype.itemsize, None

    def encode(self, source: str, tensor: Any) -> Any:
        """Raises IntegrityError for weights beyond float16."""
        import numpy as np

        array = tensor.numpy()
        if self.precision == "f32" or self.architecture.keeps_f32(array.shape):
            return array
        if np.abs(array).max(initial=0.0) > np.finfo(np.float16).max:
            raise IntegrityError(
                f"{source} does not fit f16",
                why=f"its largest weight is {np.abs(array).max():.3g}",
                fix="leave f16 out of the export's formats; f32, bf16 and quantised files are made from f32",
            )
        return array.astype(np.float16)


def write_gguf(folder: Path, target: Path, encoding: Precision | Encoding, *, name: str, parent: str) -> None:
    """Write the model in `folder` to `target`; `name` and `parent` (the checkpoint's digest) go into its metadata.

    Raises PreflightError for an architecture or tokenizer that cannot be written, IntegrityError for weights that
    do not fit the config or the encoding.
    """
    import gguf

    architecture = architecture_of(read_config(folder))
    vocabulary = read_vocabulary(folder, architecture.vocab_size)
    stored = FloatEncoding(encoding, architecture) if isinstance(encoding, str) else encoding
    writer = gguf.GGUFWriter(path=None, arch=architecture.gguf_name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(stored.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("lmdistill.parent", parent)
    architecture.add_metadata(writer)
    vocabulary.add_to(writer)
    with open_checkpoint(folder) as checkpoint:
        check_tensors(architecture, checkpoint)
        declare(writer, architecture, stored)
        try:
            writer.write_header_to_file(path=target)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for array in _arrays(architecture, checkpoint, stored):
                writer.write_tensor_data(array)
        finally:
            writer.close()


def declare(writer: Any, architecture: Architecture, encoding: Declaration) -> None:
    """Tell the writer every tensor's name, shape and size before the first one is written."""
    import numpy as np

    names = architecture.gguf_names()
    for source, shape in architecture.tensors().items():
        if source not in names:
            raise LmdistillError(f"the gguf package has no name for {source} in {architecture.gguf_name}")
        writer.add_tensor_info(names[source], *encoding.declaration(source, architecture.written_shape(shape)))
    for name, tensor in architecture.extra_tensors().items():
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), tensor.numel() * 4)


def _arrays(architecture: Architecture, checkpoint: Checkpoint, encoding: Encoding) -> Iterator[Any]:
    """Each tensor as it is written, in the order it was declared."""
    for source in architecture.tensors():
        tensor = architecture.convert(source, checkpoint.tensor(source)).contiguous()
        if not tensor.isfinite().all():
            raise IntegrityError(f"{source} in {checkpoint.folder} holds numbers that are not finite")
        yield encoding.encode(source, tensor)
    for tensor in architecture.extra_tensors().values():
        yield tensor.numpy()
