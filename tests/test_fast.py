"""Every fast form of model/fast/ against its plain form in model/qwen.py, over shapes, outputs and gradients. What only
a GPU runs is in test_gpu.py."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import SHAPES, Sequence, pack_sequences
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import CASES, adapted, gradients
from torch import nn

from model import qwen
from model.adapters import Weights
from model.fast import graphs, portable
from model.quantized import quantise
from model.qwen import Segments, target_logprobs


@torch.no_grad()
def apart(fast, slow, atol=1e-4):
    """The largest difference as a multiple of what is allowed, atol + 1e-4 of the slow form's; NaN where one is NaN."""
    pairs = [(mine.float(), theirs.float()) for mine, theirs in zip(fast, slow, strict=True) if theirs.numel()]
    assert pairs and all(mine.shape == theirs.shape for mine, theirs in pairs)
    ratios = [((mine - theirs).abs() / (atol + 1e-4 * theirs.abs())).amax() for mine, theirs in pairs]
    return float(torch.stack(ratios).amax())


def results(function, *tensors):
    """Output and the gradients of a fixed weighting of it."""
    inputs = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fast_model_equals_the_plain_one(shape, layout, recompute):
    """Hidden states and the gradient of every adapter, clips and text packed, or a prompt shared by completions."""
    model = adapted(shape)
    names = "mixed", "text", "images"
    packed = pack_sequences([Sequence(model.config, CASES[name], seed=i) for i, name in enumerate(names)])
    if layout == "shared":
        lengths = packed.segments.q_lengths
        packed.segments = Segments.shared_prompt(lengths[:1], [lengths[1:]])
    model.gradient_checkpointing, made = recompute, []
    for forms in (dict(vars(model.ops)), model.ops.plain):
        vars(model.ops).update(forms)
        made.append(gradients(model, packed))
    assert len(made[0]) == 2 + len(model.visual.blocks) + len(model.model.layers)
    for mine, theirs in zip(*made, strict=True):
        assert (mine - theirs).norm() <= 2e-4 * theirs.norm() + 1e-5


def test_passes_in_several_threads_are_the_same():
    model = adapted()
    packed = pack_sequences([Sequence(model.config, CASES["video"])])
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        whole, passes = model(packed), pool.map(torch.no_grad()(lambda _: model(packed)), range(200))
        assert all(whole.equal(one) for one in passes)


# -- Attention


GROUPS = st.lists(st.tuples(st.integers(1, 90), st.lists(st.integers(1, 9), max_size=5)), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(GROUPS, st.sampled_from([(4, 4), (4, 2), (6, 1)]))
def test_attention_of_packed_and_shared_prompts_equals_the_loop(groups, heads):
    lengths = [prompt for prompt, _ in groups]
    shared = Segments.shared_prompt(lengths, [completions for _, completions in groups])
    for segments in (Segments.causal(lengths), Segments.full(lengths), shared):
        qkv = torch.randn(3, segments.num_tokens, heads[0], 16, generator=torch.Generator().manual_seed(0))
        qkv = qkv[0], qkv[1, :, : heads[1]], qkv[2, :, : heads[1]]
        forms = [partial(form, segments=segments) for form in (portable.attention, qwen.attention)]
        assert apart(*(results(form, *qkv) for form in forms), 1e-5) <= 1


@settings(max_examples=30, deadline=None)
@given(GROUPS)
def test_padding_for_cuda_graphs_changes_no_attention(groups):
    """Round sizes cover every query and key once; the batch's own rows are what they were, the others finite."""
    lengths = [prompt for prompt, _ in groups]
    for own in (Segments.shared_prompt(lengths, [c for _, c in groups]), Segments.full(lengths)):
        rows = graphs.round_up(own.num_tokens, graphs.GRANULE)
        wide = graphs.padded(own, rows)
        for old, new in zip(graphs.with_prefix([own]), graphs.with_prefix([wide]), strict=True):
            assert sum(new.q_lengths) == sum(new.k_lengths) == new.num_tokens == rows
            assert max(new.q_lengths) <= new.max_q and max(new.k_lengths) <= new.max_k
            assert new.q_lengths[: len(old.q_lengths)] == old.q_lengths
            assert new.k_lengths[: len(old.k_lengths)] == old.k_lengths
        qkv = torch.randn(3, rows, 2, 8, generator=torch.Generator().manual_seed(0))
        out = qwen.attention(*qkv, wide)
        assert out.isfinite().all()
        assert apart([out[: own.num_tokens]], [qwen.attention(*qkv[:, : own.num_tokens], own)], 1e-6) <= 1
    assert graphs.split_into(300, 128) == [128, 128, 44] and graphs.split_into(0, 128) == []


@pytest.mark.parametrize("shared", [False, True])
def test_the_last_layer_computes_only_the_rows_asked_for(shared):
    """Hidden states of some tokens and all gradients, with and without cutting the last layer."""
    model, names = adapted(), ("text", "video", "images")
    packed = pack_sequences([Sequence(model.config, CASES[name], seed=i) for i, name in enumerate(names)])
    lengths = packed.segments.q_lengths
    if shared:  # the second and third as completions of the first
        packed.segments = Segments.shared_prompt(lengths[:1], [lengths[1:]])
    ends = packed.segments.cu_q.tolist()
    rows = torch.tensor([ends[1] - 1, ends[1] + 2, ends[1] + 3, ends[2] - 1])  # none of the last segment
    tails, query_rows, where = packed.segments.tails(rows)
    assert tails.q_lengths == [1, lengths[1] - 2, 0] and query_rows[where].equal(rows)
    assert model.ops.trim_last_layer
    cut = gradients(lambda packed: model(packed, rows=rows), packed, model)
    assert apart(cut, gradients(lambda packed: model(packed)[rows], packed, model)) <= 1


# -- Log-probs


@pytest.mark.parametrize("temperature, banned", [(1.0, None), (0.7, torch.tensor([1, 5, 6]))])
@pytest.mark.parametrize("chunk", [4 * 50 * 3, 1 << 20])
def test_target_logprobs_equal_the_whole_softmax(monkeypatch, temperature, banned, chunk):
    monkeypatch.setattr(portable, "CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(17, 24, generator=generator), torch.randn(50, 24, generator=generator)
    targets, made = torch.randint(7, 50, (17,), generator=generator), []
    for function in (target_logprobs, qwen.logprobs):
        rest = function(hidden, head, targets, temperature, banned)[1:]
        made.append([*rest, *results(lambda h, w, f=function: f(h, w, targets, temperature, banned)[0], hidden, head)])
    assert apart(*made, 1e-5) <= 1


# -- Products with adapters inside


@pytest.mark.parametrize("kind", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("outs", [(276, 276), (520,), (200, 40, 300), (40,), (128,)])
def test_adapters_inside_of_a_product_equal_those_beside_it(outs, kind):
    """Values and gradients of `linear` in its fast and its plain form: columns and rows of the weights, neither; widths
    that are no multiples of 8, linears without adapters, and one group's weights in another group."""
    torch.manual_seed(0)
    width, rank, T = 132, 8, 37
    weights = [torch.randn(out, width) for out in outs]
    if kind == "bf16":
        weights = [nn.Parameter(w, requires_grad=False) for w in weights]
    else:
        weights = [quantise(w, kind, torch.float32) for w in weights]
    bias = [torch.randn(out) for out in outs]

    def pass_of(form, numbers, seed):
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(shape, generator=g)
        x, leaves, layers = draw(T, width).requires_grad_(), [], []
        for i in numbers:
            pair = [None, None] if i == 1 and len(outs) == 3 else [draw(rank, width), draw(outs[i], rank)]
            leaves += [leaf.requires_grad_() for leaf in pair if leaf is not None]
            layers.append(Weights(weights[i], bias[i], *pair, scale=0.5))
        ys = [y[:, : outs[i]] for i, y in zip(numbers, form(x, *layers))]
        loss = sum((y * draw(*y.shape)).sum() for y in ys)
        return [*ys, *torch.autograd.grad(loss, [x, *leaves])]

    every = tuple(range(len(outs)))
    for seed, numbers in enumerate([every, every[:1], every[::-1], every]):
        made = [pass_of(form, numbers, seed) for form in (portable.linear, qwen.linear)]
        for fast, plain in zip(*made, strict=True):
            assert (fast - plain).norm() <= 1e-5 * plain.norm(), (outs, numbers, fast.shape)
