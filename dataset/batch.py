"""Examples -> packed batches; a dataset -> the micro-batches of every optimizer step.

    pack(examples)                     many samples, one batch, no padding
    pack_groups(prompts, completions)  a prompt stands once, its completions attend to it (GRPO)
    Loader(records, processor, args)   which samples, in an order that depends on the seed and the epoch alone

    step k of an epoch   one global batch: batch_size x accumulation x world_size samples, for any number of ranks
    micro-batches        of at most batch_size samples; or, with pack_tokens, as few as hold the batch within that many
                         tokens each
    a rank's share       as many micro-batches as every rank's. The update is the same, however they are dealt; with a
                         cost they are dealt so that all ranks are busy: see deal()

So a run can go on at any step without having seen the ones before. Threads decode ahead. A sample that is broken is
skipped, counted and named, and nothing takes its place.

L tokens of a sample, T of a batch, F frames, P patches, N clips, G completions a prompt.
"""

import heapq
import logging
import math
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import Full, Queue

import numpy as np
import torch
from torch import Tensor

from model import UserError
from model.qwen import IGNORE, Packed, Segments

PREFETCH = 2  # optimizer steps being decoded ahead

log = logging.getLogger("data")


@dataclass(eq=False)
class Example:
    """One conversation, ready for the model. L tokens, P patches, N clips."""

    name: str
    ids: np.ndarray  # (L,) int64; a clip's pad stands once per vision token
    targets: np.ndarray  # (L,) int64: ids[i + 1] where the assistant says it, its <|im_end|> included; IGNORE elsewhere
    position_ids: np.ndarray  # (3, L) int64
    patches: Tensor | None  # (P, 1176) uint8; shared with the cache, never written to
    grid_thw: list[tuple[int, int, int]]  # N grids in patches
    second_per_grid: list[float]  # N; 0 for images
    frame_indices: list[list[int]]  # N lists of F frame numbers, in the order shown
    frame_times: list[list[float]]  # N lists of F seconds
    num_vision_tokens: int
    record: dict = field(repr=False)
    number: int = -1  # of its record, where a Loader made it

    def __len__(self) -> int:
        return len(self.ids)


def pack(examples: list[Example], pin: bool = False) -> Packed:
    """Examples laid end to end, each seeing only itself. pin: pixels in memory that a GPU reads while the host goes on.

    An empty list gives one untrained token: all ranks must run the same number of passes, also where all samples of one
    were skipped.
    """
    if not examples:
        zero = torch.zeros(1, dtype=torch.int64)
        return Packed(zero, zero.expand(3, 1), Segments.causal([1]), targets=torch.full((1,), IGNORE))
    return Packed(
        input_ids=join(e.ids for e in examples),
        position_ids=join((e.position_ids for e in examples), axis=1),
        segments=Segments.causal([len(e) for e in examples]),
        patches=join_patches(examples, pin),
        grid_thw=[grid for e in examples for grid in e.grid_thw],
        targets=join(e.targets for e in examples),
        names=[e.name for e in examples],
    )


def pack_groups(prompts: list[Example], completions: list[list[list[int]]]) -> Packed:
    """Each prompt once, then its completions, which attend to it: prompt_0, c_00, c_01, ..., prompt_1, ...

    completions: ids of each prompt's G completions, end token included. A completion's first token is predicted by the
    prompt's last one, so that one token is not shared: every completion's run is [last prompt token, c_1 .. c_n-1] with
    targets c_1 .. c_n, and the shared run is the prompt without it. Positions go on as in decoding.
    """
    assert len(prompts) == len(completions), f"{len(prompts)} prompts, {len(completions)} groups of completions"
    ids, positions, targets = [], [], []
    for prompt, group in zip(prompts, completions, strict=True):
        ids.append(prompt.ids[:-1])
        positions.append(prompt.position_ids[:, :-1])
        targets.append(np.full(len(prompt) - 1, IGNORE))
        last = prompt.position_ids.max()
        assert (prompt.position_ids[:, -1] == last).all(), f"{prompt.name}: ends within a clip, expected text"
        for completion in group:
            assert len(completion), f"{prompt.name}: a completion without a token"
            ids.append(np.array([prompt.ids[-1], *completion[:-1]]))
            positions.append(np.tile(last + np.arange(len(completion)), (3, 1)))
            targets.append(np.array(completion))
    return Packed(
        input_ids=join(ids),
        position_ids=join(positions, axis=1),
        segments=Segments.shared_prompt([len(p) - 1 for p in prompts], [list(map(len, c)) for c in completions]),
        patches=join_patches(prompts),
        grid_thw=[grid for p in prompts for grid in p.grid_thw],
        targets=join(targets),
        names=[p.name for p in prompts],
    )


def join(arrays: Iterable[np.ndarray], axis: int = 0) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays), axis=axis))


def join_patches(examples: list[Example], pin: bool = False) -> Tensor | None:
    patches = [e.patches for e in examples if e.patches is not None]
    if not pin or not patches:
        return torch.cat(patches) if patches else None
    whole = torch.empty(sum(map(len, patches)), patches[0].shape[1], dtype=patches[0].dtype, pin_memory=True)
    return torch.cat(patches, out=whole)


# -- Order


class TooLong(UserError):
    """A sample that cannot be brought within max_seq_length: left out on purpose, not broken."""


class Vanished(UserError):
    """A whole folder of clips that was there at the start is gone: no fault of a sample, it ends the run."""


class Loader:
    """The batches of one rank.

    args: config.CommonTrain's seed, per_device_train_batch_size, gradient_accumulation_steps, pack_tokens,
    dataloader_num_workers, max_skip_share. collate: list of Examples -> what is yielded (data.pack, or list).
    answer: as in Processor.encode. global_batch: samples a step, if not what args say; shares may differ by one.
    cost: (grids of its clips, its tokens, those trained) of a sample -> what its update costs, in any unit; then
    several ranks get shares of equal cost, and a sample whose size cannot be told is left out by all of them.
    readers: processes that read this rank's samples, each for itself (model/sequence.py).

    After or during iteration, `skipped` holds {name: reason} of this rank's samples that were left out.
    """

    def __init__(
        self, records: Sequence[dict], processor, args, *, rank: int = 0, world_size: int = 1, answer: bool = True,
        shuffle: bool = True, collate: Callable = pack, global_batch: int | None = None, cost: Callable | None = None,
        readers: int = 1,
    ):  # fmt: skip
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.records, self.processor, self.collate, self.args = records, processor, collate, args
        self.rank, self.world_size, self.answer, self.shuffle = rank, world_size, answer, shuffle
        self.readers = readers
        self.micro_batches = args.gradient_accumulation_steps * world_size
        self.global_batch = global_batch or args.per_device_train_batch_size * self.micro_batches
        self.limit = math.ceil(self.global_batch / self.micro_batches)  # samples of a micro-batch
        self.steps_per_epoch = math.ceil(len(records) / self.global_batch)
        self.skipped: dict[str, str] = {}
        self.left_out = 0.0  # its sum over the ranks counts every sample of `skipped` once
        self.broken = 0.0  # likewise of those that are broken, not only too long
        self.last = ""  # the last broken one, and why
        self.lengths = array("q", [-1]) * len(records)  # tokens, for pack_tokens; -1 = not known yet, 0 = skipped
        self.cost = cost if world_size > 1 else None
        self.costs = array("d", [0.0]) * len(records) if self.cost else None  # known where the tokens are

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps of this many passes over the data."""
        return max(1, math.ceil(self.steps_per_epoch * epochs - 1e-9))

    def iterate(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[list]:
        """The micro-batches of each step from start_step on, epoch after epoch, without end if stop_step is None.

        With workers, one thread plans and packs ahead while they decode; what it had to leave out is told when its step
        is handed over, so that nothing depends on how far ahead it is.
        """
        steps = count(start_step) if stop_step is None else range(start_step, stop_step)
        workers = self.args.dataloader_num_workers
        made = ahead(self.produce(steps, workers), PREFETCH) if workers else self.produce(steps, 0)
        for micro_batches, failed in made:
            for i, error, everywhere in failed:
                self.skip(i, error, everywhere)
            yield micro_batches

    def produce(self, steps: Iterable[int], workers: int) -> Iterator[tuple[list, list[tuple]]]:
        """(micro-batches, samples left out) of each step; the samples of the next step are decoded meanwhile."""
        if workers == 0:
            for step in steps:
                bins, failed = self.plan(step, map)
                yield self.finish([[self.encode(i) for i in bin] for bin in bins], failed)
            return
        # beside a GPU, each thread on one core: torch's own threads in each of them would take the cores from the loop
        alone = partial(torch.set_num_threads, 1) if torch.cuda.is_available() else None
        pool = ThreadPoolExecutor(workers, thread_name_prefix="data", initializer=alone)
        try:
            waiting: deque[tuple[list[list[Future]], list]] = deque()
            for step in steps:
                bins, failed = self.plan(step, pool.map)
                waiting.append(([[pool.submit(self.encode, i) for i in bin] for bin in bins], failed))
                if len(waiting) > 1:
                    yield self.gather(*waiting.popleft())
            while waiting:
                yield self.gather(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def gather(self, bins: list[list[Future]], failed: list):
        return self.finish([[future.result() for future in bin] for bin in bins], failed)

    # -- The plan

    def batch(self, step: int) -> list[int]:
        """Sample numbers of one global batch, the same on every rank. An epoch's last one may be smaller."""
        epoch, k = divmod(step, self.steps_per_epoch)
        order = self.order(epoch)
        return order[k * self.global_batch : (k + 1) * self.global_batch].tolist()

    def order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.records))
        if getattr(self, "_epoch", None) != epoch:
            self._order = np.random.default_rng((self.args.seed, epoch)).permutation(len(self.records))
            self._epoch = epoch
        return self._order

    def plan(self, step: int, map_: Callable) -> tuple[list[list[int]], list[tuple]]:
        """Sample numbers of each of this rank's micro-batches, and the samples whose length cannot be told.

        All ranks find as many micro-batches: each plans for all of them, from what all know.
        """
        batch, failed, budget = self.batch(step), [], self.args.pack_tokens
        if not self.cost and (budget is None or len(batch) == 1):
            bins = [part.tolist() for part in np.array_split(batch, self.micro_batches)]
        else:
            failed = [(i, error, True) for i, error in zip(batch, map_(self.measure, batch)) if error is not None]
            batch = [i for i in batch if self.lengths[i]]
            costs = {i: self.costs[i] if self.cost else self.lengths[i] for i in batch}
            bins = by_count(costs, self.limit, self.world_size) if budget is None else self.by_tokens(costs, budget)
            bins = deal(bins, [sum(costs[i] for i in bin) for bin in bins], self.world_size)
        share, rest = divmod(len(bins), self.world_size)
        assert not rest, f"{len(bins)} micro-batches for {self.world_size} ranks"
        return [[int(i) for i in bin] for bin in bins[self.rank * share : (self.rank + 1) * share]], failed

    def by_tokens(self, costs: dict, budget: int) -> list[list[int]]:
        return fill_bins([*costs], [*costs.values()], [self.lengths[i] for i in costs], budget, self.world_size)

    def measure(self, i: int) -> UserError | None:
        """Learn a sample's length, and its cost, once, without decoding it. All ranks find the same."""
        if self.lengths[i] < 0:
            try:
                grids, tokens, trained = self.processor.shape(self.records[i], self.answer)
                if self.cost:
                    self.costs[i] = self.cost(grids, tokens, trained)
                self.lengths[i] = tokens
            except Vanished:
                raise
            except UserError as error:
                self.lengths[i] = 0
                return error
        return None

    # -- The samples

    def encode(self, i: int) -> Example | tuple[int, UserError]:
        """Sample i, or the reason why there is none."""
        try:
            example = self.processor.encode(self.records[i], self.answer)
            example.number = i
            return example
        except Vanished:
            raise
        except UserError as error:
            return i, error

    def finish(self, bins: list[list], failed: list) -> tuple[list, list[tuple]]:
        """(micro-batches of what was encoded, the rest)."""
        failed = failed + [(*found, False) for bin in bins for found in bin if not isinstance(found, Example)]
        return [self.collate([found for found in bin if isinstance(found, Example)]) for bin in bins], failed

    def skip(self, i: int, error: UserError, everywhere: bool) -> None:
        """Count and name a sample that is left out; UserError when too many are."""
        name, share = f"sample {i}", (1 / self.world_size if everywhere else 1) / self.readers
        if name in self.skipped:
            return
        self.skipped[name] = str(error)
        log.warning("%s skipped: %s", name, error)
        self.left_out += share
        if not isinstance(error, TooLong):
            self.broken += share
            self.last = f"; the last: {name}: {error}"
        self.check_share(self.broken)  # the other ranks' come on top: the training loops sum them at every step
        if len(self.skipped) == len(self.records):
            raise UserError(f"all {len(self.records)} samples are left out; the last: {name}: {error}")

    def check_share(self, broken: float) -> None:
        """broken: `self.broken` summed over the ranks. UserError if it is more than max_skip_share of the samples."""
        total, most = len(self.records), self.args.max_skip_share
        if round(broken, 6) > most * total:  # shares of 1 / world_size add up to a count only nearly
            raise UserError(f"{round(broken)} of {total} samples are broken, max_skip_share is {most}{self.last}")

    def state(self) -> dict:
        """What a resumed run needs to go on counting: JSON, of this rank."""
        return {"skipped": self.skipped, "left_out": self.left_out, "broken": self.broken, "readers": self.readers}

    def restore(self, ranks: list[dict]) -> None:
        """Go on counting from the states of all ranks of the run that is resumed, which may have been more or fewer."""
        processes = self.world_size * self.readers
        if len(ranks) == processes and ranks[0].get("readers", 1) == self.readers:
            mine = ranks[self.rank * self.readers]
            self.skipped, self.left_out, self.broken = dict(mine["skipped"]), mine["left_out"], mine["broken"]
            return
        self.skipped = {name: why for rank in ranks for name, why in rank["skipped"].items()}
        for name in ("left_out", "broken"):  # everyone knows all names, so each has its share of the counts
            setattr(self, name, sum(rank[name] for rank in ranks) / processes)


def ahead(iterator: Iterator, depth: int) -> Iterator:
    """The items of iterator, made by a thread that stays at most depth items ahead; its exceptions come out here."""
    items: Queue = Queue(depth)
    closed = threading.Event()

    def put(kind: str, value) -> None:
        while not closed.is_set():
            try:
                return items.put((kind, value), timeout=0.2)
            except Full:
                continue

    def work() -> None:
        try:
            for item in iterator:
                put("item", item)
                if closed.is_set():
                    break
            put("end", None)
        except BaseException as error:  # noqa: BLE001 (whatever it is, it is raised in the thread that waits for us)
            put("error", error)
        finally:
            iterator.close()

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = items.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()
        thread.join()


def fill_bins(items: list[int], costs: list, sizes: list[int], room: int, multiple: int) -> list[list[int]]:
    """Items into the fewest bins, a multiple of `multiple`, of at most `room` each by their sizes: the most costly
    first, each into the bin of least cost that has room. An item larger than the room stands alone."""
    order = sorted(zip(costs, sizes, items, strict=True), key=lambda each: -each[0])
    least = math.ceil(sum(min(size, room) for size in sizes) / room)
    bins = multiple * max(1, math.ceil(least / multiple))
    while (filled := into_bins(order, room, bins)) is None:
        bins += multiple
    return filled


def into_bins(order: list[tuple], room: int, bins: int) -> list[list[int]] | None:
    """(cost, size, item) one after the other into so many bins; None where one finds no room."""
    heap = [(0, b) for b in range(bins)]  # (cost, number)
    filled, used = [[] for _ in heap], [0] * bins
    for cost, size, item in order:
        full = []
        while heap and used[heap[0][1]] and used[heap[0][1]] + size > room:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, b = heap[0]
        heapq.heapreplace(heap, (load + cost, b))
        filled[b].append(item)
        used[b] += size
        for each in full:
            heapq.heappush(heap, each)
    return filled


def by_count(costs: dict, most: int, ranks: int) -> list[list[int]]:
    """Items, {item: cost}, into micro-batches of at most `most`: those of the k-th passes hold items of like cost, for
    where every micro-batch is full, they cannot all be made alike."""
    order, size = sorted(costs, key=lambda i: -costs[i]), most * ranks
    passes = [order[first : first + size] for first in range(0, len(order), size)] or [[]]
    return [bin for part in passes for bin in fill_bins(part, [costs[i] for i in part], [1] * len(part), most, ranks)]


def deal(bins: list[list[int]], costs: list, ranks: int) -> list[list[int]]:
    """Bins in the order of ranks: all of the first one's, all of the second one's, …

    Gradients are reduced in every pass, so the k-th passes of all ranks begin and end together: they get bins of
    neighbouring cost, the most costly first, and of them the rank with the least so far gets the most costly one. What
    is waited for in all passes together is then less than the difference of the most and the least costly bin.
    """
    if ranks == 1:
        return bins
    order, shares, sums = sorted(range(len(bins)), key=lambda b: -costs[b]), [[] for _ in range(ranks)], [0.0] * ranks
    for first in range(0, len(order), ranks):
        emptiest = sorted(range(ranks), key=lambda rank: sums[rank])
        for rank, b in zip(emptiest, order[first : first + ranks], strict=True):
            shares[rank].append(bins[b])
            sums[rank] += costs[b]
    return [bin for share in shares for bin in share]
