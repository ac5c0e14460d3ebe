"""The super-network: a candidate's model computes what the shared weights compute under it, whatever the candidate."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from supernet_toys import BLOCKS, SHAPE, VOCAB

from lmdistill.checkpoints import load_model
from lmdistill.pipeline.stage import ModelRef, SilentProgress
from lmdistill.search import importance
from lmdistill.search.candidate import Candidate, Layer
from lmdistill.search.make_supernet import Making, make
from lmdistill.search.slicing import axes_of, kept_heads
from lmdistill.search.space import Space, SpaceConfig
from lmdistill.search.sub_space import SubSpace, sub_spaces
from lmdistill.search.supernet import SuperNet
from lmdistill.students import lfm2
from lmdistill.students.regression import Fit

SIZES: dict[str, Any] = {"hidden_sizes": [32, 48, 64], "intermediate_sizes": [32, 64, 96], "kv_heads": [1, 2]}
SPACES = {
    "lfm2": {"depth": [2, 4], "kernels": [2, 3], **SIZES},
    "llama": {"depth": [2, 4], "operators": ["attention"], **SIZES},
}


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(3))


def space_of(keys: dict[str, Any]) -> SubSpace:
    # q4_0 would want whole blocks of 32; in f16 any width will do, so that more of them are tried
    return sub_spaces(Space(SpaceConfig(**keys), SHAPE, "f16"))[0]


@pytest.fixture(scope="module", params=sorted(SPACES))
def made(request: pytest.FixtureRequest, teacher: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the model that the super-network is made of, the super-network, its sub-space)."""
    model = load_model(teacher.path)
    hybrid = request.param == "lfm2"
    source = lfm2.from_llama(model, tokens(), 3) if hybrid else model
    how = Making(hybrid, 3, True, 4, 4, Fit(2, 2, 2e-3, "float32", 0))
    net = make(source, tokens(), how, tmp_path_factory.mktemp(request.param), SilentProgress())
    return source, net, space_of(SPACES[request.param])


def drawn(made: Any, seed: int) -> tuple[Candidate, SuperNet]:
    """Some candidate, and the super-network."""
    _, net, sub = made
    return sub.sample(random.Random(seed)), net


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=12)
def test_an_extracted_model_computes_what_the_super_network_computes(made: Any, seed: int) -> None:
    candidate, net = drawn(made, seed)
    with torch.no_grad():
        ours = net.run(candidate, input_ids=tokens()).logits
        model = net.extract(candidate)
        assert torch.equal(model(tokens()).logits, ours)
    assert sum(parameter.numel() for parameter in model.parameters()) == candidate.parameters


def whole(net: SuperNet) -> Candidate:
    """The candidate that is all of the teacher."""
    full = net.full
    layers = tuple(Layer(block, "attention") for block in range(BLOCKS))
    widths = (full.hidden_size, full.intermediate_size, full.heads, full.kv_heads, full.head_dim, full.kernel)
    return Candidate("lfm2" if len(net.convolutions) else "llama", layers, *widths, VOCAB)


def test_with_units_in_their_order_the_whole_network_is_still_the_teacher(made: Any) -> None:
    source, net, _ = made
    with torch.no_grad():
        wanted, found = source(tokens()).logits, net.run(whole(net), input_ids=tokens()).logits
    assert not torch.equal(net.body.embed_tokens.weight, source.model.embed_tokens.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_student_of_the_teachers_width_has_its_channels_and_heads_where_the_teacher_has_them(made: Any) -> None:
    """So that losses between layers of the two compare like with like; inside an MLP the order is free."""
    source, net, _ = made
    model = net.restored(net.extract(whole(net)), whole(net)).state_dict()
    for name, tensor in source.state_dict().items():
        if "F" in axes_of(name.replace("lm_head", "embed_tokens")):
            assert model[name].shape == tensor.shape
        else:
            assert torch.equal(model[name], tensor), name


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=8)
def test_units_that_are_put_back_compute_the_same(made: Any, seed: int) -> None:
    candidate, net = drawn(made, seed)
    with torch.no_grad():
        before = net.extract(candidate)(tokens()).logits
        model = net.restored(net.extract(candidate), candidate)
        torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-3, atol=1e-3)
    theirs, ours = made[0].model.embed_tokens.weight, model.model.embed_tokens.weight
    assert (candidate.hidden_size == net.full.hidden_size) == (theirs.shape == ours.shape and torch.equal(theirs, ours))


def test_gradients_reach_the_units_that_a_candidate_has_and_no_others(made: Any) -> None:
    _, net, sub = made
    candidate = sub.smallest()
    net.zero_grad()
    net.run(candidate, input_ids=tokens()).logits.square().sum().backward()
    width = candidate.hidden_size
    seen = net.body.embed_tokens.weight.grad.abs().sum(0) > 0
    assert width < len(seen) and seen[:width].all() and not seen[width:].any()
    unused = set(range(BLOCKS)) - set(candidate.sources)
    assert unused
    assert all(parameter.grad is None for block in unused for parameter in net.body.layers[block].parameters())


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_narrower_attention_takes_whole_heads_each_once(groups: int, size: int, data: st.DataObject) -> None:
    kept_groups = data.draw(st.integers(1, groups))
    now = data.draw(st.integers(1, groups * size // kept_groups))
    heads = kept_heads(kept_groups * now, kept_groups, groups * size, groups)
    assert len(heads) == len(set(heads)) == kept_groups * now
    own = min(now, size)
    for group in range(kept_groups):
        assert heads[group * now : group * now + own] == [group * size + slot for slot in range(own)]


def test_what_a_model_leans_on_is_important(teacher: ModelRef) -> None:
    model = load_model(teacher.path)
    plain = importance.measure(model, tokens(), 2, "float32")
    block = model.model.layers[1]
    with torch.no_grad():
        block.mlp.up_proj.weight[7] *= 50
        block.self_attn.v_proj.weight[16:] *= 50  # the second key head
    leaning = importance.measure(model, tokens(), 2, "float32")
    assert importance.order_of(leaning.inner_LF[1])[0] == 7
    queries, groups = importance.head_order(leaning.heads_LH[1], 2)
    assert groups[0] == 1 and sorted(queries[:2]) == [2, 3]
    torch.testing.assert_close(leaning.inner_LF[0], plain.inner_LF[0])


def test_rows_at_once_do_not_change_importance(teacher: ModelRef) -> None:
    model = load_model(teacher.path)
    one, all_ = (importance.measure(model, tokens(), rows, "float32") for rows in (1, 4))
    torch.testing.assert_close(one.hidden_D, all_.hidden_D)
    torch.testing.assert_close(one.heads_LH, all_.heads_LH)
