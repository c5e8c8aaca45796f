"""The page of a service, in a real browser: what a visitor drops, and what comes back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtool.serving.models import Models
from tests.serving.conftest import Memory
from tests.serving.served import Served, served

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no chromium and chromedriver on this machine"
)

DROP = """
const [bytes, name] = arguments, given = new DataTransfer();
given.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
document.getElementById("drop").dispatchEvent(
  new DragEvent("drop", { dataTransfer: given, bubbles: true, cancelable: true }));
"""
KEY = "a-key-for-the-page"


@pytest.fixture(scope="module")
def models(memory: Memory) -> Models:
    return memory.models()


@pytest.fixture(scope="module")
def at(models: Models) -> Iterator[Served]:
    with served(models, key=KEY) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(executable_path=str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def seen(browser: webdriver.Chrome, id: str) -> str:
    return str(browser.find_element("id", id).text)


def wait(browser: webdriver.Chrome, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(f"return {script}"))


def test_what_is_dropped_is_predicted(
    at: Served, browser: webdriver.Chrome, memory: Memory, tmp_path: Path
) -> None:
    browser.get(at.url)
    wait(browser, "!document.getElementById('drop').hidden")
    expected = at.send(("a.png", memory.pictures[0]), topk="5").json
    picture = list(memory.pictures[0])
    browser.execute_script(DROP, picture, "dropped.png")
    wait(browser, "document.getElementById('state').textContent.includes('API key')")
    browser.find_element("id", "key").send_keys(KEY)
    browser.execute_script(DROP, picture, "dropped.png")
    found = "!document.getElementById('found').hidden"
    wait(browser, found)
    (one,) = expected["predictions"]
    assert seen(browser, "label") == one["label"]
    assert seen(browser, "by") == expected["version"]
    rows = browser.find_elements("css selector", "#adapters .row")
    assert [row.text.split()[0] for row in rows] == [w["adapter"] for w in one["weights"]]
    assert len(browser.find_elements("css selector", "#classes .row")) == 5
    assert browser.find_element("id", "unlike").is_displayed() is one["unlike"]
    file = tmp_path / "broken <b>.png"
    file.write_bytes(b"no image")
    browser.find_element("id", "file").send_keys(str(file))
    wait(browser, "document.getElementById('state').textContent.includes('not an image')")
    assert not browser.find_element("id", "found").is_displayed()
    assert seen(browser, "hint") == "broken <b>.png"
    # Nothing came from elsewhere, and nothing broke the rules of the page.
    severe = [line for line in browser.get_log("browser") if "401" not in line["message"]]
    assert not [line for line in severe if "422" not in line["message"]], severe
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map((one) => one.name)"
    )
    assert loaded
    assert all(one.startswith((at.url, "blob:", "data:")) for one in loaded), loaded


@pytest.mark.parametrize("width", [1400, 390])
def test_it_fits_the_window(
    at: Served, browser: webdriver.Chrome, memory: Memory, width: int, tmp_path: Path
) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(at.url)
    wait(browser, "!document.getElementById('drop').hidden")
    browser.find_element("id", "key").send_keys(KEY)
    browser.execute_script(DROP, list(memory.pictures[1]), "a-name-" + "x" * 90 + ".png")
    wait(browser, "!document.getElementById('found').hidden")
    page = "document.documentElement"
    assert browser.execute_script(f"return {page}.scrollWidth <= {page}.clientWidth")
    bar = browser.find_element("css selector", "#adapters progress")
    assert bar.size["width"] > 60
    assert browser.save_screenshot(str(tmp_path / f"{width}.png"))
