"""What the processes of a run exchange; every rank must call each of these, in the same order. One gets its own."""

import torch
import torch.distributed as dist

from model import UserError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def bucket_size(world: int) -> int:
    """Gradients that are added up at a time at most. 100 MB of fp32 fill a link between ranks; alone, fewer buckets are
    less work for the host: 62 ms a step of S, 67 with five."""
    return 100_000_000 if world == 1 else 25_000_000


def gather(value) -> list:
    """[value of each rank], on every rank; anything that can be pickled."""
    every = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(every, value)
    return every


def gather_numbers(*values) -> torch.Tensor:
    """Numbers of every rank, (world, len(values)) float64 on the host."""
    own = torch.tensor([values], dtype=torch.float64)
    if world_size() == 1:
        return own
    own = own.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    every = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(every, own)
    return torch.cat(every).cpu()


def add(*values) -> list[float]:
    """Each number summed over the ranks."""
    return gather_numbers(*values).sum(0).tolist()


def raise_together(message: str | None) -> None:
    """Where any rank has a message all end with exit code 2, and the first such rank says why."""
    senders = [number for number, each in enumerate(gather(message)) if each]
    if senders:
        raise UserError(message) if rank() == senders[0] else SystemExit(2)
