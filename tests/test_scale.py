"""The cost model of several GPUs by exact arithmetic, what it is fitted to and what not; the measurement on a CPU."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import conftest  # noqa: F401 (sets the environment before torch is imported)
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

import scale
import scaling
import stepcost
import traced
from stepcost import Cluster, Costs, Link, Setting, expected_max, finish_times, gather_bytes, reduce_bytes
from workloads import NAMED, R, linear_flops, model_config

from config import GRPO, SFT, cli, parse
from data import Processor, load_tokenizer
from dataset.batch import Loader
from model import UserError
from model.loss import IGNORE
from model.qwen2_5_vl import Qwen2_5_VL
from training.engine import BUCKET

NOTHING = Link(1e12, 0.0)
H100 = "NVIDIA H100 80GB HBM3"


# Traffic


def test_rings_send_what_they_have_to():
    assert gather_bytes(1, 100) == reduce_bytes(1, 100) == 0
    assert [reduce_bytes(n, 120) for n in (2, 3, 4)] == [120, 160, 180]  # 2 (n - 1) / n
    sent = [gather_bytes(n, 1.0) for n in range(1, 100)]
    assert all(a < b < 1 for a, b in zip(sent, sent[1:]))


def test_hosts_exchange_their_parts_and_then_share_them_out():
    cluster = Cluster(inside=Link(100.0, 1.0), between=Link(10.0, 2.0), host=NOTHING, per_host=4)
    assert cluster.gather(1, 800) == 0
    assert cluster.gather(2, 800) == 1 + 400 / 100
    assert cluster.gather(4, 800) == 3 + 600 / 100
    # three hosts: of its 200 bytes each GPU gets two thirds over the network, in two rounds, then three quarters inside
    assert cluster.gather(12, 800) == pytest.approx(3 + 600 / 100 + 2 * 2 + 200 * 2 / 3 / 10)
    assert cluster.reduce(12, 800) == 2 * cluster.gather(12, 800)
    times = [cluster.gather(n, 800) for n in (1, 2, 4, 8, 16, 64)]
    assert times == sorted(times)


# Stragglers


def test_the_slowest_of_n_is_exact():
    assert expected_max([1, 2, 3, 4, 5, 6], 1) == pytest.approx(3.5)
    assert expected_max([1, 2, 3, 4, 5, 6], 2) == pytest.approx(161 / 36)  # two dice
    for n in (1, 3, 10):
        assert expected_max([0, 1], n) == pytest.approx(1 - 0.5**n)
        assert expected_max([0, 0, 0, 8], n) == pytest.approx(8 * (1 - 0.75**n))
    assert expected_max([7], 1000) == 7
    grid = np.arange(1, 10_001) / 10_000  # nearly uniform: n / (n + 1)
    assert expected_max(grid, 9) == pytest.approx(0.9, abs=1e-4)


def test_waiting_units_go_to_whoever_is_through():
    units = np.array([[1.0, 1.0, 1.0], [5.0, 1.0, 1.0]])
    assert finish_times(units, 2, shared=False).tolist() == [3, 7]
    assert finish_times(units, 2, shared=True).tolist() == [5, 5]
    assert finish_times(units[:, :1], 2, shared=True).tolist() == [1, 5]  # a first unit is always its rank's own
    drawn = np.random.default_rng(0).exponential(size=(50, 16, 8))
    own, shared = (np.mean([finish_times(each, 16, how).max() for each in drawn]) for how in (False, True))
    assert shared < 0.8 * own and shared >= drawn.sum((1, 2)).mean() / 16


# The fit


def told_of(flop_s, base, slope, **link):
    """A file as if it were measured on a machine of these constants, and its links."""
    found = json.loads(scale.FILE.read_text(encoding="utf-8"))
    found["assumed"]["links"]["inside"] |= link
    head = {"model": "3B", "workload": "R", "gpu": "X", "machine": "X", "date": "-", "flags": "", "rank": 64}
    head |= {"gpus": 1, "gradient_checkpointing": True}
    seconds = 8 * linear_flops(model_config("3B"), R, R.completion, True) / flop_s
    found["rows"] = [head | {"work": "sft", "batch": 8, "group": 0, "ms": 1000 * seconds}]
    found["decode"] = {"gpu": "X", "points": [[8, base + 8 * slope], [64, base + 64 * slope]]}
    return found, seconds


def test_one_gpu_is_reproduced_and_more_follow_from_the_links():
    told, seconds = told_of(4e14, 2e-3, 1e-5, rate=2e11, seconds=1e-5)
    costs = Costs(told["rows"], told, "X")
    assert (costs.rate, costs.base, costs.slope) == pytest.approx((4e14, 2e-3, 1e-5))
    one = scale.setting_of(told["rows"][0])
    alone = costs.step(one)
    assert alone["seconds"] == pytest.approx(seconds) and alone["traffic"] == alone["waiting"] == 0
    trained = stepcost.sizes("3B", 64)[0]
    last = trained % BUCKET  # of the second bucket
    assert BUCKET < trained < 2 * BUCKET
    hops = 3 * 1e-5
    by_hand = 2 * (hops + 0.75 * 4 * last / 2e11) + hops + 0.75 * 2 * trained / 2e11
    assert costs.step(replace(one, gpus=4))["traffic"] == pytest.approx(by_hand)


def test_a_slow_link_shows_once_it_outlasts_the_backward_pass():
    told, seconds = told_of(4e14, 2e-3, 1e-5, rate=1e8, seconds=0.0)
    found = Costs(told["rows"], told, "X").step(replace(scale.setting_of(told["rows"][0]), gpus=2))
    trained, under = stepcost.sizes("3B", 64)[0], 2 / 3 * seconds
    assert found["traffic"] == pytest.approx((4 * trained + trained) / 1e8 - under)


def test_more_gpus_never_make_a_step_shorter():
    told, _ = told_of(4e14, 2e-3, 1e-5)
    costs = Costs(told["rows"], told, "X")
    costs.spread = {"sft": [0.9, 1.0, 1.0, 1.1, 1.3], "grpo8": [0.95, 1.0, 1.05]}
    grpo = Setting("3B", "grpo", R, 1, 8, 8)
    for setting, like in ((scale.setting_of(told["rows"][0]), False), (grpo, False), (grpo, True)):
        times = [costs.step(replace(setting, gpus=n), like)["seconds"] for n in (1, 2, 4, 8, 64, 1024)]
        assert times == sorted(times) and times[-1] < 3 * times[0]


def test_every_measured_row_is_within_ten_percent_of_the_model():
    told = scale.read(scale.FILE)
    for gpu in {row["gpu"] for row in told["rows"]}:
        for row in scale.check(scale.costs_of(told, gpu)):
            assert abs(row["off"]) < 0.1, row


def test_only_the_fitted_row_goes_into_the_fit():
    told = scale.read(scale.FILE)
    was = {(row["work"], row["gpus"]): row for row in scale.check(scale.costs_of(told, H100))}
    assert was["sft", 1]["fitted"] and was["sft", 1]["off"] == pytest.approx(0)
    rows = [row for row in told["rows"] if row["gpu"] == H100]
    for row in rows:
        row["ms"] *= 1.5 if row["work"] == "grpo8" else 1
    now = {(row["work"], row["gpus"]): row for row in scale.check(scale.costs_of(told, H100))}
    assert now["grpo8", 1]["model"] == pytest.approx(was["grpo8", 1]["model"])
    assert now["grpo8", 1]["off"] < -0.3  # a wrong row is seen


def test_few_tokens_take_what_launching_takes():
    told = scale.read(scale.FILE)
    costs = scale.costs_of(told, H100)
    few = Setting("3B", "sft", NAMED["S"], 4, 1)
    least = told["assumed"]["least"]
    assert costs.step(few)["compute"] == pytest.approx(68 * least["captured"])
    assert costs.step(replace(few, sequence_parallel=2))["compute"] == pytest.approx(68 * least["launched"])


# What is chosen


@pytest.fixture(scope="module")
def options():
    def made(*words):
        return scale.arguments().parse_args(["choose", *words])

    return made


@pytest.mark.parametrize(
    "words",
    ["--model 3B --gpus 2 --memory 24", "--model 3B --gpus 1 --memory 16 --work grpo --lora_rank 64",
     "--model 7B --gpus 4 --memory 24 --batch 2", "--model 32B --gpus 4 --memory 140 --batch 4"],
)  # fmt: skip
def test_what_is_chosen_fits_and_the_scripts_take_it(options, words):
    args = options(*words.split())
    costs, fits, _ = scale.choose(args)
    assert fits
    for rate, gib, *_ in fits:
        assert gib <= scale.TIGHT * args.memory and rate > 0
    rate, gib, best, says = fits[0]
    assert sum(costs.memory(best).values()) / 2**30 == pytest.approx(gib)
    assert rate >= 0.99 * max(found[0] for found in fits)
    flags = f"{scale.flags_of(best)} --lora_rank {best.rank} --model_id Qwen/Qwen2.5-VL-{best.model}-Instruct"
    cfg = parse(GRPO if best.group else SFT, [*flags.split(), *["--num_generations", "8"] * bool(best.group)])
    assert cfg.per_device_train_batch_size == best.batch * max(1, best.group)
    assert cfg.gradient_checkpointing == best.gradient_checkpointing


def test_what_cannot_fit_is_told_with_what_it_would_take(options):
    with pytest.raises(UserError, match=r"72B with 16 frames of 252x420 needs at least \d+ GiB .* 1 GPU of 40"):
        scale.show_choose(options(*"--model 72B --work grpo --memory 40 --batch 1".split()))


@pytest.mark.parametrize(
    "words, told",
    [("choose --model 9B", "--model: invalid choice: '9B'"), ("choose --size 20x30", "expected HEIGHTxWIDTH"),
     ("model --measured nowhere.json", "nowhere.json cannot be read"), ("run --gpus 0", "expected a count above 0"),
     ("model --gpu T4", "--gpu: found 'T4', measured were"), ("", "the following arguments are required: command")],
)  # fmt: skip
def test_mistakes_take_one_line(words, told, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scale.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        cli(scale.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and told in error and error.count("\n") == 1


# The measurement


def test_shares_of_a_window():
    found = traced.shares(10.0, [(0, 4), (5, 6), (1, 2)], [(3, 5), (6, 9)], [[2, 3], [1, 2.5]])
    # of the first collective one second is under computing and one is waiting; of the second one half of one
    assert found == pytest.approx({"compute": 0.5, "traffic": 0.25, "waiting": 0.15, "idle": 0.1, "hidden": 0.1})
    alone = traced.shares(8.0, [(0, 4)], [], [[]])
    assert alone == {"compute": 0.5, "traffic": 0.0, "waiting": 0.0, "idle": 0.5, "hidden": 0.0}
    assert traced.shares(10.0, [], [(0, 1)], [[1], [1, 1]])["waiting"] is None
    copied = traced.shares(10.0, [(0, 4)], [], [[]], [(3, 6)])
    assert (copied["traffic"], copied["waiting"], copied["hidden"]) == pytest.approx((0.2, 0, 0.1))


def test_what_a_trace_holds():
    def event(name, start, end, cuda=True, annotation=False):
        time = SimpleNamespace(start=1e6 * start, end=1e6 * end)
        kind = traced.DeviceType.CUDA if cuda else traced.DeviceType.CPU
        return SimpleNamespace(name=name, time_range=time, device_type=kind, is_user_annotation=annotation)

    events = [event("sm90_gemm", 0, 2), event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 1, 3)]
    events += [event("aten::mm", 0, 9, cuda=False)]
    events += [event("Memcpy PtoP (Device -> Device)", 4, 5), event("nccl:all_reduce", 1, 3, annotation=True)]
    assert traced.intervals(events, True) == ([(0, 2)], [(1, 3)], [(4, 5)])


@pytest.mark.parametrize("name", ["E", "R"])
def test_made_data_has_the_workloads_tokens(name, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "CLIPS", 3)
    monkeypatch.setattr(scaling, "DRAWN", 2)
    work = NAMED[name]
    scaling.make_data(work, tmp_path)
    cfg = SFT(**scaling.view(work), image_folder=str(tmp_path / "videos"), per_device_train_batch_size=3)
    processor = Processor(load_tokenizer(scaling.TINY), model_config("tiny"), cfg)
    (packed,) = next(Loader(json.loads((tmp_path / "train.json").read_text()), processor, cfg).iterate(0, 1))
    assert packed.grid_thw == [work.grid] * 3
    assert int((packed.targets != IGNORE).sum()) == 3 * work.completion
    assert len(packed.input_ids) == 3 * (work.prompt_tokens + work.completion + 1)  # and the line break after an answer


def test_a_made_checkpoint_takes_the_embedded_tokenizer(tmp_path, monkeypatch):
    raw = json.loads((scaling.TINY / "config.json").read_text())
    ids = {name: 7 for name in raw if name.endswith("_token_id")}
    monkeypatch.setattr(scaling, "config_dict", lambda size: raw | ids | {"vocab_size": 1000})
    scaling.make_checkpoint("3B", tmp_path / "model")
    model = Qwen2_5_VL.from_pretrained(tmp_path / "model")
    assert len(model.model.embed_tokens.weight) == 1000
    Processor(load_tokenizer(tmp_path / "model"), model.config, SFT())  # refuses ids that are not the tokenizer's


def test_two_ranks_are_measured_and_what_fails_is_told(tmp_path):
    words = "run --gpus 2 --work sft --warmup 1 --steps 2 --traced 1 --workload E --model tiny --limit 300"
    args = scale.arguments().parse_args([*words.split(), "--folder", str(tmp_path)])
    (row,) = scaling.run(args)
    assert "error" not in row and len(row["all_ms"]) == 2 and row["gpus"] == 2
    assert sum(row["shares"][name] for name in ("compute", "traffic", "waiting", "idle")) == pytest.approx(1)
    assert row["shares"]["traffic"] > 0 and {link["op"] for link in row["links"]} == {"all_reduce", "all_gather"}
    args.limit, out = 1, tmp_path / "out.json"
    failed = scaling.measured("grpo", 2, args, tmp_path)
    assert failed["error"].startswith("not done after 1 s") and "not done" in scaling.shown(failed, row)
    scale.keep([row, failed], out)
    scale.keep([row], out)  # in place of the former one
    known = len(scale.read(scale.FILE)["rows"])
    assert [r["machine"] for r in scale.read(out)["rows"][known:]] == [row["machine"]]
