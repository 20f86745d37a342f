"""Adapters in PEFT's file format; base and adapter as a whole model; what `python lora.py merge | check` do.

    save_adapter(model, folder, base)             what PeftModel.from_pretrained loads (transformers 4.52 and later)
    load_adapter(model, folder)                   ours or PEFT's
    write_merged(base, adapter, folder, limit)    a whole model, as transformers and vLLM load it

A PEFT adapter's keys are module names, and transformers 4.52 turned Qwen2.5-VL's module tree round: `visual.*` and
`model.layers.*` became `model.visual.*` and `model.language_model.layers.*`. Both styles are read, the newer one is
written. Plain LoRA only: DoRA, ranks by pattern and the like are refused by name.

Not a part of lora.py, for training needs none of it.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from checkpoint import MANIFEST, STATE, find_adapter, write_json, write_whole
from config import LoraArgs
from lora import COMPONENTS, FLAT, lora_layers, part_of, replace_linears
from model import UserError
from model.adapters import scale_of, shifted
from model.loading import (
    ModelConfig,
    check_tensors,
    module_name,
    resolve_folder,
    save_tensors,
    shard_files,
    write_shards,
)
from model.qwen import Qwen2_5_VL

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
GENERATION = "generation_config.json"
PREFIX = "base_model.model."  # of every key in PEFT's files
# Options of PEFT's LoraConfig that change the formula of lora.py
BEYOND_LORA = ("use_dora", "use_qalora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out")
BEYOND_LORA += ("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")
BEYOND_LORA += ("arrow_config", "kasa_config", "use_bdlora", "monteclora_config")
# Values of init_lora_weights with which PEFT changes the base too: the adapter is for weights that were never saved
CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


# -- Names


def hf_name(name):
    """Our module name (the checkpoint's words) as transformers >= 4.52 has it."""
    if name.startswith("lm_head"):
        return name
    return "model." + name if name.startswith("visual.") else re.sub(r"^model\.", "model.language_model.", name)


def our_name(name):
    """Our module name from either style."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return re.sub(r"^model\.language_model\.", "model.", name)


# -- Write


def save_adapter(model, folder, base_model):
    """Write the adapter, and whatever else is trained, to folder; base_model: the folder or hub id that it belongs to.

    Base tensors that are trained too (biases, a whole merger) are in the same file under the names they have inside a
    PeftModel, so PEFT loads them with the adapter (over the base's, which its disable_adapter does not bring back).
    """
    layers = dict(lora_layers(model))
    assert layers, "save_adapter: the model carries no adapter; save_pretrained writes a whole model"
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{hf_name(name)}.lora_A.weight"] = layer.lora_A
        tensors[f"{hf_name(name)}.lora_B.weight"] = layer.lora_B
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf != FLAT and (parameter.requires_grad or name in model.lora_base_names):
            inside = ".base_layer" if module in layers else ""
            tensors[f"{hf_name(module)}{inside}.{leaf}"] = parameter
    # copies: views of one storage cannot go into one file
    tensors = {PREFIX + key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / TENSORS)
    write_json(folder / CONFIG, adapter_config(model.lora_args, layers, base_model))


def adapter_config(args, names, base_model):
    """The fields of PEFT's LoraConfig that matter; target_modules has full names: these modules and no others."""
    alpha = int(args.lora_alpha) if args.lora_alpha == int(args.lora_alpha) else args.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": args.lora_rank,
        "lora_alpha": alpha,
        "lora_dropout": args.lora_dropout,
        "bias": args.lora_bias,
        "use_rslora": args.use_rslora,
        "target_modules": [hf_name(name) for name in names],
        "inference_mode": True,
    }


# -- Read


def read_adapter(folder):
    """-> (adapter_config dict, {key: tensor} on the CPU). UserError for what is missing, broken or not plain LoRA."""
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise UserError(f"adapter {folder}: no {name}, expected a folder that save_adapter or PEFT wrote")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"adapter {folder}: {CONFIG} is not JSON ({error}); copy the adapter again") from None
    except SafetensorError as error:
        raise UserError(f"adapter {folder}: {TENSORS} is no safetensors file ({error}); copy it again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f'adapter {folder}: {CONFIG} has no "peft_type": "LORA"; only LoRA adapters are read')
    for name, kinds, default in (("r", int, None), ("lora_alpha", int | float, None), ("lora_dropout", int | float, 0)):
        value = config.get(name, default)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 <= value < 2**20:
            raise UserError(f"adapter {folder}: {name} is {str(value)[:80]} in {CONFIG}, expected a number")
    for name in BEYOND_LORA:
        if config.get(name):
            option = f"{name} = {config[name]!r}"
            raise UserError(f"adapter {folder}: {option} in {CONFIG}, expected plain LoRA; merge it with PEFT first")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGE_THE_BASE):
        convert = "have PEFT convert it (path_initial_model_for_weight_conversion)"
        raise UserError(f"adapter {folder}: init_lora_weights = {start!r} changes the base too; {convert}")
    return config, tensors


def split_keys(tensors):
    """PEFT's tensors -> ({layer: {lora_A, lora_B}}, {base parameter: tensor}) by our names."""
    layers, base = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        # PEFT's name for the adapter, such as `default`, may stand before `weight`
        if match := re.fullmatch(r"(.+)\.(lora_[AB])(?:\.\w+)?\.weight", name):
            layers.setdefault(our_name(match[1]), {})[match[2]] = tensor
        else:
            name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            base[our_name(name)] = tensor
    return layers, base


def named_by_config(config, linears):
    """The layers among linears that target_modules names, by PEFT's rule; empty where that needs more than names."""
    wanted = config.get("target_modules")
    if not isinstance(wanted, list) or config.get("exclude_modules") or config.get("layers_to_transform"):
        return set()  # also a pattern: one may be written that takes for ever to match

    def matches(name):
        return name in wanted or any(name.endswith(f".{word}") for word in wanted)

    # an adapter's own module tree is the one in which target_modules names any layer
    return {name for name in linears if matches(hf_name(name))} or {name for name in linears if matches(name)}


def misfits(model, config, layers, base):
    """One text for each tensor that is missing, unexpected or of another shape than the model needs."""
    prefixes = tuple(COMPONENTS.values())
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefixes)}
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if name in base}
    for name in (layers.keys() & linears.keys()) | named_by_config(config, linears):
        expected[f"{name}.lora_A"] = config["r"], linears[name].in_features
        expected[f"{name}.lora_B"] = linears[name].out_features, config["r"]
    actual = {f"{name}.{matrix}": tuple(t.shape) for name, pair in layers.items() for matrix, t in pair.items()}
    actual |= {name: tuple(tensor.shape) for name, tensor in base.items()}
    return [
        f"{name}: found {actual.get(name, 'no tensor')}, expected {expected.get(name, 'none of this name')}"
        for name in sorted(actual.keys() | expected.keys())
        if actual.get(name) != expected.get(name)
    ]


def fit_adapter(model, folder):
    """The adapter of folder -> (its LoraArgs, {layer: {lora_A, lora_B}} in module order, {base parameter: tensor}).

    model is only looked at, and may lie on `meta`. UserError names tensors that are missing, unexpected or misshapen.
    """
    config, tensors = read_adapter(folder)
    layers, base = split_keys(tensors)
    wrong = misfits(model, config, layers, base)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"adapter {folder}: {'; '.join(wrong[:3])}{more}; is --model_id its base model?")
    if not layers:
        raise UserError(f"adapter {folder}: no lora_A and lora_B in {TENSORS}, expected a pair for each layer")
    untied = [word for word in config.get("modules_to_save") or [] if word in ("embed_tokens", "lm_head")]
    if untied and model.config.tie_word_embeddings:
        raise UserError(f"adapter {folder}: modules_to_save {untied} unties embedding and head; only PEFT can use it")
    order = [name for component in COMPONENTS for name, _ in model.named_modules() if part_of(name) == component]
    names = [name for name in order if name in layers]
    components = {part_of(name) for name in names}
    args = LoraArgs(
        llm_lora="llm" in components,
        vision_lora="vision" in components,
        merger_lora="merger" in components,
        lora_rank=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config.get("lora_dropout", 0.0),
        lora_bias=config.get("bias", "none"),
        use_rslora=config.get("use_rslora", False),
    )
    return args, {name: layers[name] for name in names}, base


@torch.no_grad()
def load_adapter(model, folder, dtype=None):
    """Put the adapter of folder into model and freeze the rest; returns its LoraArgs (its own rank and alpha).

    All is checked before anything changes. dtype of A and B: that of each weight unless given.
    """
    if lora_layers(model):
        raise UserError(f"adapter {folder}: the model carries an adapter already; load it into its base")
    args, layers, base = fit_adapter(model, folder)
    replace_linears(model, list(layers), args, dtype)
    for name, pair in layers.items():
        layer = model.get_submodule(name)
        layer.lora_A.copy_(pair["lora_A"])
        layer.lora_B.copy_(pair["lora_B"])
    for name, tensor in base.items():
        model.get_parameter(name).copy_(tensor)
    model.lora_base_names = set(base)
    return args


# -- Base and adapter as a whole model. Tensors go one by one from the base's files into the new ones, so that a file's
#    tensors and the adapter are held, never the model.


def meta_model(base):
    """The model of a checkpoint's folder without its weights: names and shapes only."""
    with torch.device("meta"):
        return Qwen2_5_VL(ModelConfig.from_folder(base))


def base_tensors(base, model):
    """Each tensor of the model, once: (our name, CPU tensor as in the file). UserError for files that do not fit."""
    expected, shapes, surplus = dict(model.state_dict()), {}, []
    files = {}  # name: (file, key)
    for file in shard_files(base):
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 (a file handle, not a dict)
                name = module_name(key)
                if name in expected:
                    shapes[name] = torch.empty(shard.get_slice(key).get_shape(), device="meta")
                    files.setdefault(name, (file, key))
                elif name != "lm_head.weight":  # a tied model's, which is the embedding
                    surplus.append(key)
    check_tensors(base, expected, shapes, surplus)  # before anything is written
    for name, (file, key) in files.items():
        with safe_open(file, framework="pt") as shard:
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
    write_json(folder / "config.json", config)
    write_json(folder / GENERATION, generation_config(base, config))
    if (adapter / STATE).is_file():  # which frames it was trained on: infer.py reads clips the same way
        shutil.copyfile(adapter / STATE, folder / STATE)
    copy_small_files(base, folder)
    return files


def generation_config(base, config):
    """Greedy, as infer.py answers: the released file's near-zero temperature and repetition_penalty 1.05 would give
    other tokens than the model was trained and measured with. Its stop tokens stay."""
    path = base / GENERATION
    released = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: released.get(name, config.get(name)) for name in names}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ids["bos_token_id"]  # <|endoftext|> both, in every Qwen2.5-VL
    if "eos_token_id" not in released:
        ids["eos_token_id"] = sorted({i for i in (ids["eos_token_id"], ids["pad_token_id"]) if i is not None})
    return {name: i for name, i in ids.items() if i is not None} | {"do_sample": False}


def copy_small_files(base, folder):
    """Tokenizer, chat template and preprocessing beside a whole model's weights, so that its folder loads by itself."""
    for path in Path(base).iterdir():
        small = path.suffix in (".json", ".txt", ".jinja") and not path.name.endswith(".index.json")
        if path.is_file() and small and path.name != MANIFEST and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


# -- The commands of lora.py


def run_command(cfg):
    """cfg: config.Adapter."""
    adapter = find_adapter(cfg.adapter)
    {"merge": merge_command, "check": check_command}[cfg.command](cfg, adapter)


def base_folder(cfg, config):
    """The checkpoint that --model_id names, or else the adapter."""
    named = cfg.model_id or config.get("base_model_name_or_path")
    if not named:
        raise UserError("--model_id: the adapter names no base, expected the checkpoint that it was trained on")
    return resolve_folder(named, cfg.local_files_only)


def merge_command(cfg, adapter):
    """base + adapter -> a Hugging Face folder, which stands under its name only when it is complete."""
    base, out = base_folder(cfg, read_adapter(adapter)[0]), Path(cfg.output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output_dir: {out} already holds something, expected a new folder; choose another name")
    write_whole(out, lambda folder: write_merged(base, adapter, folder, int(cfg.shard_gb * 1e9)))
    files = list(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 1e9
    print(f"{out}: {base} + {adapter}, {size:.3g} GB of bf16 weights in {len(files)} file(s)")
    print(f"{GENERATION} is greedy, as infer.py answers; the base's sampling settings are not taken over")


def check_command(cfg, adapter):
    """Print what an adapter is, and whether it fits its base."""
    config, tensors = read_adapter(adapter)
    layers, base = split_keys(tensors)
    components = Counter(part_of(name) for name in layers)
    count = sum(t.numel() for pair in layers.values() for t in pair.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    stabilised = ", rank-stabilised" if config.get("use_rslora") else ""
    untrained = [name for name, pair in layers.items() if "lora_B" in pair and not pair["lora_B"].any()]
    print(f"adapter   {adapter}")
    print(f"base      {config.get('base_model_name_or_path') or '(not named)'}")
    print(f"rank      {config['r']}, alpha {config['lora_alpha']:g}{stabilised}")
    print(f"targets   {len(layers)} layers: " + ", ".join(f"{name} {n}" for name, n in sorted(components.items())))
    print(f"sizes     {count:,} numbers in adapters, {', '.join(dtypes)}")
    if base:
        print(f"          {sum(t.numel() for t in base.values()):,} in {len(base)} tensors of the base, trained too")
    if untrained:
        print(f"untrained {len(untrained)} of {len(layers)} layers have a B of zeros and change nothing")
    if not any(key.removeprefix(PREFIX).startswith(("model.visual.", "model.language_model.")) for key in tensors):
        print("keys      of transformers before 4.52: PEFT beside a later one passes over them with only a warning;")
        print(f"          for use elsewhere: python lora.py merge {adapter} OUT")
    print(f"fit       {fit(cfg, config, adapter)}")


def fit(cfg, config, adapter):
    """Whether every tensor has its counterpart in the base, in words. The hub is not asked."""
    cfg.local_files_only = True
    try:
        base = base_folder(cfg, config)
    except UserError as error:
        return f"not compared with its base: {error}"
    try:
        fit_adapter(meta_model(base), adapter)
    except UserError as error:
        return f"does not load: {error}"
    return f"every tensor matches {base}"
