"""Disks that are full, read-only, forbidden, slow or gone: one line, exit code 2, the last good checkpoint intact,
nothing half-written. With real small disks where this process may mount one (as root), with limits and patched calls
anywhere."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import conftest  # noqa: F401 (sets the environment before torch is imported)
import pytest
import test_train_sft
from test_faults_sft import let_go
from test_train_sft import flags_for, metrics, steps_kept

import checkpoint
import data
import report
import runlog
import train_sft
from checkpoint import newest_checkpoint, what_is_broken
from config import cli
from model import UserError

base, sft = test_train_sft.base, test_train_sft.sft  # fixtures
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def disk(tmp_path):
    """disk(size) mounts an empty disk of so many KiB at tmp_path; it is full when it is full, also for root."""
    mounted = []

    def make(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(tmp_path)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a disk can be mounted by root only; the patched tests run anywhere")
        mounted.append(tmp_path)
        return tmp_path

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def at_step(monkeypatch, number, act):
    """Call act() in the middle of step `number`."""
    update, seen = train_sft.update, []

    def acting(*args):
        seen.append(1)
        if len(seen) == number:
            act()
        return update(*args)

    monkeypatch.setattr(train_sft, "update", acting)


def fill(folder):
    """Take what is left of a disk."""
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


def whole_lines(folder):
    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n") and [json.loads(line) for line in text.splitlines()]
    return True


def leftovers(folder):
    return sorted(path.name for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp"))


# A full disk


def test_a_disk_that_is_full_at_a_checkpoint(sft, disk, monkeypatch):
    whole = sft("whole", save_steps=2)
    size = sum(path.stat().st_size for path in (whole / "checkpoint-4").iterdir())
    shutil.rmtree(whole)
    place = disk(2 * size // 1024)  # room for one, and for most of a second one
    with pytest.raises(UserError, match="checkpoint-4: cannot be written .*o space left.*earlier ones are in") as told:
        sft("run", save_steps=2, save_total_limit="none")
    folder = place / "run"
    assert "\n" not in str(told.value) and steps_kept(folder) == [2] and leftovers(folder) == [] and whole_lines(folder)
    assert what_is_broken(folder / "checkpoint-2") is None
    del told
    let_go()
    subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)  # room is made
    sft("run", save_steps=2, save_total_limit="none", resume=True)
    assert steps_kept(folder) == [2, 4, 5] and [step for (step,) in metrics(folder, "step")] == [1, 2, 3, 4, 5]


def test_a_disk_that_is_full_at_a_step(sft, disk, monkeypatch):
    place = disk(8192)
    at_step(monkeypatch, 4, lambda: fill(place))
    with pytest.raises(UserError, match="(metrics.jsonl|checkpoint-4): cannot be written .*No space left.*intact"):
        sft("run", save_steps=2)  # a line may still fit in the file's last block
    assert steps_kept(place / "run") == [2] and whole_lines(place / "run") and leftovers(place / "run") == []


def test_a_disk_that_is_full_at_the_start(sft, disk):
    fill(disk(64))
    with pytest.raises(UserError, match="run:? cannot be written .No space left"):
        sft("run")


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("after", range(0, 12, 3))
def test_any_fault_at_any_write_of_a_checkpoint(tmp_path, monkeypatch, fault, after):
    """The calls that touch the disk fail one by one, also those of flushing and renaming: whole or absent."""
    folder, calls = tmp_path / "checkpoint-2", []
    checkpoint.write_whole(folder, lambda beside: (beside / "a.json").write_text("1"))

    def failing(real):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == after + 1:
                raise OSError(fault, os.strerror(fault))
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", failing(checkpoint.sync))
        patch.setattr(checkpoint, "sha256", failing(checkpoint.sha256))
        patch.setattr(Path, "rename", failing(Path.rename))
        patch.setattr(Path, "write_text", failing(Path.write_text))
        try:
            checkpoint.write_whole(folder, lambda beside: (beside / "a.json").write_text("2"))
        except OSError as error:
            assert error.errno == fault
    if folder.exists():
        assert what_is_broken(folder) is None and (folder / "a.json").read_text() in "12"
    else:  # between moving the old one away and the new one in: both are hidden, neither is half
        assert [path.name for path in tmp_path.iterdir()] in ([".checkpoint-2.old"], [])


@pytest.mark.parametrize("written", [0, 1, 20])
def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch, written):
    path = tmp_path / "metrics.jsonl"
    runlog.append(path, [{"step": 1}])

    class Short:  # a disk that takes so many bytes, then none
        def __init__(self, file):
            self.file, self.left = file, written

        def write(self, text):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            n, self.left = self.file.write(text[: self.left]), 0
            return n

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    monkeypatch.setattr("builtins.open", lambda *args, real=open, **kwargs: Short(real(*args, **kwargs)))
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written .No space left"):
        runlog.append(path, [{"step": 2, "loss": 0.123456789}, {"step": 2}])
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n'


# Read-only, forbidden


def test_a_disk_that_becomes_read_only(sft, disk, monkeypatch):
    """As a file system does that found an error: files that are open stay so, nothing else can be written."""
    place = disk(65536)
    folder = str(place / "run")

    def freeze():
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    at_step(monkeypatch, 4, freeze)
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written .Read-only file system"):
        sft("run", save_steps=2)
    with pytest.raises(UserError, match="run cannot be written .Read-only file system"):
        sft("run", resume=True)
    subprocess.run(["umount", "-l", folder], check=True)
    assert steps_kept(place / "run") == [2] and what_is_broken(newest_checkpoint(place / "run")) is None


def run_script(script, *flags, limit=None, plain=False, **options):
    """limit: bytes a file may have (RLIMIT_FSIZE). plain: without root's right to write anywhere."""
    command = [sys.executable, script, *map(str, flags)]
    if plain and os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    lower = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    given = {"cwd": ROOT, "text": True, "timeout": 100, "preexec_fn": lower}
    return subprocess.run(command, **(given | {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options))


def one_line(done, *words):
    assert done.returncode == 2, (done.returncode, done.stderr[-3000:])
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


needs_setpriv = pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write anywhere")


@needs_setpriv
@pytest.mark.parametrize("script", ["train_sft.py", "train_grpo.py", "generate.py", "report.py"])
def test_a_folder_that_may_not_be_written(base, tmp_path, script):
    folder = tmp_path / "forbidden"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    folder.chmod(0o555)
    flags = flags_for(base, folder / "run", data_path=base / "data/train.json")
    if script == "train_grpo.py":
        flags += ["--model_ckpt", "none"]
    others = {"report.py": [folder], "generate.py": ["--output_dir", folder / "set", "--num_samples", "8"]}
    flags = others.get(script, flags)
    one_line(run_script(script, *flags, plain=True), str(folder), "cannot be written (Permission denied)")
    folder.chmod(0o755)
    assert [path.name for path in folder.iterdir()] == ["run.json"]


@needs_setpriv
def test_a_dataset_that_may_not_be_read(base, tmp_path):
    shutil.copyfile(base / "data/train.json", tmp_path / "train.json")
    (tmp_path / "train.json").chmod(0)
    done = run_script("data.py", tmp_path / "train.json", plain=True)
    one_line(done, "train.json", "Permission denied")
    assert done.stdout == ""  # nothing of it is told as if it had been read


# The other scripts


@pytest.mark.parametrize("workers", [1, 2])
def test_generate_on_a_disk_that_is_too_small(disk, workers):
    place = disk(120)
    flags = ["--output_dir", place / "set", "--num_samples", 150, "--workers", workers]
    one_line(run_script("generate.py", *flags), "set: cannot be written (No space left on device)", "make room")
    assert list((place / "set").iterdir()) == []  # not even the clips that fitted


@pytest.mark.parametrize("limit", [900, 20_000])
def test_generate_with_files_that_may_not_grow(tmp_path, limit):
    """At 900 bytes the clips fail, at 20,000 train.json; a dataset that was there stays as it was."""
    flags = ["--output_dir", tmp_path, "--num_samples", 60, "--workers", 1]
    done = run_script("generate.py", *flags)
    assert done.returncode == 0, done.stderr
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    one_line(run_script("generate.py", *flags, "--overwrite", "--seed", 7, limit=limit), "File too large")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_report_that_does_not_fit(sft, tmp_path):
    folder = sft("run", max_steps=2)
    page = (folder / "report.html").read_bytes()
    one_line(run_script("report.py", folder, limit=10_000), "report.html: cannot be written (File too large)")
    assert (folder / "report.html").read_bytes() == page and leftovers(folder) == []


def test_a_report_that_cannot_be_written_does_not_end_a_run(sft, monkeypatch, capfd):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report.Path, "replace", full)
    folder = sft("run", max_steps=2)
    assert steps_kept(folder) == [2] and leftovers(folder) == []
    assert "report.html: cannot be written (No space left on device)" in capfd.readouterr().out


@pytest.mark.parametrize("script", ["infer.py", "data.py", "generate.py", "report.py"])
def test_a_standard_output_that_is_full(base, tmp_path, script):
    """As with `> log` on a full disk; with `2>&1` only the exit code can tell."""
    clip = next((base / "data/videos").iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    flags = {"generate.py": ["--output_dir", tmp_path / "set", "--num_samples", 8], "report.py": [tmp_path / "run"]}
    flags = flags.get(script, [clip, "--model_id", base / "tiny"])
    with open("/dev/full", "w") as device:
        one_line(run_script(script, *flags, stdout=device), "standard output", "No space left on device")
        assert run_script(script, *flags, stdout=device, stderr=device).returncode == 2


def test_cli_tells_what_a_disk_did_and_nothing_else(capsys):
    def fail(error):
        raise error

    with pytest.raises(SystemExit) as ended:
        cli(lambda: fail(PermissionError(errno.EACCES, "Permission denied", "a/file")))
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: a/file: Permission denied; ")
    for other in (FileExistsError(errno.EEXIST, "File exists"), ConnectionResetError(), OSError("ours")):
        with pytest.raises(type(other)):  # a fault of ours keeps its traceback
            cli(lambda other=other: fail(other))


# A dataset that goes, or comes slowly


@pytest.fixture
def copied(base, tmp_path):
    """A dataset of its own, that may be damaged; clips are read again whenever they are needed."""
    shutil.copytree(base / "data", tmp_path / "data")
    options = {"data_path": tmp_path / "data/train.json", "cache_mb": 0, "max_steps": 12, "save_steps": 2}
    return tmp_path / "data", options | {"per_device_train_batch_size": 4, "pack_tokens": "none"}


def test_a_video_that_is_removed_is_skipped_counted_and_named(sft, copied, monkeypatch, caplog):
    folder, options = copied
    at_step(monkeypatch, 3, lambda: (folder / "videos/000003.mp4").unlink())
    run = sft("run", **options, max_skip_share=0.2)
    assert metrics(run, "skipped")[0] == (0,) and metrics(run, "skipped")[-1] == (1,) and steps_kept(run)[-1] == 12
    assert sum("000003.mp4" in record.getMessage() for record in caplog.records) == 1


def test_a_folder_of_clips_that_is_gone_ends_the_run_at_once(sft, copied, monkeypatch, caplog, tmp_path):
    folder, options = copied
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: (folder / "videos").rename(folder / "away"))
        with pytest.raises(UserError, match="data/videos: this folder of clips was there at the start and") as told:
            sft("run", **options)
    assert "\n" not in str(told.value) and not caplog.records  # one line, not one a sample
    assert steps_kept(tmp_path / "run")[-1] >= 4 and whole_lines(tmp_path / "run")
    del told
    let_go()
    (folder / "away").rename(folder / "videos")  # the disk is mounted again
    assert metrics(sft("run", **options, resume=True), "skipped") == [(0,)] * 12


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_dataset_file_that_is_removed_was_already_read(sft, copied, monkeypatch, form):
    folder, options = copied
    path = folder / f"train.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in json.loads((folder / "train.json").read_text())))
    whole = sft("whole", **options | {"data_path": path})
    at_step(monkeypatch, 3, path.unlink)
    run = sft("run", **options | {"data_path": path})
    assert metrics(run, "loss") == metrics(whole, "loss")
    with pytest.raises(UserError, match=f"train.{form}: no such file"):
        sft("run", **options | {"data_path": path}, resume=True)


def test_a_slow_disk_is_waited_for_and_shown(sft, copied, monkeypatch, capfd):
    read, options = data.read_clip, copied[1] | {"max_steps": 3, "logging_steps": 1}
    whole = sft("whole", **options)

    def slow(plan):
        time.sleep(0.3)
        return read(plan)

    monkeypatch.setattr(data, "read_clip", slow)
    capfd.readouterr()
    run = sft("run", **options)
    assert metrics(run, "loss") == metrics(whole, "loss")
    assert all(wait > 0.3 for (wait,) in metrics(run, "wait"))
    shown = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step")]
    assert len(shown) == 3 and all("wait  " in line and "wait   0%" not in line for line in shown)
