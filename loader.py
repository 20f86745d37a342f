"""In which order samples are read, by which processes, and how they are cut into micro-batches.

Samples   records by number -> Examples, decoded in worker processes
Loader    the micro-batches of every optimizer step, in an order of seed and epoch alone
"""

import ctypes
import logging
import math
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import Example, Processor, TooLong, check_share, pack
from model import UserError
from records import sample_name

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STEPS_AHEAD = 2  # optimizer steps that are decoded ahead

log = logging.getLogger("data")


class Samples(Dataset):
    """Sample i as an Example, or (i, the UserError that says why there is none). answer: with it, for training; else
    the prompt alone."""

    def __init__(self, records: Sequence[dict], processor: Processor, answer: bool, control: str = "none"):
        self.records, self.processor, self.answer, self.control = records, processor, answer, control

    def __getitem__(self, i: int) -> Example | tuple[int, UserError]:
        try:
            example = self.processor.encode(self.records[i], self.answer, self.control)
        except UserError as error:  # an exception from a worker process would come with its traceback
            return i, type(error)(f"{sample_name(self.records, i)}: {error}")
        example.number = i
        return example

    def read(self, numbers: Iterable[int], workers: int, ahead: int = 64) -> Iterator[Example | tuple[int, UserError]]:
        """The samples of these numbers, in their order; `ahead` of them are decoded in advance, if there are workers.

        Workers are forked: they touch nothing of CUDA, share the records' buffer, and start in milliseconds.
        """
        # a generator of its own: the loader draws from it, and torch's own random state must not depend on workers
        options = {"generator": torch.Generator(), "collate_fn": lambda sample: sample}
        if workers:
            options |= {"multiprocessing_context": "fork", "worker_init_fn": start_worker}
            options["prefetch_factor"] = max(1, math.ceil(ahead / workers))
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a clip in shared memory is an open file
        yield from DataLoader(self, batch_size=None, sampler=numbers, num_workers=workers, **options)


def start_worker(_) -> None:
    """In a new worker: Ctrl-C and SIGTERM are for the training process, which saves and then ends its workers. Of all
    who send SIGTERM, only it is obeyed; and where it is killed, they go with it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # torch's own watch waits for a pipe that nobody reads
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()


class Loader:
    """The batches of one rank.

    args: a config.SFT. collate: list of Examples -> what is yielded. global_batch: samples a step, if not what
    args say. A step's global batch is cut into one run of samples a rank, so that each opens only its own, and these
    into micro-batches; or, with pack_tokens, into as few as hold them within that many tokens each. The update is the
    same. A sample that is broken is skipped, counted and named, and nothing takes its place.
    """

    def __init__(
        self, records: Sequence[dict], processor, args, *, rank: int = 0, world_size: int = 1, answer: bool = True,
        collate: Callable = pack, global_batch: int | None = None,
    ):  # fmt: skip
        self.records, self.collate, self.args, self.pack_tokens = records, collate, args, args.pack_tokens
        self.rank, self.world_size = rank, world_size
        self.samples = Samples(records, processor, answer)
        each = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.global_batch = global_batch or each * world_size
        file, weights = np.asarray(getattr(records, "file", [0] * len(records))), getattr(records, "weights", [1.0])
        files = [(weight, np.flatnonzero(file == i)) for i, weight in enumerate(weights)]
        # of each file: how many of its records an epoch has; their numbers
        self.files = [(max(1, round(weight * len(numbers))), numbers) for weight, numbers in files if len(numbers)]
        self.epoch_size = sum(size for size, _ in self.files)
        self.steps_per_epoch = math.ceil(self.epoch_size / self.global_batch)
        self.skipped: dict[str, str] = {}  # {number: reason} of this rank's samples that were left out
        self.too_long: set[str] = set()  # of them, those that are not broken, but longer than max_seq_length
        self.order = lru_cache(2)(self.order)  # the end of an epoch is read beside the start of the next

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps of this many passes over the data."""
        return max(1, math.ceil(self.steps_per_epoch * epochs - 1e-9))

    def iterate(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[list]:
        """The micro-batches of each step from start_step on, epoch after epoch, without end if stop_step is None."""
        steps = range(start_step, sys.maxsize if stop_step is None else stop_step)
        numbers = (i for step in steps for part in self.share(step) for i in part)
        ahead = STEPS_AHEAD * math.ceil(self.global_batch / self.world_size)
        samples = self.samples.read(numbers, self.args.dataloader_num_workers, ahead)
        for step in steps:
            self.last_parts = []
            for part in self.share(step):
                part = [next(samples) for _ in part]
                self.last_parts.append([sample for sample in part if isinstance(sample, Example)])
                for sample in part:
                    if not isinstance(sample, Example):
                        self.skip(*sample)
            yield self.packs()

    def packs(self) -> list:
        """The micro-batches of the step that iterate() yielded last, within pack_tokens as it is now."""
        parts = self.last_parts
        if self.pack_tokens is not None:
            whole = [example for part in parts for example in part]
            parts = [[whole[i] for i in each] for each in fill_bins(list(map(len, whole)), self.pack_tokens)]
        return [self.collate(part) for part in parts]

    def share(self, step: int) -> list[list[int]]:
        """Numbers of this rank's samples of a step, by micro-batch; with pack_tokens in one list."""
        epoch, k = divmod(step, self.steps_per_epoch)
        batch = self.order(epoch)[k * self.global_batch : (k + 1) * self.global_batch]  # an epoch's last may be smaller
        parts = self.args.gradient_accumulation_steps if self.args.pack_tokens is None else 1
        every = np.array_split(batch, parts * self.world_size)
        return [part.tolist() for part in every[self.rank * parts : (self.rank + 1) * parts]]

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the records of an epoch, a pure function of seed and epoch."""
        rng, order = np.random.default_rng((self.args.seed, epoch)), []
        for size, numbers in self.files:
            order.append(np.tile(numbers, size // len(numbers)))
            if part := size % len(numbers):
                order.append(rng.choice(numbers, part, replace=False))
        return rng.permutation(np.concatenate(order))

    def skip(self, i: int, error: UserError) -> None:
        """Count and name a sample that is left out; UserError when too many are."""
        key = str(i)
        if key in self.skipped:
            return
        self.skipped[key] = str(error)
        log.warning("skipped: %s", error)
        if isinstance(error, TooLong):
            self.too_long.add(key)
        self.check_share(len(self.skipped) - len(self.too_long))  # other ranks may know of more: trainer.count_skipped
        if len(self.skipped) == len(self.records):
            raise UserError(f"all {len(self.records)} samples are left out; the last: {error}")

    def check_share(self, broken: int) -> None:
        """broken: samples of all ranks. UserError if it is more than max_skip_share of them."""
        check_share(broken, self.records, self.args, next(reversed(self.skipped.values()), "on another rank"))

    def state(self) -> dict:
        """What a resumed run needs to go on counting: JSON, of this rank."""
        return {"skipped": self.skipped, "too_long": sorted(self.too_long)}

    def restore(self, ranks: list[dict]) -> None:
        """Go on counting from the states of all ranks of the run that is resumed, which may have been more or fewer."""
        for state in ranks:
            self.skipped |= state["skipped"]
            self.too_long |= set(state["too_long"])


def fill_bins(lengths: list[int], budget: int) -> list[list[int]]:
    """Numbers of the samples of each micro-batch: about as few as hold `budget` tokens at most each; the longest first,
    each into the emptiest that has room. A sample longer than the budget stands alone."""
    bins = max(1, math.ceil(sum(min(length, budget) for length in lengths) / budget))
    while True:
        filled, used = [[] for _ in range(bins)], [0] * bins
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            room = [b for b in range(bins) if not used[b] or used[b] + lengths[i] <= budget]
            if not room:
                break
            b = min(room, key=used.__getitem__)
            filled[b].append(i)
            used[b] += lengths[i]
        else:
            return filled
        bins += 1
