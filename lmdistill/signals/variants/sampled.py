"""sampled: ids drawn from the teacher with their counts, for a loss that is unbiased; packed like compact.

Axes: R rows, T tokens in a row, K entries of a token: as many as there are draws, so that nothing drawn is dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdistill.errors import StageError
from lmdistill.signals import coded
from lmdistill.signals.alignment import Misaligned
from lmdistill.signals.batch import SignalsBatch
from lmdistill.signals.format import Layout
from lmdistill.signals.packing.drawn import DrawnDecoder, drawn_dtype, encode_drawn
from lmdistill.signals.sampling import Sampling
from lmdistill.signals.variant import variant
from lmdistill.signals.variants.compact import CompactVariant
from lmdistill.teachers.draws import Drawn
from lmdistill.teachers.engine import TopK


@variant("sampled")
class SampledVariant(CompactVariant):
    """Unbiased: for `loss: sampled_kd` alone."""

    def dtype(self, layout: Layout) -> np.dtype[Any]:
        """One coded row."""
        return drawn_dtype(layout)

    def encode(self, layout: Layout, raw_R: NDArray[Any], block_rows: int) -> list[bytes]:
        """A segment's tables, then its blocks."""
        return encode_drawn(layout, raw_R, block_rows)

    def decoder(self, layout: Layout, tables: bytes) -> DrawnDecoder:
        """What decodes the blocks of a segment."""
        return DrawnDecoder(layout, tables)

    def code(self, layout: Layout, tokens_RT: NDArray[Any], flags_RT: NDArray[np.uint8], exact: TopK) -> NDArray[Any]:
        """What was drawn, as coded rows [R]."""
        if not isinstance(exact, Drawn):
            raise StageError("a sampled teacher cache was given the teacher's top K", fix="draw with teachers/draws.py")
        raw_R = np.zeros(len(tokens_RT), drawn_dtype(layout))
        base_R = coded.code_rows(layout, tokens_RT, flags_RT, exact)
        for name in base_R.dtype.names or ():
            raw_R[name] = base_R[name]
        raw_R["counts"] = exact.counts_BTK
        if _sampling(layout).weighted:
            raw_R["log_z"] = exact.log_z_BT
        return raw_R

    def decode(self, layout: Layout, raw_R: NDArray[Any], batch: SignalsBatch) -> Misaligned | None:
        """Fill `batch` from coded rows; says where log-probs do not belong to their tokens.

        A token so likely that it cannot have been missed, and is not there, does not belong either.
        """
        sampling = _sampling(layout)
        log_z_RT = raw_R["log_z"].astype(np.float32) if sampling.weighted else None
        unlisted_RT = sampling.surely_drawn(log_z_RT, batch.tokens_RT.shape)
        found = coded.decode_rows(layout, raw_R, batch, unlisted_RT)
        assert batch.weight_RTK is not None
        sampling.weigh(raw_R["counts"], batch.logp_RTK, log_z_RT, batch.weight_RTK)
        return found


def _sampling(layout: Layout) -> Sampling:
    if layout.sampling is None:
        raise StageError("the layout of a sampled teacher cache does not say how it was drawn")
    return layout.sampling
