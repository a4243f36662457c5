"""The report in a browser: headless Chromium, as Debian has it (chromium, chromium-driver)."""

import os
import pathlib
import shutil
import time

import pytest
from support import require
from synthetic import kernels, make_run, make_search, planted_loss

from lorax import report
from lorax.report.pages import several_runs

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
).split()
WIDTHS = (390, 1200)
TABLE = "section[aria-labelledby=members] table.sortable"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One for all tests. Without it they are skipped, or fail if LORAX_REQUIRE_PARITY=1."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        missing = "no chromium or chromedriver here: apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("LORAX_REQUIRE_PARITY") == "1" else pytest.skip)(missing)
    webdriver = require("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=driver)
    found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{name: the page of a sweep, of several runs with a search among them}."""
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder / "run", ranks=(2, 4, 8), seeds=(0,), diverged=(2,))
    bare = make_run(folder / "bare", ranks=(1, 4), seeds=(0,), lrs=(1e-3, 2e-3), adapters=False)
    search = make_search(folder / "search", dims=(10, 1000))
    return {
        "sweep": report.write(run, kernels()),
        "several": several_runs.write([bare, search], folder / "compared"),
    }


@pytest.fixture(params=("sweep", "several"))
def page(browser, pages, request):
    """Each page, freshly opened, as on a screen of 1,200 pixels; nothing was logged at its end."""
    fresh(browser, pages[request.param])
    yield browser
    assert browser.get_log("browser") == []


def fresh(browser, page):
    """Opens a page on light ground, as on a screen of 1,200 pixels."""
    set_media(browser)
    set_width(browser, 1200)
    browser.get(page.as_uri())


def set_media(browser, media="screen", scheme="light"):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def set_width(browser, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def until(condition, seconds=60):
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never held"
        time.sleep(0.05)


def opened(browser):
    """Waits until all charts are drawn."""
    all_drawn = "return drawn.size === charts.length && [...drawn.values()].every(Boolean)"
    until(lambda: browser.execute_script(all_drawn))


def figures(browser):
    """(name, width of the drawing, its height on the screen, whether folded) of every figure."""
    opened(browser)
    return browser.execute_script(
        "return [...document.querySelectorAll('figure :is(svg, img)')].map(i => ["
        " i.closest('figure').id, i.naturalWidth ?? Number(i.getAttribute('width')),"
        " i.checkVisibility() ? i.getBoundingClientRect().height : 0,"
        " i.closest('details:not([open])') !== null])"
    )


def test_every_figure_is_there_and_shown(page):
    found = figures(page)
    numbers = page.execute_script("return [...document.querySelectorAll('figcaption b')].length")
    assert numbers == len(found) >= 3
    grids = "grid", "layers"  # as wide as they have layers
    wide = [figure for figure in found if not figure[0].endswith(grids)]
    assert all(width > 300 for _, width, _, _ in wide)
    assert all((height > 50) != folded for _, _, height, folded in found)
    # What is folded opens by the keyboard.
    for summary in page.find_elements("css selector", "summary"):
        summary.send_keys("\ue007")  # Enter
    assert all(height > 50 for _, _, height, _ in figures(page))


def test_print_shows_all_and_hides_what_is_for_the_screen(page):
    opened(page)
    set_media(page, "print")
    page.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    assert all(height > 50 for _, _, height, _ in figures(page))
    seen = "document.querySelector(s)?.checkVisibility()"
    hidden = f"return ['nav', '.skip', '.files', '.scheme'].map(s => {seen})"
    assert page.execute_script(hidden) == [False] * 4
    assert luminance(colours(page, "body")[1]) == 1
    assert page.execute_script("return document.querySelector('tr.folded, .copy') === null") or all(
        page.execute_script(
            "return [...document.querySelectorAll('tr.folded')].map(r => r.checkVisibility())"
        )
    )
    set_media(page)
    page.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    assert page.execute_script(hidden) == [True] * 4
    folded = [folded for *_, folded in figures(page)]
    assert any(folded) or not page.find_elements("css selector", "details figure")


CURVE = "#figure-rank_curve"
DOTS = f"{CURVE} .mark-symbol path[aria-label*='member: ']"


def test_a_mark_says_its_values_under_the_pointer(browser, pages):
    fresh(browser, pages["sweep"])
    opened(browser)
    dot = browser.find_element("css selector", DOTS)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", dot)
    chains = require("selenium.webdriver").ActionChains
    chains(browser).move_to_element(dot).perform()
    tip = browser.find_element("css selector", ".tip")
    assert tip.is_displayed()
    terms, values = (
        [part.text for part in tip.find_elements("tag name", name)] for name in ("dt", "dd")
    )
    said = dict(zip(terms, values, strict=True))
    assert said["rank r of the adapter"] == "2"
    loss = next(value for name, value in said.items() if "loss" in name)
    assert float(loss) == pytest.approx(planted_loss(2, 0), abs=1e-4)
    away = browser.find_element("css selector", f"{CURVE} figcaption")
    chains(browser).move_to_element(away).perform()
    assert not tip.is_displayed()


def test_the_filter_of_members_moves_the_table_and_the_figures(browser, pages):
    fresh(browser, pages["sweep"])
    opened(browser)
    rows = f"{TABLE} tbody tr:not([hidden])"
    count = lambda: [len(browser.find_elements("css selector", part)) for part in (rows, DOTS)]
    assert count() == [3, 2]  # rank 8 diverged
    said = browser.find_element("css selector", ".filtered")
    assert not said.is_displayed()
    choose = "document.querySelector(`.filter input[name='rank'][value='4']`).click()"
    browser.execute_script(choose)
    until(lambda: count() == [1, 1])
    assert said.text.startswith("1 of 3 members are shown")
    browser.execute_script(choose)
    browser.find_element("css selector", ".filter input[data-end='high']").send_keys("0.5")
    until(lambda: count() == [0, 0])
    said.find_element("tag name", "button").click()
    until(lambda: count() == [3, 2])
    assert not said.is_displayed() and browser.get_log("browser") == []


def test_charts_follow_light_and_dark_by_the_switch(browser, pages):
    fresh(browser, pages["sweep"])
    opened(browser)
    label = browser.find_element("css selector", f"{CURVE} .role-axis-title text")
    style = "return getComputedStyle(arguments[0]).fill.match(/[\\d.]+/g).map(Number)"
    assert luminance(browser.execute_script(style, label)) < 0.1
    browser.find_element("css selector", ".scheme").click()
    assert luminance(browser.execute_script(style, label)) > 0.7
    assert luminance(colours(browser, "body")[1]) < 0.05


def test_the_page_is_accessible(page):
    """axe-core finds no serious fault, by light and by dark."""
    script = pathlib.Path(require("axe_core_python").__file__).with_name("axe.min.js").read_text()
    opened(page)
    page.execute_script(script)
    for scheme in ("light", "dark"):
        set_media(page, scheme=scheme)
        found = page.execute_async_script(
            "axe.run(document, {resultTypes: ['violations']}).then(arguments[0])"
        )
        serious = {
            (fault["id"], fault["help"]): fault["nodes"][0]["html"][:200]
            for fault in found["violations"]
            if fault["impact"] in ("serious", "critical")
        }
        assert not serious, (scheme, serious)


def test_a_line_of_contents_is_marked(browser, pages):
    fresh(browser, pages["sweep"])
    browser.find_element("css selector", "nav a[href='#members']").click()
    marked = "nav a[href='#members'][aria-current]"
    until(lambda: browser.find_elements("css selector", marked))
    assert browser.find_element("tag name", "nav").rect["y"] >= 0


def column(browser, n):
    """The sort keys of a column of the member table, from top to bottom."""
    script = f"return [...document.querySelector('{TABLE}').tBodies[0].rows]"
    return browser.execute_script(f"{script}.map(row => row.cells[{n}].dataset.value)")


def test_members_sort_by_click_and_by_key(page):
    header = page.find_elements("css selector", f"{TABLE} thead th")
    names = [th.text.strip() for th in header]
    n = names.index("validation loss")
    button = header[n].find_element("tag name", "button")
    given = column(page, n)

    def numbers():
        values = column(page, n)
        kept = [float(value) for value in values if value]
        assert values[len(kept) :] == [""] * (len(values) - len(kept))  # missing ones are last
        assert sorted(values) == sorted(given)
        return kept

    button.click()
    assert header[n].get_attribute("aria-sort") == "ascending" and numbers() == sorted(numbers())
    button.click()
    assert header[n].get_attribute("aria-sort") == "descending"
    assert numbers() == sorted(numbers(), reverse=True)
    # Another column by the keyboard: Enter, then Space.
    other = header[0].find_element("tag name", "button")
    for key, sort, falling in (("\ue007", "ascending", False), ("\ue00d", "descending", True)):
        other.send_keys(key)
        assert header[0].get_attribute("aria-sort") == sort
        assert header[n].get_attribute("aria-sort") == "none"
        collate = "return arguments[0].toSorted((a, b) => a.localeCompare(b))"
        ordered = page.execute_script(collate, column(page, 0))
        assert column(page, 0) == (ordered[::-1] if falling else ordered)
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_dark_is_dark_and_readable(page):
    assert luminance(colours(page, "body")[1]) > 0.9
    set_media(page, scheme="dark")
    assert luminance(colours(page, "body")[1]) < 0.05
    for scheme in ("dark", "light"):
        set_media(page, scheme=scheme)
        for selector in ("body", ".aid", "figcaption", "nav a", "td", "caption", ".answer strong"):
            assert contrast(*colours(page, selector)) >= 4.5, (scheme, selector)


def colours(browser, selector):
    """Text and what it stands on, as the browser computes them: (r, g, b) each."""
    script = """
        const parts = (text) => text.match(/[\\d.]+/g).map(Number);
        let part = document.querySelector(arguments[0]);
        const text = parts(getComputedStyle(part).color);
        for (; part; part = part.parentElement) {
            const ground = parts(getComputedStyle(part).backgroundColor);
            if (ground.length === 3 || ground[3] > 0) return [text, ground];
        }
        return [text, [255, 255, 255]];"""
    return browser.execute_script(script, selector)


def luminance(colour):
    """WCAG 2.2's relative luminance of an sRGB colour, 0 to 1."""
    parts = [c / 255 for c in colour[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_nothing_is_wider_than_the_screen(page):
    for width in WIDTHS:
        set_width(page, width)
        opened(page)
        room = page.execute_script(
            "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
        )
        assert room[0] <= room[1] <= width, (width, room)


def test_links_have_their_targets(page, pages):
    script = "return [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"
    links = page.execute_script(script)
    inside = [link[1:] for link in links if link.startswith("#")]
    assert len(inside) > 4 and all(page.find_elements("id", name) for name in inside)
    folder = next(p for p in pages.values() if p.as_uri() == page.current_url).parent
    files = [link for link in links if not link.startswith(("#", "https:"))]
    assert len(files) >= 3 and all((folder / link).stat().st_size for link in files)


def test_the_keyboard_skips_to_the_content(page):
    page.find_element("tag name", "body").send_keys("\ue004")  # Tab
    skip = page.switch_to.active_element
    assert skip.get_attribute("href").endswith("#content") and skip.rect["x"] >= 0
    skip.send_keys("\ue007")
    assert page.execute_script("return document.activeElement.id") == "content"
