"""The page at `/`, driven in a browser without a window, against a server process."""

import io
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile

from dia_fast import Dia
from tests.server.serving import LONG, RECORDED, TEXT, Server, serving

pytest.importorskip("fastapi", reason="the extra server is not installed")

PAGE = Path(__file__).parents[2] / "dia_fast" / "server" / "page"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}
# Share of the waveform's height that is painted anywhere.
PAINTED = """() => {
    const canvas = wave.firstElementChild.shadowRoot.querySelector(".canvases canvas");
    const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let rows = 0;
    for (let y = 0; y < height; y++) rows += data.subarray(4 * width * y, 4 * width * (y + 1)).some((value) => value);
    return rows / height;
}"""
PROMPTLY = 0.2  # seconds after which nothing is left of what a click has stopped


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with api.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("voices")
    cache = str(tmp_path_factory.mktemp("cache"))
    with serving("--voices", str(folder), "--uploads", XDG_CACHE_HOME=cache) as server:
        yield server


@pytest.fixture
def page(browser: Any, own: Server) -> Iterator[Any]:
    """The page, ready. Nothing may be left on its console."""
    yield from opened(browser, own, DESKTOP, "light")


def opened(browser: Any, server: Server, size: dict[str, int], scheme: str) -> Iterator[Any]:
    told: list[str] = []
    context = browser.new_context(viewport=size, color_scheme=scheme, permissions=["microphone", "clipboard-read"])
    context.set_default_timeout(60_000)
    shown = context.new_page()
    shown.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
    shown.on("pageerror", lambda error: told.append(str(error)))
    shown.goto(server.url)
    shown.wait_for_selector('#server[data-state="ready"]')
    until(shown, "document.querySelectorAll('#voice option').length > 3")
    yield shown
    context.close()
    assert not told, (told, server.log[-20:])


def until(page: Any, condition: str) -> None:
    """Wait for a condition of JavaScript. (`wait_for_function` asks in the page, whose policy allows no eval.)"""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def speak(page: Any, text: str = TEXT) -> None:
    page.fill("#text", text)
    page.click("#speak")
    page.wait_for_selector('body[data-state="done"]')


def at(page: Any) -> float:
    return float(page.get_attribute("#wave", "aria-valuenow"))


def test_sound_plays_before_its_end_and_stops_at_a_click(page: Any, own: Server) -> None:
    page.locator("#text").press_sequentially("[S1] Hello. ")
    until(page, "document.getElementById('seconds').textContent !== 'about 0.0 s of speech'")
    page.fill("#text", 3 * LONG)
    waits = []
    for _ in range(6):  # moments in which this machine does other things are not the page's fault
        page.click("#speak")
        page.wait_for_selector('body[data-state="speaking"]')  # until then the slider may show the last sound's value
        until(page, "Number(document.getElementById('wave').ariaValueNow) > 0")
        assert own.metric("running") == 1
        start = time.monotonic()
        page.evaluate("document.getElementById('stop').click()")
        own.until("running", 0)
        waits.append(time.monotonic() - start)
        page.wait_for_selector('body[data-state="done"]')
        assert page.inner_text("#status") == "Stopped."
        if waits[-1] < PROMPTLY:
            break
    assert min(waits) < PROMPTLY, waits
    assert own.metric("pages") == 0


def test_the_keyboard_is_enough(page: Any) -> None:
    page.focus("#text")
    page.keyboard.press("Control+a")
    page.keyboard.type(TEXT)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector('body[data-state="done"]')
    page.focus("#wave")
    page.keyboard.press("End")
    until(page, "document.getElementById('wave').ariaValueNow === document.getElementById('wave').ariaValueMax")
    page.keyboard.press("ArrowLeft")
    until(page, "document.getElementById('wave').ariaValueMax - document.getElementById('wave').ariaValueNow > 0.9")
    before = at(page)
    width = page.locator("#wave").bounding_box()["width"]
    page.click("#wave", position={"x": width / 4, "y": 20})
    until(page, "Math.abs(wave.ariaValueNow * 4 - wave.ariaValueMax) < 0.5")
    until(page, f"({PAINTED})() > 0.2")
    before = at(page)
    page.focus("#wave")
    page.keyboard.press("Space")
    until(page, f"Number(document.getElementById('wave').ariaValueNow) > {before}")
    page.fill("#text", LONG)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector('body[data-state="speaking"]')
    page.keyboard.press("Escape")
    page.wait_for_selector('body[data-state="done"]')


def test_buttons_write_into_the_script(page: Any) -> None:
    page.fill("#text", "")
    for name in ("[S1]", "[S2]"):
        page.get_by_role("button", name=name, exact=True).click()
        page.keyboard.type("Hello.")
    assert page.input_value("#text") == "[S1] Hello.\n[S2] Hello."
    page.click("#words summary")
    page.get_by_role("button", name="door", exact=True).click()
    assert page.input_value("#text").endswith("Hello. door ")
    page.fill("#text", "[S2] Supercalifragilistic.")
    page.get_by_text("begins with [S2]").wait_for()
    page.get_by_text("never learnt: Supercalifragilistic").wait_for()


def test_a_reload_keeps_everything(page: Any, own: Server) -> None:
    page.fill("#seed", "3")
    assert page.get_attribute("#lock", "aria-pressed") == "true"
    speak(page)
    page.locator("#temperature").fill("0.6")
    page.reload()
    page.wait_for_selector("#history li")
    page.wait_for_selector('#server[data-state="ready"]')
    assert page.input_value("#text") == TEXT and page.input_value("#seed") == "3"
    until(page, "document.getElementById('temperature-value').value === '0.6'")
    page.select_option("#format", "wav")
    with page.expect_download() as first:
        page.get_by_role("button", name="Download: [S1]").first.click()
    ours, rate = soundfile.read(first.value.path(), dtype="int16")
    theirs, same = soundfile.read(io.BytesIO(own.speak(model="demo").body), dtype="int16")
    assert (
        rate == same and abs(ours.astype(int) - theirs.astype(int)[: len(ours)]).max() <= 1 and len(ours) == len(theirs)
    )
    page.select_option("#format", "mp3")
    with page.expect_download() as second:
        page.get_by_role("button", name="Download: [S1]").first.click()
    assert Path(second.value.path()).read_bytes() == own.speak(response_format="mp3").body
    page.get_by_role("button", name="Play: [S1]").first.click()
    until(page, "Number(document.getElementById('wave').ariaValueNow) > 0.1")
    page.get_by_role("button", name="Delete: [S1]").first.click()
    page.get_by_text("What you speak is kept here").wait_for()


def test_seeds_of_64_bits_arrive_whole(page: Any) -> None:
    seed = str(2**64 - 2)
    page.fill("#seed", seed)
    with page.expect_request("**/v1/audio/speech") as sent:
        speak(page)
    assert f'"seed":{seed}' in sent.value.post_data and seed in page.inner_text("#figures")


def test_a_voice_comes_from_a_file_and_goes(page: Any, own: Server, tmp_path: Path) -> None:
    sound = Dia.from_pretrained("demo").generate(RECORDED, seed=3).save(tmp_path / "door.wav")
    page.click("#add-voice summary")
    page.set_input_files("#file", sound)
    page.get_by_text(re.compile(r"door.wav: \d")).wait_for()
    assert page.is_disabled("#use") and page.is_disabled("#keep")
    page.fill("#ref-text", RECORDED)
    page.click("#use")
    until(page, "document.getElementById('voice').value === '*recording'")
    # The demo voice has not learnt to go on in recordings of this length: nothing is to be spoken here.
    spoken = 'data: {"type":"speech.audio.done"}\n\n'
    page.route("**/v1/audio/speech", lambda route: route.fulfill(body=spoken, headers={"X-Sample-Rate": "16000"}))
    with page.expect_request("**/v1/audio/speech") as sent:
        page.fill("#text", "[S2] Yes, thank you.")
        page.click("#speak")
    assert "data:audio/wav;base64," in sent.value.post_data and RECORDED in sent.value.post_data
    page.wait_for_selector('body[data-state="idle"]')
    page.fill("#voice-name", "door")
    page.check("#consent")
    page.click("#keep")
    until(page, "document.getElementById('voice').value === 'door'")
    assert own.call("/v1/audio/voices/door").json["type"] == "recording"
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#forget")
    until(page, "document.getElementById('voice').value === 'dialogue'")
    assert own.call("/v1/audio/voices/door").status == 404


def test_the_microphone_records(page: Any) -> None:
    page.click("#add-voice summary")
    page.click("#record")
    page.get_by_text(re.compile(r"Recording… ([3-9]|\d\d) s")).wait_for()  # a busy page leaves seconds out
    page.click("#record")
    page.get_by_text("Microphone: ").wait_for()
    told = page.inner_text("#recorded")
    assert (heard := re.match(r"Microphone: (\d+\.\d) s\. ", told)) and 2 < float(heard[1]) < 20, told
    page.fill("#ref-text", TEXT)
    assert page.is_enabled("#use")


def test_the_microphone_stops_before_a_recording_is_too_long(page: Any) -> None:
    """By a clock that is 12 times as fast: 34 s are over in 3."""
    page.evaluate("() => { const now = performance.now.bind(performance); performance.now = () => 12 * now(); }")
    page.click("#add-voice summary")
    page.click("#record")
    page.get_by_text("Microphone: ").wait_for()
    assert page.inner_text("#record") == "Record"
    page.fill("#ref-text", TEXT)
    assert page.is_enabled("#use"), page.inner_text("#recorded")


def test_programs_that_the_page_writes_run(page: Any, own: Server, tmp_path: Path, monkeypatch: Any) -> None:
    import subprocess

    pytest.importorskip("openai", reason="the client of OpenAI is not installed")
    monkeypatch.chdir(tmp_path)
    page.fill("#text", TEXT + " It's red.")
    page.fill("#seed", "3")
    page.locator("#temperature").fill("0.6")
    page.select_option("#voice", "alloy")
    page.select_option("#format", "flac")
    wanted = own.speak(TEXT + " It's red.", voice="alloy", temperature=0.6, response_format="flac").body
    page.click("#code")
    subprocess.run(["bash", "-euc", page.inner_text("#snippet")], check=True, capture_output=True)
    assert Path("speech.flac").read_bytes() == wanted
    Path("speech.flac").unlink()
    page.click("[data-kind=python]")
    exec(page.inner_text("#snippet"), {})
    assert Path("speech.flac").read_bytes() == wanted
    page.click("#copy")
    page.get_by_text("Copied.").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.inner_text("#snippet")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_everybody_can_use_it(browser: Any, own: Server, size: dict[str, int], scheme: str) -> None:
    """axe-core finds nothing serious, and nothing sticks out of a narrow screen."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    for page in opened(browser, own, size, scheme):
        for summary in page.locator("summary:visible").all():
            summary.click()
        speak(page, "[S2] Unknown words.")
        for button in (None, "#code"):
            if button:
                page.click(button)
            # Style sheets of a shadow root it would copy, which the policy of the page forbids.
            found = axe.Axe().run(page, options={"preload": False}).response["violations"]
            assert not found, [(item["id"], [node["html"][:120] for node in item["nodes"]]) for item in found]
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_key_is_asked_for(browser: Any, tight: Server) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(tight.url)
    page.wait_for_selector('#server[data-state="ready"]')
    page.fill("#text", TEXT)
    page.click("#speak")
    page.get_by_text("A valid API key is needed").wait_for()
    page.fill("#key", "open sesame")
    page.keyboard.press("Tab")
    until(page, "document.querySelectorAll('#voice option').length > 3")
    speak(page)
    page.reload()
    until(page, "document.querySelectorAll('#voice option').length > 3")
    assert "open sesame" not in str(context.storage_state())
    context.close()


def test_the_page_is_files_of_its_own(server: Server) -> None:
    shown = server.call("/")
    assert shown.status == 200 and shown.headers["content-type"] == "text/html; charset=utf-8"
    policy = shown.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    [nonce] = re.findall(r"'nonce-([\w-]{20,})'", policy)
    assert f'nonce="{nonce}"' in shown.body.decode() and nonce not in server.call("/").body.decode()
    assert server.call("/page/__init__.py").status == server.call("/page/../run.py").status == 404
    for path in PAGE.iterdir():
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"https?://(?!www\.w3\.org)", text), path.name
            assert server.call(f"/page/{path.name}").body.decode() == text
    about = server.call("/page/about.json").json
    assert about["defaults"]["temperature"] == 0.5 and "door" in about["vocabulary"]


def test_a_server_without_the_page() -> None:
    with serving("--no-page") as other:
        assert other.call("/").error["type"] == "not_found_error" and other.call("/page/app.js").status == 404
        assert other.call("/v1/models").status == 200
