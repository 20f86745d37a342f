"""How long a rank's computing stands still in the collectives of an update, measured where they happen.

    waiting = Waiting(device)
    with waiting.here():        around whatever meets the other ranks
    waiting.next_pass()         a forward and backward pass begins
    waiting.take()              -> seconds before the first pass and in each of them
    lost(rows)                  -> (of waiting for the slowest rank, of traffic)

All ranks leave a reduction together, and ZeRO-2 reduces in every backward pass, so each pass is as long as its slowest
rank's. That rank stands still only while numbers travel; whatever another stands still beyond that, it waits for it.
"""

import time
from contextlib import contextmanager

import torch


class Waiting:
    """The stops of one rank. On a GPU they are pairs of events on the stream that computes: the host goes on."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.passes = [[]]  # stops before the first pass, in the first, …: (when it stood still, when it went on)

    @contextmanager
    def here(self):
        began = self.now()
        yield
        self.passes[-1].append((began, self.now()))

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def next_pass(self) -> None:
        self.passes.append([])

    def take(self) -> list[float]:
        """Seconds stood still before the first pass and in each since the last call. A GPU must have come past them:
        it has once the host has waited for the update's gradient norm."""
        taken, self.passes = self.passes, [[]]
        return [sum(self.seconds(*stop) for stop in stops) for stops in taken]

    def seconds(self, began, ended) -> float:
        return began.elapsed_time(ended) / 1000 if self.cuda else ended - began


def lost(rows: list[list[float]]) -> tuple[float, float]:
    """rows: what each rank's take() gave -> (seconds that a rank waited for the slowest one, in the mean over ranks,
    seconds that even the slowest one stood still: traffic that no computing hid)."""
    idle = traffic = 0.0
    for stood in zip(*rows, strict=True):
        least = min(stood)
        idle, traffic = idle + sum(stood) / len(stood) - least, traffic + least
    return idle, traffic
