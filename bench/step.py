"""How long a step takes and how much memory, beside its floor and beside the usual software; random weights.

    python bench/step.py                                    # on a GPU 3B and R, on a CPU the tiny model and its shape
    python bench/step.py sft grpo --shape S R --peer        # transformers + PEFT in turns with us, in this process
    python bench/step.py sft --shape long768 --offload_activations --memory 23.5 --repeats 1
    python bench/step.py grpo --prompts 8 --trace           # where the time goes: kernels, idle share
    python bench/step.py sft grpo --twice                   # the same seed twice, compared bit for bit

    prefill   from clip and prompt to the first token of a group
    decode    one token for all rows, in the second half of a rollout
    rollout   a whole rollout: every row answers with as many tokens as the shape has
    sft       one optimizer step of train_sft.py: to the device, forward, loss, backward, clipping, AdamW
    grpo      a step of train_grpo.py: rollout, reference, update; random rewards that differ within each group

The floor is the arithmetic (bench/workloads.py) at this machine's measured product rate; for a decode step the bytes at
its copy rate. The last line is JSON.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peer import Peer
from torch.profiler import ProfilerActivity, profile
from workloads import SIZES, decode_bytes, example, model_config, packed_samples, step_flops, workload

import lora
import memory
import train_grpo
from config import GRPO, SFT
from data import pack
from engine import build_engine, init_distributed, leave_processes, use_deterministic_kernels
from loader import fill_bins
from model.decode import Sampling, generate
from model.fast.graphs import GraphCache
from model.loading import formats_of, random_model
from model.quantized import BASE_DTYPES
from rollouts import Group, Rollout
from train_sft import micro_loss
from trainer import Run, update

RECOMPUTE = {"auto": "auto", "yes": True, "no": False}
KINDS = ("prefill", "decode", "rollout", "sft", "grpo")  # those that train come last
BATCH = {"S": 5, "R": 8, "tiny": 32}  # samples of an SFT step
OPTIONS = ("lora_rank", "pack_tokens", "offload_activations", "offload_optimizer")  # of the trainers, as they are
COLUMNS = ("seconds", "min", "max", "floor", "gib", "device_gib")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda, add = torch.cuda.is_available(), parser.add_argument
    add("kinds", nargs="*", metavar="|".join(KINDS), help="default: all")
    shapes = "S, R, tiny, longN, FxHxW, FxHxW+PROMPT+ANSWER"
    add("--shape", nargs="+", type=workload, default=[workload("R" if cuda else "tiny")], help=shapes)
    add("--model", type=str.lower, default="3b" if cuda else "tiny", choices=[*SIZES, "tiny"])
    add("--memory", type=float, help="GiB that the GPU's allocator may take; default: all")
    add("--base_dtype", default="bf16", choices=BASE_DTYPES, help="of the decoder's frozen linears")
    add("--head_dtype", default="bf16", choices=("bf16", "int8"), help="of a head that is not the embedding")
    add("--batch", type=int, help="samples of an SFT step; S 5, R 8, tiny 32, else 1")
    add("--prompts", type=int, nargs="+", default=[1, 8], help="of a rollout or GRPO step, a row each")
    add("--group", type=int, default=8, help="completions of a prompt")
    add("--pack_tokens", type=lambda text: text if text == "auto" else int(text), default="auto")
    add("--recompute", default="auto", choices=RECOMPUTE, help="activations, instead of keeping them")
    add("--lora_rank", type=int, default=64 if cuda else 16, help="alpha is the same")
    add("--repeats", type=int, default=5 if cuda else 3)
    for name in ("offload_activations", "offload_embedding", "offload_optimizer", "deterministic"):
        add(f"--{name}", action="store_true")
    add("--peer", action="store_true", help="transformers + PEFT too, but for grpo")
    add("--trace", action="store_true", help="torch's profiler over one call of each row")
    add("--twice", action="store_true", help="three steps of sft and grpo from the same seed, twice")
    args = parser.parse_args(argv)
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"{', '.join(unknown)}: expected {', '.join(KINDS)}")
    args.kinds = [kind for kind in KINDS if kind in args.kinds or not args.kinds]
    return args


class Bench:
    """The machine, the frozen model, and the table as it grows."""

    def __init__(self, args, device):
        self.args, self.device, self.rows, self.cuda = args, device, [], device.type == "cuda"
        self.resident = Counter()  # bytes that each contestant holds at rest
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.product_rate, self.copy_rate = self.measured_rates()
        if self.cuda and args.memory:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(args.memory * 2**30 / torch.cuda.mem_get_info()[1])
        torch.manual_seed(0)
        self.config = model_config(args.model)
        self.model = random_model(self.config, device, self.dtype, 0, **formats_of(args)).requires_grad_(False)
        if self.cuda and not args.offload_activations:
            self.model.ops.graphs = GraphCache(wait=args.memory is not None)
        self.model.ops.offload = args.offload_activations
        self.options = {name: getattr(args, name) for name in OPTIONS} | {"lora_alpha": args.lora_rank}
        self.options |= {"gradient_checkpointing": RECOMPUTE[args.recompute], "learning_rate": 1e-4}
        self.cfg = GRPO(num_generations=args.group, **self.options)

    def measured_rates(self) -> tuple[float, float]:
        """Matrix products (FLOP/s) and copies (bytes/s, read + write)."""
        n, size = (8192, 4 << 30) if self.cuda else (1024, 64 << 20)
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        x, y = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        median = lambda function: statistics.median([self.seconds(function) for _ in range(7)][2:])
        return 2 * n**3 / median(lambda: a @ b), 2 * size / median(lambda: y.copy_(x))

    def clock(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, function) -> float:
        start = self.clock()
        function()
        return self.clock() - start

    def call(self, who, function):
        """(function(), highest GiB without what the others hold at rest); what stays allocated is this contestant's."""
        if not self.cuda:
            return function(), 0.0
        torch.cuda.reset_peak_memory_stats()
        before, others = torch.cuda.memory_allocated(), sum(self.resident.values()) - self.resident[who]
        result = function()
        self.resident[who] += torch.cuda.memory_allocated() - before
        return result, (torch.cuda.max_memory_allocated() - others) / 2**30

    def measure(self, label: str, steps: dict, floors: dict) -> None:
        """Call the functions of {who: function} in turns and print their rows. Each returns {part: seconds}; part "" is
        the whole. floors: {part: seconds}. device_gib: of all processes, with contexts and the allocator's reserve."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        calls, warm_up = {who: [] for who in steps}, 1 + self.cuda
        try:
            for _ in range(warm_up + self.args.repeats):
                for who, step in steps.items():
                    calls[who].append(self.call(who, step))
        except torch.OutOfMemoryError:
            print(f"{label}: out of memory", flush=True)
            return
        free, total = torch.cuda.mem_get_info() if self.cuda else (0, 0)
        for (part, floor), who in product(floors.items(), steps):
            times = [parts[part] for parts, _ in calls[who][warm_up:]]
            row = {"work": f"{label} {part}".strip(), "who": who, "seconds": statistics.median(times)}
            row |= {"min": min(times), "max": max(times), "floor": floor}
            row |= {"gib": max(gib for _, gib in calls[who]), "device_gib": (total - free) / 2**30}
            self.rows.append(row)
            numbers = "".join(f"{row[name]:11.4f}" for name in COLUMNS)
            print(f"{row['work']:<36}{who:<6}{numbers}{row['seconds'] / floor:11.2f}", flush=True)


class Ours:
    """The trainers' own functions as steps of each kind."""

    name = "ours"

    def __init__(self, bench):
        self.bench, self.model, self.cfg = bench, bench.model, bench.cfg
        lora.inject(self.model, self.cfg)
        self.model.eval()
        if {"sft", "grpo"} & {*bench.args.kinds}:
            self.engine = build_engine(self.model, self.cfg, bench.device, bench.dtype)[0]
            self.frozen = train_grpo.freeze_reference(self.model, self.cfg)

    def rollout(self, work, count: int, tokens: int):
        prompts = packed_samples(self.bench, work, count)
        return lambda: generate(self.model, prompts, Sampling(tokens, 1.0), self.cfg.num_generations)

    def run(self, cfg, one):
        """A trainer's Run with the size of packs and the kept activations that its options ask for."""
        run = Run(cfg, "bench", Path(), self.bench.device, self.bench.dtype, "")
        run.plan = memory.choose(run, self.model, lambda: one)
        for note in run.notes:
            print(f"  {note}", flush=True)
        return run

    def sft(self, work, batch: int):
        engine, bench, answers = self.engine, self.bench, batch * work.completion
        cfg = SFT(per_device_train_batch_size=batch, gradient_accumulation_steps=1, **bench.options)
        examples = [example(bench.config, work, number, answer=True) for number in range(batch)]
        run = self.run(cfg, examples[0])
        bins = fill_bins([len(one) for one in examples], run.plan.pack_tokens or sum(map(len, examples)))
        packs = [pack([examples[i] for i in each], pin=bench.cuda) for each in bins]  # as train_sft.py collates

        def step():
            run.plan.apply(self.model)
            sums = torch.zeros(2, dtype=torch.float64, device=bench.device)
            update(engine, packs, partial(micro_loss, engine, answers, sums), len(packs))

        return step

    def grpo(self, work, count: int):
        """Its function returns the seconds of its parts."""
        engine, frozen, bench, rows = self.engine, self.frozen, self.bench, count * self.cfg.num_generations
        cfg = replace(self.cfg, per_device_train_batch_size=rows, max_completion_length=work.completion)
        prompts = {number: example(bench.config, work, number) for number in range(count)}
        run = self.run(cfg, prompts[0])
        sample = self.rollout(work, count, work.completion)

        def step():
            run.plan.apply(self.model)
            start, draw, groups = bench.clock(), random.Random(0), []
            for n, group in enumerate(sample()):
                rollouts = [Rollout(n, c.ids, c.logprobs, c.finished, "", reward=draw.random()) for c in group]
                groups.append(Group(n, work.prompt, rollouts, n))
            sampled = bench.clock()
            _, normalizer = train_grpo.compare_within_groups(run, groups, len(groups))
            splits = train_grpo.split_micro_batches(groups, cfg, run.plan.pack_tokens)
            batches = [train_grpo.micro_batch(prompts, rollouts, bench.device) for rollouts in splits]
            if frozen:
                train_grpo.reference_pass(self.model, frozen, batches, cfg)
            referred = bench.clock()
            train_grpo.update_policy(run, engine, None, batches, normalizer, 1, len(batches))
            end = bench.clock()
            parts = {"rollout": sampled - start, "reference": referred - sampled, "update": end - referred}
            return {"": end - start} | parts

        return step


def step_of(contestant, kind, work, count):
    """One step of this kind as a function that returns {part: seconds}."""
    seconds, T = contestant.bench.seconds, work.completion
    if kind == "grpo":
        return contestant.grpo(work, count)
    if kind == "decode":
        half, whole = (contestant.rollout(work, count, tokens) for tokens in (T // 2, T))
        return lambda: {"": max(1e-9, (seconds(whole) - seconds(half)) / (T - T // 2))}
    length = T if kind == "rollout" else 1
    step = contestant.sft(work, count) if kind == "sft" else contestant.rollout(work, count, length)
    return lambda: {"": seconds(step)}


def floors_of(bench, kind, work, count):
    """{part: seconds} of `count` prompts or samples."""
    L, T, G = work.prompt, work.completion, bench.args.group
    flops = partial(step_flops, bench.config, work.grid, recompute=bench.args.recompute == "yes")
    compute = lambda *sizes, **options: count * flops(*sizes, **options) / bench.product_rate
    token = lambda own: decode_bytes(bench.model, L, own, count, G) / bench.copy_rate  # own: tokens of a row so far
    floors = {"prefill": compute(L, head=1), "decode": token(0.75 * T), "sft": compute(L + T, head=T, train=True)}
    floors["rollout"] = floors["prefill"] + T * token(0.5 * T)
    if kind != "grpo":
        return {"": floors[kind]}
    group = partial(compute, L, [T] * G, head=G * T)
    parts = {"rollout": floors["rollout"], "reference": group(), "update": group(train=True)}
    return {"": sum(parts.values())} | parts


def rows(bench, contestants):
    """(label, {who: step}, floors) of each row."""
    args = bench.args
    for kind, work in product(args.kinds, args.shape):
        for count in [args.batch or BATCH.get(work.name, 1)] if kind == "sft" else args.prompts:
            label = f"{kind} {work.name} {count}" + ("" if kind == "sft" else f" x {args.group}")
            able = contestants if kind != "grpo" else contestants[:1]
            steps = {one.name: bench.call(one.name, partial(step_of, one, kind, work, count))[0] for one in able}
            yield label, steps, floors_of(bench, kind, work, count)


def trace(bench, step) -> None:
    """One call under torch's profiler: the kernels that take most, and the share of time in which none runs."""
    with profile(activities=[ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU]) as profiler:
        wall = bench.seconds(step)
    averages, order = profiler.key_averages(), f"self_{bench.device.type}_time_total"
    print(averages.table(sort_by=order, row_limit=20, max_name_column_width=60))
    if bench.cuda:
        busy = sum(e.self_device_time_total for e in averages if not e.is_user_annotation) / 1e6
        print(f"{wall:.3f} s, idle {1 - busy / wall:.1%} where no kernels overlap", flush=True)


def twice(args, device) -> bool:
    """Three steps of each row that trains, from the same seed, twice: whether the adapters are equal bit for bit."""
    results, args.kinds = [], [kind for kind in args.kinds if kind in ("sft", "grpo")]
    for _ in range(2):
        bench = Bench(args, device)
        for _, steps, _ in rows(bench, [Ours(bench)]):
            for _ in range(3):
                steps[Ours.name]()
        results.append(torch.cat([p.detach().float().flatten() for p in bench.model.parameters() if p.requires_grad]))
    gap = float((results[0] - results[1]).abs().max())
    print(f"the same seed twice: {f'weights up to {gap:.2e} apart' if gap else 'equal bit for bit'}")
    return gap == 0


def main(argv=None) -> int:
    args = parse(argv)
    use_deterministic_kernels(args.deterministic)
    device = init_distributed()
    if args.twice:
        return 0 if twice(args, device) else 1
    bench = Bench(args, device)
    machine = torch.cuda.get_device_name() if bench.cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model} in {bench.dtype}; {machine}, torch {torch.__version__}; {' '.join(sys.argv[1:])}")
    print(f"products {bench.product_rate / 1e12:.4g} TFLOP/s, copies {bench.copy_rate / 1e9:.4g} GB/s")
    print(f"{'work':<36}{'who':<6}" + "".join(f"{name:>11}" for name in (*COLUMNS, "x floor")))
    # the peer is made first, for it needs the model without our adapters
    made = [bench.call(kind.name, partial(kind, bench))[0] for kind in [Peer] * args.peer + [Ours]]
    for label, steps, floors in rows(bench, made[::-1]):
        bench.measure(label, steps, floors)
        if args.trace:
            trace(bench, steps[Ours.name])
    head = {"model": args.model, "machine": machine, "torch": torch.__version__, "argv": sys.argv[1:]}
    head |= {"product_rate": bench.product_rate, "copy_rate": bench.copy_rate}
    print(json.dumps(head | {"results": bench.rows}))
    return 0


if __name__ == "__main__":
    code = main()
    leave_processes()
    sys.exit(code)
