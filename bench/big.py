"""Models that one card does not hold: a step of SFT or GRPO with the weights in parts, on as many GPUs as it is given.

    deepspeed --num_gpus 2 bench/big.py sft --model 72B --partition True
    deepspeed --num_gpus 2 bench/big.py grpo --model 32B --partition True --batch 2
    python bench/big.py sft --model 32B --offload True --batch 16         # one card: layers come from host memory
    python bench/big.py sft --model 7B                                    # one card, whole weights

Random weights at the exact shapes (no rank ever holds the whole model), workload R, adapters on every linear layer,
recomputation, the trainers' own engine, packing and functions. Every rank has `--batch` clips or prompts a step.

"waiting" is the share of the time in which a card's computing stood still because a layer's weights had not arrived;
"moved" what one rank copied into its buffers, its own part included. "GiB" is the most of any rank. GRPO's rollouts go
through a whole copy of the decoder layers, made of the parts (fast_decode.SamplingCopy) where there is room; beside it,
the time of a token whose layers are fetched one by one. The last line is one JSON object.
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from grpo import PARTS, Step, prompts_of
from memory import Case, estimate
from sft import our_step, passes
from workloads import SIZES, E, R, linear_flops, model_config, sync, yes_no

import lora
from config import SFT
from data import pack
from model.decode import Sampling, generate, generate_plain
from model.partition import Share
from model.qwen2_5_vl import Qwen2_5_VL
from training.engine import build_engine, gather, global_max, leave_processes, start_processes, update
from training.memory import peak, total

TOKENS = 16  # of a completion where whole and parted rollouts are compared


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("task", choices=["sft", "grpo"])
    parser.add_argument("--model", default="7B" if cuda else "tiny", choices=[*SIZES, "tiny"])
    parser.add_argument("--partition", type=yes_no, default=False, metavar="True|False", help="--partition_weights")
    parser.add_argument("--offload", type=yes_no, default=False, metavar="True|False", help="parts on the host")
    parser.add_argument("--offload_optimizer", type=yes_no, default=False, metavar="True|False")
    parser.add_argument("--batch", type=int, default=4, help="clips or prompts a rank and step")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt (GRPO)")
    parser.add_argument("--completion", type=int, help="tokens answered; none = the workload's")
    parser.add_argument("--pack_tokens", type=int, default=8192, help="tokens of a pass at most")
    parser.add_argument("--lora_rank", type=int, default=64 if cuda else 16, help="alpha is the same")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher says it
    args = parser.parse_args()
    args.partition = args.partition or args.offload
    return args


class Big:
    """What the steps of sft.py and grpo.py look at, and the rows."""

    def __init__(self, args):
        self.args, self.device, self.rows = args, start_processes(), []
        self.cuda = self.device.type == "cuda"
        self.dtype, self.world = torch.bfloat16 if self.cuda else torch.float32, torch.distributed.get_world_size()
        self.config, self.first = model_config(args.model), torch.distributed.get_rank() == 0
        self.work = R if self.cuda else E
        self.work = replace(self.work, completion=args.completion or self.work.completion)
        share = Share.here(args.offload) if args.partition else None
        began = time.perf_counter()
        torch.manual_seed(0)
        self.model = Qwen2_5_VL.random(self.config, self.device, self.dtype, share=share).requires_grad_(False)
        self.model.gradient_checkpointing = True
        self.sync()
        what = "whole weights"
        if share:
            what = f"parts of {self.model.partition.part.nbytes / 2**30:.1f} GiB{' on the host' * args.offload}"
        machine = torch.cuda.get_device_name() if self.cuda else "CPU"
        seconds = time.perf_counter() - began
        self.say(f"{args.model}, {self.world} x {machine}, torch {torch.__version__}: {what}, made in {seconds:.1f} s; "
                 f"{args.batch} a rank and step, LoRA r={args.lora_rank}")  # fmt: skip
        self.say(f"{'':<34}{'seconds':>9}{'least':>9}{'most':>9}{'TFLOP/s':>9}{'waiting':>9}{'moved GB':>10}{'GiB':>8}")

    def say(self, text):
        if self.first:
            print(text, flush=True)

    def sync(self):
        sync(self.device)

    def lora(self, kind):
        flags = dict(lora_rank=self.args.lora_rank, lora_alpha=self.args.lora_rank, pack_tokens=self.args.pack_tokens)
        flags |= dict(partition_weights=self.args.partition, offload_weights=self.args.offload, learning_rate=1e-4)
        cfg = kind(gradient_checkpointing=True, offload_optimizer=self.args.offload_optimizer, **flags)
        cfg.given = frozenset()
        return cfg

    def foresee(self, cfg, batch, passes=1, group=0):
        """Tell the planner's estimate of what torch's allocator will give on each card."""
        case = Case("", self.work, batch, passes, group)
        moments = estimate(case, cfg, self.model, self.dtype.itemsize, self.cuda, self.world)
        moment, components = peak(moments)
        most = max(components, key=components.get)
        gib, largest = total(components) / 2**30, components[most] / 2**30
        self.say(f"{'':<34}estimated: {gib:.1f} GiB a rank, {largest:.1f} of it {most}, at: {moment}")
        self.rows.append(dict(work="estimate", gib=gib, moment=moment, components=components))

    def measure(self, name, step, flops=0.0, names=(), repeats=None):
        """Time step(), after one to warm up, and tell the slowest rank. It may give seconds of its parts, by names."""
        step()
        parts, moved = self.model.partition, 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        if parts:
            parts.waited(), parts.moved()
        times, inner = [], []
        for _ in range(repeats or self.args.repeats):
            torch.distributed.barrier()
            self.sync()
            began = time.perf_counter()
            inner.append(step())
            self.sync()
            times.append(time.perf_counter() - began)
        waited, moved = (parts.waited(), parts.moved()) if parts else (0.0, 0)
        gib = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
        found = statistics.median(times), min(times), max(times), waited / sum(times), moved / len(times) / 1e9, gib
        seconds, least, most, waiting, moved, gib = global_max(found, self.device)
        row = dict(work=name, seconds=seconds, least=least, most=most, waiting=waiting, moved_gb=moved, gib=gib)
        self.rows.append(row | {"flop_s": flops / seconds, "gib_of_ranks": gather(found[-1])})
        self.say(f"{name:<34}{seconds:9.3f}{least:9.3f}{most:9.3f}{flops / seconds / 1e12:9.1f}{waiting:9.1%}"
                 f"{moved:10.1f}{gib:8.1f}")  # fmt: skip
        for part, column in zip(names, zip(*inner) if names else ()):
            self.say(f"  {part:<32}{statistics.median(column):9.3f}{min(column):9.3f}{max(column):9.3f}")
            self.rows.append(dict(work=name, part=part, seconds=statistics.median(column)))

    def close(self):
        head = {"bench": "big", "machine": torch.cuda.get_device_name() if self.cuda else "CPU", "world": self.world}
        head |= {"torch": torch.__version__, "args": vars(self.args)}
        self.say(json.dumps(head | {"results": self.rows}))
        leave_processes()


def sft(bench):
    args, cfg = bench.args, bench.lora(SFT)
    lora.inject(bench.model, cfg)
    engine, _ = build_engine(bench.model, cfg, bench.device, bench.dtype)
    micro_batches = passes(bench, bench.work, args.batch)
    bench.foresee(cfg, math.ceil(args.batch / len(micro_batches)), len(micro_batches))
    flops = args.batch * linear_flops(bench.config, bench.work, bench.work.completion, True)
    step = partial(our_step, engine, partial(update, engine), micro_batches)
    bench.measure(f"SFT {args.batch} clips in {len(micro_batches)} passes", step, flops)


def grpo(bench):
    args, work = bench.args, bench.work
    step, prompts = Step(bench), prompts_of(bench.config, work, args.batch)
    bench.foresee(step.cfg, args.batch, group=args.group)
    name = f"GRPO {args.batch} x {args.group} x {work.completion}"
    bench.measure(name, lambda: step(prompts, work.completion)[1:], names=PARTS[1:])
    packed, sampling = pack(prompts).to(bench.device), Sampling(TOKENS, 1.0)
    for what, function in (("whole", generate), ("a layer at a time", generate_plain)):
        with torch.no_grad():
            bench.measure(f"{TOKENS} tokens, {what}", lambda f=function: f(bench.model, packed, sampling, args.group),
                          repeats=1)  # fmt: skip


def main():
    args = arguments()
    bench = Big(args)
    try:
        {"sft": sft, "grpo": grpo}[args.task](bench)
    except torch.OutOfMemoryError as error:
        found = torch.cuda.max_memory_allocated() / 2**30
        raise SystemExit(f"out of GPU memory at {found:.1f} GiB: {str(error).splitlines()[0][:160]}") from None
    bench.close()


if __name__ == "__main__":
    main()
