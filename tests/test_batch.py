"""Examples -> packed batches; which samples go into which, on which rank, after which start."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_data
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from test_data import record, turns

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

from workloads import model_config

from bench.flops import training_flops
from dataset.batch import Loader, by_count, deal, fill_bins, pack, pack_groups
from model import UserError
from model.qwen import IGNORE

clips, processor = test_data.clips, test_data.processor  # fixtures

# -- Packing


def test_pack_lays_samples_end_to_end(processor):
    records = [record(0), {"conversations": turns("Hi", "Ho")}, record(1)]
    examples = [processor.encode(r) for r in records]
    packed = pack(examples)
    lengths = [len(e) for e in examples]
    assert packed.segments.q_lengths == packed.segments.k_lengths == lengths and packed.segments.is_causal
    assert packed.input_ids.tolist() == [t for e in examples for t in e.ids]
    assert packed.position_ids.shape == (3, sum(lengths)) and packed.position_ids[:, lengths[0]].tolist() == [0, 0, 0]
    assert packed.targets.tolist() == [t for e in examples for t in e.targets]
    assert packed.patches.shape == (64, 1176) and packed.grid_thw == [(2, 4, 4)] * 2
    assert packed.names == ["0.mp4", examples[1].name, "1.mp4"]
    empty = pack([])
    assert empty.input_ids.shape == (1,) and empty.targets.tolist() == [IGNORE] and empty.position_ids.shape == (3, 1)


def test_groups_equal_separate_sequences(processor):
    """Each completion after its shared prompt gives the hidden states it has in a sequence of its own."""
    model = random_model("tied", vocab=272)
    model.config = replace(processor.config)
    prompts = [processor.encode(record(i), answer=False) for i in range(2)]
    groups = [[[65, 66, 67], [68]], [[69, 70, 71, 72], [65, 66]]]
    packed = pack_groups(prompts, groups)
    assert packed.segments.q_lengths == [len(prompts[0]) - 1, 3, 1, len(prompts[1]) - 1, 4, 2]
    with torch.no_grad():
        hidden = model(packed)
    at = 0
    for prompt, group in zip(prompts, groups, strict=True):
        n = len(prompt) - 1
        assert (packed.targets[at : at + n] == IGNORE).all()
        at += n
        for completion in group:
            span = slice(at, at + len(completion))
            assert packed.targets[span].tolist() == completion
            assert packed.input_ids[span].tolist() == [int(prompt.ids[-1]), *completion[:-1]]
            last = int(prompt.position_ids.max())
            assert packed.position_ids[:, span].tolist() == [list(range(last, last + len(completion)))] * 3
            ids = np.concatenate([prompt.ids, completion[:-1]]).astype(np.int64)
            later = np.tile(last + np.arange(1, len(completion)), (3, 1))
            positions = np.concatenate([prompt.position_ids, later], axis=1)
            alone = pack([replace(prompt, ids=ids, position_ids=positions, targets=np.full(len(ids), IGNORE))])
            with torch.no_grad():
                expected = model(alone)[n:]
            assert (hidden[span] - expected).abs().max() < 1e-4
            at += len(completion)
    assert at == len(packed.input_ids)


# -- Loader


def loader_args(**changes):
    args = dict(seed=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, pack_tokens=None)
    return SimpleNamespace(**{**args, "dataloader_num_workers": 0, "max_skip_share": 0.05, **changes})


def make_loader(processor, records=None, rank=0, world_size=1, **changes):
    records = [record(i) for i in range(10)] if records is None else records
    return Loader(records, processor, loader_args(**changes), rank=rank, world_size=world_size)


def names(steps):
    return [[packed.names for packed in step] for step in steps]


def test_an_epoch_has_every_sample_once(processor):
    loader = make_loader(processor)
    assert loader.steps_per_epoch == 3 and loader.num_steps(2) == 6 and loader.num_steps(0.5) == 2
    steps = names(loader.iterate(0, 6))
    epochs = [[name for step in steps[k : k + 3] for micro in step for name in micro] for k in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"{i}.mp4" for i in range(10)) and epochs[0] != epochs[1]
    assert [[len(micro) for micro in step] for step in steps[:3]] == [[2, 2], [2, 2], [1, 1]]
    ordered = Loader(loader.records, processor, loader.args, shuffle=False)
    assert names(ordered.iterate(0, 1)) == [[["0.mp4", "1.mp4"], ["2.mp4", "3.mp4"]]]


def test_same_plan_for_same_seed_any_start_and_any_threads(processor):
    whole = names(make_loader(processor).iterate(0, 7))
    assert names(make_loader(processor).iterate(0, 7)) == whole
    assert names(make_loader(processor).iterate(4, 7)) == whole[4:]
    assert names(make_loader(processor, dataloader_num_workers=3).iterate(1, 7)) == whole[1:]
    assert names(make_loader(processor, seed=2).iterate(0, 7)) != whole
    endless = make_loader(processor, dataloader_num_workers=2).iterate()
    assert [[packed.names for packed in next(endless)] for _ in range(7)] == whole
    endless.close()


@pytest.mark.parametrize("pack_tokens", [None, 300])
def test_ranks_share_one_global_batch(processor, pack_tokens):
    one = names(make_loader(processor, gradient_accumulation_steps=4, pack_tokens=pack_tokens).iterate(0, 4))
    loaders = [make_loader(processor, rank=rank, world_size=2, pack_tokens=pack_tokens) for rank in range(2)]
    ranks = [names(loader.iterate(0, 4)) for loader in loaders]

    def flat(micros):
        return sorted(name for micro in micros for name in micro)

    for k, step in enumerate(one):
        split = [rank[k] for rank in ranks]
        assert len(split[0]) == len(split[1])
        assert flat(step) == flat(split[0] + split[1])


def test_packing_to_a_token_budget(processor):
    records = [record(i, answer="x" * (1 + 7 * i)) for i in range(10)]
    lengths = [processor.length(r) for r in records]
    loader = make_loader(processor, records, pack_tokens=300, per_device_train_batch_size=5)
    (step,) = loader.iterate(0, 1)
    assert sorted(name for packed in step for name in packed.names) == sorted(f"{i}.mp4" for i in range(10))
    sizes = [len(packed.input_ids) for packed in step]
    assert max(sizes) <= 300 and sum(sizes) == sum(lengths) and len(step) <= -(-sum(lengths) // 300) + 1
    assert names([step]) == names(make_loader(processor, records, **vars(loader.args)).iterate(0, 1))


def test_bins():
    fill = lambda sizes, *rest: fill_bins([*range(len(sizes))], sizes, sizes, *rest)  # what costs its tokens
    assert fill([5, 4, 3, 2], 7, 1) == [[0, 3], [1, 2]]
    assert fill([9, 1, 1], 4, 1) == [[0], [1, 2]]  # one above the budget stands alone
    assert fill([3], 4, 2) == [[0], []]  # every rank gets as many
    assert len(fill([4] * 5, 4, 2)) == 6
    assert fill([], 4, 2) == [[], []]
    # the cheapest bin has no room for a sample of 5 tokens that costs little: it goes into the other
    assert fill_bins([0, 1, 2], [9, 8, 1], [1, 4, 5], 7, 1) == [[0, 2], [1]]


# -- Several ranks, by cost


def drawn(rng, count):
    """(grids, tokens, trained tokens) of samples: a few long clips, many short ones, some text."""
    frames = np.clip(np.exp(rng.normal(2.5, 0.8, count)), 2, 64).astype(int) // 2
    return [([(int(t), 18, 30)] if i % 8 else [], int(t) * 135 * (i % 8 > 0) + 90, 30) for i, t in enumerate(frames)]


def plans(shapes, step, world, cost, **changes):
    """[rank][pass][sample] as every rank's own loader plans it."""
    sizes = SimpleNamespace(shape=lambda record, answer: shapes[record])
    args = loader_args(gradient_accumulation_steps=16 // world, **changes)
    ranks = range(world)
    loaders = [Loader(range(len(shapes)), sizes, args, rank=rank, world_size=world, cost=cost) for rank in ranks]
    return [loader.plan(step, map)[0] for loader in loaders]


def waited(plan, costs):
    """Share of the time, where all ranks' k-th passes end together."""
    times = np.array([[sum(costs[i] for i in members) for members in rank] for rank in plan])
    return 1 - times.sum() / len(plan) / times.max(0).sum()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("pack_tokens", [None, 8192])
def test_ranks_are_dealt_even_work(pack_tokens, world):
    shapes, cost = drawn(np.random.default_rng(0), 320), partial(training_flops, model_config("3B"))
    costs = [cost(*shape) for shape in shapes]
    seen, before, after = [], [], []
    for step in range(10):
        came = plans(shapes, step, world, None, pack_tokens=pack_tokens)
        dealt = plans(shapes, step, world, cost, pack_tokens=pack_tokens)
        batch = sorted(i for rank in dealt for members in rank for i in members)
        assert batch == sorted(i for rank in came for members in rank for i in members) and len({*batch}) == 32
        assert len({len(rank) for rank in dealt}) == 1 and len(dealt[0]) <= len(came[0])
        most = max(len(members) for rank in dealt for members in rank)
        tokens = max(sum(shapes[i][1] for i in members) for rank in dealt for members in rank)
        assert most <= 2 if pack_tokens is None else tokens <= pack_tokens
        before, after, seen = [*before, waited(came, costs)], [*after, waited(dealt, costs)], seen + batch
    assert sorted(seen) == [*range(320)]
    assert np.mean(after) < 0.5 * np.mean(before)


def test_one_rank_learns_no_cost():
    shapes = drawn(np.random.default_rng(0), 32)
    asked = lambda *shape: pytest.fail("one rank asked for a cost")
    for pack_tokens in (None, 8192):
        assert plans(shapes, 0, 1, asked, pack_tokens=pack_tokens) == plans(shapes, 0, 1, None, pack_tokens=pack_tokens)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 4), st.integers(1, 3))
def test_what_is_dealt(costs, ranks, most):
    """Everything once; no micro-batch too full; all ranks as many; in no pass one is dearer than one of a pass before;
    less is waited than the difference of the dearest and the cheapest micro-batch."""
    bins = by_count(dict(enumerate(costs)), most, ranks)
    sums = [sum(costs[i] for i in bin) for bin in bins]
    dealt = deal(bins, sums, ranks)
    assert sorted(i for bin in dealt for i in bin) == [*range(len(costs))] and max(map(len, dealt)) <= most
    times = np.array([sum(costs[i] for i in bin) for bin in dealt]).reshape(ranks, -1)
    assert (times[:, :-1].min(0) >= times[:, 1:].max(0)).all()
    assert (times.max(0) - times.min(0)).sum() <= times.max() - times.min()


@pytest.mark.parametrize("pack_tokens", [None, 300])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_is_skipped_counted_and_named(processor, workers, pack_tokens):
    records = [record(i) for i in range(10)]
    records[4] = {"video": "broken.mp4", "conversations": turns("<video>", "L")}
    changes = dict(dataloader_num_workers=workers, max_skip_share=0.1, pack_tokens=pack_tokens)
    loader = make_loader(processor, records, **changes)
    seen = [name for step in loader.iterate(0, 6) for packed in step for name in packed.names]
    assert sorted(seen) == sorted([f"{i}.mp4" for i in range(10) if i != 4] * 2)
    assert list(loader.skipped) == ["sample 4"] and "broken.mp4: no readable video" in loader.skipped["sample 4"]
    assert loader.broken == 1
    with pytest.raises(UserError, match="1 of 10 samples are broken, max_skip_share is 0.05; the last: sample 4"):
        list(make_loader(processor, records, **changes | dict(max_skip_share=0.05)).iterate(0, 3))


def test_too_long_samples_do_not_count_as_broken(processor):
    records = [record(i, answer="x" * (1000 if i < 5 else 1)) for i in range(10)]
    processor.args.max_seq_length = 500
    loader = make_loader(processor, records)
    seen = [name for step in loader.iterate(0, 3) for packed in step for name in packed.names]
    assert len(seen) == 5 == len(loader.skipped) and loader.broken == 0
    processor.args.max_seq_length = 10
    with pytest.raises(UserError, match="all 10 samples are left out"):
        list(make_loader(processor).iterate(0, 3))


def test_a_micro_batch_of_skipped_samples_is_still_a_pass(processor):
    records = [record(i, answer="x" * (1000 if i < 9 else 1)) for i in range(10)]
    processor.args.max_seq_length = 500
    steps = list(make_loader(processor, records).iterate(0, 3))
    assert all(len(step) == 2 for step in steps)
    assert sorted(len(packed.names) for step in steps for packed in step) == [0, 0, 0, 0, 0, 1]


def test_memory_is_bounded_by_the_prefetch(processor, monkeypatch):
    started = []
    encode = processor.encode
    monkeypatch.setattr(processor, "encode", lambda *a, **k: started.append(1) or encode(*a, **k))
    batches = make_loader(processor, dataloader_num_workers=2).iterate()
    next(batches)
    assert len(started) <= 4 + 2 * 4
    batches.close()
