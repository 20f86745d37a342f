"""Options: the commands people already have must keep their meaning, and a slip must be told, not swallowed."""

import shlex
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

import config
from cli import REMOVED, build_parser
from config import GRPO, SFT, Generate, Infer, changed, cli, ignored_options, parse
from model import UserError

ROOT = Path(__file__).resolve().parents[1]

GENERATE = """--output_dir ./data/synthetic_videos --num_samples 20 --cot --frame_size 64 --video_length 30 --split 0.8
    --augment_prob 0.2 --augment blur,crop"""
TRAIN = """--use_liger True --deepspeed ./scripts/zero2_offload.json --model_id Qwen/Qwen2.5-VL-3B-Instruct
    --data_path ./data/synthetic_videos/train.json --image_folder ./data/synthetic_videos/videos
    --remove_unused_columns False --freeze_vision_tower True --freeze_llm True --tune_merger False --bf16 True
    --lora_enable True --vision_lora True --lora_rank 64 --lora_alpha 64 --lora_dropout 0.05 --num_lora_modules -1
    --lora_namespan_exclude "['lm_head','embed_tokens']" --disable_flash_attn2 True --output_dir output/video_lora
    --num_train_epochs 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 5 --video_max_pixels 4096
    --fps 1 --learning_rate 2e-4 --weight_decay 0.0 --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1
    --tf32 True --gradient_checkpointing True --report_to wandb --lazy_preprocess True --save_strategy "steps"
    --save_steps 5 --save_total_limit 2 --dataloader_num_workers 2"""
RL = """--model_id Qwen/Qwen2.5-VL-3B-Instruct --model_ckpt ./output/video_lora/checkpoint-19
    --data_path ./data/synthetic_videos/train.json --image_folder ./data/synthetic_videos/videos
    --output_dir output/grpo_video_lora --per_device_train_batch_size 8 --gradient_accumulation_steps 1
    --num_train_epochs 1 --learning_rate 2e-4 --disable_flash_attn2 True --bf16 True --fp16 False --freeze_llm True
    --freeze_vision_tower True --tune_merger False --lora_enable True --vision_lora True --lora_rank 64
    --lora_alpha 64 --lora_dropout 0.05 --num_lora_modules -1 --lora_namespan_exclude "['lm_head','embed_tokens']"
    --gradient_checkpointing True --logging_steps 1 --dataloader_num_workers 2"""
DEMO = r"""--model_ckpt ./output/video_lora/checkcheckpoint-25 --base_model Qwen/Qwen2.5-VL-3B-Instruct
    --video_path ./data/synthetic_videos/videos/000.mp4
    --prompt "In which direction is the ball moving?\nOptions:\n(A) Left to Right\n(B) Right to Left\n"""
DEMO += r"""(C) Falling Down\n(D) Ascending" --fps 1.0"""


def expect(cls, command, **values):
    cfg = parse(cls, shlex.split(command))
    assert {name: getattr(cfg, name) for name in values} == values
    for name, value in values.items():
        assert type(getattr(cfg, name)) is type(value), name
    assert cfg.given == set(values) - {"nframes"}  # nframes is only moved aside by --fps
    return cfg


def test_generate_command():
    expect(
        Generate,
        GENERATE,
        output_dir="./data/synthetic_videos",
        num_samples=20,
        cot=True,
        frame_size=64,
        video_length=30,
        split=0.8,
        augment_prob=0.2,
        augment="blur,crop",
    )


LORA = {
    "freeze_vision_tower": True,
    "freeze_llm": True,
    "tune_merger": False,
    "lora_enable": True,
    "vision_lora": True,
    "lora_rank": 64,
    "lora_alpha": 64.0,
    "lora_dropout": 0.05,
    "num_lora_modules": -1,
    "lora_namespan_exclude": ["lm_head", "embed_tokens"],
    "disable_flash_attn2": True,
    "bf16": True,
    "gradient_checkpointing": True,
    "model_id": "Qwen/Qwen2.5-VL-3B-Instruct",
    "data_path": "./data/synthetic_videos/train.json",
    "image_folder": "./data/synthetic_videos/videos",
    "num_train_epochs": 1.0,
    "learning_rate": 2e-4,
    "logging_steps": 1,
    "dataloader_num_workers": 2,
}


def test_sft_command():
    cfg = expect(
        SFT,
        TRAIN,
        **LORA,
        use_liger=True,
        deepspeed="./scripts/zero2_offload.json",
        remove_unused_columns=False,
        output_dir="output/video_lora",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=5,
        video_max_pixels=4096,
        fps=1.0,
        nframes=None,  # a given fps beats the default number of frames
        weight_decay=0.0,
        warmup_ratio=0.03,
        lr_scheduler_type="cosine",
        tf32=True,
        report_to="wandb",
        lazy_preprocess=True,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=2,
    )
    assert cfg.video_min_pixels <= 4096
    told = {line.split()[0] for line in ignored_options(cfg)} - {"--report_to"}  # that one depends on what is installed
    assert told == {"--use_liger", "--disable_flash_attn2", "--lazy_preprocess", "--remove_unused_columns"}


def test_grpo_command():
    expect(
        GRPO,
        RL,
        **LORA,
        model_ckpt="./output/video_lora/checkpoint-19",
        output_dir="output/grpo_video_lora",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        fp16=False,
    )


def test_demo_command():
    cfg = parse(Infer, shlex.split(DEMO))
    assert (cfg.model_id, cfg.video) == ("Qwen/Qwen2.5-VL-3B-Instruct", "./data/synthetic_videos/videos/000.mp4")
    assert cfg.model_ckpt == "./output/video_lora/checkcheckpoint-25"
    assert (cfg.fps, cfg.nframes) == (1.0, None)
    assert cfg.text == config.QUESTION  # the shell hands over \n as two characters


def test_infer_positional():
    cfg = parse(Infer, ["--json", "clip.mp4", "--question=What moves?"])
    assert (cfg.video, cfg.json, cfg.text) == ("clip.mp4", True, "What moves?")
    assert parse(Infer, ["clip.mp4"]).text == config.QUESTION
    assert parse(Infer, ["clip.mp4", "--model_ckpt", "none"]).model_ckpt is None


@pytest.mark.parametrize(
    ("cls", "argv", "words"),
    [
        (SFT, "--learning_rat 1", ["--learning_rat:", "did you mean learning_rate?"]),
        (SFT, "--qqq 1", ["--qqq", "--help"]),
        (SFT, "--lora_rank abc", ["--lora_rank", "'abc'", "int"]),
        (SFT, "--lora_rank 1.5", ["--lora_rank", "'1.5'", "int"]),
        (SFT, "--learning_rate nan", ["--learning_rate", "'nan'", "float"]),
        (SFT, "--bf16 maybe", ["'maybe'"]),
        (SFT, "--tf32=maybe", ["--tf32", "'maybe'", "True or False"]),
        (SFT, "--lora_rank", ["--lora_rank", "no value"]),
        (SFT, "--lora_rank --seed 1", ["--lora_rank", "no value"]),
        (SFT, "train.json", ["'train.json'", "without a flag"]),
        (SFT, "--lora_rank 0", ["--lora_rank", "found 0", "at least 1"]),
        (SFT, "--lr_scheduler_type cosin", ["'cosin'", "cosine, linear, constant"]),
        (SFT, "--freeze_llm False", ["--freeze_llm", "--llm_lora False"]),
        (SFT, "--lora_enable False", ["nothing is left to train"]),
        (SFT, "--num_lora_modules 0", ["--num_lora_modules"]),
        (SFT, "--bf16 True --fp16 True", ["--fp16", "--bf16"]),
        (SFT, "--video_resized_height 56", ["--video_resized_width"]),
        (SFT, "--video_min_pixels 9000 --video_max_pixels 4000", ["9000", "4000"]),
        (GRPO, "--num_generations 1", ["--num_generations", "at least 2"]),
        (GRPO, "--num_generations 7", ["--num_generations", "256"]),
        (GRPO, "--rewards=,", ["--rewards", "at least one"]),
        (GRPO, "--reward_weights 1", ["--reward_weights", "2 numbers"]),
        (Generate, "--split 1", ["--split", "between 0 and 1"]),
        (Generate, "--augment blur,spin", ["--augment", "'blur,spin'", "blur, crop"]),
        (Infer, "", ["--video", "python infer.py video.mp4"]),
        (Infer, "a.mp4 b.mp4", ["'b.mp4'"]),
        (Infer, "a.mp4 --question x --prompt y", ["--prompt"]),
    ],
)
def test_mistakes_are_told(cls, argv, words):
    with pytest.raises(UserError) as error:
        parse(cls, argv.split(" ") if argv else [])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_comment_after_a_backslash():
    # bash reads `--cot \  # or remove` as --cot and an argument of one blank, and runs what follows as another command
    with pytest.raises(UserError, match="very last character"):
        parse(Generate, ["--num_samples", "20", "--cot", " "])


def test_a_later_setting_beats_an_earlier_one(tmp_path):
    file = tmp_path / "big.py"
    file.write_text("nframes = 16\nvideo_min_pixels = 50_000\nvideo_max_pixels = 100_000\n")
    cfg = parse(SFT, ["--config", str(file), "--fps", "1", "--video_max_pixels", "4096"])
    assert (cfg.nframes, cfg.video_min_pixels, cfg.video_max_pixels) == (None, 4096, 4096)
    both = parse(Infer, ["a.mp4", "--fps", "1", "--nframes", "4"])
    assert both.nframes == 4
    assert any(line.startswith("--fps has no effect") for line in ignored_options(both))


def test_config_file_is_a_diff(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import math\n_rows = 4\nper_device_train_batch_size = _rows * 2\nlearning_rate = 1  # an int is a float too\n"
        "lora_namespan_exclude = ('lm_head',)\npack_tokens = None\nbf16 = True\n"
    )
    cfg = parse(SFT, ["--local_rank=0", f"--config={file}", "--learning_rate", "2e-4"])
    assert (cfg.per_device_train_batch_size, cfg.learning_rate, cfg.bf16) == (8, 2e-4, True)
    assert cfg.lora_namespan_exclude == ["lm_head"]
    expected = {"per_device_train_batch_size", "learning_rate", "lora_namespan_exclude", "pack_tokens", "bf16"}
    assert set(changed(cfg)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rte = 1", ["mine.py", "learning_rte", "did you mean learning_rate?"]),
        ("lora_rank = '16'", ["mine.py", "lora_rank", "'16'", "int"]),
        ("lora_rank = True", ["lora_rank", "True", "int"]),
        ("lora_rank = ", ["mine.py", "is not Python"]),
        ("lora_rank = x", ["mine.py", "NameError"]),
    ],
)
def test_config_file_mistakes(tmp_path, text, words):
    file = tmp_path / "mine.py"
    file.write_text(text + "\n")
    with pytest.raises(UserError) as error:
        parse(SFT, ["--config", str(file)])
    for word in words:
        assert word in str(error.value)
    with pytest.raises(UserError, match="no file"):
        parse(SFT, ["--config", str(tmp_path / "absent.py")])


def test_config_py_itself_and_a_copy(tmp_path):
    assert parse(SFT, ["--local_rank", "1", "--config", str(ROOT / "config.py")]) == SFT()
    copy = tmp_path / "copy.py"
    source = (ROOT / "config.py").read_text(encoding="utf-8")
    assert "learning_rate: float = 3e-3" in source
    copy.write_text(source.replace("learning_rate: float = 3e-3", "learning_rate: float = 4e-3"), encoding="utf-8")
    cfg = parse(SFT, ["--config", str(copy)])
    assert changed(cfg) == {"learning_rate": 4e-3}
    assert cfg.given == {"learning_rate"}


def test_every_field_is_in_help_with_a_comment():
    for cls in (Generate, SFT, GRPO, Infer):
        helps = {action.dest: action.help for action in build_parser(cls)._actions}
        for f in fields(cls):
            assert len(helps[f.name].partition(" (default")[0]) > 3, f.name
    help_of = {action.dest: action.help for action in build_parser(SFT)._actions}
    assert "4 are too few" in help_of["nframes"]  # the comment of the class asked for, not of its base


def test_defaults_pass_their_own_checks():
    for cls in (Generate, SFT, GRPO):
        assert parse(cls, []) == cls()
        assert ignored_options(parse(cls, [])) == []


def test_help_is_quick_and_needs_no_torch():
    code = "import sys, config\ntry: config.parse(config.SFT, ['--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--learning_rate float" in done.stdout and max(map(len, done.stdout.splitlines())) <= 100
    assert time.perf_counter() - start < 1


def test_cli_tells_in_one_line(capsys):
    def main():
        raise UserError("--x: found 1, expected 2")

    with pytest.raises(SystemExit) as stop:
        cli(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --x: found 1, expected 2\n"
    assert cli(lambda: 7) == 7


def test_what_all_processes_of_a_machine_find_alike_is_told_once(monkeypatch, capsys):
    def main():
        raise UserError("--epochs: a mistake")

    for rank, each_rank, lines in (("0", False, 1), ("1", False, 0), ("1", True, 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            cli(main, each_rank)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == lines


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_option_is_answered_by_name(name):
    with pytest.raises(UserError, match=f"--{name}: was removed; "):
        parse(SFT, [f"--{name}", "1"])
    migrating = (ROOT / "docs" / "migrating.md").read_text()
    assert f"--{name}" in migrating, f"docs/migrating.md does not list --{name}"
