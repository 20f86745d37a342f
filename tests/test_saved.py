"""An adapter's files: PEFT reads and writes the same ones, and what does not fit is named."""
# ruff: noqa: F811 (fixtures of test_lora.py)

import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import ARGS, COUNTS, base, close, hf_logits, load_hf, logits, model, randomise, with_args  # noqa: F401

import lora
from interop import saved
from model import UserError
from model.loading import load_model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "num_lora_modules": 15},
        {"lora_bias": "all", "tune_merger": True},
        {"lora_bias": "lora_only"},
    ],
)
def test_peft_loads_ours(base, model, tmp_path, changes):
    lora.inject(model, with_args(**changes))
    randomise(model)
    saved.save_adapter(model, tmp_path, base)
    hf = load_hf(base, tmp_path)
    assert (logits(model) - hf_logits(load_hf(base))).abs().max() > 0.1
    close(hf_logits(hf), logits(model), 1e-4)
    adapted = [name for name, m in hf.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(adapted) == len(lora.lora_layers(model))
    again = load_model(base)
    args = saved.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    lora.set_trainable(again, dataclasses.replace(args, lora_bias="none"))
    saved.save_adapter(again, tmp_path / "again", base)  # what came with the adapter leaves with it
    first, second = (load_file(folder / saved.TENSORS) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_our_file_has_what_pefts_has(base, model, tmp_path):
    lora.inject(model, ARGS)
    randomise(model)
    saved.save_adapter(model, tmp_path, base)
    load_hf(base, tmp_path).save_pretrained(tmp_path / "peft")
    ours, pefts = (load_file(folder / saved.TENSORS) for folder in (tmp_path, tmp_path / "peft"))
    assert ours.keys() == pefts.keys() and len(ours) == 2 * sum(COUNTS.values())
    assert all(torch.equal(ours[key], pefts[key]) for key in ours)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj", "qkv", "down_proj"], "use_rslora": True},
        {"target_modules": r".*(language_model.*o_proj|blocks.*gate_proj|merger\.mlp\.[02])", "lora_dropout": 0.1},
    ],
)
def test_we_load_pefts(base, model, tmp_path, options):
    hf = peft.get_peft_model(load_hf(base), peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    hf.save_pretrained(tmp_path)
    before = logits(model)
    args = saved.load_adapter(model, tmp_path)
    assert (logits(model) - before).abs().max() > 0.01
    close(logits(model), hf_logits(hf), 1e-4)
    assert (args.lora_rank, args.lora_alpha, args.use_rslora) == (4, 8, options.get("use_rslora", False))


def rewrite(folder, change):
    tensors = change(load_file(folder / saved.TENSORS))
    save_file(tensors, folder / saved.TENSORS)


@pytest.fixture
def adapter(base, model, tmp_path):
    lora.inject(model, ARGS)
    randomise(model)
    saved.save_adapter(model, tmp_path, base)
    return tmp_path


def test_old_keys(base, model, adapter):
    new = load_file(adapter / saved.TENSORS)
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in new
    assert "base_model.model.model.visual.blocks.0.attn.qkv.lora_B.weight" in new
    saved.save_adapter(model, adapter, base, old_keys=True)
    old = load_file(adapter / saved.TENSORS)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in old
    assert "base_model.model.visual.blocks.0.attn.qkv.lora_B.weight" in old
    again = load_model(base)
    saved.load_adapter(again, adapter)
    assert torch.equal(logits(again), logits(model))


def test_keys_with_the_adapters_name(base, model, adapter):
    rewrite(adapter, lambda t: {key.replace(".weight", ".default.weight"): value for key, value in t.items()})
    again = load_model(base)
    saved.load_adapter(again, adapter)
    assert torch.equal(logits(again), logits(model))


Q = "base_model.model.model.language_model.layers.1.self_attn.q_proj"


def without(*keys):
    return lambda t: {key: value for key, value in t.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"), ["no tensors for", "model.layers.1.self_attn.q_proj"]),
        (without(f"{Q}.lora_B.weight"), ["no tensors for", "model.layers.1.self_attn.q_proj.lora_B"]),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.zeros(4, 31)}, ["q_proj.lora_A", "(4, 31)", "(4, 32)"]),
        (lambda t: t | {f"{Q}x.lora_A.weight": torch.zeros(4, 32)}, ["no place", "q_projx"]),
        (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, ["no place", "lm_head"]),
        (lambda t: t | {f"{Q}.lora_magnitude_vector": torch.zeros(4)}, ["lora_magnitude_vector"]),
        (lambda t: t | {"base_model.model.model.visual.nothing": torch.zeros(4)}, ["visual.nothing"]),
    ],
)
def test_adapters_that_do_not_fit(base, adapter, change, words):
    rewrite(adapter, change)
    again = load_model(base)
    before = logits(again)
    with pytest.raises(UserError) as error:
        saved.load_adapter(again, adapter)
    for word in [str(adapter), *words]:
        assert word in str(error.value)
    assert not lora.lora_layers(again)
    assert torch.equal(logits(again), before)


def test_files_that_are_no_adapter(model, adapter, tmp_path):
    lora.remove(model)
    with pytest.raises(UserError, match="already"):
        lora.inject(model, ARGS)
        saved.load_adapter(model, adapter)
    lora.remove(model)
    with pytest.raises(UserError, match=saved.CONFIG):
        saved.load_adapter(model, tmp_path / "nowhere")
    config = json.loads((adapter / saved.CONFIG).read_text())
    (adapter / saved.CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        saved.load_adapter(model, adapter)
    (adapter / saved.CONFIG).write_text('{"r": 4,\n"lora_alpha": }')
    with pytest.raises(UserError, match="line 2"):
        saved.load_adapter(model, adapter)
    (adapter / saved.CONFIG).write_text(json.dumps(config))
    save_file({"base_model.model.model.visual.merger.ln_q.weight": torch.ones(32)}, adapter / saved.TENSORS)
    (adapter / saved.CONFIG).write_text(json.dumps(config | {"target_modules": "all-linear"}))
    with pytest.raises(UserError, match="no lora_A and lora_B"):
        saved.load_adapter(model, adapter)
    (adapter / saved.TENSORS).write_bytes(b"no tensors")
    with pytest.raises(UserError, match=saved.TENSORS):
        saved.load_adapter(model, adapter)
