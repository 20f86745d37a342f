"""Passes as CUDA graphs against the same passes without; and, on any machine, the padding that they need."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import config_dict

import lora
from config import LoraArgs
from model.attention import Segments, attend_reference
from model.captured import GRANULE, Captures, Plan, Replay
from model.loss import target_logprobs
from model.qwen2_5_vl import ModelConfig, Packed, Qwen2_5_VL
from model.rope import mrope_position_ids

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("segments", [
    Segments.causal([5, 90, 3]), Segments.full([64, 64, 16, 48]), Segments.causal([256]),
    Segments.shared_prompt([9, 20], [[4, 7, 1], [30]]),
], ids=["causal", "windows", "full", "shared"])  # fmt: skip
def test_padding_changes_nothing(segments):
    """The padded plan attends as the plain one, and its padding takes and gives no gradient."""
    T, rows = segments.num_tokens, GRANULE
    plan = Plan(segments, rows)
    static = plan.static("cpu")
    assert sum(static.q_lengths) == rows
    assert max(static.q_lengths) <= static.max_q and max(static.k_lengths) <= static.max_k
    plan.fill(static)
    ends = torch.tensor([0, *static.q_lengths]).cumsum(0)
    assert static.cu_q[: len(ends)].tolist() == ends.tolist() and set(static.cu_q[len(ends) :].tolist()) <= {rows}
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(rows, 2, 8, generator=generator).requires_grad_() for _ in range(3)]
    narrow = [x[:T].detach().clone().requires_grad_() for x in wide]
    found, expected = attend_reference(*wide, static), attend_reference(*narrow, segments)
    assert torch.equal(found[:T], expected)
    weight = torch.randn(expected.shape, generator=generator)
    (found[:T] * weight).sum().backward()
    (expected * weight).sum().backward()
    for x, y in zip(wide, narrow):
        assert torch.allclose(x.grad[:T], y.grad, atol=1e-6) and x.grad[T:].abs().sum() == 0


def test_near_sizes_share_a_graph():
    keys = {Plan(Segments.causal([a, 130 - a]), 256).key for a in (20, 40, 64)}
    assert len(keys) == 1 and Plan(Segments.causal([130]), 256).key not in keys


CLIPS = [[(2, 4, 4)], [(2, 8, 12)], [(4, 4, 8), (2, 4, 4)]]


def batch(config, text, grids, seed):
    """Packed text and clips, the last `text` tokens trained."""
    generator = torch.Generator().manual_seed(seed)
    words = lambda n: torch.randint(0, 100, (n,), generator=generator).tolist()
    ids, lengths, positions = [], [], []
    for grid in grids:
        pads = grid[0] * grid[1] * grid[2] // 4
        one = [*words(6), config.vision_start_token_id, *[config.video_token_id] * pads, config.vision_end_token_id]
        one += words(text)
        positions.append(torch.from_numpy(mrope_position_ids(one, [grid], [1.0], config)))
        ids, lengths = ids + one, [*lengths, len(one)]
    patches = torch.randint(0, 256, (sum(t * h * w for t, h, w in grids), 1176), generator=generator, dtype=torch.uint8)
    return Packed(torch.tensor(ids), torch.cat(positions, 1), Segments.causal(lengths), patches, grids)


def gradients(model, packed):
    """Loss and gradients of what is trained."""
    model.zero_grad()
    hidden = model(packed)
    targets = packed.input_ids.roll(-1)
    logprobs, _, _ = target_logprobs(hidden, model.head_weight, targets)
    loss = -(logprobs * torch.linspace(0, 1, len(targets), device=logprobs.device)).sum()
    loss.backward()
    return [loss.detach().clone()] + [p.grad.clone() for p in model.parameters() if p.requires_grad]


def off(found, right):
    return max(float((a - b).float().norm() / (b.float().norm() + 1e-6)) for a, b in zip(found, right))


def test_a_replays_gradients_are_not_what_the_next_one_writes_over():
    """Without copies of ours: autograd makes one, since the buffer has another owner."""
    buffer, p = torch.zeros(3), torch.nn.Parameter(torch.zeros(3))
    capture = SimpleNamespace(forwards=1, forward=lambda x, tables, plans: x * 2)
    capture.backward = lambda grad: [grad * 2, buffer.fill_(grad.sum().item())]
    x = torch.ones(3, requires_grad=True)
    for turn in (1, 2):
        Replay.apply(capture, (), [], x, p).sum().backward()
        assert p.grad.tolist() == [3.0 * turn] * 3 and x.grad.tolist() == [2.0 * turn] * 3
        buffer.fill_(torch.nan)
        assert p.grad.tolist() == [3.0 * turn] * 3


@GPU
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("trained", ["adapters", "llm adapters", "everything"])
def test_captured_passes_equal_plain_ones(recompute, trained):
    """Loss and every gradient, batches of other sizes in between, memory full of NaN behind the buffers."""
    config = ModelConfig.from_dict(config_dict("tied"))
    model = Qwen2_5_VL.random(config, "cuda", torch.bfloat16, seed=0).train()
    if trained != "everything":
        args = LoraArgs(lora_rank=8, vision_lora=trained == "adapters", merger_lora=trained == "adapters")
        lora.inject(model, args)
        lora.set_trainable(model, args)
        with torch.no_grad():
            for home in lora.adapter_blocks(model):
                home.block.adapters.normal_(0, 0.05)
    model.gradient_checkpointing = recompute
    for p in model.parameters():  # as DeepSpeed does: this makes their place in autograd, on the stream of now
        p.place = p.requires_grad and p.expand_as(p).grad_fn.next_functions[0][0]
    plain = copy.deepcopy(model)
    exact = copy.deepcopy(model).float()
    told = []
    model.captures = Captures(told.append)
    for turn in range(3):
        for seed, (text, grids) in enumerate(zip((30, 80, 55), CLIPS)):
            packed = batch(config, text + turn, grids, seed).to("cuda")
            right = gradients(plain, packed)
            junk = torch.full((64 << 20,), torch.nan, device="cuda")
            del junk
            noise = off(right, gradients(exact, packed))  # what bf16 itself is off
            assert off(gradients(model, packed), right) <= 2 * noise + 1e-3
    assert len(told) >= 2, told
    with torch.no_grad():
        assert off([model(packed)], [plain(packed)]) <= 0.05


@GPU
def test_changed_weights_are_seen():
    """An update in place is seen by a replay; for another storage, or without adapters, no graph of before is used."""
    config = ModelConfig.from_dict(config_dict("tied"))
    model = Qwen2_5_VL.random(config, "cuda", torch.bfloat16, seed=0).train()
    lora.inject(model, LoraArgs(lora_rank=8))
    lora.set_trainable(model, LoraArgs(lora_rank=8))
    model.captures = Captures()
    packed = batch(config, 30, CLIPS[0], 0).to("cuda")

    def both():
        captured = model(packed).detach()
        keep, model.captures = model.captures, None
        plain = model(packed).detach()
        model.captures = keep
        return off([captured], [plain])

    for _ in range(3):
        assert both() <= 0.02
    base = model(packed).detach()
    with torch.no_grad():
        for home in lora.adapter_blocks(model):
            home.block.adapters.normal_(0, 0.1)
    assert both() <= 0.02 and off([model(packed)], [base]) > 0.1
    snapshot = {name: torch.zeros_like(p) for name, p in lora.trainable_parameters(model)}
    for _ in range(3):
        with lora.reference(model, snapshot):
            assert both() <= 0.02 and off([model(packed)], [base]) <= 0.02
        with lora.disabled(model), torch.no_grad():
            assert both() <= 0.02 and off([model(packed)], [base]) <= 0.02
        assert both() <= 0.02
