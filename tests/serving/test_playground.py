"""The playground, clicked through in a real browser against the real server with a tiny random model."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ephemera.rates import ScaleNet
from tiny_models import save_tiny, tiny_backbone

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
pytest.importorskip("fastapi", reason="needs the extra: pip install 'ephemera[serve]'")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
ARGUMENTS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"
PROMPT = "Question: who wrote the first book about the river?\n\nAnswer:"
LAYERS, KINDS, STEPS = 2, 2, 3


def bold_scalenet() -> ScaleNet:
    """Rates that differ by layer, step and kind, large enough that even a random model answers otherwise."""
    torch.manual_seed(3)
    backbone = tiny_backbone(dtype=torch.float32)
    network = ScaleNet(
        hidden_size=backbone.hidden_size,
        projections=len(backbone.projections),
        base_rates=(20, 0.2, 0.1, 0.1, 0.1),
        mlp_size=16,
    )
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(0, 0.3)
    return network


def serve(folder: Path, *options: str) -> Iterator[str]:
    """A server of its own, started as a user starts it; its address, once it is ready."""
    save_tiny(folder / "model")
    bold_scalenet().save_pretrained(folder / "rate")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ephemera", "serve", "--model", folder / "model", "--rate", folder / "rate",
               "--steps", "3", "--dtype", "float32", "--port", str(port), *options]  # fmt: skip
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            with (
                suppress(OSError),
                urllib.request.urlopen(f"{url}/health", timeout=5),
            ):
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"not ready after a minute: {log.read_text()}")
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serve(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def locked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serve(tmp_path_factory.mktemp("locked"), "--api-key", "tiny-key")


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        yield browser
        browser.close()


class Visit:
    """A page, every address it asked for, and everything that its console complained of."""

    def __init__(self, browser: sync_api.Browser, url: str, **settings):
        self.url = url
        self.context = browser.new_context(accept_downloads=True, **settings)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: line.type in ("error", "warning") and self.complaints.append(line.text))
        self.page.goto(url)

    def ready(self) -> sync_api.Page:
        self.page.wait_for_selector("#served[data-state=ready]")
        return self.page

    def ask(self, prompt: str = PROMPT, *, max_tokens: int = 8) -> sync_api.Page:
        page = self.ready()
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.get_by_label("Max tokens").fill(str(max_tokens))
        page.get_by_role("button", name="Run").click()
        return page

    def finished(self) -> sync_api.Page:
        for column in ("#base", "#adapted"):
            self.page.wait_for_selector(f"{column}[data-state=done]")
        self.page.get_by_role("button", name="Run").wait_for()
        return self.page


@pytest.fixture
def visit(browser: sync_api.Browser, server: str) -> Iterator[Visit]:
    """Whatever a test does, its page asks no one but its own server and nothing goes wrong in it unseen."""
    visit = Visit(browser, server)
    yield visit
    assert [url for url in visit.asked if not url.startswith((server, "data:", f"blob:{server}"))] == []
    assert visit.complaints == []
    visit.context.close()


def post(server: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        server + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def body_of(visit: Visit, method: str, **more) -> dict:
    model = next(m["id"] for m in models(visit.url) if m["method"] == method)
    return {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **more}


def models(server: str) -> list[dict]:
    with urllib.request.urlopen(f"{server}/v1/models") as response:
        return json.load(response)["data"]


# White space as a browser knows it: Python's also has control characters, which a random model writes.
SPACE = "\t\n\v\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"


def words(text: str | None) -> list[str]:
    return re.findall(f"[^{SPACE}]+", text or "")


def test_shows_both_answers_as_the_api_gives_them(visit: Visit):
    visit.ask()
    page = visit.finished()
    adapt = {"steps": STEPS, "seed": 0, "trace": True}
    for column, method, more in (("#base", "none", {}), ("#adapted", "layerwise", {"adapt": adapt})):
        want = post(visit.url, "/v1/completions", body_of(visit, method, **more))
        assert words(page.text_content(f"{column} .text")) == words(want["choices"][0]["text"])
        assert "First token" in page.inner_text(f"{column} .times")
        assert str(want["usage"]["completion_tokens"]) in page.inner_text(f"{column} .times")


def test_streams_piece_by_piece(visit: Visit):
    visit.ready().evaluate("""() => {
        window.seen = {base: [], adapted: []};
        for (const id of Object.keys(seen)) {
            const text = document.querySelector(`#${id} .text`);
            new MutationObserver(() => seen[id].push([document.getElementById(id).dataset.state, text.textContent]))
                .observe(document.getElementById(id), {subtree: true, childList: true, characterData: true, attributes: true});
        }
    }""")
    visit.ask(max_tokens=24)
    page = visit.finished()
    for column in ("base", "adapted"):
        partial = {text for state, text in page.evaluate(f"seen.{column}") if state == "streaming"}
        assert len(partial) > 3


def test_the_caret_shows_before_the_first_word(visit: Visit):
    """Answers often begin with empty lines, which the page leaves out."""
    page = visit.ready()
    heights = page.evaluate("""["empty", "streaming"].map((state) => {
      const column = document.getElementById("base");
      column.dataset.state = state;
      column.querySelector(".text").replaceChildren();
      return column.querySelector(".text").getBoundingClientRect().height;
    })""")
    assert heights[0] == 0
    assert heights[1] > 10


def test_curve_and_map_are_the_api_s_numbers(visit: Visit):
    visit.ask()
    page = visit.finished()
    adapt = {"steps": STEPS, "seed": 0, "trace": True}
    want = post(visit.url, "/v1/completions", body_of(visit, "layerwise", adapt=adapt))["ephemera"]

    points = page.eval_on_selector_all(
        ".point", "points => points.map(p => [+p.dataset.step, +p.dataset.nll, +p.getAttribute('cy')])"
    )
    assert [k for k, _, _ in points] == list(range(STEPS + 1))
    assert [nll for _, nll, _ in points] == pytest.approx(want["prompt_nll"], rel=1e-5)
    lowest_first = sorted(points, key=lambda point: point[1])
    heights = [cy for _, _, cy in lowest_first]
    assert heights == sorted(heights, reverse=True)  # a larger loss stands higher
    assert [text.split()[1] for text in page.locator("#curve-table tbody tr").all_inner_texts()] == [
        f"{nll:.3f}" for nll in want["prompt_nll"]
    ]

    cells = page.eval_on_selector_all(
        ".heat .cell",
        "cells => cells.map(c => [c.getAttribute('aria-label'), +c.dataset.rate, +c.style.getPropertyValue('--t')])",
    )
    assert len(cells) == LAYERS * STEPS * KINDS
    names = {"q": "query", "v": "value"}
    rates = {
        f"Layer {projection['layer']}, step {k + 1}, {names[projection['kind']]}": rate
        for k, row in enumerate(want["trace"]["rates"])
        for projection, rate in zip(want["trace"]["projections"], row, strict=True)
    }
    assert {label.split(":")[0]: rate for label, rate, _ in cells} == pytest.approx(rates, rel=1e-5)
    shades = [t for _, _, t in sorted(cells, key=lambda cell: cell[1])]
    assert shades == sorted(shades)
    assert shades[-1] > shades[0]
    page.get_by_text("Numbers", exact=True).click()
    assert page.locator("#heat-table tbody td").count() == LAYERS * STEPS * KINDS


def test_changed_words_are_a_longest_common_subsequence(visit: Visit):
    pairs = [
        ("the cat sat on the mat", "a cat sat on a red mat"),
        ("one two three", "one two three"),
        ("", "something new"),
        ("b c a b c d a", "a b c a d b a c"),
        ("x y", ""),
    ]
    page = visit.ready()
    for base, adapted in pairs:
        have = page.evaluate(
            "async pair => (await import('/playground/words.js')).compare(...pair)",
            [base, adapted],
        )
        kept = len(adapted.split()) - have["changed"]
        assert kept == len(base.split()) - have["dropped"] == longest_common(base.split(), adapted.split())
        for side, text in (("base", base), ("adapted", adapted)):
            assert "".join(run["text"] for run in have[side]) == text
        stays = [" ".join(r["text"] for r in have[side] if not r["changed"]).split() for side in ("base", "adapted")]
        assert stays[0] == stays[1]


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    @cache
    def of(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + of(i + 1, j + 1) if a[i] == b[j] else max(of(i + 1, j), of(i, j + 1))

    return of(0, 0)


def test_marks_what_changed_and_unmarks_it(visit: Visit):
    visit.ask(max_tokens=24)
    page = visit.finished()
    base, adapted = (words(page.text_content(f"#{column} .text")) for column in ("base", "adapted"))
    assert base != adapted  # else the case shows nothing
    marked = words(" ".join(page.locator("#adapted ins").all_text_contents()))
    assert len(marked) == len(adapted) - longest_common(base, adapted)
    assert f"{len(marked)} of {len(adapted)}" in page.inner_text("#changed")
    assert "underline" in page.eval_on_selector("#adapted ins", "mark => getComputedStyle(mark).textDecorationLine")
    page.get_by_label("Mark what changed").uncheck()
    assert page.locator("ins, del").count() == 0
    assert words(page.text_content("#adapted .text")) == adapted


def test_steps_follow_the_method(visit: Visit):
    page = visit.ready()
    for model in models(visit.url):
        if model["method"] in (None, "none"):
            continue
        page.get_by_label("Method").select_option(model["id"])
        steps = page.locator("#steps")
        assert steps.is_disabled() == (model["max_steps"] == 0)
        assert steps.get_attribute("max") == ("" if model["max_steps"] is None else str(model["max_steps"]))
    page.get_by_label("Method").select_option(body_of(visit, "layerwise")["model"])
    page.locator("#steps").fill("9")
    page.get_by_role("button", name="Question").click()
    page.get_by_role("button", name="Run").click()
    assert "from 0 to" in page.inner_text("#steps-error")
    assert page.evaluate("document.activeElement.id") == "steps"
    assert not any(url.endswith("/v1/completions") for url in visit.asked)


def test_runs_by_keyboard_alone(visit: Visit):
    page = visit.ready()
    page.locator("body").click(position={"x": 1, "y": 1})
    order = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "document.activeElement.id || document.activeElement.name || document.activeElement.textContent"
        )
        order.append(name.strip())
        assert page.evaluate("""() => { // the focus shows: an outline on the element, or on the label's text after it
            const at = document.activeElement;
            const shown = at.type === 'radio' ? at.nextElementSibling : at;
            return getComputedStyle(shown).outlineStyle !== 'none' || at.classList.contains('skip');
        }"""), name
        if name == "prompt":
            page.keyboard.type(PROMPT)
        if name == "max-tokens":
            page.keyboard.press("Control+A")
            page.keyboard.type("8")
        if name == "run":
            break
    want = [
        "prompt",
        "Question",
        "Summary",
        "Instruction",
        "format",
        "method",
        "steps",
        "max-tokens",
        "seed",
        "key",
        "run",
    ]
    assert [name for name in order if name in want] == want
    page.keyboard.press("Enter")
    visit.finished()
    assert page.evaluate("document.activeElement.id") == "run"
    assert page.inner_text("#announce").startswith("Both answers are complete.")

    page.locator('.heat .cell[tabindex="0"]').focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith("Layer 1, step 1, value: ")
    assert page.inner_text(".tooltip") == label
    page.keyboard.press("Escape")
    assert page.locator(".tooltip").is_hidden()

    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="Stop").wait_for()
    visit.finished()


def test_stop_keeps_what_there_is(visit: Visit):
    page = visit.ready()
    held = []
    page.route("**/v1/completions", lambda route: held.append(route) or None)  # never answered
    visit.ask()
    page.wait_for_selector("#adapted[data-state=waiting]")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("#adapted[data-state=stopped]")
    assert "Stopped" in page.inner_text("#adapted")
    assert page.inner_text("#announce") == "Stopped."
    page.unroute("**/v1/completions")
    page.get_by_role("button", name="Run").click()
    visit.finished()


def test_says_what_the_server_refused(visit: Visit):
    page = visit.ask(max_tokens=10_000_000)
    page.wait_for_selector(".problem")
    assert "max_tokens" in page.inner_text(".problem")
    assert page.get_attribute("#max-tokens", "aria-invalid") == "true"
    assert page.inner_text("#announce") in page.inner_text(".problem")
    visit.complaints.clear()  # Chromium notes every refusal in its console


def answer(status: int, message: str, **headers: str):
    body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})
    return lambda route: route.fulfill(status=status, headers=headers, content_type="application/json", body=body)


def test_waits_as_long_as_a_busy_server_asks(visit: Visit):
    page = visit.ready()
    page.route("**/v1/completions", answer(429, "64 requests are waiting.", **{"Retry-After": "2"}))
    visit.ask()
    again = page.get_by_role("button", name="Try again")
    again.wait_for()
    assert "64 requests are waiting." in page.inner_text("#banner")
    assert again.get_attribute("aria-disabled") == "true"
    assert "in 2 s" in again.inner_text()
    page.unroute("**/v1/completions")
    page.wait_for_selector("#banner button[aria-disabled=false]")
    again.click()
    visit.finished()
    assert page.locator(".problem").count() == 0
    visit.complaints.clear()


def test_says_when_nobody_answers_and_when_an_answer_breaks_off(visit: Visit):
    page = visit.ready()
    page.route("**/v1/completions", lambda route: route.abort())
    visit.ask()
    page.wait_for_selector(".problem")
    assert "No connection" in page.inner_text("#banner")
    assert page.get_attribute("#served", "data-state") == "down"
    page.unroute("**/v1/completions")

    half = 'data: {"choices": [{"index": 0, "text": "Half an", "finish_reason": null}]}\r\n\r\n'
    page.route(
        "**/v1/completions", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=half)
    )
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("#adapted[data-state=error]")
    assert page.text_content("#adapted .text") == "Half an"
    assert "broke off" in page.inner_text("#adapted .problem")
    visit.complaints.clear()


def test_shows_the_note_of_a_prompt_that_could_not_adapt(visit: Visit):
    page = visit.ready()
    extension = {"method": "layerwise", "steps": 2, "note": "The loss was not finite: unadapted.", "prompt_nll": [3.5, None],
                 "adapt_seconds": 0.5, "first_token_seconds": 0.6, "trace": None}  # fmt: skip
    chunk = {"choices": [{"index": 0, "text": "An answer", "finish_reason": "stop"}], "ephemera": extension}
    body = f": adapting 1/2\n\ndata: {json.dumps(chunk, ensure_ascii=False)}\n\ndata: [DONE]\n\n"
    page.route(
        "**/v1/completions", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body)
    )
    visit.ask()
    visit.finished()
    assert "The loss was not finite: unadapted." in page.inner_text("#adapted .note")
    assert page.locator(".point").count() == 1
    assert "not finite" in page.inner_text("#curve-table")
    assert page.locator(".heat").count() == 0


def test_an_abstention_stands_out(visit: Visit):
    extension = {"method": "universal", "steps": 1, "steps_taken": 1, "reach": "answer", "prompt_nll": [3.5], "trace": None,
                 "note": "abstained: the answer would probably get worse", "adapt_seconds": 0.5, "first_token_seconds": 0.6}  # fmt: skip
    chunk = {"choices": [{"index": 0, "text": "An answer", "finish_reason": "stop"}], "ephemera": extension}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    visit.ready().route(
        "**/v1/completions", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body)
    )
    visit.ask()
    page = visit.finished()
    assert page.inner_text("#adapted .badge") == "Abstained"
    assert page.inner_text("#adapted .note") == "Abstained the answer would probably get worse"
    # One number, of the model without its adapter: no claim that the step lowered it
    assert "acts on the answer alone" in page.inner_text("#curve-note")
    assert "no steps" not in page.inner_text("#curve-note")


def listing(*entries: tuple[str, list[str], str | None, int]):
    data = [
        {"id": "m" if method == "none" else f"m:{method}", "method": method, "format": formats, "reach": reach}
        | {"steps": steps, "max_steps": steps}
        for method, formats, reach, steps in entries
    ]
    return lambda route: route.fulfill(status=200, content_type="application/json", body=json.dumps({"data": data}))


BOTH = ["chat", "plain"]
NONE, FIXED = ("none", BOTH, None, 0), ("fixed", BOTH, "all", 1)


@pytest.mark.parametrize(
    ("entries", "method", "format", "steps"),
    [
        ([NONE, ("universal", BOTH, "answer", 2), FIXED], "universal", "chat", "2"),
        ([NONE, ("universal", ["plain"], "answer", 1), FIXED], "universal", "completion", "1"),
        ([NONE, FIXED], "none", "chat", "0"),
        ([("none", ["plain"], None, 0), FIXED], "none", "completion", "0"),
        ([NONE, FIXED, ("stepwise", ["plain"], "all", 3)], "stepwise", "completion", "3"),
    ],
)
def test_begins_with_the_network_that_ships(browser: sync_api.Browser, server: str, entries, method, format, steps):
    visit = Visit(browser, server)
    page = visit.page
    page.route("**/v1/models", listing(*entries))
    page.reload()
    visit.ready()
    assert page.locator("#method").input_value() == ("m" if method == "none" else f"m:{method}")
    assert page.locator("input[name=format]:checked").input_value() == format
    assert page.locator("#steps").input_value() == steps
    assert page.locator("#download").is_disabled() == (method == "none")
    if method == "universal":
        assert "It acts on the answer alone." in page.inner_text("#method-hint")
    visit.context.close()


def test_blank_steps_leave_the_adapter_to_a_generator(browser: sync_api.Browser, server: str):
    visit = Visit(browser, server)
    page = visit.page
    data = [
        {"id": "m", "method": "none", "format": BOTH, "reach": None, "steps": 0, "max_steps": 0, "generates": False}
    ]
    data += [
        {**data[0], "id": "m:universal", "method": "universal", "reach": "answer", "max_steps": 1, "generates": True}
    ]
    page.route("**/v1/models", lambda route: route.fulfill(status=200, body=json.dumps({"data": data})))
    page.reload()
    visit.ready()
    page.fill("#prompt", "The mill runs")
    assert page.locator("#steps").input_value() == ""
    assert "Blank: a generator makes the adapter" in page.inner_text("#steps-hint")
    assert "steps" not in page.inner_text("#snippet")
    assert "seed" in page.inner_text("#snippet")
    page.fill("#steps", "1")
    assert "steps" in page.inner_text("#snippet")
    visit.context.close()


def test_a_method_brings_its_format(visit: Visit):
    page = visit.ready()  # the server's network was trained on plain prompts
    assert page.locator("input[name=format]:checked").input_value() == "completion"
    assert "Trained on plain prompts." in page.inner_text("#method-hint")
    page.get_by_role("radio", name="Chat").check()
    page.get_by_label("Method").select_option(body_of(visit, "fixed")["model"])
    assert page.locator("input[name=format]:checked").input_value() == "chat"
    page.get_by_label("Method").select_option(body_of(visit, "layerwise")["model"])
    assert page.locator("input[name=format]:checked").input_value() == "completion"
    page.get_by_role("radio", name="Chat").check()  # it may be asked for all the same, and the answer says so
    visit.ask()
    visit.finished()
    assert "was trained on plain prompts" in page.inner_text("#adapted .note")


def test_the_model_alone_is_asked_once(visit: Visit):
    page = visit.ready()
    page.get_by_label("Method").select_option(body_of(visit, "none")["model"])
    visit.ask()
    page.wait_for_selector("#base[data-state=done]")
    page.get_by_role("button", name="Run").wait_for()
    want = post(visit.url, "/v1/completions", body_of(visit, "none"))
    assert words(page.text_content("#base .text")) == words(want["choices"][0]["text"])
    assert page.get_attribute("#adapted", "data-state") == "empty"
    assert page.inner_text("#announce") == "The answer is complete."
    assert sum(url.endswith("/v1/completions") for url in visit.asked) == 1


def test_reads_event_streams_however_they_are_cut(visit: Visit):
    text = ": adapting 1/2\r\n\r\ndata: é\r\ndata: two\r\n\r\n: adapting 2/2\n\ndata:three\n\ndata: \U0001f98b\r\r"
    want = [{"comment": "adapting 1/2"}, {"data": "é\ntwo"}, {"comment": "adapting 2/2"}, {"data": "three"}, {"data": "\U0001f98b"}]  # fmt: skip
    page = visit.ready()
    for size in (1, 2, 3, 7, 1000):
        have = page.evaluate(
            """async ([text, size]) => {
                const bytes = new TextEncoder().encode(text);
                const body = new ReadableStream({start(control) {
                    for (let i = 0; i < bytes.length; i += size) control.enqueue(bytes.slice(i, i + size));
                    control.close();
                }});
                const events = [];
                for await (const event of (await import('/playground/api.js')).serverSentEvents(body)) events.push(event);
                return events;
            }""",
            [text, size],
        )
        assert have == want, size


def test_copied_code_sends_the_same_request(visit: Visit, tmp_path: Path):
    visit.ask("Who wrote the river's \"first\" book? It's $HOME \\ `x`")
    page = visit.finished()
    want = words(page.text_content("#adapted .text"))
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    if shutil.which("curl"):
        run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
        chunks = [json.loads(line[6:]) for line in run.stdout.splitlines() if line.startswith("data: {")]
        assert words("".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])) == want
    page.get_by_role("radio", name="Python").check()
    program = page.text_content("#snippet") or ""
    compile(program, "snippet", "exec")
    pytest.importorskip("openai", reason="the copied Python needs the openai package")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert words(run.stdout) == want


def test_downloads_the_adapter(visit: Visit):
    visit.ready()
    visit.page.get_by_label("Prompt", exact=True).fill(PROMPT)
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="Download adapter").click()
    archive = zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes()))
    assert sorted(archive.namelist()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert download.value.suggested_filename.endswith(".zip")


def test_chat_goes_to_the_chat_endpoint(visit: Visit):
    visit.ready().get_by_role("radio", name="Chat").check()
    visit.ask()
    page = visit.finished()
    body = {k: v for k, v in body_of(visit, "none").items() if k != "prompt"}
    want = post(visit.url, "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": PROMPT}]})
    assert words(page.text_content("#base .text")) == words(want["choices"][0]["message"]["content"])


def test_asks_for_a_key_where_the_server_does(browser: sync_api.Browser, locked_server: str):
    visit = Visit(browser, locked_server)
    page = visit.page
    page.wait_for_selector(".problem")
    assert "API key" in page.inner_text("#banner")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("does not accept this key").wait_for()
    page.get_by_label("API key").fill("tiny-key")
    page.keyboard.press("Enter")
    visit.ask()
    visit.finished()
    assert "tiny-key" not in (page.text_content("#snippet") or "")
    assert "$EPHEMERA_API_KEY" in (page.text_content("#snippet") or "")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    visit.ready()  # the tab remembers the key
    visit.context.close()


CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
    const rgba = colour => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const poor = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const at = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !at.checkVisibility() || at.closest(':disabled, .visually-hidden, .skip, noscript')) continue;
        let behind = at;
        while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
        const style = getComputedStyle(at);
        const front = light(rgba(at.closest('svg') ? style.fill : style.color));
        const back = light(rgba(getComputedStyle(behind ?? document.documentElement).backgroundColor));
        const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
        if (ratio < 4.5) poor.push([walker.currentNode.data.trim(), ratio]);
    }
    return poor;
}"""
NAMELESS = """() => [...document.querySelectorAll('input, select, textarea, button, a, [tabindex="0"]')].filter(at => at.checkVisibility())
    .filter(at => !(at.labels?.length || at.getAttribute('aria-label') || at.getAttribute('aria-labelledby') || at.textContent.trim()))
    .map(at => at.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_is_readable_and_named_at_phone_width(browser: sync_api.Browser, server: str, scheme):
    visit = Visit(browser, server, color_scheme=scheme, viewport={"width": 360, "height": 740}, reduced_motion="reduce")
    visit.ask(max_tokens=24)
    page = visit.finished()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    ids = page.eval_on_selector_all("[id]", "all => all.map(at => at.id)")
    assert len(ids) == len(set(ids))
    described = page.eval_on_selector_all(
        "[aria-describedby], [aria-labelledby]",
        "all => all.flatMap(a => `${a.getAttribute('aria-describedby') ?? ''} ${a.getAttribute('aria-labelledby') ?? ''}`.split(/\\s+/))",
    )
    assert set(described) - {""} <= set(ids)
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map(at => +at.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.evaluate("[...document.getAnimations()].filter(a => a.playState === 'running').length") == 0
    assert visit.complaints == []
    visit.context.close()
