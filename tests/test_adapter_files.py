"""Adapters: the layer, where they go, what is trained, merged, switched off; PEFT reads our files, we read PEFT's."""

import dataclasses
import json
import shutil
from unittest.mock import MagicMock

import peft
import pytest
import torch
from conftest import TINY, Sequence, move_adapters, pack_sequences, refused, write
from make_peft4_adapter import FOLDER as PEFT4
from make_peft4_adapter import GRID, IDS, arithmetic_base, patches
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import lora
from adapter_files import TENSORS, load_adapter, save_adapter
from config import SFT, LoraArgs
from lora import main
from model.adapters import BlockAdapters, LoRALinear, Unpack
from model.loading import load_model
from model.packed import Packed, Segments

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


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def with_args(**changes):
    return dataclasses.replace(LoraArgs(lora_rank=4, lora_alpha=8), **changes)


# -- The layer


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


@pytest.mark.parametrize(("changes", "counts"), [
    ({}, [10, 2, 14]),
    ({"tune_merger": True}, [10, 0, 14]),
    ({"llm_lora": False}, [10, 2, 0]),
    ({"num_lora_modules": 15}, [0, 1, 14]),
    ({"lora_namespan_exclude": ["lm_head", "mlp"]}, [4, 0, 8]),
    ({"lora_enable": False, "freeze_vision_tower": False, "tune_merger": True}, [0, 0, 0]),
])  # fmt: skip
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


def test_optimizer_groups(model):
    args = SFT(vision_lora=False, freeze_vision_tower=False, tune_merger=True, merger_lr=1e-5, weight_decay=0.1)
    lora.inject(model, args)
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in lora.param_groups(model, args)}
    rates = {"vision": args.learning_rate, "merger": 1e-5}
    assert groups.pop("llm") == (args.learning_rate, 0.1)
    assert groups == {f"{c}{kind}": (rates[c], decay) for c in rates for kind, decay in (("", 0.1), (" no decay", 0.0))}


def test_reference_is_the_start_while_training_goes_on(model):
    lora.inject(model, with_args(tune_merger=True))
    move_adapters(model)
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
    lora.inject(model, with_args(lora_dropout=0.5))
    start = [layer.lora_A.abs().max() * layer.in_features**0.5 for _, layer in lora.lora_layers(model)]
    assert 0.5 < min(start) and max(start) <= 1
    for _, block in model.named_modules():
        if hasattr(block, "adapters"):
            block.adapters.data = 2 * block.adapters.data  # another storage, as DeepSpeed gives it
    move_adapters(model)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 0.1
    assert not torch.equal(loss(model.train()), loss(model)), "dropout, while training alone"
    with lora.disabled(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)
    lora.merge(model)
    close(logits(model), adapted)
    assert set(model.state_dict()) == keys and not lora.lora_layers(model)


# -- Files


Q = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


def load_hf(base=TINY, adapter=None):
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    return hf if adapter is None else peft.PeftModel.from_pretrained(hf, adapter)


def make_adapter(folder, **changes):
    """An adapter of the tiny model, as after training -> the model with it."""
    torch.manual_seed(0)  # of A's start: rounding is then the same whatever ran before
    model = load()
    lora.inject(model, with_args(**changes))
    move_adapters(model)
    save_adapter(model, folder, TINY)
    return model


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "num_lora_modules": 15}, {"tune_merger": True}])
def test_peft_loads_ours(tmp_path, changes):
    model = make_adapter(tmp_path, **changes)
    hf = load_hf(adapter=tmp_path)
    assert (logits(model) - logits(load())).abs().max() > 0.1
    close(hf_logits(hf, model), logits(model), 1e-3)
    again, tensors = load(), dict(model.named_parameters())
    load_adapter(again, tmp_path)
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in again.named_parameters())
    save_adapter(again, tmp_path / "again", TINY)  # what came with the adapter leaves with it
    hf.save_pretrained(tmp_path / "peft")
    ours = load_file(tmp_path / TENSORS)
    for folder in ["again"] if changes else ["again", "peft"]:
        other = load_file(tmp_path / folder / TENSORS)
        assert ours.keys() == other.keys() and all(torch.equal(ours[key], other[key]) for key in ours)


def make_peft(folder, **options):
    """PEFT's own file, with what it trains drawn at random."""
    hf = peft.get_peft_model(load_hf(), peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "lora_A" not in name and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    hf.save_pretrained(folder)
    return hf


@pytest.mark.parametrize("options", [
    {"target_modules": "all-linear", "use_rslora": True},
    {"target_modules": r".*(language_model.*o_proj|blocks.*gate_proj|merger\.mlp\.[02])", "lora_dropout": 0.1},
    {"target_modules": ["v_proj", "qkv"], "bias": "lora_only"},
    {"target_modules": ["q_proj"], "modules_to_save": ["merger"]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
])  # fmt: skip
def test_we_load_pefts(tmp_path, options):
    hf, model = make_peft(tmp_path, **options), load()
    before = logits(model)
    args = load_adapter(model, tmp_path)
    assert (logits(model) - before).abs().max() > 1e-3
    close(logits(model), hf_logits(hf, model), 1e-3)
    assert (args.lora_rank, args.lora_alpha, args.use_rslora) == (4, 8, options.get("use_rslora", False))


def test_an_adapter_of_transformers_4_loads(tmp_path):
    """tests/peft4 was written by PEFT 0.14.0 under transformers 4.51.3, with the logits that it gave there."""
    model = load(arithmetic_base(tmp_path / "base"))
    positions = torch.arange(len(IDS)).expand(3, -1).contiguous()
    batch = Packed(torch.tensor(IDS), positions, Segments.causal([len(IDS)]), patches(), [GRID])
    expected = load_file(PEFT4 / "expected.safetensors")["logits"]
    with torch.no_grad():
        assert (model.logits(batch)[-2:] - expected).abs().max() > 0.05
        load_adapter(model, PEFT4)
        close(model.logits(batch)[-2:], expected)
    save_adapter(model, tmp_path / "new", tmp_path / "base")  # written with the newer keys, which PEFT here looks for
    hf = load_hf(tmp_path / "base", tmp_path / "new")
    close(hf_logits(hf, model), logits(model), 1e-3)


# -- What does not fit


@pytest.mark.parametrize(("options", "words"), [
    ({"use_dora": True}, "use_dora = True in adapter_config.json, expected plain LoRA; merge it with PEFT"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"modules_to_save": ["embed_tokens"]}, "modules_to_save = ['embed_tokens']"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
    ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
])  # fmt: skip
def test_what_is_no_plain_lora_is_refused_in_one_line(tmp_path, options, words):
    make_peft(tmp_path, **{"target_modules": ["q_proj"]} | options)
    model = load()
    message = refused(load_adapter, model, tmp_path)
    assert str(tmp_path) in message and words in message and not lora.lora_layers(model)


# -- The commands


def test_a_merged_folder_is_a_whole_model(tmp_path):
    """transformers loads model, tokenizer and generation config from the folder alone; one rounding of the sum."""
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "model"
    shutil.copytree(TINY, base)
    whole = list(load_file(base / "model.safetensors").items())
    (base / "model.safetensors").unlink()
    for i in range(4):
        save_file(dict(whole[i::4]), base / f"part{i}.safetensors")
    index = {"weight_map": {key: f"part{i}.safetensors" for i in range(4) for key, _ in whole[i::4]}}
    write(base / "model.safetensors.index.json", index)
    hub = {"eos_token_id": [474, 472], "do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6}
    write(base / "generation_config.json", hub)
    model = make_adapter(folder, tune_merger=True)
    main(["merge", str(folder), str(out), "--model_id", str(base)])
    lora.merge(model)
    merged = load(out).state_dict()
    assert all(merged[name].equal(weight.bfloat16().float()) for name, weight in model.state_dict().items())
    hf, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    close(hf_logits(hf, model), logits(load(out)), 1e-3)
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(out).chat_template
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [474, 472]}  # greedy
    assert len(list(out.glob("part*.safetensors"))) == 4


def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    make_adapter(tmp_path / "adapter")
    full = MagicMock(side_effect=SafetensorError("No space left on device"))
    monkeypatch.setattr("model.loading.save_file", full)
    message = refused(main, ["merge", str(tmp_path / "adapter"), str(tmp_path / "new")])
    assert "cannot be written (No space left on device" in message
    assert not list(tmp_path.glob("*new*"))
