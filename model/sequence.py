"""Sequence parallelism: N ranks share every packed batch, after DeepSpeed-Ulysses (Jacobs et al., 2023; arXiv
2309.14509). So a clip may be longer than one card holds.

    embedding, norms, products, loss     a rank has a run of the tokens and all H heads   (T / N, H, D)
    attention                            all of the tokens, H / N of the heads            (T, H / N, D)
    vision tower                         whole grid steps, for no block looks across them

Between them rows change places by all-to-all, forwards and, the other way round, backwards: whatever a rank computes is
what one rank alone would compute for these rows or heads, so the sum of the ranks' gradients is its gradient. Every
rank makes the same exchanges in the same order, also one whose run holds no picture, no answer, or no token at all.

    group = join(N)                                  of the N neighbouring ranks this one belongs to
    packed = share(packed, group, config)            this rank's part, made where the batch is packed
    model(packed)                                    the part's hidden states
"""

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from model import UserError
from model.attention import Segments, attend


@dataclass(frozen=True, eq=False)
class Group:
    """The ranks that share batches."""

    size: int  # N
    rank: int  # among them
    handle: object  # torch's process group


def join(size: int) -> Group | None:
    """The group of this rank among neighbours, None for groups of one. Every rank of the run must call it.

    UserError where the ranks cannot be parted so."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if world % size:
        possible = [n for n in range(1, world + 1) if world % n == 0]
        raise UserError(f"--sequence_parallel: found {size} with {world} ranks, expected one of {possible}")
    if size == 1:
        return None
    handles = [torch.distributed.new_group(list(range(i, i + size))) for i in range(0, world, size)]
    return Group(size, rank % size, handles[rank // size])


def check_heads(config, size: int) -> None:
    """UserError where the heads cannot be dealt to so many ranks."""
    H = config.num_attention_heads
    if H % size:
        possible = [n for n in range(1, H + 1) if H % n == 0]
        raise UserError(f"--sequence_parallel: found {size}, this model's {H} heads can be dealt to {possible} ranks")


def kv_heads(H: int, K: int, size: int) -> int:
    """Key and value heads after the fewest repetitions that give each rank its own, as many query heads to each."""
    return H // math.gcd(H // size, H // K)


# -- Who has what


@dataclass(eq=False)
class Share:
    """What one rank's part of a batch has to do with the others'."""

    group: Group
    lengths: list[int]  # tokens of each rank's run; their sum is T
    sends: list[int]  # vision tokens made here, by the rank in whose run they stand
    receives: list[int]  # those that stand here, by the rank that makes them
    pictures: bool  # whether the batch has any
    mark: int  # of the whole batch's tokens: equal on all ranks of the group

    def vision(self, made: Tensor) -> Tensor:
        """Vision tokens from where they were made to where they stand, both in packed order: (M', C) -> (M'', C)"""
        return Exchange.apply(made, self.sends, self.receives, self.group)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """`attention.attend` of the whole batch. q: (T', H, D), k, v: (T', K, D), this rank's run. -> (T', H, D)"""
        T, N = len(q), self.group.size
        H, D, K = *q.shape[1:], k.shape[1]
        h, own = H // N, kv_heads(H, K, N) // N
        k, v = (x[:, :, None].expand(-1, -1, own * N // K, -1).reshape(T, N, own, D) for x in (k, v))
        qkv = torch.cat([x.transpose(0, 1) for x in (q.view(T, N, h, D), k, v)], dim=2)  # (N, T', h + 2 own, D)
        here = [T] * N
        qkv = Exchange.apply(qkv.flatten(0, 1), here, self.lengths, self.group)  # (T, h + 2 own, D)
        out = attend(*qkv.split([h, own, own], dim=1), segments)  # (T, h, D)
        out = Exchange.apply(out, self.lengths, here, self.group)  # (N T', h, D)
        return out.view(N, T, h, D).transpose(0, 1).reshape(T, H, D)


def share(packed, group: Group, config):
    """This rank's part of a Packed: its run of the tokens, the patches that it encodes, who attends to whom in all."""
    ids, rank = packed.input_ids, group.rank
    lengths = [len(ids) // group.size + (r < len(ids) % group.size) for r in range(group.size)]
    cuts = [0, *accumulate(lengths)]
    run = slice(*cuts[rank : rank + 2])
    is_pad = (ids == config.image_token_id) | (ids == config.video_token_id)
    stand = [int(is_pad[:cut].sum()) for cut in cuts]  # vision tokens before each rank's run
    grids = deal(packed.grid_thw, group.size)
    sizes = [sum(t * h * w for t, h, w in own) for own in grids]
    made = [n // config.vision.spatial_merge_size**2 for n in accumulate(sizes, initial=0)]
    assert made[-1] == stand[-1], f"{stand[-1]} image and video pads, but {made[-1]} vision tokens"
    sends = [overlap(made[rank : rank + 2], there) for there in pairwise(stand)]
    receives = [overlap(there, stand[rank : rank + 2]) for there in pairwise(made)]
    whole = packed.patches
    return replace(
        packed,
        input_ids=ids[run],
        position_ids=packed.position_ids[:, run],
        targets=None if packed.targets is None else packed.targets[run],
        patches=whole.split(sizes)[rank] if sizes[rank] else None,
        grid_thw=grids[rank],
        share=Share(group, lengths, sends, receives, whole is not None, zlib.crc32(ids.numpy())),
    )


def deal(grid_thw: list[tuple[int, int, int]], ranks: int) -> list[list[tuple[int, int, int]]]:
    """The grid steps of clips in runs of nearly as many patches: each rank's grids. A step goes where its middle is."""
    total, before = sum(t * h * w for t, h, w in grid_thw), 0
    dealt = [[] for _ in range(ranks)]
    for t, h, w in grid_thw:
        owners = [(2 * before + (2 * i + 1) * h * w) * ranks // (2 * total) for i in range(t)]
        for rank, own in enumerate(dealt):
            if count := owners.count(rank):
                own.append((count, h, w))
        before += t * h * w
    return dealt


def overlap(one, other) -> int:
    """Numbers that are in both ranges (first, end)."""
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def disagreement(parts: Iterable, group: Group | None) -> int:
    """A number whose sum over all ranks is 0 where the ranks of each group share the same batches."""
    if group is None:
        return 0
    mark = zlib.crc32(repr([part.share.mark for part in parts]).encode())
    return mark * (group.size - 1) if group.rank == 0 else -mark


# -- Exchanges


class Exchange(torch.autograd.Function):
    """Rows to the ranks of a group, sends[s] of them to rank s in order; what comes is in the order of the ranks."""

    @staticmethod
    def forward(ctx, x, sends, receives, group):
        ctx.sizes = receives, sends, group
        return exchange(x, sends, receives, group)

    @staticmethod
    def backward(ctx, grad):
        return exchange(grad, *ctx.sizes), None, None, None


def exchange(x: Tensor, sends: list[int], receives: list[int], group: Group) -> Tensor:
    out = x.new_empty(sum(receives), *x.shape[1:])
    torch.distributed.all_to_all_single(out, x.contiguous(), receives, sends, group=group.handle)
    return out
