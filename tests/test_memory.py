"""The memory estimate: against arithmetic by hand, against what real code keeps on a CPU, and against the live bytes of
the GPU's path at the 3B shape (tensors without storage)."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import conftest  # noqa: F401 (sets the environment before torch is imported)
import ghost
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from grpo import prompts_of
from live import Live
from workloads import R, S, Workload, config_dict, sft_batch

import lora
import model.sequence
import model.vision
import training.blocks
import training.memory
from config import GRPO, SFT
from data import pack_groups
from model.loss import IGNORE
from model.qwen2_5_vl import ModelConfig, Qwen2_5_VL
from train_sft import micro_loss
from training.blocks import Load, part_of_clip
from training.memory import GIB, WORKSPACE, Memory, peak, total
from training.survey import group_loads

EVERYWHERE = dict(lora_rank=64, lora_alpha=64)
FROZEN = dict(vision_lora=False, merger_lora=False)


def shape(cfg, config, dtype=torch.bfloat16, device="meta"):
    with torch.device(device):
        model = Qwen2_5_VL(config).to(dtype)
    lora.inject(model.requires_grad_(True), cfg)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    return model.train()


def load_of(work, batch):
    patches, answers = batch * math.prod(work.grid), batch * work.completion
    part = part_of_clip(*work.grid)
    return Load(batch * work.prompt_tokens + answers, answers, patches, batch, batch, part=part)


# By hand, at the 3B shape


@pytest.fixture(scope="module")
def config():
    return ModelConfig.from_dict(config_dict("3B"))


@pytest.fixture(scope="module")
def adapted(config):
    return shape(SFT(**EVERYWHERE), config)


def test_static_memory_of_the_3b_by_hand(adapted):
    memory = Memory(adapted, SFT(**EVERYWHERE))
    adapters = 165_453_824  # configs/qwen_3b_sft_24gb.py
    static = memory.static()
    assert static.pop("workspace") == WORKSPACE
    expected = {"weights": 2 * 3_754_622_976, "trained parameters": 2 * adapters, "optimizer states": 12 * adapters}
    assert static == expected
    two = Memory(adapted, SFT(**EVERYWHERE), world=2)
    assert two.static()["optimizer states"] == 6 * adapters and two.gradients() == 2 * adapters
    assert memory.buckets() == 2 * 100_000_000 and two.buckets() == 2 * 2 * 25_000_000
    off = Memory(adapted, SFT(**EVERYWHERE, offload_optimizer=True))
    assert off.static()["optimizer states"] == off.gradients() == 0


def test_kept_columns_of_the_3b_by_hand(adapted):
    memory = Memory(adapted, SFT(**EVERYWHERE))
    # a decoder layer: x, norm, q, k, v, out, x2, norm2, gate, up, their product; x A^T of 7 adapters; in fp32 1 / rms
    # twice and 16 log-sum-exps
    kept = 2 * (2048 * 6 + 2 * 256 + 3 * 11008 + 7 * 64) + 4 * 2 + 4 * 16
    assert {cost.kept for cost in memory.costs.language[1:]} == {kept}
    assert {cost.entry for cost in memory.costs.language} == {2 * 2048}
    # a vision block: x, norm, qkv, turned q and k, out, x2, norm2, three of 3,424 (3,420 rounded up to 8), 5 adapters
    kept = 2 * (1280 * (1 + 1 + 3 + 2 + 1 + 1 + 1) + 3 * 3424 + 5 * 64) + 4 * 2 + 4 * 16
    assert {cost.kept for cost in memory.costs.vision[1:]} == {kept}
    # the first vision block: nothing before it is trained, so its norm keeps nothing
    assert memory.costs.vision[0].kept == kept - 2 * 1280 - 4
    # the merger, a patch: x, norm, into and out of GELU, two adapters a token of four patches
    assert memory.costs.merger.kept == 2 * (4 * 1280 + 2 * 64 / 4) + 4


def test_sampling_of_the_3b_by_hand(adapted):
    memory = Memory(adapted, GRPO(**EVERYWHERE))
    moments = memory.sampling(8 * 1162, 1162, 8 * 4320, 8, 8, 256)
    for found in moments.values():
        assert found["sampling copy"] == 2 * 36 * (2048 * (2 * 2048 + 2 * 256) + 3 * 2048 * 11008)
        assert found["KV cache"] == 36 * 2 * 2 * 128 * 2 * (8 * 1280 + 64 * 256)
        assert found["reference"] == 2 * 165_453_824
    assert "reference" not in Memory(adapted, GRPO(**EVERYWHERE, beta=0.0)).static()


def test_cuda_graphs_of_the_3b_by_hand(adapted):
    """By captured.py's rule: small enough passes, whose activations fit beside the peak."""
    kept = SFT(**EVERYWHERE, gradient_checkpointing=False)
    memory, load = Memory(adapted, kept), Load(8192, 2048, 8100, 8, 8)
    layers, blocks = memory.costs.language, memory.costs.vision
    whole = 200 * GIB
    found = memory.graphs([load], 20 * GIB, whole)
    trained = 2 * sum(p.numel() for p in adapted.model.layers.parameters() if p.requires_grad)
    activations = 8192 * (sum(cost.kept for cost in layers) + layers[-1].redo - layers[-1].kept)
    assert found["language model"] == int(activations + 4 * 8192 * 2 * 2048 + trained)
    assert memory.graphs([load] * 3, 20 * GIB, whole) == found  # one size
    two = memory.graphs([load, Load(1000, 8, 100)], 20 * GIB, whole)  # one pool, but buffers for each size
    assert two["language model"] - found["language model"] == 4 * 8192 * 2 * 2048
    held = 8192 * sum(cost.kept for cost in layers)
    assert held > 8192 * sum(cost.kept for cost in blocks)
    limit = 0.85 * whole - 1.33 * held
    assert "language model" in memory.graphs([load], limit - GIB, whole)
    assert list(memory.graphs([load], limit + GIB, whole)) == ["vision tower"]
    assert not memory.graphs([load], 2 * GIB, 24 * GIB) and not memory.graphs([Load(8193, 9, 8200)], 0, whole)
    again = Memory(adapted, SFT(**EVERYWHERE, gradient_checkpointing=True))
    assert set(again.graphs([load], 12 * GIB, 24 * GIB)) == {"vision tower", "language model"}
    again.cfg.lora_dropout = 0.1  # masks cannot be drawn twice alike in a graph
    assert not again.graphs([load], 12 * GIB, 24 * GIB)


# Against what autograd keeps on a CPU


def small(dtype):
    """The 3B's structure, narrow: 3 vision blocks, 4 layers, 2 kv heads for 4, an odd MLP width in the tower."""
    raw = config_dict("3B") | dict(hidden_size=128, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
                                   num_key_value_heads=2, vocab_size=151_936 // 64, image_token_id=2003,
                                   video_token_id=2004, vision_start_token_id=2000, vision_end_token_id=2001,
                                   rope_scaling=dict(type="mrope", mrope_section=[4, 6, 6]))  # fmt: skip
    raw["vision_config"] |= dict(hidden_size=80, num_heads=4, intermediate_size=214, depth=3, out_hidden_size=128,
                                 fullatt_block_indexes=[1])  # fmt: skip
    return ModelConfig.from_dict(raw)


def kept_for_backward(model, batch, rows):
    """Bytes of the storages that a forward pass saves, parameters apart."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(batch, rows=rows)
    del hidden
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("flags", [
    {}, FROZEN, dict(lora_rank=64), dict(tune_merger=True), dict(llm_lora=False), dict(lora_dropout=0.1),
    dict(lora_enable=False, freeze_llm=False, freeze_vision_tower=False, tune_merger=True),
], ids=["all", "frozen", "rank64", "merger", "vision", "dropout", "whole"])  # fmt: skip
def test_kept_bytes_on_a_cpu(dtype, flags):
    cfg, config = SFT(**flags), small(dtype)
    model = shape(cfg, config, dtype, "cpu")
    work = Workload((2, 8, 8), 40, 60)
    memory = Memory(model, cfg, dtype.itemsize, cuda=False)
    load = load_of(work, 3)
    costs, batch = memory.costs_of(load), sft_batch(config, work, 3)
    normed = load.asking if costs.own else load.tokens
    estimate = memory.kept_vision(load, costs) + memory.kept_language(load, costs) + memory.tables(load)
    estimate += normed * costs.norm(model.model.norm, True)
    found = kept_for_backward(model, batch, (batch.targets != IGNORE).nonzero()[:, 0])
    assert estimate == pytest.approx(found, rel=0.04)


# Against the GPU's path without storage


@pytest.mark.parametrize("name, work, batch, passes, flags", [
    ("full bucket reduced", S, 1, 1, EVERYWHERE),
    ("loss backwards", S, 8, 1, dict(EVERYWHERE, gradient_checkpointing=False)),
    ("language model backwards", R, 8, 1, EVERYWHERE),
    ("language model backwards", R, 8, 1, EVERYWHERE | dict(tune_merger=True)),
    ("language model backwards", R, 4, 2, dict(lora_rank=16) | FROZEN),
    ("language model backwards", Workload((1, 46, 62), 20, 4), 2, 1, dict(lora_rank=16, gradient_checkpointing=False)),
], ids=str)  # fmt: skip
def test_a_step_of_the_3b_without_storage(name, work, batch, passes, flags, monkeypatch):
    estimate, measured = estimated_and_live(name, work, batch, passes, flags, monkeypatch)
    assert estimate == pytest.approx(measured, rel=0.01)


def test_a_long_video_of_the_3b_without_storage(monkeypatch):
    """It goes through the tower in parts, here of two grid steps; whole, its blocks' inputs alone take 1.7 GB."""
    work, flags = Workload((8, 46, 62), 20, 4), dict(lora_rank=16)
    for part, long in ((model.vision, model.vision), (training.blocks, training.memory)):
        monkeypatch.setattr(part, "PART", 6000)
        monkeypatch.setattr(long, "LONG", 20_000)
    estimate, measured = estimated_and_live("language model backwards", work, 1, 1, flags, monkeypatch)
    assert estimate == pytest.approx(measured, rel=0.01)
    monkeypatch.setattr(training.memory, "LONG", 100_000)
    memory = Memory(shape(SFT(lora_rank=16, gradient_checkpointing=True), ModelConfig.from_dict(config_dict("3B"))),
                    SFT(lora_rank=16, gradient_checkpointing=True))  # fmt: skip
    assert total(peak(memory.update(load_of(work, 1)))[1]) > estimate + 1.7e9


@pytest.mark.parametrize("count, recompute", [(2, True), (4, False)], ids=["recomputed", "kept"])
def test_a_shared_batch_of_the_3b_without_storage(count, recompute, monkeypatch):
    """What one of several ranks holds (model/sequence.py); 4 ranks have each of the 2 kv heads twice."""
    exchange = lambda x, sends, receives, group: x.contiguous().new_empty(sum(receives), *x.shape[1:])
    monkeypatch.setattr(model.sequence, "exchange", exchange)
    work, flags = Workload((32, 18, 30), 20, 40), dict(lora_rank=16, gradient_checkpointing=recompute)
    flags["sequence_parallel"] = count
    name = "language model backwards"
    estimate, measured = estimated_and_live(name, work, 2, 1, flags, monkeypatch)
    assert estimate == pytest.approx(measured, rel=0.01)


def estimated_and_live(name, work, batch, passes, flags, monkeypatch):
    """(the planner's peak, that of all tensors alive during the step), both without the workspace. Of a shared batch on
    the rank with the answers."""
    ghost.haunt(monkeypatch)
    raw = config_dict("3B")
    raw["vision_config"]["intermediate_size"] = 3424  # what 3,420 is rounded up to on a GPU
    config = ModelConfig.from_dict(raw)
    cfg = SFT(**{"gradient_checkpointing": True} | flags)
    net, count = shape(cfg, config), cfg.sequence_parallel
    memory, made, load = Memory(net, cfg), sft_batch(config, work, batch), load_of(work, batch)
    if count > 1:
        made = model.sequence.share(made, model.sequence.Group(count, count - 1, None), config)
        tokens, patches = len(made.input_ids), load.patches // count
        load = replace(load, tokens=tokens, patches=patches, answers=min(load.answers, tokens))
    moment, components = peak(memory.update(load, passes))
    assert moment == name
    with Live(*net.parameters()) as live:
        engine = ghost.Engine(net, memory.bucket)
        for _ in range(passes):
            loss = micro_loss(engine, 100, torch.zeros(2, dtype=torch.float64, device="meta"), made)
            engine.backward(loss)
            del loss
        engine.step()
    return total(components) - WORKSPACE, live.peak


def test_a_group_of_the_3b_without_storage(monkeypatch):
    """GRPO's update: a prompt once, keys and values gathered for each completion."""
    ghost.haunt(monkeypatch)
    raw = config_dict("3B")
    raw["vision_config"]["intermediate_size"] = 3424
    config = ModelConfig.from_dict(raw)
    cfg = GRPO(**EVERYWHERE, gradient_checkpointing=False, num_generations=4, beta=0.0)
    model = shape(cfg, config)
    memory = Memory(model, cfg)
    (load,) = group_loads([(R.prompt_tokens, 4320, 4320)], [[64] * 4], cfg)
    packed = pack_groups(prompts_of(config, R, 1), [[list(range(64))] * 4])
    assert (load.tokens, load.keys) == (packed.segments.num_tokens, sum(packed.segments.k_lengths))
    with Live(*model.parameters()) as live:
        engine = ghost.Engine(model, memory.bucket)
        engine.backward(micro_loss(engine, 100, torch.zeros(2, dtype=torch.float64, device="meta"), packed))
        engine.step()
    assert total(peak(memory.update(load))[1]) - WORKSPACE == pytest.approx(live.peak, rel=0.01)
