"""Folders made to do harm: each is really built, with code that would leave a trace, and must leave none.

The trace is a file that the code would make. A test holds that it is absent after the loader has refused the folder, in
one line, or has ignored what was put there.
"""

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


@pytest.fixture
def trace(tmp_path):
    """A path that hostile code makes; nothing may have made it by the end of a test."""
    path = tmp_path / "trace"
    yield path
    assert not path.exists(), "code from a file was run"


class Bomb:
    """Unpickled, it makes the trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def code(trace):
    """A module that makes the trace as soon as it is imported."""
    return f"import os\nos.mkdir({str(trace)!r})\nclass Model:\n    pass\n"


def template(trace):
    """A chat template that reaches for the system, in the ways that sandboxes were left by."""
    ways = ["cycler.__init__.__globals__.os", "''.__class__.__mro__[1].__subclasses__()", "self.__init__.__globals__"]
    calls = f"{{{{ cycler.__init__.__globals__.os.mkdir({str(trace)!r}) }}}}"
    return calls + "".join(f"{{{{ {way} }}}}" for way in ways)


@pytest.fixture
def model_folder(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter_folder(tmp_path):
    model = load_model(TINY)
    inject(model, LoraArgs(lora_rank=2))
    save_adapter(model, tmp_path / "adapter", "assets/tiny")
    return tmp_path / "adapter"


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def told(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_traps_work(tmp_path):
    """The bomb goes off where it is unpickled: the tests below could fail."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "a")))
    exec(code(tmp_path / "b"), {})
    import jinja2

    jinja2.Template(template(tmp_path / "c")).render()
    assert all((tmp_path / name).is_dir() for name in "abc")


# -- Model folders


def test_pickled_weights_are_not_read(model_folder, trace):
    weights = model_folder / "model.safetensors"
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "optimizer.pt"):
        torch.save({"model.embed_tokens.weight": Bomb(trace)}, model_folder / name)
    load_model(model_folder)  # beside the true ones they are not looked at
    weights.unlink()
    assert "no model.safetensors" in told(load_model, model_folder)
    weights.write_bytes(pickle.dumps(Bomb(trace)))  # under a false name
    assert "not a whole safetensors file" in told(load_model, model_folder)
    torch.save({"a": Bomb(trace)}, weights)
    assert "not a whole safetensors file" in told(load_model, model_folder)


def test_code_beside_a_model_is_not_imported(model_folder, trace):
    for name in ("modeling_qwen.py", "configuration_qwen.py", "__init__.py", "sitecustomize.py"):
        (model_folder / name).write_text(code(trace))
    names = {"AutoConfig": "configuration_qwen.Model", "AutoModel": "modeling_qwen.Model"}
    names["AutoModelForCausalLM"] = "elsewhere/repo--modeling_qwen.Model"
    change_json(model_folder / "config.json", auto_map=names, trust_remote_code=True, architectures=["Model"])
    before = set(sys.modules)
    load_model(model_folder)
    assert not any("qwen" in name and str(model_folder) in str(sys.modules[name]) for name in set(sys.modules) - before)


def test_a_tokenizer_folder_runs_nothing(model_folder, trace):
    """With tokenizer.json, and without it, where transformers reads the rest."""
    (model_folder / "tokenization_bad.py").write_text(code(trace))
    (model_folder / "chat_template.jinja").write_text(template(trace))
    (model_folder / "chat_template.json").write_text(json.dumps({"chat_template": template(trace)}))
    for name in ("vocab.pkl", "tokenizer.pickle"):
        (model_folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    tokenizer = json.loads((model_folder / "tokenizer.json").read_text())
    bad = {"auto_map": {"AutoTokenizer": ["tokenization_bad.Model"] * 2}, "trust_remote_code": True}
    bad |= {"chat_template": template(trace), "tokenizer_class": "Model", "name_or_path": "elsewhere/repo"}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(bad))
    assert load_tokenizer(model_folder).encode("up").ids == load_tokenizer(TINY).encode("up").ids
    (model_folder / "tokenizer.json").unlink()
    (model_folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    (model_folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    found = load_tokenizer(model_folder)  # Qwen2's own class, whatever the folder says
    assert type(found).__module__.startswith("transformers.models.qwen2.")
    assert found.backend_tokenizer.encode("up").ids == load_tokenizer(TINY).encode("up").ids
    (model_folder / "tokenizer.model").write_bytes(pickle.dumps(Bomb(trace)))
    assert "no tokenizer could be loaded" in told(load_tokenizer, model_folder)
    (model_folder / "tokenizer.model").unlink()
    (model_folder / "vocab.json").write_text("[" * 100_000)
    assert "no tokenizer could be loaded" in told(load_tokenizer, model_folder)
    (model_folder / "tokenizer.json").write_bytes(pickle.dumps(Bomb(trace)))
    assert "tokenizer.json" in told(load_tokenizer, model_folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "http://a.b", "..", ""])
def test_shards_that_lead_out(model_folder, name):
    shutil.copy(model_folder / "model.safetensors", model_folder.parent / "other.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is not a plain file name" in told(load_model, model_folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', "[" * 10**5, "\xff", ""])
def test_an_index_of_another_form(model_folder, text):
    (model_folder / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    assert "model.safetensors.index.json" in told(load_model, model_folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_no_file_where_one_is_expected(model_folder, name, kind):
    """A fifo would block whoever opens it."""
    (model_folder / name).unlink()
    os.mkfifo(model_folder / name) if kind == "fifo" else (model_folder / name).mkdir()
    load = load_tokenizer if name == "tokenizer.json" else load_model
    assert str(model_folder) in told(load, model_folder)


@pytest.mark.parametrize("name", ["http://evil/x", "https://evil/m", "file:///e", "//evil/x", "a/b/c"])
def test_a_models_name_is_a_folder_or_a_hub_id(name):
    assert "not a hub id" in told(resolve_folder, name)


@pytest.mark.parametrize(
    "change",
    [dict(hidden_size=10**9), dict(num_hidden_layers=10**9), dict(vocab_size=-1), dict(hidden_size="x"),
     dict(num_attention_heads=0)],
)  # fmt: skip
def test_a_config_of_absurd_sizes(model_folder, change):
    """Refused by comparing it with the weights' headers: nothing of that size is made."""
    change_json(model_folder / "config.json", **change)
    assert str(model_folder) in told(load_model, model_folder)


# -- Adapters and checkpoints


def test_a_pickled_adapter_is_not_read(adapter_folder, trace):
    torch.save({"base_model.model.a.lora_A.weight": Bomb(trace)}, adapter_folder / "adapter_model.bin")
    load_adapter(load_model(TINY), adapter_folder)
    (adapter_folder / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in told(load_adapter, load_model(TINY), adapter_folder)
    shutil.move(adapter_folder / "adapter_model.bin", adapter_folder / "adapter_model.safetensors")
    assert "safetensors file" in told(load_adapter, load_model(TINY), adapter_folder)


@pytest.mark.parametrize(
    "change",
    [dict(r="x"), dict(r=-1), dict(r=10**12), dict(r=[1]), dict(lora_alpha="__import__('os')"), dict(lora_alpha=None),
     dict(lora_dropout="x"), dict(peft_type="__main__.Bomb")],
)  # fmt: skip
def test_an_adapters_config_of_another_form(adapter_folder, change):
    change_json(adapter_folder / "adapter_config.json", **change)
    assert "adapter" in told(load_adapter, load_model(TINY), adapter_folder)


def test_an_adapters_patterns_are_not_run(adapter_folder):
    """One may take for ever to match. The tensors say which layers are meant."""
    for wanted in ("(.+)+(.+)+(.+)+!", 3, {"a": 1}):
        change_json(adapter_folder / "adapter_config.json", target_modules=wanted)
        assert load_adapter(load_model(TINY), adapter_folder).lora_rank == 2


def test_an_adapter_names_code_and_other_models(adapter_folder, trace):
    auto = {"base_model_class": "Model", "parent_library": "bad"}
    change_json(adapter_folder / "adapter_config.json", auto_mapping=auto, base_model_name_or_path="http://evil.test/x")
    for name in ("bad.py", "__init__.py"):
        (adapter_folder / name).write_text(code(trace))
    assert load_adapter(load_model(TINY), adapter_folder).lora_rank == 2


def test_an_adapter_does_not_open_doors(adapter_folder):
    """What was trained with is taken over from an adapter's files: how clips are seen, not what may be read."""
    config = {"nframes": 4, "image_folder": "/", "cache_mb": 10**9, "model_id": "evil/model"}
    (adapter_folder / checkpoint.STATE).write_text(json.dumps({"config": config}))
    cfg = Infer(video="a.mp4")
    cfg.given = set()
    assert read_as_trained(cfg, adapter_folder) == ["--nframes 4, as in training"]
    assert cfg.image_folder is None and cfg.cache_mb == 1024 and cfg.model_id == "assets/tiny"


def test_what_an_adapter_says_of_clips_is_checked(adapter_folder):
    wrong = [{"nframes": "x"}, {"nframes": -5}, {"video_max_pixels": "9" * 50}, {"fps": float("nan")}, {"fps": [1]}, []]
    for config in wrong:
        (adapter_folder / checkpoint.STATE).write_text(json.dumps({"config": config}))
        cfg = Infer(video="a.mp4")
        cfg.given = set()
        assert checkpoint.STATE in told(read_as_trained, cfg, adapter_folder)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", "a/../../outside.json", ""])
def test_a_manifest_that_leads_out(tmp_path, name):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (tmp_path / "outside.json").write_text("{}")
    (folder / checkpoint.MANIFEST).write_text(json.dumps({name: {"bytes": 2, "sha256": "0"}}))
    assert "manifest" in checkpoint.what_is_broken(folder)


def test_tensors_that_are_not_ours(adapter_folder):
    path = adapter_folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"../../x": torch.zeros(1)}, path)
    assert "expected none of this name" in told(load_adapter, load_model(TINY), adapter_folder)
    save_file({key: value * float("nan") for key, value in tensors.items()}, path)
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")  # a header that claims an exabyte
    assert "safetensors file" in told(load_adapter, load_model(TINY), adapter_folder)


def test_config_json_is_data(model_folder):
    for text in ("[]", "1", "[" * 100_000, '{"model_type": "qwen2_5_vl", "vision_config": 3}', "\xff"):
        (model_folder / "config.json").write_text(text, encoding="latin-1")
        assert "config" in told(ModelConfig.from_folder, model_folder)
