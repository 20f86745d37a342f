"""Ranks that end or fall silent are missed, by name; those that are busy, suspended together or done are not."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest  # noqa: F401 (sets the environment before torch is imported)
import pytest

from training import heartbeat
from training.heartbeat import Head, Limb, named
from training.meeting import compare

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ["a", "a", "b", "b"]


@pytest.fixture
def ranks(monkeypatch):
    """Four ranks in one process, on two machines; `ended` gets what each would have written as its last line."""
    for name, seconds in {"BEAT": 0.05, "SILENCE": 0.6, "POLL": 0.02, "GRACE": 0.1}.items():
        monkeypatch.setattr(heartbeat, name, seconds)
    ended = {}

    def end(self, text):
        if not self.left.is_set():
            ended[0 if isinstance(self, Head) else self.rank] = text
            self.pass_on(text)
            self.left.set()
            self.hang_up(good_bye=False)

    monkeypatch.setattr(heartbeat.Heart, "end", end)
    head = Head(HOSTS)
    limbs = []
    for rank in (1, 2, 3):
        limb = Limb.__new__(Limb)
        limb.rank = rank
        limb.__init__(HOSTS, rank, "127.0.0.1", head.port, head.token)
        limbs.append(limb)
    head.admit()
    yield [head, *limbs], ended
    for heart in (*limbs, head):
        heart.left.set()


def wait_for(ended, count, seconds=5.0):
    end = time.monotonic() + seconds
    while len(ended) < count and time.monotonic() < end:
        time.sleep(0.01)


def test_a_rank_whose_process_ended_is_named_to_all(ranks):
    hearts, ended = ranks
    hearts[2].left.set()
    hearts[2].connection.close()  # as the kernel does when a process ends
    wait_for(ended, 3)
    assert ended.keys() == {0, 1, 3}
    assert set(ended.values()) == {f"rank 2 on b ended before the others; {heartbeat.AFTER}"}


def test_a_machine_that_falls_silent_is_named_with_its_ranks(ranks):
    hearts, ended = ranks
    for heart in hearts[2:]:
        heart.left.set()  # their connections stay open, as those of a machine that lost its power
    wait_for(ended, 2)
    assert ended.keys() == {0, 1} and ended[0] == ended[1]
    assert ended[0].startswith("nothing was heard of ranks 2, 3 on b for 1 s; the run ends; --resume")


def test_rank_0_is_missed_by_the_others(ranks):
    hearts, ended = ranks
    hearts[0].left.set()
    wait_for(ended, 3)
    assert ended.keys() == {1, 2, 3}
    assert all(text.startswith("nothing was heard of rank 0 on a for 1 s") for text in ended.values())


def test_ranks_that_leave_in_order_are_not_missed(ranks):
    hearts, ended = ranks
    for heart in hearts[1:]:
        heart.leave(good_bye=True)
    hearts[0].leave(good_bye=True)
    assert ended == {} and not any(heart.is_alive() for heart in hearts)


def test_rank_0_waits_for_the_others_good_bye(ranks):
    hearts, ended = ranks
    hearts[1].leave(good_bye=True)
    leaving = threading.Thread(target=hearts[0].leave, args=(True,))
    leaving.start()
    time.sleep(0.3)
    assert leaving.is_alive() and ended == {}
    hearts[2].leave(good_bye=True)
    hearts[3].leave(good_bye=True)
    leaving.join(2)
    assert not leaving.is_alive() and ended == {}


def test_what_stood_still_itself_holds_nothing_against_others(ranks, monkeypatch):
    """All ranks are suspended for longer than SILENCE and go on: as if their clocks had jumped."""
    hearts, ended = ranks
    real, jump = time.monotonic, [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: real() + jump[0])
    time.sleep(0.2)
    jump[0] = 100.0
    time.sleep(1.0)
    assert ended == {} and all(heart.is_alive() for heart in hearts)


def test_strangers_are_sent_away_and_the_port_is_closed_after_the_start():
    head = Head(["a", "a"])
    strangers = [socket.create_connection(("127.0.0.1", head.port)) for _ in range(2)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n".ljust(64))
    strangers[1].sendall(f"{head.token[:-1]}x{1:032}".encode())
    limb = Limb(["a", "a"], 1, "127.0.0.1", head.port, head.token)
    head.admit()
    assert [each.recv(10) for each in strangers] == [b"", b""]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", head.port), 1)
    assert list(head.heard) == [1]
    limb.leave(good_bye=True)
    head.leave(good_bye=True)


def test_names():
    assert named([5], ["a"] * 4 + ["b"] * 4) == "rank 5 on b"
    assert named([6, 4, 7, 5], ["a"] * 4 + ["b"] * 4) == "ranks 4, 5, 6, 7 on b"
    assert named([3, 4], ["a"] * 4 + ["b"] * 4) == "rank 3 on a, and 1 on other machines"


def test_what_differs_between_machines():
    same = [{"--seed": 1, "data": "5 records"}, {"torch": "2.13"}]
    assert compare([same] * 4, HOSTS) == (None, [])
    other = [{"--seed": 1, "data": "4 records"}, {"torch": "2.11"}]
    wrong, notes = compare([same, same, other, other], HOSTS)
    assert wrong == "data: found 4 records on rank 2 (b), 5 records on rank 0 (a); expected the same on every machine"
    assert notes == ["torch: 2.11 on rank 2 (b), 2.13 on rank 0 (a)"]  # once a machine
    assert compare([same, [{"--seed": 1}, same[1]]], HOSTS)[0].startswith("data: found None on rank 1 (a)")


def test_exit_code_is_sysexits():
    assert heartbeat.LOST == os.EX_TEMPFAIL


def test_rank_0_makes_room_for_a_thousand_connections():
    """In a process of its own, since a limit cannot be told apart from the next test's."""
    code = """
import resource
from training.heartbeat import make_room
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
make_room(2)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
make_room(1024)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], hard)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    few, many, hard = (int(word) for word in done.stdout.split())
    limits = [each if hard == -1 else min(each, hard) for each in (1032, 5120)]
    assert [few, many] == limits
