"""SFT on a tiny random checkpoint: the update, resuming, checkpoints, signals, the original project's command."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from runs import ROOT, base, column, flags_for, lines, release_run, sft, steps_saved, two_ranks, weights  # noqa: F401 (fixtures)
from safetensors.torch import load_file

import evaluate
import startup
import train_sft
import trainer
from checkpoint import find_adapter, newest_checkpoint, what_is_broken
from config import SFT
from engine import deepspeed_config
from evaluate import Evaluation, Judged
from model import UserError
from model.loading import load_model
from trainer import lr_factor

# ruff: noqa: F811 (fixtures are imported by name)


@pytest.fixture(scope="session")
def on_two_ranks(base):
    """A run of two processes x accumulation 2 x 2 samples; one rank may have no clip."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3}
    done = two_ranks(train_sft, base, base / "two", **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return base / "two"


def test_two_ranks_times_accumulation_two_equals_one_big_batch(sft, on_two_ranks):
    one = sft("one", save_steps=3)
    names = "loss", "token_accuracy", "grad_norm", "answer_tokens"
    for mine, theirs in zip(column(one, *names), column(on_two_ranks, *names), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    mine, theirs = weights(one / "checkpoint-5"), weights(on_two_ranks / "checkpoint-5")
    assert mine.keys() == theirs.keys() and len(mine) == 5
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-5, rtol=0, msg=name)


def test_a_run_saved_on_two_ranks_goes_on_on_one(sft, on_two_ranks, tmp_path):
    shutil.copytree(on_two_ranks, tmp_path / "on")
    shutil.rmtree(tmp_path / "on/checkpoint-5")
    on = sft("on", resume=True, per_device_train_batch_size=2, gradient_accumulation_steps=4, save_steps=3)
    assert column(on, "step") == [1, 2, 3, 4, 5]
    mine, theirs = weights(on / "checkpoint-5"), weights(on_two_ranks / "checkpoint-5")
    assert max((mine[name] - theirs[name]).abs().max() for name in mine) < 1e-5


def test_packing_by_tokens_gives_the_same_update(sft):
    whole, packed = sft("whole"), sft("packed", pack_tokens=400)
    assert column(packed, "loss") == pytest.approx(column(whole, "loss"), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_enable": False, "freeze_llm": False, "freeze_vision_tower": False, "tune_merger": True},
        {"lora_enable": False, "tune_merger": True},
        {"vision_lora": False, "merger_lora": False, "vision_lr": 1e-4, "lora_dropout": 0.1},
        {"bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-2},
    ],
    ids=["full", "merger only", "llm adapters", "bf16 recomputed"],
)
def test_every_way_of_training_lowers_the_loss_and_loads_again(sft, base, options):
    folder = sft("run", **options, max_steps=12, save_total_limit=1)
    losses = [loss for loss in column(folder, "loss")]
    assert losses[-1] < losses[0]
    last = newest_checkpoint(folder)
    if options.get("lora_enable", True):
        assert find_adapter(folder) == last
    else:
        trained, before = (load_model(p).state_dict() for p in (last, base / "tiny"))
        changed = {name for name in trained if not torch.equal(trained[name], before[name])}
        merger = {name for name in trained if name.startswith("visual.merger.")}
        assert changed == (set(trained) if not options.get("freeze_llm", True) else merger)
        assert (last / "tokenizer.json").exists()


def test_the_schedule():
    cosine = partial(lr_factor, total=10, kind="cosine", warmup=2, floor=0.1)
    assert [cosine(0), cosine(1), cosine(2)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert cosine(6) == pytest.approx(0.55)  # half of the way down
    assert cosine(10) == pytest.approx(0.1)
    linear = [lr_factor(step, 4, "linear") for step in range(5)]
    assert linear == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert [lr_factor(step, 4, "constant", warmup=1) for step in range(4)] == [0.5, 1, 1, 1]
    assert lr_factor(0, 1, "cosine") == 1.0


def test_a_deepspeed_file_overrides_ours_and_tells_what_has_no_effect(tmp_path):
    path = tmp_path / "zero2.json"
    zero = {"stage": 2, "reduce_bucket_size": "auto", "offload_param": {"device": "cpu"}, "allgather_bucket_size": 4096}
    path.write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto", "optimizer": {"type": "Adam"}}))
    cfg = SFT(deepspeed=str(path))
    config, notes = deepspeed_config(cfg, torch.device("cpu"), torch.float32, 1, 1000)
    assert config["zero_optimization"]["allgather_bucket_size"] == 4096
    assert config["zero_optimization"]["reduce_bucket_size"] == 2024
    assert [note.split(": ")[1].split()[0] for note in notes] == ["offload_param", "optimizer"]
    for text, words in {
        '{"zero_optimization": {"stage": 3}}': "stage",
        '{"bf16": {"enabled": true}}': "bf16.enabled is true in a torch.float32 run; write auto there, and give --bf16",
        '{"gradient_clipping": null}': "gradient_clipping is null, expected a value",
        '{"zero_optimization": 2}': "zero_optimization is 2, expected an object",
        '{"gradient_clipping": {"value": 1}}': "gradient_clipping is .*, expected a value",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            deepspeed_config(cfg, torch.device("cpu"), torch.float32, 1, 1000)


def test_resume_goes_on_bit_for_bit(sft):
    names = "step", "loss", "token_accuracy", "grad_norm", "lr"
    options = {"max_steps": 7, "save_steps": 2, "save_total_limit": "none", "lora_dropout": 0.1}
    whole, broken = sft("whole", **options), sft("broken", **options)
    for step in (6, 7):
        shutil.rmtree(broken / f"checkpoint-{step}")
    (broken / "metrics.jsonl").open("a").write('{"step": 8, "lo')  # killed while it wrote
    sft("broken", **options, resume=True)
    assert column(broken, *names) == column(whole, *names)
    for name in ("optimizer-00000.safetensors", "adapter_model.safetensors"):
        assert (whole / "checkpoint-7" / name).read_bytes() == (broken / "checkpoint-7" / name).read_bytes()


def test_a_dataset_that_was_changed_is_named_on_resume(sft, base, tmp_path, capfd):
    records = json.loads((base / "data/mixed.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(records))
    options = {"data_path": tmp_path / "train.json", "image_folder": base / "data/videos", "save_steps": 2}
    sft("run", **options, max_steps=2)
    sft("run", **options, max_steps=3, resume=True)
    assert "was changed" not in capfd.readouterr().out
    (tmp_path / "train.json").write_text(json.dumps(records[::-1]))
    sft("run", **options, max_steps=4, resume=True)
    assert "train.json was changed since that run" in capfd.readouterr().out


def test_a_broken_checkpoint_is_reported_and_the_one_before_it_taken(sft, capfd):
    options = {"save_steps": 2, "save_total_limit": "none"}
    folder = sft("run", **options)
    before = column(folder, "loss")
    (folder / "checkpoint-5/optimizer-00000.safetensors").unlink()
    damaged = folder / "checkpoint-4/optimizer-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8] + b"12345678")
    assert "is missing" in what_is_broken(folder / "checkpoint-5")
    assert newest_checkpoint(folder) == folder / "checkpoint-2"
    assert "SHA-256" in capfd.readouterr().err
    sft("run", **options, resume=True)
    assert column(folder, "loss") == before and what_is_broken(folder / "checkpoint-5") is None


def stop_at_three(run, step, *rest, check=trainer.check_numbers):
    """trainer.check_numbers, and SIGTERM in step 3."""
    check(run, step, *rest)
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_the_step_writes_a_checkpoint_and_exits_143(sft, base, monkeypatch):
    whole = sft("whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "check_numbers", stop_at_three)
        with pytest.raises(SystemExit) as stopped:
            sft("run")
    folder = whole.with_name("run")
    assert stopped.value.code == 143 and steps_saved(folder) == [3]
    sft("run", resume=True)
    assert column(folder, "loss") == column(whole, "loss")


def test_an_evaluation_that_a_stopped_run_owes_is_logged_once(sft, base, monkeypatch):
    """A signal at a step whose evaluation is due; the resumed run makes it and is killed before it saves."""
    options = {"eval_data_path": base / "data/val.json", "eval_steps": 3, "max_new_tokens": 4, "eval_controls": 0}
    whole = sft("whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "check_numbers", stop_at_three)
        with pytest.raises(SystemExit):
            sft("run", **options)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "seed_step", lambda *args: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            sft("run", **options, resume=True)
    release_run()
    folder = sft("run", **options, resume=True)
    for name in ("eval_accuracy", "loss"):
        assert column(folder, name, "step") == column(whole, name, "step")
    assert lines(folder, "rollouts.jsonl") == lines(whole, "rollouts.jsonl")


def test_a_folder_with_a_run_is_refused_then_overwritten(sft, tmp_path):
    folder = sft("run", max_steps=2, save_steps=1, save_total_limit="none")
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="already holds a run.*--resume or --overwrite"):
        sft("run")
    assert (folder / "metrics.jsonl").read_text() == before
    sft("run", overwrite=True, max_steps=1)
    assert steps_saved(folder) == [1] and column(folder, "step") == [1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/train.json").write_text("[]")
    with pytest.raises(UserError, match="other things .train.json"):
        sft("other")


def test_two_runs_into_one_folder(tmp_path):
    first = startup.claim(tmp_path / "run", SFT())
    with pytest.raises(UserError, match="another process"):
        startup.claim(tmp_path / "run", SFT(resume=True))
    first.close()
    startup.claim(tmp_path / "run", SFT())


def test_save_total_limit_keeps_the_newest_and_the_best(sft, base, monkeypatch):
    scores = iter([2, 6, 4, 5, 1, 3])
    answers = lambda right: {k: Judged("up", "up", 4, k < right) for k in range(10)}
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **more: Evaluation(answers(next(scores)), {}, []))
    val = base / "data/val.json"
    folder = sft(
        "run", max_steps=6, eval_steps=1, save_steps=1, save_total_limit=2, eval_data_path=val, eval_controls=0
    )
    assert steps_saved(folder) == [2, 5, 6]
    assert json.loads((folder / "best.json").read_text()) == {"step": 2, "accuracy": 0.6}
    assert find_adapter(folder) == (folder / "adapter_model.safetensors").resolve().parent == folder / "checkpoint-2"


def test_answers_are_generated_and_judged_on_held_out_clips(sft, base):
    options = {"max_steps": 2, "eval_data_path": base / "data/val.json", "max_new_tokens": 12, "eval_steps": 1}
    folder = sft("run", **options, eval_controls=3)
    assert [count for _, count in column(folder, "eval_accuracy", "eval_count")] == [4, 4]
    assert json.loads((folder / "best.json").read_text())["step"] in (1, 2)
    early, late = column(folder, "evaluation")
    labels = sorted(record["meta"]["label"] for record in json.loads((base / "data/val.json").read_text()))
    for found in (early, late):
        assert sorted(label for label, said in found["confusion"].items() for _ in range(sum(said.values()))) == labels
        assert found["chance"] == 0.25 and found["interval"][0] <= found["accuracy"] <= found["interval"][1]
    assert "controls" not in early and list(late["controls"]) == ["reversed", "shuffled", "blank"]
    assert {control["count"] for control in late["controls"].values()} == {3}
    assert "controls" not in column(sft("without", **options, eval_controls=0), "evaluation")[1]
    rows = lines(folder, "rollouts.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, k) for step in (1, 2) for k in range(4)]
    assert all(len(row["tokens"]) == len(row["logprobs"]) == row["n_tokens"] > 0 for row in rows)
    assert "before and after" in (folder / "report.html").read_text()


def test_the_sheet_of_the_data(sft, base):
    folder = sft("run", max_steps=1, eval_data_path=base / "data/val.json", max_new_tokens=4)
    found = json.loads((folder / "data.json").read_text())
    train, held_out = found["train"], found["held out"]
    assert (train["samples"], held_out["samples"]) == (20, 4) and not train["unreadable"]
    labels = {"Ascending", "Falling Down", "Left to Right", "Right to Left"}
    assert set(held_out["classes"]) == labels and sum(held_out["classes"].values()) == 4
    assert train["classes"] | {label: 4 for label in labels} == train["classes"]  # the texts have others
    assert train["questions"][0] == ["In which direction is the ball moving? Options: [4 options]", 16]
    assert ["Say #.", 4] in train["questions"]
    assert held_out["frames"] == [4, 4, 4] and held_out["seconds"] == [0.4, 0.4, 0.4]  # 12 frames at 30 a second
    assert held_out["sizes"] == {"56 x 56": 4} and held_out["source_sizes"] == {"64 x 64": 4}
    assert held_out["vision_tokens"] == [8, 8, 8] and train["vision_tokens"][0] == 0  # 2 grid steps of 2 x 2
    assert train["tokens"][0] < held_out["tokens"][0] and held_out["answer_tokens"][0] > 0
    assert {example["class"] for example in held_out["examples"]} == labels


def test_a_run_may_be_overwritten_that_holds_the_adapter_it_starts_from(sft):
    folder = sft("run", max_steps=2, save_steps=2)
    adapter = (folder / "checkpoint-2/adapter_model.safetensors").read_bytes()
    sft("run", max_steps=1, overwrite=True, model_ckpt=folder / "checkpoint-2")
    assert (folder / "start_adapter/adapter_model.safetensors").read_bytes() == adapter
    assert steps_saved(folder) == [1]


def test_held_out_answers_that_cannot_be_graded_are_left_out(sft, base, tmp_path, capsys):
    records = json.loads((base / "data/val.json").read_text())
    records[1]["conversations"][1]["value"] = "I cannot say"
    for record in records:
        record["video"] = str(base / "data/videos" / record["video"])
    (tmp_path / "val.json").write_text(json.dumps(records))
    folder = sft("run", max_steps=1, eval_data_path=tmp_path / "val.json", max_new_tokens=4)
    assert column(folder, "eval_count") == [3]
    assert "the answers of 1 of 4 held-out samples cannot be read" in capsys.readouterr().out


def test_find_adapter_names_what_is_there(sft, base, tmp_path, monkeypatch):
    folder = sft("output/run", max_steps=1)
    monkeypatch.chdir(tmp_path)
    assert find_adapter("").resolve() == (folder / "checkpoint-1").resolve()
    assert find_adapter("", besides=folder) is None
    assert find_adapter(folder / "checkpoint-1") == folder / "checkpoint-1"
    with pytest.raises(UserError, match="checkpoint-19: no such folder.*checkpoint-1"):
        find_adapter(folder / "checkpoint-19")
    with pytest.raises(UserError, match="whole model.*--model_id"):
        find_adapter(base / "tiny")


def test_a_run_goes_on_from_an_adapter_and_keeps_it(sft):
    first = sft("first", max_steps=3)
    second = sft("second", model_ckpt=first, max_steps=2)
    assert column(second, "loss")[0] < column(first, "loss")[0]
    folders = second / "start_adapter", first / "checkpoint-3"
    start, end = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(start[name], end[name]) for name in end)


def test_the_flags_of_the_seeds_command(sft, base, tmp_path, capfd):
    """Its SFT command with our paths; two of its flags (bf16, output_dir) are as given."""
    zero2 = {"bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}
    zero2["zero_optimization"] = {"stage": 2, "offload_param": {"device": "cpu"}, "overlap_comm": False}
    (tmp_path / "zero2_offload.json").write_text(json.dumps(zero2))
    folder = sft(
        "video_lora", use_liger=True, deepspeed=tmp_path / "zero2_offload.json", data_path=base / "data/train.json",
        image_folder=base / "data/videos", remove_unused_columns=False, freeze_vision_tower=True, freeze_llm=True,
        tune_merger=False, bf16=True, lora_enable=True, vision_lora=True, lora_rank=64, lora_alpha=64,
        lora_dropout=0.05, num_lora_modules=-1, lora_namespan_exclude="['lm_head','embed_tokens']",
        disable_flash_attn2=True, num_train_epochs=1, max_steps=-1, per_device_train_batch_size=1,
        gradient_accumulation_steps=5, video_max_pixels=4096, fps=1, learning_rate=2e-4, weight_decay=0.0,
        warmup_ratio=0.03, lr_scheduler_type="cosine", logging_steps=1, tf32=True, gradient_checkpointing=True,
        report_to="none", lazy_preprocess=True, save_strategy="steps", save_steps=5, save_total_limit=2,
        dataloader_num_workers=2,
    )  # fmt: skip
    assert column(folder, "step")[-1] == 4 and steps_saved(folder) == [4]  # 16 clips, 5 a step
    config = json.loads((folder / "checkpoint-4/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (64, 64)
    shown = capfd.readouterr().out
    for words in ("bfloat16", "--use_liger has no effect", "offload_param has no effect", "learning_rate=0.0002"):
        assert words in shown, shown


def test_bad_input_is_one_line_and_exit_code_2(base, tmp_path):
    flags = flags_for(train_sft, base, tmp_path / "run", data_path=tmp_path / "none.json")
    command = [sys.executable, "train_sft.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "none.json" in done.stderr
