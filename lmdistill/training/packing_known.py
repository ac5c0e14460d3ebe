"""Spares transformers a look at the position ids, for which a GPU's host would wait in every forward.

Without a mask transformers compares position ids on the device to find out whether rows hold several documents. The
collator knows that already: it gives position ids where some row does, and none elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

ASKED = "find_packed_sequence_indices"  # of transformers.masking_utils


def documents_of(position_ids_RT: torch.Tensor) -> torch.Tensor:
    """Which document of its row a token is of `[R, T]`, from 0: positions that do not count on begin another."""
    step_RT = position_ids_RT.diff(prepend=position_ids_RT[:, :1] - 1, dim=-1)
    return (step_RT != 1).cumsum(-1)


@contextmanager
def packing_known(packed: bool) -> Iterator[None]:
    """Within, position ids are taken as those of several documents a row, or of one, and not looked at."""
    from transformers import masking_utils

    asked: Callable[[torch.Tensor], torch.Tensor | None] | None = getattr(masking_utils, ASKED, None)
    if asked is None:  # another version of transformers: it may wait, and is as right
        yield
        return
    setattr(masking_utils, ASKED, documents_of if packed else lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, ASKED, asked)
