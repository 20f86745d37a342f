"""How near the planner's memory estimate is: each case's estimate beside what two real steps took.

    python bench/memory.py                     # the 3B shape on a GPU, the embedded model's on a CPU: 8 cases
    python bench/memory.py --all               # 17 on a GPU
    python bench/memory.py --cases "SFT R x 8" "GRPO R 1 x 8 x 256"
    python bench/memory.py --list

Each case is a process of its own: random weights, adapters, the trainers' engine, two of their steps on made-up clips,
without CUDA graphs, whose memory the plan tells apart.
Measured is torch.cuda.max_memory_allocated of all that; on a CPU the bytes of all tensors alive (live.py). "context" is
what the device lost beside torch's allocator; "reserved" what the allocator took from it. The last line is one JSON
object.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from grpo import Step, prompts_of
from live import Live
from sft import our_step
from workloads import E, R, S, Workload, model_config, sft_batch, sync

import lora
from config import GRPO, SFT
from model.loading import random_model
from model.qwen import Qwen2_5_VL
from training.blocks import Load, part_of_clip
from training.engine import build_engine, leave_processes, start_processes, update
from training.memory import GIB, Memory, peak, total
from training.survey import group_loads

PICTURE = Workload((1, 46, 62), 60, 64)  # a photograph of 868x644: 713 vision tokens
FROZEN = dict(vision_lora=False, merger_lora=False)
# of a GPU's cases those that run unless others are asked for: all kinds of moments, and quick
USUAL = ("SFT S x 8, kept", "SFT R x 1, kept", "SFT R x 8", "SFT R x 8, frozen tower", "SFT R x 8, thawed merger",
         "SFT R 2 x 4", "SFT picture x 2, kept", "GRPO R 1 x 8 x 256")  # fmt: skip
LIMIT = 120  # seconds; a case takes some ten on an H100


@dataclass
class Case:
    name: str
    work: Workload
    batch: int  # samples of a pass, or prompts
    passes: int = 1
    group: int = 0  # completions of a prompt; 0 = SFT
    flags: dict = field(default_factory=dict)


def cases(cuda):
    def case(name, work, batch, recompute=True, rank=64, passes=1, group=0, **more):
        flags = dict(lora_rank=rank, lora_alpha=rank, gradient_checkpointing=recompute, learning_rate=1e-4) | more
        return Case(name, work, batch, passes, group, flags)

    if not cuda:
        return [
            case("SFT E x 1", E, 1, False, 16), case("SFT E x 8", E, 8, False, 16),
            case("SFT E x 8, recomputed", E, 8, True, 16), case("SFT E x 16, rank 64", E, 16, False),
            case("SFT E x 8, frozen tower", E, 8, False, 16, **FROZEN),
            case("SFT E x 8, thawed merger", E, 8, False, 16, tune_merger=True),
            case("SFT E 2 x 4", E, 4, False, 16, passes=2),
            case("GRPO E 4 x 4 x 24", replace(E, completion=24), 4, False, 16, group=4),
        ]  # fmt: skip
    return [
        case("SFT S x 1", S, 1), case("SFT S x 8, kept", S, 8, False), case("SFT S x 16, kept", S, 16, False),
        case("SFT R x 1", R, 1), case("SFT R x 1, kept", R, 1, False), case("SFT R x 8", R, 8),
        case("SFT R x 16", R, 16), case("SFT R x 8, rank 16", R, 8, rank=16),
        case("SFT R x 8, frozen tower", R, 8, **FROZEN), case("SFT R x 4, kept, frozen tower", R, 4, False, **FROZEN),
        case("SFT R x 8, thawed merger", R, 8, tune_merger=True), case("SFT R 2 x 4", R, 4, passes=2),
        case("SFT picture x 8", PICTURE, 8), case("SFT picture x 2, kept", PICTURE, 2, False),
        case("GRPO R 1 x 8 x 256", R, 1, group=8), case("GRPO R 8 x 8 x 256", R, 8, group=8),
        case("GRPO R 8 x 8 x 256, rank 16, no KL", R, 8, rank=16, group=8, beta=0.0),
    ]  # fmt: skip


def estimate(case, cfg, model, number, cuda, world=1):
    """{moment: {component: bytes}} of both parts of the case."""
    memory, work = Memory(model, cfg, number, world, cuda), case.work
    patches = work.grid[0] * work.grid[1] * work.grid[2]
    if not case.group:
        n = case.batch
        tokens, part = n * (work.prompt_tokens + work.completion), part_of_clip(*work.grid)
        load = Load(tokens, n * work.completion, n * patches, n, n, part=part)
        return memory.update(load, case.passes)
    prompts = [(work.prompt_tokens, patches, part_of_clip(*work.grid))] * case.batch
    loads = group_loads(prompts, [[work.completion] * case.group] * case.batch, cfg)
    inputs = sum(map(memory.inputs, loads))
    moments = {}
    for load in loads:
        moments |= {f"{name} ({load.tokens})": found for name, found in
                    memory.update(load, len(loads), inputs).items()}  # fmt: skip
    tokens, total_patches = case.batch * work.prompt_tokens, case.batch * patches
    sampled = memory.sampling(tokens, work.prompt_tokens, total_patches, case.batch, case.group, work.completion)
    return moments | sampled


def steps(case, cfg, model, device, dtype):
    """Two of the trainer's steps."""
    if case.group:
        args = SimpleNamespace(group=case.group, pack_tokens=cfg.pack_tokens)
        bench = SimpleNamespace(model=model, device=device, dtype=dtype, args=args)
        step = Step(SimpleNamespace(**vars(bench), lora=lambda kind: cfg, sync=lambda: sync(device)))
        prompts = prompts_of(model.config, case.work, case.batch)
        for _ in range(2):
            step(prompts, case.work.completion)
        return
    start_processes()
    lora.inject(model, cfg)
    engine, _ = build_engine(model, cfg, device, dtype)
    batches = [sft_batch(model.config, case.work, case.batch, seed) for seed in range(case.passes)]
    for _ in range(2):
        our_step(engine, lambda micro, loss_of: update(engine, micro, loss_of), batches)


def run(case, size):
    """One case in this process: its row."""
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    cfg = (GRPO if case.group else SFT)(**case.flags)
    cfg.given = frozenset()
    if case.group:
        cfg.num_generations, cfg.per_device_train_batch_size = case.group, case.batch * case.group
    config = model_config(size)
    with torch.device("meta"):
        shape = Qwen2_5_VL(config).to(dtype)
    lora.inject(shape, cfg)
    moments = estimate(case, cfg, shape, dtype.itemsize, cuda)
    moment, components = peak(moments)
    machine = torch.cuda.get_device_name() if cuda else "CPU"
    row = {"case": case.name, "machine": machine, "moment": moment, "estimate": total(components)}
    row["components"] = components
    if cuda:
        free = torch.cuda.mem_get_info()[0]
    model = random_model(config, device, dtype).requires_grad_(False)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    if cuda:
        steps(case, cfg, model, device, dtype)
        torch.cuda.synchronize()
        row |= {"measured": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        now_free, whole = torch.cuda.mem_get_info()
        # the context came before the first look, so what the device as a whole has lost is counted
        row |= {"context": whole - now_free - torch.cuda.memory_reserved(), "lost": free - now_free, "device": whole}
    else:
        with Live(*model.state_dict().values()) as live:
            steps(case, cfg, model, device, dtype)
        row |= {"measured": live.peak}
    row["moments"] = {name: total(found) for name, found in moments.items()}
    leave_processes()
    return row


def show(row):
    if "error" in row:
        print(f"{row['case']:<36} {row['error']}", flush=True)
        return
    off = row["estimate"] / row["measured"] - 1
    rest = "".join(f"{row[name] / GIB:10.2f}" for name in ("reserved", "context") if name in row)
    rest += f"{row['seconds']:9.1f}"
    told = f"{row['case']:<36}{row['estimate'] / GIB:10.3f}{row['measured'] / GIB:10.3f}{off:+9.1%}{rest}"
    print(f"{told}  {row['moment']}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", default="3B" if cuda else "tiny", help="shape of bench/workloads.py, random weights")
    parser.add_argument("--cases", nargs="+", help="names; 8 unless given")
    parser.add_argument("--all", action="store_true", help="all cases")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this process runs one case and prints its row
    args = parser.parse_args()
    known = {case.name: case for case in cases(cuda)}
    if args.list:
        print("\n".join(known))
        return
    if args.one:
        print(json.dumps(run(known[args.one], args.model)))
        return
    print(f"{args.model}, {'bf16' if cuda else 'fp32'}, random weights; torch {torch.__version__}; GiB")
    heads = ("estimate", "measured", "off", "reserved", "context", "seconds")
    shown = heads if cuda else heads[:3] + heads[-1:]
    print(f"{'case':<36}" + "".join(f"{head:>{9 if head in ('off', 'seconds') else 10}}" for head in shown), flush=True)
    rows = []
    for name in args.cases or (known if args.all or not cuda else USUAL):
        rows.append(apart(args.model, name))
        show(rows[-1])
    found = [row for row in rows if "measured" in row]
    if found:
        off = max(abs(row["estimate"] / row["measured"] - 1) for row in found)
        print(f"{found[0]['machine']}: {len(found)} cases, off by {off:.1%} at most")
    print(json.dumps({"bench": "memory", "model": args.model, "results": rows}))


def apart(size, name):
    """The row of a case run in a process of its own. This one leaves the GPU alone: what it took would count there."""
    began = time.perf_counter()
    command = [sys.executable, __file__, "--model", size, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"case": name, "error": f"not done after {LIMIT} s"}
    if done.returncode:
        return {"case": name, "error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
