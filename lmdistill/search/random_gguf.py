"""A candidate as a GGUF file with random weights, each tensor of the type it will ship in: made to be timed.

What a weight is does not change the work, so nothing is trained or quantised: blocks of random codes with small
scales are written, one patch of them over and over. The vocabulary is made up, of the usual size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdistill.deployment.architectures import architecture_of
from lmdistill.deployment.gguf_writer import declare, stored_as
from lmdistill.deployment.vocabulary import Vocabulary
from lmdistill.quantization.plan import grids_of_preset
from lmdistill.search.candidate import Candidate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Where a block of each type has its 16-bit scales, in bytes from its start.
_SCALES: dict[str, tuple[int, ...]] = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q8_0": (0,),
    "q4_k": (0, 2),
    "q6_k": (208,),
}
_SCALE = 0.004  # keeps activations finite in the deepest stacks
_PATCH_BLOCKS = 4096
_LETTERS, _TOKEN = 26, 7  # characters of a token, as in a usual vocabulary


class RandomEncoding:
    """Every tensor in the type that `preset` gives it, filled with random codes."""

    def __init__(self, candidate: Candidate, preset: str, seed: int = 0) -> None:
        """Find each tensor's type; raises RecipeError for a preset that there is not."""
        import numpy as np

        self.architecture = architecture_of(candidate.shape_config())
        self.preset, self.kinds = preset, grids_of_preset(preset, self.architecture)
        self._generator = np.random.default_rng(seed)
        self._patches: dict[str, NDArray[np.uint8]] = {}

    @property
    def file_type(self) -> Any:
        """The file's type in its metadata."""
        import gguf

        return gguf.LlamaFileType[f"MOSTLY_{self.preset.upper()}"]

    def declaration(self, source: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Any, int, Any]:
        """Shape, numpy type, size in bytes and GGML type of a tensor."""
        return stored_as(self.kinds[source], shape)

    def array(self, source: str) -> NDArray[Any]:
        """The bytes of a tensor of blocks, or the numbers of a float one."""
        import numpy as np

        stored, dtype, size, _ = self.declaration(source, self.architecture.written_shape(self._shape(source)))
        kind = self.kinds[source]
        if dtype == np.float32:
            return np.full(stored, 1.0 if len(stored) == 1 else _SCALE, np.float32)
        patch = self._patch(kind)
        return np.resize(patch, size).reshape(stored)

    def _shape(self, source: str) -> tuple[int, ...]:
        return self.architecture.tensors()[source]

    def _patch(self, kind: str) -> NDArray[np.uint8]:
        """Random blocks of a type with their scales set, as one row of bytes."""
        import gguf
        import numpy as np

        if kind not in self._patches:
            if kind == "f16":
                numbers = self._generator.normal(0, _SCALE, _PATCH_BLOCKS).astype(np.float16)
                self._patches[kind] = numbers.view(np.uint8)
            else:
                _, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
                blocks = self._generator.integers(0, 256, (_PATCH_BLOCKS, block_bytes), dtype=np.uint8)
                for at in _SCALES[kind]:
                    blocks[:, at : at + 2] = np.frombuffer(np.float16(_SCALE).tobytes(), np.uint8)
                self._patches[kind] = blocks.ravel()
        return self._patches[kind]


def made_up_vocabulary(size: int) -> Vocabulary:
    """Byte-level BPE tokens `aaaaaaa`, `aaaaaab`, … with as many merges: what a file of this vocabulary has to hold."""
    tokens = []
    for index in range(size):
        letters = [chr(ord("a") + index // _LETTERS**place % _LETTERS) for place in range(_TOKEN)]
        tokens.append("".join(reversed(letters)))
    merges = [f"{token[:4]} {token[4:]}" for token in tokens]
    return Vocabulary("default", tokens, [1] * size, merges, {"bos": 0, "eos": 0}, False, False, None)


def write_random_gguf(candidate: Candidate, target: Path, preset: str) -> int:
    """Write the candidate's file and return its bytes."""
    import gguf

    encoding = RandomEncoding(candidate, preset)
    architecture = encoding.architecture
    writer = gguf.GGUFWriter(path=None, arch=architecture.gguf_name)
    writer.add_type("model")
    writer.add_name(f"candidate-{candidate.shape_digest[:12]}")
    writer.add_file_type(encoding.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architecture.add_metadata(writer)
    made_up_vocabulary(candidate.vocab_size).add_to(writer)
    declare(writer, architecture, encoding)
    try:
        writer.write_header_to_file(path=target)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for source in architecture.tensors():
            writer.write_tensor_data(encoding.array(source))
    finally:
        writer.close()
    return target.stat().st_size
