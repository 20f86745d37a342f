"""python lora.py merge | check | convert. Imports no torch before the flags are right."""

import json
import re
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from config import Adapter, ignored_options, parse
from model import UserError
from training.checkpoint import STATE, find_adapter, sync


def main(argv=None):
    cfg = parse(Adapter, argv)
    for line in ignored_options(cfg):
        print(f"note: {line}")
    adapter = find_adapter(cfg.adapter)
    {"merge": merge, "check": check, "convert": convert}[cfg.command](cfg, adapter)


@contextmanager
def new_folder(path):
    """A folder to fill, which stands under its name only once it is complete."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--output_dir: {path} already holds something, expected a new folder; choose another name")
    beside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        for file in [*beside.iterdir(), beside]:
            sync(file)
        if path.exists():
            path.rmdir()
        beside.rename(path)
    except OSError as error:
        raise UserError(f"--output_dir: {path} cannot be written ({error}); make room or choose another") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def base_folder(cfg, config):
    """The checkpoint that --model_id names, or else the adapter."""
    from model.loading import resolve_folder

    named = cfg.model_id or config.get("base_model_name_or_path")
    if not named:
        raise UserError("--model_id: the adapter names no base, expected the checkpoint that it was trained on")
    return resolve_folder(named, cfg.local_files_only)


def merge(cfg, adapter):
    """base + adapter -> a Hugging Face folder."""
    from interop.merged import GENERATION, write_merged
    from interop.saved import read_adapter

    base = base_folder(cfg, read_adapter(adapter)[0])
    with new_folder(cfg.output_dir) as folder:
        files = write_merged(base, adapter, folder, int(cfg.shard_gb * 1e9))
        size = sum((folder / file).stat().st_size for file in files)
    print(f"{cfg.output_dir}: {base} + {adapter}, {size / 1e9:.3g} GB of bf16 weights in {len(files)} file(s)")
    print(f"{GENERATION} is greedy, as infer.py answers; the base's sampling settings are not taken over")


def convert(cfg, adapter):
    """The adapter under the key names of the other transformers."""
    from interop.keys import NEW, OLD, renamed, styles
    from interop.saved import CONFIG, TENSORS, read_adapter
    from model.loading import save_tensors

    config, tensors = read_adapter(adapter)
    style = cfg.keys or (OLD if styles(tensors) == [NEW] else NEW)
    config, tensors = renamed(config, tensors, style, adapter)
    with new_folder(cfg.output_dir) as folder:
        save_tensors(tensors, folder / TENSORS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (adapter / STATE).is_file():
            shutil.copyfile(adapter / STATE, folder / STATE)
    print(f"{cfg.output_dir}: {len(tensors)} tensors of {adapter} with the key names of {style}")


def check(cfg, adapter):
    """Print what an adapter is, and who loads it."""
    from interop.keys import LOADS, styles, verdicts
    from interop.saved import read_adapter, split_keys
    from lora import part_of

    config, tensors = read_adapter(adapter)
    layers, own = split_keys(tensors, adapter)
    parts = Counter(part_of(name) for name in layers)
    leaves = Counter(re.search(r"\w+(\.\d+)?$", name)[0] for name in layers)
    count = sum(t.numel() for pair in layers.values() for t in pair.values())
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    rs = ", rank-stabilised" if config.get("use_rslora") else ""
    told = verdicts(config, tensors, adapter)
    print(f"adapter   {adapter}")
    print(f"base      {config.get('base_model_name_or_path') or '(not named)'}")
    print(f"rank      {config['r']}, alpha {config['lora_alpha']:g}{rs}, dropout {config.get('lora_dropout', 0.0):g}")
    print(f"targets   {len(layers)} layers: " + ", ".join(f"{part} {n}" for part, n in sorted(parts.items())))
    print("          " + ", ".join(f"{leaf} x {n}" for leaf, n in sorted(leaves.items())))
    print(f"sizes     {count:,} numbers in adapters, {', '.join(kinds)}")
    if own:
        print(f"          {sum(t.numel() for t in own.values()):,} in {len(own)} tensors of the base, trained too")
    print(f"non-zero  {non_zero(layers)}")
    print(f"keys      {' and '.join(styles(tensors)) or 'of no known style'}")
    for reader, verdict in told.items():
        print(f"PEFT      on {reader}: {verdict}")
    if set(told.values()) != {LOADS}:
        print(f"          to load it there: python lora.py convert {adapter} --output_dir NEW_FOLDER")
    print(f"here      {fits(cfg, config, adapter)}")


def non_zero(layers):
    """The share of numbers in A and B that are not zero, and what that means where it means something."""
    shares = []
    for letter in "AB":
        found = [pair[f"lora_{letter}"] for pair in layers.values() if f"lora_{letter}" in pair]
        count = sum(t.numel() for t in found)
        shares.append(f"{letter} {sum(int(t.count_nonzero()) for t in found) / max(count, 1):.1%}")
    dead = [name for name, pair in layers.items() if "lora_B" in pair and not pair["lora_B"].any()]
    if layers and len(dead) == len(layers):
        told = "; UNTRAINED: every B is zero, the adapter changes nothing"
    else:
        told = f"; {len(dead)} layers have a B of zeros and change nothing: {dead[0]} …" if dead else ""
    return ", ".join(shares) + told


def fits(cfg, config, adapter):
    """Whether every tensor has its place in the base, in words; a base that is not here is told, not fetched."""
    from interop.merged import meta_model
    from interop.saved import fit_adapter

    cfg.local_files_only = True
    try:
        base = base_folder(cfg, config)
    except UserError as error:
        return f"not held against its base: {error}"
    try:
        fit_adapter(meta_model(base), adapter)
    except UserError as error:
        return f"does not load: {error}"
    return f"loads; every tensor has its place in {base}"
