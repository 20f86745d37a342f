"""Fast paths against their slow twins: packed attention and log-probs of targets."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend

from model import attention
from model.attention import FlashVarlen, Segments, attend, attend_long, attend_reference, is_long
from model.loss import target_logprobs, target_logprobs_reference


def check_attention(segments: Segments, H: int, K: int, D: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    T = segments.num_tokens
    qkv = [torch.randn(T, n, D, generator=generator) for n in (H, K, K)]
    fast_in = [x.clone().requires_grad_() for x in qkv]
    slow_in = [x.clone().requires_grad_() for x in qkv]
    fast, slow = attend(*fast_in, segments), attend_reference(*slow_in, segments)
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


def test_shared_prompt_equals_repeated_prompts():
    """The point of the layout: a completion beside its siblings reads as if it stood alone after its prompt."""
    P, completions, H, D = 7, [3, 5, 1], 2, 8
    q, k, v = (torch.randn(P + sum(completions), H, D) for _ in range(3))
    out = attend(q, k, v, Segments.shared_prompt([P], [completions]))
    start = P
    for n in completions:
        rows = [*range(P), *range(start, start + n)]
        alone = attend(q[rows], k[rows], v[rows], Segments.causal([P + n]))
        assert torch.allclose(out[rows], alone, atol=1e-6)
        start += n


def test_long_segments_are_padded_without_a_trace(monkeypatch):
    """What cuDNN is given, through another kernel of torch: the same numbers as the loop's, and the same gradients."""
    monkeypatch.setattr(attention, "LONG_STEP", 16)
    monkeypatch.setattr(attention, "SDPBackend", SimpleNamespace(CUDNN_ATTENTION=SDPBackend.MATH))
    monkeypatch.setitem(globals(), "attend", attend_long)
    check_attention(Segments.causal([37, 16, 20]), 4, 2)
    check_attention(Segments.causal([48]), 2, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_long_segments_on_a_gpu():
    """bf16: as far from float32 as FlashAttention is."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("a Hopper card")
    segments = Segments.causal([9000, 8704]).to("cuda")
    make = lambda n: torch.randn(segments.num_tokens, n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    inputs, weight = [make(n) for n in (4, 2, 2)], make(4).detach()
    assert is_long(inputs[0], segments)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    true = attend_reference(*exact, segments)
    true = [true, *torch.autograd.grad(true, exact, weight.float())]
    for path in (attend, lambda *args: FlashVarlen.apply(*args)):
        out = path(*inputs, segments)
        for mine, other in zip([out, *torch.autograd.grad(out, inputs, weight)], true):
            assert float((mine.float() - other).norm() / other.norm()) < 0.006
    assert not is_long(inputs[0], Segments.causal([8192] * 2))


def test_segments_do_not_leak():
    q, k, v = (torch.randn(12, 2, 8) for _ in range(3))
    before = attend(q, k, v, Segments.causal([5, 7]))
    k[8:], v[8:] = 9.0, 9.0
    after = attend(q, k, v, Segments.causal([5, 7]))
    assert before[:8].equal(after[:8]) and not before[8:].equal(after[8:])


@pytest.mark.parametrize("temperature, banned", [(1.0, None), (0.7, torch.tensor([1, 5, 6]))])
@pytest.mark.parametrize("chunk", [4 * 50 * 3, 1 << 20])
def test_target_logprobs_equal_the_whole_softmax(monkeypatch, temperature, banned, chunk):
    monkeypatch.setattr("model.loss.CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(17, 24, generator=generator), torch.randn(50, 24, generator=generator)
    targets = torch.randint(7, 50, (17,), generator=generator)
    weight = torch.randn(17, generator=generator)
    results = []
    for function in (target_logprobs, target_logprobs_reference):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        logp, entropy, correct = function(h, w, targets, temperature, banned)
        (logp * weight).sum().backward()
        results.append((logp.detach(), entropy, correct, h.grad, w.grad))
    for fast, slow in zip(*results):
        assert torch.allclose(fast.float(), slow.float(), atol=1e-5), (fast, slow)


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
