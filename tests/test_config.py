"""Options: commands that people have keep their meaning, other trainers' names are understood, a slip is named."""

import json
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, cases, refused

import config
import names
from config import GRPO, SFT, Adapter, Generate, Infer, Look, changed, ignored_options, parse

CASES = ROOT / "tests" / "cases"
COMMANDS = json.loads((CASES / "commands.json").read_text())  # the original project's, as people have them


def without_effect(cfg):
    return {line.split()[0] for line in ignored_options(cfg) if "no effect" in line}


def same(value, text):
    """Whether an option's value is what the text says."""
    if isinstance(value, str | bool | list):
        return str(value).replace(" ", "") == text
    return value == float(text)


NO_EFFECT = {Generate: set(), GRPO: {"--disable_flash_attn2", "--lora_dropout"}}
NO_EFFECT[SFT] = {"--use_liger", "--disable_flash_attn2", "--lazy_preprocess", "--remove_unused_columns"}


@pytest.mark.parametrize("cls, no_effect", NO_EFFECT.items())
def test_commands_that_people_have(cls, no_effect):
    words = shlex.split(COMMANDS[cls.__name__])
    cfg, known = parse(cls, words), {f.name for f in fields(cls)}
    texts = {word[2:]: text for word, text in zip(words, [*words[1:], ""]) if word.startswith("--")}
    texts = {name: "True" if text.startswith("--") else text for name, text in texts.items() if name in known}
    assert cfg.given == texts.keys() and all(same(getattr(cfg, name), text) for name, text in texts.items())
    assert len(texts) > 7 and without_effect(cfg) == no_effect
    assert cls is not SFT or cfg.nframes is None  # a given fps beats the default number of frames


def test_commands_with_words_that_have_no_flag():
    cfg = parse(Infer, shlex.split(COMMANDS["Infer"]))
    assert (cfg.model_id, cfg.video) == ("Qwen/Qwen2.5-VL-3B-Instruct", "./data/synthetic_videos/videos/000.mp4")
    assert (cfg.model_ckpt, cfg.fps, cfg.nframes) == ("./output/video_lora/checkcheckpoint-25", 1.0, None)
    assert cfg.text == config.QUESTION  # the shell hands over \n as two characters
    look = parse(Look, ["a.mp4", "--fps", "4", "b.mp4", "c,d.json"])
    assert (look.files, look.nframes, look.fps) == (["a.mp4", "b.mp4", "c,d.json"], None, 4.0)
    words = "--torch_dtype auto --json --trust-remote-code clip.mp4 '--question=What moves?' --model_ckpt none"
    cfg = parse(Infer, shlex.split(words))
    assert (cfg.video, cfg.json, cfg.text, cfg.model_ckpt) == ("clip.mp4", True, "What moves?", None)
    cfg = parse(Adapter, ["merge", "a", "b"])
    assert (cfg.command, cfg.model_ckpt, cfg.output_dir) == ("merge", "a", "b")


@pytest.mark.parametrize("case", cases("mistakes"), ids=lambda case: case["flags"] + case.get("file", ""))
def test_mistakes(case, tmp_path, monkeypatch):
    """file: the text of the config file that the flags name."""
    monkeypatch.chdir(tmp_path)
    Path(case["flags"].split()[-1] if "file" in case else "none").write_text(case.get("file", ""))
    assert case["message"] in refused(parse, getattr(config, case["options"]), case["flags"].split())


@pytest.mark.parametrize("file", sorted((CASES / "settings").glob("a.*")), ids=lambda file: file.name)
def test_config_file_of_each_kind(file):
    cfg = parse(SFT, ["--local_rank=0", f"--config={file}", "--learning_rate", "2e-4"])
    expected = dict(save_steps=8, learning_rate=2e-4, bf16=True, lora_namespan_exclude=["a"])
    expected |= dict(pack_tokens=None, save_strategy="no", lora_rank=8)
    assert changed(cfg) == expected and cfg.given == set(expected)
    assert without_effect(cfg) == {"--use_liger_kernel"} and "--lora_r is --lora_rank here" in ignored_options(cfg)


def test_config_py_itself_and_a_copy(tmp_path):
    for cls in (Generate, SFT, GRPO):  # defaults pass their own checks, and each has an effect
        assert parse(cls, []) == cls() and ignored_options(parse(cls, [])) == []
    assert parse(SFT, ["--config", str(ROOT / "config.py")]) == SFT()
    source = (ROOT / "config.py").read_text(encoding="utf-8")
    (tmp_path / "copy.py").write_text(source.replace("learning_rate: float = 3e-3", "learning_rate: float = 4e-3"))
    cfg = parse(SFT, ["--config", str(tmp_path / "copy.py")])
    assert changed(cfg) == {"learning_rate": 4e-3} and cfg.given == {"learning_rate"}


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
        assert meaning["otherwise"] in refused(parse, GRPO, [f"--{name}", "something"])
    elif kind == "removed":
        assert f"--{name}: was removed; {meaning}" in refused(parse, GRPO, [f"--{name}", "1"])
        assert f"--{name}: was removed; {meaning}" in refused(parse, Generate, [f"--{name}", "1"])
    else:
        assert f"--{name}: 'true' is not an option here; {meaning}" in refused(parse, GRPO, [f"--{name}"])
        assert parse(GRPO, [f"--{name}", "False"]).given == set()


def test_a_file_of_another_trainer():
    flags = ["--config", str(CASES / "settings" / "llamafactory.yaml"), "--load_in_4bit", "--eval_strategy", "no"]
    cfg = parse(SFT, flags)
    assert (cfg.max_seq_length, cfg.overwrite, cfg.resume, cfg.learning_rate) == (2048, True, False, 1e-4)
    assert (cfg.base_dtype, cfg.eval_data_path) == ("nf4", None)
