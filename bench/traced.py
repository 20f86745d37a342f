"""Where the time of a training step goes: a real script under torch's profiler for a few of its steps.

    deepspeed --num_gpus 2 --no_local_rank bench/traced.py 20 2 shares.json train_sft.py --config … --max_steps 21

traces steps 20 and 21 on every rank, times collectives by themselves, writes shares.json and ends: no checkpoint.
Of rank 0's wall clock it tells the share in which the GPU computes, in which it only moves numbers between ranks
(`traffic`) or waits in a collective for a rank that is late (`waiting`), and in which it has nothing to do (`idle`).
`hidden` is traffic under computing; it is part of `compute`. Waiting: a collective ends on all ranks at once, so
what it takes longer on one rank than on the rank that came last is waiting.

On a CPU gloo's collectives are what is not computing, and all else counts as compute.
"""

import json
import os
import runpy
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import training.engine  # noqa: F401 (chooses DeepSpeed's accelerator before deepspeed is imported)
from training.runlog import Log

SIZES = 2**16, 2**20, 2**24, 2**28  # bytes
REPEATS = 5


# -- Intervals, in seconds


def union(intervals):
    """[(begin, end)] without overlaps, in order."""
    found = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def length(intervals):
    return sum(end - begin for begin, end in intervals)


def bare(interval, covering):
    """Seconds of one interval that `covering` (a union) does not cover."""
    begin, end = interval
    covered = sum(max(0.0, min(end, b) - max(begin, a)) for a, b in covering if a < end and b > begin)
    return end - begin - covered


def shares(window, compute, traffic, ranks, copies=()):
    """Shares of a window of so many seconds. compute, traffic, copies: this rank's intervals, copies those of parted or
    offloaded weights; ranks: [durations of the same collectives, in order] of every rank. Where ranks differ in their
    collectives, waiting is not told apart: None."""
    busy, moving = union(compute), [*traffic, *copies]
    alone = union(moving + busy)
    if len({len(found) for found in ranks}) == 1:
        shortest = [min(found) for found in zip(*ranks)]
        apart = [(bare(each, busy), each[1] - each[0] - least) for each, least in zip(sorted(traffic), shortest)]
        waiting = sum(min(exposed, late) for exposed, late in apart)
    else:
        waiting = None
    exposed = length(alone) - length(busy)
    found = {"compute": length(busy), "traffic": exposed - (waiting or 0.0), "waiting": waiting}
    found |= {"idle": max(0.0, window - length(alone)), "hidden": length(union(moving)) - exposed}
    return {name: None if seconds is None else seconds / window for name, seconds in found.items()}


# -- What a trace holds


def intervals(events, cuda):
    """(compute, collectives, copies from other cards and the host) of a profiler's events, in seconds."""
    compute, traffic, copies = [], [], []
    for event in events:
        place = event.time_range.start / 1e6, event.time_range.end / 1e6
        if cuda and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            copied = event.name.startswith(("Memcpy PtoP", "Memcpy HtoD"))
            (copies if copied else traffic if event.name.startswith("ncclDevKernel") else compute).append(place)
        elif not cuda and event.name.startswith("gloo:"):
            traffic.append(place)
    return compute, traffic, copies


def links(device):
    """[{op, bytes, ranks, seconds}] of collectives over all ranks, by themselves. bytes: of the whole tensor."""
    n, rows = dist.get_world_size(), []
    for size in SIZES if n > 1 else ():
        whole = torch.zeros(size // 4 // n * n, device=device)
        part, other = whole.view(n, -1)[dist.get_rank()].clone(), torch.empty_like(whole)
        calls = {"all_reduce": (dist.all_reduce, whole), "all_gather": (dist.all_gather_into_tensor, whole, part)}
        if device.type == "cuda":
            calls["all_to_all"] = dist.all_to_all_single, other, whole
        for name, (call, *tensors) in calls.items():
            rows.append({"op": name, "bytes": size, "ranks": n, "seconds": clocked(call, tensors, device)})
        if device.type == "cpu" and size >= 2**24:
            break
    return rows


def clocked(call, tensors, device):
    """Median seconds, all ranks starting together."""
    times = []
    for _ in range(REPEATS + 2):
        dist.barrier()
        began = time.perf_counter()
        call(*tensors)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


class Tracer:
    """Called after every step: starts and stops the profiler, then ends the process."""

    def __init__(self, first, count, path):
        self.first, self.last, self.path, self.cuda = first, first + count - 1, path, torch.cuda.is_available()

    def after(self, step, device):
        if step == self.first - 1:
            kinds = [ProfilerActivity.CUDA] if self.cuda else [ProfilerActivity.CPU]
            self.profiler = profile(activities=kinds)
            self.profiler.start()
            self.began = time.perf_counter()
        if step == self.last:
            if self.cuda:
                torch.cuda.synchronize()
            window = time.perf_counter() - self.began
            self.profiler.stop()
            self.tell(window, device)
            self.end()

    def tell(self, window, device):
        compute, traffic, copies = intervals(self.profiler.events(), self.cuda)
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, [end - begin for begin, end in sorted(traffic)])
        if not self.cuda:
            compute = free(union(traffic), window)
        found = {"shares": shares(window, compute, traffic, ranks, copies), "links": links(device)}
        found |= {"collectives": len(traffic), "seconds": window / (self.last - self.first + 1)}
        if dist.get_rank() == 0:
            self.path.write_text(json.dumps(found) + "\n", encoding="utf-8")

    def end(self):
        """Without the last checkpoint and report: they are no part of a step, and large."""
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def free(busy, window):
    """A CPU's compute: intervals that fill the window but for `busy`, placed behind it."""
    end = max((end for _, end in busy), default=0.0)
    return [(end, end + max(0.0, window - length(busy)))]


def main():
    if len(sys.argv) < 5 or not (sys.argv[1].isdigit() and sys.argv[2].isdigit()) or int(sys.argv[1]) < 2:
        print("error: expected FIRST (at least 2) COUNT FILE.json script.py [flags]", file=sys.stderr)
        raise SystemExit(2)
    first, count, path, script, *flags = sys.argv[1:]
    tracer, step = Tracer(int(first), int(count), Path(path)), Log.step

    def logged(log, number, *args, **kwargs):
        step(log, number, *args, **kwargs)
        tracer.after(number, log.run.device)

    Log.step = logged
    sys.argv = [script, *flags]
    sys.path[0] = str(ROOT)
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main()
