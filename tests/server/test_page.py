"""The page at / in a real browser."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from serving import ServerProcess

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


def test_a_conversation(model: Path, browser: Browser, tmp_path: Path) -> None:
    with ServerProcess(model, "--backend", "echo", "--echo-step-ms", "4") as server:
        browser.call("Page.navigate", url=server.url)
        browser.until("document.querySelector('#state') && document.querySelector('#state').textContent === 'ready'")
        facts = browser.run("document.querySelector('#facts').textContent")
        assert "LlamaForCausalLM" in facts
        assert "2,048 tokens" in facts
        browser.run("document.querySelector('#max_tokens').value = '60'; document.querySelector('#seed').value = '5'; 0")
        browser.type("#text", "What can you do? <b>é</b>")
        browser.press_enter()
        browser.until("document.querySelectorAll('.assistant').length === 1")
        browser.until("document.querySelector('#count').textContent === '60'")
        answer = browser.run("document.querySelector('.assistant span').textContent")
        assert answer.startswith("[user]What can you do? <b>é</b>")  # the echo of the prompt, as text and not as HTML
        assert not browser.run("document.querySelectorAll('.assistant b').length")
        assert 50 < float(browser.run("document.querySelector('#speed').textContent")) < 400
        assert browser.run("document.querySelector('#ttft').textContent").endswith(" ms")
        assert browser.run("document.querySelector('#finish').textContent") == "length"
        browser.type("#text", "And what is the second question of this conversation?")
        browser.press_enter()
        browser.until("document.querySelectorAll('.assistant small').length === 2")
        shot = Path(os.environ.get("MEGALITH_SCREENSHOT", tmp_path / "page.png"))
        browser.screenshot(shot)
        assert struct.unpack(">II", shot.read_bytes()[16:24])[0] == 1280
        assert browser.requested
        assert all(url.startswith((server.url, "data:")) for url in browser.requested), browser.requested
        assert browser.messages == []


def test_stopping_and_errors_are_shown(model: Path, browser: Browser) -> None:
    with ServerProcess(model, "--backend", "echo", "--echo-step-ms", "20") as server:
        browser.call("Page.navigate", url=server.url)
        browser.until("document.querySelector('#state') && document.querySelector('#state').textContent === 'ready'")
        browser.run("document.querySelector('#max_tokens').value = '1500'; 0")
        browser.type("#text", "Go on")
        browser.press_enter()
        browser.until(
            "document.querySelector('.assistant span') && document.querySelector('.assistant span').textContent.length > 3"
        )
        browser.run("document.querySelector('#stop').click()")
        browser.until("document.querySelector('#finish').textContent === 'you'")
        browser.until("document.querySelector('#send').hidden === false")
        assert server.event("internal_error") is None
        browser.run("document.querySelector('#max_tokens').value = '99999'; 0")
        browser.type("#text", "Too much")
        browser.press_enter()
        browser.until(
            "document.querySelector('.error span') && document.querySelector('.error span').textContent.includes('context')"
        )


def test_a_key_is_asked_for_and_used(model: Path, browser: Browser) -> None:
    with ServerProcess(model, "--backend", "echo", "--api-key", "a-key-for-all") as server:
        browser.call("Page.navigate", url=server.url.replace("http://", "http://any:a-key-for-all@"))
        browser.until("document.querySelector('#state') && document.querySelector('#state').textContent === 'ready'")
