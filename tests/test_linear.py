"""Grouped products with adapters against torch's autograd, with and without padding to aligned widths."""

import pytest
import torch
from torch import nn

from model import linear
from model.linear import plain, project


class Adapted(nn.Linear):
    def __init__(self, n_in, n_out, rank, scale, bias):
        super().__init__(n_in, n_out, bias=bias)
        self.requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(rank, n_in)), nn.Parameter(torch.randn(n_out, rank))
        self.scale = scale

    def adapter(self):
        return self.A, self.B, self.scale, 0.0


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_grouped_products_equal_plain_autograd(monkeypatch, pad, mixed):
    torch.manual_seed(0)
    n_out = (13, 8, 21)
    layers = [Adapted(12, n, r, s, b) for n, r, s, b in zip(n_out, (4, 2, 3), (0.5, 2.0, 1.0), (True, False, True))]
    if mixed:
        layers[1] = nn.Linear(12, 8).requires_grad_(False)  # one without an adapter among them
    x = torch.randn(9, 12)
    weights = [torch.randn(9, linear.aligned(n) if pad else n) for n in n_out]
    params = [p for m in layers for p in m.parameters() if p.requires_grad]
    results = []
    for fast in (True, False):
        inp = x.clone().requires_grad_()
        if fast:
            tensors, scales = [], []
            for m in layers:
                a = linear.adapter_of(m) or (None, None, 0.0, 0.0)
                tensors += [m.weight, m.bias, a[0], a[1]]
                scales.append(a[2])
            outs = linear.Project.apply(inp, pad, scales, *tensors)
        else:
            outs = [plain(inp, m, linear.adapter_of(m), pad) for m in layers]
        assert [o.shape[1] for o in outs] == [w.shape[1] for w in weights]
        grads = torch.autograd.grad(sum((o * w).sum() for o, w in zip(outs, weights)), [inp, *params])
        results.append([*outs, *grads])
    for fast, slow in zip(*results):
        assert torch.allclose(fast, slow, atol=1e-4), (fast - slow).abs().max()


def test_padded_columns_are_zero_and_change_nothing():
    torch.manual_seed(0)
    up, down = Adapted(16, 13, 4, 0.5, True), Adapted(13, 16, 4, 0.5, False)
    x = torch.randn(5, 16)
    wide = plain(x, up, up.adapter(), pad=True)
    assert wide.shape == (5, 16) and (wide[:, 13:] == 0).all()
    narrow = plain(x, up, up.adapter())
    assert torch.allclose(wide[:, :13], narrow, atol=1e-6)
    fast = project(wide, down)[0]
    assert torch.allclose(fast, plain(narrow, down, down.adapter()), atol=1e-5)


def test_trained_weights_get_their_gradient():
    layer = Adapted(6, 5, 2, 1.0, True).requires_grad_(True)
    project(torch.randn(3, 6), layer)[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_frozen_weight_is_widened_once_and_keeps_its_value():
    weight = nn.Parameter(torch.randn(13, 12), requires_grad=False)
    before = weight.detach().clone()
    first, _ = linear.padded(weight, None, 16, True)
    again, _ = linear.padded(weight, None, 16, True)
    assert first.shape == (16, 16) and first.data_ptr() == again.data_ptr() == weight.data_ptr()
    assert weight.equal(before) and first[:13, :12].equal(before) and first.sum().isclose(before.sum(), atol=1e-5)
    weight.data = before[:, :4]  # moved on, as .to() or a merge would: the padded copy is made anew
    assert linear.padded(weight, None, 8, True)[0][:13, :4].equal(before[:, :4])
