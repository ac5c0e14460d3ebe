"""The llama_cpp engine: the file's own predictions, held against transformers on the same weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lmdistill.errors import IntegrityError, LmdistillError, PreflightError
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.engine_parity import open_reference, prove
from lmdistill.teachers.llama_cpp_engine import PARITY_BOUNDS, QUANTISED_BOUND, parity_bound, weight_type
from lmdistill.teachers.registry import check_engine, create_engine

VOCAB, K, LENGTH = 49152, 8, 40
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH)).astype(np.int32)
STARTS = np.zeros(TOKENS.shape, bool)
STARTS[:, [0, 7, 8, 30]] = True


def options(**keys):
    return EngineOptions(**({"k": K, "vocab_size": VOCAB, "row_tokens": LENGTH, "threads": 1} | keys))


def opened(teacher, **keys):
    engine = create_engine("llama_cpp")
    engine.open(teacher, options(**keys))
    return engine


def arrays(found, rows=slice(None), positions=slice(None)):
    return {name: array[rows, positions] for name, array in vars(found).items()}


def assert_same(one, other):
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("kind", ["f32", "f16", "q4_1"])
@pytest.mark.parametrize("isolate", [False, True])
def test_within_its_file_type_s_bound_of_the_dequantised_weights(gguf_toy, kind, isolate):
    """Only the rounding of activations lies between the file and the weights that were imported from it."""
    teacher = gguf_toy(kind)
    bound = parity_bound(teacher.gguf)
    reference = open_reference(teacher, options(isolate=isolate))
    figures = prove(opened(teacher, isolate=isolate), reference, TOKENS, STARTS, bound)
    assert figures["max_delta_logprob"] <= bound == PARITY_BOUNDS.get(kind, QUANTISED_BOUND)


def test_another_teacher_s_file_is_found_out(gguf_toy):
    """The proof is no formality: the same model at 4 bits is not its own 32-bit file, and a stranger far from both."""
    whole, coarse, stranger = gguf_toy("f32"), gguf_toy("q4_1"), gguf_toy("f32", seed=1)
    reference = open_reference(whole, options())
    for gguf in (coarse.gguf, stranger.gguf):
        with pytest.raises(IntegrityError, match="does not compute what the teacher computes"):
            prove(opened(replace(whole, gguf=gguf)), reference, TOKENS, STARTS, parity_bound(whole.gguf))


def test_its_precision_is_that_of_most_weights(gguf_toy):
    """Read from the tensors, not from what the file says of itself: most of this toy is its 8-bit embedding."""
    assert weight_type(gguf_toy("f32").gguf) == "f32"
    assert weight_type(gguf_toy("q4_1").gguf) == "q8_0"


@pytest.mark.parametrize("kind", ["f32", "q4_1"])
def test_a_document_scores_the_same_whatever_stands_before_it(gguf_toy, kind):
    """With `isolate`, to the last bit: alone, at a row's start, or behind other documents; without it, not at all."""
    engine = opened(gguf_toy(kind), isolate=True)
    document = TOKENS[:1, 8:30]
    alone = arrays(engine.score(document, STARTS[:1, 8:30]))
    changed = TOKENS.copy()
    changed[1, :8], changed[1, 8:30] = changed[1, :8][::-1], document[0]
    for rows in (TOKENS, changed):
        row = slice(0, 1) if rows is TOKENS else slice(1, 2)
        found = arrays(engine.score(rows, STARTS), row, slice(8, 30))
        found["lp_next_BT"], expected = found["lp_next_BT"][:, :-1], alone | {"lp_next_BT": alone["lp_next_BT"][:, :-1]}
        assert_same(found, expected)
    together = opened(gguf_toy(kind)).score(TOKENS, STARTS)
    assert np.abs(together.logp_BTK[:1, 8:30] - alone["logp_BTK"]).max() > 1e-2


def test_rows_do_not_depend_on_their_batch_on_threads_or_on_what_was_scored_before(gguf_toy):
    """To the last bit."""
    engine = opened(gguf_toy("q4_1"))
    whole = engine.score(TOKENS, STARTS)
    assert_same(arrays(engine.score(TOKENS[1:], STARTS[1:])), arrays(whole, slice(1, 2)))
    assert_same(arrays(opened(gguf_toy("q4_1"), threads=2).score(TOKENS, STARTS)), arrays(whole))


def test_the_vocabulary_s_padding_takes_no_mass(gguf_toy):
    """Ids above the tokenizer's are cut before anything is summed; one too few are refused."""
    engine = opened(gguf_toy("f32"), k=4, vocab_size=4)
    found = engine.score(TOKENS % 4, STARTS)
    np.testing.assert_allclose(np.exp(found.logp_BTK).sum(axis=-1), 1, atol=1e-5)
    assert np.isneginf(found.tail_BT).all()
    with pytest.raises(LmdistillError, match=f"logits for {VOCAB} ids, its tokenizer {VOCAB + 1}"):
        opened(gguf_toy("f32"), vocab_size=VOCAB + 1)


def test_a_folder_of_float_weights_is_refused(gguf_toy):
    """Nothing is exported behind the user's back."""
    with pytest.raises(PreflightError, match="is a model folder") as refused:
        opened(replace(gguf_toy("f32"), gguf=None))
    assert "engine: transformers" in refused.value.fix


def test_it_is_listed_with_what_it_needs():
    """Known by name; its packages are looked for without importing them."""
    check_engine("llama_cpp")
    version = create_engine("llama_cpp").version()
    assert version.startswith("llama-cpp-python 0.")
    assert ", torch " in version
