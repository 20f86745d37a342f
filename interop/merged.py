"""Base and adapter -> a whole model in a folder, as transformers and vLLM load it: bf16 weights, tokenizer, configs.

Tensors go one by one from the base's files through their adapter into the new ones, so that what is held is a file's
tensors and the adapter, never the model.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from interop.saved import fit_adapter
from model.adapters import scale_of, shifted
from model.loading import ModelConfig, check_tensors, module_name, shard_files, write_shards
from model.qwen import Qwen2_5_VL
from training.checkpoint import MANIFEST, STATE

GENERATION = "generation_config.json"


def meta_model(base):
    """The model of a checkpoint's folder without its weights: names and shapes only."""
    with torch.device("meta"):
        return Qwen2_5_VL(ModelConfig.from_folder(base))


def base_tensors(base, model):
    """Each tensor of the model, once: (our name, CPU tensor as in the file). UserError for files that do not fit."""
    expected, shapes, surplus, seen = dict(model.state_dict()), {}, [], set()
    for file in shard_files(base):
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 (a file handle, not a dict)
                name = module_name(key)
                if name in expected:
                    shapes[name] = torch.empty(shard.get_slice(key).get_shape(), device="meta")
                elif name != "lm_head.weight":
                    surplus.append(key)
    check_tensors(base, expected, shapes, surplus)  # before anything is written
    for file in shard_files(base):
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118
                name = module_name(key)
                if name in expected and name not in seen:
                    seen.add(name)
                    yield name, shard.get_tensor(key)


def merged_tensors(base, model, args, layers, own):
    """(name, bf16 tensor) of base + adapter, rounded once. own: {name: tensor} instead of the base's."""
    for name, tensor in base_tensors(base, model):
        tensor = own.get(name, tensor)
        if pair := layers.get(name.removesuffix(".weight")):
            tensor = shifted(tensor, pair["lora_A"], pair["lora_B"], scale_of(args))
        yield name, tensor.to(torch.bfloat16)


def write_merged(base, adapter, folder, limit):
    """Write base + adapter into folder. limit: bytes a file of weights. Returns the names of these files."""
    model = meta_model(base)
    args, layers, own = fit_adapter(model, adapter)
    files = write_shards(merged_tensors(base, model, args, layers, own), folder, limit)
    config = dict(model.config.raw)
    config |= {key: "bfloat16" for key in ("torch_dtype", "dtype") if key in config} or {"torch_dtype": "bfloat16"}
    write(folder / "config.json", config)
    write(folder / GENERATION, generation_config(base, config))
    if (adapter / STATE).is_file():  # which frames it was trained on: infer.py reads clips the same way
        shutil.copyfile(adapter / STATE, folder / STATE)
    copy_small_files(base, folder)
    return files


def write(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def generation_config(base, config):
    """Greedy, as infer.py answers: the released file's near-zero temperature and repetition_penalty 1.05 would give
    other tokens than the model was trained and measured with. Its stop tokens stay."""
    path = base / GENERATION
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: found.get(name, config.get(name)) for name in names}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ids["bos_token_id"]  # <|endoftext|> both, in every Qwen2.5-VL
    if "eos_token_id" not in found:
        ids["eos_token_id"] = sorted({i for i in (ids["eos_token_id"], ids["pad_token_id"]) if i is not None})
    return {name: i for name, i in ids.items() if i is not None} | {"do_sample": False}


def copy_small_files(base, folder):
    """Tokenizer, chat template and preprocessing beside a whole model's weights, so that its folder loads by itself."""
    for path in Path(base).iterdir():
        small = path.suffix in (".json", ".txt", ".jinja") and not path.name.endswith(".index.json")
        if path.is_file() and small and path.name != MANIFEST and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
