"""One long clip on N cards that share it (--sequence_parallel N) beside a clip on each card.

    deepspeed --num_gpus 2 bench/sequence.py                               # 3B shape: 256 and 768 frames
    deepspeed --num_gpus 4 bench/sequence.py --share 1 2 4 --frames 768
    deepspeed --num_gpus 2 bench/sequence.py --model tiny --frames 8 --size 56x56     # on a CPU

A step is train_sft.py's, over ZeRO-2 on all cards. All ranks get the same clip, so that every row's loss and gradient
norm must be the same but for rounding; with N = 1 a step is as many clips as there are cards. "exchange" is the time
that the all-to-alls of a step take on the slowest card, waiting for each other included. The last line is one JSON
object.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from workloads import SIZES, R, Workload, model_config, sft_batch, sync, yes_no

import lora
from config import SFT
from model import sequence
from model.loss import IGNORE
from model.qwen2_5_vl import Qwen2_5_VL
from train_sft import micro_loss
from training.engine import build_engine, global_max, global_sum, leave_processes, start_processes, update
from video import Options, frame_size

GIB = 2**30


class Exchanges:
    """Seconds and bytes of the all-to-alls since the last look."""

    def __init__(self, device):
        self.device, self.events, self.bytes, self.plain = device, [], 0, sequence.exchange
        sequence.exchange = self.timed

    def mark(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, x, sends, receives, group):
        began = self.mark()
        out = self.plain(x, sends, receives, group)
        self.events.append((began, self.mark()))
        elsewhere = sum(n for rank, n in enumerate(sends) if rank != group.rank)
        self.bytes += elsewhere * x[:1].nbytes
        return out

    def look(self):
        """-> (seconds, bytes sent); both begin anew."""
        sync(self.device)
        cpu = self.device.type == "cpu"
        seconds = sum(b - a if cpu else a.elapsed_time(b) / 1e3 for a, b in self.events)
        found, self.events, self.bytes = (seconds, self.bytes), [], 0
        return found


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = "3B" if torch.cuda.is_available() else "tiny"
    parser.add_argument("--model", default=size, choices=[*SIZES, "tiny"], help="shape, random weights")
    parser.add_argument("--frames", type=int, nargs="+", default=[256, 768], help="one clip each")
    parser.add_argument("--size", default="budget", help="HEIGHTxWIDTH in pixels, or 360x640 within the pixel budget")
    parser.add_argument("--share", type=int, nargs="+", default=[1, 2], help="cards that share a clip")
    parser.add_argument("--recompute", type=yes_no, default=True, metavar="True|False", help="activation recomputation")
    parser.add_argument("--lora_rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="timed steps, after one of 16 frames to warm up")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    return parser.parse_args()


def clip(frames, size):
    if size == "budget":
        h, w, _ = frame_size("video", 360, 640, frames, Options())
    else:
        h, w = map(int, size.split("x"))
    return Workload((max(1, frames // 2), h // 14, w // 14), R.prompt, R.completion)


def step(engine, packed):
    """-> (seconds, loss, gradient norm) of one of the trainer's steps."""
    began, sums = time.perf_counter(), torch.zeros(2, dtype=torch.float64, device=engine.device)
    (answers,) = global_sum([int((packed.targets != IGNORE).sum())], engine.device)
    norm, _ = update(engine, [packed], partial(micro_loss, engine, answers, sums))
    (loss,) = global_sum([float(sums[0])], engine.device)
    sync(engine.device)
    return time.perf_counter() - began, loss / answers, norm


def measure(engine, frames, group, size, repeats, exchanges):
    """One row."""
    config, cuda = engine.module.config, engine.device.type == "cuda"
    batches = [sft_batch(config, clip(n, size), 1) for n in (min(frames, 16), frames)]
    tokens = len(batches[1].input_ids)
    if group:
        batches = [sequence.share(packed, group, config) for packed in batches]
    step(engine, batches[0])
    exchanges.look()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, loss, norm = zip(*(step(engine, batches[1]) for _ in range(repeats)))
    seconds, sent = exchanges.look()
    found = [sorted(times)[len(times) // 2], seconds / repeats, torch.cuda.max_memory_allocated() if cuda else 0]
    found = global_max(found, engine.device)
    row = dict(zip(("seconds", "exchange", "peak"), found, strict=True))
    row |= {"frames": frames, "share": group.size if group else 1, "tokens": tokens, "sent": sent / repeats}
    return row | {"clips": torch.distributed.get_world_size() // row["share"], "loss": loss[0], "norm": norm[0]}


def main():
    args, device = options(), start_processes()
    rank, dtype = torch.distributed.get_rank(), torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Qwen2_5_VL.random(model_config(args.model), device, dtype).requires_grad_(False)
    model.gradient_checkpointing = args.recompute
    # a rate so small that every row has the same weights
    cfg = SFT(lora_rank=args.lora_rank, lora_alpha=args.lora_rank, learning_rate=1e-12)
    torch.manual_seed(0)
    lora.inject(model, cfg)
    engine, _ = build_engine(model, cfg, device, dtype)
    groups = {size: sequence.join(size) for size in args.share}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    machine = f"{torch.distributed.get_world_size()} x {machine}"
    if rank == 0:
        print(f"{args.model}, {str(dtype)[6:]}, LoRA r={args.lora_rank}, recomputation {args.recompute}; {machine}, "
              f"torch {torch.__version__}\n{'frames':>6} {'tokens':>8} {'N':>2} {'clips':>5} {'s a step':>9} "
              f"{'GiB a card':>10} {'exchange':>8} {'GB sent':>8} {'loss':>8} {'gnorm':>9}", flush=True)  # fmt: skip
    rows, exchanges = [], Exchanges(device)
    for frames in args.frames:
        for group in groups.values():
            row = measure(engine, frames, group, args.size, args.repeats, exchanges)
            rows.append(row)
            if rank == 0:
                print(f"{frames:>6} {row['tokens']:>8,} {row['share']:>2} {row['clips']:>5} {row['seconds']:>9.3f} "
                      f"{row['peak'] / GIB:>10.2f} {row['exchange'] / row['seconds']:>8.1%} {row['sent'] / 1e9:>8.3f} "
                      f"{row['loss']:>8.4f} {row['norm']:>9.4f}", flush=True)  # fmt: skip
    if rank == 0:
        head = {"bench": "sequence", "model": args.model, "machine": machine, "torch": torch.__version__}
        print(json.dumps(head | {"args": vars(args), "results": rows}), flush=True)
    leave_processes()


if __name__ == "__main__":
    main()
