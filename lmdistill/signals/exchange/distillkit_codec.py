"""DistillKit's compressed log-probs: what its settings say, and the way back from bytes to log-probs.

Axes: P positions, K entries, N entries that are approximated (K − exact_k), C coefficients.
A position's bytes are: `exact_k` values; the coefficients of a curve through the others; for each residual bin a scale
and its packed numbers. Ids and residuals are bit strings, the highest bit first. The older form keeps ids in 64-bit
words, the first id in the lowest bits, and the curve's terms are powers of 1/n. Arithmetic is in the settings' types,
as the curve's coefficients were rounded to them. The format is that of github.com/arcee-ai/DistillKit, `compression/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmdistill.errors import PreflightError

Float = Literal["float16", "bfloat16", "float32", "float64"]
UNPACK_BITS = 2**22  # bits spread out at a time
CONFIG_FILE = "compression_config.yaml"


class Bin(BaseModel):
    """Quantised residuals that share a scale."""

    model_config = ConfigDict(extra="forbid")

    scale_dtype: Float
    element_bits: int = Field(ge=1, le=64)
    num_elements: int = Field(ge=1)

    @property
    def packed(self) -> int:
        """Bytes of the numbers."""
        return -(-self.element_bits * self.num_elements // 8)


class Compression(BaseModel):
    """`logprob_compressor` of a DistillKit configuration, or the compression_config.yaml beside a capture."""

    model_config = ConfigDict(extra="forbid")

    d: int = Field(ge=1)
    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    exact_dtype: Float = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Float = "float32"
    residual_bins: list[Bin] = []
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def position_bytes(self) -> int:
        """Bytes of a position's log-probs."""
        bins = sum(width(part.scale_dtype) + part.packed for part in self.residual_bins)
        return self.exact_k * width(self.exact_dtype) + len(self.polynomial_terms or ()) * width(self.term_dtype) + bins

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return max(1, (self.d - 1).bit_length())

    def logprobs(self, data_PB: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Log-probs `[P, K]` of the bytes of positions."""
        rest = torch.from_numpy(np.ascontiguousarray(data_PB))
        exact, rest = _take(rest, self.exact_dtype, self.exact_k)
        coefficients, rest = _take(rest, self.term_dtype, len(self.polynomial_terms or ()))
        approximate = torch.zeros((len(data_PB), self.k - self.exact_k), dtype=torch.float32)
        first = 0
        for part in self.residual_bins:
            scale, rest = _take(rest, part.scale_dtype, 1)
            numbers = unpack_bits(rest[:, : part.packed].numpy(), part.element_bits, part.num_elements)
            rest = rest[:, part.packed :]
            approximate[:, first : first + part.num_elements] = _residual(numbers, part.element_bits) * scale
            first += part.num_elements
        if self.polynomial_terms and self.k > self.exact_k:
            approximate = approximate + (self._terms() * coefficients[:, None, :]).sum(dim=-1)
        values = torch.cat([exact.float(), approximate.float()], dim=1)
        decoded: NDArray[np.float32] = (values.cumsum(dim=1) if self.delta_encoding else values).numpy()
        return decoded

    def _terms(self) -> torch.Tensor:
        """The curve's terms `[N, C]` at the approximated ranks."""
        count, dtype = self.k - self.exact_k, getattr(torch, self.term_dtype)
        at = torch.linspace(0, 1, count, dtype=dtype) if self.normalize_t else torch.arange(count, dtype=dtype)
        terms = [
            at**term if isinstance(term, int) else getattr(torch, term)(at) for term in self.polynomial_terms or ()
        ]
        return torch.stack(terms, dim=-1)


class LegacyCompression(BaseModel):
    """`legacy_logit_compression` of a DistillKit configuration."""

    model_config = ConfigDict(extra="forbid")

    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    polynomial_degree: int = Field(ge=0)
    vocab_size: int = Field(ge=1)
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: Float = "float32"

    @property
    def d(self) -> int:
        """The vocabulary."""
        return self.vocab_size

    @property
    def terms(self) -> int:
        """Coefficients of a position; none where every value is exact."""
        return (self.polynomial_degree + 1 + self.with_sqrt_term) if self.exact_k < self.k else 0

    @property
    def words(self) -> int:
        """64-bit words of a position's ids."""
        return -(-self.k // (64 // max(1, (self.vocab_size - 1).bit_length())))

    def logprobs(self, exact_PE: NDArray[Any], coefficients_PC: NDArray[Any]) -> NDArray[np.float32]:
        """The values `[P, K]` of exact ones and of a curve's coefficients."""
        ranks = np.arange(1, self.k - self.exact_k + 1, dtype=np.float32)
        sign = -1 if self.invert_polynomial else 1
        terms = [ranks ** np.float32(sign * power) for power in range(self.polynomial_degree + 1)]
        terms += [np.sqrt(ranks)] if self.with_sqrt_term else []
        curve = coefficients_PC.astype(np.float32) @ np.stack(terms) if self.terms else coefficients_PC[:, :0]
        values: NDArray[np.float32] = np.concatenate([exact_PE, curve], axis=1).astype(np.float32)
        return values

    def ids(self, words_PW: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Ids `[P, K]` of packed words."""
        bits = max(1, (self.vocab_size - 1).bit_length())
        shifts = np.arange(64 // bits, dtype=np.uint64) * np.uint64(bits)
        ids = (words_PW[..., None] >> shifts) & np.uint64(2**bits - 1)
        return ids.reshape(len(words_PW), -1)[:, : self.k].astype(np.int64)


def plausible(values_PK: NDArray[np.float32], exact_k: int, room: float) -> NDArray[np.float32]:
    """Log-probs of which all but the first `exact_k` lie on a fitted curve, as probabilities can be.

    What was fitted descended and summed to at most 1; the curve need not. It is held below what comes before it, and
    where all would be more than `room` it is scaled; the exact values stay.
    """
    falling_PK = np.minimum.accumulate(values_PK.astype(np.float64), axis=1)
    exact_P, curve_P = (np.exp(part).sum(axis=1) for part in (falling_PK[:, :exact_k], falling_PK[:, exact_k:]))
    over_P = (exact_P + curve_P > room) & (exact_P < room)
    falling_PK[over_P, exact_k:] += np.log((room - exact_P[over_P]) / curve_P[over_P])[:, None]
    return falling_PK.astype(np.float32)


def width(name: str) -> int:
    """Bytes of a number."""
    return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[name]


def unpack_bits(data_PB: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint64]:
    """`count` numbers of each row of bytes, the highest bit first."""
    out = np.empty((len(data_PB), count), np.uint64)
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint64)
    step = max(1, UNPACK_BITS // (bits * count))
    for first in range(0, len(data_PB), step):
        spread = np.unpackbits(data_PB[first : first + step], axis=1, count=bits * count)
        numbers = spread.reshape(-1, count, bits).astype(np.uint64) << shifts
        out[first : first + step] = numbers.sum(axis=-1, dtype=np.uint64)
    return out


def _take(data: torch.Tensor, name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` numbers of each row of bytes, and the bytes after them."""
    size = count * width(name)
    numbers = data[:, :size].contiguous().view(getattr(torch, name)) if count else torch.empty((len(data), 0))
    return numbers, data[:, size:]


def _residual(numbers: NDArray[np.uint64], bits: int) -> torch.Tensor:
    """Stored numbers as signed steps of the scale; a single bit stands for −1 or 1."""
    signed = numbers.astype(np.float64) * 2 - 1 if bits == 1 else numbers.astype(np.float64) - 2.0 ** (bits - 1)
    return torch.from_numpy(signed.astype(np.float32))


def load_config(path: Path) -> Compression | LegacyCompression:
    """The settings of a capture: a compressor's own file, or a DistillKit configuration that has them."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = YAML(typ="safe").load(path)
    except (OSError, YAMLError) as error:
        raise PreflightError(f"{path} cannot be read", why=str(error), fix="give the capture's settings") from error
    for key in ("teacher", "logprob_compressor", "legacy_logit_compression"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    kind = LegacyCompression if isinstance(found, dict) and "polynomial_degree" in found else Compression
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise PreflightError(
            f"{path} does not say how log-probs were compressed",
            why=problems,
            fix="give the `logprob_compressor` or `legacy_logit_compression` that the capture was made with",
        ) from error
