"""The page in a real browser, against the real command; no test of it looks at times."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.started import Started

from ojfa_export.runtime.model import Model

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
pytestmark = pytest.mark.slow

PROMPT = "def parse("
TOKENS = 24
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """Playwright's own Chromium, or the system's."""
    options = {"args": ["--no-sandbox"] if os.geteuid() == 0 else []}
    with sync_api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        path = own if own.exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None:
            pytest.skip("there is no Chromium: 'playwright install chromium' gets one")
        browser = playwright.chromium.launch(executable_path=path, **options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(served_bundle: Path) -> Iterator[Started]:
    started = Started(str(served_bundle))
    yield started
    started.kill()


@pytest.fixture
def open_page(browser, server):
    """Opens the page; in the end nothing may have been refused, failed or asked of others."""
    contexts, faults = [], []

    def check_request(request, url):
        if not request.url.startswith(f"{url}/"):
            faults.append(request.url)

    def make(started=server, path=None, answer=None, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        if path:
            page.route(path, answer)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        page.on("request", lambda request: check_request(request, started.url))
        page.goto(f"{started.url}/")
        return page

    yield make
    for context in contexts:
        context.close()
    # Chromium notes what a server refuses, and that there is none, as well; tests ask for both.
    wanted = ("status of 4", "status of 5", "ERR_INTERNET_DISCONNECTED")
    assert [each for each in faults if not any(part in each for part in wanted)] == []


def ready(page):
    expect(page.locator("#status")).to_have_text("Ready.")
    page.get_by_label("Tokens at most").fill(str(TOKENS))
    return page


def set_blocks(page, blocks):
    page.get_by_role("slider").fill(str(blocks))
    expect(page.get_by_role("radio", name="Fixed exit")).to_be_checked()


def run(page):
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#status")).to_contain_text("The answer is finished")


def blocks_of(page, box="answer"):
    spans = page.locator(f"#{box} .token").all()
    return [int(span.get_attribute("data-blocks")) for span in spans]


def event(**fields):
    return f"data: {json.dumps(fields)}\n\n"


@pytest.mark.parametrize("depth", [2, "auto", "speculate"])
def test_an_answer_beside_full_depth(open_page, model: Model, depth):
    page = ready(open_page())
    if isinstance(depth, int):
        set_blocks(page, depth)
    else:
        page.get_by_label(depth.capitalize(), exact=True).check()
    run(page)
    full = model.generate(PROMPT, exit="full", max_new_tokens=TOKENS).prompts[0]
    here = full
    if depth != "speculate":
        here = model.generate(PROMPT, exit=depth, max_new_tokens=TOKENS).prompts[0]
    for box, wanted in (("answer", here), ("full", full)):
        assert page.locator(f"#{box}").text_content() == PROMPT + wanted.text
        assert blocks_of(page, box) == wanted.exit_blocks or depth == "speculate"
    same = [a == b for a, b in zip(here.token_ids, full.token_ids, strict=False)]
    count, all = sum(same), max(len(here.token_ids), len(full.token_ids))
    differing = [place for place, each in enumerate(same) if not each]
    for box in ("answer", "full"):
        marked = page.locator(f"#{box} .differs").all()
        places = [int(each.get_attribute("data-place")) for each in marked]
        assert places[: len(differing)] == differing
    words = f"All {all} tokens agree." if count == all else f"{count} of {all} tokens agree"
    expect(page.locator("#agreement")).to_contain_text(words)
    mean = sum(blocks_of(page)) / len(here.token_ids)
    figures = page.locator("[data-figure=blocks]")
    expect(figures.first).to_have_text(f"{mean:.1f} of {model.blocks}")
    for pace in page.locator("[data-figure=pace]").all():
        # All of a small model may come at once.
        assert pace.text_content() == "–" or float(pace.text_content()) > 0


def test_a_chat(open_page, model: Model):
    page = ready(open_page())
    page.get_by_label("Chat").check()
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_label("Then run the same at full depth").uncheck()
    set_blocks(page, 4)
    run(page)
    wanted = model.chat([{"role": "user", "content": "hello"}], max_new_tokens=TOKENS)
    assert page.locator("#answer").text_content() == wanted.text
    expect(page.locator("#full-part")).to_be_hidden()


def test_the_promise_is_told(open_page):
    page = ready(open_page())
    expect(page.locator("#promise")).to_contain_text("at most 5% of the tokens")
    expect(page.locator("#promise")).to_contain_text("With 95% confidence")
    expect(page.locator("#depth-note")).to_contain_text("keeps the promise")
    page.get_by_role("radio", name="Fixed exit").check()
    expect(page.locator("#depth-note")).to_contain_text("Nothing is promised")
    expect(page.locator("#broken")).to_be_hidden()


def test_a_broken_promise_is_told(open_page):
    body = json.dumps({"models": {"small": {"promise_alarm": True}}})
    page = ready(open_page(path="**/health", answer=lambda route: route.fulfill(body=body)))
    expect(page.locator("#broken")).to_be_visible()


def test_all_of_it_by_keyboard(open_page):
    page = ready(open_page())
    page.locator("#bundle").focus()
    seen = ["bundle"]
    while seen[-1] != "table-part":
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        seen.append(focused.evaluate("e => e.id || e.name || e.parentElement.id"))
        assert focused.evaluate("e => getComputedStyle(e).outlineStyle") != "none", seen
    wanted = ["bundle", "kind", "prompt", "depth", "blocks", "most", "key", "compare", "run",
              "answer", "numbers", "table-part"]  # fmt: skip
    assert seen == wanted
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("The answer is finished")
    page.locator("#answer").focus()
    page.keyboard.press("End")
    count = len(blocks_of(page))
    note = page.locator("#token")
    expect(note).to_contain_text(f"Token {count},")
    expect(note).to_contain_text("confidence")
    page.keyboard.press("ArrowLeft")
    expect(note).to_contain_text(f"Token {count - 1},")
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#rows tr")).to_have_count(count)


def test_what_a_screen_reader_is_given(open_page):
    page = ready(open_page())
    run(page)
    tree = page.locator("body").aria_snapshot()
    for part in (
        'combobox "Bundle"', 'textbox "Prompt"', 'radio "Auto"', 'radio "Completion"',
        'slider "Blocks of the fixed exit', 'spinbutton "Tokens at most"',
        'textbox "Key of the server"', 'checkbox "Then run the same', 'button "Run"',
        'group "Answer"', 'group "The same at full depth"', 'list "Depths"', 'table "Figures"',
    ):  # fmt: skip
        assert part in tree, tree
    # Only the end is announced: answers aren't in a live region.
    assert page.locator("#answer").evaluate("e => e.closest('[aria-live], [role=status]')") is None
    title = page.locator("#answer .token").first.get_attribute("title")
    assert "of 4 blocks, confidence" in title


def test_text_of_models_is_only_text(open_page):
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    token = {"id": 1, "text": text, "blocks_run": 1, "confidence": None, "drafted": False}
    choice = {"index": 0, "text": text, "tokens": [token], "finish_detail": "stop_token"}
    body = event(choices=[choice]) + "data: [DONE]\n\n"
    page = ready(open_page(path="**/v1/completions", answer=lambda route: route.fulfill(body=body)))
    run(page)
    expect(page.locator("#answer .token")).to_have_text(text)
    assert page.locator("img, #answer script").count() == 0


def test_stop_ends_it(open_page):
    page = ready(open_page(path="**/v1/completions", answer=lambda route: None))
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_disabled()
    page.get_by_role("button", name="Run").click()
    with page.expect_event("requestfailed"):
        stop.click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(stop).to_be_disabled()
    expect(page.get_by_role("button", name="Run")).to_be_focused()


def test_errors_are_told(open_page):
    page = ready(open_page())
    page.get_by_label("Prompt", exact=True).fill("")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("prompt")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    run(page)
    expect(page.get_by_role("alert")).to_have_text("")


def test_a_server_that_is_gone_is_told(open_page):
    page = ready(open_page())
    page.context.set_offline(True)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text("The server can't be reached.")


def test_pointing_at_a_token(open_page, model: Model):
    page = ready(open_page())
    set_blocks(page, 2)
    run(page)
    choice = model.generate(PROMPT, exit=2, max_new_tokens=TOKENS, logprobs=0).prompts[0]
    page.locator("#answer .token").nth(3).hover()
    share = math.exp(choice.logprobs[3].logprob) * 100
    words = page.locator("#token").text_content()
    assert "Token 4, " in words
    assert "2 of 4 blocks" in words
    shown = float(re.search(r"confidence ([\d.e-]+)%", words)[1])
    assert shown == pytest.approx(share, rel=0.06)  # as the page rounds it


def test_errors_in_a_stream_are_told(open_page):
    body = event(error={"message": "the server ended before the answer did", "code": "draining"})
    page = ready(open_page(path="**/v1/completions", answer=lambda route: route.fulfill(body=body)))
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text("the server ended before the answer did")


def test_a_server_that_loads_is_waited_for(open_page):
    seen = []

    def answer(route):
        seen.append(route)
        if len(seen) > 1:
            route.continue_()
        else:
            error = {"message": "the server is loading", "code": "loading"}
            route.fulfill(status=503, body=json.dumps({"error": error}))

    page = open_page(path="**/v1/models", answer=answer)
    expect(page.locator("#status")).to_have_text("The server is loading its bundles.")
    ready(page)


def test_a_key_is_asked_for_and_kept_nowhere(open_page, served_bundle, tmp_path):
    (tmp_path / "keys").write_text("secret\n", encoding="utf-8")
    started = Started(str(served_bundle), "--api-key-file", str(tmp_path / "keys"))
    try:
        page = open_page(started)
        expect(page.get_by_role("alert")).to_contain_text("send a key of this server")
        key = page.get_by_label("Key of the server")
        expect(key).to_be_focused()
        key.fill("secret")
        key.blur()
        run(ready(page))
        kept = "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
        assert page.evaluate(kept) == [0, 0, "", f"{started.url}/"]
        page.reload()
        expect(page.get_by_role("alert")).to_contain_text("send a key of this server")
    finally:
        started.kill()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_in_both_schemes(open_page, scheme, width):
    page = ready(open_page(color_scheme=scheme, viewport={"width": width, "height": 800}))
    page.get_by_label("Write the blocks behind each token").check()
    page.locator("summary").click()
    run(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
