"""A language model that scores answers, behind an OpenAI-compatible address (`--judge MODEL`).

Some published data sets have no metric but a judge: a summary or a free answer is compared with a
reference by a large model. Nothing is sent anywhere unless a user names a judge; its name and
address are recorded. The key, if the address wants one, comes from KVBENCH_JUDGE_KEY.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from kvbench.errors import InputError

JUDGED = "judged"  # the metric that asks the judge
KEY = "KVBENCH_JUDGE_KEY"
HIGHEST = 10
TRIES, TIMEOUT = 3, 120.0  # requests for one answer, and seconds of each
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

    def score(self, prediction: str, reference: Any) -> float:
        """How good the prediction is, 0..1; equal questions are asked once, empty ones score 0.

        `reference` is a text, a list of texts of which one is enough, or a map with the keys
        `question` and `answer` (one of these). InputError if the judge does not answer.
        """
        if not prediction.strip():
            return 0.0
        given = reference if isinstance(reference, dict) else {"answer": reference}
        answers = given.get("answer")
        text = "\nor\n".join(answers) if isinstance(answers, list) else str(answers)
        question = given.get("question", "(not given)")
        prompt = QUESTION.format(question=question, reference=text, answer=prediction)
        if prompt not in self.known:
            self.known[prompt] = self._asked(prompt)
        return self.known[prompt]

    def _asked(self, prompt: str) -> float:
        reply = self._sent({"messages": [{"role": "user", "content": prompt}]})
        try:
            text = str(reply["choices"][0]["message"]["content"])
            grade = int(re.fullmatch(r"\D*(\d+)(?:\s*/\s*\d+)?\W*", text)[1])  # type: ignore[index]
        except (LookupError, TypeError):
            shown = json.dumps(reply)[:120]
            raise InputError(f"judge '{self.model}' gives no whole number: {shown}") from None
        if grade > HIGHEST:
            raise InputError(f"judge '{self.model}' gives {grade}; expected 0 to {HIGHEST}")
        return grade / HIGHEST

    def _sent(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        data = json.dumps({"model": self.model, "temperature": 0, **body}).encode()
        for attempt in range(TRIES):
            try:
                request = urllib.request.Request(address, data, headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    return json.load(answer)
            except (OSError, ValueError) as error:
                code = getattr(error, "code", 0)
                if attempt == TRIES - 1 or (code < 500 and code != 429):
                    raise InputError(
                        f"judge '{self.model}' at {self.url} cannot be asked: {error}"
                    ) from None
                time.sleep(4**attempt)
        raise AssertionError


_judge: list[Judge] = []


def use_judge(judge: Judge | None) -> None:
    """Let the metric `judged` ask this judge from now on; None: none."""
    _judge[:] = [] if judge is None else [judge]


def current_judge() -> Judge:
    """The judge that is asked; InputError if there is none."""
    if not _judge:
        raise InputError("the metric 'judged' needs a judge; name its model with --judge")
    return _judge[0]
