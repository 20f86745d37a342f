"""SFT on several CPU ranks: the same batches, losses and parameters as on one, and who waited for whom."""

import json
import subprocess
import sys

import conftest  # noqa: F401 (sets the environment before torch is imported)
import pytest
import test_train_sft
import torch
from safetensors.torch import load_file
from test_train_sft import ROOT, metrics
from training.waiting import Waiting, lost

base = test_train_sft.base  # fixture
SLOW = 0.15  # as in sft_ranks.py


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "tests/sft_ranks.py", str(base), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def trained_on(runs, name, world):
    """[step][rank][pass][sample] = (name, whether it has a clip)"""
    ranks = [[json.loads(line) for line in (runs / f"{name}.{rank}").read_text().splitlines()] for rank in range(world)]
    return [list(step) for step in zip(*ranks, strict=True)]


def batches(steps):
    return [sorted(sample for rank in step for part in rank for sample, _ in part) for step in steps]


def one_is_blind(step):
    """Whether in some pass one rank has pictures and another has none."""
    passes = zip(*([any(clip for _, clip in part) for part in rank] for rank in step), strict=True)
    return any(len({*seen}) == 2 for seen in passes)


def state(runs, name, step=4):
    return load_file(runs / name / f"checkpoint-{step}" / "optimizer-00000.safetensors")


@pytest.mark.parametrize("packing", ["plain", "packed"])
@pytest.mark.parametrize("world", [2, 4])
def test_as_many_ranks_as_you_like_make_the_run_of_one(runs, packing, world):
    one, many = trained_on(runs, f"{packing}1", 1), trained_on(runs, f"{packing}{world}", world)
    assert batches(one) == batches(many) and all(len(batch) >= 4 for batch in batches(one))
    assert all(len({len(rank) for rank in step}) == 1 for step in many)  # passes
    assert packing == "packed" or any(one_is_blind(step) for step in many)
    names = "loss", "token_accuracy", "grad_norm", "answer_tokens", "lr"
    a, b = (metrics(runs / name, *names) for name in (f"{packing}1", f"{packing}{world}"))
    for mine, theirs in zip(a, b, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    mine, theirs = state(runs, f"{packing}1"), state(runs, f"{packing}{world}")
    assert mine.keys() == theirs.keys() and any("visual" in name for name in mine)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-6, rtol=2e-5, msg=name)
    assert not torch.equal(*(next(iter(state(runs, f"{packing}1", step).values())) for step in (1, 4)))


def test_packing_changes_no_batch_either(runs):
    assert batches(trained_on(runs, "plain1", 1)) == batches(trained_on(runs, "packed4", 4))


def test_waiting_for_a_slow_rank_is_measured(runs):
    """One of two ranks sleeps in each of four passes: the other waits as long, half of that in the mean."""
    (first,), *shares = metrics(runs / "slow", "idle")
    seconds = [ms / 1000 for (ms,) in metrics(runs / "slow", "ms")]
    assert first is None  # each step tells of the one before
    for (share,), step in zip(shares, seconds, strict=False):
        assert 0.5 * 2 * SLOW < share * step and share < 0.9
    assert "  idle " in (runs / "slow.log").read_text() and "  idle " not in (runs / "plain1.log").read_text()
    assert all("idle" not in json.loads(line) for line in (runs / "plain1/metrics.jsonl").read_text().splitlines())
    even = metrics(runs / "plain2", "idle", "traffic")[1:]
    assert len(even) == 3 and all(idle >= 0 and traffic > 0 for idle, traffic in even)


def test_what_is_lost():
    """Two passes of three ranks, after a start: in each one rank stands still for nothing but traffic."""
    rows = [[0.0, 0.1, 2.1], [0.0, 1.1, 0.1], [0.3, 0.4, 1.1]]
    idle, traffic = lost(rows)
    assert idle == pytest.approx((0.0 + 0.0 + 0.3) / 3 + (0.0 + 1.0 + 0.3) / 3 + (2.0 + 0.0 + 1.0) / 3)
    assert traffic == pytest.approx(0.2)
    waiting = Waiting(torch.device("cpu"))
    with waiting.here():
        pass
    waiting.next_pass()
    before, first = waiting.take()
    assert 0 < before < 1 and first == 0 and waiting.take() == [0]


def test_no_answer_on_any_rank_changes_nothing(runs):
    one, two, three = (state(runs, "lost", step) for step in (1, 2, 3))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)  # moments too
    assert all(tensor.isfinite().all() for tensor in three.values())
    assert any(not torch.equal(two[name], three[name]) for name in two)
    found = metrics(runs / "lost", "answer_tokens", "updated", "loss", "grad_norm")
    assert found[1] == (0, False, None, None) and [updated for _, updated, *_ in found] == [True, False, True]
    assert "step 2: no answer tokens in the batch: no update (1 in a row)" in (runs / "lost.log").read_text()
