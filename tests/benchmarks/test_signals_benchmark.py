"""benchmarks/signals.py in small: the object it promises; and its peers' layouts hold what they are given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from teacher_cache.peers import PEERS, Fp16U16Zstd, Peer, rest
from teacher_cache.reading import quartiles

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "signals.py"
SMALL = "--json --tokens 512 --growth 512 1024 --rounds 1 --round-tokens 256 --engines transformers"
LAYOUT = {"bytes_per_token", "kl_mean", "kl_p99", "read_tps"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kept = tmp_path_factory.mktemp("results") / "signals.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL.split(), "--out", str(kept)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert json.loads(kept.read_text()) == found
    return found


def test_every_layout_has_the_same_four_figures(printed: dict[str, Any]) -> None:
    layouts = [printed["mmap"], printed["compact"], printed["sampled"], *printed["peers"].values()]
    assert set(printed["peers"]) == {"fp16_u16_zstd", "parquet_lists"}
    for layout in layouts:
        assert set(layout) == LAYOUT
        assert layout["bytes_per_token"] > 0 and layout["read_tps"] > 0
        assert 0 <= layout["kl_mean"] < layout["kl_p99"] < 1e-3


def test_the_variants_hold_the_same_and_differ_in_bytes(printed: dict[str, Any]) -> None:
    mmap, compact = printed["mmap"], printed["compact"]
    assert mmap["bytes_per_token"] == 104
    assert compact["bytes_per_token"] < mmap["bytes_per_token"]
    assert (compact["kl_mean"], compact["kl_p99"]) == (mmap["kl_mean"], mmap["kl_p99"])
    assert mmap["kl_p99"] < 1e-4
    assert printed["measured"]["sampled"]["one_draw_kl_mean"] > printed["sampled"]["kl_mean"]


def test_capture_is_a_share_and_null_where_it_was_not_timed(printed: dict[str, Any]) -> None:
    assert 0 < printed["capture"]["transformers"] < 10
    assert (printed["capture"]["llama_cpp"], printed["capture"]["vllm"]) == (None, None)
    assert printed["measured"]["capture"]["transformers"]["tokens_of_a_round"] == 256


def test_growth_is_rows_bytes_speed_and_peak(printed: dict[str, Any]) -> None:
    assert [size[:2] for size in printed["growth"]] == [[512, 104], [1024, 104]]
    for _, _, speed, peak in printed["growth"]:
        assert speed > 0 and 2**24 < peak < 2**28
    assert len(printed["measured"]["growth"]["compact"]) == 2


def test_setting_and_goals_that_were_missed_are_said(printed: dict[str, Any]) -> None:
    measured = printed["measured"]
    assert measured["setting"]["tokens"] == 512
    assert measured["command"].startswith("python benchmarks/signals.py --json")
    assert {"cpu", "cores", "load_1min"} <= set(measured["hardware"])
    slow = printed["mmap"]["read_tps"] < 5e6
    assert any(text.startswith("mmap read_tps") for text in measured["missed"]) == slow


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("vocab", [50_000, 120_000])
def test_a_peers_layout_gives_back_its_entries(kind: type[Peer], vocab: int, tmp_path: Path) -> None:
    """Ids whole, above 16 bits too; log-probs as precise as their type; more rows than one batch."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (70, 8, 6)).astype(np.int32)
    logp = -np.sort(rng.exponential(3, ids.shape), axis=-1).astype(np.float32)
    peer = kind(tmp_path / "file", 8, 6)
    peer.write(ids, logp)
    found = list(peer.batches())
    assert len(found) == 3
    assert (np.concatenate([batch[0] for batch in found]) == ids).all()
    off = np.abs(np.concatenate([batch[1] for batch in found]) - logp) / np.abs(logp)
    assert off.max() <= (2.0**-11 if kind is Fp16U16Zstd else 0)


def test_where_no_tail_is_kept_it_is_the_rest_of_one() -> None:
    logp = np.log(np.array([[[0.5, 0.25], [0.75, 0.25]]], np.float32))
    assert np.allclose(np.exp(rest(logp)), [[0.25, 1e-6]])


def test_one_round_is_its_own_spread() -> None:
    assert quartiles([2.0]) == [2, 2]
    assert quartiles([1.0, 2.0, 3.0, 4.0], 2) == [1.25, 3.75]
