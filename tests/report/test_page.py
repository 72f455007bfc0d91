"""`report.html` in a real browser, from file://, with predictions that try to break out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.records import record, store

os.environ["SE_OFFLINE"] = "true"  # the installed driver or none: nothing is downloaded
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=1400,1000"),
)
needs_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="chromium and chromedriver are not on the PATH"
)
NASTY = (
    "</script><script>window.broken = 1</script><!--<script>"
    '<img src=x onerror="window.broken = 1"> & \u2028 "quoted" {{ 7 * 7 }}'
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small run, whose every text is an attack."""
    texts: dict[str, Any] = {
        "prompt_tail": f"tail {NASTY}",
        "prediction": f"prediction {NASTY}",
        "reference": [f"reference {NASTY}"],
        "subtask": f"subtask {NASTY}",
        "kv_bytes_peak": 100,
    }
    rows = [record("full", 1.0, i, 1.0, **texts) for i in range(6)]
    for budget in (0.2, 0.8):
        for i in range(6):
            for method, from_budget in (("snapkv", 0.5), ("prulong", 0.1), ("recency", 0.9)):
                reached = budget > from_budget or i == 0
                rows.append(record(method, budget, i, float(reached), **texts))
    run = tmp_path_factory.mktemp("page") / "run"
    store(run, rows, dtype=f"float32 {NASTY}")
    command = [sys.executable, "-m", "kvbench", "report", str(run)]
    subprocess.run(command, check=True, capture_output=True, cwd=run.parent)
    return run / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium with a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def opened(page: Path, browser: Any) -> Any:
    """The browser, with the page open."""
    browser.get(page.as_uri())
    return browser


def first_table(browser: Any) -> list[list[str]]:
    """The texts of the first table's body."""
    rows: list[list[str]] = browser.execute_script(
        "return Array.from(document.querySelector('table.sortable').tBodies[0].rows,"
        " row => Array.from(row.cells, cell => cell.innerText.trim()))"
    )
    return rows


@needs_browser
def test_it_opens_without_a_complaint_and_fetches_nothing(opened: Any) -> None:
    assert opened.get_log("browser") == []
    assert opened.execute_script("return window.broken") is None
    sources = opened.execute_script(
        "return Array.from(document.images, i => [i.src.slice(0, 22), i.naturalWidth])"
    )
    assert sources
    assert all(src == "data:image/png;base64," and width > 0 for src, width in sources)
    fetched = opened.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert (
        "float32 </script>"
        in opened.find_element("id", "runs").find_element("xpath", "following-sibling::dl").text
    )


@needs_browser
def test_tables_sort_in_both_directions(opened: Any) -> None:
    assert [row[1] for row in first_table(opened)] == ["prulong", "snapkv", "recency", "full"]
    headers = opened.find_elements("css selector", "table.sortable th button")
    by_name = {header.text: header for header in headers}
    by_name["method"].click()
    assert [row[1] for row in first_table(opened)] == ["full", "prulong", "recency", "snapkv"]
    critical = next(h for name, h in by_name.items() if name.startswith("critical footprint"))
    critical.click()
    assert [row[1] for row in first_table(opened)] == ["prulong", "snapkv", "recency", "full"]
    critical.click()
    assert [row[1] for row in first_table(opened)] == ["full", "recency", "snapkv", "prulong"]
    by_name["score at 0.2"].click()  # full attention has no score there: it stays last
    assert [row[1] for row in first_table(opened)][-1] == "full"


@needs_browser
def test_a_score_opens_its_samples_and_their_texts_are_text(opened: Any) -> None:
    button = opened.find_element(
        "css selector", 'button.score[data-curve="snapkv"][data-budget="0.2"]'
    )
    button.click()
    rows = opened.find_elements("css selector", "#sample-list tr")
    assert len(rows) == 6
    assert [row.find_elements("tag name", "td")[2].text for row in rows] == [
        "1.00",
        *["0.00"] * 5,
    ]
    rows[3].find_element("tag name", "button").click()
    detail = opened.find_element("id", "sample-detail")
    heading = detail.find_element("tag name", "h3").get_property("textContent")
    assert heading.startswith("Sample 3")
    assert heading.endswith("snapkv: score 0")
    texts = [e.get_property("textContent") for e in detail.find_elements("tag name", "pre")]
    assert texts == [
        f"tail {NASTY}",
        f"prediction {NASTY}",
        json.dumps([f"reference {NASTY}"], ensure_ascii=False),
        f"prediction {NASTY}",
    ]
    assert detail.find_elements("tag name", "script") == []
    assert detail.find_elements("tag name", "img") == []
    assert opened.execute_script("return window.broken") is None
    assert opened.get_log("browser") == []


@needs_browser
@pytest.mark.parametrize("width", [800, 1300])
def test_nothing_is_cut_off_at_the_side(page: Path, browser: Any, width: int) -> None:
    size = browser.get_window_size()
    browser.set_window_size(width, 1000)
    browser.get(page.as_uri())
    inside, shown = browser.execute_script(
        "const all = [document.documentElement, ...document.querySelectorAll('.scroll')];"
        "return [all.map(e => e.scrollWidth), all.map(e => e.clientWidth)]"
    )
    browser.set_window_size(size["width"], size["height"])
    assert inside == shown


@needs_browser
def test_the_overview_comes_first_with_the_best_in_bold(opened: Any) -> None:
    table = opened.find_element("css selector", "table")
    rows = [row.text.split() for row in table.find_elements("tag name", "tr")]
    assert rows[0] == ["critical", "footprint", "%", "recall"]
    assert [row[0] for row in rows[1:]] == ["prulong", "snapkv", "recency", "full"]
    assert [best.text for best in table.find_elements("tag name", "b")] == [rows[1][1]]
    table.find_element("link text", "recall").click()
    heading = opened.find_element("id", "task-0")
    assert heading.text.startswith("recall: m, 100 tokens")


@needs_browser
def test_an_injected_script_would_not_run(opened: Any) -> None:
    """Even past all escaping: the page's policy knows its own script by hash."""
    opened.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.broken = 1';"
        "document.body.append(s)"
    )
    assert opened.execute_script("return window.broken") is None
    assert "Content Security Policy" in opened.get_log("browser")[0]["message"]


def test_the_page_escapes_without_a_browser_too(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert "onerror" in text
    assert "<img src=x" not in text
    assert "{{ 7 * 7 }}" in text


def test_a_page_of_many_samples_says_which_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvbench.report import page as html
    from kvbench.report.build import make_report

    monkeypatch.setattr(html, "MOST_TEXT", 20_000)
    rows = [record("full", 1.0, i, 1.0, prediction="w" * 9000) for i in range(30)]
    made = html.render(make_report([store(tmp_path / "run", rows)], 0.9), [])
    assert "the first 8 of 30 samples" in made
    assert "texts longer than 2,000 characters are cut" in made
    assert "[... 7,000 more characters]" in made
    assert len(made) < 60_000
