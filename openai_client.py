"""Chat completions of an OpenAI-compatible server: retried, bounded in time and size, every answer stored on disk.

    client = Client.from_env("gpt-4o")                            OPENAI_API_KEY, OPENAI_BASE_URL
    answers = ask_all(client, cache_path, questions, workers)     None for a question without a usable answer

The key is sent in one header only; it is never printed, and cut out of every text from the server.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import requests
from tqdm import tqdm

from model import UserError

MAX_WAIT = 300  # seconds, also where Retry-After asks for more
MAX_BODY = 1 << 17  # bytes; an answer is some 2 kB
MAX_ASKS = 3  # unusable answers to a question before it is dropped
MAX_SILENT = 5  # questions in a row without any response: the server is down, going on would only burn time


class NoAnswerError(Exception):
    """A response that is worth another try. args: the reason, and the seconds that the server asks to wait (or 0)."""


@dataclass
class Client:
    """One chat-completions endpoint. Times in seconds."""

    key: str = field(repr=False)
    base_url: str = "https://api.openai.com/v1"
    model: str = "gpt-4o"
    tries: int = 6  # requests for one answer before the question is dropped
    first_wait: float = 1.0  # of the back-off; doubled each time
    timeouts: tuple = (10.0, 60.0)  # to connect; between two pieces of a response
    deadline: float = 180.0  # for a whole body: one that drips or never ends does not reach the timeout
    counts: Counter = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @classmethod
    def from_env(cls, model):
        """Key and address from OPENAI_API_KEY and OPENAI_BASE_URL; UserError without a key that fits into a header."""
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"[!-~]+", key):  # http.client would show an invalid one in its error message
            expected = "expected one word of ASCII, for --cot_source openai; or take --cot_source trajectory"
            raise UserError(f"OPENAI_API_KEY: {'not one word' if key else 'not set'}, {expected}")
        return cls(key, os.environ.get("OPENAI_BASE_URL") or cls.base_url, model)

    def complete(self, prompt: str, png: bytes = b"") -> str | None:
        """The text of one completion, None if it has none. NoAnswerError after `tries`; UserError if hopeless."""
        content = [{"type": "text", "text": prompt}]
        if png:
            image = {"url": "data:image/png;base64," + base64.b64encode(png).decode()}
            content.append({"type": "image_url", "image_url": image})
        # max_tokens bounds the price of an answer
        body = {"model": self.model, "max_tokens": 400, "messages": [{"role": "user", "content": content}]}
        for number in range(1, self.tries + 1):
            try:
                return self._post(body)
            except NoAnswerError as error:
                wait = error.args[1] or self.first_wait * 2 ** (number - 1) * random.uniform(1, 1.5)
                if number == self.tries or self.stop.wait(wait):
                    raise

    def _post(self, body):
        """One request. NoAnswerError: worth another try; UserError: no wait can change it."""
        url = self.base_url.rstrip("/") + "/chat/completions"
        options = {"auth": self._authorise, "stream": True, "timeout": self.timeouts, "allow_redirects": False}
        try:
            with requests.post(url, json=body, **options) as response:
                status, text = response.status_code, self._read(response)
            wait = response.headers.get("Retry-After", "")
            wait = min(int(wait), MAX_WAIT) if wait.isdecimal() else 0  # a date is not read
        except requests.RequestException as error:
            raise NoAnswerError(type(error).__name__, 0) from None
        if (status in (408, 409, 429) or status >= 500) and "insufficient_quota" not in text:  # an empty account's 429
            raise NoAnswerError(f"HTTP {status}", wait)
        if status != 200:  # a redirect too: following it would carry the key along
            problem = f"the server answered HTTP {status}: {' '.join(text[:200].split())}"
            raise UserError(f"{problem}; check OPENAI_API_KEY, OPENAI_BASE_URL and --cot_model")
        try:
            return json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise NoAnswerError("not a chat completion", 0) from None

    def _authorise(self, request):
        # as `auth=`, not as a header: requests lets a ~/.netrc entry overwrite the header
        request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def _read(self, response):
        """The body as text, without the key. NoAnswerError beyond MAX_BODY or the deadline."""
        end, body = time.monotonic() + self.deadline, bytearray()
        for piece in response.iter_content(1):  # a read of n would wait for all n, however slowly they drip
            body += piece
            if len(body) > MAX_BODY or time.monotonic() > end:
                raise NoAnswerError("body too large or too slow", 0)
        return body.decode("utf-8", "replace").replace(self.key, "[key]")


# -- Answers on disk, one JSON line each: {"key", "text"}


def read_cache(path: Path) -> dict[str, list]:
    """{key: texts}. A line that a kill or a full disk cut short is passed over."""
    texts = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            texts.setdefault(entry["key"], []).append(entry["text"])
        except (ValueError, KeyError, TypeError):
            continue
    return texts


def append_to_cache(path: Path, key: str, text: str | None) -> None:
    try:
        with open(path, "ab") as file:
            # the line break comes first, so that an answer behind a line that was cut short is whole
            file.write(b"\n" + json.dumps({"key": key, "text": text}).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room and run again: it goes on") from None


class Question(NamedTuple):
    prompt: str
    image_hash: str  # what the picture shows, for the cache
    image: Callable[[], bytes]  # the PNG; made only when the server is asked
    check: Callable  # text -> (the answer if it may be used, else None; why not)


def ask(client: Client, cache_path: Path, cache: dict[str, list], question: Question) -> str | None:
    """A checked answer from the cache or the server, or None: dropped."""
    key = sha256("\0".join((question.image_hash, question.prompt, client.model)).encode()).hexdigest()
    for text in cache.get(key, []):
        answer, _ = question.check(text)
        if answer:
            client.counts["from cache"] += 1
            return answer
    for _ in range(MAX_ASKS - len(cache.get(key, []))):
        text = client.complete(question.prompt, question.image())
        client.counts["answers received"] += 1
        append_to_cache(cache_path, key, text)  # before the next request: no answer is paid for twice
        answer, why = question.check(text)
        if answer:
            return answer
        client.counts[f"rejected: {why}"] += 1
    return None


def ask_all(client: Client, cache_path: Path, questions: list[Question], workers: int) -> list[str | None]:
    """Answers in the order of the questions, None where one is dropped; see `client.counts`. UserError: hopeless."""
    answers, silent = [None] * len(questions), 0
    cache, pool = read_cache(cache_path), ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(ask, client, cache_path, cache, question): i for i, question in enumerate(questions)}
        for future in tqdm(as_completed(futures), "asking", len(futures), disable=None, unit="clip"):
            try:
                answers[futures[future]] = future.result()
                silent = 0
            except NoAnswerError as error:
                client.counts["no response"] += 1
                silent += 1
                if silent >= MAX_SILENT:
                    problem = f"{silent} clips in a row got no response (last: {error.args[0]})"
                    raise UserError(f"{problem}; check OPENAI_BASE_URL and run again: it goes on") from None
    finally:
        client.stop.set()  # ends all waiting; requests under way end at their timeout
        pool.shutdown(wait=True, cancel_futures=True)
    client.counts["kept"] = sum(answer is not None for answer in answers)
    client.counts["dropped"] = len(answers) - client.counts["kept"]
    return answers
