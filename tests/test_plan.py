"""--dry_run: what it tells is what the trainers then do, and it writes nothing."""

import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401 (sets the environment before torch is imported)
import pytest
import torch
from test_train_sft import base, flags_for, metrics, sft  # noqa: F401 (fixtures)

import train_grpo
import train_sft
from bench.workloads import config_dict
from config import GRPO, SFT, ignored_options, parse
from data import Loader, Processor, load_tokenizer, read_records
from model import UserError
from model.loading import ModelConfig, load_model
from model.qwen import IGNORE
from training import forecast, plan
from training.memory import GIB, peak, total
from training.survey import group_loads, sft_loads, survey


def told(capsys, monkeypatch, flags, script=train_sft):
    """The lines of a dry run."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry_run", *flags])
    script.main()
    return capsys.readouterr().out


def processor_of(base, cfg):  # noqa: F811
    return Processor(load_tokenizer(base / "tiny"), ModelConfig.from_folder(base / "tiny"), cfg)


def test_nothing_is_written_and_it_exits_with_0(base, tmp_path, capsys, monkeypatch):  # noqa: F811
    before = {p: p.stat().st_mtime_ns for p in [*base.rglob("*")]}
    flags = flags_for(base, tmp_path / "run")
    root = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "train_sft.py", *flags, "--dry_run"], **root, timeout=120)
    assert done.returncode == 0, done.stderr
    start = f"plan of train_sft.py: {base / 'tiny'} -> {tmp_path / 'run'} (nothing is run or written)\n"
    assert done.stdout.startswith(start), done.stdout
    flags += ["--data_path", str(base / "data/train.json"), "--model_ckpt", "none"]
    text = told(capsys, monkeypatch, flags, train_grpo)
    assert "a step     samples 2 prompts x 8, trains on 8 completions x 1 x 1 rank = 1 groups of 8" in text
    assert not list(tmp_path.iterdir()) and before == {p: p.stat().st_mtime_ns for p in [*base.rglob("*")]}
    done = subprocess.run([sys.executable, "train_sft.py", "--dry_run", "--bf16", "--fp16"], **root, timeout=120)
    assert done.returncode == 2 and "--fp16: found True, expected False while --bf16 is True" in done.stderr


# Data, batches, steps: what the trainer then does


@pytest.mark.parametrize("pack_tokens, world", [(None, 1), (260, 1), (260, 2)])
def test_tokens_are_those_of_the_batches(base, pack_tokens, world):  # noqa: F811
    flags = ["--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2", "--nframes", "4"]
    cfg = parse(SFT, ["--data_path", str(base / "data/mixed.json"), *flags])
    cfg.pack_tokens, cfg.dataloader_num_workers = pack_tokens, 0
    records, processor = read_records(cfg.data_path), processor_of(base, cfg)
    found = survey(records, processor, True, 1000)
    loader = Loader(records, processor, cfg, world_size=world)
    loads, most = sft_loads(loader, found, loader.steps_per_epoch)
    real = []
    ranks = [Loader(records, processor, cfg, rank=rank, world_size=world).iterate(0, loader.steps_per_epoch)
             for rank in range(world)]  # fmt: skip
    for micro_batches in zip(*ranks):
        real += [packed for rank in micro_batches for packed in rank]
        assert max(map(len, micro_batches)) <= most
    assert [load.tokens for load in loads] == [len(packed.input_ids) for packed in real]
    assert [load.answers for load in loads] == [int((packed.targets != IGNORE).sum()) for packed in real]
    assert [load.patches for load in loads] == [0 if p.patches is None else len(p.patches) for p in real]
    examples = [processor.encode(record) for record in records]
    assert [size.tokens for size in found.sizes] == [len(example) for example in examples]
    assert [size.vision for size in found.sizes] == [example.num_vision_tokens for example in examples]


def test_some_samples_stand_for_the_others(base):  # noqa: F811
    cfg = parse(SFT, ["--data_path", str(base / "data/mixed.json"), "--nframes", "4"])
    records = read_records(cfg.data_path)
    whole, some = (survey(records, processor_of(base, cfg), True, look) for look in (1000, 5))
    assert (whole.looked, some.looked, len(some.sizes)) == (20, 5, 20)
    assert [size == other for size, other in zip(some.sizes, whole.sizes)][::4] == [True] * 5
    assert some.sizes[1] == some.sizes[3] == whole.sizes[0]
    broken = [{"id": "x", "video": "no.mp4", "conversations": records[0]["conversations"]}, *records]
    found = survey(broken, processor_of(base, cfg), True, 1000)
    assert found.sizes[0] is None and "no file no.mp4" in found.left_out["sample 0"] and len(found.there) == 20
    with pytest.raises(UserError, match="all samples are left out; the first: sample 0: no file"):
        survey(broken[:1], processor_of(base, cfg), True, 1000)


@pytest.mark.parametrize("pack_tokens, batch", [(8192, 64), (300, 64), (None, 6)])
def test_groups_are_cut_as_the_update_cuts_them(base, pack_tokens, batch):  # noqa: F811
    cfg = parse(GRPO, ["--data_path", str(base / "data/train.json"), "--nframes", "4"])
    cfg.pack_tokens, cfg.per_device_train_batch_size = pack_tokens, batch
    processor = processor_of(base, cfg)
    prompts = [processor.encode(record, answer=False) for record in read_records(cfg.data_path)[:4]]
    draw = random.Random(0)
    lengths = [[draw.randint(1, 40) for _ in range(5)] for _ in prompts]
    rollouts = [[train_grpo.Rollout(n, [7] * k, [0.0] * k, True, "") for k in row] for n, row in enumerate(lengths)]
    real = train_grpo.micro_batches(prompts, rollouts, cfg)
    loads = group_loads([(len(p), len(p.patches), len(p.patches)) for p in prompts], lengths, cfg)
    assert [(x.tokens, x.answers, x.patches) for x in loads] == [
        (len(m.packed.input_ids), len(m.rows), len(m.packed.patches)) for m in real
    ]
    assert [x.keys for x in loads] == [sum(m.packed.segments.k_lengths) for m in real]


def test_steps_are_those_that_the_trainer_runs(base, sft, tmp_path, capsys, monkeypatch):  # noqa: F811
    options = {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 4}
    text = told(capsys, monkeypatch, flags_for(base, tmp_path / "run", **options))
    assert "steps      5 an epoch, 8 in all (1.6 epochs" in text
    assert "time       not known: no step was timed in" in text
    folder = sft("run", **options)
    start = capsys.readouterr().out.split("\nstep ")[0]
    assert metrics(folder, "step", "loss")[-1][0] == 8
    (data,) = [line for line in start.splitlines() if line.startswith("  data ")]
    tokens = sum(len(processor_of(base, parse(SFT, flags_for(base, folder))).encode(r).ids)
                 for r in read_records(base / "data/mixed.json"))  # fmt: skip
    assert f"20 samples (20 looked at), {tokens:,} tokens an epoch" in data and f" {tokens:,} tokens an epoch" in text
    lines = [line for line in start.splitlines() if not line.startswith("  note")]
    assert len(lines) == 10 and any(line.startswith("  memory     about") for line in lines), start
    timed = [ms for (ms,) in metrics(folder, "ms")][1:]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "ms"')  # as a killed run leaves it
    text = told(capsys, monkeypatch, flags_for(base, folder, **options | {"per_device_train_batch_size": 8}))
    seconds = 2 * statistics.median(timed) / 1000
    expected = f"{seconds:.2f} s a step, the median of 7 in {folder / 'metrics.jsonl'}, scaled from 4 to 8 samples"
    assert expected in text, text
    assert "holds a run: --resume or --overwrite will be asked for" in text


# Parameters


def test_parameters_are_the_models_own(tmp_path):
    """At the 3B shape, against transformers' model."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    raw = config_dict("3B")
    with torch.device("meta"):
        theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**raw))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    cfg = parse(SFT, ["--model_id", str(tmp_path), "--lora_rank", "64", "--tune_merger"])
    model, folder, notes = forecast.shape_of(cfg, 2)
    counts = plan.parameters(model)
    assert counts["all"][0] == sum(p.numel() for p in theirs.parameters()) == 3_754_622_976
    merger = sum(p.numel() for name, p in theirs.named_parameters() if "merger" in name)
    assert counts["merger"] == [merger, 0, merger]
    # by hand: rank x (in + out) of every linear layer; 3B and its tower
    layer = 4 * 2048 + 2 * (2048 + 256) + 2 * (2048 + 11008) + (11008 + 2048)
    block = (1280 + 3840) + 2 * 1280 + 2 * (1280 + 3420) + (3420 + 1280)
    assert counts["language model"][1:] == [64 * 36 * layer, 0] and counts["vision tower"][1:] == [64 * 32 * block, 0]
    assert (folder, notes) == (tmp_path, [])


def test_an_adapter_brings_its_own_rank(base, sft, tmp_path, capsys, monkeypatch):  # noqa: F811
    run = sft("first", max_steps=1, lora_rank=4)
    capsys.readouterr()
    flags = flags_for(base, tmp_path / "next", model_ckpt=run, lora_rank=8)
    text = told(capsys, monkeypatch, flags)
    assert f"goes on from the adapter of {run / 'checkpoint-1'}: rank 4" in text
    assert "--lora_rank has no effect: the adapter has its own" in text
    own = sum(p.numel() for p in load_model(base / "tiny").parameters())
    assert f"all {own:>26,}  trained: " in text


# Memory and flags


def test_what_does_not_fit_says_what_would(base, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(forecast, "CONTEXT", int(0.6 * GIB))  # or what the model takes is nothing beside it
    flags = flags_for(base, tmp_path / "run", dry_run_gib=0.61, per_device_train_batch_size=20, pack_tokens=4096)
    text = told(capsys, monkeypatch, flags)
    (verdict,) = [line.strip() for line in text.splitlines() if "DOES NOT FIT" in line]
    assert verdict.startswith("DOES NOT FIT: needs about 0.") and "the device has 0.6: try " in verdict
    assert "--gradient_checkpointing True (" in verdict and "--pack_tokens" in verdict
    assert "DOES NOT FIT" not in told(capsys, monkeypatch, flags_for(base, tmp_path / "run", dry_run_gib=24))


def test_remedies_do_what_they_say(base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(forecast, "CONTEXT", int(0.6 * GIB))
    cfg = parse(SFT, flags_for(base, tmp_path / "run", dry_run=True, dry_run_gib=0.61, per_device_train_batch_size=20))
    records, device = read_records(cfg.data_path), forecast.Device.here(cfg)

    def planned(cfg):
        model, folder, _ = forecast.shape_of(cfg, device.number)
        processor = Processor(load_tokenizer(folder), model.config, cfg)
        return forecast.Forecast(cfg, model, processor, records, Loader(records, processor, cfg), [], device, 100)

    for flags, size in planned(cfg).remedies():
        options = dict(zip(flags.split()[::2], flags.split()[1::2]))
        more = {name.removeprefix("--"): value for name, value in options.items()}
        given = dict(dry_run=True, dry_run_gib=0.61, per_device_train_batch_size=20) | more
        found = planned(parse(SFT, flags_for(base, tmp_path / "run", **given)))
        assert total(peak(found.moments)[1]) == size < total(peak(planned(cfg).moments)[1])


def test_flags_without_effect(base, tmp_path, capsys, monkeypatch):  # noqa: F811
    (tmp_path / "ds.json").write_text('{"train_batch_size": 4, "zero_optimization": {"reduce_bucket_size": 1000}}')
    given = dict(image_max_pixels=784, tf32=True, pack_tokens=50, deepspeed=tmp_path / "ds.json", eval_steps=7)
    text = told(capsys, monkeypatch, flags_for(base, tmp_path / "run", **given))
    for line in (
        "--image_max_pixels has no effect: there is no image in the data",
        "--tf32 has no effect: it is for fp32 on a GPU",
        "--eval_steps has no effect: eval_data_path is none: nothing is evaluated",
        "--pack_tokens 50: the longest sample has",
        "train_batch_size has no effect: see --per_device_train_batch_size",
    ):
        assert line in text, text
    assert "all have an effect" in told(capsys, monkeypatch, flags_for(base, tmp_path / "run", learning_rate=1e-3))
    cfg = parse(SFT, ["--lr_scheduler_type", "constant", "--min_lr_ratio", "0.1", "--dry_run_gib", "24"])
    assert [line.split()[0] for line in ignored_options(cfg)] == ["--dry_run_gib", "--min_lr_ratio"]
    (tmp_path / "three.json").write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(UserError, match="stage is not 1 or 2"):
        told(capsys, monkeypatch, flags_for(base, tmp_path / "run", deepspeed=tmp_path / "three.json"))


def test_cuda_graphs_are_told_where_there_will_be_some(base, tmp_path, capsys, monkeypatch):  # noqa: F811
    graphs = lambda text: [line.strip() for line in text.splitlines() if "CUDA graphs" in line]
    flags = flags_for(base, tmp_path / "run", dry_run_gib=24)
    (line,) = graphs(told(capsys, monkeypatch, flags))
    start = "CUDA graphs keep about 0."
    assert line.startswith(start) and "of the vision tower" in line and "of the language model" in line, line
    group = [*flags, "--data_path", str(base / "data/train.json"), "--model_ckpt", "none"]
    (line,) = graphs(told(capsys, monkeypatch, group, train_grpo))
    assert line.startswith(start), line
    (line,) = graphs(told(capsys, monkeypatch, flags_for(base, tmp_path / "run", dry_run_gib=0.05)))
    assert line == "CUDA graphs: none, no pass is small enough for what is left of the device"
    assert not graphs(told(capsys, monkeypatch, [*flags, "--cuda_graphs", "False"]))
    assert not graphs(told(capsys, monkeypatch, flags_for(base, tmp_path / "run")))  # a CPU has none


def test_where_memory_is_short_decoding_is_slow(base, tmp_path, monkeypatch):  # noqa: F811
    given = dict(dry_run=True, dry_run_gib=24, eval_data_path=base / "data/val.json")
    cfg = parse(SFT, flags_for(base, tmp_path / "run", **given))
    records, device = read_records(cfg.data_path), forecast.Device.here(cfg)
    model, folder, _ = forecast.shape_of(cfg, device.number)
    processor = Processor(load_tokenizer(folder), model.config, cfg)
    held = read_records(cfg.eval_data_path)
    made = forecast.Forecast(cfg, model, processor, records, Loader(records, processor, cfg), held, device, 100)
    assert made.fitted(made.moments)[1] is False
    made.device = device._replace(free=GIB // 4)  # less than fast_decode's margin
    moments, slow = made.fitted(made.moments)
    assert slow and moments["evaluation: drawing"]["sampling copy"] == 0
