"""Examples -> packed batches; which samples go into which, on which rank, after which start, by which processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import test_data
import torch
from conftest import random_model
from runs import column
from test_data import record, turns
from test_video import write_clip

from data import Example, pack, pack_groups
from loader import Loader, examples, fill_bins
from model import UserError
from model.qwen import IGNORE
from records import Selection, read_records

clips, processor, base, sft = test_data.clips, test_data.processor, runs.base, runs.sft  # fixtures

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


def make_loader(processor, records=None, rank=0, world_size=1, collate_=pack, **changes):
    records = [record(i) for i in range(10)] if records is None else records
    return Loader(records, processor, loader_args(**changes), rank=rank, world_size=world_size, collate=collate_)


def names(steps):
    return [[packed.names for packed in step] for step in steps]


def test_an_epoch_has_every_sample_once_in_an_order_of_the_seed(processor):
    loader = make_loader(processor)
    assert loader.steps_per_epoch == 3 and loader.num_steps(2) == 6 and loader.num_steps(0.5) == 2
    steps = names(loader.iterate(0, 7))
    epochs = [[name for step in steps[k : k + 3] for micro in step for name in micro] for k in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"{i}.mp4" for i in range(10)) and epochs[0] != epochs[1]
    assert [[len(micro) for micro in step] for step in steps[:3]] == [[2, 2], [2, 2], [1, 1]]
    for epoch in range(3):  # of one file, numpy's permutation
        assert loader.order(epoch).tolist() == np.random.default_rng((1, epoch)).permutation(10).tolist()
    assert names(make_loader(processor).iterate(4, 7)) == steps[4:]
    assert names(make_loader(processor, dataloader_num_workers=3).iterate(1, 7)) == steps[1:]
    assert names(make_loader(processor, seed=2).iterate(0, 7)) != steps
    endless = make_loader(processor, dataloader_num_workers=2).iterate()
    assert [[packed.names for packed in next(endless)] for _ in range(7)] == steps
    endless.close()


@pytest.fixture
def two_files(tmp_path, clips):
    """A --data_path of two files with weights 2 and 0.4, each with a clip 0.mp4 of its own beside it."""
    for folder, shade in (("a", 40), ("b", 200)):
        (tmp_path / folder).mkdir()
        write_clip(tmp_path / folder / "0.mp4", [np.full((64, 64, 3), shade, np.uint8)] * 12)
    a = [record(0, answer=f"a{i}") for i in range(6)]
    b = [{"id": f"b{i}", **record(0, answer=f"b{i}")} for i in range(10)]
    (tmp_path / "a/train.json").write_text(json.dumps(a))
    (tmp_path / "b/train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in b))
    return f"{tmp_path}/a/train.json:2,{tmp_path}/b/train.jsonl:0.4"


def test_an_epoch_has_each_file_as_often_as_its_weight_says(processor, two_files):
    records = read_records(two_files)
    loader = make_loader(processor, records)
    assert len(records) == 16 and loader.epoch_size == 2 * 6 + 4 and loader.steps_per_epoch == 4
    epochs = [loader.order(epoch).tolist() for epoch in range(20)]
    for order in epochs:
        of_b = [number for number in order if number >= 6]
        assert sorted(number for number in order if number < 6) == sorted([*range(6)] * 2)
        assert len(of_b) == 4 == len(set(of_b))
    assert {number for order in epochs for number in order} == set(range(16))  # other ones of b in each epoch
    assert [make_loader(processor, records).order(epoch).tolist() for epoch in range(20)] == epochs
    assert make_loader(processor, records, seed=2).order(0).tolist() != epochs[0]
    few = Selection(records, [0, 2, 5, *range(8, 13)])  # those whose answers can be read, in GRPO
    assert make_loader(processor, few).epoch_size == 2 * 3 + 2
    assert sorted(set(make_loader(processor, few).order(3)[:8])) <= [*range(8)]


def test_several_files_on_two_ranks_and_from_any_step(processor, two_files):
    """Each clip is the one beside the file that names it."""

    def drawn(start, rank=0, world=1, **changes):
        loader = make_loader(processor, read_records(two_files), rank, world, collate_=list, **changes)
        steps = [[e for part in step for e in part] for step in loader.iterate(start, 8)]
        shades = {(e.name[0] == "b", round(float(e.patches.float().mean()) / 40)) for step in steps for e in step}
        assert shades <= {(False, 1), (True, 5)} and not loader.skipped
        return [sorted(e.number for e in step) for step in steps]

    processor.args.image_folder = None
    whole = drawn(0, gradient_accumulation_steps=4)
    halves = [drawn(0, rank, 2) for rank in range(2)]
    assert whole == [sorted(a + b) for a, b in zip(*halves)]
    assert drawn(3, gradient_accumulation_steps=4) == whole[3:]


def test_a_run_over_several_files_resumes_bit_for_bit(sft, base, tmp_path, capfd):
    """The same losses, and the same weights, without and with a stop in the second epoch. A changed file is named."""
    for name in ("few.json", "mixed.json"):
        shutil.copy(base / "data" / name, tmp_path)
    data = f"{tmp_path}/few.json:2,{tmp_path}/mixed.json:0.3"  # 12 + 6 an epoch
    options = {"data_path": data, "image_folder": base / "data/videos", "save_steps": 1, "save_total_limit": "none"}
    whole, broken = sft("whole", **options, max_steps=4), sft("broken", **options, max_steps=4)
    shutil.rmtree(broken / "checkpoint-4")
    sft("broken", **options, max_steps=4, resume=True)
    assert column(broken, "epoch", "loss", "grad_norm") == column(whole, "epoch", "loss", "grad_norm")
    assert column(whole, "epoch")[-1] == 4 / 3
    file = "checkpoint-4/adapter_model.safetensors"
    assert (whole / file).read_bytes() == (broken / file).read_bytes()
    assert "was changed" not in capfd.readouterr().out
    (tmp_path / "mixed.json").write_text(json.dumps(json.loads((tmp_path / "mixed.json").read_text())[::-1]))
    sft("broken", **options, max_steps=5, resume=True)
    assert "mixed.json:0.3 was changed since that run" in capfd.readouterr().out


@pytest.mark.parametrize("pack_tokens", [None, 300])
def test_ranks_share_one_global_batch(processor, monkeypatch, pack_tokens):
    one = names(make_loader(processor, gradient_accumulation_steps=4, pack_tokens=pack_tokens).iterate(0, 4))
    read, encode = [], processor.encode
    reading = lambda record, *rest: read.append(record["video"]) or encode(record, *rest)
    monkeypatch.setattr(processor, "encode", reading)
    opened = []
    for rank in range(2):
        steps = names(make_loader(processor, rank=rank, world_size=2, pack_tokens=pack_tokens).iterate(0, 4))
        assert sorted(read) == sorted(name for step in steps for micro in step for name in micro)  # only its own
        opened.append(steps)
        read.clear()
    for whole, *halves in zip(one, *opened):
        assert sorted(sum(whole, [])) == sorted(sum(halves[0] + halves[1], []))
        assert abs(sum(map(len, halves[0])) - sum(map(len, halves[1]))) <= 2


def test_workers_give_the_same_bits(processor):
    """Patches in shared memory, notes of overruled options, and torch's random state as without them."""
    records = [record(i, answer="x" * (1 + 7 * i)) for i in range(10)]
    state = torch.get_rng_state()
    for changes in (dict(pack_tokens=300), dict()):
        plain = list(make_loader(processor, records, **changes).iterate(0, 5))
        counts = dict(processor.notes)
        shared = list(make_loader(processor, records, dataloader_num_workers=2, **changes).iterate(0, 5))
        assert names(plain) == names(shared) and processor.notes != counts
        for mine, theirs in zip(sum(plain, []), sum(shared, [])):
            assert torch.equal(mine.patches, theirs.patches) and torch.equal(mine.input_ids, theirs.input_ids)
            assert torch.equal(mine.targets, theirs.targets) and torch.equal(mine.position_ids, theirs.position_ids)
    assert torch.equal(torch.get_rng_state(), state)
    stream = make_loader(processor, records, collate_=list, dataloader_num_workers=2).iterate(0, 1)
    assert all(example.patches.is_shared() for micro in next(stream) for example in micro)


@pytest.mark.parametrize("workers", [0, 2])
def test_examples_are_prompts_in_order(processor, workers):
    records = [record(i) for i in range(10)]
    records[4] = {"video": "broken.mp4", "conversations": turns("<video>", "L")}
    found = list(examples(processor, records, range(1, 10, 3), "reversed", workers))
    assert [f.number if isinstance(f, Example) else f[0] for f in found] == [1, 4, 7]
    assert "no readable video" in str(found[1][1]) and type(found[1][1]) is UserError
    expected = processor.encode(records[7], answer=False, control="reversed")
    assert np.array_equal(found[2].ids, expected.ids) and torch.equal(found[2].patches, expected.patches)


KILLED = """
import os, signal, sys, time
sys.path[:0] = ["tests", "."]
from loader import Samples
class Slow:
    def encode(self, record, *rest):
        open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
        time.sleep(0.05)
        return self
    number, payload = 0, b"x" * 100_000  # more than a pipe holds: a worker whose reader is gone would wait for ever
caught = []
signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
signal.signal(signal.SIGINT, lambda *_: caught.append(1))
for number, _ in enumerate(Samples(range(10_000), Slow(), True).read(range(10_000), 2, 4)):
    if number == 3:
        print("reading", flush=True)
    if len(caught) >= 2:
        print("ended by itself", flush=True)
        raise RuntimeError("an error of the loop")
"""


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_signals_and_the_end_of_workers(tmp_path, how):
    """Ctrl-C and SIGTERM reach the whole group, as from a shell or SLURM: the loop goes on, with its workers. When it
    ends, by an error or killed, they end too."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=-1, stderr=-1, text=True,
                               start_new_session=True)  # fmt: skip
    assert process.stdout.readline() == "reading\n"
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(workers) == 2 and process.pid not in workers
    if how == "kill":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "ended by itself\n"
    assert process.wait(20) == {"raise": 1, "kill": -9}[how], process.stderr.read()
    until = time.monotonic() + 20
    while (alive := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive


def test_packing_to_a_token_budget(processor):
    records = [record(i, answer="x" * (1 + 7 * i)) for i in range(10)]
    lengths = [len(processor.layout(r, True)[0]) for r in records]
    loader = make_loader(processor, records, pack_tokens=300, per_device_train_batch_size=5)
    (step,) = loader.iterate(0, 1)
    assert sorted(name for packed in step for name in packed.names) == sorted(f"{i}.mp4" for i in range(10))
    sizes = [len(packed.input_ids) for packed in step]
    assert max(sizes) <= 300 and sum(sizes) == sum(lengths) and len(step) <= -(-sum(lengths) // 300) + 1
    assert names([step]) == names(make_loader(processor, records, **vars(loader.args)).iterate(0, 1))


def test_bins():
    assert fill_bins([5, 4, 3, 2], 7) == [[0, 3], [1, 2]]
    assert fill_bins([9, 1, 1], 4) == [[0], [1, 2]]  # one above the budget stands alone
    assert fill_bins([4] * 5, 4) == [[0], [1], [2], [3], [4]] and fill_bins([], 4) == [[]]
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, budget = rng.integers(1, 60, rng.integers(1, 40)).tolist(), int(rng.integers(20, 100))
        bins = fill_bins(lengths, budget)
        assert sorted(i for each in bins for i in each) == [*range(len(lengths))]
        assert all(len(each) == 1 or sum(lengths[i] for i in each) <= budget for each in bins)


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
    assert len(loader.skipped) == 1 and not loader.too_long
    with pytest.raises(UserError, match="1 of 10 samples are broken, max_skip_share is 0.05; the last: sample 4"):
        list(make_loader(processor, records, **changes | dict(max_skip_share=0.05)).iterate(0, 3))


def test_too_long_samples_do_not_count_as_broken(processor):
    """A micro-batch that is left without samples is still a pass."""
    records = [record(i, answer="x" * (1000 if i < 9 else 1)) for i in range(10)]
    processor.args.max_seq_length = 500
    loader = make_loader(processor, records)
    steps = list(loader.iterate(0, 3))
    assert sorted(len(packed.names) for step in steps for packed in step) == [0, 0, 0, 0, 0, 1]
    assert 9 == len(loader.skipped) == len(loader.too_long)
    processor.args.max_seq_length = 10
    with pytest.raises(UserError, match="all 10 samples are left out"):
        list(make_loader(processor).iterate(0, 3))


def test_counts_go_on_when_a_run_is_resumed(processor):
    records = [record(i) for i in range(10)]
    records[4] = {"video": "broken.mp4", "conversations": turns("<video>", "L")}
    whole = make_loader(processor, records, max_skip_share=0.1)
    list(whole.iterate(0, 3))
    again = make_loader(processor, records, max_skip_share=0.1)
    again.restore([whole.state()])
    list(again.iterate(3, 6))
    assert list(again.skipped) == ["sample 4"] and not again.too_long
    ranks = [make_loader(processor, records, rank, 2, max_skip_share=0.1) for rank in range(2)]
    for loader in ranks:
        loader.restore([whole.state()])
    assert all(list(loader.skipped) == ["sample 4"] for loader in ranks)
