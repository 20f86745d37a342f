"""Folders made to do harm: nothing in them is run, and what is refused is refused in one line."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from adapter_files import load_adapter, save_adapter
from config import Infer, LoraArgs
from data import load_tokenizer
from infer import read_as_trained
from lora import inject
from model import UserError
from model.loading import ModelConfig, load_model, resolve_folder

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"
pytestmark = pytest.mark.filterwarnings("ignore")


class Bomb(str):
    """A path: unpickled, it makes a folder there."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.fixture
def folders(tmp_path):
    """(a model's, an adapter's, a path that hostile code makes: nothing may have made it by the end of a test)"""
    model = load_model(TINY)
    inject(model, LoraArgs(lora_rank=2))
    save_adapter(model, tmp_path / "adapter", "assets/tiny")
    yield shutil.copytree(TINY, tmp_path / "model"), tmp_path / "adapter", tmp_path / "trace"
    assert not (tmp_path / "trace").exists(), "code from a file was run"


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pickled_weights_are_not_read(folders, tmp_path):
    model_folder, adapter_folder, trace = folders
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it_works")))
    assert (tmp_path / "it_works").is_dir()
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pt"):
        torch.save({"model.embed_tokens.weight": Bomb(trace)}, model_folder / name)
    torch.save({"base_model.model.a.lora_A.weight": Bomb(trace)}, adapter_folder / "adapter_model.bin")
    load_adapter(load_model(model_folder), adapter_folder)  # beside the true ones they are not looked at
    weights, adapter = model_folder / "model.safetensors", adapter_folder / "adapter_model.safetensors"
    weights.unlink(), adapter.unlink()
    assert "model.safetensors is missing" in refused(load_model, model_folder)
    assert "no adapter_model.safetensors" in refused(load_adapter, load_model(TINY), adapter_folder)
    for content in (pickle.dumps(Bomb(trace)), (2**60).to_bytes(8, "little") + b"{}"):  # the second claims an exabyte
        weights.write_bytes(content), adapter.write_bytes(content)
        assert "not a whole safetensors file" in refused(load_model, model_folder)
        assert "safetensors file" in refused(load_adapter, load_model(TINY), adapter_folder)


def test_code_and_templates_in_a_folder_are_not_run(folders):
    model_folder, adapter_folder, trace = folders
    code = f"import os\nos.mkdir({str(trace)!r})\nclass Model:\n    pass\n"
    template = f"{{{{ cycler.__init__.__globals__.os.mkdir({str(trace)!r}) }}}}"
    for name in ("modeling_qwen.py", "tokenization_bad.py", "__init__.py", "sitecustomize.py"):
        (model_folder / name).write_text(code)
        (adapter_folder / name).write_text(code)
    names = {"AutoConfig": "modeling_qwen.Model", "AutoModel": "elsewhere/repo--modeling_qwen.Model"}
    change_json(model_folder / "config.json", auto_map=names, trust_remote_code=True, architectures=["Model"])
    auto = {"base_model_class": "Model", "parent_library": "modeling_qwen"}
    change_json(adapter_folder / "adapter_config.json", auto_mapping=auto, base_model_name_or_path="http://evil.test/x")
    (model_folder / "chat_template.jinja").write_text(template)
    bad = {"auto_map": {"AutoTokenizer": ["tokenization_bad.Model"] * 2}, "chat_template": template}
    change_json(model_folder / "tokenizer_config.json", **bad, trust_remote_code=True, tokenizer_class="Model")
    assert load_adapter(load_model(model_folder), adapter_folder).lora_rank == 2
    assert load_tokenizer(model_folder).encode("up").ids == load_tokenizer(TINY).encode("up").ids
    assert not any(name in sys.modules for name in ("modeling_qwen", "tokenization_bad"))
    (model_folder / "tokenizer.json").write_bytes(pickle.dumps(Bomb(trace)))
    assert "tokenizer.json" in refused(load_tokenizer, model_folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "http://a.b", "..", ""])
def test_names_that_lead_out(folders, tmp_path, name):
    """A shard, a file of a checkpoint's manifest, a model's name."""
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (folders[0] / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is not a plain file name" in refused(load_model, folders[0])
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / checkpoint.MANIFEST).write_text(json.dumps({name: {"bytes": 2, "sha256": "0"}}))
    assert checkpoint.what_is_broken(tmp_path / "checkpoint-1")
    assert "not a hub id" in refused(resolve_folder, f"//evil/{name}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_no_file_where_one_is_expected(folders, name, make):
    """A fifo would block whoever opens it."""
    (folders[0] / name).unlink()
    make(folders[0] / name)
    assert str(folders[0]) in refused(load_tokenizer if name == "tokenizer.json" else load_model, folders[0])


def test_json_of_another_form(folders):
    """Sizes are compared with the weights' headers before anything of that size is made; a pattern may take for ever
    to match, and is not run."""
    model_folder, adapter_folder, _ = folders
    config, index = model_folder / "config.json", model_folder / "model.safetensors.index.json"
    whole, adapter = config.read_text(), adapter_folder / "adapter_config.json"
    for change in ({"hidden_size": 10**9}, {"num_hidden_layers": 10**9}, {"vocab_size": -1}, {"hidden_size": "x"}):
        change_json(config, **change)
        assert str(model_folder) in refused(load_model, model_folder)
        config.write_text(whole)
    for text in ("[]", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', "[" * 10**5, "\xff", ""):
        index.write_text(text, encoding="latin-1")
        assert "model.safetensors.index.json" in refused(load_model, model_folder)
    for text in ("[]", "1", "[" * 10**5, '{"model_type": "qwen2_5_vl", "vision_config": 3}', "\xff"):
        config.write_text(text, encoding="latin-1")
        assert "config" in refused(ModelConfig.from_folder, model_folder)
    model, whole = load_model(TINY), adapter.read_text()
    for change in ({"r": "x"}, {"r": -1}, {"r": 10**12}, {"lora_alpha": "__import__('os')"}, {"lora_dropout": "x"}):
        change_json(adapter, **change)
        assert "adapter" in refused(load_adapter, model, adapter_folder)
        adapter.write_text(whole)
    change_json(adapter, target_modules="(.+)+(.+)+(.+)+!")
    assert load_adapter(load_model(TINY), adapter_folder).lora_rank == 2
    path = adapter_folder / "adapter_model.safetensors"
    save_file(load_file(path) | {"../../x": torch.zeros(1)}, path)
    assert "expected none of this name" in refused(load_adapter, load_model(TINY), adapter_folder)


def test_what_is_taken_over_from_an_adapter(folders):
    """How clips are seen, checked; not what may be read."""
    adapter_folder, cfg = folders[1], Infer(video="a.mp4")
    state = adapter_folder / checkpoint.STATE
    cfg.given = set()
    for config in ({"nframes": "x"}, {"nframes": -5}, {"fps": float("nan")}, {"fps": [1]}, []):
        state.write_text(json.dumps({"config": config}))
        assert checkpoint.STATE in refused(read_as_trained, cfg, adapter_folder)
    own = {"nframes": 4, "image_folder": "/", "cache_mb": 10**9, "model_id": "evil/model"}
    state.write_text(json.dumps({"config": own}))
    assert read_as_trained(cfg, adapter_folder) == ["--nframes 4, as in training"]
    assert cfg.image_folder is None and cfg.cache_mb == 1024 and cfg.model_id == "assets/tiny"
