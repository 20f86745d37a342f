"""GRPO on two and four ranks: prompts go to whoever is free, groups are dealt to the update; the same run as on one."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401 (sets the environment before torch is imported)
import pytest
import test_train_grpo
from conftest import config_dict, same_weights
from test_train_grpo import column, flags_for, lines, weights

from config import GRPO
from model.loading import ModelConfig
from training.dealing import Sampled, cut_units, deal, even_passes, group_flops
from training.groups import Rollout

base = test_train_grpo.base  # fixture
ROOT = Path(__file__).resolve().parents[1]
CONFIG = ModelConfig.from_dict(config_dict("tied"))

# name: (ranks, flags besides those of the one rank that it must equal, what is done to its ranks)
UNITS = {"rollout_rows": 4}  # one prompt a unit
RUNS = {
    "one": (1, {}, {}),
    "two": (2, {}, {}),  # a unit a rank: nothing waits
    "first slow": (2, UNITS, {"slow": {0: 5}}),
    "second slow": (2, UNITS, {"slow": {1: 5}}),
    "four": (4, UNITS, {"slow": {2: 5}}),
    "split": (2, UNITS | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "pack_tokens": 150}, {}),
    "uneven": (1, {}, {}),
    "uneven two": (2, UNITS, {}),
    "uneven four": (4, UNITS, {}),
    "broken": (1, {}, {}),
    "broken two": (2, UNITS, {"slow": {0: 4}}),
    "broken slow": (2, UNITS, {"slow": {1: 4}}),
}


def clips(base, folder, kind):
    """The base's six clips, or five of them in steps of four and one; or one clip empty, one of broken frames."""
    records = json.loads((base / "data/train.json").read_text())
    shutil.copytree(base / "data/videos", folder / "videos")
    if kind == "uneven":
        records = records[:5]
    if kind == "broken":
        (folder / "videos" / records[1]["video"]).write_bytes(b"")
    (folder / "train.json").write_text(json.dumps(records))



@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """{name: folder} of RUNS, all of them made by one warm process."""
    place, jobs = tmp_path_factory.mktemp("dealing"), []
    for name, (world, more, job) in RUNS.items():
        kind = name.split()[0]
        data = place / f"data {kind}"
        if not data.exists():
            data.mkdir()
            clips(base, data, kind)
        flags = {"data_path": data / "train.json", "max_steps": 4, "save_steps": 4, "oversample": 1.5, "beta": 0.05}
        flags |= {"per_device_train_batch_size": 16 // world, "log_completions": 1, "max_skip_share": 0.5}
        if kind == "uneven":
            flags["oversample"] = 1
        given = flags_for(base, place / name, **(flags | more))
        given = dict(zip((flag.removeprefix("--") for flag in given[::2]), given[1::2]))
        job = {"folder": str(place / name), "world": world, "flags": given} | job
        if kind == "broken":
            job["unreadable"] = json.loads((data / "train.json").read_text())[4]["video"]
        jobs.append(job)
    (place / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "tests/grpo_ranks.py", str(place / "jobs.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return {name: place / name for name in RUNS}


def same_as_one_rank(one, other):
    """The same prompts, completions and choice of groups; losses and parameters within float error."""
    names = "step", "prompt", "id", "ids", "text", "reward", "trained"
    mine, theirs = ([[row.get(n) for n in names] for row in lines(f, "rollouts.jsonl")] for f in (other, one))
    assert mine == theirs
    for name in ("loss", "kl", "kl_trained", "reward", "grad_norm", "entropy", "sampler_gap_max"):
        assert column(other, name) == pytest.approx(column(one, name), abs=2e-5), name
    for name in ("trained_tokens", "prompt_tokens", "completion_tokens", "groups_trained", "skipped", "updated", "lr"):
        assert column(other, name) == column(one, name), name
    same_weights(weights(other / "checkpoint-4"), weights(one / "checkpoint-4"))


def sampled_by(folder, step):
    """{rank: prompts that it sampled, in order}"""
    found = {}
    for line in lines(folder, "who.jsonl"):
        if line["step"] == step:
            found.setdefault(line["rank"], []).extend(line["prompts"])
    return found


@pytest.mark.parametrize("name", ["two", "first slow", "second slow", "four", "split"])
def test_any_number_of_ranks_equals_one(runs, name):
    assert max(column(runs["one"], "grad_norm")) > 0 and min(column(runs["one"], "groups_trained")) >= 3
    same_as_one_rank(runs["one"], runs[name])


def test_who_is_free_takes_waiting_prompts_and_nothing_else_changes(runs):
    """Each rank has three units of a prompt: a slow one is left with its first. It is the same run bit for bit, for
    units and the update do not depend on who was slow."""
    first, second = runs["first slow"], runs["second slow"]
    for step in (1, 2, 3, 4):
        slow = sampled_by(first, step)[0], sampled_by(second, step)[1]
        free = sampled_by(first, step)[1], sampled_by(second, step)[0]
        assert list(map(len, slow)) == [1, 1] and list(map(len, free)) == [5, 5]
        assert sorted(slow[0] + free[0]) == sorted(slow[1] + free[1])
    assert (first / "rollouts.jsonl").read_bytes() == (second / "rollouts.jsonl").read_bytes()
    for name in ("optimizer-00000.safetensors", "adapter_model.safetensors"):
        assert (first / "checkpoint-4" / name).read_bytes() == (second / "checkpoint-4" / name).read_bytes()
    assert len(column(first, "rollout_idle")) == 3 and column(runs["one"], "idle") == []  # of the step before
    assert all(0 <= share < 1 for name in ("rollout_idle", "idle", "traffic") for share in column(first, name))


@pytest.mark.parametrize("name", ["uneven two", "uneven four"])
def test_fewer_prompts_than_ranks(runs, name):
    """Steps of four prompts and of one: ranks without any go along."""
    world = RUNS[name][0]
    assert [sum(map(bool, sampled_by(runs[name], step).values())) for step in (2, 4)] == [1, 1] and world > 1
    same_as_one_rank(runs["uneven"], runs[name])


@pytest.mark.parametrize("name", ["broken two", "broken slow"])
def test_broken_clips_are_left_out_once_whoever_comes_across_them(runs, name):
    """One file is empty, which all ranks find; one has broken frames, which its owner finds, and who takes it."""
    assert column(runs["broken"], "skipped")[-1] == 2
    assert {row["id"] for row in lines(runs[name], "rollouts.jsonl")} == {
        row["id"] for row in lines(runs["broken"], "rollouts.jsonl")
    }
    same_as_one_rank(runs["broken"], runs[name])


# The rules


@pytest.mark.parametrize("seed", range(20))
def test_units_hold_everything_once_and_evenly(seed):
    draw = random.Random(seed)
    world, most, batch = draw.randint(1, 5), draw.randint(1, 6), draw.sample(range(100), draw.randint(0, 40))
    costs = {i: draw.uniform(1, 3) for i in batch}
    shares = cut_units(batch, costs, most, world)
    units = [unit for share in shares for unit in share]
    assert sorted(i for unit in units for i in unit) == sorted(batch) and len(shares) == world
    assert all(1 <= len(unit) <= most for unit in units)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if len(batch) >= world:
        assert min(map(len, shares)) >= 1
        mean = sum(costs.values()) / world
        load = [sum(costs[i] for unit in share for i in unit) for share in shares]
        assert max(load) - mean <= 3 * max(map(len, shares))  # at most a prompt's cost a unit


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_with_their_owner_where_that_is_even(seed):
    draw = random.Random(seed)
    world, count = draw.randint(2, 4), draw.randint(1, 24)
    costs, owners = {n: draw.uniform(1, 2) for n in range(count)}, [draw.randrange(world) for _ in range(count)]
    place = deal(costs, owners, world)
    load = [sum(cost for n, cost in costs.items() if place[n] == rank) for rank in range(world)]
    assert list(place) == list(costs)
    assert max(load) - min(load) <= 2 + 0.1 * sum(load) / world  # less than a group more: it could move
    level = {n: 1.0 for n in range(4 * world)}
    assert deal(level, [n % world for n in level], world) == {n: n % world for n in level}


def group(number, tokens, lengths):
    rollouts = [Rollout(number, [7] * n, [0.0] * n, True, "") for n in lengths]
    return Sampled(number, tokens, [(2, 4, 4)], rollouts)


@pytest.mark.parametrize("seed", range(20))
def test_passes_are_as_many_on_each_rank_within_the_limits(seed):
    draw = random.Random(seed)
    cfg = GRPO(num_generations=4, per_device_train_batch_size=draw.choice([2, 4, 8]))
    cfg.pack_tokens = draw.choice([None, 100, 300])
    groups = [group(n, draw.randint(20, 60), [draw.randint(1, 30) for _ in range(4)]) for n in range(9)]
    shares = [groups[:5], groups[5:]] if seed % 4 else [groups, []]
    ranks, most = even_passes(CONFIG, cfg, shares)
    assert most == max(map(len, ranks))
    for share, passes in zip(shares, ranks):
        assert sorted(map(id, sum(passes, []))) == sorted(id(r) for x in share for r in x.group)
        for rollouts in passes:
            own = {r.group for r in rollouts}
            tokens = sum(groups[n].tokens for n in own) + sum(len(r.ids) for r in rollouts)
            assert len(rollouts) <= cfg.per_device_train_batch_size
            assert not cfg.pack_tokens or tokens <= cfg.pack_tokens or len(rollouts) == 1 or len(own) == 1
            assert [r.group for r in rollouts] == sorted(r.group for r in rollouts)  # groups stay together
        costs = [sum(group_flops(CONFIG, 40, [], [len(r.ids)]) for r in rollouts) for rollouts in passes]
        assert len(costs) < 2 or min(costs) > 0
