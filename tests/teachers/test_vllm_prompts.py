"""Rows asked prompt by prompt: the same as one forward over the row, documents apart where they must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from teachers_toys import VOCAB, save_toy
from test_vllm_logprobs import laid_out

from lmdistill.checkpoints import load_model
from lmdistill.errors import StageError
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.engine_parity import compare, open_reference
from lmdistill.teachers.logprobs import from_flat
from lmdistill.teachers.prompts import PromptEngine, prompts_of
from lmdistill.teachers.registry import create_engine

ROWS, LENGTH, K = 2, 40, 6
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
STARTS = np.zeros((ROWS, LENGTH), bool)
STARTS[0, [0, 7, 8, 39]] = STARTS[1, [20]] = True


class Plain(PromptEngine):
    """Answers as vLLM does, from a plain forward of each prompt; keeps what it was asked."""

    def open(self, teacher, options):
        self._model, self._options, self.asked = load_model(teacher.path), options, []

    def ask(self, prompts, k):
        for tokens in prompts:
            self.asked.append(tokens)
            with torch.inference_mode():
                logits = self._model(torch.tensor([tokens])).logits[0, :-1, :VOCAB]
            yield from_flat(laid_out(logits, torch.tensor(tokens[1:]), k)[0], k)


class Deaf(Plain):
    """Answers about other tokens."""

    def ask(self, prompts, k):
        return super().ask([[0] * len(tokens) for tokens in prompts], k)


def opened(kind, teacher, isolate):
    engine = kind()
    engine.open(teacher, EngineOptions(K, VOCAB, isolate=isolate))
    return engine


@settings(max_examples=50, deadline=None)
@given(marks=st.lists(st.booleans(), min_size=12, max_size=12), isolate=st.booleans())
def test_prompts_cover_each_row_once_and_carry_the_next_token(marks, isolate):
    """Spans follow each other without gap; the token after a span is the row's next one, whatever document it is of."""
    tokens, starts = np.arange(12).reshape(1, 12), np.array([marks])
    prompts = prompts_of(tokens, starts, isolate)
    assert [token for prompt in prompts for token in prompt.tokens[:-1]] == list(range(12))
    assert all(prompt.tokens[-1] == min(prompt.stop, 11) for prompt in prompts)
    assert len(prompts) == (1 + sum(marks[1:]) if isolate else 1)


@pytest.mark.parametrize("isolate", [False, True])
def test_prompts_say_what_a_forward_over_the_row_says(toy, isolate):
    """Every position, also a document's last, which predicts the next document's first token, and the row's last."""
    engine = opened(Plain, toy, isolate)
    reference = create_engine("transformers")
    reference.open(toy, EngineOptions(K, VOCAB, isolate=isolate))
    found, expected = engine.score(TOKENS, STARTS), reference.score(TOKENS, STARTS)
    compare(found, expected, 1e-4)
    np.testing.assert_array_equal(found.ids_BTK, expected.ids_BTK)
    np.testing.assert_array_equal(np.isnan(found.lp_next_BT), np.isnan(expected.lp_next_BT))
    assert len(engine.asked) == (6 if isolate else ROWS)


def test_a_document_is_asked_without_what_stands_before_it(toy):
    """With `isolate` no prompt holds a token of an earlier document."""
    engine = opened(Plain, toy, isolate=True)
    engine.score(TOKENS[:1], STARTS[:1])
    row = TOKENS[0].tolist()
    assert engine.asked == [row[0:8], row[7:9], row[8:40], [row[39], row[39]]]


def test_the_reference_keeps_documents_apart_where_the_model_cannot(tmp_path):
    """A teacher with convolutions, refused in packed rows, is proven document by document."""
    layers = ["conv", "full_attention"]
    teacher = save_toy(tmp_path, "lfm2", layer_types=layers, block_auto_adjust_ff_dim=False)
    reference = open_reference(teacher, EngineOptions(K, VOCAB, isolate=True))
    expected = reference.score(TOKENS, STARTS)
    compare(opened(Plain, teacher, isolate=True).score(TOKENS, STARTS), expected, 1e-4)
    alone = open_reference(teacher, EngineOptions(K, VOCAB)).score(TOKENS[:1, 8:39], STARTS[:1, 8:39])
    np.testing.assert_allclose(expected.logp_BTK[:1, 8:39], alone.logp_BTK, atol=1e-5)


def test_answers_about_other_tokens_are_refused(toy):
    """What an engine scored must be what it was asked."""
    with pytest.raises(StageError, match="other tokens than it was asked"):
        opened(Deaf, toy, isolate=False).score(TOKENS, STARTS)
