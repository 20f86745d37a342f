"""The CPU's own paths (model/cpu.py, cpu_decode.py, Segments.tails) against their plain twins and torch's autograd."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Sequence, pack_sequences, random_model
from test_linear import Adapted
from test_model import CASES
from torch import nn

import lora
from config import SFT
from model import cpu, cpu_decode, linear
from model.attention import Segments, attend_dense
from model.cpu_decode import FusedStep
from model.decode import Sampling, Step, draw, generate_plain
from model.kernels import rotate_pairs
from model.loss import LogprobsAtOnce, target_logprobs_reference

LONG = 1 << 17  # rows that take a product of width 8 to oneDNN


def gradients(function, *tensors):
    """Outputs and the gradients of a fixed weighting of them."""
    inputs = [x.clone().requires_grad_() for x in tensors]
    out = function(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def agree(fast, slow, atol=1e-4):
    for mine, theirs in zip(fast, slow, strict=True):
        assert torch.allclose(mine, theirs, atol=atol, rtol=1e-4), (mine - theirs).abs().max()


@pytest.mark.parametrize("rows", [9, LONG])
@pytest.mark.parametrize("trained", [False, True])
def test_merged_products_equal_plain_autograd(rows, trained):
    torch.manual_seed(0)
    layers = [Adapted(8, n, r, s, b) for n, r, s, b in ((5, 4, 0.5, True), (8, 2, 2.0, False))] + [nn.Linear(8, 3)]
    for layer in layers:
        layer.weight.requires_grad_(trained)
    x = torch.randn(rows, 8) / rows**0.5
    assert cpu.large(x, layers[1].weight) == (rows == LONG and cpu.ONEDNN)
    params = [p for m in layers for p in m.parameters() if p.requires_grad]
    results = []
    for fast in (True, False):
        inp = x.clone().requires_grad_()
        adapters = [linear.adapter_of(m) for m in layers]
        if fast:
            outs = cpu.Merged.apply(inp, *linear.packed(layers, adapters))
        else:
            outs = [linear.plain(inp, m, a) for m, a in zip(layers, adapters)]
        grads = torch.autograd.grad(sum((o * o.detach().cos()).sum() for o in outs), [inp, *params])
        results.append([*outs, *grads])
    agree(*results)


def test_project_takes_the_merged_path_where_it_pays(monkeypatch):
    calls, merged = [], cpu.Merged.apply
    monkeypatch.setattr(cpu.Merged, "apply", lambda *args: calls.append(args) or merged(*args))
    layer = Adapted(8, 16, 4, 1.0, True)
    for rows, expected in ((16, 1), (15, 1)):  # fewer tokens than the weight has rows: beside it, as on a GPU
        (out,) = linear.project(torch.randn(rows, 8), layer)
        assert out.shape == (rows, 16) and len(calls) == expected


def test_norm_swiglu_and_rotary_equal_their_twins():
    torch.manual_seed(0)
    x, weight, gate, up = torch.randn(7, 12), torch.randn(12), torch.randn(7, 5), torch.randn(7, 5)
    agree(gradients(lambda x, w: cpu.RMSNorm.apply(x, w, 1e-6), x, weight),
          gradients(lambda x, w: F.rms_norm(x, (12,), w, 1e-6), x, weight))  # fmt: skip
    agree(gradients(cpu.SwiGLU.apply, gate, up), gradients(lambda g, u: F.silu(g) * u, gate, up))
    heads, cos, sin = torch.randn(7, 3, 8), torch.randn(7, 1, 4), torch.randn(7, 1, 4)
    for sign in (1.0, -1.0):
        turned, plain = cpu.turn(heads, cos, sin, sign), rotate_pairs(heads, cos, sign * sin)
        assert torch.allclose(turned, plain, atol=1e-4, rtol=1e-4) and not torch.allclose(turned, heads)


def test_pieces_cover_all_rows_in_few_sizes():
    sizes = set()
    for rows in range(1, 5000, 7):
        cut = cpu.pieces(rows)
        assert [i for s in cut for i in range(s.start, s.stop)] == list(range(rows))
        sizes |= {s.stop - s.start for s in cut[:-1]} | {n for s in cut[-1:] if (n := s.stop - s.start) >= cpu.LEAST}
    assert sizes == {128, 256, 512, 1024}


def test_the_loss_at_once_equals_its_reference():
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(200, 8), torch.randn(50, 8), torch.randint(0, 50, (200,))
    agree(gradients(lambda h: LogprobsAtOnce.apply(h, head, targets)[0], hidden),
          gradients(lambda h: target_logprobs_reference(h, head, targets)[0], hidden), 1e-5)  # fmt: skip
    assert LogprobsAtOnce.apply(hidden, head, targets)[1].equal(target_logprobs_reference(hidden, head, targets)[2])


@pytest.mark.parametrize("shared", [False, True])
def test_the_last_layer_computes_only_what_is_asked_and_the_same(shared):
    """Hidden states of some tokens and the gradients of all weights, with and without cutting the last layer."""
    model = random_model("grouped")
    names = "text", "video", "images"
    packed = pack_sequences([Sequence(model.config, CASES[name], seed=i) for i, name in enumerate(names)])
    lengths = packed.segments.q_lengths
    if shared:  # the second and third as completions of the first
        packed.segments = Segments.shared_prompt(lengths[:1], [lengths[1:]])
    ends = packed.segments.cu_q.tolist()
    rows = torch.tensor([ends[1] - 1, ends[1] + 2, ends[1] + 3, ends[2] - 1])  # none of the last segment
    tails, asking, where = packed.segments.tails(rows)
    assert tails.q_lengths == [1, lengths[1] - 2, 0] and asking[where].equal(rows)
    results = []
    for hidden in (lambda: model(packed, rows=rows), lambda: model(packed)[rows]):
        out = hidden()
        grads = torch.autograd.grad((out * out.detach().cos()).sum(), list(model.parameters()), allow_unused=True)
        results.append([out, *(g for g in grads if g is not None)])
    agree(*results)


@pytest.mark.parametrize("cases", [("video", "text"), ("video",), ("video", "video")], ids=["two", "one", "equal"])
def test_fused_decoding_equals_the_decoder_layers(cases, monkeypatch):
    """With adapters, prompts of one length (then each row has its own copy) or two, grouped heads: the same draws, and
    log-probs within rounding."""
    model = random_model("grouped").eval()
    lora.inject(model, SFT(lora_rank=4, lora_alpha=8))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(lora.FLAT):
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    prompts = pack_sequences([Sequence(model.config, CASES[c], seed=i) for i, c in enumerate(cases)])
    made, init = [], cpu_decode.RowCache.__init__
    monkeypatch.setattr(cpu_decode.RowCache, "__init__", lambda *args: made.append(1) or init(*args))
    found = []
    for step in (FusedStep, Step):
        noise = torch.Generator().manual_seed(0)
        found.append(generate_plain(model, prompts, Sampling(12, 1.0), 3, noise, step=step))
    assert len(made) == (len(set(prompts.segments.q_lengths)) == 1)
    for fast, slow in zip(sum(found[0], []), sum(found[1], []), strict=True):
        assert fast.ids == slow.ids
        agree([torch.tensor(fast.logprobs)], [torch.tensor(slow.logprobs)])


def test_a_token_without_chance_is_never_drawn():
    scores = torch.full((20_000, 6), float("-inf"))
    scores[:, [1, 4]] = torch.tensor([0.2, 0.8]).log()
    ids = draw(scores, torch.Generator().manual_seed(0))
    counts = ids.bincount(minlength=6).tolist()
    assert counts[1] + counts[4] == 20_000 and abs(counts[4] / 20_000 - 0.8) < 0.015, counts  # 5 standard deviations


def test_a_gradient_is_the_same_bit_for_bit_every_time():
    """Prompt keys that many completions share, and padding that takes one token again and again: sums of many rows."""
    generator = torch.Generator().manual_seed(0)
    segments = Segments.shared_prompt([300], [[30, 57, 49, 25, 40, 33, 60, 44]])
    q, k, v = (torch.randn(segments.num_tokens, heads, 64, generator=generator) for heads in (4, 2, 2))
    first = gradients(lambda *x: attend_dense(*x, segments), q, k, v)
    for _ in range(20):
        again = gradients(lambda *x: attend_dense(*x, segments), q, k, v)
        assert all(mine.equal(before) for mine, before in zip(again, first, strict=True))
