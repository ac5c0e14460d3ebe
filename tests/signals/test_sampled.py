"""The sampled cache: what was drawn comes back with right weights; its proofs; the same bytes however it was made."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from signals_synthetic import LENGTH, SHARD_ROWS, TEACHER, BigramEngine, CredulousWriter, plain_flags, write_corpus

from lmdistill.corpus.format import CorpusReader
from lmdistill.errors import IntegrityError, StageError
from lmdistill.pipeline.stage import SilentProgress
from lmdistill.signals.capture import Capture
from lmdistill.signals.codec import Companding, half_step_f16, renormalisation_bound
from lmdistill.signals.format import Layout, Manifest, SplitEntry
from lmdistill.signals.inspect import describe, verify
from lmdistill.signals.reader import SignalsReader
from lmdistill.signals.sampling import Sampling
from lmdistill.signals.variants import sampled
from lmdistill.signals.writer import plan_shards, source_digest
from lmdistill.teachers.draws import Drawn, score

VOCAB = 200
SAMPLINGS = [Sampling(12), Sampling(12, 0.7, 3)]


class BigramLogits(BigramEngine):
    """The toy teacher, with its logits; ids below `offset` have no mass."""

    def __init__(self, seed=0, vocab=VOCAB, offset=0):
        super().__init__(seed, vocab=vocab)
        self.offset = offset

    def logit_chunks(self, tokens_BT, starts_BT):
        self.rows_scored += len(tokens_BT)
        logits_NV = torch.from_numpy(self.table_VV[tokens_BT.reshape(-1) - self.offset])
        logits_NV = torch.nn.functional.pad(logits_NV, (self.offset, 0), value=-torch.inf)
        for start in range(0, len(logits_NV), 10):
            yield start, logits_NV[start : start + 10]


def capture(tmp_path, out, engine, sampling, vocab=VOCAB, batch_rows=2):
    """A capture of toy size of the corpus in `tmp_path`."""
    layout = Layout(LENGTH, sampling.draws, vocab, "sampled", sampling=sampling)
    reader = CorpusReader(tmp_path / "corpus")
    progress = SilentProgress()
    return Capture(
        tmp_path / out, reader, ("train",), layout, TEACHER, lambda: engine, SHARD_ROWS, batch_rows, progress=progress
    )


def toy_corpus(tmp_path, rows=11, vocab=VOCAB):
    tokens = BigramEngine(vocab=vocab).text(1, rows)
    write_corpus(tmp_path / "corpus", {"train": tokens}, vocab)
    return tokens


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("offset", [0, 70_000])
def test_what_was_drawn_comes_back_in_any_order(tmp_path, sampling, offset):
    """Ids and counts exactly, log-probs within the code; weights are c/n at t = 1, and p/r off by the code's share."""
    engine = BigramLogits(vocab=VOCAB, offset=offset)  # above 65,535 ids have a high plane
    tokens = BigramEngine(vocab=VOCAB).text(1, 11) + offset
    write_corpus(tmp_path / "corpus", {"train": tokens}, VOCAB + offset)
    capture(tmp_path, "out", engine, sampling, VOCAB + offset).run()
    reader = SignalsReader(tmp_path / "out")
    starts = np.zeros(tokens.shape, bool)
    exact = score(engine, sampling, ("train", 0), tokens, starts)
    assert isinstance(exact, Drawn)
    rows = [7, 0, 10, 3]
    batch = reader.read(rows)
    there = exact.counts_BTK[rows] > 0
    assert (batch.ids_RTK == exact.ids_BTK[rows]).all()
    assert (np.isneginf(batch.logp_RTK) == ~there).all()
    companding = Companding()
    code = np.searchsorted(companding.edges_C, exact.logp_BTK[rows][..., :1] - exact.logp_BTK[rows])
    bound = companding.half_step_C[code] + half_step_f16(batch.logp_RTK[..., :1]) + 1e-4
    bound += renormalisation_bound(companding, sampling.draws)
    exact_logp = np.where(there, exact.logp_BTK[rows], -1e3)
    assert (np.abs(batch.logp_RTK - exact_logp) <= bound)[there].all()
    log_ratio = (1 - sampling.temperature) * exact_logp + exact.log_z_BT[rows][..., None]
    right = exact.counts_BTK[rows] / sampling.draws * np.exp(log_ratio)
    if sampling.weighted:
        off = np.abs(np.log(batch.weight_RTK[there] / right[there]))
        assert (off <= 0.3 * bound[there] + half_step_f16(exact.log_z_BT[rows])[..., None].repeat(12, -1)[there]).all()
        assert (batch.weight_RTK[~there] == 0).all()
    else:
        np.testing.assert_allclose(batch.weight_RTK, right, atol=1e-6)
        np.testing.assert_allclose(batch.weight_RTK.sum(-1), 1, atol=1e-6)


def write_drawn(out, layout, tokens, exact):
    """A cache of the given draws, whether or not they belong to the tokens."""
    out.mkdir()
    flags, entries = plain_flags(*tokens.shape), []
    for job in plan_shards("train", len(tokens), SHARD_ROWS):
        writer = CredulousWriter(out, job, layout, source_digest(layout, TEACHER, tokens, flags))
        columns = {name: column[job.span] for name, column in vars(exact).items()}
        writer.append(tokens[job.span], flags[job.span], Drawn(**columns))
        entries.append(writer.commit().entry)
    split = SplitEntry(len(tokens), "c" * 64, tuple(entries), {})
    manifest = Manifest(layout, SHARD_ROWS, "concat", "t" * 64, None, TEACHER, {"train": split})
    (out / "signals.json").write_text(manifest.to_json())


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_bytes_do_not_depend_on_batches_or_on_a_run_that_was_stopped(tmp_path, sampling):
    """Shards: one row at a time or three; all files: gone on with after losing some, or never stopped."""
    toy_corpus(tmp_path)
    folders = []
    for out, batch_rows in (("a", 1), ("b", 3)):
        capture(tmp_path, out, BigramLogits(vocab=VOCAB), sampling, batch_rows=batch_rows).run()
        folders.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()})
    assert all(folders[0][name] == folders[1][name] for name in folders[0] if name.endswith(".sig"))
    for name in ("train-00001.sig", "train-00002.json", "signals.json"):
        (tmp_path / "b" / name).unlink()
    engine = BigramLogits(vocab=VOCAB)
    capture(tmp_path, "b", engine, sampling, batch_rows=3).run()
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == folders[1]
    assert engine.rows_scored == 4 + 3


def test_the_manifest_says_how_it_was_drawn_and_other_draws_are_another_cache(tmp_path):
    toy_corpus(tmp_path)
    manifest = capture(tmp_path, "a", BigramLogits(vocab=VOCAB), SAMPLINGS[1]).run()
    assert manifest.layout.sampling == SAMPLINGS[1]
    assert Manifest.from_json((tmp_path / "a/signals.json").read_text()) == manifest
    assert describe(tmp_path / "a")["variant"] == "sampled"
    engine = BigramLogits(vocab=VOCAB)
    again = dataclasses.replace(SAMPLINGS[1], seed=4)
    assert capture(tmp_path, "a", engine, again).run().digest != manifest.digest
    assert engine.rows_scored == 11  # no shard of the other seed is kept


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_of_other_tokens_are_refused_and_right_ones_never(tmp_path, sampling):
    """Shifted by one, another row's or teacher's: refused in the first batch; eight seeds of right ones pass."""
    tokens, engine, starts = toy_corpus(tmp_path), BigramLogits(vocab=VOCAB), np.zeros((11, LENGTH), bool)
    layout = Layout(LENGTH, sampling.draws, VOCAB, "sampled", sampling=sampling)
    exact = score(engine, sampling, ("train", 0), tokens, starts)
    other = score(BigramLogits(seed=9, vocab=VOCAB), sampling, ("train", 0), tokens, starts)
    wrong = {
        "shifted": {"ids_BTK": np.roll(exact.ids_BTK, 1, axis=1)},
        "rows": {"ids_BTK": np.roll(exact.ids_BTK, 1, axis=0)},
        "teacher": {
            name: getattr(other, name) for name in ("ids_BTK", "logp_BTK", "counts_BTK", "log_z_BT", "tail_BT")
        },
    }
    for name, columns in wrong.items():
        write_drawn(tmp_path / name, layout, tokens, dataclasses.replace(exact, **columns))
        with pytest.raises(IntegrityError, match="do not belong to its tokens"):
            SignalsReader(tmp_path / name).read([0, 1])
    for seed in range(8):
        text = engine.text(seed, 20)
        right = score(engine, dataclasses.replace(sampling, seed=seed), ("train", 0), text, np.zeros(text.shape, bool))
        write_drawn(tmp_path / f"right{seed}", layout, text, right)
        SignalsReader(tmp_path / f"right{seed}").read(slice(None))


def test_every_flipped_byte_is_found_and_located(tmp_path):
    toy_corpus(tmp_path)
    capture(tmp_path, "out", BigramLogits(vocab=VOCAB), SAMPLINGS[1]).run()
    assert verify(tmp_path / "out") == []
    path = tmp_path / "out/train-00001.sig"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << int(rng.integers(8)))]) + whole[place + 1 :])
        [problem] = verify(tmp_path / "out")
        first, last = (int(n) for n in problem.split("bytes ")[1].split(":")[0].split("–"))
        assert first <= place <= last and "train-00001.sig: block" in problem


def test_top_k_is_no_draw(tmp_path):
    """An engine's top K cannot land in a sampled cache."""
    tokens = toy_corpus(tmp_path)
    layout = Layout(LENGTH, 12, VOCAB, "sampled", sampling=Sampling(12))
    with pytest.raises(StageError, match="was given the teacher's top K"):
        sampled.SampledVariant().code(
            layout, tokens, plain_flags(*tokens.shape), BigramEngine(k=12, vocab=VOCAB).score(tokens, tokens < 0)
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 90), st.sampled_from([0.5, 1.0, 1.5]))
def test_coded_rows_of_any_draws_survive_packing(seed, draws, vocab, temperature):
    """One draw or many, few ids or many: the same coded rows after a segment's bytes."""
    sampling, engine = Sampling(draws, temperature, seed), BigramLogits(seed=seed, vocab=vocab)
    tokens = engine.text(seed, 5, 8)
    layout = Layout(8, draws, vocab, "sampled", sampling=sampling)
    exact, coder = score(engine, sampling, ("train", 0), tokens, tokens < 0), sampled.SampledVariant()
    raw_R = coder.code(layout, tokens, plain_flags(5, 8), exact)
    tables, *blocks = coder.encode(layout, raw_R, 2)
    decoder = coder.decoder(layout, tables)
    assert decoder.decode(blocks, (2, 2, 1)).tobytes() == raw_R.tobytes()
