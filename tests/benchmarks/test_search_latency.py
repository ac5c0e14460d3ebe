"""The latency benchmark's figures, on a device whose paces are known."""

from __future__ import annotations

import random

import search_latency
from toys.search_shapes import known_profile, toy_whole

from lmdistill.search.design import spread_out


def test_a_device_without_noise_is_foretold_without_error() -> None:
    sub = toy_whole()
    fit = spread_out(sub, 24, 0)
    held_out = search_latency.held_out_shapes(sub, 30, fit)
    assert not {each.shape_digest for each in held_out} & {each.shape_digest for each in fit}
    found = search_latency.figures(known_profile([*fit, *held_out], sub.largest()), held_out)
    assert found["held_out"] == 30 and found["spearman"] >= 0.999 and found["median_rel_error"] < 1e-3
    assert {"decode", "prefill_512", "prefill_1024", "rss_bytes", "file_bytes"} <= set(found)


def test_noise_of_the_timing_is_told_apart_from_errors_of_the_model() -> None:
    sub, rng = toy_whole(), random.Random(0)
    fit = spread_out(sub, 24, 0)
    held_out = search_latency.held_out_shapes(sub, 30, fit)
    mixed = [*fit, *held_out]
    rng.shuffle(mixed)
    found = search_latency.figures(known_profile(mixed, sub.largest(), noise=0.05), held_out)
    assert 0.005 < found["decode"]["timing_noise"] < 0.1
    assert 0 < found["median_rel_error"] < 0.1
