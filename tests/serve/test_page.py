"""The page in a real browser: asked by voice and in writing, it shows and speaks the answer, and may be interrupted.

What it looked like is kept in reports/screenshots.
"""

import base64
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from own_limits import OwnLimits

from serve.bundles import find
from serve.encoder import Heard, Refused
from serve.gateway import Access, create_app
from serve.keys import KeyRing, hash_key
from serve.memory import OwnMemory
from serve.pipeline import OwnPipeline
from serve.prompting import Task
from serve.service import Served, Service
from serve.voice import Manner, Voiced
from speechgpt.recipe import Recipe, load
from speechgpt.runtime import bundle
from speechgpt.speech.audio import encode
from speechgpt.speech.config import VoiceSection
from speechgpt.speech.voices import Voice

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
SCREENSHOTS = Path(__file__).parents[2] / "reports" / "screenshots"
ANSWER_MS = 60_000


@contextmanager
def served(service: Service, access: Access | None = None) -> Iterator[str]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        app = create_app(lambda: service, list, service.serving, access)
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
def nano() -> Recipe:
    return load("nano")


def service_of(bundle: str, pipeline: OwnPipeline, nano: Recipe, **realtime: float) -> Service:
    source = find(bundle, "")
    serving = nano.serving.model_copy(update={"realtime": nano.serving.realtime.model_copy(update=realtime)})
    of = Served(source.name, source.digest, source.created, source.adapters)
    return Service(of, pipeline, OwnMemory(60, 10), serving, nano.generation)


@pytest.fixture(scope="module")
def pipeline(nano: Recipe) -> OwnPipeline:
    return OwnPipeline(bundle.load("nano").directory, nano.serving)


@pytest.fixture(scope="module")
def url(pipeline: OwnPipeline, nano: Recipe) -> Iterator[str]:
    with served(service_of("nano", pipeline, nano)) as address:
        yield address


class Slow(OwnPipeline):
    """Speaks so slowly that there is time to interrupt it."""

    def voice(self, task: Task, manner: Manner) -> AsyncGenerator[Voiced, None]:
        return super().voice(task, replace(manner, speed=0.125))


@pytest.fixture(scope="module")
def slow(nano: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """nano with an adapter `support`, which has not learnt anything yet."""
    from peft import LoraConfig, get_peft_model

    from speechgpt.language.model import SpeechLanguageModel

    shipped = bundle.load("nano")
    parts = {part.name: part for part in shipped.directory.iterdir() if part.is_dir()}
    parts["adapters/support"] = tmp_path_factory.mktemp("support")
    model: Any = SpeechLanguageModel.load(parts["language"]).model
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(str(parts["adapters/support"]))
    directory = tmp_path_factory.mktemp("bundles") / "nano"
    directory.mkdir()
    bundle.write(directory, parts, shipped.manifest["unit_vocabulary"], {})
    with served(service_of(str(directory), Slow(directory, nano.serving), nano)) as address:
        yield address


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the microphone hears: a question, five seconds later another, and then silence enough that the first is not
    begun again."""
    voice = Voice(VoiceSection(engine="espeak", voice="en-us+f2"))
    pieces: list[np.ndarray] = []
    for text, pause in (("what is two plus three", 5.0), ("what is four plus four", 20.0)):
        pieces += [voice.say(text, 0), np.zeros(round(16_000 * pause), np.float32)]
    file = tmp_path_factory.mktemp("microphone") / "questions.wav"
    file.write_bytes(encode(np.concatenate([np.zeros(16_000, np.float32), *pieces]), "wav"))
    return file


@pytest.fixture(scope="module")
def browser(questions: Path) -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={questions}",
            ],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: "playwright.Browser") -> Iterator[Callable[..., "playwright.Page"]]:
    """Opens the page at an address; settings: of the browser's context."""
    contexts: list[playwright.BrowserContext] = []
    faults: list[str] = []

    def open_page(address: str, **settings: Any) -> "playwright.Page":
        contexts.append(browser.new_context(viewport={"width": 900, "height": 700}, **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(ANSWER_MS)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.get_by_text("nano · bundle").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def page(opened: Callable[..., "playwright.Page"], url: str) -> "playwright.Page":
    return opened(url)


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
    page.wait_for_timeout(3500)
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


def test_a_silent_recording_is_refused_in_words_for_people(page: "playwright.Page") -> None:
    silence = encode(np.zeros(16_000, np.float32), "wav")
    page.locator("#file").set_input_files({"name": "silence.wav", "mimeType": "audio/wav", "buffer": silence})
    page.get_by_text("the recording is silent").wait_for()
    assert not page.get_by_text("input_audio").count()


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
    page.get_by_role("button", name="Talk").focus()
    page.get_by_text("answered in").wait_for()
    assert said(page, "assistant")[0] == "two plus three is five"
    assert page.locator("audio").count() == 0
    page.keyboard.press("Space")
    page.get_by_text("listening…").wait_for()
    page.wait_for_timeout(500)
    page.keyboard.press("Space")
    page.get_by_role("button", name="Talk").wait_for()
    keep(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


class Wire:
    """What passed over the sockets that the page opened."""

    def __init__(self, page: "playwright.Page") -> None:
        self.addresses: list[str] = []
        self._events: list[dict[str, Any]] = []
        page.on("websocket", self._follow)

    def of(self, type: str) -> list[dict[str, Any]]:
        return [event for event in self._events if event["type"] == type]

    def _follow(self, socket: "playwright.WebSocket") -> None:
        self.addresses.append(socket.url)
        for direction in ("framesent", "framereceived"):
            socket.on(direction, lambda frame: self._events.append(json.loads(frame)))


def nobody_speaks(page: "playwright.Page") -> None:
    """Before the microphone of a test that is not about what is said."""
    page.evaluate(
        """() => {
          const silence = new MediaStreamAudioDestinationNode(new AudioContext());
          navigator.mediaDevices.getUserMedia = async () => silence.stream.clone();
        }"""
    )


def hands_free(page: "playwright.Page") -> "playwright.Locator":
    return page.get_by_role("button", name="Hands-free")


def said(page: "playwright.Page", who: str) -> list[str]:
    return page.locator(f"li.{who} p:last-of-type").all_inner_texts()


def write(page: "playwright.Page", text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def test_hands_free_a_spoken_question_is_answered(page: "playwright.Page") -> None:
    wire = Wire(page)
    page.get_by_label("answers").select_option("direct")
    hands_free(page).focus()
    page.keyboard.press("Space")
    assert hands_free(page).get_attribute("aria-pressed") == "true"
    assert page.get_by_label("answers").input_value() == "chain", "a session's answers come after a transcript"
    assert page.get_by_role("button", name="Talk").is_disabled()
    page.locator("li.assistant audio").wait_for()
    assert (said(page, "user")[0], said(page, "assistant")[0]) == ("what is two plus three", "two plus three is five")
    told = re.search(r"first sound after ([\d.]+) s", page.locator("#status").inner_text())
    assert told and 0.5 <= float(told[1]) < 30, "from the end of speech, before the silence that tells it"
    assert loudness(page) > 0.01
    keep(page, "hands-free")
    page.evaluate("window.track = session.stream.getTracks()[0]")
    hands_free(page).click()
    page.get_by_text("hands-free is off").wait_for()
    assert page.evaluate("track.readyState") == "ended"
    assert [address.partition("/v1/")[2] for address in wire.addresses] == ["realtime?model=nano"]
    write(page, "what is six plus six")
    page.get_by_text("six plus six is twelve").wait_for()


def test_hands_free_a_second_question_interrupts_the_answer_that_is_heard(
    opened: Callable[..., "playwright.Page"], slow: str
) -> None:
    page = opened(slow)
    wire = Wire(page)
    hands_free(page).click()
    page.get_by_text("first sound after").wait_for()
    page.get_by_text("(interrupted)").wait_for()
    assert page.evaluate("speaker.playing.size") == 0
    page.locator("li.assistant").nth(1).wait_for()
    keep(page, "hands-free-interrupted")
    page.get_by_text("four plus four is eight").wait_for()
    assert said(page, "user") == ["what is two plus three", "what is four plus four"]
    [cut] = wire.of("conversation.item.truncate")
    sounds = [event for event in wire.of("response.output_audio.delta") if event["item_id"] == cut["item_id"]]
    made = sum(len(base64.b64decode(event["delta"])) for event in sounds) / 48
    assert 0 < cut["audio_end_ms"] < made, "milliseconds that were heard"
    assert [event["audio_end_ms"] for event in wire.of("conversation.item.truncated")] == [cut["audio_end_ms"]]
    asked, answered = [event["item"]["id"] for event in wire.of("conversation.item.added")][:2]
    forgotten = [event["item_id"] for event in wire.of("conversation.item.deleted")]
    assert forgotten == [asked, answered], "earlier turns are not remembered unless that is wanted"
    assert not wire.of("error")


def test_hands_free_can_be_written_into_stopped_and_asked_for_words_alone(page: "playwright.Page") -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    nobody_speaks(page)
    wire = Wire(page)
    page.get_by_label("remember earlier turns").check()
    page.get_by_label("answers").select_option("text")
    hands_free(page).click()
    page.get_by_text("listening…").wait_for()
    write(page, "what is one plus one")
    page.get_by_text("answered in").wait_for()
    assert said(page, "assistant")[0] == "one plus one is two"
    assert page.locator("audio").count() == 0
    page.get_by_label("answers").select_option("chain")
    write(page, "what is six plus six")
    page.get_by_text("first sound after").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("(interrupted)").wait_for()
    keep(page, "hands-free-phone")
    assert page.evaluate("speaker.playing.size") == 0
    assert hands_free(page).get_attribute("aria-pressed") == "true"
    assert len(wire.of("conversation.item.truncate")) == 1
    assert not wire.of("conversation.item.delete") and not wire.of("error")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    hands_free(page).click()
    before = len(wire.of("conversation.item.create"))
    hands_free(page).click()
    page.get_by_text("listening…").wait_for()
    told = [event["item"] for event in wire.of("conversation.item.create")[before:]]
    assert [item["role"] for item in told[:2]] == ["user", "assistant"], "the next session knows of this one"
    assert told[0]["content"] == [{"type": "input_text", "text": "what is one plus one"}]


def test_hands_free_ends_with_a_reason(
    opened: Callable[..., "playwright.Page"], pipeline: OwnPipeline, nano: Recipe
) -> None:
    with served(service_of("nano", pipeline, nano, max_session_seconds=1)) as address:
        page = opened(address)
        nobody_speaks(page)
        hands_free(page).click()
        page.get_by_text("hands-free is off: the session has reached its end").wait_for()
    with served(service_of("nano", pipeline, nano, max_sessions=0)) as address:
        page = opened(address)
        hands_free(page).click()
        page.get_by_text("hands-free is off: the service opens no session now").wait_for()
        page.evaluate(
            "() => { navigator.mediaDevices.getUserMedia = async () => { throw new Error('not allowed'); }; }"
        )
        hands_free(page).click()
        page.get_by_text("hands-free is off: not allowed").wait_for()
        assert hands_free(page).get_attribute("aria-pressed") == "false"
        assert page.get_by_role("button", name="Talk").is_enabled()
        write(page, "what is two plus three")
        page.get_by_text("two plus three is five").wait_for()


# To another host a browser sends no password of this one: thus it is with browsers that send none with a WebSocket.
ELSEWHERE = """() => {
  window.WebSocket = class extends WebSocket {
    constructor(address, protocols) {
      address.hostname = "localhost";
      super(address, protocols);
    }
  };
}"""


def test_hands_free_sends_the_key(
    opened: Callable[..., "playwright.Page"], pipeline: OwnPipeline, nano: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    access = Access(KeyRing("", hash_key("sk-page"), 1), OwnLimits())
    with served(service_of("nano", pipeline, nano), access) as address:
        page = opened(address, http_credentials={"username": "any", "password": "sk-page"})
        nobody_speaks(page)
        hands_free(page).click()
        page.get_by_text("listening…").wait_for()
        hands_free(page).click()
        page.get_by_text("hands-free is off").wait_for()
        page.evaluate(ELSEWHERE)
        hands_free(page).click()
        key = page.get_by_role("textbox", name="API key")
        key.fill("sk-other")
        key.press("Enter")
        known = page.get_by_role("textbox", name="This API key is not accepted")
        known.wait_for()
        keep(page, "hands-free-key")
        known.fill("sk-page")
        known.press("Enter")
        page.get_by_text("listening…").wait_for()
        hands_free(page).click()
        page.get_by_text("hands-free is off").wait_for()
        hands_free(page).click()
        page.get_by_text("listening…").wait_for()
    assert "sk-" not in caplog.text


def test_the_model_is_chosen(opened: Callable[..., "playwright.Page"], slow: str, url: str) -> None:
    page = opened(url)
    assert page.get_by_label("model").is_hidden(), "there is one"
    page = opened(slow)
    nobody_speaks(page)
    wire = Wire(page)
    page.set_viewport_size({"width": 360, "height": 640})
    model = page.get_by_label("model")
    assert model.locator("option").all_inner_texts() == ["nano", "support"]
    model.select_option("support")
    with page.expect_request("**/v1/chat/completions") as request:
        write(page, "what is two plus three")
    assert request.value.post_data_json["model"] == "support"
    page.get_by_text("two plus three is five").wait_for()
    hands_free(page).click()
    page.get_by_text("listening…").wait_for()
    assert model.is_disabled()
    assert wire.addresses[0].endswith("/v1/realtime?model=support")
    keep(page, "phone-models")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


def test_hands_free_what_is_not_understood_is_no_part_of_the_next_question(
    page: "playwright.Page", pipeline: OwnPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear = pipeline.hear

    async def deaf_once(clip: bytes) -> Heard | Refused:
        monkeypatch.setattr(pipeline, "hear", hear)
        return Refused("no_speech", "nobody speaks in it")

    monkeypatch.setattr(pipeline, "hear", deaf_once)
    wire = Wire(page)
    hands_free(page).click()
    page.get_by_text("nobody speaks in it").wait_for()
    page.locator("li.assistant audio").wait_for()
    assert said(page, "user") == ["(not understood)", "what is four plus four"]
    assert said(page, "assistant") == ["four plus four is eight"]
    assert len(wire.of("conversation.item.deleted")) == 1 and not wire.of("error")
