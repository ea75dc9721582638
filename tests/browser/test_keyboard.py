"""Without a mouse: everything is reached by Tab, the focus is seen and is never lost."""

import pytest
from playwright.sync_api import expect

from live_page import KEY, wait_until

FOCUSED = "document.activeElement.id || document.activeElement.textContent.trim()"
OUTLINE = "getComputedStyle(document.activeElement).outlineStyle"


@pytest.fixture(scope="module")
def page(open_page):
    with open_page() as opened:
        yield opened


def tab_to(page, name, key="Tab", most=60):
    """Presses Tab until an element has the focus; returns what had it on the way."""
    passed = []
    for _ in range(most):
        page.keyboard.press(key)
        passed.append(page.evaluate(FOCUSED))
        if passed[-1] == name:
            assert page.evaluate(OUTLINE) != "none"
            return passed
    raise AssertionError(f"{name} is not reached by {key}: {passed}")


@pytest.mark.vllm
def test_the_clip_is_played_and_asked_about_by_keys_alone(page):
    expect(page.locator("#suggestions button")).to_have_count(2)
    tab_to(page, "Play the sample clip")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_visible()
    # What was pressed is gone; the focus stays near it.
    assert page.evaluate(FOCUSED) != ""
    tab_to(page, "key")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("html")).to_have_attribute("data-phase", "live")
    page.wait_for_selector("#captions li")
    tab_to(page, "Read the digits.")
    page.keyboard.press("Space")
    expect(page.locator("#captions li.question")).to_have_count(1)
    tab_to(page, "question")
    page.keyboard.type("How many digits are there?")
    expect(page.locator("#ask")).to_be_enabled()
    page.keyboard.press("Enter")
    expect(page.locator("#captions li.question")).to_have_count(2)


@pytest.mark.vllm
def test_the_list_is_one_stop_and_the_arrows_go_through_it(page):
    wait_until(page, "captions.querySelectorAll('li').length >= 3")
    stops = page.evaluate("[...captions.querySelectorAll('button')].filter((button) => button.tabIndex === 0).length")
    assert stops == 1
    page.locator("#captions button").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("[...captions.querySelectorAll('button')].indexOf(document.activeElement)") == 2
    page.keyboard.press("Home")
    assert page.evaluate("[...captions.querySelectorAll('button')].indexOf(document.activeElement)") == 0
