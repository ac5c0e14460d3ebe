"""Hidden states from the transformers engine, and the teach stage that keeps them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from teachers_toys import VOCAB, save_toy

from lmdistill.checkpoints import load_model
from lmdistill.errors import PreflightError
from lmdistill.signals.hidden_plan import check_hidden, hidden_layout, hidden_memory
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.registry import ENGINES, create_engine

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 24)).astype(np.int32)
STARTS = np.zeros(TOKENS.shape, bool)
STARTS[:, [0, 9]] = True
KINDS = {
    "llama": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "granite": {"logits_scaling": 4.0},
}


def by_hooks(folder, tokens):
    """What goes into the first block, out of each, and out of the final norm, seen by hooks."""
    model, seen = load_model(folder), {}
    blocks = model.base_model.layers
    blocks[0].register_forward_pre_hook(lambda _, args: seen.update({0: args[0]}))
    for number, block in enumerate(blocks[:-1], 1):
        block.register_forward_hook(
            lambda _, __, out, n=number: seen.update({n: out[0] if isinstance(out, tuple) else out})
        )
    with torch.inference_mode():
        seen[len(blocks)] = model.base_model(torch.from_numpy(tokens).long(), use_cache=False).last_hidden_state
    return {layer: state.numpy() for layer, state in seen.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_what_goes_between_the_blocks(kind, tmp_path):
    """0 the embeddings, n what block n gives on, the last after the final norm; the log-probs as without them."""
    teacher = save_toy(tmp_path, kind, **KINDS[kind])
    engine, plain = create_engine("transformers"), create_engine("transformers")
    engine.open(teacher, EngineOptions(4, VOCAB, hidden_layers=(2, 0, 1)))
    plain.open(teacher, EngineOptions(4, VOCAB))
    for _ in range(2):  # a second call gives its own rows', not the first's too
        found = engine.score(TOKENS, STARTS)
    expected = by_hooks(teacher.path, TOKENS)
    assert found.hidden_BTLD.dtype == np.float32
    assert found.hidden_BTLD.shape == (2, 24, 3, 32)
    for place, layer in enumerate((2, 0, 1)):
        np.testing.assert_allclose(found.hidden_BTLD[:, :, place], expected[layer], atol=1e-5)
    for name, array in vars(plain.score(TOKENS, STARTS)).items():
        np.testing.assert_array_equal(getattr(found, name), array)


def test_isolated_documents_have_their_own(toy):
    """The states of a document in a row's middle are those it has alone."""
    engine = create_engine("transformers")
    engine.open(toy, EngineOptions(4, VOCAB, isolate=True, hidden_layers=(1, 2)))
    packed = engine.score(TOKENS, STARTS).hidden_BTLD[:, 9:]
    alone = engine.score(TOKENS[:, 9:], STARTS[:, 9:]).hidden_BTLD
    np.testing.assert_allclose(packed, alone, atol=1e-4)


def test_layers_count_from_either_end(toy):
    """Negative layers are told by their number; what the teacher has not, or twice, is refused with what it has."""
    assert hidden_layout((), "int8", toy.path) is None
    assert hidden_layout((-1, 0, -2), "int8", toy.path).layers == (2, 0, 1)
    assert hidden_layout((1,), "float16", toy.path).bytes_per_token == 64
    for wrong in ((3,), (-4,), (1, 1), (2, -1)):
        with pytest.raises(PreflightError, match="cannot be kept") as refused:
            hidden_layout(wrong, "int8", toy.path)
        assert "0 to 2" in refused.value.why
    one, two = (hidden_memory(hidden_layout(layers, "int8", toy.path), toy.path, 100) for layers in ((0,), (0, 1)))
    assert two > one > 100 * 32 * 4 * 3


def test_engines_and_ensembles_that_have_none_are_refused():
    """Before any work."""
    check_hidden("transformers", members=1)
    for name in ENGINES.keys() - {"transformers"}:
        with pytest.raises(PreflightError, match="cannot give hidden states"):
            check_hidden(name, members=1)
    with pytest.raises(PreflightError, match="an ensemble has no hidden states"):
        check_hidden("transformers", members=2)
