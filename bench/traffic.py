"""What the ranks' gradient traffic costs an SFT step: bucket sizes, overlap, reducing in every pass or once a step.

    deepspeed --num_gpus 2 bench/traffic.py                     3B shape, LoRA r=64, 3 passes of 4 clips of R a step
    deepspeed --num_gpus 2 bench/traffic.py --work S --batch 1 --passes 5
    python bench/traffic.py                                     one rank: nothing travels

All ranks have equal work. "traffic": share of the step that computing stood still for numbers on their way, on the rank
that stood least; "idle": what the ranks stood still beyond that, in the mean. Every way must give the gradient norm of
the first. The last line is one JSON object.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from workloads import NAMED, model_config, sft_batch, sync

import lora
from config import SFT
from model.fast.graphs import GraphCache
from model.loading import random_model
from model.qwen import IGNORE
from train_sft import micro_loss
from training.engine import build_engine, gather, global_sum, leave_processes, start_processes, update
from training.waiting import Waiting, lost

# name, what differs from our settings of zero_optimization, whether the host halts at the end of every pass
WAYS = (
    ("as we do", {}, False),
    ("buckets of 100 M", {"reduce_bucket_size": 100_000_000}, False),
    ("buckets of 10 M", {"reduce_bucket_size": 10_000_000}, False),
    ("the host halts", {}, True),
    ("no overlap", {"overlap_comm": False}, False),
    ("ZeRO-1, once a step", {"stage": 1}, False),
)


def build(args, device, zero, halts):
    """The trainer's engine over a new model, with these settings over ours."""
    torch.manual_seed(0)
    model = random_model(model_config(args.model), device, args.dtype).requires_grad_(False)
    model.gradient_checkpointing = device.type == "cuda"
    model.ops.graphs = GraphCache() if device.type == "cuda" else None
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps({"zero_optimization": zero}))
        file.flush()
        cfg = SFT(lora_rank=args.lora_rank, lora_alpha=args.lora_rank, learning_rate=1e-4, deepspeed=file.name)
        lora.inject(model, cfg)
        engine, _ = build_engine(model, cfg, device, args.dtype)
    if halts:  # DeepSpeed's own end of a pass
        vars(engine.optimizer).pop("independent_gradient_partition_epilogue", None)
    if torch.distributed.get_world_size() > 1:
        engine.waiting = Waiting(device)
    return engine


def measure(args, engine, packs):
    """(seconds of each step, shares of idle and traffic, gradient norm of the first step)"""
    own = sum(int((packed.targets != IGNORE).sum()) for packed in packs)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    loss_of = partial(micro_loss, engine, global_sum([own], engine.device)[0], sums)
    seconds, idle, traffic, first = [], [], [], None
    for _ in range(args.repeats + 2):  # two to warm up
        sync(engine.device)
        began = time.perf_counter()
        norm, _ = update(engine, packs, loss_of, len(packs))
        sync(engine.device)
        seconds.append(time.perf_counter() - began)
        first = norm if first is None else first
        shares = [share / seconds[-1] for share in lost(gather(engine.waiting.take()))] if engine.waiting else [0, 0]
        idle, traffic = idle + shares[:1], traffic + shares[1:]
    return [statistics.median(column[2:]) for column in (seconds, idle, traffic)] + [first]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="3B" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--work", default="R" if torch.cuda.is_available() else "S", choices=NAMED)
    parser.add_argument("--batch", type=int, default=4, help="clips a pass")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--lora_rank", type=int, default=64 if torch.cuda.is_available() else 16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    args = parser.parse_args()
    device = start_processes()
    args.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config, work, rows = model_config(args.model), NAMED[args.work], []
    packs = [sft_batch(config, work, args.batch, seed=100 * rank + i) for i in range(args.passes)]
    if rank == 0:
        print(f"{args.model}, r={args.lora_rank}, {world} ranks, {args.passes} passes of {args.batch} x {args.work}\n")
        print(f"{'':22}     ms    idle  traffic    GiB   gradient norm", flush=True)
    for name, zero, halts in WAYS if world > 1 else WAYS[:1]:
        engine = build(args, device, zero, halts)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, idle, traffic, norm = measure(args, engine, packs)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        rows.append({"way": name, "seconds": seconds, "idle": idle, "traffic": traffic, "gib": peak, "norm": norm})
        if rank == 0:
            print(f"{name:22} {1000 * seconds:6.0f} {idle:7.2%} {traffic:8.2%} {peak:6.2f}   {norm:.6g}", flush=True)
        assert abs(norm / rows[0]["norm"] - 1) < 1e-3, f"gradient norm {norm}, first {rows[0]['norm']}"
        engine.destroy()
        del engine
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if rank == 0:
        head = {"bench": "traffic", "ranks": world, "model": args.model, "work": args.work, "batch": args.batch}
        print(json.dumps(head | {"passes": args.passes, "rows": rows}))
    leave_processes()


if __name__ == "__main__":
    main()
