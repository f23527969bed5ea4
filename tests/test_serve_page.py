"""The chat page in a headless Chromium, on a tiny model."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import STORIES
from test_serve import KEY, ONCE, Served, with_template

pytest.importorskip("gradio", reason="the extra page is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    pytest.mark.filterwarnings("default"),  # gradio's own
]

SCREENSHOTS = os.environ.get("ZEBRA_SCREENSHOTS")
"""A folder for pictures of the page, to look at."""
FILE = ".thumbnail-item, .thumbnail-wrapper"
"""A file in the box."""
HOSTILE = "<script>window.hit=1</script><img src=x onerror='window.hit=1'><b>bold</b> [a](javascript:window.hit=1) $x$"


@pytest.fixture(scope="module")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(with_template(STORIES, tmp_path_factory.mktemp("page") / "<i>stories"), page=True)
    yield server
    server.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as start:
        browser = start.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1200, 800), (390, 780)], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, page_server: Served) -> Iterator[Any]:
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    elsewhere: list[str] = []
    page.on("request", lambda one: elsewhere.append(one.url) if not is_own(one.url, page_server) else None)
    page.goto(f"{page_server.address}/")
    page.wait_for_selector("textarea", timeout=60_000)
    yield page
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{re.sub('[^a-z_-]', '-', request.node.name)}.png")
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    hit = page.evaluate("window.hit")
    page.close()
    assert not elsewhere
    assert overflow <= 0
    assert hit is None


def is_own(url: str, server: Served) -> bool:
    return url.startswith((server.address, "data:", "blob:"))


def send(page: Any, text: str) -> None:
    page.fill("textarea", text)
    page.keyboard.press("Enter")


def until(page: Any, text: str, seconds: float = 60) -> None:
    page.wait_for_function("text => document.body.innerText.includes(text)", arg=text, timeout=1000 * seconds)


def test_it_shows_the_model_streams_and_counts(page: Any) -> None:
    assert "<i>stories" in page.inner_text("body")
    assert "GLLLG" in page.inner_text("body")
    send(page, ONCE)
    page.wait_for_selector(".bot.message", timeout=60_000)
    until(page, "tokens/s", 120)
    assert "of 512" in page.inner_text("[role=status]")
    assert "Lily" in page.inner_text(".bot.message")


def test_markup_is_text(page: Any) -> None:
    send(page, HOSTILE)
    until(page, "window.hit=1")
    until(page, "tokens/s", 120)
    assert HOSTILE in page.inner_text(".user.message")
    assert page.query_selector(".message b, .message script, .message img, .message a") is None


def test_stop_ends_the_answer(page: Any, page_server: Served) -> None:
    send(page, ONCE)
    page.wait_for_selector(".bot.message", timeout=60_000)
    page.click("button.stop-button")
    until(page, "Stopped")
    page_server.until_idle()
    send(page, "And then")
    until(page, "tokens/s", 120)
    assert len(page.query_selector_all(".bot.message")) == 2


def test_a_document_is_uploaded_and_an_error_is_shown(page: Any, tmp_path: Path) -> None:
    document = tmp_path / "a book.txt"
    document.write_text(f"One day Tim went to the park. {HOSTILE}")
    with page.expect_file_chooser() as chooser:
        page.click("button.upload-button")
    chooser.value.set_files(document)
    page.wait_for_selector(FILE, timeout=30_000)
    send(page, "Then")
    until(page, "tokens/s", 120)
    assert f"a book.txt, {len(document.read_text()):,} characters" in page.inner_text("body")
    send(page, "long " * 700)
    page.wait_for_selector("[role=alert]", timeout=30_000)
    assert "512" in page.inner_text("[role=alert]")
    assert page.input_value("textarea").startswith("long long")


def test_a_long_paste_becomes_a_document(page: Any) -> None:
    page.focus("textarea")
    page.evaluate(
        """text => {
            const data = new DataTransfer();
            data.setData("text/plain", text);
            const event = new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});
            document.querySelector("textarea").dispatchEvent(event);
        }""",
        "abc " * 2000,
    )
    page.wait_for_selector(FILE, timeout=30_000)
    send(page, "Then")
    page.wait_for_selector("[role=alert]", timeout=60_000)
    assert "512" in page.inner_text("[role=alert]")


def test_files_of_the_machine_are_not_served(page_server: Served) -> None:
    for path in ("file=/etc/passwd", "file=../../../etc/passwd", "file=/page/../etc/passwd"):
        status, answer, headers = page_server.get(f"/page/gradio_api/{path}")
        assert status in (403, 404)
        assert "root:" not in str(answer)
        assert "default-src 'self'" in headers["content-security-policy"]
    assert page_server.post("/page/gradio_api/queue/join", {}, origin="http://attacker.example")[0] == 403


def test_a_page_with_a_token_wants_it(browser: Any, tmp_path: Path) -> None:
    server = Served(with_template(STORIES, tmp_path / "stories"), KEY, page=True)
    for password, opens in (("another", False), (KEY, True)):
        page = browser.new_page(http_credentials={"username": "me", "password": password})
        assert page.goto(f"{server.address}/").status == (200 if opens else 401)
        if opens:
            page.wait_for_selector("text=No messages yet", timeout=60_000)
            send(page, ONCE)
            until(page, "tokens/s", 120)
        page.close()
    server.end()
