"""Every fast form of model/fast/ against its plain form in model/qwen.py, over shapes, outputs and gradients. What only
a GPU runs is in test_gpu.py."""

from types import SimpleNamespace

import pytest
import torch
from conftest import SHAPES, Sequence, pack_sequences, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import CASES
from torch import nn
from torch.nn.attention import SDPBackend

import lora
from config import LoraArgs
from model import qwen
from model.adapters import Weights, aligned
from model.fast import cpu, gpu, portable
from model.fast.graphs import GRANULE, Plan, Replay
from model.qwen import Segments, target_logprobs

PLAIN = vars(qwen.plain_ops())


def gradients(function, *tensors):
    """Outputs and the gradients of a fixed weighting of them."""
    inputs = [x.clone().requires_grad_() for x in tensors]
    out = function(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def agree(fast, slow, atol=1e-4):
    for mine, theirs in zip(fast, slow, strict=True):
        assert torch.allclose(mine, theirs, atol=atol, rtol=1e-4), (mine - theirs).abs().max()


# -- The whole model


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fast_model_equals_the_plain_one(shape, layout, recompute):
    """Hidden states and the gradient of every adapter, clips and text packed, or a prompt shared by completions."""
    model = random_model(shape)
    lora.inject(model, LoraArgs(lora_rank=4, vision_lora=True, merger_lora=True))
    torch.manual_seed(0)
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            layer.lora_B.normal_(0, 0.05)
    lora.set_trainable(model, LoraArgs(lora_rank=4, vision_lora=True, merger_lora=True))
    names = "mixed", "text", "images"
    packed = pack_sequences([Sequence(model.config, CASES[name], seed=i) for i, name in enumerate(names)])
    if layout == "shared":
        lengths = packed.segments.q_lengths
        packed.segments = Segments.shared_prompt(lengths[:1], [lengths[1:]])
    model.gradient_checkpointing, fast, results = recompute, dict(vars(model.ops)), []
    for forms in (fast, model.ops.plain):
        vars(model.ops).update(forms)
        model.zero_grad()
        hidden = model(packed)
        (hidden * hidden.detach().cos()).sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 2 + len(model.visual.blocks) + len(model.model.layers)
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() <= 2e-4 * theirs.norm() + 1e-5


# -- Attention


def check_attention(segments: Segments, H: int, K: int, D: int = 16, seed: int = 0, form=portable.attention):
    generator = torch.Generator().manual_seed(seed)
    T = segments.num_tokens
    qkv = [torch.randn(T, n, D, generator=generator) for n in (H, K, K)]
    fast_in = [x.clone().requires_grad_() for x in qkv]
    slow_in = [x.clone().requires_grad_() for x in qkv]
    fast, slow = form(*fast_in, segments), qwen.attention(*slow_in, segments)
    assert torch.allclose(fast, slow, atol=2e-6), (fast - slow).abs().max()
    weight = torch.randn(fast.shape, generator=generator)
    (fast * weight).sum().backward()
    (slow * weight).sum().backward()
    for a, b in zip(fast_in, slow_in):
        assert torch.allclose(a.grad, b.grad, atol=1e-5), (a.grad - b.grad).abs().max()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.booleans(), st.sampled_from([(4, 4), (4, 2), (6, 1)]))
def test_packed_attention_equals_the_loop(lengths, causal, heads):
    check_attention((Segments.causal if causal else Segments.full)(lengths), *heads)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 9), max_size=5)), min_size=1, max_size=4))
def test_shared_prompt_equals_the_loop(groups):
    check_attention(Segments.shared_prompt([p for p, _ in groups], [c for _, c in groups]), 4, 2)


def test_long_segments_are_padded_without_a_trace(monkeypatch):
    """What cuDNN is given, through another kernel of torch: the same numbers as the loop's, and the same gradients."""
    monkeypatch.setattr(gpu, "LONG_STEP", 16)
    monkeypatch.setattr(gpu, "SDPBackend", SimpleNamespace(CUDNN_ATTENTION=SDPBackend.MATH))
    check_attention(Segments.causal([37, 16, 20]), 4, 2, form=gpu.long_attention)
    check_attention(Segments.causal([48]), 2, 2, form=gpu.long_attention)


def test_a_gradient_is_the_same_bit_for_bit_every_time():
    """Prompt keys that many completions share, and padding that takes one token again and again: sums of many rows."""
    generator = torch.Generator().manual_seed(0)
    segments = Segments.shared_prompt([300], [[30, 57, 49, 25, 40, 33, 60, 44]])
    q, k, v = (torch.randn(segments.num_tokens, heads, 64, generator=generator) for heads in (4, 2, 2))
    first = gradients(lambda *x: portable.attention(*x, segments), q, k, v)
    for _ in range(20):
        again = gradients(lambda *x: portable.attention(*x, segments), q, k, v)
        assert all(mine.equal(before) for mine, before in zip(again, first, strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_the_last_layer_computes_only_the_rows_asked_for(shared):
    """Hidden states of some tokens and the gradients of all weights, with and without cutting the last layer."""
    model = random_model("grouped")
    names = "text", "video", "images"
    packed = pack_sequences([Sequence(model.config, CASES[name], seed=i) for i, name in enumerate(names)])
    lengths = packed.segments.q_lengths
    if shared:  # the second and third as completions of the first
        packed.segments = Segments.shared_prompt(lengths[:1], [lengths[1:]])
    ends = packed.segments.cu_q.tolist()
    rows = torch.tensor([ends[1] - 1, ends[1] + 2, ends[1] + 3, ends[2] - 1])  # none of the last segment
    tails, query_rows, where = packed.segments.tails(rows)
    assert tails.q_lengths == [1, lengths[1] - 2, 0] and query_rows[where].equal(rows)
    results = []
    for hidden in (lambda: model(packed, rows=rows), lambda: model(packed)[rows]):
        out = hidden()
        grads = torch.autograd.grad((out * out.detach().cos()).sum(), list(model.parameters()), allow_unused=True)
        results.append([out, *(g for g in grads if g is not None)])
    agree(*results)


# -- Log-probs


@pytest.mark.parametrize("temperature, banned", [(1.0, None), (0.7, torch.tensor([1, 5, 6]))])
@pytest.mark.parametrize("chunk", [4 * 50 * 3, 1 << 20])
def test_target_logprobs_equal_the_whole_softmax(monkeypatch, temperature, banned, chunk):
    monkeypatch.setattr("model.fast.portable.CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(17, 24, generator=generator), torch.randn(50, 24, generator=generator)
    targets = torch.randint(7, 50, (17,), generator=generator)
    weight = torch.randn(17, generator=generator)
    results = []
    for function in (target_logprobs, qwen.logprobs):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        logp, entropy, correct = function(h, w, targets, temperature, banned)
        (logp * weight).sum().backward()
        results.append((logp.detach(), entropy, correct, h.grad, w.grad))
    for *fast, slow in zip(*results):
        assert all(torch.allclose(x.float(), slow.float(), atol=1e-5) for x in fast), (fast, slow)


def test_target_logprobs_never_holds_all_logits():
    hidden, head = torch.randn(4096, 8, requires_grad=True), torch.randn(40_000, 8)
    targets = torch.zeros(4096, dtype=torch.int64)
    sizes = []

    def record(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        target_logprobs(hidden, head, targets)[0].sum().backward()
    assert max(sizes) <= head.numel()  # saved for backward: inputs and one number a row, 4096 * 40000 nowhere


# -- Products with adapters


def adapted(n_in, n_out, rank, scale, bias):
    """Weights whose adapter alone is trained."""
    weight, A, B = torch.randn(n_out, n_in) * n_in**-0.5, torch.randn(rank, n_in), torch.randn(n_out, rank)
    return Weights(weight, torch.randn(n_out) if bias else None, A.requires_grad_(), B.requires_grad_(), scale)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rows", [1, 9, 130])
def test_products_that_share_an_input_equal_the_plain_ones(pad, mixed, trained, rows):
    torch.manual_seed(0)
    n_out = (13, 8, 21)
    layers = [adapted(12, n, r, s, b) for n, r, s, b in zip(n_out, (4, 2, 3), (0.5, 2.0, 1.0), (True, False, True))]
    if mixed:
        layers[1] = Weights(torch.randn(8, 12), None)  # one without an adapter among them
    if trained:
        layers[2].weight.requires_grad_()
        layers[2].bias.requires_grad_()
    x = torch.randn(rows, 12)
    weights = [torch.randn(rows, aligned(n) if pad else n) for n in n_out]
    params = [t for layer in layers for t in layer[:4] if t is not None and t.requires_grad]
    results = []
    for fast in (True, False):
        inp = x.clone().requires_grad_()
        outs = portable.linear(inp, *layers, pad=pad) if fast else qwen.linear(inp, *layers)
        assert not fast or (type(outs[0].grad_fn).__name__ == "ProjectBackward") != trained
        outs = outs if fast else [portable.widen(y, 1, w.shape[1]) for y, w in zip(outs, weights)]
        assert [o.shape[1] for o in outs] == [w.shape[1] for w in weights]
        grads = torch.autograd.grad(sum((o * w).sum() for o, w in zip(outs, weights)), [inp, *params])
        results.append([*outs, *grads])
    agree(*results)


def test_padded_columns_are_zero_and_change_nothing():
    torch.manual_seed(0)
    up, down = adapted(16, 13, 4, 0.5, True), adapted(13, 16, 4, 0.5, False)
    x = torch.randn(5, 16)
    narrow = qwen.linear(x, up)[0]
    for wide in (portable.linear_by_autograd(x, up, pad=True), portable.linear(x, up, pad=True)[0]):
        assert wide.shape == (5, 16) and (wide[:, 13:] == 0).all()
        assert torch.allclose(wide[:, :13], narrow, atol=1e-5)
        assert torch.allclose(portable.linear(wide, down)[0], qwen.linear(narrow, down)[0], atol=1e-4)


def test_frozen_weight_is_widened_once_and_keeps_its_value():
    weight = nn.Parameter(torch.randn(13, 12), requires_grad=False)
    before = weight.detach().clone()
    first, _ = portable.padded(weight, None, 16, True)
    again, _ = portable.padded(weight, None, 16, True)
    assert first.shape == (16, 16) and first.data_ptr() == again.data_ptr() == weight.data_ptr()
    assert weight.equal(before) and first[:13, :12].equal(before) and first.sum().isclose(before.sum(), atol=1e-5)
    weight.data = before[:, :4]  # moved on, as .to() or a merge would: the padded copy is made anew
    assert portable.padded(weight, None, 8, True)[0][:13, :4].equal(before[:, :4])


@pytest.mark.parametrize("rows", [1, 7, 130])
def test_norm_and_swiglu_equal_the_plain_forms(rows):
    torch.manual_seed(0)
    x, weight, gate, up = torch.randn(rows, 12), torch.randn(12), torch.randn(rows, 5), torch.randn(rows, 5)
    norms, swiglus = [], []
    for form in (cpu.FORMS, PLAIN):
        norms.append(gradients(lambda x, w, op=form["norm"]: op(x, w, 1e-6), x, weight))
        swiglus.append(gradients(form["swiglu"], gate, up))
    for fast, plain in (norms, swiglus):
        assert len(fast) == len(plain) == 3
        for mine, theirs in zip(fast, plain):  # the output and both gradients
            assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4), (mine - theirs).abs().max()


# -- CUDA graphs, as far as a CPU shows them


@pytest.mark.parametrize("segments", [
    Segments.causal([5, 90, 3]), Segments.full([64, 64, 16, 48]), Segments.causal([256]),
    Segments.shared_prompt([9, 20], [[4, 7, 1], [30]]),
], ids=["causal", "windows", "full", "shared"])  # fmt: skip
def test_padding_changes_nothing(segments):
    """The padded plan attends as the plain one, and its padding takes and gives no gradient."""
    T, rows = segments.num_tokens, GRANULE
    plan = Plan(segments, rows)
    static = plan.static("cpu")
    assert sum(static.q_lengths) == rows
    assert max(static.q_lengths) <= static.max_q and max(static.k_lengths) <= static.max_k
    plan.fill(static)
    ends = torch.tensor([0, *static.q_lengths]).cumsum(0)
    assert static.cu_q[: len(ends)].tolist() == ends.tolist() and set(static.cu_q[len(ends) :].tolist()) <= {rows}
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(rows, 2, 8, generator=generator).requires_grad_() for _ in range(3)]
    narrow = [x[:T].detach().clone().requires_grad_() for x in wide]
    result, expected = qwen.attention(*wide, static), qwen.attention(*narrow, segments)
    assert torch.equal(result[:T], expected)
    weight = torch.randn(expected.shape, generator=generator)
    (result[:T] * weight).sum().backward()
    (expected * weight).sum().backward()
    for x, y in zip(wide, narrow):
        assert torch.allclose(x.grad[:T], y.grad, atol=1e-6) and x.grad[T:].abs().sum() == 0


def test_near_sizes_share_a_graph():
    keys = {Plan(Segments.causal([a, 130 - a]), 256).key for a in (20, 40, 64)}
    assert len(keys) == 1 and Plan(Segments.causal([130]), 256).key not in keys


def test_a_replays_gradients_are_not_what_the_next_one_writes_over():
    """Without copies of ours: autograd makes one, since the buffer has another owner."""
    buffer, p = torch.zeros(3), torch.nn.Parameter(torch.zeros(3))
    capture = SimpleNamespace(forwards=1, forward=lambda x, tables, plans: x * 2)
    capture.backward = lambda grad: [grad * 2, buffer.fill_(grad.sum().item())]
    x = torch.ones(3, requires_grad=True)
    for turn in (1, 2):
        Replay.apply(capture, (), [], x, p).sum().backward()
        assert p.grad.tolist() == [3.0 * turn] * 3 and x.grad.tolist() == [2.0 * turn] * 3
        buffer.fill_(torch.nan)
        assert p.grad.tolist() == [3.0 * turn] * 3
