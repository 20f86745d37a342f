"""Chains of thought for clips.

1. `explain` words the known trajectory of a drawn clip: free, offline, the same for the same rng.
2. `OpenAI` shows a chat-completions server a strip of frames and asks for the reasoning. The right answer is not told:
   an answer is kept only if its form and its option are right, otherwise it is asked again and finally dropped.

The API key lives in one field that is never printed; every text that came from the server is scrubbed of it.
"""

import base64
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import requests
from tqdm import tqdm

from config import QUESTION
from drawing.clips import Track
from model import UserError

OPTIONS = {
    "Left to Right": "(A) Left to Right",
    "Right to Left": "(B) Right to Left",
    "Falling Down": "(C) Falling Down",
    "Ascending": "(D) Ascending",
}


# ---------------------------------------------------------------------------------------------------------------------
# 1. From the trajectory

# label -> coordinate that changes, how, the one that stays, heading, edge where it leaves, edge where it comes back
_MOTION = {
    "Left to Right": ("x", "grows", "y", "to the right", "right", "left"),
    "Right to Left": ("x", "shrinks", "y", "to the left", "left", "right"),
    "Falling Down": ("y", "grows", "x", "down", "bottom", "top"),
    "Ascending": ("y", "shrinks", "x", "up", "top", "bottom"),
}
_SIGHTINGS = (
    lambda seen: (
        "At " + ", at ".join(f"{t} s {'the ball is ' if k == 0 else ''}at {p}" for k, (t, p) in enumerate(seen))
    ),
    lambda seen: "The ball is at " + ", then at ".join(f"{p} at {t} s" for t, p in seen),
    lambda seen: "I see the ball at " + ", ".join(f"{p} ({t} s)" for t, p in seen),
)
_CHANGES = ("{a} {grows}, {b} stays the same", "{b} stays the same and {a} {grows}", "only {a} changes: it {grows}")
_ENDS = ("so the ball moves {heading}.", "so it is going {heading}.", "which means it travels {heading}.")


def explain(track: Track, label: str, rng: np.random.Generator, coordinates: int) -> str:
    """The answer with its reasoning: `<think>...</think><answer>(A) Left to Right</answer>`.

    `coordinates` positions are named, out of one unbroken stretch if it is long enough; otherwise the text also says
    that the ball leaves and comes back. No option letter appears in the reasoning.
    """
    a, grows, b, heading, out, back = _MOTION[label]
    run, seen = track.longest_run(), np.flatnonzero(track.inside)
    pool = run if len(run) >= coordinates else seen
    picks = pool[np.unique(np.linspace(0, len(pool) - 1, min(coordinates, len(pool))).round().astype(int))]
    parts = []
    if len(picks):
        points = [(f"{track.times[k]:.1f}", f"({track.xy[k, 0]:.0f}, {track.xy[k, 1]:.0f})") for k in picks]
        parts.append(_SIGHTINGS[rng.integers(len(_SIGHTINGS))](points) + ".")
        if (track.lap[picks] != track.lap[picks[0]]).any():
            parts.append(f"It leaves at the {out} and comes back at the {back}.")
    change = _CHANGES[rng.integers(len(_CHANGES))].format(a=a, b=b, grows=grows)
    end = _ENDS[rng.integers(len(_ENDS))].format(heading=heading)
    parts.append(f"Over time {change}, {end}")
    return f"<think>{' '.join(parts)}</think><answer>{OPTIONS[label]}</answer>"


# ---------------------------------------------------------------------------------------------------------------------
# 2. From OpenAI's chat completions

PROMPT = """The picture is one strip: {frames} frames of one video in time order, the earliest at the left, each \
with its time in seconds below it.{about}
{question}
Compare {what} from frame to frame before you decide. Reply in exactly this form:
<think>two or three sentences on how {changes}</think><answer>(letter) text of the option</answer>
Between the think tags, do not name any option or its letter."""
BALL = {
    "about": " A ball that leaves a frame at one edge comes back at the opposite edge.",
    "what": "the ball's position",
    "changes": "the position changes",
}
ANYTHING = {"about": "", "what": "what is seen", "changes": "what is seen changes"}

_FORM = re.compile(r"\s*<think>(.+?)</think>\s*<answer>(.+?)</answer>\s*", re.DOTALL)
MAX_THINK = 1500  # characters: some 250 words; we asked for two or three sentences


class Asked(NamedTuple):
    """One clip to ask about."""

    answer: str  # the right one, "(A) Left to Right"
    frame_hash: str
    strip: Callable[[], bytes]  # the PNG; called only when the server is asked
    question: str = QUESTION
    words: dict = BALL  # what the prompt says of the picture

    @property
    def prompt(self) -> str:
        return PROMPT.format(frames=STRIP_FRAMES, question=self.question, **self.words)

    @property
    def last(self) -> str:
        """The letter of the last option."""
        return re.findall(r"^\(([A-Z])\)", self.question, re.MULTILINE)[-1]


def names_letter(text: str, last: str) -> bool:
    """Whether an option is named: "(b)", a lone capital from B on, or "option A"; a lone A may be the article."""
    any_letter = rf"\([A-{last}a-{last.lower()}]\)|\b[B-{last}]\b"
    return bool(re.search(any_letter + r"|\b(?i:option|answer|choice|letter)\W+(?i:is\W+)?A\b", text))


def check(text, right: str, last: str = "D") -> tuple[str | None, str]:
    """(the answer in our form, "") if it may be used, else (None, why not). last: the letter of the last option."""
    if not isinstance(text, str):
        return None, "no text"
    match = _FORM.fullmatch(text)
    if match is None or len(re.findall(r"</?(?:think|answer)>", text)) != 4:
        return None, "wrong form"
    think, answer = match[1].strip(), match[2].strip()
    if not think or len(think) > MAX_THINK:
        return None, "empty or too long reasoning"
    if answer != right:
        return None, "wrong option"
    if names_letter(think, last):
        return None, "option letter in the reasoning"
    return f"<think>{think}</think><answer>{answer}</answer>", ""


class GaveUp(Exception):
    """The server did not give a usable response within the allowed tries: this clip is dropped."""


class _Retry(Exception):
    """A response that is worth another try. `wait`: seconds the server asked for, or None."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


def retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header (a number or an HTTP date), None if absent or senseless."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return None
        if when.tzinfo is None:  # "-0000" reads as naive: it is UTC
            when = when.replace(tzinfo=UTC)
        seconds = (when - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if seconds < float("inf") else None  # NaN fails the comparison too


@dataclass
class OpenAI:
    """One chat-completions endpoint. Times in seconds; `stop` ends all waiting when another thread failed for good."""

    key: str = field(repr=False)
    base_url: str = "https://api.openai.com/v1"
    model: str = "gpt-4o"
    tries: int = 6  # requests for one answer before the clip is dropped: 0.5 + 1 + 2 + 4 + 8 s of waiting
    first_wait: float = 0.5  # doubled each time
    max_wait: float = 300.0  # a longer Retry-After ends the run: the cache lets it go on later
    connect_timeout: float = 10.0
    read_timeout: float = 60.0  # between two pieces of a response
    deadline: float = 180.0  # for a whole response: a server that drips would never hit read_timeout
    max_body: int = 1 << 17  # bytes; an answer is some 2 kB
    counts: Counter = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self):
        # requests puts an unfit header value into its error message, so an unfit key must never get that far
        if not re.fullmatch(r"[!-~]+", self.key):
            raise UserError(
                "OPENAI_API_KEY: found spaces, line breaks or non-ASCII characters (or nothing), "
                "expected one word; set it again"
            )
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError("OPENAI_BASE_URL: expected http(s)://host[:port]/path, such as https://api.openai.com/v1")
        self.where = url.hostname + (f":{url.port}" if url.port else "")  # no user:password@ in messages

    @classmethod
    def from_env(cls, model: str) -> "OpenAI":
        """Key and address from OPENAI_API_KEY and OPENAI_BASE_URL; UserError if there is no key."""
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not key:
            raise UserError(
                "OPENAI_API_KEY: not set, needed by --cot_source openai; set it, or take --cot_source trajectory"
            )
        return cls(key, os.environ.get("OPENAI_BASE_URL") or cls.base_url, model)

    def complete(self, prompt: str, png: bytes):
        """The text of one completion (None if there is none). Raises GaveUp after `tries`, UserError if hopeless."""
        image = "data:image/png;base64," + base64.b64encode(png).decode()
        body = {
            "model": self.model,
            "max_tokens": 400,  # bounds the price of an answer
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": image}}],
                }
            ],
        }
        for attempt in range(self.tries):
            if self.stop.is_set():
                raise GaveUp("stopped")
            try:
                return self._once(body)
            except (
                requests.Timeout,
                requests.ConnectionError,
                requests.exceptions.ChunkedEncodingError,
                requests.exceptions.ContentDecodingError,
            ) as error:
                why, asked = type(error).__name__, None
            except requests.RequestException as error:  # an address or proxy that cannot be used at all
                told = f"{self.where}: cannot be asked ({type(error).__name__})"
                raise UserError(f"{told}; check OPENAI_BASE_URL and the proxy settings") from None
            except _Retry as retry:
                why, asked = str(retry), retry.wait
            if asked is not None and asked > self.max_wait:
                raise UserError(
                    f"{self.where}: asks to wait {asked:.0f} s, more than {self.max_wait:.0f} s; "
                    "run the same command later, answers so far are kept"
                )
            self.counts[f"retried: {why}"] += 1
            if attempt + 1 < self.tries:
                wait = self.first_wait * 2**attempt * random.uniform(0.5, 1.0)
                self.stop.wait(wait if asked is None else asked + random.uniform(0.0, self.first_wait))
        raise GaveUp(why)

    def _authorise(self, request):
        # as `auth=`, not as a header: requests lets a ~/.netrc entry overwrite the header
        request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def _once(self, body: dict):
        """One request, within the deadline whatever the server does. In a thread of its own, since neither a name that
        is looked up nor headers that drip in know a time limit; one that is given up does not hold the program's end.
        """
        found: Future = Future()

        def ask():
            try:
                found.set_result(self._exchange(body))
            except BaseException as error:  # noqa: BLE001 (whatever it is, it is raised in the thread that waits for us)
                found.set_exception(error)

        threading.Thread(target=ask, name="request", daemon=True).start()
        try:
            return found.result(self.connect_timeout + self.deadline)
        except TimeoutError:
            raise _Retry("response too slow") from None

    def _exchange(self, body: dict):
        url, limits = self.base_url.rstrip("/") + "/chat/completions", (self.connect_timeout, self.read_timeout)
        with requests.post(
            url, json=body, auth=self._authorise, stream=True, timeout=limits, allow_redirects=False
        ) as response:
            status, wait = response.status_code, retry_after(response.headers.get("Retry-After"))
            text = self._read(response)
        if status == 200:
            return self._content(text)
        if status in (408, 409, 429) or status >= 500:
            if "insufficient_quota" in text:  # OpenAI answers 429 to an empty account: waiting does not help
                raise UserError(f"{self.where}: the account has no quota left (429 insufficient_quota)")
            raise _Retry(f"HTTP {status}", wait)
        if status in (401, 403):
            raise UserError(f"{self.where}: HTTP {status}, the key was refused; check OPENAI_API_KEY")
        if 300 <= status < 400:
            raise UserError(
                f"{self.where}: HTTP {status}, a redirect, is not followed (it would carry the key along); "
                "set OPENAI_BASE_URL to the right address"
            )
        raise UserError(f"{self.where}: HTTP {status} for model {self.model}: {' '.join(text[:200].split())}")

    def _read(self, response) -> str:
        """The body as scrubbed text; raises _Retry beyond max_body or the deadline, or when it is cut short."""
        start, body = time.monotonic(), bytearray()
        for piece in response.iter_content(1):  # byte by byte: a read of n waits for all n, however slowly they drip
            body += piece
            if len(body) > self.max_body:
                raise _Retry("body too large")
            if time.monotonic() - start > self.deadline:  # also after `stop`: what comes in is paid for, and is kept
                raise _Retry("response too slow")
        return body.decode("utf-8", "replace").replace(self.key, "[key]")

    @staticmethod
    def _content(text: str):
        try:
            return json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _Retry("not a chat completion") from None


class Cache:
    """Every answer as it came, one JSON line each: {"key", "text"}. A line cut by a kill is dropped on opening."""

    def __init__(self, path: Path):
        self.path = path
        self.texts: dict[str, list] = {}
        self.lock = threading.Lock()
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self.texts.setdefault(entry["key"], []).append(entry["text"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: line {number} is not an answer; mend or remove the file") from None
        self.file = open(path, "ab", buffering=0)
        self.file.truncate(len(whole))
        self.size, self.fault = len(whole), None  # bytes of whole lines; why nothing more can be kept

    def check_room(self, size: int) -> None:
        """UserError unless the disk has `size` bytes left: an answer that cannot be kept must not be paid for."""
        if self.fault:
            raise UserError(self.fault)
        disk = os.statvfs(self.path)
        if disk.f_bavail * disk.f_frsize < size:
            raise UserError(f"{self.path}: the disk is full; make room and run again, answers so far are kept")

    def add(self, key: str, text) -> None:
        line = json.dumps({"key": key, "text": text}, ensure_ascii=True).encode() + b"\n"
        with self.lock:
            written = 0
            try:
                while written < len(line):
                    written += self.file.write(line[written:])
                os.fsync(self.file.fileno())
            except OSError as error:
                self.file.truncate(self.size)  # or the next answer would stand behind half of this one
                told = f"{self.path}: cannot be written ({error.strerror})"
                self.fault = f"{told}; make room and run again, answers so far are kept"
                raise UserError(self.fault) from None
            self.size += len(line)
            self.texts.setdefault(key, []).append(text)

    def close(self) -> None:
        self.file.close()


ROOM = 1 << 20  # bytes free on the cache's disk before a question is asked; an answer is some 2 kB
MAX_ASKS = 3  # answers of a wrong form or option before a clip is dropped
MAX_GAVE_UP = 5  # clips in a row without any response: the server is down, going on would only burn time


def ask_one(client: OpenAI, cache: Cache, asked: Asked) -> str | None:
    """A checked answer for one clip, or None (dropped)."""
    prompt = asked.prompt
    key = sha256("\0".join((asked.frame_hash, prompt, client.model)).encode()).hexdigest()
    for text in cache.texts.get(key, ()):
        answer, _ = check(text, asked.answer, asked.last)
        if answer:
            client.counts["from cache"] += 1
            return answer
    for _ in range(MAX_ASKS - len(cache.texts.get(key, ()))):
        cache.check_room(ROOM)
        text = client.complete(prompt, asked.strip())
        client.counts["answers received"] += 1
        cache.add(key, text)
        answer, why = check(text, asked.answer, asked.last)
        if answer:
            return answer
        client.counts[f"rejected: {why}"] += 1
    return None


STRIP_FRAMES = 8


def ask_all(client: OpenAI, cache_path: Path, clips: list[Asked], workers: int) -> list[str | None]:
    """Answers in the order of the clips, None where a clip is dropped; see `client.counts`.

    Several requests are under way at once. A hopeless error (UserError) stops all of them; what was answered is kept.
    """
    answers, in_a_row = [None] * len(clips), 0
    cache, pool = Cache(cache_path), ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(ask_one, client, cache, clip): k for k, clip in enumerate(clips)}
        for future in tqdm(as_completed(futures), "asking", len(futures), disable=None, unit="clip"):
            try:
                answers[futures[future]] = future.result()
                in_a_row = 0
            except GaveUp as error:
                client.counts["no response"] += 1
                in_a_row += 1
                if in_a_row >= MAX_GAVE_UP:
                    raise UserError(
                        f"{client.where}: {in_a_row} clips in a row got no response (last: {error}); "
                        "check OPENAI_BASE_URL and run again, answers so far are kept"
                    ) from None
    finally:
        client.stop.set()  # wakes sleepers; requests under way end at their timeout
        pool.shutdown(wait=True, cancel_futures=True)
        cache.close()
    client.counts["kept"] = sum(answer is not None for answer in answers)
    client.counts["dropped"] = len(answers) - client.counts["kept"]
    return answers
