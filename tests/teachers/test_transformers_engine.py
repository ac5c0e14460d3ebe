"""The transformers engine against a plain forward of the same model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from teachers_toys import VOCAB, save_toy

from lmdistill.checkpoints import load_model
from lmdistill.corpus.format import document_positions
from lmdistill.errors import LmdistillError
from lmdistill.precision import products_in
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.registry import create_engine

ROWS, LENGTH, K = 3, 200, 8
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
STARTS = np.zeros((ROWS, LENGTH), bool)
STARTS[:, [0, 50, 51, 130]] = True


def opened(teacher, **options):
    engine = create_engine("transformers")
    engine.open(teacher, EngineOptions(K, VOCAB, **options))
    return engine


def plain(teacher, tokens, dtype="float32"):
    model = load_model(teacher.path, dtype)
    if products_in(dtype, "cpu") == "float32":
        model.float()
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens).long()).logits[..., :VOCAB]
    return logits.double().log_softmax(-1)


def assert_is(found, exact, atol):
    best = exact.topk(K)
    np.testing.assert_allclose(found.logp_BTK, best.values, atol=atol)
    np.testing.assert_allclose(exact.gather(2, torch.from_numpy(found.ids_BTK).long()), best.values, atol=atol)
    np.testing.assert_allclose(np.exp(found.tail_BT), 1 - best.values.exp().sum(-1), atol=1e-5)
    following = torch.from_numpy(TOKENS[:, 1:, None]).long()
    np.testing.assert_allclose(found.lp_next_BT[:, :-1], exact[:, :-1].gather(2, following)[..., 0], atol=atol)
    assert np.isnan(found.lp_next_BT[:, -1]).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_equal_to_a_plain_forward(toy, precision):
    """Chunked head and group search change nothing; the vocabulary's padding takes no mass."""
    found = opened(toy, precision=precision).score(TOKENS, STARTS)
    assert_is(found, plain(toy, TOKENS, precision), 2e-5)
    assert found.ids_BTK.max() < VOCAB


def test_rows_do_not_depend_on_their_batch_or_on_threads(toy):
    """On CPU the same row gives the same bytes alone, in a batch, and with another number of threads."""
    whole = opened(toy).score(TOKENS, STARTS)
    threads = torch.get_num_threads()
    alone = opened(toy, threads=2).score(TOKENS[1:2], STARTS[1:2])
    torch.set_num_threads(threads)
    for name, array in vars(alone).items():
        np.testing.assert_array_equal(array, getattr(whole, name)[1:2])


def test_packed_documents_do_not_see_each_other(toy):
    """With `isolate` a document in the middle of a row scores as it does alone; without, it does not."""
    isolated = opened(toy, isolate=True).score(TOKENS, STARTS)
    alone = opened(toy).score(TOKENS[:, 51:130], STARTS[:, 51:130])
    np.testing.assert_allclose(isolated.logp_BTK[:, 51:130], alone.logp_BTK, atol=1e-4)
    together = opened(toy).score(TOKENS, STARTS)
    assert np.abs(together.logp_BTK[:, 51:130] - alone.logp_BTK).max() > 1e-2


def test_a_teacher_that_leaks_is_refused(tmp_path):
    """A short convolution reaches over the boundary: asked to isolate, the engine says so instead of leaking."""
    layers = ["conv", "full_attention"]
    teacher = save_toy(tmp_path, "lfm2", layer_types=layers, block_auto_adjust_ff_dim=False)
    opened(teacher)
    with pytest.raises(LmdistillError, match="cannot keep the documents packed into a row apart"):
        opened(teacher, isolate=True)


def test_logits_that_are_scaled_after_the_head(tmp_path):
    """A model that divides its logits is scored as it speaks, not as its bare head would."""
    teacher = save_toy(tmp_path, "granite", logits_scaling=4.0)
    assert_is(opened(teacher).score(TOKENS, STARTS), plain(teacher, TOKENS), 2e-5)


def test_a_head_smaller_than_the_tokenizer(toy):
    """Tokens without a logit are an error that gives both sizes."""
    with pytest.raises(LmdistillError, match="logits for 100 ids, its tokenizer 120"):
        create_engine("transformers").open(toy, EngineOptions(K, 120))


def test_an_unknown_engine():
    """A mistyped engine is named with the nearest one."""
    with pytest.raises(LmdistillError, match="did you mean 'transformers'"):
        create_engine("transformer")


def test_positions_begin_at_each_document():
    """Positions count from 0 within every document; a row that begins inside one counts from its first token."""
    starts = np.array([[1, 0, 0, 1, 0], [0, 0, 1, 1, 0]], bool)
    assert document_positions(starts).tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]]
