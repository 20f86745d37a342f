"""Adapters in PEFT's file format; base and adapter as a whole model; what `python lora.py merge | check` do.

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
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint import ADAPTER, MANIFEST, STATE, find_adapter, write_json, write_whole
from cli import from_file
from config import SFT, LoraArgs
from lora import COMPONENTS, FLAT, lora_layers, part_of, replace_linears, targets
from model import UserError, loading
from model.adapters import scale_of
from model.loading import ModelConfig, module_name, read_object
from model.quantized import format_of, quantise

CONFIG, TENSORS = ADAPTER
FORMATS = "base_dtype", "head_dtype"  # options that say what the base is kept in
INDEX = "model.safetensors.index.json"
PREFIX = "base_model.model."  # of every key in PEFT's files
CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
BEYOND_LORA = {  # options of PEFT's LoraConfig: whether a value means more than plain LoRA
    "peft_type": lambda value: value != "LORA",
    **dict.fromkeys(("use_dora", "use_qalora", "rank_pattern", "alpha_pattern", "alora_invocation_tokens"), bool),
    "init_lora_weights": lambda value: str(value).startswith(CHANGE_THE_BASE),
    "modules_to_save": lambda value: {"embed_tokens", "lm_head"} & set(value or ()),
}


def hf_name(name):
    """Our module name as transformers >= 4.52 has it; model.loading.module_name is the way back, from either style."""
    if name.startswith("lm_head"):
        return name
    return "model." + name if name.startswith("visual.") else re.sub(r"^model\.", "model.language_model.", name)


# -- Write and read


def save_adapter(model, folder, base_model):
    """Write the adapter of base_model, a folder or hub id. Base tensors that are trained too (a whole merger) are in
    the same file, named as inside a PeftModel: PEFT loads them with it, over the base's."""
    layers, args, tensors = dict(lora_layers(model)), model.lora_args, {}
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
    config = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base_model), r=args.lora_rank,
        lora_alpha=int(args.lora_alpha) if args.lora_alpha == int(args.lora_alpha) else args.lora_alpha,
        lora_dropout=args.lora_dropout, bias="none", use_rslora=args.use_rslora,
        target_modules=[hf_name(name) for name in layers], inference_mode=True,
    )  # fmt: skip
    # PEFT passes over them with a warning
    config |= {name: kind for name in FORMATS if (kind := getattr(model, name)) != "bf16"}
    Path(folder).mkdir(parents=True, exist_ok=True)
    loading.write_tensors(tensors, Path(folder) / TENSORS)
    write_json(Path(folder) / CONFIG, config)


def read_adapter(folder):
    """-> (adapter_config dict, {key: tensor} on the CPU). UserError for what is missing, broken or not plain LoRA."""
    config = read_object(folder / CONFIG)
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter {folder}: no {TENSORS} file that can be read ({error}); copy it again") from None
    for name, is_more in BEYOND_LORA.items():
        if is_more(config.get(name)):
            option = f"{name} = {config.get(name)!r} in {CONFIG}"
            raise UserError(f"adapter {folder}: {option}, expected plain LoRA; merge it with PEFT first")
    return config, tensors


def trained_on(config):
    """{option of FORMATS: the format} of the base that an adapter was trained on, by its adapter_config."""
    return {name: from_file(SFT, name, config.get(name, "bf16"), CONFIG) for name in FORMATS}


def our_name(key):
    """PEFT's key -> "….lora_A", "….lora_B" of a layer, or a parameter of the base, by our names."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
    # PEFT's name for the adapter, such as `default`, may stand before `weight`
    return module_name(re.sub(r"\.(lora_[AB])(\.\w+)?\.weight$", r".\1", name))


def fit_adapter(model, folder):
    """The adapter of folder -> (its LoraArgs, {layer: (A, B)} in module order, {base parameter: tensor}). model may lie
    on `meta`. UserError names tensors that are missing, unexpected or misshapen."""
    config, tensors = read_adapter(folder)
    values = {"lora_rank": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    values |= {name: config[name] for name in ("lora_dropout", "use_rslora") if name in config}
    values = {name: from_file(LoraArgs, name, value, folder / CONFIG) for name, value in values.items()}
    rank, tensors = values["lora_rank"], {our_name(key): tensor for key, tensor in tensors.items()}
    names = [name for name in targets(model, LoraArgs()) if f"{name}.lora_A" in tensors]
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if name in tensors}
    for name in names:
        linear = model.get_submodule(name)
        expected[f"{name}.lora_A"], expected[f"{name}.lora_B"] = (rank, linear.in_features), (linear.out_features, rank)
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not names or actual != expected:
        wrong = loading.differences(actual, expected) or f"no lora_A and lora_B in {TENSORS}"
        raise UserError(f"adapter {folder}: {wrong}; is --model_id its base model?")
    on = {f"{component}_lora": any(part_of(name) == component for name in names) for component in COMPONENTS}
    layers = {name: (tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B")) for name in names}
    return LoraArgs(**values, **on), layers, tensors


@torch.no_grad()
def load_adapter(model, folder):
    """Put the adapter of folder into model and freeze the rest; returns its LoraArgs (its own rank and alpha). All is
    checked before anything changes."""
    args, layers, base = fit_adapter(model, Path(folder))
    replace_linears(model, list(layers), args)
    for name, (A, B) in layers.items():
        layer = model.get_submodule(name)
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    for name, tensor in base.items():
        model.get_parameter(name).copy_(tensor)
    model.lora_base_names = set(base)
    return args


# -- Base and adapter as a whole model


def write_merged(base, adapter, out, formats, quantised):
    """Write base + adapter into out, a file for each of the base's, one in memory at a time: bf16, summed in fp32 and
    rounded once. formats: trained_on of the adapter; quantised: merge into the weights as they are in them.
    Returns |q| / |delta| of each low-bit layer: what quantising moved, over what was learned."""
    model = loading.empty_model(ModelConfig.from_folder(base))
    args, layers, own = fit_adapter(model, adapter)
    expected, weight_map, errors = model.state_dict().keys(), {}, []
    for file in loading.shard_files(base):
        merged = {}
        for name, tensor in loading.read_tensors(file):
            tensor, pair = own.get(name, tensor).float(), layers.get(name.removesuffix(".weight"))
            delta = pair[1].float() @ pair[0].float() * scale_of(args) if pair else 0  # B A
            if (kind := format_of(name, **formats)) != "bf16":
                low = quantise(tensor, kind, torch.float32).dequantise(torch.float32)
                errors += [float((tensor - low).norm() / delta.norm())] if pair else []
                tensor = low if quantised else tensor
            if name in expected:  # not a tied model's head, which is the embedding
                merged[name] = (tensor + delta).to(torch.bfloat16).contiguous()
        loading.write_tensors(merged, out / file.name)
        weight_map |= dict.fromkeys(merged, file.name)
    if missing := expected - weight_map.keys():
        raise UserError(f"{base}: has no tensor {min(missing)}, expected a whole model; download it again")
    if (base / INDEX).exists():
        write_json(out / INDEX, {"metadata": {}, "weight_map": weight_map})
    config = read_object(base / "config.json")
    config |= {key: "bfloat16" for key in ("torch_dtype", "dtype") if key in config} or {"torch_dtype": "bfloat16"}
    write_json(out / "config.json", config)
    generation = base / "generation_config.json"
    if generation.is_file():  # greedy, as infer.py answers: sampling as released would give other tokens
        sampling = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        write_json(out / generation.name, {k: v for k, v in read_object(generation).items() if k not in sampling})
    if (adapter / STATE).is_file():  # which frames it was trained on: infer.py reads clips the same way
        shutil.copyfile(adapter / STATE, out / STATE)
    copy_small_files(base, out)
    return errors


def copy_small_files(base, folder):
    """Tokenizer, chat template and preprocessing beside a whole model's weights, so that its folder loads by itself."""
    for path in Path(base).iterdir():
        small = path.suffix in (".json", ".txt", ".jinja") and path.name not in (MANIFEST, INDEX)
        if path.is_file() and small and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


# -- The commands of lora.py


def run_command(cfg):
    """cfg: config.Adapter."""
    adapter = find_adapter(cfg.model_ckpt)
    config, _ = read_adapter(adapter)
    base, formats = cfg.model_id or config.get("base_model_name_or_path"), trained_on(config)
    kind, head = formats.values()
    if not base:
        raise UserError("--model_id: the adapter names no base, expected the checkpoint that it was trained on")
    folder = loading.resolve_folder(base, cfg.local_files_only, weights=cfg.command == "merge")
    if cfg.command == "check":
        args, layers, others = fit_adapter(loading.empty_model(ModelConfig.from_folder(folder)), adapter)
        counts = Counter(map(part_of, layers))
        untrained = sum(not B.any() for _, B in layers.values())
        kinds = kind if head == "bf16" else f"{kind}, its head as {head}"
        print(f"adapter   {adapter}\nbase      {base}, as {kinds}: every tensor fits")
        print(f"rank      {args.lora_rank}, alpha {args.lora_alpha:g}, use_rslora {args.use_rslora}")
        print(f"targets   {len(layers)} layers: " + ", ".join(f"{name} {counts[name]}" for name in COMPONENTS))
        print(f"          {untrained} of them untrained (B is zero), {len(others)} tensors of the base trained too")
        return
    out, quantised, errors = Path(cfg.output_dir), cfg.merge_base == "quantised", []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output_dir: {out} already holds something, expected a new folder; choose another name")
    if quantised and kind == head == "bf16":
        raise UserError("--merge_base: got quantised, expected original: the adapter was trained on a bf16 base")
    try:
        write_whole(out, lambda temporary: errors.extend(write_merged(folder, adapter, temporary, formats, quantised)))
    except SafetensorError as error:  # a full disk
        raise UserError(f"--output_dir: {out} cannot be written ({error}); make room or choose another") from None
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e9
    print(f"{out}: {base} + {adapter}, {size:.3g} GB of bf16 weights")
    if errors:
        into = f"the {kind} weights, rounded to bf16" if quantised else "the original weights"
        ratios = f"median {statistics.median(errors):.2g}, largest {max(errors):.2g} of {len(errors)} layers"
        print(f"trained on a {kind} base, merged into {into}; quantisation error over adapter: {ratios}")
