"""Short runs of both training scripts on a tiny random checkpoint, for test_train_sft, test_train_grpo, test_faults."""

import gc
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import sys
from pathlib import Path

import conftest  # noqa: F401 (sets the environment before torch is imported)
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import generate
import train_grpo
import train_sft
from assets.make_tiny import init
from config import Generate
from engine import leave_processes

CASES = Path(__file__).with_name("cases")
# Random weights write random text: these rewards differ within its groups, and can be learned.
REWARDS = """
def vowels(text, sample):
    return sum(text.count(letter) for letter in "aeiou") / max(1, len(text))
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random checkpoint with its tokenizer; 16 clips to train on (mixed.json: with 4 text-only records among them,
    few.json: six of them), 4 held out; rewards for random text."""
    folder = tmp_path_factory.mktemp("base")
    init(folder / "tiny")
    generate.generate(Generate(output_dir=f"{folder}/data", num_samples=20, split=0.8, video_length=12))
    records = json.loads((folder / "data/train.json").read_text())
    (folder / "data/few.json").write_text(json.dumps(records[:6]))
    for i in (2, 3, 9, 14):
        turns = [{"from": "human", "value": f"Say {i}."}, {"from": "gpt", "value": f"{i}"}]
        records.insert(i, {"id": f"text-{i}", "conversations": turns})
    (folder / "data/mixed.json").write_text(json.dumps(records))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def flags_for(script, base, output, **options):
    flags = {"model_id": base / "tiny", "eval_data_path": "none", "nframes": 4, "logging_steps": 100}
    flags |= {"output_dir": output, "save_steps": 100, "dataloader_num_workers": 0}
    if script is train_sft:
        flags |= {"data_path": base / "data/mixed.json", "max_steps": 5, "per_device_train_batch_size": 8}
    else:
        flags |= {"data_path": base / "data/few.json", "max_steps": 3, "per_device_train_batch_size": 16}
        flags |= {"model_ckpt": "none", "num_generations": 4, "max_resample": 0, "max_completion_length": 8}
        flags |= {"rewards": f"{base}/rewards.py:vowels", "warmup_ratio": 0}
    return [word for name, value in (flags | options).items() for word in (f"--{name}", str(value))]


def seeds_options(name):
    """The original project's command, {flag: value}, but for its paths."""
    words = shlex.split(json.loads((CASES / "commands.json").read_text())[name])
    flags = {word[2:]: value for word, value in zip(words[::2], words[1::2], strict=True)}
    return {flag: value for flag, value in flags.items() if "/" not in value}


def execute(script, base, output, **options):
    """Run the script in this process; returns the run's folder."""
    if torch.cuda.is_available():
        pytest.skip("GPU_TESTS is set: runs are compared on a CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *flags_for(script, base, output, **options)])
        try:
            script.main()
        finally:
            if torch.distributed.is_initialized():
                leave_processes()
    return output


@pytest.fixture(scope="session")
def whole(base):
    """The SFT run that others are compared with: five steps, each with its checkpoint. Copy it before changing it."""
    return execute(train_sft, base, base / "whole", save_steps=1, save_total_limit="none")


@pytest.fixture
def sft(base, tmp_path):
    """sft(name, flag=value, …) -> the run's folder."""
    return lambda name, **options: execute(train_sft, base, tmp_path / name, **options)


@pytest.fixture
def grpo(base, tmp_path):
    return lambda name, **options: execute(train_grpo, base, tmp_path / name, **options)


def two_ranks(script, base, output, **options):
    """A run on two ranks, forked from this process: it has everything imported."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def run(rank):
        world = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        os.environ |= world | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        execute(script, base, output, **options)

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    return output


def cut(folder, name, *steps):
    """A copy of a run, beside it, that lost these checkpoints: what is there to be resumed."""
    copy = shutil.copytree(folder, folder.with_name(name), symlinks=True)
    for step in steps:
        shutil.rmtree(copy / f"checkpoint-{step}")
    return copy


def same_files(one, other, step):
    """Whether the checkpoints are the same bit for bit: weights, AdamW's moments, adapter."""
    names = "optimizer-00000.safetensors", "adapter_model.safetensors"
    folders = [folder / f"checkpoint-{step}" for folder in (one, other)]
    return all(len({(folder / name).read_bytes() for folder in folders}) == 1 for name in names)


def apart(one, other):
    """The largest difference of the weights in two checkpoints, which have the same names."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys() and mine
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def lines(folder, file="metrics.jsonl"):
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def column(folder, *names):
    """Values of one name in metrics.jsonl, or tuples of several, of the lines that have the first."""
    rows = [tuple(line[name] for name in names) for line in lines(folder) if names[0] in line]
    return rows if len(names) > 1 else [value for (value,) in rows]


def state(folder):
    """{name: tensor} of a checkpoint's optimizer state."""
    return load_file(folder / "optimizer-00000.safetensors")


def weights(folder):
    return {name: tensor for name, tensor in state(folder).items() if name.startswith("weight/")}


def finite(folder):
    """Whether the run has checkpoints, and they are finite to the last moment of AdamW."""
    states = [state(path) for path in checkpoint.checkpoints(folder)]
    return bool(states) and all(tensor.isfinite().all() for each in states for tensor in each.values())


def steps_saved(folder):
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder)]


def release_run():
    """After a run that ended by an error in this process: its signal handlers hold it, and it holds the lock."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)
    gc.collect()
