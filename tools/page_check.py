"""The page in a real browser: a question is asked, the answer streams, a token is pointed at, the fact lights up.

    python -m tools.page_check http://127.0.0.1:8000 --axe axe.min.js --picture docs/look.png

Needs `pip install playwright`, a Chromium, and axe-core's axe.min.js (npm pack axe-core), none of which is part of the
project. The server has to serve the bundled model. Ends with an error at the first thing that is wrong.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from saccade.eval.tasks import draw_test

AXE = "async () => (await axe.run(document)).violations.map((v) => v.id + ' at ' + v.nodes[0].target.join(' '))"
LIT = "() => [...document.querySelectorAll('.prompt .lit')].map((span) => span.textContent)"
IN_VIEW = """() => { const box = document.querySelector('.prompt'), edge = box.getBoundingClientRect();
  return [...box.querySelectorAll('.lit')].some((span) => { const own = span.getBoundingClientRect();
    return own.top >= edge.top && own.bottom <= edge.bottom; }); }"""
WORDS = [" thunder", " cedar", " blue"]  # of the fact that is asked for


def check(browser: Any, url: str, axe: str | None, picture: str | None, scheme: str, width: int) -> None:
    """One size of the window, light or dark."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, bypass_csp=bool(axe))
    page, errors = context.new_page(), list[str]()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.locator("#question").fill(draw_test("recall", 0, 192).prompt)
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer", timeout=120_000)
    tokens = page.locator(".answer span").all_inner_texts()
    for word in WORDS:
        page.locator("#layer").fill("4")  # the last layer
        page.locator(".answer span").nth(tokens.index(word)).hover()
        assert word in page.evaluate(LIT), f"{word!r} does not light up"
    page.locator(".answer").focus()
    page.keyboard.press("Home")
    assert tokens[0].strip() in page.locator("#told").inner_text(), "the arrow keys do not move"
    assert page.locator(".answer").get_attribute("aria-activedescendant") == "token-1-0"
    assert not page.evaluate("() => document.documentElement.scrollWidth > innerWidth"), "wider than the window"
    if axe is not None:
        page.add_script_tag(content=Path(axe).read_text())
        found = page.evaluate(AXE)
        assert found == [], found
    if picture is not None:
        page.locator("#layer").fill("0")
        page.locator(".answer span").nth(tokens.index(WORDS[1])).hover()
        page.wait_for_timeout(1200)  # the strip has its numbers
        page.screenshot(path=picture)
    assert errors == [], errors
    context.close()


def answer_with(status: int, body: str, route: Any) -> None:
    route.fulfill(status=status, body=body)


def check_faults(browser: Any, url: str) -> None:
    """What goes wrong is said, loses no question, and disturbs no other answer."""
    page = browser.new_context(viewport={"width": 900, "height": 900}).new_page()
    page.goto(url)
    question, error = page.locator("#question"), page.locator("#error")
    question.fill("  ")
    page.keyboard.press("Enter")
    assert page.locator("#turns section").count() == 0, "an empty question is asked"
    chats = "**/v1/chat/completions"
    for status, body, told in (
        (502, "<html>bad gateway</html>", "The server answers 502"),
        (401, '{"error": {"message": "no such key"}}', "no such key"),
        (200, 'data: {"choices": [{"delta": {"content": ""}}]}\n\n', "The connection ended before"),
    ):
        page.route(chats, partial(answer_with, status, body))
        question.fill("Tom has 12 apples. \u4f60\u597d \U0001f34e")
        page.locator("#send").click()
        page.wait_for_function("() => document.getElementById('error').textContent")
        assert told in error.inner_text(), error.inner_text()
        assert "\U0001f34e" in question.input_value(), "the question is lost"
        page.unroute(chats)
    page.route(chats, lambda route: route.abort())
    page.locator("#send").click()
    page.wait_for_function("() => document.getElementById('error').textContent.includes('does not answer')")
    page.unroute(chats)
    held = list[Any]()
    page.route(chats, lambda route: held.append(route))  # an answer that does not come
    page.locator("#send").click()
    question.fill("another one")
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert len(held) == 1 and question.input_value() == "another one", "two questions at once"
    page.locator("#stop").click()
    page.wait_for_selector("#send:not([disabled])")
    assert page.locator("#turns section").count() == 0 and error.inner_text() == ""
    page.unroute(chats)
    question.fill(draw_test("recall", 0, 1200).prompt + " \U0001f34e\u4f60")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer", timeout=120_000)
    assert "\\xf0" in page.locator(".prompt").inner_text(), "bytes of a character"
    page.locator(".answer").focus()
    page.keyboard.press("End")
    assert page.locator(".overview").is_visible(), "a long prompt has no overview"
    assert page.evaluate(IN_VIEW), "what lights up is out of sight"
    page.context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--axe")
    parser.add_argument("--picture")
    given = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        check(browser, given.url, given.axe, given.picture, "light", 1100)
        check(browser, given.url, given.axe, None, "dark", 390)
        check(browser, given.url, None, None, "light", 390)  # under its own security policy
        check_faults(browser, given.url)
        browser.close()
    print("the page is right: light and dark, wide and narrow, by keys and by pointer")


if __name__ == "__main__":
    main()
