"""Frozen weights in parts: each rank of a machine keeps 1/n of every block; a block is whole only while it computes.

    rank 0   | block 0 | block 1 | …      its n-th of each, one tensor: `part`, on its card or (offloaded) on the host
    rank 1   | block 0 | block 1 | …
    buffers  block i, which computes      block i + 1, on its way

ZeRO's third stage (Rajbhandari et al., 2020; arXiv 1910.02054) for weights without gradients. They never change, so
nobody has to be asked for them: a rank copies what it needs out of the others' memory when it needs it, by CUDA IPC
from card to card, or out of shared host memory. There is no collective to meet in: ranks sample, evaluate and train on
as many batches as each has, and nothing can be out of step with DeepSpeed's reductions.

Parted are the decoder layers and the vision blocks: what is recomputed in the backward pass. Embedding, head, merger
and patch embedding stay whole on every rank: 14 % of the 7B's weights, 5 % of the 32B's, 3.5 % of the 72B's.

A block's weights must lie still from its (re)computation to the end of its backward pass. They do: the next block to be
fetched in a backward pass is the one before it, whose gradient depends on all of its products.
"""

import math
import os
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import UserError
from model.linear import aligned

ALIGN = 64  # numbers: weights and parts begin at multiples of 128 bytes in bf16, 256 in fp32
BUFFERS = 2  # blocks that are whole at a time: one computes, one is on its way


@dataclass(frozen=True)
class Share:
    """Which part of the weights is this process's, and where it rests."""

    ranks: tuple[int, ...] = (0,)  # of this machine
    mine: int = 0  # which of them this is
    offload: bool = False  # the part rests in host memory

    @classmethod
    def here(cls, offload: bool = False) -> "Share":
        """Among the ranks of this machine. Every rank must call it."""
        world = torch.distributed.get_world_size()
        if world == 1:
            return cls(offload=offload)
        boot = Path("/proc/sys/kernel/random/boot_id")
        hosts = [None] * world
        torch.distributed.all_gather_object(hosts, (socket.gethostname(), boot.read_text() if boot.exists() else ""))
        own = torch.distributed.get_rank()
        ranks = tuple(rank for rank, host in enumerate(hosts) if host == hosts[own])
        return cls(ranks, ranks.index(own), offload)


class Spot(NamedTuple):
    """Where a weight lies within its block's numbers."""

    shape: tuple[int, ...]
    room: tuple[int, ...]  # shape and the zeros behind it that products on a GPU want (linear.padded)
    start: int


def blocks_of(model) -> dict[str, nn.Module]:
    """{name: block} of what can be parted, in the order of a forward pass."""
    stacks = {"visual.blocks": model.visual.blocks, "model.layers": model.model.layers}
    return {f"{stack}.{i}": block for stack, blocks in stacks.items() for i, block in enumerate(blocks)}


def room_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if "mlp.gate_proj" in name or "mlp.up_proj" in name:
        return (aligned(shape[0]), *shape[1:])
    return (shape[0], aligned(shape[1])) if "mlp.down_proj.weight" in name else shape


def layout(block, pad: bool) -> tuple[dict[str, Spot], int]:
    """({name: Spot} of the block's weights, numbers in all), by shapes alone. pad: as a GPU's products want them."""
    spots, start = {}, 0
    for name, parameter in block.named_parameters():
        if name != "adapters":
            shape = tuple(parameter.shape)
            spots[name] = Spot(shape, room_of(name, shape) if pad else shape, start)
            start += -(-math.prod(spots[name].room) // ALIGN) * ALIGN
    return spots, start


def part_size(numbers: int, ranks: int) -> int:
    """Numbers of a block that each rank keeps."""
    return -(-numbers // (ranks * ALIGN)) * ALIGN


def counts(model, ranks: int, pad: bool) -> tuple[int, int, int]:
    """(weights that are parted, numbers of a rank's part, numbers of the buffers), by shapes alone."""
    made = [layout(block, pad) for block in blocks_of(model).values()]
    sizes = [part_size(numbers, ranks) for _, numbers in made]
    parted = sum(math.prod(spot.shape) for spots, _ in made for spot in spots.values())
    return parted, sum(sizes), BUFFERS * ranks * max(sizes)


@dataclass(eq=False)
class Block:
    module: nn.Module
    spots: dict[str, Spot]
    parameters: list[nn.Parameter]
    first: int  # of its numbers in every rank's part
    size: int  # of them in a part


@dataclass(eq=False)
class Buffer:
    flat: Tensor
    held: int | None = None  # number of the block whose weights are here, or on their way
    ready: object = None  # CUDA events: the weights have arrived
    free: object = None  # what used them is over


class Partition:
    """The parted weights of a model, and whatever brings them together.

    model: on `meta`. It is left with parameters that have shape, dtype and device but no memory: reading one while its
    block is not there gives NaN. `take` every weight (of `names`), then `open`.
    """

    def __init__(self, model, device, dtype: torch.dtype, share: Share):
        self.model, self.device, self.dtype, self.share = model, torch.device(device), dtype, share
        self.cuda, n = self.device.type == "cuda", len(share.ranks)
        nothing = torch.full((1,), math.nan, device=self.device, dtype=dtype)
        self.blocks, self.names, self.number, first = [], {}, {}, 0
        for prefix, module in blocks_of(model).items():
            spots, numbers = layout(module, self.cuda)
            parameters = []
            for name, spot in spots.items():
                self.names[f"{prefix}.{name}"] = len(self.blocks), spot
                parameters.append(self.replace(module, name, nothing.expand(spot.shape), spot.room))
            self.number[module] = len(self.blocks)
            self.blocks.append(Block(module, spots, parameters, first, part_size(numbers, n)))
            first += self.blocks[-1].size
            module.register_forward_pre_hook(lambda module, _: self.fetch(module))
        self.nothing, self.parted = nothing, {p for block in self.blocks for p in block.parameters}
        self.memory = None  # the file behind the part, where it is shared as one
        self.part = self.rest(first)
        self.parts = [self.part]  # of all ranks of the machine, once they are open
        self.current = self.before = None  # numbers of the block that computes, and of the one that did
        self.followed = {}  # (block, block after it) -> what came next the last time
        self.waits = None  # a list: pairs of events around each time that computing had to wait
        self.brought = 0  # bytes

    @staticmethod
    def replace(module, name: str, data: Tensor, room) -> nn.Parameter:
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(data, requires_grad=False)
        parameter.room = room
        module.get_submodule(owner)._parameters[leaf] = parameter
        return parameter

    # Loading

    def rest(self, numbers: int) -> Tensor:
        """Zeros for a part: on the card; or in host memory that other processes can read, by /proc and a file without
        a name, which is gone when the last of them is."""
        if self.cuda and not self.share.offload:
            return torch.zeros(numbers, device=self.device, dtype=self.dtype)
        if not self.cuda and len(self.share.ranks) == 1:
            return torch.zeros(numbers, dtype=self.dtype)
        self.memory = os.memfd_create("weights")
        os.ftruncate(self.memory, numbers * self.dtype.itemsize)
        return self.mapped(os.getpid(), self.memory, numbers)

    def mapped(self, process: int, file: int, numbers: int) -> Tensor:
        part = torch.from_file(f"/proc/{process}/fd/{file}", shared=True, size=numbers, dtype=self.dtype)
        if self.cuda:  # only what is pinned is copied while the card computes
            error = torch.cuda.cudart().cudaHostRegister(part.data_ptr(), part.nbytes, 0)
            if int(error):
                raise UserError(f"--offload_weights: {part.nbytes >> 30} GiB of host memory cannot be pinned ({error})")
        return part

    @torch.no_grad()
    def take(self, name: str, source) -> None:
        """Keep this rank's numbers of one weight. source[a:b]: its rows, of a tensor or of a safetensors slice."""
        number, spot = self.names[name]
        block, step = self.blocks[number], math.prod(spot.room[1:])
        low = self.share.mine * block.size  # this part of the block is [low, high)
        high = low + block.size
        first, last = max(0, (low - spot.start) // step), min(spot.shape[0], -(-(high - spot.start) // step))
        if first >= last:
            return
        rows = source[first:last].to(self.part.device, self.dtype)
        wide = rows if spot.room[1:] == spot.shape[1:] else F.pad(rows, (0, spot.room[1] - spot.shape[1]))
        begin = spot.start + first * step
        a, b = max(low, begin), min(high, begin + wide.numel())
        self.part[block.first + a - low : block.first + b - low] = wide.reshape(-1)[a - begin : b - begin]

    def open(self) -> None:
        """Make the others' parts readable, and the buffers. Every rank must call it, with all its weights taken."""
        size = len(self.share.ranks) * max(block.size for block in self.blocks)
        events = (lambda: {name: torch.cuda.Event() for name in ("ready", "free")}) if self.cuda else dict
        like = {"device": self.device, "dtype": self.dtype}
        self.buffers = [Buffer(torch.empty(size, **like), **events()) for _ in range(BUFFERS)]
        self.views = [[self.cut(block, buffer.flat) for buffer in self.buffers] for block in self.blocks]
        if self.cuda:
            self.stream = torch.cuda.Stream(self.device)
            torch.cuda.synchronize(self.device)  # parts are written, buffers nobody else's: no stream need wait
        if len(self.share.ranks) > 1:
            self.parts = self.exchange()

    def exchange(self) -> list[Tensor]:
        """The parts of all ranks of this machine, this one's as it is."""
        ours = (os.getpid(), self.memory) if self.memory is not None else self.part.untyped_storage()._share_cuda_()
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, ours)  # all have taken their weights
        parts = []
        for number, rank in enumerate(self.share.ranks):
            mine = number == self.share.mine
            parts.append(self.part if mine else self.opened(rank, everyone[rank]))
        torch.distributed.barrier()  # all have opened them
        if self.memory is not None:
            os.close(self.memory)
        return parts

    def opened(self, rank: int, handle) -> Tensor:
        """Another rank's part."""
        if self.memory is not None:
            return self.mapped(*handle, len(self.part))
        _, *handle, _event, _wait = handle  # all of it was written before the handle was sent: no event to wait for
        try:  # opened on this card, which reads over NVLink: on its own it would take a context there
            storage = torch.UntypedStorage._new_shared_cuda(self.device.index, *handle, _event, False)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            told = f"this card cannot read the memory of rank {rank}'s ({reason})"
            raise UserError(f"--partition_weights: {told}; --offload_weights True needs only host memory") from None
        return torch.empty(0, device=self.device, dtype=self.dtype).set_(storage, 0, (len(self.part),))

    def cut(self, block: Block, flat: Tensor) -> list[Tensor]:
        strides = [(*spot.room[1:], 1) for spot in block.spots.values()]
        return [flat.as_strided(s.shape, stride, s.start) for s, stride in zip(block.spots.values(), strides)]

    def not_finite(self) -> list[str]:
        """Names of the blocks of which this rank's part holds a NaN or an Inf."""
        parts = self.part.split([block.size for block in self.blocks])
        largest = torch._foreach_norm(list(parts), torch.inf)
        names = blocks_of(self.model)
        return [name for name, fine in zip(names, torch.stack(largest).isfinite().tolist()) if not fine]

    # While it runs

    @torch.no_grad()
    def fetch(self, module) -> None:
        """Put a block's weights in place, and send for those of the block that will probably follow. Called before each
        of its passes; what was fetched before may be gone from now on."""
        now, before = self.number[module], self.current
        self.followed[self.before, before] = now
        if now != before:
            self.leave(before)
            buffer = self.find(now) or self.send_for(now)
            self.wait(buffer)
            for parameter, view in zip(self.blocks[now].parameters, self.views[now][self.buffers.index(buffer)]):
                parameter.data = view
        self.before, self.current = before, now
        guess = self.followed.get((before, now), self.onwards(before, now))
        if self.cuda and guess is not None and not self.find(guess):
            self.send_for(guess)

    def onwards(self, before: int | None, now: int) -> int | None:
        """The next block in the direction of the last two; after the same block twice, a backward pass begins."""
        guess = now + 1 if before is None else now - 1 if before == now else now + (1 if now > before else -1)
        return guess if 0 <= guess < len(self.blocks) else None

    def find(self, number: int) -> Buffer | None:
        return next((buffer for buffer in self.buffers if buffer.held == number), None)

    def leave(self, number: int | None) -> None:
        """All that uses a block's weights has been launched: when it is over, their buffer may be written."""
        if self.cuda and number is not None:
            self.find(number).free.record()

    def send_for(self, number: int) -> Buffer:
        """Copy a block's weights into the buffer that the current block does not lie in."""
        buffer = next(buffer for buffer in self.buffers if buffer.held is None or buffer.held != self.current)
        if buffer.held is not None:
            for parameter in self.blocks[buffer.held].parameters:
                parameter.data = self.nothing.expand(parameter.shape)
        buffer.held, block = number, self.blocks[number]
        if not self.cuda:
            self.copy(block, buffer.flat)
            return buffer
        self.stream.wait_event(buffer.free)
        with torch.cuda.stream(self.stream):
            self.copy(block, buffer.flat)
        buffer.ready.record(self.stream)
        return buffer

    def copy(self, block: Block, flat: Tensor) -> None:
        """Every rank's part of a block, its own first and then round, so that not all read from the same one."""
        n = len(self.parts)
        self.brought += n * block.size * self.dtype.itemsize
        for i in range(self.share.mine, self.share.mine + n):
            source = self.parts[i % n].narrow(0, block.first, block.size)
            flat.narrow(0, i % n * block.size, block.size).copy_(source, non_blocking=True)

    def wait(self, buffer: Buffer) -> None:
        """Work launched from now on comes after the arrival of the buffer's weights."""
        if not self.cuda:
            return
        if self.waits is None:
            buffer.ready.wait()
            return
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        buffer.ready.wait()
        pair[1].record()
        self.waits.append(pair)

    def waited(self) -> float:
        """Seconds that the card waited for weights since this was asked the last time; from then on it is measured."""
        if not self.cuda:
            return 0.0
        torch.cuda.synchronize(self.device)
        pairs, self.waits = self.waits or [], []
        return sum(before.elapsed_time(after) for before, after in pairs) / 1e3

    def moved(self) -> int:
        """Bytes that came into the buffers since this was asked the last time."""
        found, self.brought = self.brought, 0
        return found

    @contextmanager
    def hidden(self):
        """Inside, the model has no parted parameters: DeepSpeed would send each of them to all ranks."""
        found = [(module._parameters, leaf, p) for module in self.model.modules()
                 for leaf, p in module._parameters.items() if p in self.parted]  # fmt: skip
        for parameters, leaf, _ in found:
            parameters[leaf] = None
        try:
            yield
        finally:
            for parameters, leaf, parameter in found:
                parameters[leaf] = parameter
