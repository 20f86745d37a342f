"""Checkpoints in and out: key styles of the hub and of transformers, shards, and what is wrong with them, named."""

import json

import pytest
import torch
from conftest import config_dict, random_model
from safetensors.torch import load_file, save_file

from model import UserError
from model.loading import ModelConfig, load_model, not_finite, save_model


def test_checkpoint_round_trip_and_key_styles(tmp_path, oracle):
    ours, theirs, folder = oracle("untied")
    theirs.save_pretrained(tmp_path / "hf")
    new = tmp_path / "new"  # the key names of transformers 4.52 and later, nested text_config, two shards
    new.mkdir()
    tensors = {
        ("model." + k if k.startswith("visual") else k.replace("model.", "model.language_model.", 1)): v.clone()
        for k, v in ours.state_dict().items()
    }
    half = len(tensors) // 2
    shards = dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])
    for i, shard in enumerate(shards):
        save_file(shard, new / f"part{i}.safetensors")
    index = {"weight_map": {k: f"part{i}.safetensors" for i, shard in enumerate(shards) for k in shard}}
    (new / "model.safetensors.index.json").write_text(json.dumps(index))
    (new / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    for where in (folder, tmp_path / "hf", new):
        again = load_model(where)
        assert all(again.state_dict()[name].equal(tensor) for name, tensor in ours.state_dict().items()), where
    assert load_model(folder, dtype=torch.bfloat16).head_weight.dtype == torch.bfloat16


def test_wrong_tensors_are_named(tmp_path):
    save_model(random_model("tied"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.9.bogus"] = torch.zeros(1)
    tensors["visual.merger.ln_q.weight"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors")
    wrong = (
        r"9\.bogus: found \(1,\), expected none.*norm\.weight: found no tensor.*ln_q\.weight: found \(7,\), expected"
    )
    with pytest.raises(UserError, match=wrong):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "Qwen/not-downloaded"])
def test_unknown_model_is_one_clear_line(name):
    with pytest.raises(UserError, match=f"^{name}: no such folder[^\n]*$"):
        load_model(name)


def test_numbers_that_are_not_finite_are_named():
    model = random_model("tied")
    assert not_finite(model) == []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
        model.visual.merger.ln_q.weight[0] = torch.inf
    assert not_finite(model) == ["visual.merger.ln_q.weight", "model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize(("missing", "name"), [("hidden_size", "hidden_size"), ("rope_scaling", "mrope_section")])
def test_a_missing_size_is_named(missing, name):
    raw = config_dict("tied")
    del raw[missing]
    with pytest.raises(UserError, match=f"missing 1 required.*'{name}'"):
        ModelConfig.from_dict(raw)
