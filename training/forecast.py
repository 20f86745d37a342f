"""What a run will take, in numbers: its data, steps and micro-batches, and the memory of every moment.

    Forecast(cfg, model, processor, records, loader, held_out, Device.here(cfg), LOOK)

Of the data, LOOK samples are looked at, not decoded (training/survey.py). Memory is counted from shapes
(training/memory.py), with the weights on `meta`: a folder with config.json and tokenizer.json is enough. plan.py tells
all this in words.
"""

import copy
import os
import resource
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch

from dataset.video import ROW
from interop.saved import load_adapter
from lora import inject, set_trainable
from model.fast.decoder import MARGIN
from model.loading import ModelConfig, resolve_folder
from model.qwen import Qwen2_5_VL
from training.checkpoint import find_adapter
from training.engine import deepspeed_config, precision
from training.evaluation import EVAL_TOKENS, prompt_batches
from training.memory import CONTEXT, GIB, Memory, peak, total
from training.survey import group_loads, sft_loads, survey

ACTIVATIONS = "vision activations", "language activations", "logits and loss"
TIGHT = 0.92  # share of the device above which the allocator's rounding and fragments may not fit any more


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


class Forecast:
    """model: with adapters, as it is trained, on any device. loader: the trainer's own. held_out: records to evaluate.

    look: samples looked at. sampled: train_grpo's SAMPLED_TOKENS, None for SFT.
    """

    def __init__(self, cfg, model, processor, records, loader, held_out, device, look, sampled=None):
        self.cfg, self.model, self.loader, self.device, self.sampled = cfg, model, loader, device, sampled
        self.world, self.folder = loader.world_size, Path(cfg.output_dir)  # ranks that share batches count as one
        self.ranks = self.world * loader.readers
        workers = max(1, cfg.dataloader_num_workers)
        self.data = survey(records, processor, sampled is None, look, workers)
        self.held = survey(held_out, processor, False, min(look, 100), workers) if held_out else None
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        settings = torch.device("cuda" if device.cuda else "cpu"), model.head_weight.dtype, self.ranks, count
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

    def counted(self, cfg):
        # ranks of this machine, as deepspeed and torchrun tell them
        local = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or self.ranks)
        return Memory(self.model, cfg, self.device.number, self.ranks, self.device.cuda, self.zero, local)

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
        tokens = max((load.tokens for load in self.loads), default=0) * self.loader.readers
        for smaller in (2**n for n in range(7, 20)):
            if largest <= smaller < tokens:
                offers += [{"pack_tokens": smaller}] + [{"pack_tokens": smaller} | recompute] * bool(offers)
        if self.device.cuda and not cfg.offload_optimizer:
            offers.append(offload)
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
