"""A judge behind an OpenAI-compatible address: what is sent, and what becomes of its replies."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from kvbench import judge
from kvbench.cli.app import main
from kvbench.errors import InputError
from kvbench.judge import Judge, use_judge
from kvbench.metrics import metrics
from kvbench.records import read_records
from kvbench.run_folder import read_settings


class Server(ThreadingHTTPServer):
    """Replies with what a test puts into `replies`, the last one again and again."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, str]] = [(200, "7")]
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        replies = self.server.replies
        status, content = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send_response(status)
        self.end_headers()
        message = {"choices": [{"message": {"content": content}}]}
        self.wfile.write(json.dumps(message).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with Server() as found:
        Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()
    use_judge(None)


def test_a_judge_is_asked_once_for_equal_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(judge.KEY, "secret")
    found = Judge("big", server.url)
    reference = {"question": "Who rang?", "answer": ["Ada", "Ada King"]}
    assert found.score("It was Ada.", reference) == 0.7
    assert found.score("It was Ada.", reference) == 0.7
    assert found.score(" \n", reference) == 0
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "big"
    for text in ("Who rang?", "Ada King", "It was Ada."):
        assert text in body["messages"][0]["content"]


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([(200, "10")], 1.0),
        ([(200, "Score: 3/10.")], 0.3),
        ([(503, ""), (429, ""), (200, "0")], 0.0),
        ([(200, "eleven")], "gives no whole number"),
        ([(200, "about 7 or 8")], "gives no whole number"),
        ([(200, "11")], "gives 11; expected 0 to 10"),
        ([(401, "")], "cannot be asked: HTTP Error 401"),
        ([(500, "")], "cannot be asked: HTTP Error 500"),
    ],
)
def test_a_grade_becomes_a_score_and_anything_else_an_error(
    server: Server, replies: list[tuple[int, str]], expected: float | str
) -> None:
    server.replies = replies
    use_judge(Judge("big", server.url))
    if isinstance(expected, float):
        assert metrics.get("judged")("an answer", "a reference") == expected
    else:
        with pytest.raises(InputError, match=expected):
            metrics.get("judged")("an answer", "a reference")


def test_without_a_judge_nothing_is_scored() -> None:
    use_judge(None)
    with pytest.raises(InputError, match="name its model with --judge"):
        metrics.get("judged")("an answer", "a reference")


def test_a_run_records_its_judge_and_failures_are_failed_cells(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.jsonl"
    line = {"prompt": "Ada has a bell. Who has a bell?", "answer": "Ada", "metric": "judged"}
    file.write_text(json.dumps({**line, "max_new_tokens": 3}) + "\n")
    run = ["run", "--task", str(file), "--method", "knorm", "--budgets", "0.5", "--context", "64"]
    assert main(run) == 2
    assert "name its model with --judge" in capsys.readouterr().err
    assert main([*run, "--judge", "big"]) == 2
    assert "give --judge and --judge-url" in capsys.readouterr().err
    run += ["--judge", "big", "--judge-url", server.url, "--out", str(tmp_path / "run")]
    server.replies = [(200, "no idea")]
    assert main(run) == 1
    assert "scoring failed: judge 'big' gives no whole number" in capsys.readouterr().err
    server.replies = [(200, "5")]
    assert main(run) == 0
    assert {record.score for record in read_records(tmp_path / "run")} <= {0.5, 0.0}
    settings = read_settings(tmp_path / "run")
    assert settings is not None
    assert settings["common"]["judge"] == "big"
    assert settings["invocations"][-1]["settings"]["judge_url"] == server.url
