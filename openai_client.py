"""Chat completions of an OpenAI-compatible server: tried again, bounded in time and size, every answer kept on disk.

    client = Client.from_env("gpt-4o")                            OPENAI_API_KEY, OPENAI_BASE_URL
    answers = ask_all(client, cache_path, questions, workers)     None for a question without a usable answer

urllib3's Retry counts the tries and reads Retry-After. Broken and endless bodies, which it does not know, are tried
again with it. An answer that arrived is on the disk before the same worker asks the next question: no answer is paid
for twice, also after a kill.

The key is in one header of one host. It is never printed, and it is cut out of every text from the server.
"""

import base64
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
from tqdm import tqdm
from urllib3.exceptions import InvalidHeader, MaxRetryError
from urllib3.util.retry import Retry

from model import UserError

TRANSIENT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError,
             requests.exceptions.ContentDecodingError)  # fmt: skip
MAX_WAIT = 300  # seconds; a longer Retry-After ends the run: the cache lets it go on later
MAX_BODY = 1 << 17  # bytes; an answer is some 2 kB
MAX_ASKS = 3  # unusable answers to a question before it is dropped
MAX_SILENT = 5  # questions in a row without any response: the server is down, going on would only burn time


class RetriesExhausted(Exception):
    """No usable response within the allowed tries: this question is dropped."""


class TransientError(Exception):
    """A response that is worth another try. retry_after: the header's text, or None."""

    def __init__(self, why, retry_after=None):
        super().__init__(why)
        self.retry_after = retry_after


@dataclass
class Client:
    """One chat-completions endpoint. Times in seconds."""

    key: str = field(repr=False)
    base_url: str = "https://api.openai.com/v1"
    model: str = "gpt-4o"
    tries: int = 6  # requests for one answer before the question is dropped
    first_wait: float = 1.0  # of the back-off; doubled each time
    connect_timeout: float = 10.0
    read_timeout: float = 60.0  # between two pieces of a response
    deadline: float = 180.0  # for a whole body: one that drips never reaches read_timeout
    counts: Counter = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self):
        # requests puts an unfit header value into its error message, so an unfit key must never get that far
        if not re.fullmatch(r"[!-~]+", self.key):
            found = "found spaces, line breaks or non-ASCII characters (or nothing)"
            raise UserError(f"OPENAI_API_KEY: {found}, expected one word; set it again")
        try:
            url = urlsplit(self.base_url)
            port = f":{url.port}" if url.port else ""
        except ValueError:
            url, port = urlsplit(""), ""
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError("OPENAI_BASE_URL: expected http(s)://host[:port]/path, such as https://api.openai.com/v1")
        self.host = url.hostname + port  # no user:password@ in messages

    @classmethod
    def from_env(cls, model):
        """Key and address from OPENAI_API_KEY and OPENAI_BASE_URL; UserError if there is no key."""
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not key:
            raise UserError("OPENAI_API_KEY: not set, needed by --cot_source openai; or take --cot_source trajectory")
        return cls(key, os.environ.get("OPENAI_BASE_URL") or cls.base_url, model)

    def complete(self, prompt: str, png: bytes = b""):
        """The text of one completion (None if it has none). RetriesExhausted after `tries`, UserError if hopeless."""
        content = [{"type": "text", "text": prompt}]
        if png:
            image = {"url": "data:image/png;base64," + base64.b64encode(png).decode()}
            content.append({"type": "image_url", "image_url": image})
        # max_tokens bounds the price of an answer
        body = {"model": self.model, "max_tokens": 400, "messages": [{"role": "user", "content": content}]}
        retry = Retry(self.tries - 1, backoff_factor=self.first_wait / 2, backoff_jitter=self.first_wait / 2)
        while not self.stop.is_set():
            try:
                return self._exchange(body)
            except TransientError as error:
                why, retry_after = str(error), error.retry_after
            try:
                retry = retry.increment("POST")
            except MaxRetryError:
                raise RetriesExhausted(why) from None
            self.stop.wait(self._seconds(retry, retry_after))
        raise RetriesExhausted("stopped")

    def _seconds(self, retry, retry_after):
        """How long to wait before the next try. UserError for a wait that is too long to sit through."""
        try:
            seconds = retry.parse_retry_after(retry_after) if retry_after else retry.get_backoff_time()
        except InvalidHeader:
            seconds = retry.get_backoff_time()
        if seconds > MAX_WAIT:
            later = "run the same command later, answers so far are kept"
            raise UserError(f"{self.host}: asks to wait {seconds:.0f} s, more than {MAX_WAIT} s; {later}")
        return seconds

    def _authorise(self, request):
        # as `auth=`, not as a header: requests lets a ~/.netrc entry overwrite the header
        request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def _exchange(self, body):
        """One request. TransientError for what is worth another try, UserError for what no wait can change."""
        url, limits = self.base_url.rstrip("/") + "/chat/completions", (self.connect_timeout, self.read_timeout)
        options = {"auth": self._authorise, "stream": True, "timeout": limits, "allow_redirects": False}
        try:
            with requests.post(url, json=body, **options) as response:
                status, text = response.status_code, self._read(response)
        except TRANSIENT as error:
            raise TransientError(type(error).__name__) from None
        except requests.RequestException as error:
            check = "check OPENAI_BASE_URL and the proxy settings"
            raise UserError(f"{self.host}: cannot be asked ({type(error).__name__}); {check}") from None
        if "insufficient_quota" in text:  # OpenAI answers 429 to an empty account
            raise UserError(f"{self.host}: the account has no quota left (HTTP {status} insufficient_quota)")
        if status in (408, 409, 429) or status >= 500:
            raise TransientError(f"HTTP {status}", response.headers.get("Retry-After"))
        if status in (401, 403):
            raise UserError(f"{self.host}: HTTP {status}, the key was refused; check OPENAI_API_KEY")
        if 300 <= status < 400:
            why = "a redirect, is not followed (it would carry the key along)"
            raise UserError(f"{self.host}: HTTP {status}, {why}; set OPENAI_BASE_URL to the right address")
        if status != 200:
            raise UserError(f"{self.host}: HTTP {status} for model {self.model}: {' '.join(text[:200].split())}")
        try:
            return json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise TransientError("not a chat completion") from None

    def _read(self, response):
        """The body as text without the key; TransientError beyond MAX_BODY or the deadline: a body may have no end."""
        end, body = time.monotonic() + self.deadline, bytearray()
        for piece in response.iter_content(1):  # a read of n would wait for all n, however slowly they drip
            body += piece
            if len(body) > MAX_BODY:
                raise TransientError("body too large")
            if time.monotonic() > end:
                raise TransientError("body too slow")
        return body.decode("utf-8", "replace").replace(self.key, "[key]")


class Cache:
    """Every answer as it came, one JSON line each: {"key", "text"}. A line cut by a kill is dropped on opening."""

    def __init__(self, path: Path):
        self.path, self.texts, self.lock = path, {}, threading.Lock()
        data = path.read_bytes() if path.exists() else b""
        self.size = data.rfind(b"\n") + 1  # bytes of whole lines
        for number, line in enumerate(data[: self.size].splitlines(), 1):
            try:
                entry = json.loads(line)
                self.texts.setdefault(entry["key"], []).append(entry["text"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: line {number} is not an answer; fix or remove the file") from None
        self.file = open(path, "ab", buffering=0)
        self.file.truncate(self.size)

    def add(self, key, text):
        line = json.dumps({"key": key, "text": text}).encode() + b"\n"
        with self.lock:
            written = 0
            try:
                while written < len(line):
                    written += self.file.write(line[written:])
                os.fsync(self.file.fileno())
            except OSError as error:
                self.file.truncate(self.size)  # or the next answer would stand behind half of this one
                again = "make room and run again, answers so far are kept"
                raise UserError(f"{self.path}: cannot be written ({error.strerror}); {again}") from None
            self.size += len(line)
            self.texts.setdefault(key, []).append(text)


class Question(NamedTuple):
    prompt: str
    image_hash: str  # what the picture shows, for the cache
    image: Callable[[], bytes]  # the PNG; made only when the server is asked
    check: Callable  # text -> (the answer if it may be used, else None; why not)


def ask(client: Client, cache: Cache, question: Question) -> str | None:
    """A checked answer from the cache or the server, or None: dropped."""
    key = sha256("\0".join((question.image_hash, question.prompt, client.model)).encode()).hexdigest()
    kept = cache.texts.get(key, [])
    for text in kept:
        answer, _ = question.check(text)
        if answer:
            client.counts["from cache"] += 1
            return answer
    for _ in range(MAX_ASKS - len(kept)):
        text = client.complete(question.prompt, question.image())
        client.counts["answers received"] += 1
        cache.add(key, text)
        answer, why = question.check(text)
        if answer:
            return answer
        client.counts[f"rejected: {why}"] += 1
    return None


def ask_all(client: Client, cache_path: Path, questions: list[Question], workers: int) -> list[str | None]:
    """Answers in the order of the questions, None where one is dropped; see `client.counts`.

    Several requests are under way at once. A hopeless error (UserError) stops all of them; what was answered is kept.
    """
    answers, silent = [None] * len(questions), 0
    cache, pool = Cache(cache_path), ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(ask, client, cache, question): i for i, question in enumerate(questions)}
        for future in tqdm(as_completed(futures), "asking", len(futures), disable=None, unit="clip"):
            try:
                answers[futures[future]] = future.result()
                silent = 0
            except RetriesExhausted as error:
                client.counts["no response"] += 1
                silent += 1
                if silent >= MAX_SILENT:
                    again = "check OPENAI_BASE_URL and run again, answers so far are kept"
                    why = f"{silent} clips in a row got no response (last: {error})"
                    raise UserError(f"{client.host}: {why}; {again}") from None
    finally:
        client.stop.set()  # ends all waiting; requests under way end at their timeout
        pool.shutdown(wait=True, cancel_futures=True)
        cache.file.close()
    client.counts["kept"] = sum(answer is not None for answer in answers)
    client.counts["dropped"] = len(answers) - client.counts["kept"]
    return answers
