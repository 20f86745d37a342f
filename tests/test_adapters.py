"""The layer with an adapter, and the flat parameter that holds all adapters of its block."""

import math

import pytest
import torch
from torch import nn

import lora
from config import LoraArgs
from model.adapters import BlockAdapters, LoRALinear, Unpack, weights_of
from model.qwen import linear


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def adapted(base, args, dtype=None):
    """A layer alone in its block."""
    block = nn.Sequential(LoRALinear(base, args))
    BlockAdapters(block, list(block), args.lora_rank, dtype)
    return block[0]


def output(layer, x):
    return linear(x, *weights_of(layer.home.block, layer))[0]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_the_formula(rslora, bias):
    torch.manual_seed(0)
    args = LoraArgs(lora_rank=4, lora_alpha=8, use_rslora=rslora)
    plain = nn.Linear(6, 5, bias=bias)
    layer = adapted(plain, args)
    x = torch.randn(2, 3, 6)
    assert torch.equal(output(layer, x), plain(x))
    assert set(plain.state_dict()) == set(layer.state_dict())
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(6)
    nn.init.normal_(layer.lora_B)
    scaling = 8 / 2 if rslora else 8 / 4
    close(output(layer, x), plain(x) + scaling * x @ layer.lora_A.T @ layer.lora_B.T)


def test_fp32_adapter_beside_bf16_weights():
    layer = adapted(nn.Linear(6, 5).bfloat16(), LoraArgs(lora_rank=2), dtype=torch.float32)
    nn.init.normal_(layer.lora_B)
    output(layer, torch.randn(3, 6).bfloat16()).float().sum().backward()
    gradient = layer.home.block.adapters.grad
    assert gradient.dtype == torch.float32
    assert all(piece.abs().min() > 0 for piece in layer.home.pieces(gradient))


def test_dropout_only_while_training():
    torch.manual_seed(0)
    layer = adapted(nn.Linear(64, 5), LoraArgs(lora_rank=2, lora_dropout=0.5))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 64)
    assert not torch.equal(output(layer, x), output(layer, x))
    layer.eval()
    assert torch.equal(output(layer, x), output(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_has_the_gradient_of_narrow(dtype):
    torch.manual_seed(0)
    block = nn.Sequential(*[LoRALinear(nn.Linear(n, n + 1, dtype=dtype), LoraArgs(lora_rank=3)) for n in (5, 6, 7)])
    home = BlockAdapters(block, list(block), 3)
    flat = block.adapters
    assert flat.dtype == dtype and len(flat) == 16 + 24 + 24 + 24 + 24 + 24  # 15, 18, 18, 21, 21, 24 numbers
    assert home.padding == 1 + 6 + 6 + 3 + 3 + 0
    assert lora.sizes(block)["adapters"] == 15 + 18 + 18 + 21 + 21 + 24
    pieces = [home.pieces(flat), Unpack.apply(flat, home)]
    assert all(torch.equal(a, b) and b.data_ptr() % 16 == 0 for a, b in zip(*pieces, strict=True))
    factors = [torch.randn_like(piece) for piece in pieces[0]]
    # the second layer takes no part
    slow, fast = (sum((p[i] * factors[i]).sum() for i in (0, 1, 4, 5)) for p in pieces)
    (slow,), (fast,) = torch.autograd.grad(slow, flat), torch.autograd.grad(fast, flat)
    assert torch.equal(slow, fast) and fast.count_nonzero() == 15 + 18 + 21 + 24


def test_weights_are_of_the_parameter_as_it_is_now():
    layer = adapted(nn.Linear(6, 5), LoraArgs(lora_rank=2))
    block, x = layer.home.block, torch.randn(3, 6)
    nn.init.normal_(layer.lora_B)
    before = output(layer, x)
    block.adapters.data = 2 * block.adapters.data  # another storage, as DeepSpeed gives it
    assert not torch.equal(output(layer, x), before)
    layer.enabled = False
    assert torch.equal(output(layer, x), x @ layer.weight.T + layer.bias) or weights_of(block, layer)[0].A is None
