"""Examples -> packed batches; which samples go into which, on which rank, after which start, by which processes."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import test_data
import torch
from conftest import write
from test_data import record
from test_video import write_clip

from data import pack
from loader import Loader, Samples
from model import UserError
from records import Selection, read_records

clips, processor, base, sft = test_data.clips, test_data.processor, runs.base, runs.sft  # fixtures


def make_loader(processor, records=None, rank=0, world_size=1, collate_=pack, **changes):
    args = dict(seed=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, pack_tokens=None)
    args |= dict(dataloader_num_workers=0, max_skip_share=0.05) | changes
    records = [record(i) for i in range(10)] if records is None else records
    return Loader(records, processor, SimpleNamespace(**args), rank=rank, world_size=world_size, collate=collate_)


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


def test_an_epoch_has_each_file_as_often_as_its_weight_says(processor, tmp_path):
    """Two files with weights 2 and 0.4, each with a clip 0.mp4 of its own beside it."""
    for folder, shade in (("a", 40), ("b", 200)):
        write_clip(write(tmp_path / folder / "0.mp4", ""), [np.full((64, 64, 3), shade, np.uint8)] * 12)
    a = [record(0, answer=f"a{i}") for i in range(6)]
    b = [{"id": f"b{i}", **record(0, answer=f"b{i}")} for i in range(10)]
    write(tmp_path / "a/train.json", a)
    (tmp_path / "b/train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in b))
    records = read_records(f"{tmp_path}/a/train.json:2,{tmp_path}/b/train.jsonl:0.4")
    processor.args.image_folder = None
    loader = make_loader(processor, records)
    shades = [processor.encode(records[number]).patches.float().mean() for number in (0, 9)]
    assert np.allclose(shades, (40, 200), atol=3)  # each clip is the one beside the file that names it
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
    """Patches in shared memory, and torch's random state as without them."""
    records = [record(i, answer="x" * (1 + 7 * i)) for i in range(10)]
    state = torch.get_rng_state()
    for changes in (dict(pack_tokens=300), dict()):
        plain = list(make_loader(processor, records, **changes).iterate(0, 5))
        shared = list(make_loader(processor, records, dataloader_num_workers=2, **changes).iterate(0, 5))
        assert names(plain) == names(shared)
        for mine, theirs in zip(sum(plain, []), sum(shared, [])):
            assert torch.equal(mine.patches, theirs.patches) and torch.equal(mine.input_ids, theirs.input_ids)
            assert torch.equal(mine.targets, theirs.targets) and torch.equal(mine.position_ids, theirs.position_ids)
    assert torch.equal(torch.get_rng_state(), state)
    stream = make_loader(processor, records, collate_=list, dataloader_num_workers=2).iterate(0, 1)
    assert all(example.patches.is_shared() for micro in next(stream) for example in micro)


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


def test_too_long_samples_do_not_count_as_broken(processor):
    """A micro-batch that is left without samples is still a pass."""
    records = [record(i, answer="x" * (1000 if i < 9 else 1)) for i in range(10)]
    processor.args.max_seq_length = 500
    loader = make_loader(processor, records)
    steps = list(loader.iterate(0, 3))
    assert sorted(len(packed.names) for step in steps for packed in step) == [0, 0, 0, 0, 0, 1]
    assert 9 == len(loader.skipped) == len(loader.too_long)
    twice = Selection(Selection(records, [9, 4]), [1])  # as of --max_samples and of an evaluation's
    assert str(Samples(twice, processor, True)[0][1]).startswith("sample 4 (4.mp4): ")
    processor.args.max_seq_length = 10
    with pytest.raises(UserError, match="all 10 samples are left out"):
        list(make_loader(processor).iterate(0, 3))
