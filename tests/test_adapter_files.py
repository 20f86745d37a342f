"""Adapter files: PEFT reads ours and we read PEFT's, what does not fit is named, merged models open in transformers."""

import json
import shutil

import peft
import pytest
import torch
from make_peft4_adapter import FOLDER as PEFT4
from make_peft4_adapter import GRID, IDS, arithmetic_base, patches
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_lora import TINY, close, hf_logits, load, logits, randomise, with_args
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import lora
from adapter_files import CONFIG, TENSORS, load_adapter, save_adapter
from lora import main
from model import UserError
from model.packed import Packed, Segments

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
    randomise(model)
    save_adapter(model, folder, TINY)
    return model


@pytest.fixture
def adapter(tmp_path):
    make_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


# -- PEFT is the oracle


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


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": r".*(language_model.*o_proj|blocks.*gate_proj|merger\.mlp\.[02])", "lora_dropout": 0.1},
        {"target_modules": ["v_proj", "qkv"], "bias": "lora_only"},
        {"target_modules": ["q_proj"], "modules_to_save": ["merger"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ],
)
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora = True in adapter_config.json, expected plain LoRA; merge it with PEFT"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save = ['embed_tokens']"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
    ],
)
def test_what_is_no_plain_lora_is_refused_in_one_line(tmp_path, options, words):
    make_peft(tmp_path, **{"target_modules": ["q_proj"]} | options)
    model = load()
    with pytest.raises(UserError) as error:
        load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)
    assert not lora.lora_layers(model)


def test_what_does_not_fit_is_named(adapter):
    original, model = load_file(adapter / TENSORS), load()
    for change, words in [
        ({B: None}, r"model.layers.1.self_attn.q_proj.lora_B: found no tensor.*is --model_id its base"),
        ({A: torch.zeros(4, 31)}, r"q_proj.lora_A: found \(4, 31\), expected \(4, 64\)"),
        ({f"{Q}x.lora_A.weight": torch.zeros(4, 64)}, "expected none of this name"),
    ]:
        save_file({k: tensor for k, tensor in (original | change).items() if tensor is not None}, adapter / TENSORS)
        with pytest.raises(UserError, match=words):
            load_adapter(model, adapter)
        assert not lora.lora_layers(model)
    for name, text in ((CONFIG, '{"r": 4,\n'), (CONFIG, '{"peft_type": "LORA"}'), (TENSORS, "no tensors")):
        (adapter / name).write_text(text)
        with pytest.raises(UserError, match=name):
            load_adapter(model, adapter)


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
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    hub = {"eos_token_id": [474, 472], "do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6}
    (base / "generation_config.json").write_text(json.dumps(hub))
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


def test_check(adapter, capsys):
    tensors = load_file(adapter / TENSORS)
    tensors[B] *= 0
    # PEFT's name for the adapter may be in the keys
    save_file({k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}, adapter / TENSORS)
    main(["check", str(adapter)])
    out = capsys.readouterr().out
    facts = [
        "rank      4, alpha 8",
        "26 layers: vision 10, merger 2, llm 14",
        "1 of them untrained",
        "bf16: every tensor",
    ]
    assert all(fact in out for fact in [str(adapter), str(TINY), *facts]), out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("check output/nowhere", "no such folder"),
        ("check ADAPTER --model_id OTHER", "is --model_id its base model"),
        ("merge ADAPTER", "--output_dir: found None, expected a new folder"),
        ("merge ADAPTER NEW --model_id nowhere", "no such folder"),
        ("merge ADAPTER NEW --model_id OTHER", "is --model_id its base model"),
        ("merge ADAPTER OTHER", "already holds something"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(adapter, tmp_path, argv, words):
    arithmetic_base(tmp_path / "OTHER")
    before = sorted(tmp_path.rglob("*"))
    names = {"ADAPTER": adapter, "NEW": tmp_path / "NEW", "OTHER": tmp_path / "OTHER"}
    with pytest.raises(UserError, match=words) as error:
        main([str(names.get(word, word)) for word in argv.split()])
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_is_full_is_one_line(adapter, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("adapter_files.save_file", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        main(["merge", str(adapter), str(tmp_path / "new")])
    assert not list(tmp_path.glob("*new*"))
