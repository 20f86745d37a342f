"""Adapters: nothing changes until they learn, and they can be taken out again. Their files: test_saved.py."""

import dataclasses

import peft
import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import lora
from config import SFT, LoraArgs
from model import UserError
from model.loading import load_model, save_model
from model.qwen import Packed, Segments

# 12 tokens: text, a clip of one grid step (2 frames of 56x56, 4 merged tokens), text
IDS = [5, 6, 7, 90, 95, 95, 95, 95, 91, 8, 9, 10]
GRID = (1, 4, 4)
ARGS = LoraArgs(lora_rank=4, lora_alpha=8)
# 2 vision blocks (qkv, proj, gate, up, down), the merger (2 layers), 2 decoder layers of 7
COUNTS = {"vision": 10, "merger": 2, "llm": 14}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a random Qwen2.5-VL that transformers wrote."""
    common = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.1}
    config = Qwen2_5_VLConfig(
        text_config=common
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 96}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
        vision_config=common
        | {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2},
        image_token_id=94,
        video_token_id=95,
        vision_start_token_id=90,
        vision_end_token_id=91,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():  # biases start at zero, where they would hide a mistake
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(base):
    return load_model(base)


def packed():
    patches = torch.randn(16, 1176, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(len(IDS)).expand(3, -1).contiguous()
    return Packed(torch.tensor(IDS), positions, Segments.causal([len(IDS)]), patches, [GRID])


@torch.no_grad()
def logits(model):
    return model.eval().logits(packed())


@torch.no_grad()
def hf_logits(hf):
    batch = packed()
    out = hf.eval()(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[:, None],
        pixel_values_videos=batch.patches,
        video_grid_thw=torch.tensor([GRID]),
    )
    return out.logits[0]


def load_hf(base, adapter=None):
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    return hf if adapter is None else peft.PeftModel.from_pretrained(hf, adapter)


@torch.no_grad()
def randomise(model, seed=2):
    """As after training: every adapter and every other trained tensor moves."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora.trainable_parameters(model):
        if not name.endswith("adapters"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    for _, layer in lora.lora_layers(model):
        for view in (layer.lora_A, layer.lora_B):
            view.add_(torch.randn(view.shape, generator=generator) * 0.2)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- Where adapters go, and what is trained


def count_parts(names):
    return {part: sum(lora.part_of(name) == part for name in names) for part in COUNTS}


def test_every_linear_layer_of_every_part(model):
    before, keys = logits(model), set(model.state_dict())
    names = lora.inject(model, ARGS)
    assert count_parts(names) == COUNTS
    assert torch.equal(logits(model), before)
    blocks = {"model.layers.0", "model.layers.1", "visual.blocks.0", "visual.blocks.1", "visual.merger"}
    assert set(model.state_dict()) - keys == {f"{block}.adapters" for block in blocks}
    assert {name.rpartition(".")[0] for name, _ in lora.trainable_parameters(model)} == blocks
    assert [name for name, _ in lora.lora_layers(model)] == [n for n, _ in model.named_modules() if n in names]
    with pytest.raises(UserError, match="already"):
        lora.inject(model, ARGS)


def with_args(**changes):
    return dataclasses.replace(ARGS, **changes)


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"vision_lora": False}, {"vision": 0, "merger": 2, "llm": 14}),
        ({"merger_lora": False}, {"vision": 10, "merger": 0, "llm": 14}),
        ({"tune_merger": True}, {"vision": 10, "merger": 0, "llm": 14}),
        ({"llm_lora": False}, {"vision": 10, "merger": 2, "llm": 0}),
        ({"num_lora_modules": 15}, {"vision": 0, "merger": 1, "llm": 14}),
        ({"lora_namespan_exclude": ["lm_head", "mlp"]}, {"vision": 4, "merger": 0, "llm": 8}),
        ({"lora_enable": False, "tune_merger": True}, {"vision": 0, "merger": 0, "llm": 0}),
    ],
)
def test_switches(model, changes, counts):
    assert count_parts(lora.inject(model, with_args(**changes))) == counts
    trained = {name for name, _ in lora.trainable_parameters(model) if not name.endswith("adapters")}
    merger = {name for name, _ in model.named_parameters() if name.startswith("visual.merger.")}
    assert trained == (merger if changes.get("tune_merger") else set())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_namespan_exclude": ["visaul"]}, "visaul"),
        ({"lora_namespan_exclude": ["layers", "visual"]}, "no layer"),
        ({"num_lora_modules": 27}, "at most 26"),
        ({"freeze_llm": False}, "--llm_lora False"),
        ({"freeze_vision_tower": False}, "--vision_lora False"),
        ({"lora_enable": False}, "nothing is left to train"),
    ],
)
def test_contradictions_are_refused(model, changes, words):
    with pytest.raises(UserError, match=words):
        lora.inject(model, with_args(**changes))
    assert not lora.lora_layers(model)


def test_a_part_that_is_not_there():
    with pytest.raises(UserError, match="visual.blocks"):
        lora.inject(nn.ModuleDict({"model": nn.Linear(2, 2)}), ARGS)


def test_full_and_partial_training(model):
    everything = {name for name, _ in model.named_parameters()}
    nothing_frozen = {"freeze_llm": False, "freeze_vision_tower": False, "tune_merger": True}
    lora.set_trainable(model, LoraArgs(lora_enable=False, **nothing_frozen))
    assert {name for name, _ in lora.trainable_parameters(model)} == everything
    lora.set_trainable(model, LoraArgs(lora_enable=False, freeze_vision_tower=False))
    trained = {name for name, _ in lora.trainable_parameters(model)}
    assert "visual.patch_embed.proj.weight" in trained
    assert not any(name.startswith(("visual.merger.", "model.")) for name in trained)
    lora.inject(model, LoraArgs(vision_lora=False, freeze_vision_tower=False))
    assert trained < {name for name, _ in lora.trainable_parameters(model)}


def test_biases(model):
    lora.inject(model, with_args(lora_bias="lora_only", llm_lora=False, merger_lora=False))
    biases = [name for name, _ in lora.trainable_parameters(model) if name.endswith("bias")]
    assert len(biases) == 10
    assert all(name.startswith("visual.blocks.") for name in biases)
    lora.set_trainable(model, with_args(lora_bias="all"))
    biases = [name for name, _ in lora.trainable_parameters(model) if name.endswith("bias")]
    assert len(biases) == 10 + 2 + 2 * 3


def test_optimizer_groups(model):
    args = SFT(lora_bias="all", tune_merger=True, merger_lora=False, vision_lr=1e-4, merger_lr=1e-5, weight_decay=0.1)
    lora.inject(model, args)
    groups = {group["name"]: group for group in lora.param_groups(model, args)}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {
        "vision": (1e-4, 0.1),
        "vision no decay": (1e-4, 0.0),
        "merger": (1e-5, 0.1),
        "merger no decay": (1e-5, 0.0),
        "llm": (args.learning_rate, 0.1),
        "llm no decay": (args.learning_rate, 0.0),
    }
    assert sum(len(group["params"]) for group in groups.values()) == len(lora.trainable_parameters(model))
    assert len(groups["merger no decay"]["params"]) == 3  # two biases and the norm


def gradients(layer):
    """Of its A and B."""
    pieces = layer.home.pieces(layer.home.block.adapters.grad)
    return pieces[2 * layer.number : 2 * layer.number + 2]


@pytest.mark.parametrize("recompute", [False, True])
def test_every_adapter_tensor_gets_a_gradient(model, recompute):
    lora.inject(model, ARGS)
    randomise(model)  # B = 0 would hide A's gradient
    model.train()
    model.gradient_checkpointing = recompute
    model.logits(packed()).logsumexp(-1).sum().backward()
    silent = [name for name, layer in lora.lora_layers(model) if any(g.abs().max() == 0 for g in gradients(layer))]
    assert not silent
    assert not [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad]


def test_recomputation_changes_no_gradient(model):
    lora.inject(model, ARGS)
    randomise(model)
    model.train()
    found = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.logits(packed()).logsumexp(-1).sum().backward()
        found.append([p.grad for _, p in lora.trainable_parameters(model)])
        assert all(home.views is None for home in lora.homes(model))
        model.zero_grad()
    assert len(found[0]) == 5 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- Off, reference, merged


def test_disabled_is_the_base(model):
    before = logits(model)
    lora.inject(model, ARGS)
    randomise(model)
    after = logits(model)
    assert (after - before).abs().max() > 0.1
    with lora.disabled(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)


def test_reference_is_the_start_while_training_goes_on(model):
    lora.inject(model, with_args(lora_bias="all"))
    randomise(model)
    start, snapshot = logits(model), lora.reference_snapshot(model)
    with lora.reference(model, snapshot):
        assert torch.equal(logits(model), start)
    parameters = [p for _, p in lora.trainable_parameters(model)]
    addresses = [p.data_ptr() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    model.logits(packed()).logsumexp(-1).sum().backward()
    optimizer.step()
    now = logits(model)
    assert (now - start).abs().max() > 1e-3
    with pytest.raises(KeyError), lora.reference(model, snapshot):
        assert torch.equal(logits(model), start)
        raise KeyError("the trained tensors come back after an error too")
    assert torch.equal(logits(model), now)
    assert [p.data_ptr() for p in parameters] == addresses


def test_merged_equals_unmerged_and_can_be_taken_out(model, tmp_path):
    weights = {name: p.clone() for name, p in model.named_parameters()}
    lora.inject(model, ARGS)
    randomise(model)
    adapted = logits(model)
    lora.merge(model)
    close(logits(model), adapted)
    lora.unmerge(model)
    close(logits(model), adapted)
    for name, weight in weights.items():
        close(model.get_parameter(name), weight, 1e-6)
    lora.merge(model)
    lora.remove(model)
    assert set(model.state_dict()) == set(weights)
    save_model(model, tmp_path)
    close(logits(load_model(tmp_path)), adapted)
    close(hf_logits(load_hf(tmp_path)), adapted, 1e-4)
