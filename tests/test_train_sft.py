"""SFT on a tiny random checkpoint: the update, resuming, checkpoints, signals, the original project's command."""

import json
import os
import re
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import runs
import torch
from conftest import refused
from runs import apart, base, column, cut, lines, release_run, same_files, sft, steps_saved, whole  # noqa: F401 (fixtures)

import console
import startup
import train_sft
import trainer
from checkpoint import append_lines, find_adapter, newest_checkpoint, read_json, rotate, what_is_broken
from config import SFT
from engine import deepspeed_config
from model import UserError
from model.loading import load_model
from trainer import Run, lr_factor

# ruff: noqa: F811 (fixtures are imported by name)


def test_two_ranks_times_accumulation_two_equal_one_big_batch_and_go_on_on_one(sft, base, whole, tmp_path):
    """Two processes x accumulation 2 x 2 samples; one rank may have no clip."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3}
    two = runs.two_ranks(train_sft, base, tmp_path / "two", **options)
    names = "loss", "token_accuracy", "grad_norm", "answer_tokens"
    for mine, theirs in zip(column(whole, *names), column(two, *names), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert apart(whole / "checkpoint-5", two / "checkpoint-5") < 1e-5
    cut(two, "on", 5)
    with pytest.raises(UserError, match="that run had 8 samples .* a step, 2 x 2 x 1 ranks make 4; change --gradient"):
        sft("on", resume=True, **options)
    release_run()
    on = sft("on", resume=True, **(options | {"gradient_accumulation_steps": 4}))
    assert column(on, "step") == [1, 2, 3, 4, 5]
    assert apart(on / "checkpoint-5", two / "checkpoint-5") < 1e-5


def test_packing_by_tokens_gives_the_same_update(sft, whole):
    assert column(sft("packed", pack_tokens=400), "loss") == pytest.approx(column(whole, "loss"), abs=1e-5)


@pytest.mark.parametrize("options", [
    {"lora_enable": False, "freeze_llm": False, "freeze_vision_tower": False, "tune_merger": True},
    {"llm_lora": False, "vision_lora": False, "tune_merger": True},
    {"bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-2, "max_steps": 3},
], ids=["full", "merger only", "bf16 recomputed"])  # fmt: skip
def test_every_way_of_training_lowers_the_loss_and_loads_again(sft, base, options, capsys):
    folder = sft("run", **options, save_total_limit=1)
    losses, last = column(folder, "loss"), newest_checkpoint(folder)
    assert losses[-1] < losses[0]
    if "bf16" in options:
        assert find_adapter(folder) == last
        return
    assert f"--model_id {last} --model_ckpt none" in capsys.readouterr().out
    trained, before = (load_model(p).state_dict() for p in (last, base / "tiny"))
    changed = {name for name in trained if not torch.equal(trained[name], before[name])}
    merger = {name for name in trained if name.startswith("visual.merger.")}
    assert changed == (merger if options.get("freeze_llm", True) else set(trained))
    assert (last / "tokenizer.json").exists()


def test_the_schedule():
    cosine = partial(lr_factor, total=10, kind="cosine", warmup=2, floor=0.1)
    assert [cosine(0), cosine(1), cosine(2)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert cosine(6) == pytest.approx(0.55) and cosine(10) == pytest.approx(0.1)  # half of the way down; the end
    assert [lr_factor(step, 4, "linear") for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert [lr_factor(step, 4, "constant", warmup=1) for step in range(4)] == [0.5, 1, 1, 1]


def test_a_deepspeed_file_overrides_ours_and_says_what_has_no_effect(sft, tmp_path):
    path = tmp_path / "zero2.json"
    zero = {"stage": 2, "reduce_bucket_size": "auto", "offload_param": {"device": "cpu"}, "allgather_bucket_size": 4096}
    more = {"gradient_cliping": 1, "gradient_clipping": 0.5, "optimizer": {}, "train_batch_size": "auto"}
    path.write_text(json.dumps({"zero_optimization": zero, **more}))
    settle = partial(deepspeed_config, SFT(deepspeed=str(path)), torch.device("cpu"), torch.float32, 1, 1000)
    start = partial(sft, "run", deepspeed=path)
    config, notes = settle()
    assert config["zero_optimization"]["allgather_bucket_size"] == 4096
    assert config["zero_optimization"]["reduce_bucket_size"] == 2024
    words = [note.split(" has")[0].split()[-1] for note in notes[:-1]]
    assert words == ["offload_param", "gradient_cliping", "optimizer"]
    assert notes[-1] == f"--max_grad_norm has no effect: {path} says 0.5"
    for function, text, words in (
        (settle, '{"zero_optimization": {"stage": 3}}', "stage"),
        (settle, '{"bf16": {"enabled": true}}', "bf16.enabled is true in a torch.float32 run; write auto there, and "),
        (settle, '{"zero_optimization": 2}', "zero_optimization is 2, expected an object"),
        (settle, "{", "expected JSON"),
        (start, '{"zero_optimization": {"reduce_bucket": 3}}', "zero2.json: reduce_bucket: Extra inputs are not perm"),
    ):
        path.write_text(text)
        assert words in refused(function)


# -- Resuming


def test_resume_goes_on_bit_for_bit(sft, base):
    """Adapters of the language model alone, with dropout: its random numbers go on too. Of two files with weights, into
    the second epoch."""
    names = "step", "loss", "token_accuracy", "grad_norm", "lr", "epoch"
    options = {"vision_lora": False, "merger_lora": False, "vision_lr": 1e-4, "lora_dropout": 0.1, "save_steps": 2}
    options |= {"data_path": f"{base}/data/few.json:2,{base}/data/mixed.json:0.3"}
    whole = sft("whole", **options)
    broken = cut(whole, "broken", 4, 5)
    (broken / "metrics.jsonl").open("a").write('{"step": 8, "lo')  # killed while it wrote
    sft("broken", **options, resume=True)
    assert column(broken, *names) == column(whole, *names) and column(whole, "epoch")[-1] == 5 / 3
    assert same_files(whole, broken, 5)


def test_a_broken_checkpoint_and_a_changed_dataset_are_named_on_resume(sft, base, whole, tmp_path, capfd):
    folder = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    data = tmp_path / "mixed.json"
    (folder / "checkpoint-5/optimizer-00000.safetensors").unlink()
    damaged = folder / "checkpoint-4/optimizer-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8] + b"12345678")
    (folder / "checkpoint-1/trainer_state.json").write_text("")
    assert "is missing" in what_is_broken(folder / "checkpoint-5")
    assert newest_checkpoint(folder) == folder / "checkpoint-3"
    assert "SHA-256" in capfd.readouterr().err
    sft("run", resume=True, max_steps=3)  # it is at its end
    assert (folder / "adapter_config.json").resolve() == (folder / "checkpoint-3/adapter_config.json").resolve()
    sft("run", save_steps=1, save_total_limit="none", resume=True)
    assert column(folder, "loss") == column(whole, "loss") and what_is_broken(folder / "checkpoint-5") is None
    assert "was changed" not in capfd.readouterr().out
    data.write_bytes((base / "data/mixed.json").read_bytes())
    options = {"data_path": data, "image_folder": base / "data/videos", "max_steps": 1}
    sft("other", **options)
    data.write_text(json.dumps(json.loads(data.read_text())[::-1]))
    sft("other", **options, resume=True)
    assert "mixed.json was changed since that run" in capfd.readouterr().out


def test_after_a_signal_the_resumed_run_makes_up_for_all(sft, base, tmp_path, monkeypatch, capsys):
    """SIGTERM at a step whose evaluation is due; the resumed run makes it and is killed before it saves."""

    def stop_at_three(run, step, *rest, check=trainer.check_numbers):
        check(run, step, *rest)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"eval_data_path": base / "data/val.json", "eval_steps": 3, "max_new_tokens": 4, "eval_controls": 0}
    whole, folder = sft("whole", **options), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "check_numbers", stop_at_three)
        with pytest.raises(SystemExit) as stopped:
            sft("run", **options)
    assert stopped.value.code == 143 and steps_saved(folder) == [3]
    assert f"next    python train_sft.py --resume --output_dir {folder}\n" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save", lambda *args: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            sft("run", **options, resume=True)
    release_run()
    sft("run", **options, resume=True)
    for name in ("eval_accuracy", "loss"):
        assert column(folder, name, "step") == column(whole, name, "step")
    assert lines(folder, "rollouts.jsonl") == lines(whole, "rollouts.jsonl") and lines(folder, "rollouts.jsonl")
    assert steps_saved(folder) == steps_saved(whole)


# -- Folders


def test_a_folder_that_is_taken_is_refused_then_overwritten(sft, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    assert re.search("already holds a run; --resume goes on .*--overwrite", refused(sft, "run"))
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    sft("run", overwrite=True, max_steps=1, model_ckpt=folder / "checkpoint-2")  # it starts from what it overwrites
    assert steps_saved(folder) == [1] and column(folder, "step") == [1]
    start, given = (path / "adapter_model.safetensors" for path in (folder / "start_adapter", whole / "checkpoint-2"))
    assert start.read_bytes() == given.read_bytes() and column(folder, "loss")[0] < column(whole, "loss")[0]
    sft("run", resume=True, dry_run=True)  # checkpoint-2 is gone, its copy is there
    bad = '{"video": "gone.mp4", "problem": "Which way?", "solution": "up"}'
    (tmp_path / "bad.json").write_text(f'[{bad}, {{"problem": "Up?", "solution": "up"}}]')
    for name in ("run", "refused"):  # nothing is lost, and nothing stands in the way
        with pytest.raises(UserError, match="1 of 2 samples are broken.*sample 0"):
            sft(name, overwrite=name == "run", data_path=tmp_path / "bad.json")
        release_run()
    assert steps_saved(folder) == [1]
    startup.claim(tmp_path / "refused", SFT()).close()
    for theirs in ("a/checkpoint-500", "b/adapter_config.json"):
        (tmp_path / theirs).mkdir(parents=True)
        with pytest.raises(UserError, match="no run.json: another program's, or .*; --overwrite"):
            startup.claim((tmp_path / theirs).parent, SFT(resume=True))
    first = startup.claim(tmp_path / "new", SFT())
    assert "another process" in refused(startup.claim, tmp_path / "new", SFT(resume=True))
    first.close()
    startup.claim(tmp_path / "new", SFT())


def test_the_best_checkpoint_stays_beside_the_newest(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "best.json").write_text('{"step": 2, "accuracy": 0.5}')
    for limit, left in ((None, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (1, [2, 5])):
        rotate(folder, limit)
        assert steps_saved(folder) == left


def test_find_adapter_names_what_is_there(base, whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "output/run")
    monkeypatch.chdir(tmp_path)
    assert find_adapter("", script="train_grpo") is None
    theirs = shutil.copytree(folder / "checkpoint-5", tmp_path / "theirs")  # as other trainers leave it
    shutil.copytree(folder / "checkpoint-1", theirs / "checkpoint-1")
    assert find_adapter(theirs) == theirs
    assert re.search("checkpoint-19: no such folder.*checkpoint-1", refused(find_adapter, folder / "checkpoint-19"))
    assert re.search("whole model.*--model_id", refused(find_adapter, base / "tiny"))


# -- What a run says


def test_answers_are_generated_and_judged_and_the_data_is_summed_up(sft, base, capsys):
    options = {"max_steps": 2, "eval_data_path": base / "data/val.json", "max_new_tokens": 12, "eval_steps": 1}
    folder = sft("run", **options, eval_controls=3)
    assert [count for _, count in column(folder, "eval_accuracy", "eval_count")] == [4, 4]
    best = folder / f"checkpoint-{read_json(folder / 'best.json')['step']}"
    assert find_adapter(folder) == (folder / "adapter_model.safetensors").resolve().parent == best
    early, late = column(folder, "evaluation")
    assert "controls" not in early and list(late["controls"]) == ["reversed", "shuffled", "blank"]
    assert capsys.readouterr().out.count("% of 3") == 3
    rows = lines(folder, "rollouts.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, k) for step in (1, 2) for k in range(4)]
    assert all(len(row["tokens"]) == len(row["logprobs"]) == row["n_tokens"] > 0 for row in rows)
    assert "before and after" in (folder / "report.html").read_text()
    assert [read_json(folder / "data.json")[name]["samples"] for name in ("train", "held out")] == [20, 4]


def test_the_flags_of_the_seeds_command(sft, base, tmp_path, capfd):
    """Its SFT command with our paths; two of its flags (bf16, output_dir) are as given."""
    zero2 = {"bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}
    zero2["zero_optimization"] = {"stage": 2, "offload_param": {"device": "cpu"}, "overlap_comm": False}
    (tmp_path / "zero2_offload.json").write_text(json.dumps(zero2))
    paths = {"deepspeed": tmp_path / "zero2_offload.json", "data_path": base / "data/train.json"}
    paths |= {"image_folder": base / "data/videos"}
    folder = sft("video_lora", **runs.seeds_options("SFT") | {"report_to": "none"}, **paths, max_steps=-1)
    assert column(folder, "step")[-1] == 4 and steps_saved(folder) == [4]  # 16 clips, 5 a step
    config = json.loads((folder / "checkpoint-4/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (64, 64)
    shown = capfd.readouterr().out
    for words in ("bfloat16", "--use_liger has no effect", "offload_param has no effect", "learning_rate=0.0002"):
        assert words in shown, shown


def test_warnings_stand_out_on_a_terminal_unless_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.highlight("warning") == "warning"  # into a file
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    assert console.highlight("warning") == "\033[33mwarning\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.highlight("warning") == "warning"


@pytest.mark.parametrize("script, start, last, number, words", [
    ("train_sft", None, 0.9, 0, ["loss 5 in the first step, 0.25 in the last; accuracy 90.0%", "infer.py"]),
    ("train_grpo", 0.5, 0.9, 0, ["50.0% at the start, 90.0% in the last evaluation; best 90.0% at step 2", "infer.py"]),
    ("train_sft", None, None, signal.SIGTERM, ["stopped by SIGTERM", "train_sft.py --resume"]),
])  # fmt: skip
def test_a_run_ends_with_its_result(tmp_path, capsys, monkeypatch, script, start, last, number, words):
    run = Run(SFT(), script, tmp_path, torch.device("cpu"), None, total=2, next_command="python infer.py clip.mp4")
    log = trainer.Log(run, [])
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: 1e9)  # an evaluation has passed: no part of a step
    log.step(1, {}, 5.0, 0.0, 10)
    run.compare(start)
    run.step = 2
    assert run.compare(last)[1] == (", the best checkpoint so far" if last else "")
    run.total = 1  # a resumed run's --max_steps
    trainer.before_first_step(run, None, None)
    assert re.search("left 0:00:05\n(?s:.*)all 1 steps are done: nothing is left to do", capsys.readouterr().out)
    append_lines(tmp_path / "metrics.jsonl", [{"step": k, "loss": v, "reward": v} for k, v in ((1, 5.0), (2, 0.25))])
    append_lines(tmp_path / "rollouts.jsonl", [{"completion": "x" * 2_000_000}])
    text = "\n".join(console.closing_lines(run, number))
    for word in [*words, str(tmp_path / "report.html"), "rollouts.jsonl has 2,000 kB"]:
        assert word in text, text
    (tmp_path / "metrics.jsonl").unlink()
    run.next_command = ""  # of text alone
    assert "result" in "\n".join(console.closing_lines(run, number)) and len([*console.closing_lines(run, 0)]) == 3
