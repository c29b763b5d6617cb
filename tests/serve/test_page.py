"""The page in a real browser: asked by voice and in writing, it shows and speaks the answer, and may be interrupted.

What it looked like is kept in reports/screenshots.
"""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from serve.bundles import find
from serve.gateway import create_app
from serve.memory import OwnMemory
from serve.pipeline import OwnPipeline
from serve.service import Served, Service
from speechgpt.recipe import load
from speechgpt.runtime import bundle
from speechgpt.speech.audio import encode
from speechgpt.speech.config import VoiceSection
from speechgpt.speech.voices import Voice

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
SCREENSHOTS = Path(__file__).parents[2] / "reports" / "screenshots"
ANSWER_MS = 60_000


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    nano, source = load("nano"), find("nano", "")
    pipeline = OwnPipeline(bundle.load("nano").directory, nano.serving)
    served = Served(source.name, source.digest, source.created)
    service = Service(served, pipeline, OwnMemory(60, 10), nano.serving, nano.generation)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        app = create_app(lambda: service, list, nano.serving, None)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the microphone hears: a question, and then silence enough that it is not begun again."""
    import numpy as np

    spoken = Voice(VoiceSection(engine="espeak", voice="en-us+f2")).say("what is two plus three", 0)
    file = tmp_path_factory.mktemp("microphone") / "question.wav"
    file.write_bytes(encode(np.concatenate([spoken, np.zeros(16_000 * 20, np.float32)]), "wav"))
    return file


@pytest.fixture(scope="module")
def browser(question: Path) -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={question}",
            ],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: "playwright.Browser", url: str) -> Iterator["playwright.Page"]:
    page = browser.new_page(viewport={"width": 900, "height": 700})
    page.set_default_timeout(ANSWER_MS)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(url)
    page.get_by_text("nano · bundle").wait_for()
    yield page
    page.close()
    assert not faults


def keep(page: "playwright.Page", name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def loudness(page: "playwright.Page") -> float:
    """Root mean square of the last recording that the page offers, and thus of what it has played."""
    return page.evaluate(
        """async () => {
          const player = [...document.querySelectorAll("li.assistant audio")].at(-1);
          const bytes = await (await fetch(player.src)).arrayBuffer();
          const sound = (await new OfflineAudioContext(1, 24000, 24000).decodeAudioData(bytes)).getChannelData(0);
          return Math.sqrt(sound.reduce((sum, s) => sum + s * s, 0) / sound.length);
        }"""
    )


def test_a_question_by_voice_is_heard_and_answered_aloud(page: "playwright.Page") -> None:
    button = page.get_by_role("button", name="Talk")
    button.hover()
    page.mouse.down()
    page.get_by_text("listening…").wait_for()
    page.wait_for_timeout(2500)
    page.mouse.up()
    page.locator("li.assistant audio").wait_for()
    assert page.locator("li.user p").last.inner_text() == "what is two plus three"
    assert page.locator("li.assistant p").last.inner_text() == "two plus three is five"
    assert "first sound after" in page.locator("#status").inner_text()
    assert loudness(page) > 0.01
    keep(page, "asked-by-voice")


def test_a_second_question_interrupts_the_first(page: "playwright.Page") -> None:
    text = page.get_by_label("Your message")
    text.fill("what is two plus three")
    text.press("Enter")
    page.get_by_text("first sound after").wait_for()
    assert page.get_by_role("button", name="Stop").is_visible()
    text.fill("what is four plus four")
    text.press("Enter")
    page.get_by_text("(interrupted)").wait_for()
    page.locator("li.assistant").nth(1).locator("audio").wait_for()
    keep(page, "interrupted")
    assert page.locator("li.assistant p").last.inner_text() == "four plus four is eight"
    page.get_by_role("button", name="Stop").wait_for(state="hidden")
    assert page.get_by_text("(interrupted)").count() == 1, "the second was heard to its end"


def test_escape_stops_the_voice(page: "playwright.Page") -> None:
    page.get_by_label("Your message").fill("what is two plus three")
    page.get_by_label("Your message").press("Enter")
    page.get_by_text("first sound after").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("(interrupted)").wait_for()
    assert page.evaluate("speaker.playing.size") == 0


def test_it_can_be_used_by_keyboard_and_on_a_phone(page: "playwright.Page") -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    page.get_by_label("answers").select_option("text")
    page.get_by_label("Your message").fill("what is two plus three")
    page.get_by_role("button", name="Send").focus()
    page.keyboard.press("Enter")
    page.get_by_text("two plus three is five").wait_for()
    assert page.locator("audio").count() == 0
    page.get_by_role("button", name="Talk").focus()
    page.keyboard.press("Space")
    page.get_by_text("listening…").wait_for()
    page.wait_for_timeout(500)
    page.keyboard.press("Space")
    page.get_by_role("button", name="Talk").wait_for()
    keep(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
