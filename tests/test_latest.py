"""The first hour: four commands take clips of one's own through, each names the next; what was made last is meant."""

import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import refused, write

import clips
import generate
import infer
import train_grpo
import train_sft
from config import GRPO, SFT, Infer, parse
from latest import follow
from model import UserError

SHORT = "--nframes 4 --eval_samples 8 --eval_controls 0 --max_new_tokens 8"
REWARD = "def even(text, sample):\n    return float(len(text) % 2 == 0)\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(name, age=0, **content):
    """A file of JSON, so many seconds old."""
    path = write(Path(name), content)
    os.utime(path, (0, path.stat().st_mtime - age))


def test_clips_of_ones_own_in_four_commands(monkeypatch, capfd):
    """From a folder with spaces and umlauts, without a flag for what was made: dataset, run, adapter."""
    for label, direction in {"Ball fällt": "Falling Down", "Ball steigt": "Ascending"}.items():
        for i in range(6):
            clip = clips.draw_clip(np.random.default_rng(i), direction, 64, 12)
            clips.write_mp4(write(Path("Meine Clips") / label / f"{i}.mp4", ""), clips.render(clip))
    Path("my_rewards.py").write_text(REWARD)
    with pytest.raises(UserError, match="python generate.py --num_samples 1400.*--from_folder DIR"):
        follow(parse(SFT, []))

    def type_in(command, flags=""):
        """Run it; what it printed, and the command that its last line names."""
        python, file, *words = shlex.split(command)
        modules = {"generate": generate, "train_sft": train_sft, "train_grpo": train_grpo, "infer": infer}
        script = modules[Path(file).stem]
        assert python == "python" and Path(file).resolve() == Path(script.__file__)
        monkeypatch.setattr(sys, "argv", [file, *words, *flags.split()])
        script.main()
        out = capfd.readouterr().out
        return out, out.strip().splitlines()[-1].partition("next")[2].strip(" :")

    scripts = os.path.relpath(Path(generate.__file__).parent)
    _, command = type_in(f"python {scripts}/generate.py --from_folder 'Meine Clips'", "--workers 1")
    assert command == f"python {scripts}/train_sft.py"
    out, command = type_in(command, f"--max_steps 2 {SHORT}")
    assert f"--data_path {Path('data/Meine Clips/train.json')}, the dataset made last" in out
    assert "output/Meine Clips_lora: step 2 of 2" in out
    schedule = "cosine: 2 steps, 1 of them warm-up; learning rate 0.003 at its peak, 0.00015 at the end"
    assert f"  schedule   {schedule}\n" in out
    assert command.startswith(f"python {scripts}/infer.py 'Meine Clips/") and Path(shlex.split(command)[2]).is_file()
    out, command = type_in(command)
    assert f"adapter {Path('output/Meine Clips_lora')}/checkpoint-2" in out and "What does the video show?" in out
    assert command == f"python {scripts}/train_grpo.py"
    flags = f"--max_steps 1 --per_device_train_batch_size 16 --max_completion_length 8 {SHORT}"
    out, command = type_in(f"{command} --rewards my_rewards.py:even", flags)
    assert "--model_ckpt output/Meine Clips_lora/checkpoint-2, of the run made last" in out
    assert command.startswith(f"python {scripts}/infer.py 'Meine Clips/")
    assert "output/grpo_Meine Clips_lora: step 1 of 1" in out


def test_grpo_takes_the_adapter_its_base_and_its_data(monkeypatch):
    made("base/config.json", hidden_size=2048)  # a 3B
    made("output/run/run.json", script="train_sft")
    made("output/run/checkpoint-3/trainer_state.json", config={"data_path": "data/old/train.json"})
    made("output/run/checkpoint-3/adapter_config.json", base_model_name_or_path="base", base_dtype="nf4")
    made("data/new/train.json")
    monkeypatch.setattr("checkpoint.what_is_broken", lambda folder: None)
    cfg = follow(parse(GRPO, []))
    assert (cfg.model_ckpt, cfg.model_id) == ("output/run/checkpoint-3", "base")
    assert (cfg.data_path, cfg.output_dir) == ("data/old/train.json", "output/grpo_old_lora")
    assert (cfg.learning_rate, cfg.dataloader_num_workers, cfg.base_dtype) == (1e-5, 8, "nf4")  # of a 3B
    assert follow(parse(GRPO, ["--base_dtype", "bf16"])).base_dtype == "bf16"
    made("base/config.json", hidden_size=5120)  # a 32B, whose own formats are nf4 and int8
    made("output/run/checkpoint-3/adapter_config.json", base_model_name_or_path="base", base_dtype="int8")
    for flags in ([], ["--model_id", "base"]):
        cfg = follow(parse(GRPO, flags))
        assert (cfg.base_dtype, cfg.head_dtype, cfg.offload_embedding) == ("int8", "bf16", True)
    assert follow(parse(GRPO, ["--model_ckpt", "output/run"])).model_id == "base"
    assert "was made for base; give --model_ckpt" in refused(follow, parse(GRPO, ["--model_id", "assets/tiny"]))
    for flags in (["--model_ckpt", "none", "--model_id", "a"], ["--lora_enable", "False", "--freeze_llm", "False"]):
        cfg = follow(parse(GRPO, [*flags]))
        assert cfg.data_path == "data/new/train.json" and "output/run" not in " ".join(cfg.notes)


def test_a_resumed_run_has_its_own_options_and_keeps_what_it_trains(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_sft.py"])
    theirs = {"data_path": "a.json", "max_steps": 7, "lora_rank": 8, "fps": 1.0, "nframes": None, "model_ckpt": "a"}
    made("output/mine_lora/run.json", 9, script="train_sft", config=theirs)
    made("output/grpo_mine_lora/run.json", script="train_grpo", config={})
    cfg = follow(parse(SFT, ["--resume", "--max_steps", "9", "--lora_rank", "8", "--model_ckpt", "b"]))
    assert (cfg.output_dir, cfg.data_path, cfg.max_steps, cfg.lora_rank) == ("output/mine_lora", "a.json", 9, 8)
    assert (cfg.fps, cfg.nframes, cfg.model_ckpt) == (1.0, None, "a")
    assert "--model_ckpt has no effect" in " ".join(cfg.notes)
    made("base/config.json", hidden_size=5120)  # its head_dtype is no run's that has none
    assert follow(parse(SFT, ["--resume", "--model_id", "base"])).head_dtype == "bf16"
    note = "--resume: no run in output/mein_lora, a new one begins; did you mean output/mine_lora?"
    assert note in follow(parse(SFT, ["--resume", "--output_dir", "output/mein_lora", "--data_path", "a.json"])).notes
    for flags, message in (
        (["--lora_rank", "4"], "--lora_rank: got 4, expected 8 as in output/mine_lora: a resumed run"),
        (["--output_dir", "output/grpo_mine_lora"], "--resume: output/grpo_mine_lora is a run of train_grpo.py, not "),
    ):
        assert message in refused(follow, parse(SFT, ["--resume", *flags]))


FULL = dict(base_dtype="bf16", head_dtype="bf16", offload_embedding=False, adam_beta2=0.999)


@pytest.mark.parametrize(("model", "argv", "expected"), [
    (2048, "", dict(lora_rank=64, learning_rate=2e-4, per_device_train_batch_size=8, nframes=None, fps=2.0)),
    (2048, "--lora_rank 8 --nframes 16", dict(lora_rank=8, learning_rate=2e-4, nframes=16)),
    (5120, "", dict(lora_rank=16, per_device_train_batch_size=2, eval_data_path=None, base_dtype="nf4")),
    (5120, "--freeze_llm False --llm_lora False", FULL),
    (5120, "--lora_enable False --freeze_vision_tower False", FULL),
    (256, "", dict(lora_rank=16, learning_rate=3e-3, nframes=8)),
    ("Qwen/Qwen2.5-VL-3B-Instruct", "--fps 1", dict(lora_rank=64, fps=1.0, nframes=None)),
])  # fmt: skip
def test_defaults_follow_the_model(tmp_path, model, argv, expected):
    """By the hidden size in config.json, or by a hub id's name; what is given wins, and what was chosen is said."""
    if isinstance(model, int):
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": model}}))
    name = str(tmp_path) if isinstance(model, int) else model
    cfg = parse(SFT, ["--model_id", name, *argv.split()])
    assert {option: getattr(cfg, option) for option in expected} == expected
    assert parse(Infer, ["--model_id", name]).base_dtype == "auto"
    chosen = " ".join(note for note in cfg.notes if note.startswith("chosen by the model, as in configs/"))
    assert bool(chosen) == (expected["learning_rate"] != 3e-3 if "learning_rate" in expected else True)
    assert not any(f" {option} " in chosen for option in cfg.given)
