"""What would mislead a user in the first hour, through the commands that they type."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd=ROOT, code=0, **env):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, env=os.environ | env, check=False
    )
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """40 drawn clips, half of them held out, val.json in the order of the classes."""
    folder = tmp_path_factory.mktemp("data") / "drawn"
    run("generate.py", "--output_dir", folder, "--num_samples", 40, "--split", 0.5)
    records = json.loads((folder / "val.json").read_text())
    records.sort(key=label)
    (folder / "sorted.json").write_text(json.dumps(records))
    return folder


def label(record):
    return record["conversations"][-1]["value"]


def test_a_held_out_subset_is_spread_over_the_file(data):
    flags = ["--controls", "none", "--model_ckpt", "none", "--max_new_tokens", 4, "--json", "--max_samples", 8]
    run_twice = [run("infer.py", "--data_path", data / "sorted.json", *flags).stdout for _ in range(2)]
    found = [json.loads(text.splitlines()[-1])["confusion"] for text in run_twice]
    assert len(found[0]) >= 3, f"8 of 20 clips sorted by class show only {list(found[0])}"
    assert found[0] == found[1], "the subset follows the seed"


def test_val_json_is_not_in_the_order_of_the_classes(data, tmp_path):
    for record in json.loads((data / "train.json").read_text()):
        folder = tmp_path / "clips" / label(record).split(") ")[1].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / record["video"]).write_bytes((data / "videos" / record["video"]).read_bytes())
    flags = ["--from_folder", tmp_path / "clips", "--split", 0.5]
    for name in ("a", "b"):
        run("generate.py", *flags, "--output_dir", tmp_path / name)
    text = (tmp_path / "a" / "val.json").read_text()
    assert text == (tmp_path / "b" / "val.json").read_text(), "the order follows the seed"
    labels = [label(record).split(") ")[1] for record in json.loads(text)]
    assert labels != sorted(labels) and len(set(labels)) == 4


def test_a_grpo_run_that_ends_below_its_start_says_so(data, tmp_path):
    sft = tmp_path / "sft"
    run("train_sft.py", "--data_path", data / "train.json", "--output_dir", sft, "--max_steps", 8, "--eval_controls", 0)
    flags = ["--data_path", data / "train.json", "--model_ckpt", sft, "--output_dir", tmp_path / "grpo", "--overwrite"]
    flags += ["--max_steps", 2, "--learning_rate", 30, "--max_completion_length", 8, "--max_new_tokens", 8]
    flags += ["--eval_controls", 0, "--per_device_train_batch_size", 64, "--warmup_ratio", 0, "--max_grad_norm", 0]
    done = run("train_grpo.py", *flags)
    last = done.stdout.strip().splitlines()[-1]
    assert "worse than the start" in last and "at the start" in last, last
    best = json.loads((tmp_path / "grpo" / "best.json").read_text())
    assert best["below_start"] and best["accuracy"] < best["start_accuracy"], best
    answer = run("infer.py", data / "videos" / "000000.mp4", "--model_ckpt", tmp_path / "grpo", "--max_new_tokens", 2)
    assert "less than the" in answer.stdout and "of its start" in answer.stdout


def test_make_clean_removes_no_results():
    done = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, check=True)
    removed = [word for line in done.stdout.splitlines() if line.startswith("rm ") for word in line.split()[1:]]
    assert removed and not any(Path(word).parts[:1] in (("output",), ("data",)) for word in removed), done.stdout
