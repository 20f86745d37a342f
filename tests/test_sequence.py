"""Batches shared by several ranks (model/sequence.py): exact against one, in a pass and in whole runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest  # noqa: F401 (sets the environment before torch is imported)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sequence_ranks import HEADS, PACKINGS
from test_train_sft import ROOT, base, metrics  # noqa: F401 (a fixture)

import train_sft
from bench.workloads import SIZES
from config import GRPO, SFT, ignored_options, parse
from model import UserError
from model.sequence import deal, kv_heads

# One pass: 2 and 4 ranks


COUNTS = [2, 4]


@pytest.fixture(scope="module")
def found():
    """What tests/sequence_ranks.py found, for each number of ranks."""
    command = [sys.executable, "tests/sequence_ranks.py", *map(str, COUNTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return {count: json.loads(line) for count, line in zip(COUNTS, lines, strict=True)}


@pytest.fixture(params=COUNTS)
def ranks(request, found):
    return request.param, found[request.param]


def test_a_shared_pass_equals_one_ranks(ranks):
    """Hidden states, loss and every gradient; float32, whose sums are taken in another order."""
    count, found = ranks
    expected = {*PACKINGS, "recomputed", "recomputed in parts", "frozen tower", "all trained"}
    expected |= {f"heads: {name}" for name, (H, _) in HEADS.items() if H % count == 0}
    assert found["cases"].keys() == expected
    for name, case in found["cases"].items():
        told = f"{name}: {case}"
        assert case["hidden"] < 3e-5 and case["loss"] < 3e-6 and case["grads"] < 2e-4, told
        assert case["largest gradient"] > 1 or name == "no answer", told
    made = found["cases"]["images"]["pictures of the ranks"]
    assert sum(made) == 24 and (0 in made) == (count == 4)  # three pictures, none of them cut: a rank encodes nothing
    assert 0 in found["cases"]["pictures in the first run"]["pictures of the ranks"]


def test_what_cannot_be_shared_is_refused(ranks):
    count, found = ranks
    world, heads = found["refusals"]
    assert f"found {count + 1} with {count} ranks, expected one of {[n for n in (1, 2, 4) if n <= count]}" in world
    assert "found 3, this model's 2 heads can be dealt to [1, 2] ranks" in heads


def test_what_is_told_where_memory_runs_out(ranks):
    """Of the first rank's run: four tokens, then a clip's. It encodes 24 of these or 12, not those that stand there."""
    count, found = ranks
    text, settings = found["out of memory"]
    here = -(-59 // count)
    assert text == f"0 samples in 1 packs: 4 text and {here - 4} vision tokens, the largest pack {here}"
    assert settings == ["--sequence_parallel 2", "--nframes 4"]  # no group of twice as many in this world


def test_ranks_that_read_different_samples_are_told(ranks):
    same, different = ranks[1]["marks"]
    assert same == 0 and different != 0
    part, sums = SimpleNamespace(share=SimpleNamespace(mark=1)), iter([same, different])
    group = SimpleNamespace(size=2, rank=0)
    run = SimpleNamespace(rank=0, sequence=group, sum=lambda own: [next(sums)])
    train_sft.check_same(run, 3, [part])
    with pytest.raises(UserError, match="step 3: the ranks of a group have read different samples"):
        train_sft.check_same(run, 3, [part])


# Plain arithmetic


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 8), st.integers(1, 8)), max_size=6), st.integers(1, 8))
def test_grid_steps_are_dealt_in_order_and_evenly(grids, count):
    dealt = deal(grids, count)
    steps = [(h, w) for t, h, w in grids for _ in range(t)]
    assert [(h, w) for own in dealt for t, h, w in own for _ in range(t)] == steps and len(dealt) == count
    total, largest = sum(h * w for h, w in steps), max((h * w for h, w in steps), default=0)
    assert all(abs(sum(t * h * w for t, h, w in own) - total / count) <= largest for own in dealt)


def test_heads_of_the_released_models():
    """kv heads on the wire: as few as give every rank whole ones, with as many query heads to each."""
    assert [kv_heads(16, 2, n) for n in (2, 4, 8, 16)] == [2, 4, 8, 16]  # 3B
    assert [kv_heads(28, 4, n) for n in (2, 4, 7, 14)] == [4, 4, 7 * 4, 14 * 2]  # 7B: 7 a kv head
    assert [kv_heads(40, 8, n) for n in (2, 4, 8)] == [8, 8, 8]  # 32B
    assert [kv_heads(64, 8, n) for n in (2, 4, 8, 16)] == [8, 8, 8, 16]  # 72B
    for _, _, _, H, K, *_ in SIZES.values():
        for n in (n for n in range(1, H + 1) if H % n == 0):
            repeated = kv_heads(H, K, n)
            assert repeated % K == 0 and repeated % n == 0 and H % repeated == 0
            # each rank's query heads find their own kv head among the repeated ones of that rank
            owner = torch.arange(K).repeat_interleave(repeated // K).repeat_interleave(H // repeated)
            assert torch.equal(owner, torch.arange(K).repeat_interleave(H // K))


def test_flags():
    with pytest.raises(UserError, match="--sequence_parallel: found 2, expected 1.*train_sft.py"):
        parse(GRPO, ["--sequence_parallel", "2"])
    cfg = parse(SFT, ["--sequence_parallel", "2", "--cuda_graphs", "True"])
    assert [line for line in ignored_options(cfg) if "cuda_graphs" in line]


# Whole runs


def flags_of(base):  # noqa: F811
    given = {"model_id": base / "tiny", "data_path": base / "data/broken.json", "eval_data_path": "none"}
    given |= {"max_steps": 5, "nframes": 4, "save_steps": 2, "save_total_limit": "none", "logging_steps": 100}
    return {name: str(value) for name, value in given.items()}


@pytest.fixture(scope="module")
def data(base):  # noqa: F811
    """mixed.json with a clip that is not there; max_skip_share allows one of 21."""
    records = json.loads((base / "data/mixed.json").read_text())
    broken = records[0] | {"id": "broken", "video": "nowhere.mp4"}
    (base / "data/broken.json").write_text(json.dumps([*records, broken]))
    return base


@pytest.fixture(scope="module")
def pair(data):
    """deepspeed --num_gpus 2 train_sft.py --sequence_parallel 2"""
    flags = flags_of(data) | {"output_dir": str(data / "pair"), "sequence_parallel": "2"}
    flags["per_device_train_batch_size"] = "8"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29647"]
    command = [*launcher, "train_sft.py", *(part for name, value in flags.items() for part in (f"--{name}", value))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "8 samples x 1 x 1 groups of 2, which share each batch, = 8 samples" in done.stdout
    return data / "pair"


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folder of the runs that tests/sequence_runs.py tells of."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "tests/sequence_runs.py", str(folder), json.dumps(flags_of(data))]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def assert_equal(one: Path, two: Path, exact=False):
    """Metrics, weights and AdamW's moments. The first update of a weight is its gradient's sign times the rate, also of
    a gradient that is hardly above rounding: one weight of 76,800 differs by 1e-5, the others by a tenth of that."""
    names = "loss", "token_accuracy", "grad_norm", "answer_tokens", "skipped"
    mine, theirs = metrics(one, *names), metrics(two, *names)
    assert len(mine) == len(theirs) == 5 and theirs[-1][-1] == 1  # a broken sample is counted once
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, abs=0 if exact else 1e-5)
    mine, theirs = (load_file(run / "checkpoint-5/optimizer-00000.safetensors") for run in (one, two))
    assert mine.keys() == theirs.keys() and len(mine) == 15
    for name in mine:
        atol = 0 if exact else 5e-5 if name.startswith("weight") else 1e-6
        torch.testing.assert_close(mine[name], theirs[name], atol=atol, rtol=0, msg=name)


def test_two_ranks_that_share_batches_train_as_one(pair, runs):
    assert_equal(runs / "one", pair)


def test_two_groups_of_two_train_as_one(runs):
    """Evaluations in between are shared by all four ranks, clip by clip."""
    assert_equal(runs / "one", runs / "square")
    assert metrics(runs / "square", "eval_count") == [(4,)] * 2


def test_killed_and_resumed_it_is_the_same_run_bit_for_bit(pair, runs):
    assert_equal(pair, runs / "killed", exact=True)
    name = "adapter_model.safetensors"
    assert (pair / "checkpoint-5" / name).read_bytes() == (runs / "killed/checkpoint-5" / name).read_bytes()


def test_weights_in_parts_change_nothing(runs):
    assert_equal(runs / "one", runs / "parted")


@pytest.mark.parametrize("name", ["apart", "alone", "joined"])
def test_a_run_goes_on_with_other_ranks_sharing_or_none(runs, name):
    assert_equal(runs / "one", runs / name)


# The plan


@pytest.mark.parametrize("world", [1, 4])
def test_the_plan_is_of_what_a_card_holds(data, world, tmp_path, capsys, monkeypatch):
    """Half of the tokens that the plan for as many ranks as groups has. Without a launcher it is of one group."""
    flags = flags_of(data) | {"output_dir": str(tmp_path / "none"), "per_device_train_batch_size": "8"}
    told = {}
    for count in ("1", "2"):
        given = flags | {"sequence_parallel": count}
        monkeypatch.setenv("WORLD_SIZE", str(world if count == "2" else max(1, world // 2)))
        monkeypatch.setattr(sys, "argv", ["x", "--dry_run", *(p for k, v in given.items() for p in (f"--{k}", v))])
        train_sft.main()
        told[count] = capsys.readouterr().out
    groups = {1: "1 group of 2 ranks = 8 samples", 4: "2 groups of 2 ranks = 16 samples"}[world]
    assert f"a step     8 samples x 1 x {groups}" in told["2"]
    found = {count: re.search(r"rank, ([\d,]+) tokens each", text)[1] for count, text in told.items()}
    whole, half = (float(found[count].replace(",", "")) for count in ("1", "2"))
    assert half == pytest.approx(whole / 2, abs=1)
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-2], "--sequence_parallel", "3"])
    with pytest.raises(UserError, match="found 3, this model's 2 heads can be dealt to .1, 2. ranks"):
        train_sft.main()
