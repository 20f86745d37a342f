"""--report_to: what TensorBoard's reader and wandb's offline files hold, also after a kill and a resume; the bar."""

import fcntl
import html
import importlib.util
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import conftest  # noqa: F401 (sets the environment before torch is imported)
import pytest

import generate
import trainer
from assets.make_tiny import init
from config import SFT, parse
from model import UserError
from training import trackers

ROOT = Path(__file__).resolve().parents[1]
# Random weights write random text: this reward differs within its groups. At its call number DIE it ends the process.
REWARD = """
import os, signal
calls = 0

def vowels(text, sample):
    global calls
    calls += 1
    if calls == int(os.environ.get("DIE", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return sum(text.count(letter) for letter in "aeiou") / max(1, len(text))
"""
STEPS, GROUP, PROMPTS, SAVED = 6, 4, 4, 3
installed = {name: importlib.util.find_spec(name) is not None for name in trackers.TRACKERS}


def needs(name):
    return pytest.mark.skipif(not installed[name], reason=f"the package {name} is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random checkpoint with its tokenizer, 8 clips to train on, 4 held out."""
    folder = tmp_path_factory.mktemp("trackers")
    init(folder / "tiny")
    monkey = pytest.MonkeyPatch()
    flags = ["--output_dir", str(folder / "data"), "--num_samples", "12", "--split", "0.67", "--video_length", "12"]
    monkey.setattr(sys, "argv", ["generate.py", *flags])
    generate.main()
    monkey.undo()
    (folder / "rewards.py").write_text(REWARD)
    return folder


def train(base, script, folder, die=-1, **options):
    """Run a script as a user does. Returns (exit status, output)."""
    given = {"model_id": base / "tiny", "data_path": base / "data/train.json", "output_dir": folder, "nframes": 4}
    given |= {"max_steps": STEPS, "save_steps": SAVED, "max_new_tokens": 8, "eval_steps": 0} | options
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "DIE": str(die)}
    done = subprocess.run([sys.executable, f"{script}.py", *flags], cwd=ROOT, env=environment, capture_output=True)
    return done.returncode, (done.stdout + done.stderr).decode()


@pytest.fixture(scope="module")
def resumed(base):
    """A GRPO run that was killed in its fifth step, two after its checkpoint, and resumed to the end."""
    folder = base / "grpo"
    options = {"model_ckpt": "none", "num_generations": GROUP, "per_device_train_batch_size": GROUP * PROMPTS}
    options |= {"oversample": 1, "max_completion_length": 8, "log_completions": 2}
    options["rewards"] = f"{base}/rewards.py:vowels"
    options["report_to"] = ",".join(name for name in trackers.TRACKERS if installed[name]) or "none"
    code, told = train(base, "train_grpo", folder, die=5 * GROUP * PROMPTS + 1, **options)
    assert code == -signal.SIGKILL, told[-3000:]
    assert [row["step"] for row in lines(folder) if "loss" in row] == [1, 2, 3, 4, 5]
    code, told = train(base, "train_grpo", folder, resume=True, **options)
    assert code == 0 and f"steps {SAVED + 1} to {STEPS}" in told, told[-3000:]
    (base / "told.txt").write_text(told)
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def points(folder, name):
    return [(row["step"], row[name]) for row in lines(folder) if isinstance(row.get(name), (int, float))]


NAMES = ["loss", "reward", "reward/vowels", "kl", "entropy", "length", "lr", "ms", "gib", "eval_accuracy"]


# -- TensorBoard


@pytest.fixture(scope="module")
def board(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "images": 0, "tensors": 0}  # 0: keep all, not a sample
    return EventAccumulator(str(resumed / "tensorboard"), size_guidance=everything).Reload()


@needs("tensorboard")
@pytest.mark.parametrize("name", NAMES)
def test_tensorboard_has_every_point_once(board, resumed, name):
    found = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in board.Scalars(name)]
    assert found == points(resumed, name) and len(found) >= 2


@needs("tensorboard")
def test_tensorboard_has_config_and_rollouts(board, resumed):
    def text(tag):
        found = board.Tensors(f"{tag}/text_summary")
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]

    assert "max&#95;steps" in text("config")[0][1] and "| 6 |" in text("config")[0][1]
    assert [step for step, _ in text("rollouts")] == [2, 4, 6]
    table = text("rollouts")[-1][1].splitlines()
    assert "reward/vowels" in table[0] and len(table) - 2 in (GROUP, 2 * GROUP, 3 * GROUP)


@needs("tensorboard")
def test_text_in_a_table_is_no_markup():
    text = trackers.markdown(("a",), [["<script>x|y\n**z** `c` [l](http://x)"]]).splitlines()[-1]
    assert text.count("|") == 2 and not set("<>*`[]()/\n") & set(text.replace("<br>", ""))
    assert html.unescape(text.replace("<br>", "\n")) == "| <script>x|y\n**z** `c` [l](http://x) |"


# -- wandb, offline


def wandb_records(folder):
    """Every (path, record) of the run's offline files, in the order of their start.

    A file is a 7-byte header, then LevelDB's log format: blocks of 32 KiB; CRC, length, type, data; types 1 to 4:
    whole, first, middle, last part of a record.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        data, place, whole = path.read_bytes(), 7, b""
        assert data[:4] == b":W&B"
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:  # too little for a header: filled up
                place += 32768 - place % 32768
                continue
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                record = Record()
                record.ParseFromString(whole)
                yield path, record
                whole = b""


@pytest.fixture(scope="module")
def tracked(resumed):
    """What the resumed run's offline file holds: its Run record, and its rows."""
    told = json.loads((resumed / "wandb/run.json").read_text())["id"]
    records = [record for path, record in wandb_records(resumed) if told in path.name]
    (run,) = [record.run for record in records if record.HasField("run")]
    rows = [record.history.item for record in records if record.HasField("history")]
    return run, [dict(item_of(item) for item in row) for row in rows]


def item_of(item):
    """(name, value) of an item of a history row; the parts of a table or of clips have names like rollouts/path."""
    return item.key or "/".join(item.nested_key), json.loads(item.value_json)


@needs("wandb")
@pytest.mark.parametrize("name", NAMES)
def test_wandb_has_every_point_once(tracked, resumed, name):
    found = [(row["step"], pytest.approx(row[name])) for row in tracked[1] if name in row]
    assert found == points(resumed, name) and len(found) >= 2


@needs("wandb")
def test_wandb_has_config_and_rollouts(tracked, resumed):
    run, rows = tracked
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["max_steps"] == STEPS and config["run"]["versions"]["torch"]
    assert config["run"]["resumed_from"] not in (None, run.run_id), "offline a resumed run is a run of its own"
    files = next((resumed / "wandb").glob(f"offline-run-*{run.run_id}")) / "files"
    told = [row for row in rows if "rollouts/path" in row]
    assert [row["step"] for row in told] == [4, 6]
    table = json.loads((files / told[-1]["rollouts/path"]).read_text())
    assert "reward/vowels" in table["columns"] and len(table["data"]) >= GROUP


# -- Neither


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_package_that_is_not_there_is_told_before_any_work(base, name, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None if found == name else real(found))
    with pytest.raises(UserError, match=f"--report_to {name}: .*not installed; pip install {name}"):
        trainer.launch(parse(SFT, ["--report_to", name, "--output_dir", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_told():
    with pytest.raises(UserError, match="report_to.*tensorboard, wandb"):
        parse(SFT, ["--report_to", "tensorbord"])
    assert parse(SFT, ["--report_to", "none"]).report_to == "none"


def test_plain_lines_in_a_file(base, resumed):
    plain = (base / "told.txt").read_text()
    assert "\r" not in plain and "%|" not in plain and "step/s" not in plain, plain[-3000:]
    steps = [line.split()[1] for line in plain.splitlines() if line.startswith("step") and " eta " in line]
    assert steps == ["4/6", "5/6", "6/6"]


def test_a_bar_with_the_time_left_on_a_terminal(base, tmp_path):
    shown, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))  # a bar needs columns
    given = {"model_id": base / "tiny", "data_path": base / "data/train.json", "output_dir": tmp_path / "shown"}
    given |= {"nframes": 4, "max_new_tokens": 8, "max_steps": 3, "per_device_train_batch_size": 2, "eval_steps": 2}
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen([sys.executable, "train_sft.py", *flags], cwd=ROOT, stdout=terminal, stderr=terminal)
    os.close(terminal)
    text = b""
    while part := read(shown):
        text += part
    os.close(shown)
    text = text.decode()
    assert process.wait() == 0 and "step      3/3" in text
    assert "| 1/3 [00:0" in text and "step/s]" in text and "<00:0" in text, text[-3000:]  # elapsed<left
    assert "evaluation: " in text


def read(handle):
    try:
        return os.read(handle, 65536)
    except OSError:  # Linux's word for a terminal whose other end is closed
        return b""
