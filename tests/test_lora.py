"""Adapters: where they go, what is trained, nothing changes until they learn, and they can be merged or switched off.

Their files: test_adapter_files.py. The layer itself: test_adapters.py.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import Sequence, pack_sequences
from transformers import Qwen2_5_VLForConditionalGeneration

import lora
from config import SFT, LoraArgs
from model import UserError
from model.loading import load_model, save_model

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
    whole = changes.get("tune_merger", False), not changes.get("freeze_vision_tower", True), False
    trained_whole = {c: flag for c, flag in zip(("merger", "vision", "llm"), whole)}
    assert trained & parameters.keys() == {name for name in parameters if trained_whole[lora.part_of(name)]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_namespan_exclude": ["visaul"]}, "visaul"),
        ({"lora_namespan_exclude": ["layers", "visual"]}, "no layer"),
        ({"freeze_llm": False}, "--llm_lora False"),
        ({"lora_enable": False}, "nothing is left to train"),
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
    assert torch.equal(logits(model), now)
    assert [p.data_ptr() for p in parameters] == addresses


def test_disabled_is_the_base_and_merged_is_the_sum_here_and_in_transformers(model, tmp_path):
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
    save_model(model, tmp_path)
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    close(hf_logits(hf, model), adapted)
