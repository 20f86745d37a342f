"""Options: commands that people have keep their meaning, other trainers' names are understood, a slip is named."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import config
import names
from cli import help_text
from config import GRPO, SFT, Adapter, Generate, Infer, Look, Report, changed, cli, ignored_options, parse
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


def without_effect(cfg):
    return {line.split()[0] for line in ignored_options(cfg) if "no effect" in line}


def message(cls, argv):
    """The one line that a user's mistake is answered with."""
    with pytest.raises(UserError) as error:
        parse(cls, argv)
    assert "\n" not in str(error.value)
    return str(error.value)


NO_EFFECT = {"--use_liger", "--disable_flash_attn2", "--lazy_preprocess", "--remove_unused_columns"}


def same(value, text):
    """Whether an option's value is what the text says."""
    if isinstance(value, str | bool | list):
        return str(value).replace(" ", "") == text
    return value == float(text)


@pytest.mark.parametrize(
    ("cls", "command", "no_effect"),
    [(Generate, GENERATE, set()), (SFT, TRAIN, NO_EFFECT), (GRPO, RL, {"--disable_flash_attn2", "--lora_dropout"})],
)
def test_commands_that_people_have(cls, command, no_effect):
    words = shlex.split(command)
    cfg, known = parse(cls, words), {f.name for f in fields(cls)}
    texts = {word[2:]: text for word, text in zip(words, [*words[1:], ""]) if word.startswith("--")}
    texts = {name: "True" if text.startswith("--") else text for name, text in texts.items() if name in known}
    assert cfg.given == texts.keys() and all(same(getattr(cfg, name), text) for name, text in texts.items())
    assert len(texts) > 7 and without_effect(cfg) == no_effect
    assert cls is not SFT or cfg.nframes is None  # a given fps beats the default number of frames


def test_commands_with_words_that_have_no_flag():
    cfg = parse(Infer, shlex.split(DEMO))
    assert (cfg.model_id, cfg.video) == ("Qwen/Qwen2.5-VL-3B-Instruct", "./data/synthetic_videos/videos/000.mp4")
    assert (cfg.model_ckpt, cfg.fps, cfg.nframes) == ("./output/video_lora/checkcheckpoint-25", 1.0, None)
    assert cfg.text == config.QUESTION  # the shell hands over \n as two characters
    look = parse(Look, ["a.mp4", "--fps", "4", "b.mp4", "c,d.json"])
    assert (look.files, look.nframes, look.fps) == (["a.mp4", "b.mp4", "c,d.json"], None, 4.0)
    cfg = parse(Infer, ["--json", "clip.mp4", "--question=What moves?", "--model_ckpt", "none"])
    assert (cfg.video, cfg.json, cfg.text, cfg.model_ckpt) == ("clip.mp4", True, "What moves?", None)
    cfg = parse(Adapter, ["merge", "a", "b"])
    assert (cfg.command, cfg.model_ckpt, cfg.output_dir) == ("merge", "a", "b")


@pytest.mark.parametrize(
    ("cls", "command", "words"),
    [
        (SFT, "--lora_rank abc", "--lora_rank: found 'abc', expected int"),
        (SFT, "--lora_rank", "--lora_rank: found no value, expected int"),
        (SFT, "--tf32=maybe", "--tf32: found 'maybe', expected True or False"),
        (SFT, "train.json", "'train.json' without a flag"),
        (SFT, "--lora_rank 0", "--lora_rank: found 0, expected a number above 0"),
        (SFT, "--lr_scheduler_type cosin", "expected cosine, linear, constant; did you mean cosine?"),
        (SFT, "--freeze_llm False", "--llm_lora False"),
        (SFT, "--lora_enable False", "nothing is left to train"),
        (SFT, "--base_dtype nf4 --llm_lora False --freeze_llm False", "low-bit weights stay frozen"),
        (SFT, "--resume --overwrite", "--resume: found True, expected False beside --overwrite"),
        (GRPO, "--num_generations 7", "a divisor of per_device_train_batch_size 256 x"),
        (GRPO, "--reward_weights 1", "found [1.0], expected one number for each of --rewards accuracy,format"),
        (Generate, "--split 20", "--split: found 20.0, expected a number from 0 to 1"),
        (Generate, "--augment blur,spin", "found 'spin', expected names out of blur, crop"),
        (Adapter, "convert x", "--command: found 'convert', expected merge or check (convert was removed"),
        (Look, "", "--files: found [], expected at least one, as in python data.py clip.mp4"),
        (Infer, "a.mp4 --question x --prompt y", "--prompt: found 'y'"),
    ],
)  # fmt: skip
def test_mistakes(cls, command, words):
    assert words in message(cls, command.split())


def test_a_later_setting_beats_an_earlier_one(tmp_path):
    (tmp_path / "big.py").write_text("nframes = 16\nvideo_max_pixels = 100_000\n")
    cfg = parse(SFT, ["--config", str(tmp_path / "big.py"), "--fps", "1", "--video_max_pixels", "4096"])
    assert (cfg.nframes, cfg.video_max_pixels) == (None, 4096)
    both = parse(Infer, ["a.mp4", "--fps", "1", "--nframes", "4"])
    assert both.nframes == 4 and without_effect(both) == {"--fps"}


SETTINGS = {
    "a.py": "import math\n_n = 4\nsave_steps = _n * 2\nlearning_rate, bf16, lora_namespan_exclude = 1e-4, True, ('a',)"
    "\npack_tokens, save_strategy, lora_r, use_liger_kernel = None, 'no', 8, True",
    "a.yaml": "save_steps: 8\nlearning_rate: 1e-4\nbf16: true\nlora_namespan_exclude: [a]\n"
    "pack_tokens: null\nsave_strategy: no\nlora_r: 8\nuse_liger_kernel: true",
    "a.json": '{"save_steps": 8, "learning_rate": 1e-4, "bf16": true, "lora_namespan_exclude": ["a"],\n'
    '"pack_tokens": null, "save_strategy": "no", "lora_r": 8, "use_liger_kernel": true}',
    "a.toml": 'save_steps = 8\nlearning_rate = 1e-4\nbf16 = true\nlora_namespan_exclude = ["a"]\n'
    'pack_tokens = "none"\nsave_strategy = "no"\nlora_r = 8\nuse_liger_kernel = true',
}


@pytest.mark.parametrize("name", SETTINGS)
def test_config_file_of_each_kind(tmp_path, name):
    (tmp_path / name).write_text(SETTINGS[name])
    cfg = parse(SFT, ["--local_rank=0", f"--config={tmp_path / name}", "--learning_rate", "2e-4"])
    expected = dict(save_steps=8, learning_rate=2e-4, bf16=True, lora_namespan_exclude=["a"])
    expected |= dict(pack_tokens=None, save_strategy="no", lora_rank=8)
    assert changed(cfg) == expected and cfg.given == set(expected)
    assert without_effect(cfg) == {"--use_liger_kernel"} and "--lora_r is --lora_rank here" in ignored_options(cfg)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.py", "seed = 1\nlearning_rte = 1", "a.py: line 2: learning_rte: no such option of train_sft.py; did you"),
        ("a.json", '{"seed": 1,\n "learning_rte": 1}', "a.json: line 2: learning_rte"),
        ("a.yml", "seed: 1\nload_in_4bit: 4", "a.yml: line 2: load_in_4bit"),
        ("a.json", '{"lora_rank": 1.5}', "line 1: lora_rank: found 1.5, expected int"),
        ("a.yaml", "lora_rank: [1, 2]", "lora_rank: found ['1', '2'], expected int"),
        ("a.py", "lora_rank = = 3", "SyntaxError"),
        ("a.yaml", "a: [", "cannot be read"),
        ("a.txt", "a", "a.txt', expected a .py, .yaml, .json or .toml file"),
    ],
)  # fmt: skip
def test_config_file_mistakes(tmp_path, name, text, words):
    (tmp_path / name).write_text(text + "\n")
    assert words in message(SFT, ["--config", str(tmp_path / name)])


def test_config_py_itself_and_a_copy(tmp_path):
    for cls in (Generate, SFT, GRPO):  # defaults pass their own checks, and each has an effect
        assert parse(cls, []) == cls() and ignored_options(parse(cls, [])) == []
    assert parse(SFT, ["--config", str(ROOT / "config.py")]) == SFT()
    source = (ROOT / "config.py").read_text(encoding="utf-8")
    (tmp_path / "copy.py").write_text(source.replace("learning_rate: float = 3e-3", "learning_rate: float = 4e-3"))
    cfg = parse(SFT, ["--config", str(tmp_path / "copy.py")])
    assert changed(cfg) == {"learning_rate": 4e-3} and cfg.given == {"learning_rate"}


@pytest.mark.parametrize("cls", [Generate, SFT, GRPO, Infer, Look, Adapter, Report])
def test_help(monkeypatch, cls):
    """Short: an example and some 20 options; all: every one, with its comment. Both as wide as the terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    texts = [help_text(cls, every) for every in (False, True)]
    assert all(f"example: {cls.__doc__}\n" in text for text in texts)
    assert max(len(line) for text in texts for line in text.splitlines()[2:]) <= 80
    short, every = (re.findall(r"(?m)^  --(\w+)", text) for text in texts)
    assert len(short) <= 26 and sorted(every) == sorted(f.name for f in fields(cls))
    assert cls is not SFT or "for rank 16 on the tiny model (default 0.003)" in " ".join(texts[1].split())


@pytest.mark.parametrize(("rank", "each_rank"), [("0", False), ("1", False), ("1", True)])
def test_cli_prints_one_line(monkeypatch, capsys, rank, each_rank):
    """Once a machine where all processes would print the same (each_rank False)."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as end:
        cli(lambda: parse(SFT, ["--seed", "x"]), each_rank)
    line = "error: --seed: found 'x', expected int\n"
    assert end.value.code == 2 and capsys.readouterr().err == ("" if (rank, each_rank) == ("1", False) else line)


def test_migrating_is_written_from_the_tables():
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    assert text == names.migrating(text), "run: python names.py"


@pytest.mark.parametrize("name", names.NAMES)
def test_names_of_other_trainers(name):
    """A synonym is accepted and reported, a name without effect too; other values and meanings are answered."""
    kind, meaning = names.NAMES[name]
    assert name not in {f.name for f in fields(GRPO)}
    if kind == "same":
        cls = Infer if meaning == "video" else GRPO
        default = {f.name: f.default for f in fields(cls)}[meaning]
        value = {"lr_scheduler_type": "linear", "per_device_train_batch_size": "16", "rewards": "a,b"}.get(meaning, "6")
        cfg = parse(cls, [f"--{name.replace('_', '-')}", "True" if isinstance(default, bool) else value])
        assert cfg.given == {meaning} and f"--{name} is --{meaning} here" in ignored_options(cfg)
    elif kind == "no_effect":
        cfg = parse(GRPO, [f"--{name}", "x", "--seed", "7"])
        assert changed(cfg) == {"seed": 7} and without_effect(cfg) == {f"--{name}"}
    elif kind == "by_value":
        for value, ours in list(meaning.items())[:-1]:
            cfg = parse(GRPO, [f"--{name}={value}"])
            field = ours.partition("=")[0]
            assert cfg.given == ({field} if field else set()) and f"--{name} {value}" in ignored_options(cfg)[0]
        assert meaning["otherwise"] in message(GRPO, [f"--{name}", "something"])
    elif kind == "removed":
        assert f"--{name}: was removed; {meaning}" in message(GRPO, [f"--{name}", "1"])
        assert f"--{name}: was removed; {meaning}" in message(Generate, [f"--{name}", "1"])
    else:
        assert f"--{name}: 'true' is not an option here; {meaning}" in message(GRPO, [f"--{name}"])
        assert parse(GRPO, [f"--{name}", "False"]).given == set()


def test_a_file_of_another_trainer(tmp_path):
    (tmp_path / "sft.yaml").write_text(
        "### model\nmodel_name_or_path: Qwen/Qwen2.5-VL-7B-Instruct\nimage_max_pixels: 9000\ntrust_remote_code: true\n"
        "stage: sft\ndo_train: true\nfinetuning_type: lora\nlora_target: all\ntemplate: qwen2_vl\ncutoff_len: 2048\n"
        "overwrite_output_dir: true\nlearning_rate: 1.0e-4\nddp_timeout: 180000000\nresume_from_checkpoint: null\n"
    )
    cfg = parse(SFT, ["--config", str(tmp_path / "sft.yaml"), "--load_in_4bit", "--eval_strategy", "no"])
    assert (cfg.max_seq_length, cfg.overwrite, cfg.resume, cfg.learning_rate) == (2048, True, False, 1e-4)
    assert (cfg.base_dtype, cfg.eval_data_path) == ("nf4", None)


NEAR = {"lora_rnk": "lora_rank", "leraning_rate": "learning_rate", "max_completion": "max_completion_length"}
NEAR |= {"rank": "lora_rank", "beta1": "adam_beta1", "save_step": "save_steps"}
NEAR |= {"resized_height": "image_resized_height or video_resized_height"}
FAR = "lora_init steps size use_cache reward_model eval_batch_size max kl wd topic learning_curve warm tp data_format"


@pytest.mark.parametrize("word", [*NEAR, *FAR.split()])
def test_no_suggestion_leads_astray(word):
    """The near spelling, or the options that hold the words; else no guess. The script is named, not a class."""
    hint = f"did you mean {NEAR[word]}?" if word in NEAR else "--help all lists them"
    assert message(GRPO, [f"--{word}", "1"]) == f"--{word}: no such option of train_grpo.py; {hint}"
