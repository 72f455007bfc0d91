"""A language model that scores answers, behind an OpenAI-compatible address (`--judge MODEL`).

Some published data sets have no metric but a judge: a summary or a free answer is compared with a
reference by a large model. Nothing is sent anywhere unless a user names a judge; its name and
address are recorded. The key, if the address wants one, comes from KVBENCH_JUDGE_KEY.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from kvbench.errors import InputError

JUDGED = "judged"  # the metric that asks the judge
KEY = "KVBENCH_JUDGE_KEY"
HIGHEST = 10
TRIES, TIMEOUT = 3, 120.0  # requests for one answer, and seconds of each from its start to its end
LONGEST_REPLY, LONGEST_ANSWER = 1 << 20, 2000  # bytes of a reply, characters of what it says
# A reply that is a number, of 10 at most if it says of how many, with a label before it or none.
NUMBER = re.compile(
    rf"""(?:\D*(?:[:=\n]|\bis\b))?[\s"'*`_({{\[]*(\d{{1,9}})(?:\s*(?:/|out\ of)\s*{HIGHEST})?"""
    r"""[\s"'*`_)}\].!]*"""
)
PATH = "/chat/completions"
QUESTION = f"""Compare an answer with a reference answer written by a person.
Judge the content only: is what the answer says right, and does it have all that the reference has?
Ignore style and length.
<question>
{{question}}
</question>
<reference>
{{reference}}
</reference>
<answer>
{{answer}}
</answer>
Reply with one whole number from 0 (nothing right) to {HIGHEST} (as good as the reference)."""


@dataclass(frozen=True)
class Judge:
    """A model at an OpenAI-compatible address, such as https://host/v1."""

    model: str
    url: str
    known: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise InputError for a name, an address or a key that no request can have."""
        if not self.model.strip():
            raise InputError("the judge's model has no name; give one with --judge")
        if fault := fault_of(self.url):
            raise InputError(
                f"the judge's address {self.url!a} {fault}; give one like https://host:8000/v1"
            )
        key = os.environ.get(KEY, "")
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"{KEY} is not a line of printable ASCII characters; set it anew")

    def score(self, prediction: str, reference: Any) -> float:
        """How good the prediction is, 0..1; equal questions are asked once, empty ones score 0.

        `reference` is a text, a list of texts of which one is enough, or a map with the keys
        `question`, a text, and `answer`, one of these. InputError for any other, and if the judge
        does not answer.
        """
        question, answers = parts_of(reference)
        if not prediction.strip():
            return 0.0
        text = "\nor\n".join(answers)
        prompt = QUESTION.format(question=question, reference=text, answer=prediction)
        if prompt not in self.known:
            self.known[prompt] = self._asked(prompt)
        return self.known[prompt]

    def _asked(self, prompt: str) -> float:
        reply = self._sent({"messages": [{"role": "user", "content": prompt}]})
        try:
            text = str(reply["choices"][0]["message"]["content"])
            grade = int(NUMBER.fullmatch(text[:LONGEST_ANSWER])[1])  # type: ignore[index]
        except (LookupError, TypeError):
            shown = json.dumps(reply)[:120]
            raise InputError(f"judge '{self.model}' gives no whole number: {shown}") from None
        if grade > HIGHEST:
            raise InputError(f"judge '{self.model}' gives {grade}; expected 0 to {HIGHEST}")
        return grade / HIGHEST

    def _sent(self, body: dict[str, Any]) -> Any:
        """The judge's reply to a request; InputError if none of `TRIES` requests gets one."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps({"model": self.model, "temperature": 0, **body}).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}{PATH}", data, headers)
        for attempt in range(TRIES):
            try:
                text = reply_to(request, TIMEOUT)
                break
            except (OSError, http.client.HTTPException) as error:
                code = getattr(error, "code", 500)  # no whole reply counts as a server's fault
                if attempt == TRIES - 1 or (code < 500 and code not in (408, 429)):
                    reason = " ".join((str(error) or type(error).__name__).split())[:200]
                    raise InputError(
                        f"judge '{self.model}' at {self.url} cannot be asked: {reason}"
                    ) from None
                time.sleep(4**attempt)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise InputError(
                f"judge '{self.model}' at {self.url} replies with what is not JSON: {text[:80]!r}"
            ) from None


def fault_of(url: str) -> str | None:
    """What is wrong with a judge's address; None if nothing."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return "has a character that an address cannot have"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"is wrong ({error})"
    if parts.scheme not in ("http", "https"):
        return "does not start with http:// or https://"
    if not parts.hostname or port == 0:
        return "names no host" if port != 0 else "has the port 0"
    if parts.username is not None:
        return f"holds a user's name; a key belongs into {KEY}"
    if "?" in url or "#" in url or parts.path.rstrip("/").endswith(PATH):
        return f"goes on after its path, to which {PATH} is added"
    return None


def parts_of(reference: Any) -> tuple[str, list[str]]:
    """The question and the answers of a reference; InputError if it has none, or more."""
    given = reference if isinstance(reference, dict) else {"answer": reference}
    answers = given.get("answer")
    answers = answers if isinstance(answers, list | tuple) else [answers]
    question = given.get("question", "(not given)")
    texts = [question, *answers]
    if (
        not set(given) <= {"question", "answer"}
        or not answers
        or not all(isinstance(text, str) and text.strip() for text in texts)
    ):
        shown = repr(reference)
        raise InputError(
            "a reference for a judge must be a text, a list of texts, or a map with an answer (one "
            f"of these) and a question (a text), none empty, not {shown[:80]}"
        )
    return question, list(answers)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would become another request, and carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse."""


def reply_to(request: urllib.request.Request, seconds: float) -> bytes:
    """What is replied to a request, within so many seconds from its start to its end.

    A thread waits, because a time-out of a socket starts anew with every byte that comes. Raises
    what `urllib` raises, and TimeoutError.
    """
    found: list[bytes | BaseException] = []

    def ask() -> None:
        try:
            opener = urllib.request.build_opener(NoRedirect)
            with opener.open(request, timeout=seconds) as reply:
                text = reply.read(LONGEST_REPLY)
                if reply.length:
                    raise http.client.IncompleteRead(text, reply.length)
                found.append(text)
        except Exception as error:
            found.append(error)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError(f"no whole reply within {seconds:g} seconds")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


_judge: list[Judge] = []


def use_judge(judge: Judge | None) -> None:
    """Let the metric `judged` ask this judge from now on; None: none."""
    _judge[:] = [] if judge is None else [judge]


def current_judge() -> Judge:
    """The judge that is asked; InputError if there is none."""
    if not _judge:
        raise InputError("the metric 'judged' needs a judge; name its model with --judge")
    return _judge[0]
