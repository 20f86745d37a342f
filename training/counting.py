"""What a training step counts over its ranks, and when numbers or samples that are no good end a run.

    tally = Tally(run, engine)
    tally.start(answers, tokens, …)     the count that the loss is divided by
    update(…, tally.send)               everything else that the ranks tell each other: one reduction
    tally.read()                        what came of it, once the host has waited for the gradient norm anyway
"""

import math
import signal
import statistics
from dataclasses import dataclass

import torch

from model import UserError
from training import checkpoint
from training.engine import gather, global_max
from training.waiting import Waiting, lost

BAD_IN_A_ROW = 5  # steps without an update, because of numbers that are not finite, that end a run
SCALING_STEPS = 25  # as many with fp16, where loss scaling starts high and falls by such steps
SPIKE, SPIKE_STEPS = 10, 16  # a gradient norm so many times the median of so many updates before it is told
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # where ranks were sent different ones, the last of these counts


# One reduction a step


def on_device(run, values) -> torch.Tensor:
    """Numbers of the host, float64; a GPU gets them without a halt."""
    pinned = run.device.type == "cuda"
    return torch.tensor(values, dtype=torch.float64, pin_memory=pinned).to(run.device, non_blocking=True)


def signals_of(run) -> list[bool]:
    own = run.own_signal()
    return [number == own for number in SIGNALS]


def signal_told(counts) -> int:
    """The signal that any rank was sent, else 0, of the ranks' signals_of added up."""
    return int(max((number for number, count in zip(SIGNALS, counts, strict=True) if count), default=0))


class Reduction:
    """Numbers (float64, on the device) added up over the ranks and on their way to the host; none are sent alone."""

    def __init__(self, run, numbers: torch.Tensor):
        self.arrived, cuda = None, numbers.is_cuda
        if run.world > 1:
            torch.distributed.all_reduce(numbers)
        self.numbers = torch.empty(len(numbers), dtype=torch.float64, pin_memory=cuda).copy_(numbers, non_blocking=True)
        if cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[float]:
        """Waits until they are there."""
        if self.arrived:
            self.arrived.synchronize()
        return self.numbers.tolist()


@dataclass
class Found:
    """Sums over the ranks."""

    answers: int  # tokens that are trained
    tokens: int
    left_out: float  # samples so far; see Loader
    broken: float
    loss: float  # of -log p
    right: float  # answer tokens guessed right
    signal: int  # that any rank was sent, else 0
    idle: float | None  # share of the step before that ranks waited for the slowest, in the mean; None: one rank
    traffic: float | None  # share of it that even the slowest stood still for the others' numbers

    def mean(self, total: float) -> float | None:
        """Of an answer token; None where there is none."""
        return total / self.answers if self.answers else None


class Tally:
    """The numbers of an update that are summed over the ranks, none of them read before the gradient norm is.

    On a GPU they are copied to the host behind the backward passes, in front of AdamW's step, so that reading them
    waits for nothing. Alone, a rank sends nothing.
    """

    def __init__(self, run, engine):
        self.run, self.engine, self.cuda = run, engine, run.device.type == "cuda"
        if run.world > 1:
            engine.waiting = Waiting(run.device)

    def start(self, answers, tokens, seconds):
        """answers, tokens: of this rank's micro-batches; seconds: the step before took, 0: there was none.

        Sets `answers`, of all ranks: what the loss is divided by; a float32 tensor on the device where there are
        several. And `sums`: -log p of answer tokens, and how many were guessed right, for micro_loss to add to.
        """
        self.own, self.seconds, self.stood = (answers, tokens), seconds, []
        self.scaler = dict(vars(self.engine.optimizer.loss_scaler))
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.run.device)
        self.answers = answers
        if self.run.world > 1:
            self.stood = self.engine.waiting.take()
            everyone = self.on_device([answers])
            with self.engine.waiting.here():
                torch.distributed.all_reduce(everyone)
            self.answers = everyone[0].float()

    def on_device(self, values):
        return on_device(self.run, values)

    def send(self):
        """Give update() this: it enqueues the reduction, and where the host shall find it."""
        run = self.run
        rows = [0.0] * (len(self.stood) * run.world)  # of each rank, so that the sum over ranks holds all of them
        rows[run.rank * len(self.stood) : (run.rank + 1) * len(self.stood)] = self.stood
        told = self.on_device([*self.own, run.loader.left_out, run.loader.broken, *signals_of(run), *rows])
        told = torch.cat([self.sums, told])
        self.told = Reduction(run, told)

    def read(self):
        """-> Found. Call it after update()."""
        loss, right, answers, tokens, left_out, broken, *rest = self.told.read()
        number, rows = signal_told(rest[: len(SIGNALS)]), rest[len(SIGNALS) :]
        idle = traffic = None
        if self.run.world > 1 and self.seconds:
            size = len(self.stood)
            rows = [rows[rank * size : (rank + 1) * size] for rank in range(self.run.world)]
            idle, traffic = (seconds / self.seconds for seconds in lost(rows))
        if not answers:  # the update was skipped for want of them, not because the loss scale is too high
            vars(self.engine.optimizer.loss_scaler).update(self.scaler)
        return Found(int(answers), int(tokens), left_out, broken, loss, right, number, idle, traffic)


# Samples that are left out


def keep_count(run, loader):
    """What the loader leaves out is counted on from the run that is resumed."""
    run.loader = loader
    if run.source and "left_out" in run.state and run.state["config"].get("data_path") == run.cfg.data_path:
        loader.restore(run.state["left_out"])


def check_left_out(run, broken):
    """End the run where too much of the data is broken. broken: the ranks' loader.broken, summed; all find the same."""
    try:
        run.loader.check_share(broken)
    except UserError:
        if run.rank:
            raise SystemExit(2) from None  # one line is enough
        raise


# Numbers that are no good


def tell_spike(run, step, grad_norm):
    """A gradient many times as large as the last ones' is told; clipping makes its update no larger than others."""
    usual = statistics.median(run.norms) if len(run.norms) == SPIKE_STEPS else math.inf
    if grad_norm > SPIKE * usual:
        most = run.cfg.max_grad_norm
        done = f"clipped to {most:g}" if most else "not clipped, --max_grad_norm is 0"
        run.say(f"step {step}: SPIKE gradient norm {grad_norm:.3g}, {grad_norm / usual:.0f} times the usual: {done}")
    run.norms = [*run.norms, grad_norm][-SPIKE_STEPS:]


def check_numbers(run, step, loss, grad_norm, updated):
    """Tell a step whose update was skipped; UserError when several in a row were. loss None: nothing to train on."""
    if updated and loss is not None and math.isfinite(loss):
        run.bad = 0
        tell_spike(run, step, grad_norm)
        return
    run.bad += 1
    why = "no answer tokens in the batch" if loss is None else f"loss {loss}, gradient norm {grad_norm}"
    run.say(f"step {step}: {why}: no update ({run.bad} in a row)")
    limit = SCALING_STEPS if run.dtype == torch.float16 else BAD_IN_A_ROW
    if run.bad >= limit:
        last = checkpoint.checkpoints(run.folder)[-1:] or ["none"]
        text = f"{run.bad} steps in a row without an update ({why})"
        raise UserError(f"{text}; stopped, last good checkpoint: {last[0]}; lower --learning_rate or look at the data")


# Of a checkpoint


def what_was_counted(run):
    """What a resumed run goes on with: samples left out, gradient norms, what was too large for the memory."""
    limit = -global_max([-run.sample_limit], run.device)[0]
    memory = {"halved": int(run.sum(run.halved)[0]), "limit": None if limit == math.inf else limit}
    return {"left_out": gather(run.loader.state()), "norms": run.norms, "memory": memory}
