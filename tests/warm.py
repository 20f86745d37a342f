"""Trainers forked from a process that has everything imported: a start costs the model, not the imports.

    watch = Watch()                      shared memory: what the trainer is doing, how often and how long it did it
    life = start("train_sft", flags, log, watch)     a trainer from main() on, in a process group of its own
    life.wait()                          its exit code; -9 when it was killed

The forking process has run no backward pass and has no group of ranks: a child begins as a fresh interpreter does.
"""

import ctypes
import mmap
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 (it, and what it brings, would be imported in every child)
import numpy as np
import torch._dynamo  # noqa: F401 (as above: making a model on the meta device imports it)
import transformers  # noqa: F401

import checkpoint
import train_grpo
import train_sft
import trainer
from config import cli
from runlog import Log

SCRIPTS = {"train_sft": train_sft, "train_grpo": train_grpo}
# What a trainer can be caught at, the innermost counts: phase -> (where the function is looked up, its name)
PHASES = {
    "start": [],  # from the fork to the first of the others, and between them
    "resume: folder put in order": [(trainer, "prepare_folder")],
    "resume: state put back": [(trainer, "load_state")],
    "step": [(train_sft, "update"), (train_grpo, "update")],
    "rollout": [(train_grpo, "sample_groups")],
    "rollouts written": [(train_grpo, "write_rollouts")],
    "metrics written": [(Log, "write")],
    "evaluation": [(train_sft, "evaluate"), (train_grpo, "evaluate")],
    "checkpoint": [(train_sft, "save"), (train_grpo, "save")],  # the rest of it: gathering, manifest, renaming
    "checkpoint: files": [(trainer, "fill")],
    "checkpoint: flush": [(checkpoint, "sync")],
    "checkpoint: old ones deleted": [(checkpoint, "rotate")],
    "report": [(train_sft, "report"), (train_grpo, "report")],
}
NAMES = [*PHASES]


class Event(ctypes.Structure):
    """sigevent of timer_create(2): 64 bytes"""

    _fields_ = [("value", ctypes.c_void_p), ("signo", ctypes.c_int), ("notify", ctypes.c_int)]
    _fields_ += [("rest", ctypes.c_char * 48)]


def kill_in(seconds: float) -> None:
    """SIGKILL for this process, sent by the kernel's own timer: in the middle of a system call as well as between two
    lines of Python, and on time on a busy machine too."""
    libc, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    when = (ctypes.c_long * 4)(0, 0, int(seconds), max(1, int(seconds % 1 * 1e9)))  # itimerspec: no period, the first
    event = Event(signo=signal.SIGKILL, notify=0)  # SIGEV_SIGNAL
    failed = libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer))
    failed = failed or libc.timer_settime(timer, 0, ctypes.byref(when), None)
    assert not failed, f"no timer: {os.strerror(ctypes.get_errno())}"


class Watch:
    """phase: what the latest life does, or did last; count: how often each was entered; seconds: spent in each.

    aim: (phase, its n-th entry, seconds after that) that the next life is killed at; None: not.
    """

    aim: tuple[str, int, float] | None = None

    def __init__(self):
        n = len(NAMES)
        self.cells = np.frombuffer(mmap.mmap(-1, 8 * (2 * n + 1)), np.float64)
        self.count, self.seconds = self.cells[1 : n + 1], self.cells[n + 1 :]

    @property
    def phase(self) -> str:
        return NAMES[int(self.cells[0])]

    def clear(self) -> None:
        self.cells[:] = 0

    @contextmanager
    def during(self, number: int):
        before, began = self.cells[0], time.perf_counter()
        self.cells[0] = number
        self.count[number] += 1
        if self.aim and self.aim[:2] == (NAMES[number], self.count[number]):
            kill_in(self.aim[2])
        try:
            yield
        finally:
            self.seconds[number] += time.perf_counter() - began
            self.cells[0] = before

    def wrap(self) -> None:
        """In the child: each function of PHASES tells when it runs. It is not changed otherwise."""
        if self.aim and self.aim[0] == "start":
            kill_in(self.aim[2])
        for number, places in enumerate(PHASES.values()):
            for owner, name in places:
                setattr(owner, name, self.told(getattr(owner, name), number))

    def told(self, function, number):
        @wraps(function)
        def inner(*args, **kwargs):
            with self.during(number):
                return function(*args, **kwargs)

        return inner


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Life:
    """A forked process, the leader of its own group."""

    def __init__(self, pid: int):
        self.pid, self.code = pid, None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float = 300.0) -> int:
        """Exit code, or minus the signal. An AssertionError, and the process killed, if it takes longer."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"process {self.pid} still runs after {seconds} s")
            time.sleep(0.001)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def start(script: str, flags: dict, log: Path, watch: Watch | None = None, env: dict | None = None, first=None) -> Life:
    """Fork a trainer. flags: {name: value}; env: RANK and so on; first(): run in the child before main()."""
    sys.stdout.flush()
    sys.stderr.flush()
    if watch:
        watch.clear()
    pid = os.fork()
    if pid:
        return Life(pid)
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(env or {})
        sys.argv = [f"{script}.py", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
        if watch:
            watch.wrap()
        if first:
            first()
        cli(SCRIPTS[script].main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 (the end of a process: all of it goes into the log, as an interpreter does)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
