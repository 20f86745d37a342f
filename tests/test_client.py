"""The client of a server that misbehaves: nothing hangs, no answer is lost or paid for twice, no key leaks."""

import json
import os
import subprocess
import sys
import threading
import time
import zlib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from generate import check_answer
from model import UserError
from openai_client import MAX_ASKS, Client, Question, ask_all

KEY = "sk-secret-0123456789"
GOOD = "<think>The ball goes on to larger x in every frame.</think><answer>(A) Left to Right</answer>"


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Server:
    """Answers by the next entry of `script` (the last one repeats): a status, bytes, or a function of the handler."""

    def __init__(self, *script):
        self.script, self.requests, self.lock = list(script), [], threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            log_message = lambda *_: None

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append((self.path, dict(self.headers), body))
                    act = server.script.pop(0) if len(server.script) > 1 else server.script[0]
                try:
                    act(self) if callable(act) else self.say(200, act) if isinstance(act, bytes) else self.say(act)
                except OSError:
                    pass  # the client hung up, as some tests want

            def say(self, status, body=b"{}", length=None, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = length is not None

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def client(url, **changes):
    """Quick to try again, patient in waiting: a busy machine must not be taken for a slow server."""
    return Client(KEY, url, **dict(tries=4, first_wait=0.01, timeouts=(10.0, 20.0), deadline=30.0) | changes)


def ask(url, path, count=6, workers=3, **changes):
    check = partial(check_answer, right="(A) Left to Right")
    questions = [Question(f"which way?\n{i}", f"hash{i}", lambda: b"png", check) for i in range(count)]
    asker = client(url, **changes)
    return asker, ask_all(asker, path, questions, workers)


def status(code, body=b"{}", **headers):
    return lambda handler: handler.say(code, body, **headers)


def raw(*pieces, every=0.0):
    """Sends these pieces, then hangs up."""

    def act(handler):
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(every)
        handler.close_connection = True

    return act


TROUBLE = {
    "503": 503,
    "429 with seconds": status(429, Retry_After="1"),
    "503 with an invalid Retry-After": status(503, Retry_After="soon"),
    "no json": b"<html>busy</html>",
    "cut in the body": status(200, completion(GOOD), length=5000),
    "hangs up": raw(),
    "bomb": status(200, zlib.compress(b" " * (3 << 20) + completion(GOOD)), Content_Encoding="deflate"),
    "endless": raw(b"HTTP/1.1 200 OK\r\n\r\n", *[b" " * 1000] * 100_000),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_trouble_that_passes_loses_nothing(tmp_path, trouble):
    """Six questions, trouble at the third request: six answers, one request more; a second run asks none."""
    good = completion(GOOD)
    with Server(good, good, trouble, good) as server:
        asker, answers = ask(server.url, tmp_path / "cache", workers=2)
        assert answers == [GOOD] * 6 and asker.counts["answers received"] == 6 and len(server.requests) == 7
        assert ask(server.url, tmp_path / "cache")[1] == answers and len(server.requests) == 7
    assert KEY not in (tmp_path / "cache").read_text()


@pytest.mark.parametrize(("trouble", "words"), [
    (503, "HTTP 503"),  # for good
    (status(401, KEY.encode()), "HTTP 401"),
    (status(404, f"no such\nmodel {KEY}".encode()), "HTTP 404: no such model .key."),
    (status(302, Location="http://127.0.0.1:9/"), "HTTP 302"),  # not followed: it would carry the key along
    (status(429, b'{"error": {"code": "insufficient_quota"}}'), "insufficient_quota"),
])  # fmt: skip
def test_trouble_that_lasts_ends_the_run_and_a_later_run_pays_for_the_rest(tmp_path, trouble, words):
    good = completion(GOOD)
    with Server(good, good, trouble) as server, pytest.raises(UserError, match=words) as error:
        ask(server.url, tmp_path / "cache", workers=1, tries=2)
    assert 3 <= len(server.requests) <= 6 and "\n" not in str(error.value) and KEY not in str(error.value)
    with open(tmp_path / "cache", "ab") as file:
        file.write(b'\n{"key": "cut by a kill')
    with Server(good) as server:
        asker, answers = ask(server.url, tmp_path / "cache")
    assert answers == [GOOD] * 6 and asker.counts["from cache"] == 2 and len(server.requests) == 4
    asker, answers = ask("http://127.0.0.1:9/v1", tmp_path / "cache")  # all are stored: nobody is asked
    assert answers == [GOOD] * 6 and asker.counts["from cache"] == 6


def test_unusable_answers_are_asked_again_then_dropped_and_paid_for_once(tmp_path):
    wrong = completion(GOOD.replace("(A) Left to Right", "(B) Right to Left"))
    with Server(completion("hm"), wrong, completion(GOOD), completion(None)) as server:
        asker, answers = ask(server.url, tmp_path / "cache", count=2, workers=1)
        assert answers == [GOOD, None] and len(server.requests) == 2 * MAX_ASKS
        rejected = {"rejected: wrong form": 4, "rejected: wrong option": 1}
        assert asker.counts == {"answers received": 6, "kept": 1, "dropped": 1} | rejected
        assert ask(server.url, tmp_path / "cache", count=2)[1] == answers and len(server.requests) == 2 * MAX_ASKS
        ask(server.url, tmp_path / "cache", count=1, model="other")  # another model is another question
        assert len(server.requests) == 3 * MAX_ASKS


def test_the_request_and_the_key(tmp_path, monkeypatch):
    """A chat completion with the picture; the key is in its header alone, whatever ~/.netrc or the server says."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # requests would send this instead of the key
    with Server(completion(GOOD.replace("larger x", KEY))) as server:
        asker, answers = ask(server.url + "/", tmp_path / "cache", count=1, model="gpt-x")
    assert "[key]" in answers[0] and KEY not in answers[0] + (tmp_path / "cache").read_text() + repr(asker)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers.pop("Authorization") == f"Bearer {KEY}"
    assert body["model"] == "gpt-x" and KEY not in json.dumps([headers, body])
    text, image = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "which way?\n0"} and image["image_url"]["url"].endswith(";base64,cG5n")
    for key in ("", "two words", "line\nbreak", "sk-é"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
            Client.from_env("gpt-4o")
        assert not key or key not in str(error.value)
    for url in ("api.openai.com/v1", "http://[::1", "http://x:99999/"):
        with pytest.raises(UserError, match="OPENAI_BASE_URL"):
            client(url, tries=1).complete("?", b"png")


def test_killed_again_and_again_no_answer_is_paid_for_twice(tmp_path):
    """The command is ended amid its questions, then run to its end: no answer that arrived is asked for again."""
    flags = ["--output_dir", str(tmp_path / "set"), "--num_samples", "24", "--cot", "--cot_source", "openai"]
    with Server(lambda handler: (time.sleep(0.02), handler.say(200, completion(GOOD)))) as server:
        environment = os.environ | {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url, "HOME": str(tmp_path)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": environment, "text": True}
        for killed in (True, False):
            running = subprocess.Popen([sys.executable, "generate.py", *flags, "--workers", "1"], **pipes)
            while killed and running.poll() is None and len(server.requests) < 8:
                time.sleep(0.01)
            if killed:
                running.kill()
            out, _ = running.communicate(timeout=300)
            assert KEY not in out
    # the server says (A) for every clip: three classes of four have no answer
    assert running.returncode == 0 and "kept 6, dropped 18" in out
    lines = (tmp_path / "set" / "cot_cache.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines if line]
    assert len(set(keys)) == 24 and len(keys) == 6 + 18 * MAX_ASKS
    assert len(server.requests) <= len(keys) + 4, "what is under way at a SIGKILL, one a worker, may be asked again"
