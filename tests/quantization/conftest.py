"""llama.cpp's own quantiser, the grids that it has too, and weights of many kinds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from lmdistill.quantization.grid import Grid
from lmdistill.quantization.registry import get

GGML_GRIDS = ("q4_0", "q4_1", "q5_0", "q8_0", "q4_k", "q6_k")
OTHER_GRIDS = {
    "8da4w": {},
    "8da4w in float32": {"scale": "f32"},
    "uniform 4 bits": {},
    "uniform 3 bits": {"bits": 3, "bucket": 32},
    "uniform 1 bit": {"bits": 1, "bucket": 24},
    "points 2 bits": {"bits": 2, "bucket": 32, "of": "bucket"},
}
ALL_GRIDS = (*GGML_GRIDS, *OTHER_GRIDS)
KINDS = (
    "normal",
    "heavy tails",
    "many zeros",
    "few values",
    "tiny",
    "above zero",
    "below zero",
    "zeros",
    "ties",
    "wide",
)

Reference = Callable[[str, torch.Tensor], torch.Tensor]
RealWeights = Callable[[], Iterator[tuple[str, torch.Tensor]]]


def grid_of(label: str) -> Grid:
    """The grid of a label in ALL_GRIDS."""
    return get(label.split()[0], **OTHER_GRIDS.get(label, {}))


def bits(tensor: torch.Tensor) -> bytes:
    """A float32 tensor's bytes, so that +0 and −0 differ and NaN equals itself."""
    assert tensor.dtype == torch.float32
    return tensor.detach().contiguous().numpy().tobytes()


def weights(kind: str, seed: int, shape: tuple[int, int] = (24, 768)) -> torch.Tensor:
    """Random float32 weights of one of KINDS."""
    random = torch.Generator().manual_seed(seed)
    normal, uniform = torch.randn(shape, generator=random), torch.rand(shape, generator=random)
    rows = torch.randn(shape[0], 1, generator=random)
    return {
        "normal": lambda: 0.05 * normal,
        "heavy tails": lambda: normal**5,
        "many zeros": lambda: torch.where((uniform < 0.9) | (rows < -1), 0.0, normal),
        "few values": lambda: (3 * normal).round() * 0.01,
        "tiny": lambda: normal * torch.exp(10 * rows - 60),
        "above zero": lambda: uniform + 0.5,
        "below zero": lambda: -uniform - 0.5,
        "zeros": lambda: torch.where(uniform < 0.5, 0.0, -0.0),
        "ties": lambda: torch.where(uniform < 0.5, 1.0, -1.0) * rows,
        "wide": lambda: normal * torch.exp(3 * rows),
    }[kind]()


def drawn_weights() -> st.SearchStrategy[torch.Tensor]:
    """Weights of any kind, of any seed."""
    return st.builds(weights, st.sampled_from(KINDS), st.integers(0, 2**31))


@pytest.fixture(scope="session")
def reference() -> Reference:
    """The bytes that llama.cpp's C code makes of weights `[R, W]`, without an importance matrix."""
    import gguf
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    lib = ctypes.CDLL(str(next(path for path in sorted(folder.iterdir()) if "ggml-base" in path.name)))
    chunk = lib.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantise(name: str, values: torch.Tensor) -> torch.Tensor:
        rows, width = values.shape
        source = np.ascontiguousarray(values.numpy())
        packed = np.empty((rows, width // get(name).block * get(name).block_bytes), np.uint8)
        kind = gguf.GGMLQuantizationType[name.upper()]
        assert chunk(kind, source.ctypes.data, packed.ctypes.data, 0, rows, width, None) == packed.nbytes
        return torch.from_numpy(packed)

    return quantise


@pytest.fixture(scope="session")
def real_weights(teacher_folder: Path) -> RealWeights:
    """Matrices of the embedded teacher: every kind, of the first, a middle and the last layer."""
    from safetensors import safe_open

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for path in sorted(teacher_folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    if ".layers.0." in name or ".layers.15." in name or ".layers.29." in name:
                        tensor = file.get_tensor(name).float()
                        if tensor.ndim == 2:
                            yield name, tensor

    return read
