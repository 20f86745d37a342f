"""What a run will do, told before it does it: data, steps, memory, time, and flags without effect.

    dry_run(cfg, script, make_loader, held_out)     --dry_run: the whole plan on stdout; nothing is written anywhere
    brief(run, model, …)                            the lines of it that a real run begins with

Of the data, LOOK samples are looked at, not decoded (training/survey.py). Memory is counted from shapes
(training/memory.py), with the weights on `meta`: a folder with config.json and tokenizer.json is enough.
"""

import copy
import json
import os
import resource
import statistics
import textwrap
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from config import as_dict, inert
from data import Processor, load_tokenizer
from dataset.video import ROW
from lora import FLAT, inject, load_adapter, lora_layers, part_of, set_trainable, sizes
from model.captured import MAX_KEPT
from model.fast_decode import MARGIN
from model.qwen2_5_vl import ModelConfig, Qwen2_5_VL, resolve_folder
from training.checkpoint import RUN, find_adapter, read_json
from training.engine import deepspeed_config, precision
from training.evaluation import EVAL_TOKENS, prompt_batches
from training.memory import CONTEXT, GIB, Memory, peak, total
from training.survey import group_loads, sft_loads, survey

ACTIVATIONS = "vision activations", "language activations", "logits and loss"
LOOK, GLANCE = 1000, 64  # samples looked at by a dry run, and at the start of a real one
TIGHT = 0.92  # share of the device above which the allocator's rounding and fragments may not fit any more


# The device


class Device(NamedTuple):
    name: str
    whole: int  # bytes
    free: int
    cuda: bool
    number: int  # bytes of a weight
    reason: str  # of this precision

    @classmethod
    def here(cls, cfg):
        """This machine's GPU, or its processor's memory; or the GPU that --dry_run_gib asks to imagine."""
        if cfg.dry_run and cfg.dry_run_gib:
            size, number = int(cfg.dry_run_gib * GIB), 4 if cfg.bf16 is False and not cfg.fp16 else 2
            return cls(f"a GPU of {cfg.dry_run_gib:g} GiB", size, size - CONTEXT, True, number, "--dry_run_gib")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            dtype, reason = precision(cfg, device)
            free, whole = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device)  # what this process has taken already is its own
            return cls(torch.cuda.get_device_name(device), whole, free, True, dtype.itemsize, reason)
        dtype, reason = precision(cfg, torch.device("cpu"))
        lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
        facts = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
        found = facts.get("MemTotal", 0), facts.get("MemAvailable", 0)
        return cls("CPU", *found, False, dtype.itemsize, reason)


# The plan


class Plan:
    """model: with adapters, as it is trained, on any device. loader: the trainer's own. held_out: records to evaluate.

    look: samples looked at. sampled: train_grpo's SAMPLED_TOKENS, None for SFT.
    """

    def __init__(self, cfg, model, processor, records, loader, held_out, device, look, sampled=None):
        self.cfg, self.model, self.loader, self.device, self.sampled = cfg, model, loader, device, sampled
        self.world, self.folder = loader.world_size, Path(cfg.output_dir)
        workers = max(1, cfg.dataloader_num_workers)
        self.data = survey(records, processor, sampled is None, look, workers)
        self.held = survey(held_out, processor, False, min(look, 100), workers) if held_out else None
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        settings = torch.device("cuda" if device.cuda else "cpu"), model.head_weight.dtype, self.world, count
        config, self.notes = deepspeed_config(cfg, *settings)
        self.zero = config["zero_optimization"]
        self.steps = cfg.max_steps if cfg.max_steps > 0 else loader.num_steps(cfg.num_train_epochs)
        # steps whose batches are put together: of one epoch, and not of a whole long one
        self.looked_steps = min(self.steps, loader.steps_per_epoch, 2 * look)
        self.loads, self.most = self.plan_loads(cfg)
        self.moments = self.memory(cfg, self.loads, self.most)

    def plan_loads(self, cfg):
        """SFT's micro-batches of `looked_steps` steps, and the most of one step."""
        if self.sampled is not None:
            return [], 0
        loader = copy.copy(self.loader)
        loader.args = cfg
        loader.lengths = loader.lengths[:]
        return sft_loads(loader, self.data, self.looked_steps)

    # memory

    def counted(self, cfg):
        # ranks of this machine, as deepspeed and torchrun tell them
        local = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or self.world)
        return Memory(self.model, cfg, self.device.number, self.world, self.device.cuda, self.zero, local)

    def memory(self, cfg, loads, most):
        """{moment: {component: bytes}}: the worst micro-batch, sampling, evaluation."""
        memory = self.counted(cfg)
        if self.sampled is None:
            worst = {max(loads, key=attrgetter(name)) for name in ("tokens", "patches", "answers")}
            moments = [memory.update(load, most) for load in worst]
        else:
            moments = self.grpo_moments(cfg, memory)
        if self.held and cfg.eval_data_path is not None:
            moments.append(self.evaluation(cfg, memory))
        found = {}
        for name, components in (item for each in moments for item in each.items()):
            if name not in found or total(components) > total(found[name]):
                found[name] = components
        outside = {"context and libraries": CONTEXT}
        if not self.device.cuda:
            clips = self.data.there
            kept = min(cfg.cache_mb << 20, sum(size.patches for size in clips) * ROW)
            # this process has all libraries loaded: what it takes now is what they take
            outside = {"Python and libraries": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
            outside["decoded clips kept"] = kept
        return {name: components | outside for name, components in found.items()}

    def grpo_moments(self, cfg, memory):
        """A step's rollouts and updates, with the largest prompts of the data and completions of full length."""
        G, longest = cfg.num_generations, cfg.max_completion_length
        count = min(len(self.data.there), self.loader.global_batch // self.world)
        largest = self.largest(count)
        top = max(size.tokens for size in largest)
        moments = []
        for batch in prompt_batches(largest, self.sampled * top // (top + G * longest)):
            moments.append(self.sampled_batch(memory, batch, G, longest))
        loads = self.group_loads(cfg)
        inputs = sum(map(memory.inputs, loads))
        return moments + [memory.update(load, len(loads), inputs) for load in set(loads)]

    def largest(self, count):
        return sorted(self.data.there, key=lambda size: size.tokens + size.patches, reverse=True)[:count]

    def group_loads(self, cfg):
        """The micro-batches of a GRPO step's update."""
        groups = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps // cfg.num_generations
        prompts = [(size.tokens, size.patches, size.part) for size in self.largest(groups)]
        return group_loads(prompts, [[cfg.max_completion_length] * cfg.num_generations] * len(prompts), cfg)

    def evaluation(self, cfg, memory):
        found = [self.sampled_batch(memory, batch, 1, cfg.max_new_tokens, "evaluation: ")
                 for batch in prompt_batches(self.held.there, EVAL_TOKENS)]  # fmt: skip
        return max(found, key=lambda moments: total(peak(moments)[1]))

    def sampled_batch(self, memory, batch, group, new, word=""):
        tokens, patches = sum(size.tokens for size in batch), sum(size.patches for size in batch)
        truncated = bool(getattr(self.cfg, "top_k", 0) or getattr(self.cfg, "top_p", 1) < 1)
        found = memory.sampling(tokens, max(map(len, batch)), patches, len(batch), group, new, truncated)
        return {f"{word}{name}": components for name, components in found.items()}

    def fitted(self, moments):
        """(the moments, whether decoding is slow): where memory is short, fast_decode.py makes no sampling copy. (A
        CPU's is small and always made.)"""
        while_sampling = ("sampling copy", "KV cache", "buffers of a step", "inputs", *ACTIVATIONS)

        def short(found):
            there = sum(size for name, size in found.items() if name not in while_sampling)
            return there + found["sampling copy"] + MARGIN > self.room

        copies = [name for name, found in moments.items() if "sampling copy" in found and self.device.cuda]
        slow = [name for name in copies if short(moments[name])]
        return moments | {name: moments[name] | {"sampling copy": 0} for name in slow}, bool(slow)

    @property
    def room(self):
        """Bytes that a run may have, its context included."""
        return self.device.free + (CONTEXT if self.device.cuda else total(self.outside))

    @property
    def outside(self):
        names = "context and libraries", "Python and libraries"
        return {name: size for name, size in next(iter(self.moments.values())).items() if name in names}

    def remedies(self):
        """[(flags, bytes needed with them)] of what makes a run smaller: first what fits, and of that the least."""
        cfg = self.cfg
        recompute, offload = ({name: True} for name in ("gradient_checkpointing", "offload_optimizer"))
        offers = [] if cfg.gradient_checkpointing else [recompute]
        largest = max(size.tokens for size in self.data.there)
        tokens = max((load.tokens for load in self.loads), default=0)
        for smaller in (2**n for n in range(7, 20)):
            if largest <= smaller < tokens:
                offers += [{"pack_tokens": smaller}] + [{"pack_tokens": smaller} | recompute] * bool(offers)
        if self.device.cuda and not cfg.offload_optimizer:
            offers.append(offload)
        adapters_only = cfg.lora_enable and cfg.freeze_llm and cfg.freeze_vision_tower and cfg.lora_bias == "none"
        if self.device.cuda and adapters_only and not cfg.offload_weights:
            part = {"gradient_checkpointing": True, "partition_weights": True}
            part = {name: True for name in part if not getattr(cfg, name)}
            offers += [part] * (self.world > 1 and not cfg.partition_weights) + [part | {"offload_weights": True}]
        if cfg.eval_data_path is not None and self.held:
            offers.append({"eval_data_path": None})
        found = []
        for changes in offers:
            other = copy.copy(cfg)
            vars(other).update(changes)
            moments, _ = self.fitted(self.memory(other, *self.plan_loads(other)))
            flags = " ".join(f"--{name} {'none' if value is None else value}" for name, value in changes.items())
            found.append((flags, total(peak(moments)[1]), len(changes)))
        now = total(peak(self.fitted(self.moments)[0])[1])
        found = [each for each in found if each[1] < 0.99 * now]
        fits = lambda each: each[1] <= TIGHT * self.room
        found.sort(key=lambda each: (0, each[2], each[1]) if fits(each) else (1, each[1]))
        return [(flags, size) for flags, size, _ in found[:4]]

    # what is told

    def lines(self, script):
        yield f"plan of {script}: {self.cfg.model_id} -> {self.folder} (nothing is run or written)"
        yield from self.data_lines()
        yield from self.step_lines()
        yield from self.parameter_lines()
        yield from self.memory_lines()
        yield f"  time       {self.time()}"
        yield from self.flag_lines()

    def brief(self):
        """For the start of a run: data, memory, time."""
        data, there = self.data, self.data.there
        packing = self.packing() if self.sampled is None else self.group_packing()
        tokens, vision = sum(size.tokens for size in there), sum(size.vision for size in there)
        told = f"{len(data.sizes):,} samples ({data.looked:,} looked at), {tokens:,} tokens an epoch, {vision:,} vision"
        (memory, *_), verdict = list(self.memory_lines()), self.verdict()
        yield f"  data       {told}; {packing}"
        yield memory + (f"; {verdict}" if verdict else "")
        yield f"  time       {self.time()}"

    def data_lines(self):
        found, there = self.data, self.data.there
        tokens, vision = (sum(getattr(size, name) for size in there) for name in ("tokens", "vision"))
        count, every = len(found.sizes), found.looked == len(found.sizes)
        looked = "all looked at" if every else f"{found.looked:,} of them looked at, the rest counted like these"
        what = "tokens" if self.sampled is None else "prompt tokens"
        told = f"{tokens:,} {what} an epoch: {vision:,} vision, {tokens - vision:,} text"
        if self.sampled is None:
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
            if share > self.cfg.max_skip_share:
                yield f"             a run would stop: max_skip_share is {self.cfg.max_skip_share}"

    def packing(self):
        """Micro-batches, how full they are, and what padding would have cost."""
        cfg = self.cfg
        tokens, count = sum(load.tokens for load in self.loads), len(self.loads)
        lengths = [size.tokens for size in self.data.there]
        padding = 1 - statistics.fmean(lengths) / max(lengths)
        each = count / self.looked_steps / self.world
        told = f"{each:.1f} micro-batches a step and rank, {tokens / count:,.0f} tokens each"
        if cfg.pack_tokens:
            told += f", {tokens / count / cfg.pack_tokens:.0%} of pack_tokens {cfg.pack_tokens:,}"
        return f"{told}; no padding (in padded batches up to {padding:.0%})"

    def group_packing(self):
        """The same of GRPO's updates, for the largest prompts and completions of full length."""
        cfg, G, loads = self.cfg, self.cfg.num_generations, self.group_loads(self.cfg)
        tokens, count = sum(load.tokens for load in loads), len(loads)
        groups = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps // G
        prompts = sum(size.tokens for size in self.largest(groups))
        repeated = G * (prompts + len(self.largest(groups)) * cfg.max_completion_length)
        full = f", {tokens / count / cfg.pack_tokens:.0%} of pack_tokens {cfg.pack_tokens:,}" if cfg.pack_tokens else ""
        told = f"{count} micro-batches a step and rank, {tokens / count:,.0f} tokens each{full}"
        return f"{told}; no padding, {tokens / repeated:.0%} of what {G} times the prompt would take"

    def step_lines(self):
        cfg, loader = self.cfg, self.loader
        batch, micro = cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps
        ranks = f"{self.world} rank{'s' * (self.world > 1)}"
        if self.sampled is None:
            yield f"  a step     {batch} samples x {micro} x {ranks} = {loader.global_batch} samples"
            yield f"             {self.packing()}"
        else:
            G = cfg.num_generations
            told = f"{batch} completions x {micro} x {ranks} = {batch * micro // G * self.world} groups of {G}"
            yield f"  a step     samples {loader.global_batch} prompts x {G}, trains on {told}"
            yield f"             with the largest prompts and {cfg.max_completion_length} tokens a completion:"
            yield f"             {self.group_packing()}"
        tokens = sum(size.tokens for size in self.data.there) * self.steps / loader.steps_per_epoch
        epochs = self.steps / loader.steps_per_epoch
        what = "tokens" if self.sampled is None else "prompt tokens"
        told = f"{self.steps:,} in all ({epochs:.3g} epochs, {tokens:,.0f} {what})"
        yield f"  steps      {loader.steps_per_epoch:,} an epoch, {told}; checkpoints {self.checkpoints()}"

    def checkpoints(self):
        if self.cfg.save_strategy == "no":
            return "at the end"
        every = self.cfg.save_steps if self.cfg.save_strategy == "steps" else self.loader.steps_per_epoch
        return f"every {every} steps"

    def parameter_lines(self):
        """Total and trained numbers of each part; adapters apart from what is thawed."""
        for number, (part, (whole, adapters, thawed)) in enumerate(parameters(self.model).items()):
            both = (adapters, "adapters"), (thawed, "thawed tensors")
            some = [f"{count:,} in {what}" for count, what in both if count]
            share = f" ({100 * (adapters + thawed) / whole:.2f} %)" if adapters + thawed else ""
            told = f"{' and '.join(some)}{share}" if some else "frozen"
            yield f"  {'parameters' if number == 0 else '':<10} {part:<15} {whole:>14,}  trained: {told}"

    def memory_lines(self):
        moments, slow = self.fitted(self.moments)
        name, components = peak(moments)
        d = self.device
        whole = f"{d.name}: {d.whole / GIB:.1f} GiB, {d.free / GIB:.1f} free"
        kind = "bf16 or fp16" if d.number == 2 else "fp32"
        yield f"  memory     about {total(components) / GIB:.2f} GiB at most, in {kind} ({d.reason}); {whole}"
        yield f"             the most at: {name}; of it"
        for part, size in sorted(components.items(), key=lambda item: -item[1]):
            if size >= 0.005 * GIB:
                yield f"               {part:<24}{size / GIB:8.2f} GiB"
        if told := self.graphs(total(components)):
            yield f"             {told}"
        told = "all moments: " + ", ".join(f"{total(found) / GIB:.2f} {moment}" for moment, found in moments.items())
        yield from textwrap.wrap(told, 120, initial_indent=" " * 13, subsequent_indent=" " * 13)
        if slow:
            yield "             the sampling copy does not fit: decoding will take the slow path"
        if self.verdict():
            yield f"             {self.verdict()}"

    def graphs(self, most):
        """Of the CUDA graphs; "" where there will be none. Passes of GRPO differ in size as completions do."""
        if not (self.device.cuda and self.cfg.cuda_graphs) or self.cfg.partition_weights:
            return ""
        memory = self.counted(self.cfg)
        loads, sizes = (self.loads, None) if self.sampled is None else (self.group_loads(self.cfg), MAX_KEPT)
        found = memory.graphs(loads, most - CONTEXT, self.device.whole, sizes)
        what = ", ".join(f"{size / GIB:.2f} of the {stack}" for stack, size in found.items())
        if not found:
            return "CUDA graphs: none, no pass is small enough for what is left of the device"
        size = sum(found.values()) / GIB
        return f"CUDA graphs keep about {size:.2f} GiB beside that ({what}); --cuda_graphs False spares it"

    def verdict(self):
        """What to do where it does not fit; "" where it does."""
        need, room = total(peak(self.fitted(self.moments)[0])[1]), self.room
        if not room or need <= TIGHT * room:
            return ""
        what = f"needs about {need / GIB:.1f} GiB, the device has {room / GIB:.1f}"
        if need <= room:
            return f"TIGHT: {what}; fragments may take the rest"
        tries = [f"{flags} ({size / GIB:.1f})" for flags, size in self.remedies()]
        return f"DOES NOT FIT: {what}{': try ' if tries else ''}{', '.join(tries)}"

    def time(self):
        """By the steps of a former run in the same folder."""
        path, run = self.folder / "metrics.jsonl", self.folder / RUN
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run's last line may be cut short
        timed = [row["ms"] for row in rows if row.get("ms")][1:]  # the first one warms up
        if not timed or not run.exists():
            return f"not known: no step was timed in {self.folder} yet; a run of --max_steps 5 there would tell"
        before, now = read_json(run)["config"], as_dict(self.cfg)
        size = lambda c: c["per_device_train_batch_size"] * c["gradient_accumulation_steps"]
        seconds = statistics.median(timed) / 1000 * size(now) / size(before)
        scaled = "" if size(now) == size(before) else f", scaled from {size(before)} to {size(now)} samples"
        told = f"{seconds:.2f} s a step, the median of {len(timed)} in {path}{scaled}"
        return f"{clock(seconds * self.steps)} for {self.steps:,} steps, without evaluation ({told})"

    def flag_lines(self):
        found = [*inert(self.cfg), *self.notes, *self.more_inert()]
        yield f"  flags      {len(found)} without effect or noteworthy" if found else "  flags      all have an effect"
        for line in found:
            yield f"             {line}"

    def more_inert(self):
        """What only the data, the device and the folder can tell."""
        cfg, given = self.cfg, self.cfg.given
        for kind in ("video", "image"):
            for name in sorted(given):
                if name.startswith((f"{kind}_m", f"{kind}_resized")) and kind not in self.data.kinds:
                    yield f"--{name} has no effect: there is no {kind} in the data"
        for name in ("fps", "nframes", "min_frames", "max_frames"):
            if name in given and "video" not in self.data.kinds:
                yield f"--{name} has no effect: there is no video in the data"
        if "eval_steps" in given and not self.held:
            yield "--eval_steps has no effect: there is no held-out data"
        if "tf32" in given and not (self.device.cuda and self.device.number == 4):
            yield "--tf32 has no effect: it is for fp32 on a GPU"
        if "pack_tokens" in given and cfg.pack_tokens and self.data.there:
            longest = max(size.tokens for size in self.data.there)
            if longest > cfg.pack_tokens:
                yield f"--pack_tokens {cfg.pack_tokens}: the longest sample has {longest} tokens and stands alone"
        others = self.folder.is_dir() and any(p.name == RUN for p in self.folder.iterdir())
        if others and not (cfg.resume or cfg.overwrite):
            yield f"--output_dir {self.folder} holds a run: --resume or --overwrite will be asked for"


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


# Without a run


def shape_of(cfg, number):
    """The model as trainer.build_model would make it, without storage; its folder; notes on its adapter."""
    folder = resolve_folder(cfg.model_id, cfg.local_files_only, weights=False)
    with torch.device("meta"):
        model = Qwen2_5_VL(ModelConfig.from_folder(folder)).to(torch.bfloat16 if number == 2 else torch.float32)
    adapter = None
    if cfg.model_ckpt is not None and cfg.lora_enable:
        adapter = find_adapter(cfg.model_ckpt, besides=cfg.output_dir, script="train_sft")
    notes = []
    if adapter:
        found = load_adapter(model, adapter)
        notes.append(f"goes on from the adapter of {adapter}: rank {found.lora_rank}, alpha {found.lora_alpha:g}")
        own = ("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "num_lora_modules", "lora_namespan_exclude")
        changed = [name for name in own if name in cfg.given and getattr(cfg, name) != getattr(found, name)]
        notes += [f"--{name} has no effect: the adapter has its own" for name in changed]
    else:
        inject(model, cfg)
    set_trainable(model, cfg)
    return model, folder, notes


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
    run = SimpleNamespace(cfg=cfg, rank=0, world=int(os.environ.get("WORLD_SIZE", "1")))
    loader = make_loader(run, records, processor)
    plan = Plan(cfg, model, processor, records, loader, held_out, device, LOOK, sampled)
    plan.notes += notes
    print("\n".join(plan.lines(script)))


def brief(run, model, processor, records, loader, held_out, sampled=None):
    """The plan's lines for the start of a real run; [] on other ranks than the first."""
    if run.rank:
        return []
    device = Device.here(run.cfg)
    return list(Plan(run.cfg, model, processor, records, loader, held_out, device, GLANCE, sampled).brief())
