"""Several ranks share a GRPO step: its prompts are dealt to be sampled, its groups to be trained on.

    loader = PromptLoader(…)             each rank's prompts, in units: what is sampled at a time; decoded ahead
    for prompts in to_sample(…)          a rank's own units, then those that other ranks have not begun
    found = exchange(…)                  all completions with their rewards, to all ranks: one gather
    deal(…), even_passes(…)              who trains on which group, in how many passes

What a unit and a pass hold follows from the data, the flags and the number of ranks: the clock decides only who samples
a unit, which its completions do not depend on. On one rank a step is one unit, and nothing here does any work.
"""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.distributed.distributed_c10d import _get_default_store  # the one that the processes met by

from bench.flops import head_flops, language_flops, vision_flops
from data import Processor
from dataset.batch import Example, Loader
from model import UserError
from training.counting import Reduction, on_device, signal_told, signals_of
from training.engine import gather
from training.groups import Rollout
from training.passes import cut
from training.waiting import Waiting, lost

# Prompt and completion tokens sampled together: their keys and values take 4.8 GB at the 3B shape
# (36 layers x 2 x 2 heads x 128 numbers x 2 bytes a token).
SAMPLED_TOKENS = 131_072
REACH = 16  # ranks whose waiting units a rank looks at: of a thousand ranks each would ask the one store of all others
EVEN = 0.05  # share of a rank's mean load that moving a group must save: its clip has to be decoded anew


# The prompts


class PromptLoader(Loader):
    """Prompts of each step as lists of Examples, read ahead: one list on one rank, else one for each of a rank's units.

    args: config.GRPO. All ranks know all units: those of a step have nearly equal numbers of prompts and cost.
    """

    def __init__(self, records, processor: Processor, args, **options):
        full = [args.max_completion_length] * args.num_generations
        cost = lambda grids, tokens, _trained: group_flops(processor.config, tokens, grids, full)
        super().__init__(records, processor, args, answer=False, collate=list, cost=cost, **options)
        self.dealt = self.world_size > 1
        self.planned: dict[int, tuple[list[int], list]] = {}  # by step: its prompts in order, each rank's units
        self.told = 0  # samples of `skipped` that the other ranks know of

    def plan(self, step, map_):
        batch = self.batch(step)
        if not self.dealt:
            self.planned[step] = batch, [[batch]]
            return super().plan(step, map_)
        failed = [(i, error, True) for i, error in zip(batch, map_(self.measure, batch)) if error is not None]
        units = self.units([i for i in batch if self.lengths[i] > 0])
        self.planned[step] = batch, units
        return units[self.rank], failed

    def news(self) -> dict[str, str]:
        """What of `skipped` the other ranks have not been told yet."""
        return dict(list(self.skipped.items())[self.told :])

    def hear(self, news: list[dict[str, str]]) -> None:
        """All ranks' news: in another epoch a sample may be another rank's, which shall not count it again."""
        for name, why in (item for names in news for item in names.items()):
            self.skipped.setdefault(name, why)
        self.told = len(self.skipped)

    def units(self, batch: list[int]) -> list[list[list[int]]]:
        """Sample numbers of each unit of each rank, the costliest unit first."""
        group, new = self.args.num_generations, self.args.max_completion_length
        longest = max((self.lengths[i] for i in batch), default=1)
        most = max(1, min(self.args.rollout_rows // group, SAMPLED_TOKENS // (longest + group * new)))
        return cut_units(batch, self.costs, most, self.world_size)

    def read(self, numbers: list[int]) -> tuple[list[Example], list[tuple[int, UserError]]]:
        """Examples that this rank had not read ahead, and (number, why) of those that cannot be read."""
        alone = partial(torch.set_num_threads, 1) if torch.cuda.is_available() else None
        with ThreadPoolExecutor(max(1, self.args.dataloader_num_workers), initializer=alone) as pool:
            found = list(pool.map(self.encode, numbers))
        return [x for x in found if isinstance(x, Example)], [x for x in found if not isinstance(x, Example)]


def group_flops(config, tokens: int, grids, completions) -> float:
    """One forward pass of a prompt of so many tokens with its clips, and of its completions' lengths."""
    vision = sum(vision_flops(config, grid) for grid in grids)
    return vision + language_flops(config, tokens, completions) + head_flops(config, sum(completions))


def cut_units(batch: list[int], costs, most: int, world: int) -> list[list[list[int]]]:
    """Items -> lists of at most `most` for each rank: as many lists for each, and nearly as costly. A rank has none
    where there are fewer items than ranks."""
    count = -(-max(len(batch), 1) // (most * world)) * world
    units, load, each = [[] for _ in range(count)], [0.0] * count, -(-len(batch) // count)
    for i in sorted(batch, key=lambda i: -costs[i]):
        u = min((u for u in range(count) if len(units[u]) < each), key=lambda u: (load[u], u))
        units[u].append(i)
        load[u] += costs[i]
    place = {i: k for k, i in enumerate(batch)}
    shares = [[] for _ in range(world)]
    for k, u in enumerate(sorted(range(count), key=lambda u: -load[u])):  # forth and back over the ranks
        turn, r = divmod(k, world)
        shares[world - 1 - r if turn % 2 else r].append(sorted(units[u], key=place.get))
    return [[unit for unit in share if unit] for share in shares]


def to_sample(run, loader: PromptLoader, step: int, own: list[list[Example]], failed: list):
    """Lists of prompts to sample, as long as there are any: this rank's units, then those that others have not begun.

    own: this rank's units, read ahead. A rank's first unit is its own; the others go to whoever counts up to them
    first. failed: gets (number, why) of the prompts of others that cannot be read.
    """
    if not loader.dealt:
        yield from own
        return
    _, units = loader.planned[step - 1]

    def take(owner):
        if len(units[owner]) > 1:
            k = _get_default_store().add(counter(step, owner), 1)
            return k if k < len(units[owner]) else None

    yield from own[:1]
    while (k := take(run.rank)) is not None:
        yield own[k]
    for away in range(1, min(run.world, REACH + 1)):
        owner = (run.rank + away) % run.world
        while (k := take(owner)) is not None:
            prompts, broken = loader.read(units[owner][k])
            failed += broken
            yield prompts


def counter(step: int, owner: int) -> str:
    """Key of the store under which a rank's begun units are counted."""
    return f"rollout units of rank {owner} begun in step {step}"


# What was sampled


class Sampled(NamedTuple):
    """A group as it is told to the other ranks."""

    number: int  # of its prompt's record
    tokens: int  # of its prompt
    grids: list[tuple[int, int, int]]
    group: list[Rollout]


@dataclass
class Found:
    """The groups of all ranks, in the prompts' order, whoever sampled them."""

    groups: list[list[Rollout]]
    sampled: list[Sampled]
    owners: list[int]  # rank whose unit it was in
    prompts: dict[int, Example]  # by group: those that this rank has read
    broken: float  # samples that are broken, so far
    told: dict[str, float]  # metrics


def exchange(run, loader: PromptLoader, step: int, done: list[tuple[Example, list[Rollout]]], failed: list, clock):
    """Everything that the ranks need to know of each other before the update, in one gather -> Found.

    done: this rank's prompts and groups, scored; failed: see to_sample. A prompt that cannot be read is told and
    counted by the rank that has it in its units.
    """
    mine = [Sampled(prompt.number, len(prompt), prompt.grid_thw, group) for prompt, group in done]
    counts = loader.left_out, run.halved, loader.broken
    ranks, failures, news, counts, before = zip(*gather((mine, failed, loader.news(), counts, clock.take())))
    batch, units = loader.planned.pop(step - 1)
    owner = {i: rank for rank, share in enumerate(units) for unit in share for i in unit}
    loader.hear(news)
    for i, error in (found for rank in failures for found in rank):
        if owner[i] == run.rank:
            loader.skip(i, error, False)
    if len(units[run.rank]) > 1:
        _get_default_store().delete_key(counter(step, run.rank))
    place = {number: k for k, number in enumerate(batch)}
    sampled = sorted((x for rank in ranks for x in rank), key=lambda x: place[x.number])
    for k, rollout in ((k, rollout) for k, x in enumerate(sampled) for rollout in x.group):
        rollout.group = k
    at = {x.number: k for k, x in enumerate(sampled)}
    left_out, halved, broken = (float(sum(column)) for column in zip(*counts))
    told = {"prompt_tokens": float(sum(x.tokens for x in sampled)), "skipped": left_out, "rollout_halved": halved}
    return Found(
        groups=[x.group for x in sampled],
        sampled=sampled,
        owners=[owner[x.number] for x in sampled],
        prompts={at[prompt.number]: prompt for prompt, _ in done},
        broken=broken,
        told=told | clock.lost(before),
    )


class Clock:
    """How long a step takes, and how much of it, with several ranks, goes by in waiting for the slowest of them.

    clock.begin() … clock.end()     a step
    clock.take()                    this rank has scored its last unit: what it tells the others of the step before
    clock.lost(rows)                metrics of the step before, from what all ranks told
    """

    def __init__(self, run, engine):
        self.waiting = engine.waiting = Waiting(run.device) if run.world > 1 else None
        self.seconds = self.rolled = 0.0

    def begin(self) -> float:
        self.began = time.perf_counter()
        return self.began

    def end(self) -> float:
        self.seconds = time.perf_counter() - self.began
        return self.seconds

    def take(self) -> tuple[float, list[float]]:
        before, self.rolled = self.rolled, time.perf_counter() - self.began
        return before, self.waiting.take() if self.waiting else []

    def lost(self, rows) -> dict[str, float]:
        """Shares of the step before that a rank, on average, waited for the slowest one: until that had sampled, and in
        the update; `idle` is both. traffic: see waiting.lost."""
        if not (self.waiting and self.seconds):
            return {}
        rolled, stood = zip(*rows)
        rollout = (max(rolled) - sum(rolled) / len(rolled)) / self.seconds
        update, traffic = (seconds / self.seconds for seconds in lost(stood))
        return {"idle": rollout + update, "rollout_idle": rollout, "update_idle": update, "traffic": traffic}


# The update


def deal(costs: dict[int, float], owners: list[int], world: int) -> dict[int, int]:
    """{group: its cost} -> {group: rank}: each to its owner, whose memory has its clip, but for as many as it takes to
    make the ranks' loads even."""
    place, load = {n: owners[n] for n in costs}, [0.0] * world
    for n, cost in costs.items():
        load[place[n]] += cost
    worth = EVEN * sum(load) / world
    while True:
        heavy, light = max(range(world), key=load.__getitem__), min(range(world), key=load.__getitem__)
        gap = load[heavy] - load[light]
        fits = [(abs(gap - 2 * costs[n]), n) for n in place if place[n] == heavy and gap - abs(gap - 2 * costs[n]) > 0]
        if not fits or (gap - min(fits)[0]) / 2 <= worth:
            return place
        n = min(fits)[1]
        place[n] = light
        load[heavy], load[light] = load[heavy] - costs[n], load[light] + costs[n]


def even_passes(config, cfg, shares: list[list[Sampled]]) -> tuple[list[list[list[Rollout]]], int]:
    """Each rank's groups -> (each rank's passes, the most of a rank), within the limits of `cut`, the costliest first:
    the ranks wait for each other after every pass."""
    pieces = [[(cost_of(config, x, piece), piece, x.tokens) for x in share for piece in pieces_of(x, cfg)]
              for share in shares]  # fmt: skip
    count = 1
    while None in (filled := [fill(rank, count, cfg) for rank in pieces]):
        count += 1
    return filled, max(map(len, filled))


def pieces_of(x: Sampled, cfg) -> list[list[Rollout]]:
    return cut([x.group], {x.group[0].group: x.tokens}, cfg)


def cost_of(config, x: Sampled, rollouts: list[Rollout]) -> float:
    return group_flops(config, x.tokens, x.grids, [len(rollout.ids) for rollout in rollouts])


def fill(pieces, count: int, cfg) -> list[list[Rollout]] | None:
    """(cost, Rollouts, prompt's tokens) into `count` passes, the costliest first, each into the emptiest that has room;
    None if there is not room enough. Empty passes are left out."""
    passes = [(0.0, 0, 0, [])] * count  # cost, completions, tokens, Rollouts
    for cost, rollouts, prompt in sorted(pieces, key=lambda piece: -piece[0]):
        tokens = prompt + sum(len(rollout.ids) for rollout in rollouts)
        room = [k for k, (_, n, size, _) in enumerate(passes) if not n or (
            n + len(rollouts) <= cfg.per_device_train_batch_size
            and not (cfg.pack_tokens and size + tokens > cfg.pack_tokens))]  # fmt: skip
        if not room:
            return None
        k = min(room, key=lambda k: passes[k][0])
        before = passes[k]
        passes[k] = before[0] + cost, before[1] + len(rollouts), before[2] + tokens, before[3] + rollouts
    passes = sorted((each for each in passes if each[3]), key=lambda each: -each[0])
    return [sorted(rollouts, key=lambda rollout: rollout.group) for *_, rollouts in passes]  # groups stay together


def share_of_update(run, config, loader: PromptLoader, found: Found, fair: list[int]):
    """What this rank trains on, and what it only takes the KL of.

    fair: groups whose KL is told. Returns ([Rollouts of a pass], [untrained groups], passes of a rank at most); their
    prompts are in found.prompts.
    """
    trained = [k for k, group in enumerate(found.groups) if group[0].trained]
    seen = [k for k in fair if not found.groups[k][0].trained and all(r.sound for r in found.groups[k])]
    if not loader.dealt:
        tokens = {k: x.tokens for k, x in enumerate(found.sampled)}
        passes = cut([found.groups[k] for k in trained], tokens, run.cfg)
        return passes, [found.groups[k] for k in seen], len(passes)
    costs = {k: cost_of(config, found.sampled[k], found.groups[k]) for k in trained + seen}
    # a group that is trained goes through the reference, the policy and, at twice the cost, back
    place = deal({k: cost * (1 if k in seen else 4) for k, cost in costs.items()}, found.owners, run.world)
    shares = [[found.sampled[k] for k in trained if place[k] == rank] for rank in range(run.world)]
    passes, most = even_passes(config, run.cfg, shares)
    missing = [k for k in place if place[k] == run.rank and k not in found.prompts]
    examples, broken = loader.read([found.sampled[k].number for k in missing])
    if broken:  # it was read on another rank in this very step
        raise broken[0][1]
    found.prompts |= dict(zip(missing, examples))
    return passes[run.rank], [found.groups[k] for k in seen if place[k] == run.rank], most


class Sums(Counter):
    """Sums over this rank's passes, by name, for the updates to add to; then over all ranks.

    Tensors on the device: nothing here waits for it before read().
    """

    NAMES = ("fair_kl", "fair_tokens", "loss", "tokens", "ratio", "clip_low", "clip_high", "entropy", "kl",
             "sampler_gap", "sampler_capped")  # fmt: skip
    LARGEST = "sampler_gap_max"  # not their sum

    def __init__(self, run):
        super().__init__()
        self.run = run

    def send(self) -> None:
        """On their way to all ranks, as they are by now."""
        run = self.run
        places = torch.zeros(len(self.NAMES) + run.world, dtype=torch.float64, device=run.device)
        sums, largest = places.split([len(self.NAMES), run.world])  # the largest has a place for each rank
        for k, name in enumerate(self.NAMES):
            sums[k] += self[name]
        largest[run.rank] += self[self.LARGEST]
        self.told = Reduction(run, torch.cat([places, on_device(run, signals_of(run))]))

    def read(self) -> dict[str, float]:
        """{name: over all ranks}, and "signal": what a rank was sent, else 0. Call it after update()."""
        numbers, count = self.told.read(), len(self.NAMES)
        largest, signals = numbers[count : count + self.run.world], numbers[count + self.run.world :]
        return dict(zip(self.NAMES, numbers)) | {self.LARGEST: max(largest), "signal": signal_told(signals)}
