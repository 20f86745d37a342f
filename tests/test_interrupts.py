"""Ctrl-C, through the commands that a user types."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from clips import draw_clip
from openai_client import Client, Question, ask_all


def start(*command, **env):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=ROOT, env=os.environ | env, **pipes)


def interrupt(process, word, seconds=0.0):
    """Send SIGINT some seconds after a line with this word; returns all that was printed."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            break
    assert word in "".join(lines[-1:]), f"{word!r} was never printed:\n{''.join(lines)}"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    text = "".join(lines) + process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in text, text
    return text


def test_during_generate_infer_and_training(tmp_path):
    flags = ["--num_samples", 20000, "--frame_size", 128]
    text = interrupt(start("generate.py", "--output_dir", tmp_path / "big", *flags), "options:", seconds=3)
    assert text.strip().endswith("stopped by Ctrl-C") and not (tmp_path / "big" / "train.json").exists(), text
    assert start("generate.py", "--output_dir", tmp_path / "d", "--num_samples", 40, "--split", 0.5).wait(60) == 0
    records = json.loads((tmp_path / "d" / "val.json").read_text())
    (tmp_path / "d" / "many.json").write_text(json.dumps(records * 200))
    flags = ["--data_path", tmp_path / "d" / "many.json", "--model_ckpt", "none", "--controls", "none"]
    assert interrupt(start("infer.py", *flags), "note:", seconds=2).strip().endswith("stopped by Ctrl-C")
    run = tmp_path / "run"
    flags = ["--data_path", tmp_path / "d" / "train.json", "--output_dir", run, "--max_steps", 10000]
    process = start("train_sft.py", *flags, "--eval_steps", 3, "--eval_samples", 4, "--max_new_tokens", 4)
    after = interrupt(process, "step     4/").partition("SIGINT")[2]
    assert "held-out samples" not in after, f"no evaluation is started after the first Ctrl-C:\n{after}"
    assert list(run.glob("checkpoint-*")) and "--resume" in after


def test_a_ctrl_c_while_clips_are_drawn_up_is_seldom_lost():
    """numpy's Generator.choice swallows what a signal handler raises; Python itself does while it collects garbage."""
    rng, seen = np.random.default_rng(0), 0

    def raises(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raises)
    for i in range(100):
        signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.00003 * i)
        try:
            for _ in range(1000):
                draw_clip(rng, "Left to Right", 64, 30)
        except KeyboardInterrupt:
            seen += 1
    signal.signal(signal.SIGALRM, before)
    assert seen >= 95, seen


@pytest.mark.parametrize("mistake, expected", [(False, KeyboardInterrupt), (True, ZeroDivisionError)])
def test_threads_drop_what_has_not_begun(tmp_path, capfd, mistake, expected):
    client, done = Client("key"), []

    def work(prompt, png):
        done.append(i := int(prompt))
        if i == 20 and mistake:
            raise ZeroDivisionError
        if i == 20:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
        return "an answer"

    client.complete = work
    questions = [Question(str(i), "", bytes, lambda text: (text, "")) for i in range(10_000)]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(expected):
        ask_all(client, tmp_path / "cache", questions, 2)
    assert ("waiting for the answers" in capfd.readouterr().err) != mistake
    assert 20 < len(done) < 1000 and signal.getsignal(signal.SIGINT) is handler, len(done)
