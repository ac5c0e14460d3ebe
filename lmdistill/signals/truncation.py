"""As many entries as a token needs: the fewest that hold the mass `top_p`, at least `k_min`, at most K.

Axes: B rows, T tokens in a row, K entries of a token.
What is dropped goes to the tail, so nothing is lost of head + tail = 1. A dropped entry has log-prob −inf and repeats
the token's first id: it says nothing, and counts as outside.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lmdistill.signals.codec import logsumexp
from lmdistill.signals.format import Layout
from lmdistill.teachers.engine import TopK


def truncate(exact: TopK, layout: Layout) -> TopK:
    """`exact` with the entries a token does not need dropped; as it is where the layout sets no `top_p`."""
    if layout.top_p is None:
        return exact
    mass_BTK = np.cumsum(np.exp(exact.logp_BTK.astype(np.float64)), axis=-1)
    enough_BT = (mass_BTK < layout.top_p).sum(axis=-1) + 1
    count_BT = np.clip(enough_BT, layout.k_min or 1, layout.k)
    kept_BTK = np.arange(layout.k) < count_BT[..., None]
    rest_BT = logsumexp(np.where(kept_BTK, -np.inf, exact.logp_BTK))
    return replace(
        exact,
        ids_BTK=np.where(kept_BTK, exact.ids_BTK, exact.ids_BTK[..., :1]),
        logp_BTK=np.where(kept_BTK, exact.logp_BTK, np.float32(-np.inf)),
        tail_BT=np.logaddexp(exact.tail_BT, rest_BT).astype(np.float32),
    )
