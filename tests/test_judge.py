"""A judge behind an OpenAI-compatible address: what is sent, and what becomes of its replies."""

import json
import time
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

RAW, DRIP = 0, 299  # a reply that is sent as it is; one whose bytes come slowly


class Server(ThreadingHTTPServer):
    """Replies with what a test puts into `replies`, the last one again and again."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, str]] = [(200, "7")]
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.pause = time.sleep  # as it was before a test took it away
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
        if status == RAW:
            self.wfile.write(content.encode())
            return
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"{self.server.url}elsewhere")
        self.end_headers()
        if status == DRIP:
            for _ in range(20):
                self.wfile.write(b" ")
                self.wfile.flush()
                self.server.pause(0.1)
        message = {"choices": [{"message": {"content": content}}]}
        self.wfile.write(json.dumps(message).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as found:
        monkeypatch.setattr("time.sleep", lambda seconds: None)
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
        ([(200, "**7**")], 0.7),
        ([(200, "It has all that counts.\n\n8 out of 10")], 0.8),
        ([(200, '{"score": 4}')], 0.4),
        ([(200, "The grade is 6.")], 0.6),
        ([(200, "eleven")], "gives no whole number"),
        ([(200, "about 7 or 8")], "gives no whole number"),
        ([(200, "11")], "gives 11; expected 0 to 10"),
        *(
            ([(200, text)], "gives no whole number")
            for text in (
                *("-5", "Grade: -3", "Grade: \u22123", "7/100", "7/5", "7.5", "7%", "3\n4", "1e1"),
                *("more than 5", "<7", "7+", "", " ", "9" * 6000, "Day 1: 7", "\n" * 9999, "7 - 9"),
            )
        ),
        ([(RAW, "garbage\r\n\r\n"), (200, "6")], 0.6),
        ([(RAW, "HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{"), (200, "6")], 0.6),
        ([(RAW, "HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{")], "IncompleteRead"),
        ([(RAW, "garbage\r\n\r\n")], "judge 'big' at http.* cannot be asked"),
        ([(RAW, ""), (408, ""), (200, "6")], 0.6),
        ([(RAW, "HTTP/1.0 200 OK\r\n\r\n<html>")], "judge 'big' at http.*is not JSON: b'<html>'"),
        ([(RAW, "HTTP/1.0 200 OK\r\n\r\n" + "[" * 99999)], "is not JSON"),
        ([(302, "")], "cannot be asked: HTTP Error 302"),
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


def test_a_reply_that_comes_too_slowly_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "TIMEOUT", 0.3)
    server.replies = [(DRIP, "3"), (200, "7")]
    assert Judge("big", server.url).score("an answer", "a reference") == 0.7
    server.replies = [(DRIP, "3")]
    with pytest.raises(InputError, match=r"no whole reply within 0.3 seconds"):
        Judge("big", server.url).score("another answer", "a reference")
    assert len(server.seen) == 2 + judge.TRIES


def test_connections_are_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(InputError, match=r"judge 'big' at .* cannot be asked: .*refused"):
        Judge("big", "http://127.0.0.1:9/v1").score("an answer", "a reference")
    assert len(waited) == judge.TRIES - 1


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "foo",
            "host/v1",
            "file:///etc",
            "ftp://x/v1",
            "http://",
            "http:///v1",
            "http://:80/v1",
        ),
        *("http://a b/v1", "http://a/v1\r\nX: y", "http://\u4f60.invalid/v1", "http://[::1/v1"),
        *("http://a:99999/v1", "http://a:abc/v1", "http://a:0/v1", "http://me:key@a/v1"),
        *("http://a/v1?key=1", "http://a/v1#x", "http://a/v1/chat/completions"),
    ],
)
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(
        InputError, match=r"the judge's address .*; give one like https://"
    ) as found:
        Judge("big", url)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "url", ["http://localhost", "https://a.example:8000/v1/", "http://[::1]:8/v1"]
)
def test_addresses_that_are_right(url: str) -> None:
    Judge("big", url)


@pytest.mark.parametrize("key", ["a\nb", "k\u4f60", "a\x00"])
def test_a_key_that_no_header_can_hold_is_refused(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", {judge.KEY: key})
    with pytest.raises(InputError, match=judge.KEY) as found:
        Judge("big", "http://host/v1")
    assert key not in str(found.value)


def test_a_name_that_is_empty_is_refused() -> None:
    with pytest.raises(InputError, match="no name"):
        Judge(" ", "http://host/v1")


@pytest.mark.parametrize(
    "reference",
    [
        *(None, 42, "", " ", [], [""], [["a"]], ["a", 1], {}, {"question": "q"}, {"answr": "a"}),
        *({"answer": [1]}, {"answer": []}, {"answer": "a", "question": 1}),
        *({"answer": "a", "question": ""}, {"answer": "a", "other": "b"}),
    ],
)
def test_a_reference_that_says_nothing_is_refused_before_anything_is_sent(
    server: Server, reference: Any
) -> None:
    for answer in ("", "an answer"):
        with pytest.raises(InputError, match="a reference for a judge must be"):
            Judge("big", server.url).score(answer, reference)
    assert not server.seen


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
    failed = [record for record in read_records(tmp_path / "run") if record.error]
    assert failed
    assert all(record.prediction for record in failed)
    assert main([word.replace("http:", "file:") for word in run]) == 2
    assert "does not start with http" in capsys.readouterr().err
    server.replies = [(200, "5")]
    assert main(run) == 0
    assert {record.score for record in read_records(tmp_path / "run")} <= {0.5, 0.0}
    settings = read_settings(tmp_path / "run")
    assert settings is not None
    assert settings["common"]["judge"] == "big"
    assert settings["invocations"][-1]["settings"]["judge_url"] == server.url
