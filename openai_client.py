"""Chat completions of an OpenAI-compatible server: retried, bounded in time and size, every answer stored on disk.

The key is sent in one header only; it is never printed, and cut out of every text from the server.
"""

import base64
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import requests

from model import UserError
from script import in_threads

MAX_WAIT = 300  # seconds between two tries, also where Retry-After asks for more
MAX_BODY = 1 << 17  # bytes; an answer is some 2 kB
MAX_ASKS = 3  # unusable answers to a question before it is dropped


class NoAnswerError(UserError):
    """The server gives no usable response, after all tries or for good."""


@dataclass
class Client:
    """One chat-completions endpoint. Times in seconds."""

    key: str = field(repr=False)
    base_url: str = "https://api.openai.com/v1"
    model: str = "gpt-4o"
    tries: int = 6
    first_wait: float = 1.0  # after the first try, doubled after each
    timeouts: tuple = (10.0, 60.0)  # to connect; between two pieces of a response
    deadline: float = 180.0  # for a whole body: one that drips or never ends does not reach the timeout
    counts: Counter = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event, repr=False)  # ends all waiting

    @classmethod
    def from_env(cls, model: str):
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable() and key.split() == [key]):  # requests would show it in its error
            raise UserError(f"OPENAI_API_KEY: {'not one word' if key else 'not set'}, expected one word of ASCII")
        return cls(key, os.environ.get("OPENAI_BASE_URL") or cls.base_url, model)

    def complete(self, prompt: str, png: bytes = b"") -> str | None:
        """The text of one completion, None if it has none."""
        content = [{"type": "text", "text": prompt}]
        if png:
            image = {"url": "data:image/png;base64," + base64.b64encode(png).decode()}
            content.append({"type": "image_url", "image_url": image})
        # max_tokens bounds the price of an answer
        body = {"model": self.model, "max_tokens": 400, "messages": [{"role": "user", "content": content}]}
        for number in range(self.tries):
            wait = self.first_wait * 2**number * random.uniform(1, 1.5)
            try:
                status, retry_after, text = self.post(body)
                if status == 200:
                    return json.loads(text)["choices"][0]["message"]["content"]
                problem = f"the server answers HTTP {status}: {' '.join(text[:200].split())}"
                wait = int(retry_after) if retry_after.isdecimal() else wait  # a date is not read
            except (requests.RequestException, ValueError, LookupError, TypeError, RecursionError) as error:
                status, text, problem = 0, "", f"the server gives no answer ({type(error).__name__})"
            # hopeless: an error of ours, an empty account, or a redirect (following it would carry the key along)
            hopeless = status and status < 500 and status not in (408, 409, 429) or "insufficient_quota" in text
            if hopeless or number == self.tries - 1 or self.stop.wait(min(wait, MAX_WAIT)):
                break
        advice = "check OPENAI_API_KEY, OPENAI_BASE_URL and the model's name, then run again: it goes on"
        raise NoAnswerError(f"{problem}; {advice}")

    def post(self, body: dict) -> tuple[int, str, str]:
        """One request: status, Retry-After, text without the key. ValueError beyond MAX_BODY or the deadline."""

        def authorise(request):  # as `auth=`, not as a header: requests lets a ~/.netrc entry overwrite the header
            request.headers["Authorization"] = f"Bearer {self.key}"
            return request

        url, end, data = self.base_url.rstrip("/") + "/chat/completions", time.monotonic() + self.deadline, bytearray()
        options = {"auth": authorise, "stream": True, "timeout": self.timeouts, "allow_redirects": False}
        with requests.post(url, json=body, **options) as response:
            for piece in response.iter_content(1):  # a read of n would wait for all n, however slowly they drip
                data += piece
                if len(data) > MAX_BODY or time.monotonic() > end:
                    raise ValueError("body too large or too slow")
            text = data.decode("utf-8", "replace").replace(self.key, "[key]")
            return response.status_code, response.headers.get("Retry-After", ""), text


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


class Question(NamedTuple):
    prompt: str
    image_hash: str  # what the picture shows, for the cache
    image: Callable[[], bytes]  # the PNG; made only when the server is asked
    check: Callable  # text -> (the answer if it may be used, else None; why not)


def ask(client: Client, cache_path: Path, cache: dict[str, list], question: Question) -> str | None:
    """A checked answer from the cache or the server, or None: dropped."""
    key = sha256("\0".join((question.image_hash, question.prompt, client.model)).encode()).hexdigest()
    stored = cache.setdefault(key, [])
    for text in stored:
        answer, _ = question.check(text)
        if answer:
            client.counts["from cache"] += 1
            return answer
    while len(stored) < MAX_ASKS:
        text = client.complete(question.prompt, question.image())
        stored.append(text)
        client.counts["answers received"] += 1
        with open(cache_path, "ab") as file:  # before the next request: no answer is paid for twice
            # the line break comes first, so that an answer behind a line that was cut short is whole
            file.write(b"\n" + json.dumps({"key": key, "text": text}).encode())
            file.flush()
            os.fsync(file.fileno())
        answer, why = question.check(text)
        if answer:
            return answer
        client.counts[f"rejected: {why}"] += 1
    return None


def ask_all(client: Client, cache_path: Path, questions: list[Question], workers: int) -> list[str | None]:
    """Answers in the order of the questions, None where one is dropped; see `client.counts`. NoAnswerError ends it."""
    one = partial(ask, client, cache_path, read_cache(cache_path))
    # a server may take a minute, and is paid for what was asked
    notice = "\nwaiting for the answers to what was asked; Ctrl-C again stops at once\n"
    answers = in_threads(one, questions, workers, "asking", client.stop, notice)
    client.counts["kept"] = sum(answer is not None for answer in answers)
    client.counts["dropped"] = len(answers) - client.counts["kept"]
    return answers
