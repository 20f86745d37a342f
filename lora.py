"""LoRA: put adapters in, choose what is trained, switch them off, swap to a reference, merge.

    python lora.py merge ADAPTER OUT       a whole model, as transformers and vLLM load it
    python lora.py check ADAPTER           what it is, and whether it fits its base

The layer is in model/adapters.py: all adapters of a block lie in its one parameter `adapters`. PEFT's files and the two
commands are in adapter_files.py.
"""

# ruff: noqa: E402
from config import Adapter, cli, ignored_options, parse


def main(argv=None):
    cfg = parse(Adapter, argv)
    for line in ignored_options(cfg):
        print(f"note: {line}")
    from adapter_files import run_command

    run_command(cfg)


if __name__ == "__main__":  # before torch is imported: --help does not wait for it
    raise SystemExit(cli(main))

import re
from contextlib import contextmanager

import torch
from torch import nn

from model import UserError
from model.adapters import BlockAdapters, LoRALinear, shifted

COMPONENTS = ("vision", "merger", "llm")
BLOCK = re.compile(r"visual\.blocks\.\d+|visual\.merger|model\.layers\.\d+")  # whose linear layers may be adapted
FLAT = "adapters"  # the parameter of a block


def lora_layers(model):
    """[(name, LoRALinear)] in module order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def trainable_parameters(model):
    """[(name, parameter)] of everything with requires_grad."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def sizes(model):
    """{parameter's name: how many numbers it has}, without the padding between adapters."""
    padding = {layer.home.block.adapters: layer.home.padding for _, layer in lora_layers(model)}
    return {name: parameter.numel() - padding.get(parameter, 0) for name, parameter in model.named_parameters()}


def part_of(name):
    """Component of a parameter or module: vision (patch embedding too), merger, or llm (embeddings and head too)."""
    if name.startswith("visual.merger."):
        return "merger"
    return "vision" if name.startswith("visual.") else "llm"


# -- Where adapters go, and what is trained


def switches(args):
    """{component: whether it carries adapters}. A merger that is trained whole carries none."""
    on = {"vision": args.vision_lora, "merger": args.merger_lora and not args.tune_merger, "llm": args.llm_lora}
    return {component: args.lora_enable and wanted for component, wanted in on.items()}


def targets(model, args):
    """Names of the linear layers that args (LoraArgs) ask to adapt, vision before language."""
    excluded, adapts, modules = args.lora_namespan_exclude, switches(args), dict(model.named_modules())
    for word in excluded:  # the usual two are never candidates, and a tied model has no lm_head
        if word not in ("lm_head", "embed_tokens") and not any(word in name for name in modules):
            raise UserError(f"--lora_namespan_exclude: {word!r} is in no module's name, like {list(modules)[-1]}")
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear) and BLOCK.match(name)]
    names = [name for name in linears if adapts[part_of(name)] and not any(word in name for word in excluded)]
    return names if args.num_lora_modules == -1 else names[-args.num_lora_modules :]


def inject(model, args):
    """Give the linear layers that args (LoraArgs) name a fresh adapter, and freeze all that args do not free; returns
    the layers' names."""
    names = targets(model, args)
    sides = [min(model.get_submodule(name).weight.shape) for name in names]
    if sides and args.lora_rank > max(sides):
        expected = f"expected at most {max(sides)}: no layer that is adapted has a higher rank itself"
        raise UserError(f"--lora_rank: got {args.lora_rank}, {expected}")
    replace_linears(model, names, args)
    return names


def replace_linears(model, names, args):
    """Put LoRALinears in place of the named layers, one BlockAdapters a block, and freeze the rest."""
    assert not lora_layers(model), "the model carries an adapter already"
    blocks = {}  # name: its layers
    for name in names:
        layer = LoRALinear(model.get_submodule(name), args)
        model.set_submodule(name, layer)
        blocks.setdefault(BLOCK.match(name)[0], []).append(layer)
    for block, layers in blocks.items():
        BlockAdapters(model.get_submodule(block), layers, args.lora_rank)
    model.lora_args = args
    model.lora_base_names = set()  # base tensors that came with the adapter, and are saved with it again
    set_trainable(model, args)


def set_trainable(model, args):
    """Freeze everything, then free exactly what args (LoraArgs) name. UserError when nothing is left to train."""
    adapts = switches(args)
    whole = {"vision": not args.freeze_vision_tower, "merger": args.tune_merger, "llm": not args.freeze_llm}
    for name, parameter in model.named_parameters():
        trained = adapts if name.endswith(f".{FLAT}") else whole
        parameter.requires_grad_(trained[part_of(name)])
    if not trainable_parameters(model):
        raise UserError("nothing is left to train: no component is free, and those switched on have no adapter")


def param_groups(model, args):
    """Optimizer groups: one learning rate a component (args: SFT), weight decay on matrices and adapters."""
    rates, groups = {"llm": None, "vision": args.vision_lr, "merger": args.merger_lr}, {}
    for name, parameter in trainable_parameters(model):
        component, decays = part_of(name), parameter.ndim >= 2 or name.endswith(FLAT)
        decay = args.weight_decay if decays else 0.0
        new = {"params": [], "lr": rates[component] or args.learning_rate, "weight_decay": decay}
        group = groups.setdefault(f"{component}{'' if decays else ' no decay'}", new)
        group["params"].append(parameter)
    return [{"name": name} | group for name, group in groups.items()]


# -- Off, reference, merged


@contextmanager
def disabled(model):
    """Inside, the adapters take no part: the base model. Not around a forward whose backward recomputes later."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def reference_snapshot(model):
    """{name: copy} of all that is trained, as it is now: the frozen policy that KL is measured against."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model)}


@contextmanager
def reference(model, snapshot):
    """Inside, the model computes with the snapshot's tensors and without gradients; the trained ones come back after.
    Only the parameters' storage is exchanged: optimizers that hold them, or flat views of them, notice nothing."""
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name].data for name in snapshot}
    for name, tensor in snapshot.items():
        parameters[name].data = tensor
    try:
        with torch.no_grad():
            yield
    finally:
        for name, tensor in trained.items():
            parameters[name].data = tensor


@torch.no_grad()
def merge(model):
    """Add every adapter to its weight and put plain Linear layers back; the outputs stay the same up to rounding."""
    layers = lora_layers(model)
    for name, layer in layers:
        assert isinstance(layer.weight, nn.Parameter), f"{layer.weight}: rounding would swallow most of the adapter"
        layer.weight.copy_(shifted(layer.weight, layer.lora_A, layer.lora_B, layer.scaling))
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        model.set_submodule(name, plain)
    for block in {layer.home for _, layer in layers}:
        block.remove()
