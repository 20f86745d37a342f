"""What a run will do, told before it does it: data, steps, memory, time, and flags without effect.

    dry_run(cfg, script, make_loader, held_out)     --dry_run: the whole plan on stdout; nothing is written anywhere
    brief(run, model, …)                            the lines of it that a real run begins with

The numbers are training/forecast.py's; here they are put in words. plan: a Forecast.
"""

import json
import os
import statistics
import textwrap
from types import SimpleNamespace

from config import as_dict, ignored_options
from data import Processor, load_tokenizer
from lora import FLAT, lora_layers, part_of, sizes
from model.fast.graphs import MAX_KEPT
from training.checkpoint import RUN, read_json
from training.forecast import TIGHT, Device, Forecast, shape_of
from training.memory import CONTEXT, GIB, peak, total

LOOK, GLANCE = 1000, 64  # samples looked at by a dry run, and at the start of a real one


def lines(plan, script):
    yield f"plan of {script}: {plan.cfg.model_id} -> {plan.folder} (nothing is run or written)"
    yield from data_lines(plan)
    yield from step_lines(plan)
    yield from parameter_lines(plan)
    yield from memory_lines(plan)
    yield f"  time       {time(plan)}"
    yield from flag_lines(plan)


def brief_lines(plan):
    """For the start of a run: data, memory, time."""
    data, there = plan.data, plan.data.there
    packed = packing(plan) if plan.sampled is None else group_packing(plan)
    tokens, vision = sum(size.tokens for size in there), sum(size.vision for size in there)
    told = f"{len(data.sizes):,} samples ({data.looked:,} looked at), {tokens:,} tokens an epoch, {vision:,} vision"
    (memory, *_), warning = list(memory_lines(plan)), verdict(plan)
    yield f"  data       {told}; {packed}"
    yield memory + (f"; {warning}" if warning else "")
    yield f"  time       {time(plan)}"


def data_lines(plan):
    found, there = plan.data, plan.data.there
    tokens, vision = (sum(getattr(size, name) for size in there) for name in ("tokens", "vision"))
    count, every = len(found.sizes), found.looked == len(found.sizes)
    looked = "all looked at" if every else f"{found.looked:,} of them looked at, the rest counted like these"
    what = "tokens" if plan.sampled is None else "prompt tokens"
    told = f"{tokens:,} {what} an epoch: {vision:,} vision, {tokens - vision:,} text"
    if plan.sampled is None:
        told += f" (of which {sum(size.answers for size in there):,} trained)"
    yield f"  data       {count:,} samples, {looked}"
    yield f"             {'' if every else 'about '}{told}"
    lengths = sorted(size.tokens for size in there)
    median = statistics.median(lengths)
    yield f"             a sample: {lengths[0]:,} to {lengths[-1]:,} tokens, median {median:,.0f}"
    if found.left_out:
        share = len(found.left_out) / found.looked
        name, why = next(iter(found.left_out.items()))
        told = f"{len(found.left_out)} of {found.looked:,} left out ({share:.1%}); the first: {name}: {why}"
        yield f"             {told}"
        if share > plan.cfg.max_skip_share:
            yield f"             a run would stop: max_skip_share is {plan.cfg.max_skip_share}"


def packing(plan):
    """Micro-batches, how full they are, and what padding would have cost."""
    cfg = plan.cfg
    tokens, count = sum(load.tokens for load in plan.loads), len(plan.loads)
    lengths = [size.tokens for size in plan.data.there]
    padding = 1 - statistics.fmean(lengths) / max(lengths)
    each = count / plan.looked_steps / plan.world
    told = f"{each:.1f} micro-batches a step and rank, {tokens / count:,.0f} tokens each"
    if plan.ranks > plan.world:
        return f"{told}, those of one card of {plan.loader.readers}"
    if cfg.pack_tokens:
        told += f", {tokens / count / cfg.pack_tokens:.0%} of pack_tokens {cfg.pack_tokens:,}"
    return f"{told}; no padding (in padded batches up to {padding:.0%})"


def group_packing(plan):
    """The same of GRPO's updates, for the largest prompts and completions of full length."""
    cfg, G, loads = plan.cfg, plan.cfg.num_generations, plan.group_loads(plan.cfg)
    tokens, count = sum(load.tokens for load in loads), len(loads)
    groups = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps // G
    prompts = sum(size.tokens for size in plan.largest(groups))
    repeated = G * (prompts + len(plan.largest(groups)) * cfg.max_completion_length)
    full = f", {tokens / count / cfg.pack_tokens:.0%} of pack_tokens {cfg.pack_tokens:,}" if cfg.pack_tokens else ""
    told = f"{count} micro-batches a step and rank, {tokens / count:,.0f} tokens each{full}"
    return f"{told}; no padding, {tokens / repeated:.0%} of what {G} times the prompt would take"


def step_lines(plan):
    cfg, loader = plan.cfg, plan.loader
    batch, micro = cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps
    ranks = f"{plan.world} rank{'s' * (plan.world > 1)}"
    if plan.ranks > plan.world:
        ranks = f"{plan.world} group{'s' * (plan.world > 1)} of {loader.readers} ranks"
    if plan.sampled is None:
        yield f"  a step     {batch} samples x {micro} x {ranks} = {loader.global_batch} samples"
        yield f"             {packing(plan)}"
    else:
        G = cfg.num_generations
        told = f"{batch} completions x {micro} x {ranks} = {batch * micro // G * plan.world} groups of {G}"
        yield f"  a step     samples {loader.global_batch} prompts x {G}, trains on {told}"
        yield f"             with the largest prompts and {cfg.max_completion_length} tokens a completion:"
        yield f"             {group_packing(plan)}"
    tokens = sum(size.tokens for size in plan.data.there) * plan.steps / loader.steps_per_epoch
    epochs = plan.steps / loader.steps_per_epoch
    what = "tokens" if plan.sampled is None else "prompt tokens"
    told = f"{plan.steps:,} in all ({epochs:.3g} epochs, {tokens:,.0f} {what})"
    yield f"  steps      {loader.steps_per_epoch:,} an epoch, {told}; checkpoints {checkpoints(plan)}"


def checkpoints(plan):
    if plan.cfg.save_strategy == "no":
        return "at the end"
    every = plan.cfg.save_steps if plan.cfg.save_strategy == "steps" else plan.loader.steps_per_epoch
    return f"every {every} steps"


def parameter_lines(plan):
    """Total and trained numbers of each part; adapters apart from what is thawed."""
    for number, (part, (whole, adapters, thawed)) in enumerate(parameters(plan.model).items()):
        both = (adapters, "adapters"), (thawed, "thawed tensors")
        some = [f"{count:,} in {what}" for count, what in both if count]
        share = f" ({100 * (adapters + thawed) / whole:.2f} %)" if adapters + thawed else ""
        told = f"{' and '.join(some)}{share}" if some else "frozen"
        yield f"  {'parameters' if number == 0 else '':<10} {part:<15} {whole:>14,}  trained: {told}"


def memory_lines(plan):
    moments, slow = plan.fitted(plan.moments)
    name, components = peak(moments)
    d = plan.device
    whole = f"{d.name}: {d.whole / GIB:.1f} GiB, {d.free / GIB:.1f} free"
    kind = "bf16 or fp16" if d.number == 2 else "fp32"
    yield f"  memory     about {total(components) / GIB:.2f} GiB at most, in {kind} ({d.reason}); {whole}"
    yield f"             the most at: {name}; of it"
    for part, size in sorted(components.items(), key=lambda item: -item[1]):
        if size >= 0.005 * GIB:
            yield f"               {part:<24}{size / GIB:8.2f} GiB"
    if told := graphs(plan, total(components)):
        yield f"             {told}"
    told = "all moments: " + ", ".join(f"{total(found) / GIB:.2f} {moment}" for moment, found in moments.items())
    yield from textwrap.wrap(told, 120, initial_indent=" " * 13, subsequent_indent=" " * 13)
    if slow:
        yield "             the sampling copy does not fit: decoding will take the slow path"
    if verdict(plan):
        yield f"             {verdict(plan)}"


def graphs(plan, most):
    """Of the CUDA graphs; "" where there will be none. Passes of GRPO differ in size as completions do."""
    if not (plan.device.cuda and plan.cfg.cuda_graphs) or plan.ranks > plan.world or plan.cfg.partition_weights:
        return ""
    memory = plan.counted(plan.cfg)
    loads, sizes = (plan.loads, None) if plan.sampled is None else (plan.group_loads(plan.cfg), MAX_KEPT)
    found = memory.graphs(loads, most - CONTEXT, plan.device.whole, sizes)
    what = ", ".join(f"{size / GIB:.2f} of the {stack}" for stack, size in found.items())
    if not found:
        return "CUDA graphs: none, no pass is small enough for what is left of the device"
    size = sum(found.values()) / GIB
    return f"CUDA graphs keep about {size:.2f} GiB beside that ({what}); --cuda_graphs False spares it"


def verdict(plan):
    """What to do where it does not fit; "" where it does."""
    need, room = total(peak(plan.fitted(plan.moments)[0])[1]), plan.room
    if not room or need <= TIGHT * room:
        return ""
    what = f"needs about {need / GIB:.1f} GiB, the device has {room / GIB:.1f}"
    if need <= room:
        return f"TIGHT: {what}; fragments may take the rest"
    tries = [f"{flags} ({size / GIB:.1f})" for flags, size in plan.remedies()]
    return f"DOES NOT FIT: {what}{': try ' if tries else ''}{', '.join(tries)}"


def time(plan):
    """By the steps of a former run in the same folder."""
    path, run = plan.folder / "metrics.jsonl", plan.folder / RUN
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run's last line may be cut short
    timed = [row["ms"] for row in rows if row.get("ms")][1:]  # the first one warms up
    if not timed or not run.exists():
        return f"not known: no step was timed in {plan.folder} yet; a run of --max_steps 5 there would tell"
    before, now = read_json(run)["config"], as_dict(plan.cfg)
    size = lambda c: c["per_device_train_batch_size"] * c["gradient_accumulation_steps"]
    seconds = statistics.median(timed) / 1000 * size(now) / size(before)
    scaled = "" if size(now) == size(before) else f", scaled from {size(before)} to {size(now)} samples"
    told = f"{seconds:.2f} s a step, the median of {len(timed)} in {path}{scaled}"
    return f"{clock(seconds * plan.steps)} for {plan.steps:,} steps, without evaluation ({told})"


def flag_lines(plan):
    found = [*ignored_options(plan.cfg), *plan.notes, *more_ignored_options(plan)]
    yield f"  flags      {len(found)} without effect or noteworthy" if found else "  flags      all have an effect"
    for line in found:
        yield f"             {line}"


def more_ignored_options(plan):
    """What only the data, the device and the folder can tell."""
    cfg, given = plan.cfg, plan.cfg.given
    for kind in ("video", "image"):
        for name in sorted(given):
            if name.startswith((f"{kind}_m", f"{kind}_resized")) and kind not in plan.data.kinds:
                yield f"--{name} has no effect: there is no {kind} in the data"
    for name in ("fps", "nframes", "min_frames", "max_frames"):
        if name in given and "video" not in plan.data.kinds:
            yield f"--{name} has no effect: there is no video in the data"
    if "eval_steps" in given and not plan.held:
        yield "--eval_steps has no effect: there is no held-out data"
    if "tf32" in given and not (plan.device.cuda and plan.device.number == 4):
        yield "--tf32 has no effect: it is for fp32 on a GPU"
    if "pack_tokens" in given and cfg.pack_tokens and plan.data.there:
        longest = max(size.tokens for size in plan.data.there)
        if longest > cfg.pack_tokens:
            yield f"--pack_tokens {cfg.pack_tokens}: the longest sample has {longest} tokens and stands alone"
    others = plan.folder.is_dir() and any(p.name == RUN for p in plan.folder.iterdir())
    if others and not (cfg.resume or cfg.overwrite):
        yield f"--output_dir {plan.folder} holds a run: --resume or --overwrite will be asked for"


def parameters(model):
    """{part: [the base's numbers, adapters' that are trained, the base's that are]}, and their sums: "all"."""
    words = {"llm": "language model", "vision": "vision tower", "merger": "merger"}
    counts, numbers = {word: [0, 0, 0] for word in words.values()}, sizes(model)
    for name, parameter in model.named_parameters():
        count, is_adapter = counts[words[part_of(name)]], name.endswith(FLAT)
        count[0] += 0 if is_adapter else numbers[name]
        if parameter.requires_grad:
            count[1 if is_adapter else 2] += numbers[name]
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    return counts


def clock(seconds):
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{hours:.1f} h"


def dry_run(cfg, script, make_loader, records, held_out, sampled=None):
    """Print the plan. make_loader(run, records, processor): the trainer's own Loader; run: cfg, rank, world."""
    if int(os.environ.get("RANK", "0")):
        return
    device = Device.here(cfg)
    model, folder, notes = shape_of(cfg, device.number)
    if sampled is not None:
        for _, layer in lora_layers(model):
            layer.dropout = 0.0  # as train_grpo
    processor = Processor(load_tokenizer(folder), model.config, cfg)
    world = max(1, int(os.environ.get("WORLD_SIZE", "1")) // cfg.sequence_parallel)
    run = SimpleNamespace(cfg=cfg, rank=0, world=world, data_rank=0, data_world=world)
    loader = make_loader(run, records, processor)
    plan = Forecast(cfg, model, processor, records, loader, held_out, device, LOOK, sampled)
    plan.notes += notes
    print("\n".join(lines(plan, script)))


def brief(run, model, processor, records, loader, held_out, sampled=None):
    """The plan's lines for the start of a real run; [] on other ranks than the first."""
    if run.rank:
        return []
    device = Device.here(run.cfg)
    plan = Forecast(run.cfg, model, processor, records, loader, held_out, device, GLANCE, sampled)
    return list(brief_lines(plan))
