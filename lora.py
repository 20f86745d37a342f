"""LoRA: put adapters in, choose what is trained, switch off, swap to a reference, merge, save and load as PEFT does.

    y = x W^T + b + s · (x A^T) B^T        W (out, in) frozen, A (r, in) random, B (out, r) zero at the start
                                           s = alpha / r, or alpha / sqrt(r) when rank-stabilised

    inject(model, args)                    Linear -> LoRALinear in the parts that args switch on
    set_trainable(model, args)             exactly what args name has requires_grad, all else is frozen
    with disabled(model): …                the base model
    with reference(model, snapshot): …     the model as it was at reference_snapshot(model)
    save_adapter(model, folder, base)      adapter_config.json + adapter_model.safetensors, which PEFT loads
    load_adapter(model, folder)            our adapters or PEFT's, with the keys of transformers 4 or 5

    python lora.py merge --model_id BASE --model_ckpt RUN --output_dir NEW      a whole model, for transformers or vLLM
    python lora.py check ADAPTER                                                what it is, and who loads it
    python lora.py convert ADAPTER --output_dir NEW                             to the keys of transformers 4, or back

The layer is in model/adapters.py: all adapters of a block lie in its one parameter `adapters`.
Adapters of DoRA, quantised bases and embeddings are not supported, and refused by name.
"""

# ruff: noqa: E402
from config import LoraArgs, cli

if __name__ == "__main__":  # the commands import this file as a module, once the flags are right
    from interop.commands import main

    raise SystemExit(cli(main))

import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from model import UserError, nearest
from model.adapters import BlockAdapters, LoRALinear
from model.qwen2_5_vl import save_tensors

# Where adapters may sit, in the order of transformers' module tree (num_lora_modules counts from its end).
PARTS = {"vision": "visual.blocks.", "merger": "visual.merger.", "llm": "model.layers."}
FLAT = "adapters"  # the parameter of a block
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Options of PEFT's LoraConfig that change the formula above
BEYOND_LORA = ("use_dora", "use_qalora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out")
BEYOND_LORA += ("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")
BEYOND_LORA += ("arrow_config", "kasa_config", "use_bdlora", "monteclora_config")
# Starts that change the base's weights too: the adapter is meant for weights that lie nowhere
NEW_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def lora_layers(model):
    """[(name, LoRALinear)] in module order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def homes(model):
    """The BlockAdapters of a model."""
    return list(dict.fromkeys(layer.home for _, layer in lora_layers(model)))


# -- Where adapters go, and what is trained


def part_of(name):
    """The part of a parameter or module: vision (patch embedding too), merger, or llm (embeddings and head too)."""
    if name.startswith("visual."):
        return "merger" if name.startswith("visual.merger.") else "vision"
    return "llm"


def _switches(args):
    """{part: whether it carries adapters}. A merger that is trained whole carries none."""
    on = {"vision": args.vision_lora, "merger": args.merger_lora and not args.tune_merger, "llm": args.llm_lora}
    return {part: args.lora_enable and wanted for part, wanted in on.items()}


def targets(model, args):
    """Names of the layers that args ask to adapt. UserError for a switch, exclusion or count that matches nothing."""
    modules = dict(model.named_modules())
    names = []
    for part, wanted in _switches(args).items():
        found = [n for n, m in modules.items() if n.startswith(PARTS[part]) and isinstance(m, nn.Linear)]
        if wanted and not found:
            raise UserError(f"--{part}_lora: found no linear layer under {PARTS[part]}*, expected a Qwen2.5-VL model")
        names += found if wanted else []
    for word in args.lora_namespan_exclude:
        # the usual two are never candidates, and a tied model has no lm_head
        if word not in ("lm_head", "embed_tokens") and not any(word in name for name in modules):
            hint = nearest(word, {piece for name in modules for piece in name.split(".")})
            raise UserError(f"--lora_namespan_exclude: {word!r} is in no module's name, like {names[0]}{hint}")
    names = [name for name in names if not any(word in name for word in args.lora_namespan_exclude)]
    if not names:
        raise UserError(f"--lora_namespan_exclude: {args.lora_namespan_exclude} leaves no layer to adapt")
    if args.num_lora_modules > len(names):
        expected = f"at most {len(names)}, the layers there are"
        raise UserError(f"--num_lora_modules: found {args.num_lora_modules}, expected {expected}")
    return names if args.num_lora_modules == -1 else names[-args.num_lora_modules :]


def block_of(name):
    """The block that holds a layer: model.layers.N, visual.blocks.N or visual.merger."""
    return re.match(r"model\.layers\.\d+|visual\.blocks\.\d+|visual\.merger", name)[0]


def _replace(model, names, args, dtype):
    blocks = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = LoRALinear(model.get_submodule(name), args)
        setattr(model.get_submodule(parent), leaf, layer)
        blocks.setdefault(block_of(name), []).append(layer)
    for block, layers in blocks.items():
        BlockAdapters(model.get_submodule(block), layers, args.lora_rank, dtype)
    model.lora_args = args
    model.lora_base_names = set()  # base tensors that came with the adapter, and are saved with it again
    set_trainable(model, args)


def inject(model, args, dtype=None):
    """Give the linear layers that args (LoraArgs) name a fresh adapter, and freeze all that args do not free.

    Returns the layers' names, [] without lora_enable. dtype of A and B: that of each weight unless given. UserError for
    contradictory args, for what matches nothing, and for a model that carries an adapter already.
    """
    LoraArgs.check(args)
    if lora_layers(model):
        raise UserError("the model carries an adapter already; a second one would sit on top of it: merge the first")
    names = targets(model, args) if args.lora_enable else []
    _replace(model, names, args, dtype)
    return names


def set_trainable(model, args):
    """Freeze everything, then free exactly what args (LoraArgs) name; returns the count of trainable numbers.

    Adapters of a part whose switch is off stay frozen. Raises UserError when nothing is left to train.
    """
    LoraArgs.check(args)
    switches = _switches(args)
    whole = {"vision": not args.freeze_vision_tower, "merger": args.tune_merger, "llm": not args.freeze_llm}
    adapted = {name for name, _ in lora_layers(model) if switches[part_of(name)]}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        bias = leaf == "bias" and (args.lora_bias == "all" or (args.lora_bias == "lora_only" and module in adapted))
        part = part_of(name)
        free = switches[part] if leaf == FLAT else whole[part] or (args.lora_enable and bias)
        parameter.requires_grad_(free)
    trained, numbers = trainable_parameters(model), sizes(model)
    if not trained:
        raise UserError("nothing is left to train: no part is free, and the parts switched on have no adapter")
    return sum(numbers[name] for name, _ in trained)


def trainable_parameters(model):
    """[(name, parameter)] of everything with requires_grad."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def sizes(model):
    """{parameter's name: how many numbers it has}, without the padding between adapters."""
    padding = {home.block.adapters: home.padding for home in homes(model)}
    return {name: parameter.numel() - padding.get(parameter, 0) for name, parameter in model.named_parameters()}


def param_groups(model, args):
    """Optimizer groups: one learning rate a part (args: CommonTrain), weight decay on matrices and adapters only."""
    rates = {"llm": args.learning_rate, "vision": args.vision_lr, "merger": args.merger_lr}
    groups = {}
    for name, parameter in trainable_parameters(model):
        part, decays = part_of(name), parameter.ndim >= 2 or name.endswith(FLAT)
        rate = args.learning_rate if rates[part] is None else rates[part]
        new = {"name": f"{part}{'' if decays else ' no decay'}", "params": [], "lr": rate}
        group = groups.setdefault((part, decays), new | {"weight_decay": args.weight_decay if decays else 0.0})
        group["params"].append(parameter)
    return list(groups.values())


# -- Off, reference, merged


@contextmanager
def disabled(model):
    """Inside, the adapters take no part: the base model. Not around a forward whose backward recomputes later."""
    layers = [module for _, module in lora_layers(model)]
    assert not any(layer.merged for layer in layers), "disabled() on a merged model: unmerge it first"
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def reference_snapshot(model):
    """{name: copy} of all that is trained, as it is now: the frozen policy that KL is measured against."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model)}


@contextmanager
def reference(model, snapshot):
    """Inside, the model computes with the snapshot's tensors and without gradients; the trained ones come back after.

    Only the parameters' storage is exchanged: optimizers that hold them, or flat views of them, notice nothing.
    """
    assert not any(layer.merged for _, layer in lora_layers(model)), "reference() on a merged model: unmerge it first"
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name].data for name in snapshot}
    for name, tensor in snapshot.items():
        now = trained[name]
        found, wanted = (tensor.shape, tensor.dtype), (now.shape, now.dtype)
        assert found == wanted, f"{name}: {found} in the snapshot, {wanted} in the model"
        parameters[name].data = tensor
    try:
        with torch.no_grad():
            yield
    finally:
        for name, tensor in trained.items():
            parameters[name].data = tensor


def merge(model):
    """Add every adapter to its weight, one product a layer; the outputs stay the same up to rounding."""
    for name, layer in lora_layers(model):
        assert not layer.merged, f"{name} is merged already"
        layer.shift_weight(+1)
        layer.merged = True


def unmerge(model):
    """Take the adapters out of the weights: exact up to one rounding of the weights' dtype."""
    for name, layer in lora_layers(model):
        assert layer.merged, f"{name} is not merged"
        layer.shift_weight(-1)
        layer.merged = False


def remove(model):
    """Put plain Linear layers back, so that save_pretrained writes an ordinary model; after merge(), the merged one."""
    for home in homes(model):
        home.remove()
    for name, layer in lora_layers(model):
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)


# -- Files, as PEFT writes and reads them


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
    if model.partition and (names := sorted(set(base) & set(model.partition.names))):
        told = f"it brings {names[0]} of the base too, expected adapters only"
        raise UserError(f"adapter {folder}: {told} with --partition_weights True")
    _replace(model, list(layers), args, dtype)
    for name, pair in layers.items():
        layer = model.get_submodule(name)
        layer.lora_A.copy_(pair["lora_A"])
        layer.lora_B.copy_(pair["lora_B"])
    for name, tensor in base.items():
        model.get_parameter(name).copy_(tensor)
    model.lora_base_names = set(base)
    return args
