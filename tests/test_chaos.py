"""What is promised when things break: a few cases of tests/chaos.py, and each piece of a checkpoint broken alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401 (sets the environment before torch is imported)
import pytest
from endurance import picture, trend, watch

from checkpoint import MANIFEST, find_adapter, newest_checkpoint, step_of, what_is_broken, write_whole

ROOT = Path(__file__).resolve().parents[1]


def test_killed_stopped_moved_and_repeated_runs(chaos):
    """A few cases of everything that `make chaos` tries: its exit code is 1 if one did not survive."""
    code, told = chaos
    assert code == 0, told[-9000:]
    parts = "SIGKILL at any moment", "before each single file", "SIGTERM", "into one folder", "same seed"
    parts += "saved on 2 ranks", "a rank killed", "SIGKILL of a rank or of the command", "a lost machine ends the run"
    parts += "stands still is told by name", "ends no run", "with other data, flags", "gives each task its rank"
    for part in parts:
        assert part in told, part


FILES = {"adapter_config.json": "{}", "optimizer-00000.safetensors": "0123456789" * 100, "trainer_state.json": "{}"}


def fill(folder):
    for name, text in FILES.items():
        (folder / name).write_text(text)


def cut(folder):
    path = folder / "optimizer-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
    path = folder / "optimizer-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


def half_renamed(folder):
    folder.rename(folder.with_name(f".{folder.name}.tmp"))


def half_deleted(folder):
    folder.rename(folder.with_name(f".{folder.name}.old"))


def manifest(text):
    return lambda folder: (folder / MANIFEST).write_text(text)


BREAKS = {
    "cut": (cut, "has 999 bytes, expected 1000"),
    "one bit": (flip, "does not have the SHA-256"),
    "a file deleted": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "a file emptied": (lambda folder: (folder / "trainer_state.json").write_text(""), "has 0 bytes, expected 2"),
    "manifest deleted": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
    "manifest cut": (lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40]), "not JSON"),
    "manifest binary": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "not JSON"),
    "manifest a list": (manifest("[1]"), "does not list files"),
    "manifest without sizes": (manifest('{"trainer_state.json": {}}'), "does not list files"),
    "manifest empty": (manifest("{}"), "does not list files"),
    "not renamed yet": (half_renamed, None),
    "deleted halfway": (half_deleted, None),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_each_piece_of_a_checkpoint_broken(kind, tmp_path, capsys):
    """The newest whole one is taken; the broken one is told with its fault; nothing is said where none is to see."""
    for step in (2, 4, 10):
        write_whole(tmp_path / f"checkpoint-{step}", fill)
    assert step_of(newest_checkpoint(tmp_path)) == 10 and capsys.readouterr().err == ""
    break_it, words = BREAKS[kind]
    break_it(tmp_path / "checkpoint-10")
    assert step_of(newest_checkpoint(tmp_path)) == 4
    assert find_adapter(tmp_path) == tmp_path / "checkpoint-4"
    told = capsys.readouterr().err
    if words is None:
        assert told == ""
    else:
        assert "checkpoint-10: broken checkpoint passed over: " in told and words in told
        assert what_is_broken(tmp_path / "checkpoint-10") in told


def test_all_checkpoints_broken(tmp_path, capsys):
    for step in (2, 4):
        write_whole(tmp_path / f"checkpoint-{step}", fill)
        flip(tmp_path / f"checkpoint-{step}")
    assert newest_checkpoint(tmp_path) is None and capsys.readouterr().err.count("broken checkpoint") == 2


def test_a_checkpoint_holds_what_its_manifest_says(tmp_path):
    write_whole(tmp_path / "checkpoint-1", fill)
    listed = json.loads((tmp_path / "checkpoint-1" / MANIFEST).read_text())
    assert {name: entry["bytes"] for name, entry in listed.items()} == {name: len(t) for name, t in FILES.items()}
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-2")
    assert step_of(newest_checkpoint(tmp_path)) == 2  # a copy is as good: nothing in it knows its folder


def test_an_error_in_the_middle_leaves_no_process(tmp_path):
    """Every clip but the first batch's is gone: the run ends with one line while its threads read ahead."""
    made = ["--num_samples", "40", "--split", "0.9", "--video_length", "12", "--output_dir", str(tmp_path / "data")]
    subprocess.run([sys.executable, "generate.py", *made], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for clip in sorted((tmp_path / "data/videos").iterdir())[4:]:
        clip.write_bytes(b"")
    flags = ["--data_path", str(tmp_path / "data/train.json"), "--eval_data_path", "none", "--nframes", "4"]
    seen, code, left = watch("train_sft.py", tmp_path / "run", [*flags, "--max_steps", "50"])
    assert code == 2 and left == [], (code, left)
    told = [line for line in (tmp_path / "run.log").read_text().splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "max_skip_share" in told[0]


def test_growth_is_seen():
    """The watcher of long runs on made-up figures: what is flat has no trend, a handle lost every 100 steps is one."""
    still = [{"step": s, "memory": 400.0, "files": 20 + s % 3, "threads": 4, "processes": 1} for s in range(0, 1000, 5)]
    leaking = [row | {"files": row["files"] + row["step"] / 100} for row in still]
    assert abs(trend(still, 1000, "files")) < 0.2 and trend(leaking, 1000, "files") == pytest.approx(8, abs=0.2)
    assert picture({"made up": still}).count("<path") > 10
