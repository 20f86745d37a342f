"""Adapters: the layer, where they go, what is trained; nothing changes until they learn; merged, switched off, frozen.

Their files: test_adapter_files.py.
"""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import Sequence, pack_sequences
from torch import nn

import lora
from config import SFT, LoraArgs
from model import UserError
from model.adapters import BlockAdapters, LoRALinear, Unpack, weights_of
from model.loading import load_model
from model.qwen import linear

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"
# 2 vision blocks (qkv, proj, gate, up, down), the merger (2 layers), 2 decoder layers of 7
COUNTS = {"vision": 10, "merger": 2, "llm": 14}


def load(folder=TINY):
    return load_model(folder).eval()


@pytest.fixture
def model():
    return load()


def sequence(model):
    """Text, a clip of one grid step (2 frames of 56x56, 4 merged tokens), text."""
    return Sequence(model.config, [5, ("video", 1, 4, 4, 1.0), 4])


@torch.no_grad()
def logits(model):
    return model.eval().logits(pack_sequences([sequence(model)]))


@torch.no_grad()
def hf_logits(hf, model):
    return hf.eval()(**sequence(model).for_transformers()).logits[0]


def loss(model):
    return model.logits(pack_sequences([sequence(model)])).logsumexp(-1).sum()


@torch.no_grad()
def randomise(model, seed=2):
    """As after training: every adapter and every other trained tensor moves."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora.trainable_parameters(model):
        if not name.endswith("adapters"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    for _, layer in lora.lora_layers(model):
        for view in (layer.lora_A, layer.lora_B):
            view.add_(torch.randn(view.shape, generator=generator) * 0.1)


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def with_args(**changes):
    return dataclasses.replace(LoraArgs(lora_rank=4, lora_alpha=8), **changes)


# -- The layer


@pytest.mark.parametrize(("rslora", "bias"), [(False, True), (True, False)])
def test_layer_is_the_formula(rslora, bias):
    """In its block's parameter as that is now, dropout only while training, off where it is switched off."""
    torch.manual_seed(0)
    plain, x = nn.Linear(6, 5, bias=bias), torch.randn(2, 3, 6)
    block = nn.Sequential(LoRALinear(plain, LoraArgs(lora_rank=4, lora_alpha=8, use_rslora=rslora, lora_dropout=0.5)))
    BlockAdapters(block, list(block), 4)
    layer, output = block[0].eval(), lambda: linear(x, *weights_of(block, block[0]))[0]
    assert torch.equal(output(), plain(x)) and layer.lora_A.abs().max() <= 1 / math.sqrt(6)
    assert set(plain.state_dict()) == set(layer.state_dict())
    nn.init.normal_(layer.lora_B)
    block.adapters.data = 2 * block.adapters.data  # another storage, as DeepSpeed gives it
    scaling = 8 / 2 if rslora else 8 / 4
    close(output(), plain(x) + scaling * x @ layer.lora_A.T @ layer.lora_B.T, 1e-5)
    layer.train()
    assert not torch.equal(output(), output())
    layer.enabled = False
    assert torch.equal(output(), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_has_the_gradient_of_plain_views(dtype):
    torch.manual_seed(0)
    block = nn.Sequential(*[LoRALinear(nn.Linear(n, n + 1, dtype=dtype), LoraArgs(lora_rank=3)) for n in (5, 6, 7)])
    home = BlockAdapters(block, list(block), 3)
    flat = block.adapters
    assert flat.dtype == dtype and len(flat) == 16 + 24 + 24 + 24 + 24 + 24  # 15, 18, 18, 21, 21, 24 numbers
    assert lora.sizes(block)["adapters"] == 15 + 18 + 18 + 21 + 21 + 24
    pieces = [home.pieces(flat), Unpack.apply(flat, home)]
    assert all(torch.equal(a, b) and b.data_ptr() % 16 == 0 for a, b in zip(*pieces, strict=True))
    factors = [torch.randn_like(piece) for piece in pieces[0]]
    # the second layer takes no part
    slow, fast = (sum((p[i] * factors[i]).sum() for i in (0, 1, 4, 5)) for p in pieces)
    (slow,), (fast,) = torch.autograd.grad(slow, flat), torch.autograd.grad(fast, flat)
    assert torch.equal(slow, fast) and fast.count_nonzero() == 15 + 18 + 21 + 24


# -- In a model


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, [10, 2, 14]),
        ({"tune_merger": True}, [10, 0, 14]),
        ({"llm_lora": False}, [10, 2, 0]),
        ({"num_lora_modules": 15}, [0, 1, 14]),
        ({"lora_namespan_exclude": ["lm_head", "mlp"]}, [4, 0, 8]),
        ({"lora_enable": False, "freeze_vision_tower": False, "tune_merger": True}, [0, 0, 0]),
    ],
)
def test_where_adapters_go_and_what_is_trained(model, changes, counts):
    before, parameters = logits(model), dict(model.named_parameters())
    names = lora.inject(model, with_args(**changes))
    assert [sum(lora.part_of(name) == component for name in names) for component in COUNTS] == counts
    assert torch.equal(logits(model), before)
    trained = {name for name, _ in lora.trainable_parameters(model)}
    blocks = {name.rpartition(".")[0] for name in trained if name.endswith(".adapters")}
    assert blocks <= {"model.layers.0", "model.layers.1", "visual.blocks.0", "visual.blocks.1", "visual.merger"}
    merger, vision = changes.get("tune_merger", False), not changes.get("freeze_vision_tower", True)
    whole = {"merger": merger, "vision": vision, "llm": False}
    assert trained & parameters.keys() == {name for name in parameters if whole[lora.part_of(name)]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_namespan_exclude": ["visaul"]}, "visaul"),
        ({"lora_namespan_exclude": ["layers", "visual"]}, "no layer"),
        ({"freeze_llm": False}, "--llm_lora False"),
    ],
)
def test_contradictions_are_refused(model, changes, words):
    with pytest.raises(UserError, match=words):
        lora.inject(model, with_args(**changes))
    assert not lora.lora_layers(model)


def test_optimizer_groups(model):
    args = SFT(vision_lora=False, freeze_vision_tower=False, tune_merger=True, merger_lr=1e-5, weight_decay=0.1)
    lora.inject(model, args)
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in lora.param_groups(model, args)}
    rates = {"vision": args.learning_rate, "merger": 1e-5}
    assert groups.pop("llm") == (args.learning_rate, 0.1)
    assert groups == {f"{c}{kind}": (rates[c], decay) for c in rates for kind, decay in (("", 0.1), (" no decay", 0.0))}


def test_every_adapter_gets_a_gradient_and_recomputation_changes_none(model):
    lora.inject(model, with_args())
    randomise(model)  # B = 0 would hide A's gradient
    model.train()
    gradients = []
    for model.gradient_checkpointing in (False, True):
        loss(model).backward()
        gradients.append([p.grad for _, p in lora.trainable_parameters(model)])
        pieces = [piece for block in lora.adapter_blocks(model) for piece in block.pieces(block.block.adapters.grad)]
        assert len(pieces) == 2 * sum(COUNTS.values()) and all(piece.abs().max() > 0 for piece in pieces)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_reference_is_the_start_while_training_goes_on(model):
    lora.inject(model, with_args(tune_merger=True))
    randomise(model)
    start, snapshot = logits(model), lora.reference_snapshot(model)
    parameters = [p for _, p in lora.trainable_parameters(model)]
    addresses = [p.data_ptr() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    loss(model).backward()
    optimizer.step()
    now = logits(model)
    assert (now - start).abs().max() > 1e-3
    with pytest.raises(KeyError), lora.reference(model, snapshot):
        assert torch.equal(logits(model), start)
        raise KeyError("the trained tensors come back after an error too")
    assert torch.equal(logits(model), now) and [p.data_ptr() for p in parameters] == addresses


def test_disabled_is_the_base_and_merged_is_the_sum(model):
    keys, before = set(model.state_dict()), logits(model)
    lora.inject(model, with_args())
    randomise(model)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 0.1
    with lora.disabled(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)
    lora.merge(model)
    close(logits(model), adapted)
    assert set(model.state_dict()) == keys and not lora.lora_layers(model)
