"""The chain-of-thought service over every fault by name: no hang, no lost answer, no answer paid for twice, and the key
nowhere but in the one header of the one host. What test_cot.py tests in parts, these go through the command."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from test_cot import GOOD, KEY, Server, ask, bad_gzip, client, completion, cut_body, cut_chunked, drip, hang_up, silent

from drawing import cot
from model import UserError

ROOT = Path(__file__).resolve().parents[1]


def status(code, body=b"{}", **headers):
    return lambda handler: handler.say(code, body, **headers)


def in_seconds(seconds):
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
    return status(429, Retry_After=when)


def drip_headers(handler):
    """A line of headers now and then, for ever: each piece comes in time, the whole never."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for k in range(100):
        handler.wfile.write(b"X-%d: y\r\n" % k)
        handler.wfile.flush()
        time.sleep(0.05)


def endless_header(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(2000):
        handler.wfile.write(b"y" * 100)


def bomb(handler):
    """3 kB that become 3 MB."""
    handler.say(200, zlib.compress(b" " * (3 << 20) + completion(GOOD)), Content_Encoding="deflate")


def no_http(handler):
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    handler.close_connection = True


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    handler.connection.close()
    handler.close_connection = True


WRONG = GOOD.replace("(A) Left to Right", "(B) Right to Left")
PASSING = {
    **{str(code): code for code in (408, 429, 500, 501, 502, 503, 504)},
    "429 with seconds": status(429, Retry_After="0.2"),
    "429 with a date": in_seconds(0.5),
    "429 with a date that is over": in_seconds(-100),
    "429 with a Retry-After that is none": status(429, Retry_After="soon"),
    "503 with seconds": status(503, Retry_After="0.2"),
    "slow to answer": silent,
    "slow in the body": drip,
    "slow in the headers": drip_headers,
    "endless header": endless_header,
    "cut in the body": cut_body,
    "cut in a chunk": cut_chunked,
    "hangs up": hang_up,
    "reset": reset,
    "no HTTP": no_http,
    "bad gzip": bad_gzip,
    "bomb": bomb,
    "huge body": status(200, b" " * (3 << 20)),
    "huge answer": status(200, completion("<think>" + "x" * (1 << 18) + "</think>")),
    "no json": b"<html>busy</html>",
    "empty": b"",
    "other json": b'{"error": {"message": "overloaded"}}',
    "deep json": b"[" * 50_000,
    "no choices": b'{"choices": []}',
}
REFUSED = {  # answers that were given, and paid for, but cannot be used: asked again as another question, three at most
    "no text": completion(None),
    "empty text": completion(""),
    "a list": completion([{"type": "text", "text": GOOD}]),
    "wrong form": completion("(A) Left to Right"),
    "wrong option": completion(WRONG),
}


PATIENT = dict(read_timeout=10.0, deadline=15.0)  # seconds; a loaded machine must not be taken for a slow server


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_loses_nothing(tmp_path, name):
    """Six clips, the fault at the third request: six answers, one request more, each kept once, a resume asks none."""
    good, is_slow = completion(GOOD), name.startswith(("slow", "endless"))
    with Server(good, good, PASSING[name], good) as server:
        asked, answers = ask(server.url, tmp_path / "cache", workers=2, **({} if is_slow else PATIENT))
        assert answers == [GOOD] * 6 and asked.counts["answers received"] == 6
        requests = len(server.requests)
        assert requests == 7 or (is_slow and requests > 7)
        ask(server.url, tmp_path / "cache")
        assert len(server.requests) == requests
    assert len((tmp_path / "cache").read_text().splitlines()) == 6 and KEY not in (tmp_path / "cache").read_text()


@pytest.mark.parametrize("fault", REFUSED.values(), ids=REFUSED.keys())
def test_an_answer_of_no_use_is_paid_for_once(tmp_path, fault):
    with Server(fault) as server:
        asked, answers = ask(server.url, tmp_path / "cache", count=2, **PATIENT)
        assert answers == [None, None] and len(server.requests) == 2 * cot.MAX_ASKS
        assert ask(server.url, tmp_path / "cache", count=2)[1] == [None, None]
        assert len(server.requests) == 2 * cot.MAX_ASKS


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_a_fault_that_lasts_ends_the_run_after_few_requests(tmp_path, fault):
    with Server(fault) as server:
        with pytest.raises(UserError, match="5 clips in a row got no response"):
            ask(server.url, tmp_path / "cache", count=40, workers=8, tries=2)
        assert len(server.requests) <= 2 * (cot.MAX_GAVE_UP + 8 + 8)


HOPELESS = {
    "401": (status(401), "HTTP 401, the key was refused"),
    "403": (status(403), "HTTP 403, the key was refused"),
    "404": (status(404, b"no such model"), "HTTP 404 for model gpt-4o: no such model"),
    "redirect": (status(302, Location="http://127.0.0.1:9/"), "HTTP 302, a redirect, is not followed"),
    "quota": (status(429, b'{"error": {"code": "insufficient_quota"}}'), "no quota left"),
    "429, an hour": (status(429, Retry_After="3600"), "asks to wait 3600 s"),
    "429, a date in an hour": (in_seconds(3601), "asks to wait [23]... s"),
    "429, for ever": (status(429, Retry_After="1e300"), "asks to wait"),
}


@pytest.mark.parametrize("fault, words", HOPELESS.values(), ids=HOPELESS.keys())
def test_a_hopeless_fault_ends_the_run_at_once_and_a_later_run_pays_for_the_rest(tmp_path, fault, words):
    good = completion(GOOD)
    with Server(good, good, fault) as server, pytest.raises(UserError, match=words) as told:
        ask(server.url, tmp_path / "cache", workers=1, **PATIENT)
    assert len(server.requests) in (3, 4) and "\n" not in str(told.value) and KEY not in str(told.value)
    with Server(good) as server:
        assert ask(server.url, tmp_path / "cache", **PATIENT)[1] == [GOOD] * 6
        assert len(server.requests) == 4


def test_an_answer_that_is_under_way_when_the_run_ends_is_kept(tmp_path):
    """The first request is answered slowly, the second ends the run: what the first one cost is not lost."""
    under_way = threading.Event()

    def slow(handler):
        under_way.set()
        body = completion(GOOD)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:10])
        handler.wfile.flush()
        time.sleep(0.3)
        handler.wfile.write(body[10:])

    def refuse(handler):
        under_way.wait(5)
        handler.say(401)

    with Server(slow, refuse) as server, pytest.raises(UserError, match="key was refused"):
        ask(server.url, tmp_path / "cache", workers=2, **PATIENT)
    assert len((tmp_path / "cache").read_text().splitlines()) == 1


def test_a_refused_connection_ends_the_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="5 clips in a row got no response .last: ConnectionError"):
        ask(url, tmp_path / "cache", count=20, tries=2)


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(30))
    began = time.monotonic()
    with pytest.raises(cot.GaveUp, match="too slow"):
        client("http://far.away/v1", connect_timeout=0.1, deadline=0.2, tries=2).complete("?", b"png")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_gets_no_request(tmp_path, code):
    with Server(completion(GOOD)) as other:
        with Server(status(code, Location=f"{other.url}/chat/completions")) as server:
            with pytest.raises(UserError, match="not followed"):
                ask(server.url, tmp_path / "cache")
        assert other.requests == []


def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://[bad")
    with pytest.raises(UserError, match="far.away: cannot be asked .Invalid"):
        client("http://far.away/v1").complete("?", b"png")


# The cache on a bad disk


@pytest.mark.parametrize("at", ["write", "half", "fsync"])
def test_a_full_disk_ends_the_run_and_leaves_whole_answers(tmp_path, monkeypatch, at):
    """The fourth answer cannot be kept: three are, none stands half, and the run does not go on paying."""
    real, calls = os.fsync, []

    def sync(handle):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    class Short:
        def __init__(self, file):
            self.file, self.count = file, 0

        def write(self, line):
            self.count += 1
            if self.count > 3:
                if at == "half" and self.count == 4:
                    return self.file.write(line[:30])
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(line)

        def __getattr__(self, name):
            return getattr(self.file, name)

    cache = cot.Cache.__init__

    def opened(self, path):
        cache(self, path)
        self.file = Short(self.file)

    if at == "fsync":
        monkeypatch.setattr(cot.os, "fsync", sync)
    else:
        monkeypatch.setattr(cot.Cache, "__init__", opened)
    path = tmp_path / "cache"
    with Server(completion(GOOD)) as server, pytest.raises(UserError, match="cache: cannot be written .No space left"):
        ask(server.url, path, workers=1, **PATIENT)
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3
    assert path.read_text().endswith("\n") and len(server.requests) <= 5
    monkeypatch.undo()
    with Server(completion(GOOD)) as server:
        assert ask(server.url, path, **PATIENT)[1] == [GOOD] * 6 and len(server.requests) == 3


def test_nothing_is_asked_without_room_for_the_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(cot, "ROOM", 1 << 60)
    with Server(completion(GOOD)) as server, pytest.raises(UserError, match="the disk is full; make room"):
        ask(server.url, tmp_path / "cache")
    assert server.requests == []


# The command


def echo(code):
    """A fault whose body, reason and headers all carry the key."""

    def act(handler):
        handler.send_response(code, f"see {KEY}")
        body = json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()
        for name, value in (("X-Key", KEY), ("Location", f"http://127.0.0.1:9/{KEY}"), ("Content-Length", len(body))):
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(body)

    return act


def everything(folder):
    return b"\0".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def command(tmp_path, url, **popen):
    flags = ["--output_dir", str(tmp_path / "set"), "--num_samples", "40", "--cot", "--cot_source", "openai"]
    environment = os.environ | {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    # a shell's background jobs, and what they start, would ignore Ctrl-C
    popen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)} | popen
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, "env": environment, "text": True}
    return subprocess.Popen([sys.executable, "generate.py", *flags, "--workers", "1"], **pipes | popen)


@pytest.mark.parametrize("fault", [echo(401), echo(404), echo(302), echo(500)], ids=["401", "404", "302", "500"])
def test_the_key_is_in_no_file_and_no_output(tmp_path, fault):
    """A server sends the key back in every place there is; the folder, home and temporary folder are searched."""
    good = completion(GOOD.replace("larger x", KEY))  # these are kept, without it
    with Server(good, good, fault, *([good] * 3), echo(401)) as server:
        done = command(tmp_path, server.url)
        out, err = done.communicate(timeout=60)
    assert done.returncode == 2 and "Traceback" not in err, err
    assert KEY not in out + err and KEY.encode() not in everything(tmp_path) and b"[key]" in everything(tmp_path)
    for _, headers, body in server.requests:
        assert headers.pop("Authorization") == f"Bearer {KEY}" and KEY not in json.dumps([headers, body])


def test_a_crash_shows_no_key(tmp_path):
    """Whatever breaks inside, the traceback has no key: with local variables shown too."""
    code = (
        "import sys, generate\nfrom drawing import cot\n"
        "def fail(self, body): raise RuntimeError(repr(self) + str(vars(self).keys()))\n"
        "cot.OpenAI._exchange = fail\n"
        "sys.argv = ['generate.py', *sys.argv[1:]]\ngenerate.main()\n"
    )
    (tmp_path / "crash.py").write_text(code)
    flags = ["--output_dir", str(tmp_path / "set"), "--num_samples", "8", "--cot", "--workers", "1"]
    environment = os.environ | {"OPENAI_API_KEY": KEY, "PYTHONPATH": str(ROOT), "OPENAI_BASE_URL": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, str(tmp_path / "crash.py"), *flags], env=environment, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 1 and "RuntimeError" in done.stderr
    assert KEY not in done.stdout + done.stderr and KEY.encode() not in everything(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_again_and_again_no_answer_is_paid_for_twice(tmp_path, number):
    """The command is ended in the middle of its questions, three times, then let run: no question whose answer arrived
    is asked again, and every clip has one answer."""

    def right(handler):
        time.sleep(0.02)
        handler.say(200, completion(GOOD))  # right for one clip in four: each other clip is asked three times, not more

    with Server(right) as server:
        asked = []
        for k in range(4):
            before = len(server.requests)
            running = command(tmp_path, server.url)
            while k < 3 and running.poll() is None and len(server.requests) < before + 15:
                time.sleep(0.01)
            if k < 3:
                running.send_signal(number)
            out, err = running.communicate(timeout=60)
            asked.append(len(server.requests) - before)
            assert KEY not in out + err
        received = len((tmp_path / "set/cot_cache.jsonl").read_text().splitlines())
    assert "too many clips were dropped" in err  # (A) for every clip: three classes have no answer, which is told
    keys = [json.loads(line)["key"] for line in (tmp_path / "set/cot_cache.jsonl").read_text().splitlines()]
    most = max(keys.count(key) for key in set(keys))
    assert len(set(keys)) == 40 and most <= cot.MAX_ASKS and received == 10 + 30 * 3
    # what was under way when the process was killed may be asked again, at most one a worker and kill
    assert sum(asked) <= received + (3 * 4 if number == signal.SIGKILL else 0), asked
    assert min(asked[:3]) >= 15
