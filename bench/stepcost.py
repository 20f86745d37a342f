"""The model of a step on several GPUs: seconds and bytes, by arithmetic and by what was measured on one GPU.

    costs = Costs(rows, told, gpu)        rows and told: of scale.json
    costs.step(Setting(…))                {sampling, compute, traffic, waiting, seconds}
    costs.memory(Setting(…))              {component: bytes} of one card, the plan's (training/memory.py)

Compute: arithmetic by shapes (model/cost.py) over the rate that one GPU was measured at. Decoding: steps as measured,
other sizes by their bytes. Traffic: the bytes that ring collectives send over the links' rates. Waiting: the slowest of
n ranks, by the measured spread of steps and of completions' lengths. Only rows of one GPU are fitted.
"""

import heapq
import math
import statistics
from dataclasses import dataclass, replace
from functools import cache
from operator import itemgetter

import numpy as np
import torch
from workloads import NAMED, Workload, forward_flops, linear_flops, model_config

import lora
from config import GRPO, SFT
from model import UserError
from model.partition import counts
from model.qwen2_5_vl import Qwen2_5_VL
from training.blocks import Load, part_of_clip
from training.engine import BUCKET
from training.memory import CONTEXT, Memory, peak
from training.survey import group_loads

SEED, TRIALS = 0, 20  # of the simulated queue
PACK_TOKENS = 16384  # of a pass of GRPO's update


# -- Traffic


@dataclass(frozen=True)
class Link:
    rate: float  # bytes a second and GPU, each way
    seconds: float  # of one hop, however short the message


def gather_bytes(n, size):
    """What each of n ranks sends, and receives, until all have a tensor of `size` bytes that was in n parts; and the
    same for a reduction into n parts, and for an all-to-all of `size` bytes a rank."""
    return (n - 1) / n * size


def reduce_bytes(n, size):
    """An all-reduce by rings is a reduction into parts and their gathering."""
    return 2 * gather_bytes(n, size)


@dataclass(frozen=True)
class Cluster:
    """Links among a host's GPUs and between hosts: every GPU has a network card of its own, over which it exchanges
    its part with the GPU in its place on the other hosts."""

    inside: Link
    between: Link
    host: Link  # a card and its host's memory
    per_host: int = 8

    def gather(self, n, size):
        """Seconds in which n ranks gather `size` bytes."""
        if n == 1:
            return 0.0
        inner = min(n, self.per_host)
        hosts = math.ceil(n / inner)
        seconds = (inner - 1) * self.inside.seconds + gather_bytes(inner, size) / self.inside.rate
        if hosts > 1:
            seconds += math.ceil(math.log2(hosts)) * self.between.seconds
            seconds += gather_bytes(hosts, size / inner) / self.between.rate
        return seconds

    def reduce(self, n, size):
        return 2 * self.gather(n, size)


# -- Stragglers


def expected_max(samples, n):
    """The exact mean of the largest of n independent draws, with replacement, from these numbers."""
    ordered = np.sort(np.asarray(samples, np.float64))
    below = np.arange(len(ordered) + 1) / len(ordered)
    return float((ordered * np.diff(below**n)).sum())


def finish_times(units, ranks, shared):
    """units: (ranks, U) seconds of each rank's units -> seconds after which each rank is through. shared: whoever is
    through takes a unit that nobody has begun (training/dealing.py)."""
    if not shared:
        return units.sum(1)
    free, done = [(own[0], r) for r, own in enumerate(units)], units[:, 0].copy()
    heapq.heapify(free)
    for seconds in units[:, 1:].T.flatten():
        now, r = heapq.heappop(free)
        done[r] = now + seconds
        heapq.heappush(free, (done[r], r))
    return done


# -- One step


@dataclass(frozen=True)
class Setting:
    model: str
    kind: str  # sft or grpo
    work: Workload
    gpus: int
    batch: int  # samples (SFT) or prompts (GRPO) a GPU and step; of a group of GPUs, where they share a batch
    group: int = 0  # completions of a prompt
    rank: int = 64
    gradient_checkpointing: bool = True
    offload_optimizer: bool = False
    partition_weights: bool = False
    offload_weights: bool = False
    sequence_parallel: int = 1
    prompts_at_once: int = 0  # of a unit of the queue; 0 = all of a rank's

    def config(self):
        """The settings as the scripts have them."""
        names = "gradient_checkpointing", "offload_optimizer", "partition_weights", "offload_weights"
        flags = {name: getattr(self, name) for name in names} | {"lora_rank": self.rank, "lora_alpha": self.rank}
        if self.kind == "sft":
            return SFT(**flags, sequence_parallel=self.sequence_parallel)
        size = {"per_device_train_batch_size": self.batch * self.group, "num_generations": self.group}
        return GRPO(**flags, **size, max_completion_length=self.work.completion, pack_tokens=PACK_TOKENS)


@cache
def shape(size, rank):
    """The model with its adapters, without memory."""
    with torch.device("meta"):
        model = Qwen2_5_VL(model_config(size)).to(torch.bfloat16)
    lora.inject(model, SFT(lora_rank=rank, lora_alpha=rank))
    return model


@cache
def sizes(size, rank):
    """(numbers that are trained, bytes of the weights that decoding reads, bytes of a token's keys and values)."""
    model, c = shape(size, rank), model_config(size)
    layers = sum(p.numel() for n, p in model.model.layers.named_parameters() if not n.endswith("adapters"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    keys = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return trained, 2 * (layers + model.head_weight.numel()), keys


class Costs:
    """Seconds of a step. rows: what was measured on one kind of GPU; told: the rest of scale.json.

    Fitted to rows of one GPU: the rate of an SFT step's arithmetic, and decoding by its rows.
    """

    def __init__(self, rows, told, gpu):
        self.rows, self.gpu, self.assumed = rows, gpu, told["assumed"]
        one = {row["work"]: row for row in rows if row["gpus"] == 1 and not row["flags"]}
        if "sft" not in one:
            raise UserError(f"--measured: no SFT run on one GPU of kind {gpu!r}, expected one: scale.py run --work sft")
        row = one["sft"]
        self.size, self.recompute = row["model"], row["gradient_checkpointing"]
        work = NAMED[row["workload"]]
        flops = row["batch"] * linear_flops(model_config(self.size), work, work.completion, self.recompute)
        self.rate = flops / (row["ms"] / 1000)
        self.spread = {work: self.of_median(row) for work, row in one.items()}
        self.fit_decoding(told["decode"], one)
        self.cluster, self.linked = self.fit_links()
        self.lengths, self.rest = told["lengths"], {}
        for work, row in one.items():
            of = NAMED[row["workload"]]
            kind, at = "grpo" if row["group"] else "sft", (row["batch"], row["group"], row["rank"])
            setting = Setting(row["model"], kind, of, 1, *at, row["gradient_checkpointing"])
            self.rest[work] = row["ms"] / 1000 - self.step(setting)["seconds"]

    @staticmethod
    def of_median(row):
        times = row.get("all_ms", [])
        return [ms / statistics.median(times) for ms in times] if len(times) >= 5 else [1.0]

    def fit_decoding(self, known, one):
        """A decoding step of the measured size takes `base` seconds and `slope` more for each row."""
        points = dict(known["points"]) if known["gpu"] == self.gpu else {}
        for name in ("grpo", "grpo8") if not points else ():
            if "rollout_seconds" in one.get(name, {}):
                row, work = one[name], NAMED[one[name]["workload"]]
                seconds = row["rollout_seconds"] - row["batch"] * self.prefill(self.size, work)
                points[row["batch"] * row["group"]] = seconds / (work.completion - 1)
        self.decoding_measured = bool(points)
        known = sorted(map(tuple, known["points"]))
        points = sorted(points.items()) or known
        (low, a), (high, b) = points[0], points[-1]
        (least, x), (most, y) = known[0], known[-1]  # the slope, where only one point was measured here
        self.slope = (b - a) / (high - low) if high > low else (y - x) / (most - least)
        self.base = a - self.slope * low

    def fit_links(self):
        """Links among a host's GPUs as measured by themselves, else as assumed; the others are assumed."""
        links = {name: Link(found["rate"], found["seconds"]) for name, found in self.assumed["links"].items()}
        found = [link for row in self.rows for link in row.get("links", []) if link["op"] == "all_gather"]
        most = max((link["ranks"] for link in found), default=0)
        found = [link for link in found if link["ranks"] == most]
        if not found:
            return Cluster(**links, per_host=self.assumed["per_host"]), False
        small, large = (pick(found, key=itemgetter("bytes")) for pick in (min, max))
        rate = gather_bytes(large["ranks"], large["bytes"]) / max(1e-9, large["seconds"] - small["seconds"])
        links["inside"] = Link(rate, small["seconds"] / (small["ranks"] - 1))
        return Cluster(**links, per_host=self.assumed["per_host"]), True

    # parts of a step

    def prefill(self, size, work):
        return forward_flops(model_config(size), work, group=0) / self.rate

    def decode(self, s, rows):
        """Seconds of a decoding step: the measured size's, by the bytes of weights and of the rows' keys and values."""
        _, weights, keys = sizes(s.model, s.rank)
        _, weights_then, keys_then = sizes(self.size, s.rank)
        return self.base * weights / weights_then + self.slope * rows * keys / keys_then

    def completions(self, s, like):
        """Tokens of completions: all of full length, or as they were measured, as shares of the longest allowed."""
        if not like:
            return np.array([s.work.completion])
        return np.repeat(self.lengths["shares"], self.lengths["counts"]) * s.work.completion

    def rollout(self, s, like, shared):
        """(mean, slowest) seconds over ranks of sampling: a unit's rows decode until its longest completion ends. Exact
        where a rank has one unit; else simulated, with a seed."""
        at_once = s.prompts_at_once or s.batch
        units, rows = math.ceil(s.batch / at_once), at_once * s.group
        seconds = lambda tokens: at_once * self.prefill(s.model, s.work) + (tokens - 1) * self.decode(s, rows)
        lengths = self.completions(s, like)
        if units == 1:
            return seconds(expected_max(lengths, rows)), seconds(expected_max(lengths, s.gpus * rows))
        rng, found = np.random.default_rng(SEED), []
        for _ in range(TRIALS):
            longest = rng.choice(lengths, (s.gpus, units, rows)).max(2)
            done = finish_times(seconds(longest), s.gpus, shared)
            found.append((done.mean(), done.max()))
        return np.mean(found, 0).tolist()

    def compute(self, s, completion):
        """Seconds of one GPU's share of an update: its arithmetic, with GRPO's pass for the reference, but however few
        tokens there are so much for every block that is launched."""
        c, group = model_config(s.model), max(1, s.group)
        work = replace(s.work, completion=completion)
        flops = linear_flops(c, work, group * completion, s.gradient_checkpointing, group)
        if s.group:
            flops += forward_flops(c, work, group, group * completion)
        graphs = s.sequence_parallel == 1 and not s.partition_weights
        least = self.assumed["least"]["captured" if graphs else "launched"] * (c.num_hidden_layers + c.vision.depth)
        return max(s.batch * flops / s.sequence_parallel / self.rate, self.passes(s, completion) * least)

    @staticmethod
    def passes(s, completion):
        """Forward and backward passes of a step; SFT's samples are packed into one."""
        return math.ceil(s.batch * (s.work.prompt_tokens + s.group * completion) / PACK_TOKENS) if s.group else 1

    def traffic(self, s, compute):
        """Seconds that no computing hides: of the gradients the last bucket and what outlasts the backward pass; the
        updated adapters; of parted weights what outlasts a pass; all exchanges of sequence parallelism."""
        trained, _, _ = sizes(s.model, s.rank)
        last = (trained - 1) % BUCKET + 1
        backward = 2 / 3 * compute
        under = self.cluster.reduce(s.gpus, 4 * (trained - last)) if trained > last else 0.0
        found = max(0.0, under - backward) + self.cluster.reduce(s.gpus, 4 * last)
        found += self.cluster.gather(s.gpus, 2 * trained)
        if s.offload_optimizer:  # gradients there, AdamW's seven passes over fp32 numbers in host memory, weights back
            found += trained / s.gpus * ((4 + 2) / self.cluster.host.rate + 7 * 4 / self.assumed["host_memory"]["rate"])
        return found + max(0.0, self.weights(s) - compute) + self.exchanges(s)

    def weights(self, s):
        """Seconds in which parted weights come to a card in a step: forwards and backwards in every pass, GRPO's also
        for the reference, the prompts and the sampler's copy. They lie on the GPUs of a host, or in its memory."""
        if not (s.partition_weights or s.offload_weights):
            return 0.0
        n = min(s.gpus, self.cluster.per_host)
        size = 2 * counts(shape(s.model, s.rank), n, True)[0]
        passes = 3 * self.passes(s, s.work.completion) + 2 if s.group else 2
        if s.offload_weights:
            return passes * size / self.cluster.host.rate
        return passes * gather_bytes(n, size) / self.cluster.inside.rate

    def exchanges(self, s):
        """q, k, v there and the output back in every layer, forwards, again where recomputed, and backwards."""
        n, c = s.sequence_parallel, model_config(s.model)
        if n == 1:
            return 0.0
        tokens = s.batch * (s.work.prompt_tokens + s.work.completion) / n
        size = tokens * 2 * (2 * c.hidden_size + 2 * c.num_key_value_heads * c.head_dim)
        passes = (3 if s.gradient_checkpointing else 2) * c.num_hidden_layers
        return passes * (2 * (n - 1) * self.cluster.inside.seconds + gather_bytes(n, size) / self.cluster.inside.rate)

    def step(self, s, like=False, shared=False):
        """{part: seconds} of a step. like: completions as long as measured ones, else of full length. shared: see
        finish_times. rest: what the same work on one GPU took beyond the model."""
        completion, sampling, late = s.work.completion, 0.0, 0.0
        if s.group:
            sampling, slowest = self.rollout(s, like, shared)
            late = slowest - sampling
            completion = round(float(self.completions(s, like).mean()))
        compute = self.compute(s, completion)
        work = s.kind if s.batch == 1 or s.kind == "sft" else f"{s.kind}{s.batch}"  # as scaling.KINDS calls it
        samples, rest = self.spread.get(work, [1.0]), self.rest.get(work, 0.0) if s.model == self.size else 0.0
        late += (expected_max(samples, s.gpus) - expected_max(samples, 1)) * (compute + sampling)
        found = {"sampling": sampling, "compute": compute, "traffic": self.traffic(s, compute), "waiting": late}
        return found | {"rest": rest, "seconds": sum(found.values()) + rest}

    # memory

    def host_memory(self, s):
        """Bytes that a host holds for its GPUs: parted weights once, AdamW's state of its GPUs."""
        n = min(s.gpus, self.cluster.per_host)
        weights = 2 * counts(shape(s.model, s.rank), n, True)[0] * s.offload_weights
        return weights + 12 * sizes(s.model, s.rank)[0] * s.offload_optimizer * n / s.gpus

    def memory(self, s):
        """{component: bytes} at the moment that takes most, on one card."""
        cfg, w, n = s.config(), s.work, s.sequence_parallel
        cfg.given = frozenset()
        memory = Memory(shape(s.model, s.rank), cfg, 2, s.gpus, local=min(s.gpus, self.cluster.per_host))
        patches, part = w.grid[0] * w.grid[1] * w.grid[2], part_of_clip(*w.grid)
        if not s.group:
            steps = math.ceil(s.batch * w.grid[0] / n) * w.grid[1] * w.grid[2]  # whole grid steps
            tokens = math.ceil(s.batch * (w.prompt_tokens + w.completion) / n)
            answers = min(tokens, s.batch * w.completion)
            moments = memory.update(Load(tokens, answers, steps, s.batch, s.batch, part=min(part, steps)))
        else:
            prompts = [(w.prompt_tokens, patches, part)] * s.batch
            loads = group_loads(prompts, [[w.completion] * s.group] * s.batch, cfg)
            moments = {}
            for load in set(loads):
                moments |= {f"{k} of {load.tokens}": v for k, v in memory.update(load, len(loads)).items()}
            at_once = s.prompts_at_once or s.batch
            sizes = at_once * w.prompt_tokens, w.prompt_tokens, at_once * patches, at_once, s.group, w.completion
            moments |= memory.sampling(*sizes)
        name, components = peak(moments)
        return components | {"context and libraries": CONTEXT}
