"""Where the sampling copy of the weights lies, and what it holds; on a CPU, with the merging kernel's plain twin."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import config_dict

import lora
from config import LoraArgs
from model import sampling_copy
from model.captured import Room
from model.linear import adapter_of
from model.qwen2_5_vl import ModelConfig, Qwen2_5_VL
from model.sampling_copy import SamplingCopy, empty_pieces, merge_plain


def pool(*blocks):
    """A memory pool that would tell these blocks, (bytes, state), in one segment each."""
    segments = [{"blocks": [{"size": size, "state": state}]} for size, state in blocks]
    return SimpleNamespace(snapshot=lambda: segments)


def test_a_tensor_takes_the_smallest_free_block_that_fits():
    first, second = pool((4096, "inactive"), (8192, "active_allocated")), pool((2048, "inactive"), (512, "inactive"))
    room = Room([first, second])
    assert room.take(1500) is second  # of 2048, in steps of 512
    assert room.take(512) is second and room.take(512) is second  # the whole block of 512, and what was left
    assert room.take(4097) is None  # the block of 8192 is in use
    assert room.take(3000) is first and room.take(1024) is first
    assert room.take(1) is None
    assert Room([]).take(1) is None


def test_pieces_find_room_or_stand_in_one_block():
    shapes, asked, entered = [(3, 5), (40, 8), (3, 5), (7, 100)], [], []

    @contextmanager
    def inside():
        entered.append(asked[-1])
        yield

    def place(size):
        asked.append(size)
        return inside() if size <= 640 else None

    like = torch.zeros(1, dtype=torch.bfloat16)
    made = empty_pieces(shapes, like, place)
    assert [tuple(piece.shape) for piece in made] == shapes and {piece.dtype for piece in made} == {torch.bfloat16}
    assert asked == [1400, 640, 30, 30] and entered == [640, 30, 30]  # the largest first
    made = empty_pieces(shapes, like, None)
    assert [tuple(piece.shape) for piece in made] == shapes
    assert len({piece.untyped_storage().data_ptr() for piece in made}) == 1
    for number, piece in enumerate(made):  # none lies in another
        piece.fill_(number)
    assert [piece.unique().tolist() for piece in made] == [[0], [1], [2], [3]]
    assert all(piece.is_contiguous() and piece.data_ptr() % 16 == 0 for piece in made)
    alone = empty_pieces(shapes, like, lambda _: inside())
    assert all(piece.untyped_storage().nbytes() == 2 * piece.numel() for piece in alone)


@pytest.mark.parametrize("rank", [0, 4])
def test_it_holds_the_merged_weights(monkeypatch, rank):
    def merge(linears, adapters, outs, norms=None):
        for i, (linear, adapter, out) in enumerate(zip(linears, adapters, outs, strict=True)):
            out.copy_(merge_plain(linear.weight, adapter, norms and norms[i]))

    monkeypatch.setattr(sampling_copy, "merge", merge)
    model = Qwen2_5_VL.random(ModelConfig.from_dict(config_dict("tied")), "cpu", torch.float32, seed=0)
    if rank:
        lora.inject(model, LoraArgs(lora_rank=rank, num_lora_modules=9))  # some layers have none, or not all
        with torch.no_grad():
            for home in lora.adapter_blocks(model):
                home.block.adapters.normal_(0, 0.05)
    copy = SamplingCopy(model)
    for layer, made, bias in zip(model.model.layers, copy.layers, copy.biases, strict=True):
        a, m = layer.self_attn, layer.mlp
        assert torch.equal(bias, torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias]))
        first, second = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        wanted = {"qkv": ([a.q_proj, a.k_proj, a.v_proj], first), "o": ([a.o_proj], None)}
        wanted |= {"gate_up": ([m.gate_proj, m.up_proj], second), "down": ([m.down_proj], None)}
        assert list(made) == list(SamplingCopy.NAMES)
        for name, (linears, norm) in wanted.items():
            expected = torch.cat([merge_plain(p.weight, adapter_of(p), norm) for p in linears])
            assert torch.equal(made[name], expected), name
