"""The report of a run in a browser: Chromium without a window, by selenium."""

import io
import itertools
import json
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from render_tiles import LABS, render_tile
from synthetic import make_slide, save, tissue
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform.cli.main import main
from stainnorm_transform.folders import report

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --force-prefers-reduced-motion --window-size=1400,1000"
)
# Of WCAG 2.1: text, and edges of controls.
CONTRAST = 4.5
# The colors of all elements that have text of their own, and of what they lie on.
TEXT_COLORS = """
    const solid = (color) => !/rgba\\(.*, 0(\\.[0-7]\\d*)?\\)$/.test(color) && color !== "transparent";
    return [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
        && !element.closest("script, svg")
        && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())).map((element) => {
      let below = element;
      while (below && !solid(getComputedStyle(below).backgroundColor)) below = below.parentElement;
      const ground = below ? getComputedStyle(below).backgroundColor : "rgb(255, 255, 255)";
      return [element.textContent.slice(0, 40), getComputedStyle(element).color, ground];
    });
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = shutil.which("chromedriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium or not driver:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    for switch in SWITCHES.split():
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of two folders of images, a slide, an image without tissue, and one that is damaged."""
    root = tmp_path_factory.mktemp("report")
    for number in range(8):
        save(root / f"in/near/{number}.png", to_pil_image(render_tile(number, 128, LABS["lab_a"])))
    save(root / "in/near/other.png", to_pil_image(render_tile(8, 128, LABS["lab_b"])))
    make_slide(root / "in/a.svs", tissue(512, 900))
    glass = np.random.default_rng(0).normal(240, 2, (200, 300, 3)).clip(0, 255).astype(np.uint8)
    save(root / "in/glass.png", Image.fromarray(glass))
    (root / "in/<img src=x onerror=alert(1)>.png").write_bytes(b"")
    arguments = ["normalize", str(root / "in"), "--out", str(root / "out"), "--report", "--device", "cpu"]
    assert main(arguments) == 1
    return root / "out"


@pytest.fixture
def page(browser, folder):
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get((folder / "report.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []


def shown(page, selector):
    return [element.text for element in page.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]


def names(page):
    return [name.replace("\n", "") for name in shown(page, "tbody th")]


def column(page, number):
    return shown(page, f"tbody tr > :nth-child({number})")


def key(page, *keys):
    page.switch_to.active_element.send_keys(*keys)


def wait(condition):
    """Until it holds: what it returned last. There is no need to be quick."""
    end = time.monotonic() + 60
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def mean_color(element):
    """Of the middle of an element on the screen, above its labels."""
    picture = np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB"), float)
    height, width = picture.shape[:2]
    return picture[height // 8 : height // 2 - 20, width // 8 : -width // 8].mean((0, 1))


def test_it_shows_every_file_with_its_flags(page):
    assert page.title == page.find_element(By.TAG_NAME, "h1").text == "Stain normalization report"
    assert len(names(page)) == len(shown(page, ".card h3")) == 12
    flags = dict(zip(names(page), column(page, 2), strict=True))
    found = {name: text.split("\n")[0] for name, text in flags.items() if text}
    assert found == {
        "<img src=x onerror=alert(1)>.png": "failed",
        "a.svs": "few tiles",
        "glass.png": "no tissue",
        "near/other.png": "far",
    }
    assert "cannot identify" in flags["<img src=x onerror=alert(1)>.png"]
    assert shown(page, "#flags .flag") == ["failed", "no tissue", "few tiles", "far"]
    assert "11 of 12 normalized" in page.find_element(By.ID, "facts").text


def test_arrow_keys_move_the_slider_from_before_to_after(page, folder):
    card = page.find_element(By.ID, f"file-{names(page).index('near/other.png')}")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", card)
    slider, pair = card.find_element(By.TAG_NAME, "input"), card.find_element(By.CLASS_NAME, "pair")
    loaded = "return [...arguments[0].querySelectorAll('img')].every((image) => image.complete && image.naturalWidth)"
    assert wait(lambda: page.execute_script(loaded, card))
    seen = {}
    for pressed, value in ((Keys.HOME, 0), (Keys.END, 100)):
        slider.send_keys(pressed)
        assert slider.get_property("value") == str(value)
        assert slider.get_attribute("aria-valuetext") == f"left {value} % before, the rest after"
        page.execute_script("document.activeElement.blur()")
        seen[value] = mean_color(pair)
    for value, path in ((100, folder.parent / "in/near/other.png"), (0, folder / "near/other.png")):
        expected = np.asarray(Image.open(path).convert("RGB"), float)
        height, width = expected.shape[:2]
        expected = expected[height // 8 : height // 2, width // 8 : -width // 8].mean((0, 1))
        assert np.abs(seen[value] - expected).max() < 4
    assert np.abs(seen[0] - seen[100]).max() > 10
    slider.send_keys(Keys.ARROW_LEFT * 3)
    assert slider.get_property("value") == "97"
    # A click moves it there, and one slider moves those of all pictures.
    webdriver.ActionChains(page).move_to_element_with_offset(pair, -pair.size["width"] // 4, 0).click().perform()
    assert abs(int(slider.get_property("value")) - 25) <= 2
    page.find_element(By.ID, "divide").send_keys(Keys.HOME)
    sliders = page.find_elements(By.CSS_SELECTOR, ".pair input")
    assert {each.get_property("value") for each in sliders} == {"0"}
    clip = "return getComputedStyle(arguments[0].querySelector('.before')).clipPath"
    assert page.execute_script(clip, card) == "inset(0px 100% 0px 0px)"


def test_the_table_sorts_by_clicks_and_keys(page):
    def numbers():
        texts = [text.replace("\u2212", "-") for text in column(page, 4)]
        return [float(text) for text in texts if text != "\u2013"], texts

    head = page.find_element(By.CSS_SELECTOR, "thead th:nth-child(4)")
    button = head.find_element(By.TAG_NAME, "button")
    assert head.get_attribute("aria-sort") is None
    button.click()
    found, texts = numbers()
    assert found == sorted(found)
    assert len(set(found)) > 5
    assert texts[-1] == "\u2013"
    assert head.get_attribute("aria-sort") == "ascending"
    assert [name.replace("\n", "") for name in shown(page, ".card h3")] == names(page)
    button.send_keys(Keys.ENTER)
    found, texts = numbers()
    assert found == sorted(found, reverse=True)
    assert texts[-1] == "\u2013"
    assert head.get_attribute("aria-sort") == "descending"
    flags = page.find_element(By.CSS_SELECTOR, "thead th:nth-child(2)")
    flags.find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert head.get_attribute("aria-sort") is None
    assert [text.split("\n")[0] for text in column(page, 2)[:5]] == ["failed", "no tissue", "few tiles", "far", ""]


def test_the_filter_shows_fewer(page):
    page.find_element(By.ID, "flagged").click()
    assert len(names(page)) == len(shown(page, ".card h3")) == 4
    assert page.find_element(By.ID, "status").text == "4 of 12 files shown"
    assert len([dot for dot in page.find_elements(By.CSS_SELECTOR, "#plot a") if dot.is_displayed()]) == 2
    text = page.find_element(By.ID, "text")
    text.send_keys("OTHER")
    assert names(page) == ["near/other.png"]
    page.find_element(By.ID, "flagged").click()
    text.clear()
    text.send_keys("near/")
    assert len(names(page)) == 9
    text.clear()
    text.send_keys("cannot identify")
    assert names(page) == ["<img src=x onerror=alert(1)>.png"]
    text.send_keys(" x")
    assert names(page) == []


def test_a_dot_opens_its_file(page):
    index = names(page).index("near/other.png")
    dots = page.find_elements(By.CSS_SELECTOR, "#plot a")
    assert len(dots) == 10  # not of the file that failed, nor of the one without tissue
    dot = page.find_element(By.CSS_SELECTOR, f"#plot a[data-file='{index}']")
    assert dot.accessible_name.startswith("near/other.png, taken away: a* ")
    assert dot.accessible_name.endswith(", far")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", dot)
    dot.click()
    opened = "Before and after: near/other.png"
    assert wait(lambda: page.switch_to.active_element.accessible_name == opened)
    assert page.current_url.endswith(f"#file-{index}")
    card = page.find_element(By.ID, f"file-{index}")
    assert card.get_attribute("aria-current") == "true"
    top = page.execute_script("return arguments[0].getBoundingClientRect().top", card)
    assert 0 <= top < 900
    # By keyboard: Tab leads to one dot, arrow keys to its neighbors, Enter opens.
    start = page.find_elements(By.CSS_SELECTOR, "#plot a[tabindex='0']")
    assert len(start) == 1
    page.execute_script("arguments[0].focus()", start[0])
    key(page, Keys.ARROW_RIGHT * 12)
    right = page.switch_to.active_element
    places = [float(each.find_element(By.CLASS_NAME, "dot").get_attribute("cx")) for each in dots]
    assert float(right.find_element(By.CLASS_NAME, "dot").get_attribute("cx")) == max(places)
    name = right.accessible_name.split(",")[0]
    key(page, Keys.ENTER)
    assert wait(lambda: page.switch_to.active_element.accessible_name == f"Before and after: {name}")
    # A file without pictures opens as well. What has the focus is not below the controls, which stay on top.
    link = page.find_element(By.LINK_TEXT, "<img src=x onerror=alert(1)>.png")
    page.execute_script("arguments[0].focus()", link)
    bottom, top = (
        page.execute_script(f"return arguments[0].getBoundingClientRect().{edge}", element)
        for edge, element in (("bottom", page.find_element(By.ID, "controls")), ("top", link))
    )
    assert bottom <= top
    key(page, Keys.ENTER)
    assert wait(lambda: page.switch_to.active_element.tag_name == "h3")


def test_it_asks_for_nothing(page):
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert sum(url.endswith("/out/report.html") for url in urls) == 1
    assert {url.split(":")[0] for url in urls} <= {"file", "data", "about"}
    assert len([url for url in urls if url.startswith("file:")]) == 1
    blocked = """
        const done = arguments[0];
        addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        const image = new Image(); image.src = "https://example.org/a.png";
    """
    assert page.execute_async_script(blocked) == "img-src"
    assert "violates" in page.get_log("browser")[0]["message"]


def test_a_screen_reader_finds_names_headings_and_tables(page):
    assert page.execute_script("return document.documentElement.lang") == "en"
    tree = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    roles = {role for role, _ in nodes}
    controls = {"button", "link", "slider", "checkbox", "searchbox", "image", "region", "article", "group", "search"}
    assert controls <= roles
    assert [role for role, name in nodes if role in controls and not name.strip()] == []
    assert {"banner", "main", "contentinfo", "status", "table", "rowheader", "columnheader"} <= roles
    assert sum(role == "rowheader" for role, _ in nodes) == 12
    heads = page.find_elements(By.CSS_SELECTOR, "h1, h2, h3")
    levels = [int(head.tag_name[1]) for head in heads if head.is_displayed()]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(b - a for a, b in itertools.pairwise(levels)) == 1
    ids = page.execute_script("return [...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))
    referred = page.execute_script(
        "return [...document.querySelectorAll('[aria-labelledby], [aria-describedby]')]"
        ".flatMap((e) => [e.getAttribute('aria-labelledby'), e.getAttribute('aria-describedby')]).filter(Boolean)"
    )
    assert set(referred) <= set(ids)


def test_text_has_contrast(page):
    def luminance(color):
        values = np.array([float(value) for value in color[color.index("(") + 1 : -1].split(",")[:3]]) / 255
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    found = page.execute_script(TEXT_COLORS)
    assert len(found) > 100
    for text, color, ground in found:
        low, high = sorted(luminance(each) + 0.05 for each in (color, ground))
        assert high / low >= CONTRAST, (text, color, ground)


def test_it_fits_a_narrow_screen_and_paper(page):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.execute_script("return document.documentElement.scrollWidth") == 400
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    pair = page.find_element(By.CSS_SELECTOR, "#file-1 .pair")
    before, after = (pair.find_element(By.CLASS_NAME, name).rect for name in ("before", "after"))
    clip = page.execute_script("return getComputedStyle(arguments[0].querySelector('.before')).clipPath", pair)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert clip == "none"
    assert before["x"] + before["width"] <= after["x"]
    assert not [image for image in page.find_elements(By.TAG_NAME, "img") if not image.get_attribute("src")]


@pytest.mark.slow
def test_two_thousand_files(browser, tmp_path, run, monkeypatch):
    """Only pictures in view are decoded, and others are let go."""
    small = to_pil_image(render_tile(size=48))
    monkeypatch.setattr(report, "picture", lambda path: small)
    for number in range(2000):
        os.makedirs(tmp_path / "in", exist_ok=True)
        if number < 5:
            save(tmp_path / f"in/{number:04}.png", to_pil_image(render_tile(number, 64)))
        else:
            os.link(tmp_path / f"in/{number % 5:04}.png", tmp_path / f"in/{number:04}.png")
    assert run(tmp_path / "in", options=["--report", "--offset=3,4"]) == 0
    browser.get((tmp_path / "out/report.html").as_uri())
    decoded = "return document.querySelectorAll('img[src]').length"
    browser.execute_script("document.getElementById('cards').scrollIntoView()")
    assert wait(lambda: 0 < browser.execute_script(decoded) < 200)
    browser.find_element(By.ID, "text").send_keys("1777")
    assert names(browser) == ["1777.png"]
    browser.find_element(By.ID, "text").send_keys(Keys.BACKSPACE * 4)
    browser.find_element(By.LINK_TEXT, "0003.png").send_keys(Keys.ENTER)
    assert wait(lambda: browser.switch_to.active_element.accessible_name == "Before and after: 0003.png")
    browser.execute_script("document.getElementById('file-1999').scrollIntoView()")
    assert wait(lambda: browser.execute_script("return document.querySelector('#file-1999 img').hasAttribute('src')"))
    assert wait(lambda: not browser.execute_script("return document.querySelector('#file-3 img').hasAttribute('src')"))
    assert browser.execute_script(decoded) < 200
    assert browser.get_log("browser") == []
