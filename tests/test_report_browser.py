"""Reports in a browser, at the widths of a desktop and a phone, in light and dark; skipped where there is none.

    pip install playwright && pytest -m slow tests/test_report_browser.py

It needs a Chromium: Playwright's own, or that of the system.
"""

import shutil

import pytest
from records import made_up_events, made_up_run, write_record
from test_report_page import AFTER, BEFORE, HOSTILE, answers, evaluated_run

from trl_grpo_ext.report.page import write_report
from trl_grpo_ext.report.record import read_record


pytestmark = pytest.mark.slow
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    system = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=system, args=["--no-sandbox", "--disable-gpu"])
        except api.Error as error:
            pytest.skip(f"there is no Chromium: {str(error).splitlines()[0]}")
        yield found
        found.close()


def demo(folder):
    stages = {0: answers(BEFORE), 20: answers(BEFORE), 40: answers(AFTER)}
    return [evaluated_run(folder / "demo", stages)]


def comparison(folder):
    return [*demo(folder), read_record(write_record(folder / ("a-name-without-any-space-that-is-long" * 3), seed=1))]


def sick(folder):
    run = made_up_run(steps=12)
    for step in run.steps:
        step.metrics["completions/clipped_ratio"] = 1.0
    return [run]


def hostile(folder):
    events = made_up_events(8)
    texts = list(HOSTILE.values())
    for event in events:
        for number, sample in enumerate(event.get("samples", ())):
            text = texts[number % len(texts)]
            sample |= {"completion": text, "prompt": text, "reference": text, "chars": len(text)}
    write_record(folder / "hostile", [*events[:-1]])
    return [read_record(folder / "hostile")]


def begun(folder):
    return [made_up_run(made_up_events(0)[:1])]


@pytest.mark.parametrize("make", [demo, comparison, sick, hostile, begun], ids=lambda make: make.__name__)
def test_pages_fit_and_are_without_errors(tmp_path, browser, make):
    file = write_report(make(tmp_path), tmp_path / "report.html")
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            noise = []
            page.on("console", lambda message, noise=noise: noise.append(message.text))
            page.on("pageerror", lambda error, noise=noise: noise.append(str(error)))
            page.on("request", lambda request, noise=noise: noise.append(request.url))
            page.goto(file.as_uri())
            page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, scheme)
            assert [text for text in noise if not text.startswith(("file:", "data:"))] == []
            assert page.title().endswith("run report")
            page.close()


def test_completions_are_filtered(tmp_path, browser):
    file = write_report(demo(tmp_path), tmp_path / "report.html")
    page = browser.new_page()
    page.goto(file.as_uri())
    everything = page.locator(".completion:visible").count()
    assert page.locator(".filters").is_visible()
    page.get_by_role("button", name="wrong").click()
    wrong = page.locator(".completion:visible").count()
    assert 0 < wrong < everything
    assert page.locator('.completion[data-kinds~="right"]:visible').count() == 0
    page.get_by_role("button", name="cut off").click()
    assert page.locator(".problem:visible").count() == 0
    page.get_by_role("button", name="all").click()
    assert page.locator(".completion:visible").count() == everything
    page.close()
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator(".completion:visible").count() == everything
    assert not page.locator(".filters").is_visible()
    context.close()


def test_colours_are_readable_and_print_is_light(tmp_path, browser):
    """Contrast of all text colours with the page, WCAG AA, in light and dark; prints are light in both."""
    file = write_report(sick(tmp_path), tmp_path / "report.html")
    script = """names => {
      const style = getComputedStyle(document.documentElement);
      const read = name => style.getPropertyValue(name).trim();
      return names.map(read);
    }"""
    texts = ["--ink", "--soft", "--right", "--wrong", "--cutoff", "--c1", "--c4"]

    def luminance(colour):
        digits = colour.lstrip("#")
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        parts = [int(digits[spot : spot + 2], 16) / 255 for spot in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    papers = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(file.as_uri())
        for paper in page.evaluate(script, ["--paper", "--panel"]):
            for name, colour in zip(texts, page.evaluate(script, texts), strict=True):
                low, high = sorted((luminance(colour), luminance(paper)))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, name, paper)
        papers[scheme] = page.evaluate(script, ["--paper"])
        page.emulate_media(media="print")
        assert luminance(page.evaluate(script, ["--paper"])[0]) > 0.9
        page.close()
    assert luminance(papers["dark"][0]) < 0.05
