"""Chains of thought: words that follow the trajectory, and a client that survives a server which misbehaves."""

import json
import re
import socket
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import generate as G
from config import Generate
from drawing import clips as C
from drawing import cot
from model import UserError

KEY = "sk-secret-0123456789"
GOOD = "<think>The ball goes on to larger x in every frame.</think><answer>(A) Left to Right</answer>"


# -- From the trajectory


@pytest.mark.parametrize("coordinates", [0, 1, 3, 8])
@pytest.mark.parametrize("label", list(C.DIRECTIONS))
def test_explanations_are_true_and_pass_the_check(label, coordinates):
    texts = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        clip = C.draw_clip(rng, label, 64, 30)
        clip = C.augmented(clip, ["crop"], rng) if seed % 3 == 0 else clip
        text = cot.explain(clip.track(), label, rng, coordinates)
        assert cot.check(text, cot.OPTIONS[label]) == (text, ""), text
        assert 10 <= len(text.split()) <= 25 + 9 * coordinates, text
        places = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", text)]
        assert len(places) == coordinates or clip.crop[2] < 1 and places or not coordinates, text
        if len(places) > 1 and "comes back" not in text:
            change = np.diff(np.array(places), axis=0)
            assert (np.sign(change) == C.DIRECTIONS[label]).all(), text
        texts.add(text)
    assert len(texts) > 5 or coordinates == 0 and len(texts) > 4


def test_many_coordinates_mention_the_way_round():
    clip = C.Clip(
        "Left to Right", 64, 30, (60.0, 20.0), (2.0, 0.0), 8.0, "red", (255.0, 0.0, 0.0), "black", (0.0, 0.0, 0.0)
    )
    rng = np.random.default_rng(0)
    assert "leaves at the right and comes back at the left" in cot.explain(clip.track(), clip.label, rng, 8)
    assert "comes back" not in cot.explain(clip.track(), clip.label, rng, 3)


@pytest.mark.parametrize(
    "text, why",
    [
        (GOOD, ""),
        (f"\n{GOOD}\n", ""),
        (GOOD.replace("</think>", "</think>\n"), ""),
        (GOOD.replace("The ball", "A ball"), ""),
        (None, "no text"),
        ([], "no text"),
        ("", "wrong form"),
        ("(A) Left to Right", "wrong form"),
        ("Answer: (A) Left to Right", "wrong form"),
        (GOOD + " Sure!", "wrong form"),
        (GOOD + GOOD, "wrong form"),
        (GOOD.replace("<think>", "<think><think>"), "wrong form"),
        (GOOD.replace("</think>", ""), "wrong form"),
        ("<think> </think><answer>(A) Left to Right</answer>", "empty"),
        (GOOD.replace("ball", "b" * 2000), "too long"),
        (GOOD.replace("(A) Left to Right", "(B) Right to Left"), "wrong option"),
        (GOOD.replace("(A) Left to Right", "(A)"), "wrong option"),
        (GOOD.replace("larger x", "(A)"), "letter"),
        (GOOD.replace("larger x", "option A"), "letter"),
        (GOOD.replace("larger x", "what B says"), "letter"),
        (GOOD.replace("larger x", "the answer is A"), "letter"),
        (GOOD.replace("larger x", "(c)"), "letter"),
    ],
)
def test_check(text, why):
    answer, found = cot.check(text, "(A) Left to Right")
    if why:
        assert answer is None and why in found, (answer, found)
    else:
        assert (answer, found) == (text.strip().replace("\n", ""), "")


# -- From a server


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Server:
    """Answers by the next entry of `script` (the last one repeats): a status, bytes, or a function of the handler."""

    def __init__(self, *script):
        self.script, self.requests, self.lock, self.most, self.now = list(script), [], threading.Lock(), 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    act = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    act(self) if callable(act) else self.say(200, act) if isinstance(act, bytes) else self.say(act)
                except OSError:
                    pass  # the client hung up, as some tests want
                finally:
                    with outer.lock:
                        outer.now -= 1

            do_GET = do_POST

            def say(self, status, body=b"{}", **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

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
    quick = dict(tries=4, first_wait=0.01, connect_timeout=2.0, read_timeout=1.5, deadline=2.0)
    return cot.OpenAI(KEY, url, **(quick | changes))


def cut_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(completion(GOOD))
    handler.wfile.flush()
    handler.close_connection = True


def cut_chunked(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'40\r\n{"cho')
    handler.wfile.flush()
    handler.close_connection = True


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def silent(handler):
    time.sleep(0.6)


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def huge(handler):
    handler.say(200, b" " * (3 << 20) + completion(GOOD))


def bad_gzip(handler):
    handler.say(200, b"not gzip", Content_Encoding="gzip")


PASSING = {
    "408": 408,
    "409": 409,
    "429": 429,
    "500": 500,
    "501": 501,
    "502": 502,
    "503": 503,
    "504": 504,
    "529": 529,
    "no json": b"<html>busy</html>",
    "other json": b'{"ok": true}',
    "no choices": b'{"choices": []}',
    "list": b"[]",
    "null": b"null",
    "cut body": cut_body,
    "cut chunk": cut_chunked,
    "hang up": hang_up,
    "silent": silent,
    "drip": drip,
    "huge": huge,
    "bad gzip": bad_gzip,
    "not utf-8": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING.keys())
def test_a_passing_trouble_is_tried_again(trouble):
    with Server(trouble, completion(GOOD)) as server:
        asked = client(server.url)
        assert asked.complete("which way?", b"png") == GOOD
        assert len(server.requests) == 2 and sum(asked.counts.values()) == 1, asked.counts


@pytest.mark.parametrize("trouble", [503, cut_body, b"[]"])
def test_a_lasting_trouble_gives_the_clip_up(trouble):
    with Server(trouble) as server, pytest.raises(cot.GaveUp):
        client(server.url).complete("which way?", b"png")
    assert len(server.requests) == 4


def test_a_refused_connection_gives_the_clip_up():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(cot.GaveUp, match="ConnectionError"):
        client(url, tries=2).complete("which way?", b"png")


@pytest.mark.parametrize(
    "status, words",
    [
        (401, "key was refused"),
        (403, "key was refused"),
        (400, "HTTP 400"),
        (404, "HTTP 404 for model gpt-4o: no such model"),
        (302, "redirect"),
        (308, "redirect"),
    ],
)
def test_a_hopeless_answer_ends_the_run_with_one_line_and_no_key(status, words):
    def act(handler):
        handler.say(status, f"no such\nmodel {KEY}".encode(), Location="http://127.0.0.1:9/v1/chat/completions")

    with Server(act) as server, pytest.raises(UserError, match=words) as told:
        client(server.url).complete("which way?", b"png")
    assert len(server.requests) == 1 and "\n" not in str(told.value) and KEY not in str(told.value)


def test_an_empty_account_is_not_asked_again():
    with (
        Server(lambda h: h.say(429, b'{"error": {"code": "insufficient_quota"}}')) as server,
        pytest.raises(UserError, match="quota"),
    ):
        client(server.url).complete("which way?", b"png")
    assert len(server.requests) == 1


def test_retry_after_is_honoured():
    with Server(lambda h: h.say(429, Retry_After="0.4"), completion(GOOD)) as server:
        began = time.monotonic()
        client(server.url).complete("which way?", b"png")
        assert time.monotonic() - began >= 0.4
    with (
        Server(lambda h: h.say(503, Retry_After="7200")) as server,
        pytest.raises(UserError, match="asks to wait 7200 s"),
    ):
        client(server.url).complete("which way?", b"png")


def test_retry_after_header():
    soon = datetime.now(UTC) + timedelta(seconds=30)
    assert cot.retry_after("3") == 3 and cot.retry_after("0") == 0 and cot.retry_after("-5") == 0
    assert 27 < cot.retry_after(format_datetime(soon, usegmt=True)) <= 30
    assert 27 < cot.retry_after(soon.strftime("%a, %d %b %Y %H:%M:%S -0000")) <= 30
    assert [cot.retry_after(text) for text in (None, "", "soon", "nan", "inf")] == [None] * 5


def test_the_request_is_a_chat_completion_with_the_strip(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # requests would send this instead of the key
    with Server(completion(GOOD)) as server:
        client(server.url + "/", model="gpt-x").complete("which way?", b"\x89PNG")
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}" and body["model"] == "gpt-x"
    text, image = body["messages"][0]["content"]
    assert (
        text == {"type": "text", "text": "which way?"} and image["image_url"]["url"] == "data:image/png;base64,iVBORw=="
    )


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "sk-é"])
def test_an_unfit_key_is_refused_unseen(key):
    with pytest.raises(UserError) as told:
        cot.OpenAI(key)
    assert not key or key not in str(told.value)


@pytest.mark.parametrize("url", ["api.openai.com/v1", "ftp://x/v1", "http://"])
def test_an_unfit_address_is_refused(url):
    with pytest.raises(UserError, match="OPENAI_BASE_URL"):
        cot.OpenAI(KEY, url)


def test_no_repr_or_message_shows_the_key():
    asked = client("http://me:pass@127.0.0.1:1/v1")
    assert KEY not in repr(asked) and asked.where == "127.0.0.1:1"


def ask(url, path, count=6, label="Left to Right", workers=3, **changes):
    asked = client(url, **changes)
    clips = [cot.Asked(cot.OPTIONS[label], f"hash{k}", lambda: b"png") for k in range(count)]
    return asked, cot.ask_all(asked, path, clips, workers)


def test_several_requests_are_under_way_at_once(tmp_path):
    def slow(handler):
        time.sleep(0.1)
        handler.say(200, completion(GOOD))

    with Server(slow) as server:
        asked, answers = ask(server.url, tmp_path / "cache", count=9)
    assert answers == [GOOD] * 9 and server.most == 3 and asked.counts["kept"] == 9


def test_unfit_answers_are_asked_again_then_dropped_and_never_replaced(tmp_path):
    wrong = completion(GOOD.replace("(A) Left to Right", "(B) Right to Left"))
    with Server(completion("hm"), wrong, completion(GOOD), completion(None)) as server:
        asked, answers = ask(server.url, tmp_path / "cache", count=2, workers=1)
    assert answers == [GOOD, None] and len(server.requests) == 6
    assert asked.counts == {
        "answers received": 6,
        "rejected: wrong form": 1,
        "rejected: wrong option": 1,
        "rejected: no text": 3,
        "kept": 1,
        "dropped": 1,
    }
    with Server(401) as server:  # neither the kept nor the dropped one is asked a second time
        again, answers = ask(server.url, tmp_path / "cache", count=2)
    assert answers == [GOOD, None] and not server.requests and again.counts["from cache"] == 1


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "cache"
    with Server(completion(GOOD), completion(GOOD), 401) as server, pytest.raises(UserError, match="key was refused"):
        ask(server.url, path, count=6, workers=1)
    with open(path, "ab") as file:
        file.write(b'{"key": "cut in the mid')
    with Server(completion(GOOD)) as server:
        asked, answers = ask(server.url, path, count=6)
    assert answers == [GOOD] * 6 and len(server.requests) == 4 and asked.counts["from cache"] == 2
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 6
    assert KEY not in path.read_text()
    with Server(completion(GOOD)) as server:  # another model is another question
        ask(server.url, path, count=6, model="other")
    assert len(server.requests) == 6


def test_a_broken_cache_is_named(tmp_path):
    (tmp_path / "cache").write_text("{}\n")
    with pytest.raises(UserError, match="cache: line 1"):
        ask("http://127.0.0.1:1/v1", tmp_path / "cache")


def test_a_dead_server_ends_the_run(tmp_path):
    with Server(500) as server, pytest.raises(UserError, match="5 clips in a row got no response"):
        ask(server.url, tmp_path / "cache", count=50, tries=2)
    assert len(server.requests) < 40


def test_a_key_that_the_server_echoes_is_scrubbed(tmp_path):
    with Server(completion(GOOD.replace("larger x", KEY))) as server:
        _, answers = ask(server.url, tmp_path / "cache", count=1)
    assert KEY not in answers[0] + (tmp_path / "cache").read_text()


# -- The whole way


def test_generate_with_a_server(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    cfg = Generate(output_dir=str(tmp_path / "set"), num_samples=16, cot=True, workers=1)
    with Server(completion(GOOD)) as server:  # says (A) whatever is shown: right for one class in four
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with pytest.raises(UserError, match="too many clips were dropped"):
            G.generate(cfg)
    assert not (tmp_path / "set" / "train.json").exists() and len(server.requests) == 4 + 12 * 3
    jobs = G.plan(cfg)
    made = {cot.OPTIONS[job.label]: job.index for job in jobs}
    lost = (
        made["(C) Falling Down"]
        if jobs[made["(C) Falling Down"]].part == "train"
        else next(job.index for job in jobs if job.label == "Falling Down" and job.part == "train")
    )

    def ask_all(client_, cache_path, clips, workers):
        return [
            None if k == lost else GOOD.replace("(A) Left to Right", clip.answer) for k, clip in enumerate(clips)
        ]

    monkeypatch.setattr(cot, "ask_all", ask_all)
    metadata = G.generate(cfg)
    train = json.loads((tmp_path / "set" / "train.json").read_text())
    assert f"{lost:06d}" not in [record["id"] for record in train] and metadata["counts"]["train"]["Falling Down"] == 2
    assert not (tmp_path / "set" / "videos" / f"{lost:06d}.mp4").exists()
    assert all(record["conversations"][1]["value"].startswith("<think>") for record in train)
    out, err = capfd.readouterr()
    files = b"".join(path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file())
    assert KEY not in out + err and KEY.encode() not in files


def test_without_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY: not set"):
        G.generate(Generate(output_dir=str(tmp_path / "set"), num_samples=8, cot=True, cot_source="openai", workers=1))
