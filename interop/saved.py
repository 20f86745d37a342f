"""An adapter's files, as PEFT writes and reads them.

    save_adapter(model, folder, base)      adapter_config.json + adapter_model.safetensors, which PEFT loads
    load_adapter(model, folder)            our adapters or PEFT's, with the keys of transformers 4 or 5

Adapters of DoRA, quantised bases and embeddings are not supported, and refused by name.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from config import LoraArgs
from lora import FLAT, PARTS, lora_layers, part_of, replace_linears
from model import UserError
from model.loading import save_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Options of PEFT's LoraConfig that change the formula above
BEYOND_LORA = ("use_dora", "use_qalora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out")
BEYOND_LORA += ("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")
BEYOND_LORA += ("arrow_config", "kasa_config", "use_bdlora", "monteclora_config")
# Starts that change the base's weights too: the adapter is meant for weights that lie nowhere
NEW_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def hf_name(name, old_keys=False):
    """Our module name (the checkpoint's words) as transformers >= 4.52 knows it; old_keys: as 4.51 does."""
    if old_keys or name.startswith("lm_head"):
        return name
    return "model." + name if name.startswith("visual.") else re.sub(r"^model\.", "model.language_model.", name)


def our_name(name):
    """The inverse of hf_name, for both forms."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return re.sub(r"^model\.language_model\.", "model.", name)


def _adapter_config(args, names, base_model, old_keys):
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
        "use_dora": False,
        "target_modules": [hf_name(name, old_keys) for name in names],
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def save_adapter(model, folder, base_model, old_keys=False):
    """Write the adapter, and whatever else is trained, to folder; base_model: the folder or hub id that it belongs to.

    Base tensors that are trained too (biases, a whole merger) stand in the same file under the names they have inside a
    PeftModel, so PEFT loads them with the adapter (over the base's, which its disable_adapter does not bring back).
    Keys are those of transformers >= 4.52, or with old_keys of 4.51.
    """
    layers = dict(lora_layers(model))
    assert layers, "save_adapter: the model carries no adapter; save_pretrained writes a whole model"
    assert not any(layer.merged for layer in layers.values()), "save_adapter on a merged model: unmerge it first"
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{hf_name(name, old_keys)}.lora_A.weight"] = layer.lora_A
        tensors[f"{hf_name(name, old_keys)}.lora_B.weight"] = layer.lora_B
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf != FLAT and (parameter.requires_grad or name in model.lora_base_names):
            inside = ".base_layer" if module in layers else ""
            tensors[f"{hf_name(module, old_keys)}{inside}.{leaf}"] = parameter
    # copies: views of one storage cannot go into one file
    tensors = {f"base_model.model.{k}": t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / TENSORS)
    config = _adapter_config(model.lora_args, list(layers), base_model, old_keys)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder):
    """-> (adapter_config dict, {key: tensor} on the CPU). UserError for what is missing, broken or not plain LoRA."""
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise UserError(f"adapter {folder}: found no {name}, expected a folder that save_adapter or PEFT wrote")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / CONFIG}: line {error.lineno}: {error.msg}; expected JSON") from error
    except SafetensorError as error:
        raise UserError(f"{folder / TENSORS}: {error}; expected an intact safetensors file") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: holds a JSON {type(config).__name__}, expected an object")
    if config.get("peft_type") != "LORA" or "r" not in config or "lora_alpha" not in config:
        found = f"peft_type {config.get('peft_type')!r}"
        raise UserError(f"{folder / CONFIG}: found {found}, expected LORA with r and lora_alpha")
    for name, kinds in (("r", int), ("lora_alpha", int | float), ("lora_dropout", int | float)):
        value = config.get(name, 0)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 <= value < 2**20:
            raise UserError(f"adapter {folder}: {name} is {str(value)[:80]} in {CONFIG}, expected a number")
    for name in BEYOND_LORA:
        if config.get(name):
            found = f"{name} = {config[name]!r}"
            raise UserError(f"{folder / CONFIG}: found {found}, expected plain LoRA; merge it with PEFT first")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(NEW_BASE):
        text = f"found init_lora_weights = {start!r}, which changes the base too, expected one for the base itself"
        raise UserError(f"{folder / CONFIG}: {text}; have PEFT convert it (path_initial_model_for_weight_conversion)")
    return config, tensors


# PEFT's name for the adapter, such as `default`, may stand before `weight`
_LORA_KEY = re.compile(r"(.+)\.(lora_[AB])(?:\.\w+)?\.weight")


def split_keys(tensors, folder):
    """PEFT's tensors -> ({layer: {lora_A: …, lora_B: …}}, {base parameter: tensor}) by our names."""
    layers, base = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        if match := _LORA_KEY.fullmatch(name):
            layers.setdefault(our_name(match[1]), {})[match[2]] = tensor
        elif "lora_" in name:
            raise UserError(f"adapter {folder}: found a tensor {key}, expected lora_A and lora_B of linear layers only")
        else:
            name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            base[our_name(name)] = tensor
    return layers, base


def _named_by_config(config, linears):
    """The layers that target_modules means among linears, by PEFT's rule; None where its rule needs more than names."""
    wanted = config.get("target_modules")
    if not isinstance(wanted, list) or config.get("exclude_modules") or config.get("layers_to_transform"):
        return None  # also a pattern: one may be written that takes for ever to match

    def hit(name):
        return name in wanted or any(name.endswith(f".{word}") for word in wanted)

    # an adapter may have been made on either module tree; its own is the one in which it finds layers
    trees = [{n for n in linears if hit(hf_name(n, old_keys))} for old_keys in (False, True)]
    return trees[0] or trees[1]


def _check_fit(model, config, layers, base, folder):
    """UserError naming the first tensors that are missing, surplus or of another shape."""
    places = tuple(PARTS.values())
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(places)}
    parameters = dict(model.named_parameters())
    surplus = sorted(set(layers) - set(linears)) + sorted(set(base) - set(parameters))
    missing = sorted((_named_by_config(config, linears) or set()) - set(layers))
    missing += [f"{name}.lora_{x}" for name, pair in layers.items() for x in "AB" if f"lora_{x}" not in pair]
    for what, names in (("tensors that have no place in this model", surplus), ("no tensors for", missing)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            text = f"found {what}: {', '.join(names[:3])}{more}"
            raise UserError(f"adapter {folder}: {text}; is --model_id its base model?")
    if not layers:
        raise UserError(f"adapter {folder}: found no lora_A and lora_B in {TENSORS}, expected one pair a layer")
    apart = [word for word in config.get("modules_to_save") or [] if word in ("embed_tokens", "lm_head")]
    if apart and model.config.tie_word_embeddings:
        text = f"found modules_to_save {apart}, which parts embedding and head, expected them tied as in this model"
        raise UserError(f"adapter {folder}: {text}; only PEFT can use it")
    shapes = [(name, base[name].shape, parameters[name].shape) for name in base]
    for name, pair in layers.items():
        linear, rank = linears[name], config["r"]
        shapes.append((f"{name}.lora_A", pair["lora_A"].shape, (rank, linear.in_features)))
        shapes.append((f"{name}.lora_B", pair["lora_B"].shape, (linear.out_features, rank)))
    for name, found, wanted in shapes:
        if tuple(found) != tuple(wanted):
            text = f"found {name} of shape {tuple(found)}, expected {tuple(wanted)}"
            raise UserError(f"adapter {folder}: {text}; is --model_id its base model?")


def fit_adapter(model, folder):
    """The adapter of folder -> (its LoraArgs, {layer: {"lora_A", "lora_B"}} in module order, {base parameter: tensor}).

    Reads our files and PEFT's, with keys of transformers 4 and 5. model is only looked at, and may lie on `meta`;
    UserError names tensors that are missing, surplus or misshapen.
    """
    config, tensors = read_adapter(folder)
    layers, base = split_keys(tensors, folder)
    _check_fit(model, config, layers, base, folder)
    names = [name for part in PARTS for name, _ in model.named_modules() if name in layers and part_of(name) == part]
    parts = {part_of(name) for name in names}
    args = LoraArgs(
        llm_lora="llm" in parts,
        vision_lora="vision" in parts,
        merger_lora="merger" in parts,
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
