"""Adapters in PEFT's file format; base and adapter as a whole model; what `python lora.py merge | check` do.

    save_adapter(model, folder, base)             what PeftModel.from_pretrained loads (transformers 4.52 and later)
    load_adapter(model, folder)                   ours or PEFT's
    write_merged(base, adapter, folder, limit)    a whole model, as transformers and vLLM load it

The keys are module names. transformers 4.52 renamed Qwen2.5-VL's modules: `visual.*` and `model.layers.*` became
`model.visual.*` and `model.language_model.layers.*`. Both styles are read, the newer one is written. Plain LoRA only:
DoRA, ranks by pattern and the like are refused by name.
"""

import re
import shutil
import statistics
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from checkpoint import ADAPTER, MANIFEST, STATE, find_adapter, write_json, write_whole
from config import LoraArgs
from lora import COMPONENTS, FLAT, lora_layers, part_of, replace_linears
from model import UserError
from model.adapters import scale_of, shifted
from model.loading import ModelConfig, module_name, read_object, resolve_folder, save_tensors, shard_files, write_shards
from model.quantized import BASE_DTYPES, LOW_BIT, quantise
from model.qwen import Qwen2_5_VL

CONFIG, TENSORS = ADAPTER
GENERATION = "generation_config.json"
PREFIX = "base_model.model."  # of every key in PEFT's files
# Options of PEFT's LoraConfig that change the formula of lora.py
BEYOND_LORA = ("use_dora", "use_qalora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out")
BEYOND_LORA += ("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")
# Values of init_lora_weights with which PEFT changes the base too
CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def hf_name(name):
    """Our module name as transformers >= 4.52 has it; model.loading.module_name is the way back, from either style."""
    if name.startswith("lm_head"):
        return name
    return "model." + name if name.startswith("visual.") else re.sub(r"^model\.", "model.language_model.", name)


# -- Write and read


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
    args = model.lora_args
    config = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base_model), r=args.lora_rank,
        lora_alpha=int(args.lora_alpha) if args.lora_alpha == int(args.lora_alpha) else args.lora_alpha,
        lora_dropout=args.lora_dropout, bias=args.lora_bias, use_rslora=args.use_rslora,
        target_modules=[hf_name(name) for name in layers], inference_mode=True,
    )  # fmt: skip
    if model.base_dtype != "bf16":  # PEFT passes over it with a warning
        config["base_dtype"] = model.base_dtype
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / TENSORS)
    write_json(folder / CONFIG, config)


def read_adapter(folder):
    """-> (adapter_config dict, {key: tensor} on the CPU). UserError for what is missing, broken or not plain LoRA."""
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise UserError(f"adapter {folder}: no {name}, expected a folder that save_adapter or PEFT wrote")
    config = {"lora_dropout": 0.0} | read_object(folder / CONFIG)
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise UserError(f"adapter {folder}: {TENSORS} is no safetensors file ({error}); copy it again") from None
    if config.get("peft_type") != "LORA":
        raise UserError(f'adapter {folder}: {CONFIG} has no "peft_type": "LORA"; only LoRA adapters are read')
    for name, kinds in (("r", int), ("lora_alpha", int | float), ("lora_dropout", int | float)):
        value = config.get(name)
        if not isinstance(value, kinds) or not 0 <= value < 2**20:
            raise UserError(f"adapter {folder}: {name} is {str(value)[:80]} in {CONFIG}, expected a number")
    beyond = [name for name in BEYOND_LORA if config.get(name)]
    beyond += ["init_lora_weights"] * str(config.get("init_lora_weights")).startswith(CHANGE_THE_BASE)
    if beyond:
        option = f"{beyond[0]} = {config[beyond[0]]!r} in {CONFIG}"
        raise UserError(f"adapter {folder}: {option}, expected plain LoRA; merge it with PEFT first")
    return config, tensors


def trained_on(config):
    """The format of the base that an adapter was trained on, by its adapter_config."""
    kind = config.get("base_dtype", "bf16")
    if kind not in BASE_DTYPES:
        raise UserError(f"{CONFIG}: base_dtype is {str(kind)[:80]}, expected one of {', '.join(BASE_DTYPES)}")
    return kind


def split_keys(tensors):
    """PEFT's tensors -> ({layer: {lora_A, lora_B}}, {base parameter: tensor}) by our names."""
    layers, base = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        # PEFT's name for the adapter, such as `default`, may stand before `weight`
        if match := re.fullmatch(r"(.+)\.(lora_[AB])(?:\.\w+)?\.weight", name):
            layers.setdefault(module_name(match[1]), {})[match[2]] = tensor
        else:
            name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            base[module_name(name)] = tensor
    return layers, base


def misfits(model, config, layers, base):
    """One text for each tensor that is missing, unexpected or of another shape than the model needs."""
    prefixes = tuple(COMPONENTS.values())
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefixes)}
    targets = config.get("target_modules")
    named = {module_name(str(name)) for name in targets} if isinstance(targets, list) else set()
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if name in base}
    for name in (layers.keys() | named) & linears.keys():
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
    names = [name for name, _ in model.named_modules() if name in layers]
    names.sort(key=lambda name: list(COMPONENTS).index(part_of(name)))
    components = {part_of(name) for name in names}
    args = LoraArgs(
        llm_lora="llm" in components, vision_lora="vision" in components, merger_lora="merger" in components,
        lora_rank=config["r"], lora_alpha=config["lora_alpha"], lora_dropout=config["lora_dropout"],
        lora_bias=config.get("bias", "none"), use_rslora=config.get("use_rslora", False),
    )  # fmt: skip
    return args, {name: layers[name] for name in names}, base


@torch.no_grad()
def load_adapter(model, folder, dtype=None):
    """Put the adapter of folder into model and freeze the rest; returns its LoraArgs (its own rank and alpha).

    All is checked before anything changes. dtype of A and B: that of each weight unless given.
    """
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


# -- Base and adapter as a whole model


def meta_model(base):
    """The model of a checkpoint's folder without its weights: names and shapes only."""
    with torch.device("meta"):
        return Qwen2_5_VL(ModelConfig.from_folder(base))


def merged_tensors(base, adapter, kind="bf16", quantised=False, errors=None):
    """(name, bf16 tensor) of base + adapter, summed in fp32 and rounded once. Tensors go one by one from the base's
    files into the new ones: the adapter and one new file are held in memory, never the model.

    kind: the format of the base that the adapter was trained on. quantised: merge into the weights as they are in it.
    errors: a list to which |q| / |delta| of each low-bit layer is added: what quantising moved, over what was learned.
    """
    model = meta_model(base)
    args, layers, own = fit_adapter(model, adapter)
    missing = set(model.state_dict())
    for file in shard_files(base):
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 (a file handle, not a dict)
                name = module_name(key)
                if name not in missing:  # a tied model's head, which is the embedding
                    continue
                missing.remove(name)
                tensor = own[name] if name in own else shard.get_tensor(key)
                pair = layers.get(name.removesuffix(".weight"))
                if kind != "bf16" and LOW_BIT.fullmatch(name):
                    low = quantise(tensor, kind, torch.float32).dequantise(torch.float32)
                    if pair:
                        delta = pair["lora_B"].float() @ pair["lora_A"].float() * scale_of(args)
                        errors.append(float((tensor.float() - low).norm() / delta.norm()))
                    tensor = low if quantised else tensor
                if pair:
                    tensor = shifted(tensor, pair["lora_A"], pair["lora_B"], scale_of(args))
                yield name, tensor.to(torch.bfloat16)
    if missing:
        raise UserError(f"{base}: has no tensor {min(missing)}, expected a whole model; download it again")


def write_merged(base, adapter, folder, limit, **low_bit):
    """Write base + adapter into folder. limit: bytes a file of weights. low_bit: as merged_tensors takes it."""
    write_shards(merged_tensors(base, adapter, **low_bit), folder, limit)
    config = read_object(base / "config.json")
    config |= {key: "bfloat16" for key in ("torch_dtype", "dtype") if key in config} or {"torch_dtype": "bfloat16"}
    write_json(folder / "config.json", config)
    write_json(folder / GENERATION, generation_config(base, config))
    if (adapter / STATE).is_file():  # which frames it was trained on: infer.py reads clips the same way
        shutil.copyfile(adapter / STATE, folder / STATE)
    copy_small_files(base, folder)


def generation_config(base, config):
    """Greedy, as infer.py answers: the released file's near-zero temperature and repetition_penalty 1.05 would give
    other tokens than the model was trained and measured with. Its stop tokens stay."""
    released = read_object(base / GENERATION) if (base / GENERATION).is_file() else {}
    ids = {name: released.get(name, config.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
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
    adapter = find_adapter(cfg.model_ckpt)
    config, tensors = read_adapter(adapter)
    base = cfg.model_id or config.get("base_model_name_or_path")
    if not base:
        raise UserError("--model_id: the adapter names no base, expected the checkpoint that it was trained on")
    if cfg.command == "check":
        describe(adapter, config, tensors, base)
        fit_adapter(meta_model(resolve_folder(base, cfg.local_files_only, weights=False)), adapter)
        print(f"fit       every tensor matches {base}")
        return
    base, out = resolve_folder(base, cfg.local_files_only), Path(cfg.output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output_dir: {out} already holds something, expected a new folder; choose another name")
    kind, errors = trained_on(config), []
    if cfg.merge_base == "quantised" and kind == "bf16":
        raise UserError("--merge_base: found quantised, expected original: the adapter was trained on a bf16 base")
    low_bit = {"kind": kind, "quantised": cfg.merge_base == "quantised", "errors": errors}
    write_whole(out, lambda folder: write_merged(base, adapter, folder, int(cfg.shard_gb * 1e9), **low_bit))
    files = list(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 1e9
    print(f"{out}: {base} + {adapter}, {size:.3g} GB of bf16 weights in {len(files)} file(s)")
    if errors:
        into = f"the {kind} weights, rounded to bf16" if cfg.merge_base == "quantised" else "the original weights"
        ratios = f"median {statistics.median(errors):.2g}, largest {max(errors):.2g} of {len(errors)} layers"
        print(f"trained on a {kind} base, merged into {into}; quantisation error over adapter: {ratios}")


def describe(adapter, config, tensors, base):
    """Print what an adapter is."""
    layers, others = split_keys(tensors)
    components = sorted(Counter(part_of(name) for name in layers).items())
    untrained = sum(not pair["lora_B"].any() for pair in layers.values() if "lora_B" in pair)
    new = any(key.removeprefix(PREFIX).startswith(("model.visual.", "model.language_model.")) for key in tensors)
    print(f"adapter   {adapter}, keys of transformers {'from' if new else 'before'} 4.52")
    print(f"base      {base}" + ("" if trained_on(config) == "bf16" else f", kept in {trained_on(config)}"))
    print(f"rank      {config['r']}, alpha {config['lora_alpha']:g}, use_rslora {config.get('use_rslora', False)}")
    print(f"targets   {len(layers)} layers: " + ", ".join(f"{name} {n}" for name, n in components))
    print(f"          {untrained} of them untrained (B is zero), {len(others)} tensors of the base trained too")
