"""Ctrl-C and config files, through the commands that a user types."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_sft.py", "train_grpo.py", "generate.py", "infer.py", "data.py", "report.py", "lora.py")
# Runs a script after its argument says how to wait: every import of the module named there sleeps first
SLOW_IMPORT = """
import builtins, runpy, sys, time
real, slow = builtins.__import__, sys.argv[1]
def wait(name, *args, **kwargs):
    if name.partition(".")[0] == slow:
        print("importing", flush=True)
        time.sleep(30)
    return real(name, *args, **kwargs)
builtins.__import__ = wait
sys.argv = sys.argv[2:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*command, **env):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=ROOT, env=os.environ | env, **pipes)


def until(process, word):
    """What is printed up to and with the line that holds the word."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return "".join(lines)
    raise AssertionError(f"{word!r} was never printed:\n{''.join(lines)}")


def interrupt(process, timeout=60):
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=timeout)
    return text


@pytest.mark.parametrize(
    "script, slow",
    [("train_sft.py", "torch"), ("train_grpo.py", "torch"), ("data.py", "torch"), ("generate.py", "numpy")],
)
def test_during_imports(script, slow):
    process = start("-c", SLOW_IMPORT, slow, script)
    until(process, "importing")
    text = interrupt(process)
    assert process.returncode == 130 and text.strip() == "stopped by Ctrl-C", text


def test_during_generate(tmp_path):
    process = start("generate.py", "--output_dir", tmp_path / "d", "--num_samples", 20000, "--frame_size", 128)
    until(process, "options:")
    time.sleep(3)
    text = interrupt(process)
    assert process.returncode == 130 and "Traceback" not in text and text.strip().endswith("stopped by Ctrl-C"), text
    assert not (tmp_path / "d" / "train.json").exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "drawn"
    process = start("generate.py", "--output_dir", folder, "--num_samples", 40, "--split", 0.5)
    assert process.wait(60) == 0
    return folder


def test_during_infer(data):
    records = json.loads((data / "val.json").read_text())
    (data / "many.json").write_text(json.dumps(records * 200))
    process = start("infer.py", "--data_path", data / "many.json", "--model_ckpt", "none", "--controls", "none")
    until(process, "note:")
    time.sleep(4)
    text = interrupt(process)
    assert process.returncode == 130 and "Traceback" not in text and text.strip().endswith("stopped by Ctrl-C"), text


def test_during_training(data, tmp_path):
    run = tmp_path / "run"
    flags = ["--data_path", data / "train.json", "--output_dir", run, "--max_steps", 10000, "--eval_steps", 3]
    process = start("train_sft.py", *flags, "--eval_samples", 4, "--max_new_tokens", 4)
    until(process, "step      4")
    text = interrupt(process)
    assert process.returncode == 130 and "Traceback" not in text, text
    after = text[text.index("SIGINT: this step is finished") :]
    assert "answers right" not in after, f"no evaluation is started after the first Ctrl-C:\n{after}"
    assert list(run.glob("checkpoint-*")) and "--resume goes on" in after


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.yaml", "learning_rate: 1e-4\n", "a .yaml file, expected a .py file"),
        ("a.json", "{}", "a .json file, expected a .py file"),
        ("a.py", "learning_rate: float\n", "line 1: learning_rate has a type and no value"),
        ("a.py", "", "sets nothing"),
        ("a.py", "import math\n_mine = 3\n", "sets nothing"),
        ("a.py", "learning_rate = = 3\n", "is not Python"),
        ("a.py", None, "no file"),
        ("", None, "no file"),
    ],
)
def test_config_files(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    process = start("train_sft.py", "--config", path)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and words in text and len(text.strip().splitlines()) == 1, text


@pytest.mark.parametrize("script", SCRIPTS)
def test_waiting_threads_do_not_spin(script):
    """libgomp reads it when torch is imported, so it must be set before, and a user's own choice must stay."""
    code = (
        "import os, runpy, sys\n"
        "class Find:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch' or name == 'stop_here':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Find())\n"
        "sys.path.insert(0, '')\n"
        f"sys.argv = ['{script}']\n"
        f"runpy.run_path('{script}', run_name='script')\n"
        "import stop_here"
    )
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=unset | given, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected, done.stdout + done.stderr
