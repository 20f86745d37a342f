"""In which order samples are read, by whom, and how they are cut into micro-batches.

Loader      the micro-batches of every optimizer step, in an order of seed and epoch alone
examples    prompts for evaluation and inference, in their order
"""

import ctypes
import logging
import math
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import Example, Processor, TooLong, pack
from model import UserError
from records import shares

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STEPS_AHEAD = 2  # optimizer steps that are decoded ahead

log = logging.getLogger("data")


class Samples(torch.utils.data.Dataset):
    """Sample i as an Example, or (i, the UserError that says why there is none)."""

    def __init__(self, records: Sequence[dict], processor: Processor, answer: bool, control: str = "none"):
        self.records, self.processor, self.answer, self.control = records, processor, answer, control

    def __getitem__(self, i: int) -> Example | tuple[int, UserError]:
        try:
            example = self.processor.encode(self.records[i], self.answer, self.control)
        except UserError as error:  # an exception from a worker process would come with its traceback
            return i, error
        example.number = i
        return example

    def read(self, numbers: Iterable[int], workers: int, ahead: int) -> Iterator[Example | tuple[int, UserError]]:
        """The samples of these numbers, in their order; `ahead` of them are decoded in advance, if there are workers.

        Workers are forked. They touch nothing of CUDA, which is up by then, share the records' buffer, and start in
        milliseconds; a fork server would import torch and the training script in each of them, at every evaluation.
        """
        options = {}
        if workers:
            options = {"multiprocessing_context": "fork", "worker_init_fn": start_worker}
            options["prefetch_factor"] = max(1, math.ceil(ahead / workers))
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a clip in shared memory is an open file
        # a generator of its own: the loader draws from it, and torch's own random state must not depend on workers
        options |= {"generator": torch.Generator(), "collate_fn": lambda sample: sample}
        loader = DataLoader(self, batch_size=None, sampler=numbers, num_workers=workers, **options)
        for sample in loader:
            if isinstance(sample, Example):
                if sample.notes:
                    self.processor.warn_once(sample)
            yield sample


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


def examples(
    processor: Processor, records: Sequence[dict], numbers: Iterable[int], control: str = "none", workers: int = 0
) -> Iterator[Example | tuple[int, UserError]]:
    """Prompts that end where the answer begins, in the order of `numbers`; (number, why) for what cannot be read."""
    return Samples(records, processor, False, control).read(numbers, workers, ahead=64)


class Loader:
    """The batches of one rank.

    args: config.SFT's seed, per_device_train_batch_size, gradient_accumulation_steps, pack_tokens,
    dataloader_num_workers, max_skip_share. collate: list of Examples -> what is yielded (pack, or list).
    answer: as in Processor.encode. global_batch: samples a step, if not what args say; shares may differ by one.

    An epoch has each record as often as the weight of its file says: of a fraction, as many records as it makes, other
    ones in each epoch.
    A step's global batch is cut into one run of samples a rank, so that each opens only its own, and these into
    micro-batches of at most batch_size samples; or, with pack_tokens, into as few as hold them within that many tokens
    each. The update is the same. A sample that is broken is skipped, counted and named, and nothing takes its place:
    after or during iteration, `skipped` holds {name: reason} of this rank's samples that were left out.
    """

    def __init__(
        self, records: Sequence[dict], processor, args, *, rank: int = 0, world_size: int = 1, answer: bool = True,
        collate: Callable = pack, global_batch: int | None = None,
    ):  # fmt: skip
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.records, self.processor, self.collate, self.args = records, processor, collate, args
        self.total, self.pack_tokens = len(records), args.pack_tokens
        self.rank, self.world_size = rank, world_size
        self.samples = Samples(records, processor, answer)
        each = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.global_batch = global_batch or each * world_size
        files = ((weight, mine) for weight, mine in shares(records) if len(mine))
        self.files = [(max(1, round(weight * len(mine))), mine) for weight, mine in files]  # how many an epoch has
        self.epoch_size = sum(count for count, _ in self.files)
        self.steps_per_epoch = math.ceil(self.epoch_size / self.global_batch)
        self.skipped: dict[str, str] = {}
        self.too_long: set[str] = set()  # of them, those that are not broken, but longer than max_seq_length
        self.last = ""  # the last broken one, and why
        self.order = lru_cache(2)(self.order)  # the end of an epoch is read beside the start of the next

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps of this many passes over the data."""
        return max(1, math.ceil(self.steps_per_epoch * epochs - 1e-9))

    def iterate(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[list]:
        """The micro-batches of each step from start_step on, epoch after epoch, without end if stop_step is None."""
        steps = (lambda: count(start_step)) if stop_step is None else (lambda: range(start_step, stop_step))
        numbers = (i for step in steps() for part in self.share(step) for i in part)
        ahead = STEPS_AHEAD * math.ceil(self.global_batch / self.world_size)
        samples = self.samples.read(numbers, self.args.dataloader_num_workers, ahead)
        for step in steps():
            parts = [[next(samples) for _ in part] for part in self.share(step)]
            for part in parts:
                for sample in part:
                    if not isinstance(sample, Example):
                        self.skip(*sample)
            parts = [[sample for sample in part if isinstance(sample, Example)] for part in parts]
            self.last_parts = parts
            yield self.packs()

    def packs(self) -> list:
        """The micro-batches of the step that iterate() yielded last, within pack_tokens as it is now."""
        parts = self.last_parts
        if self.pack_tokens is not None:
            whole = [example for part in parts for example in part]
            bins = fill_bins([len(example) for example in whole], self.pack_tokens)
            parts = [[whole[i] for i in each] for each in bins]
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
        rng, numbers = np.random.default_rng((self.args.seed, epoch)), []
        for size, mine in self.files:
            numbers.append(np.tile(mine, size // len(mine)))
            if part := size % len(mine):
                numbers.append(rng.choice(mine, part, replace=False))
        return rng.permutation(np.concatenate(numbers))

    def skip(self, i: int, error: UserError) -> None:
        """Count and name a sample that is left out; UserError when too many are."""
        name = f"sample {i}"
        if name in self.skipped:
            return
        self.skipped[name] = str(error)
        log.warning("%s skipped: %s", name, error)
        if isinstance(error, TooLong):
            self.too_long.add(name)
        else:
            self.last = f"; the last: {name}: {error}"
        self.check_share(len(self.skipped) - len(self.too_long))  # other ranks may know of more: trainer.count_skipped
        if len(self.skipped) == len(self.records):
            raise UserError(f"all {len(self.records)} samples are left out; the last: {name}: {error}")

    def check_share(self, broken: int) -> None:
        """broken: samples of all ranks. UserError if it is more than max_skip_share of them."""
        total, most = self.total, self.args.max_skip_share
        if broken > most * total:
            raise UserError(f"{broken} of {total} samples are broken, max_skip_share is {most}{self.last}")

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
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while True:
        filled, used = [[] for _ in range(bins)], [0] * bins
        for i in order:
            room = [b for b in range(bins) if not used[b] or used[b] + lengths[i] <= budget]
            if not room:
                break
            b = min(room, key=used.__getitem__)
            filled[b].append(i)
            used[b] += lengths[i]
        else:
            return filled
        bins += 1
