"""Claims about the report's page in a real browser: Chromium, by `playwright`, without a display."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """On a desktop, by day; whatever the page complains about or asks for fails the test."""
    troubles: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page.on("console", lambda message: troubles.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"script: {error}"))
    page.on("request", lambda request: troubles.append(request.url) if request.url != report.as_uri() else None)
    page.goto(report.as_uri())
    yield page
    page.close()
    assert troubles == []


def unfold(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")


def overflow(page: Page) -> list[str]:
    """What reaches beyond the right edge of the window, and does not scroll within a part of its own."""
    found: list[str] = page.evaluate(
        """[...document.querySelectorAll('body *')]
           .filter(part => part.getClientRects().length && part.getBoundingClientRect().right > innerWidth + 0.5)
           .map(part => part.outerHTML.slice(0, 120))"""
    )
    return found


def test_the_page_opens_without_complaints_and_asks_the_network_for_nothing(page: Page) -> None:
    expect(page.locator("h1")).to_contain_text("seen")
    expect(page.locator("figure")).not_to_have_count(0)
    unfold(page)
    page.mouse.move(300, 500)


def test_the_trouble_that_other_tests_would_fail_on_is_noticed(browser: Browser, report: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled.html"
    injected = "<img src='http://127.0.0.1:9/x.png'><script>document.title = 'ran'</script></body>"
    spoiled.write_text(report.read_text("utf-8").replace("</body>", injected), "utf-8")
    complaints: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(spoiled.as_uri())
    assert page.title() != "ran", "the page's policy lets no script of a model run"
    page.close()
    assert len([complaint for complaint in complaints if "Content Security Policy" in complaint]) == 2


def test_the_pointer_over_a_curve_shows_the_values_of_the_nearest_step(page: Page) -> None:
    plot = page.locator("figure", has_text="Held-out accuracy").locator(".plot")
    tip = plot.locator(".tip")
    expect(tip).to_be_hidden()
    plot.hover(position={"x": 5, "y": 40})
    expect(tip).to_have_text(re.compile(r"step 0\s+greedy  0\.3 \(0\.2 to 0\.4\)"))
    box = plot.bounding_box()
    assert box is not None
    plot.hover(position={"x": box["width"] - 6, "y": 40})
    expect(tip).to_contain_text("step 12")
    page.mouse.move(2, 2)
    expect(tip).to_be_hidden()


def test_curves_and_tokens_can_be_read_with_the_keyboard_alone(page: Page) -> None:
    plot = page.locator("figure", has_text="Held-out accuracy").locator(".plot")
    plot.focus()
    page.keyboard.press("ArrowLeft")
    expect(plot.locator(".tip")).to_contain_text("step 12")
    page.keyboard.press("ArrowLeft")
    expect(plot.locator(".tip")).to_contain_text("step 8")
    page.locator(".tokens").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token-tip")).to_contain_text("token 2 of 120, advantage -0.5, p/q")
    page.keyboard.press("Tab")
    expect(page.locator("#token-tip")).to_be_hidden()


def test_the_pointer_over_a_token_shows_its_numbers(page: Page) -> None:
    tokens = page.locator(".tokens").first
    tokens.locator(".t").nth(2).hover()
    expect(page.locator("#token-tip")).to_contain_text("token 3 of 120, advantage -0.5, p/q")
    tokens.locator(".t.reply").first.hover()
    expect(page.locator("#token-tip")).to_contain_text("written by the environment")


def look(page: Page, token: str) -> tuple[str, str, str]:
    """Background, and the lines that say the same to those who see no colours."""
    names = ("backgroundColor", "boxShadow", "borderBottomStyle")
    script = "(token, names) => names.map(name => getComputedStyle(token)[name])"
    background, line, border = page.locator(token).first.evaluate(script, names)
    return background, line, border


def test_the_toggle_changes_what_colours_mean_and_signs_differ_not_by_colour_alone(page: Page) -> None:
    nothing, more, less = ("rgba(0, 0, 0, 0)", "none", "none"), ".tokens .ap3", ".tokens .am3"
    by_advantage = look(page, more), look(page, less)
    assert by_advantage[0][1] != "none" and by_advantage[0][2] == "none", "a plain line below"
    assert by_advantage[1][1] == "none" and by_advantage[1][2] == "dotted"
    assert by_advantage[0][0] != by_advantage[1][0]
    page.get_by_text("ratio p/q").click()
    assert look(page, ".tokens .ap3:not([class*=q])") == nothing
    likelier, unlikelier = look(page, ".tokens .qp2"), look(page, ".tokens .qm2")
    assert likelier[1] != "none" and unlikelier[2] == "dotted" and likelier[0] != unlikelier[0]
    page.keyboard.press("ArrowRight")  # to "nothing", as radio buttons go
    assert {look(page, more), look(page, less), look(page, ".tokens .qp2")} == {nothing}
    reply = page.locator(".tokens .reply").first.evaluate("token => getComputedStyle(token).fontStyle")
    assert reply == "italic", "the environment's tokens are told apart whatever is coloured"


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_reaches_beyond_the_edge_of_a_phone_a_tablet_or_a_desktop(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    unfold(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert overflow(page) == []
    cut_off = """[...document.querySelectorAll('svg text')].filter(text => {
        const box = text.getBBox(), frame = text.ownerSVGElement.viewBox.baseVal;
        return box.x < 0 || box.y < 0 || box.x + box.width > frame.width || box.y + box.height > frame.height;
    }).map(text => text.textContent)"""
    assert page.evaluate(cut_off) == [], "marks of an axis"


def test_what_is_tapped_on_a_phone_is_large_enough_and_stays_within_it(browser: Browser, report: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(report.as_uri())
    heights = [box["height"] for label in page.locator(".choices label").all() if (box := label.bounding_box())]
    assert len(heights) == 3 and min(heights) >= 32
    page.locator(".tokens .t").nth(4).tap()
    tip = page.locator("#token-tip").bounding_box()
    assert tip is not None and tip["x"] >= 0 and tip["x"] + tip["width"] <= 360, "it stays when the finger is lifted"
    plot = page.locator("figure", has_text="Held-out accuracy").locator(".plot")
    plot.tap()
    expect(page.locator("#token-tip")).to_be_hidden()
    expect(plot.locator(".tip")).to_be_visible()
    context.close()


def test_by_day_and_by_night_the_page_looks_different_and_can_be_read(page: Page) -> None:
    def contrast() -> float:
        ink, paper = (
            [int(part) for part in re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))[:3]]
            for name in ("color", "backgroundColor")
        )
        light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    day, by_day = page.screenshot(), contrast()
    page.emulate_media(color_scheme="dark")
    night, by_night = page.screenshot(), contrast()
    assert day != night
    assert min(by_day, by_night) > 7, "WCAG 2.2, contrast (enhanced)"


def luminance(rgb: list[int]) -> float:
    """Relative luminance of sRGB, WCAG 2.2."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
