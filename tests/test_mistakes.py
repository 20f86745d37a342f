"""A slip is answered in one line, with the nearest valid thing, and nothing is written; other models are refused,
--help is quick."""

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, cases, python, refused, write
from make_peft4_adapter import arithmetic_base
from safetensors.torch import load_file, save_file
from test_adapter_files import make_adapter

import checkpoint
import clips
import generate
import infer
import lora
import report
from adapter_files import load_adapter, save_adapter
from checkpoint import find_adapter
from config import SFT, Generate, Infer, LoraArgs, parse
from data import load_tokenizer, read_records
from infer import read_as_trained
from lora import inject, set_trainable
from model.loading import ModelConfig, load_model, resolve_folder
from report import read_run
from rewards import load_rewards


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with things that one can misspell."""
    monkeypatch.chdir(tmp_path)
    for name in ("output/video_lora/checkpoint-10/a", "data/train.json", "models/qwen_3b/a", "configs/mine.py"):
        write(tmp_path / name, "")
    write(tmp_path / "my_rewards.py", "")


@pytest.mark.parametrize("function, wrong, right", [
    (lambda file: parse(SFT, ["--config", file]), "configs/mien.py", "configs/mine.py"),
    (load_rewards, "acuracy,format", "accuracy"), (load_rewards, "my_reward.py:short", "my_rewards.py"),
    (find_adapter, "output/vidoe_lora", "output/video_lora"), (find_adapter, "outptu/video_lora", "output"),
    (find_adapter, "output/video_lora/checkpoint-11", "output/video_lora/checkpoint-10"),
    (resolve_folder, "models/qwen_3", "models/qwen_3b"), (read_records, "data/trian.json", "data/train.json"),
    (read_run, Path("output/video_lor"), "output/video_lora"),
])  # fmt: skip
def test_the_nearest_valid_thing_is_named(here, monkeypatch, function, wrong, right):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"did you mean {right}?" in refused(function, wrong)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """An adapter, a base that is not its own, clips in class folders, a broken annotation file, runs."""
    folder = tmp_path_factory.mktemp("things")
    make_adapter(folder / "adapter")
    arithmetic_base(folder / "other")
    for path in ("one/rises", "two/rises", "two/falls"):
        (folder / path).mkdir(parents=True)
        clips.write_mp4(folder / path / "0.mp4", np.zeros((8, 64, 64, 3), np.uint8))
    question = {"video": "a.mp4", "question": "?", "candidates": ["1", "2"], "answer": "1"}
    files = {"broken/lvb_val.json": [{"id": "l0"}], "mvbench/moving_count.json": [question], "runs/a/run.json": {}}
    for path, content in (files | {"runs/a/best.json": "{"}).items():
        write(folder / path, content)
    return folder


SCRIPTS = {"infer": infer.main, "lora": lora.main, "report": report.main}
SCRIPTS["generate"] = lambda words: generate.generate(parse(Generate, words))


@pytest.mark.parametrize("command, words", cases("refused"))
def test_a_command_that_cannot_be_run_is_one_line_and_writes_nothing(things, monkeypatch, command, words):
    monkeypatch.chdir(things)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    script, *argv = command.replace("TINY", str(TINY)).split()
    before = sorted(things.rglob("*"))
    assert re.search(words, refused(SCRIPTS[script], argv)) and sorted(things.rglob("*")) == before


def test_help_of_every_script_needs_no_torch():
    code = "import runpy, sys\nsys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    for name in "generate train_sft train_grpo infer data lora report quickstart".split():
        done = python("-c", code, f"{name}.py", "--help")
        assert done.returncode == 0, (name, done.stderr)
        assert name == "quickstart" or f"{name}.py [" in done.stdout.splitlines()[0], done.stdout
    for name in ("missing.mp4", "is it moving? " * 20):
        done = python("infer.py", name)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {name}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("change, message", [
    ({"rope_scaling": {"type": "yarn", "factor": 4, "mrope_section": [4, 6, 6]}}, "rope_scaling type is yarn"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"vision_config": {"hidden_act": "quick_gelu"}}, "vision_config's hidden_act is quick_gelu"),
    ({"hidden_size": 60}, "hidden_size is 60, expected a multiple of "),
    ({"vision_config": {"num_heads": 5}}, "vision_config's hidden_size is "),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "mrope_section is [1, 2, 3], expected a sum"),
])  # fmt: skip
def test_other_models_are_refused(change, message):
    raw = json.loads((TINY / "config.json").read_text())
    change = {key: raw[key] | value if key == "vision_config" else value for key, value in change.items()}
    assert message in refused(ModelConfig.from_dict, raw | change, "config.json")


def test_a_run_that_trains_nothing_or_too_much_is_refused():
    assert "nothing is left to train" in refused(set_trainable, load_model(TINY), LoraArgs(lora_enable=False))
    assert "got 1000000, expected at most 192:" in refused(inject, load_model(TINY), LoraArgs(lora_rank=1_000_000))


# -- Folders made to do harm: nothing in them is run, and what is refused is refused in one line


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


def test_wrong_tensors_are_named(folders):
    path = folders[0] / "model.safetensors"
    tensors = load_file(path) | {"model.layers.9.bogus": torch.zeros(1), "visual.merger.ln_q.weight": torch.zeros(7)}
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    message = refused(load_model, folders[0])
    assert "9.bogus: got (1,), expected none" in message and "norm.weight: got no tensor" in message
    assert "ln_q.weight: got (7,), expec" in message


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
    for text in ("[]", '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}', "[" * 10**5, "\xff", ""):
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
    cfg, state = Infer(video="a.mp4"), folders[1] / checkpoint.STATE
    cfg.given = set()
    for config in ({"nframes": "x"}, {"nframes": -5}, {"fps": float("nan")}, {"fps": [1]}, []):
        assert checkpoint.STATE in refused(read_as_trained, cfg, config, state)
    own = {"nframes": 4, "image_folder": "/", "cache_mb": 10**9, "model_id": "evil/model"}
    assert read_as_trained(cfg, own, state) == ["--nframes 4, as in training"]
    assert cfg.image_folder is None and cfg.cache_mb == 1024 and cfg.model_id == "assets/tiny"


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
    tokenizer, text = load_tokenizer(model_folder), "up " * 9
    tokenizer.enable_truncation(4)  # a file that says so is read whole all the same
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(model_folder / "tokenizer.json"))
    assert load_tokenizer(model_folder).encode(text).ids == load_tokenizer(TINY).encode(text).ids
    assert not any(name in sys.modules for name in ("modeling_qwen", "tokenization_bad"))
    (model_folder / "tokenizer.json").write_bytes(pickle.dumps(Bomb(trace)))
    assert "tokenizer.json" in refused(load_tokenizer, model_folder)
