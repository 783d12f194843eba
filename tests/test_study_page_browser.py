"""The study page in a real browser: what is drawn is what was judged, pixel for pixel."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from tests.needs import needs_chromium
from tests.peers import free_port
from tests.study_page import Judged, judged_phantom
from tests.web_studies import Ward, configured
from triage.web.app import serve
from triage.web.viewer import BUNDLE

pytestmark = needs_chromium

needs_bundle = pytest.mark.skipif(not BUNDLE.is_file(), reason="needs the 3D view: deploy/install builds it")
LUNG, MEDIASTINUM, BONE = (1500, -600), (400, 40), (2000, 300)
BLUE, ORANGE = (86, 196, 255), (255, 146, 40)


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in (
        *("--headless=new", "--no-sandbox", "--window-size=1280,1000", "--force-device-scale-factor=1"),
        *("--use-angle=swiftshader", "--enable-unsafe-swiftshader"),  # 3D without a graphics card
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
    yield browser
    browser.quit()


class Screen:
    """The page of one study, and what its canvases show."""

    def __init__(self, browser: webdriver.Chrome, address: str, study: Judged) -> None:
        self.browser, self.study = browser, study
        self.address = f"{address}/studies/{study.uid}"
        browser.get(self.address)
        self.until(lambda: self.place() is not None)

    def run(self, script: str, *values: Any) -> Any:
        return self.browser.execute_script(script, *values)

    def until(self, holds: Callable[[], Any]) -> None:
        WebDriverWait(self.browser, 20, poll_frequency=0.05).until(lambda _: holds())

    def place(self) -> int | None:
        """Of the image that is drawn, masks and all."""
        told = self.run("return document.querySelector('ct-viewer').dataset.place ?? ''")
        return int(told) if told else None

    def at(self, place: int) -> None:
        self.until(lambda: self.place() == place)

    def says(self, what: str) -> str:
        return str(self.run(f"return document.querySelector('ct-viewer .{what}').textContent"))

    def pixels(self, canvas: str) -> NDArray[np.uint8]:
        """RGBA, (rows, columns, 4)."""
        width, height, coded = self.run(
            """const canvas = document.querySelector(`ct-viewer canvas.${arguments[0]}`);
            const {width, height} = canvas;
            const {data} = canvas.getContext("2d").getImageData(0, 0, width, height), step = 8192;
            let text = "";
            for (let n = 0; n < data.length; n += step)
                text += String.fromCharCode(...data.subarray(n, n + step));
            return [width, height, btoa(text)];""",
            canvas,
        )
        return np.frombuffer(base64.b64decode(coded), np.uint8).reshape(height, width, 4)

    def keys(self, *keys: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, "ct-viewer .screen").send_keys(*keys)

    def label(self, text: str) -> Any:
        return self.browser.find_element(By.XPATH, f"//ct-viewer//label[normalize-space()='{text}']//input")

    def k(self) -> int:
        """Place in the series of the image that is shown."""
        place = self.place()
        assert place is not None
        return self.study.in_viewer_order[place]


def windowed(hu: NDArray[np.int16], window: tuple[int, int]) -> NDArray[np.uint8]:
    """The linear VOI LUT function (DICOM PS3.3 C.11.2.1.2) onto 0 to 255, rounded half up."""
    width, centre = window
    grey = ((hu - (centre - 0.5)) / (width - 1) + 0.5) * 255
    return np.clip(np.floor(grey + 0.5), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory, chromium: webdriver.Chrome) -> Iterator[Screen]:
    folder = tmp_path_factory.mktemp("screen")
    ward = Ward(configured(folder, port=free_port(), refresh_seconds=1))
    settings = {"rows": 128, "slices": 24, "slice_spacing": 8.0}
    study = judged_phantom(ward, seed=5, classes=True, boxes=True, **settings)
    stop = threading.Event()
    server = threading.Thread(target=serve, args=(ward.database, ward.config, ward.clock, stop))
    server.start()
    while server.is_alive():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", ward.config.web.port)):
            break
    try:
        yield Screen(chromium, f"http://127.0.0.1:{ward.config.web.port}", study)
        chromium.get("about:blank")
    finally:
        stop.set()
        server.join(20)
        ward.database.close()


def test_it_opens_where_most_lesion_is(screen: Screen) -> None:
    most = int(np.argmax([screen.study.lesions[k].sum() for k in screen.study.in_viewer_order]))
    screen.at(most)
    assert screen.study.series.instances[screen.k()].instance_number == most + 1
    assert screen.says("where") == f"Image {most + 1} of 24"
    assert [screen.says(f"edge-{edge}") for edge in ("left", "right", "top", "bottom")] == [
        "R",
        "L",
        "A",
        "P",
    ]


def test_greys_are_those_of_the_window(screen: Screen) -> None:
    hu = screen.study.volume.array[screen.k()]
    for name, window in (("Mediastinum", MEDIASTINUM), ("Bone", BONE), ("Lung", LUNG)):
        screen.label(name).click()
        shown = screen.pixels("image")
        assert np.array_equal(shown, np.dstack([windowed(hu, window)] * 3 + [np.full(hu.shape, 255)])), name
        assert screen.says("windowed") == f"W {window[0]}  L {window[1]}"


def test_a_drag_sets_the_window(screen: Screen) -> None:
    middle = screen.browser.find_element(By.CSS_SELECTOR, "ct-viewer .screen")
    ActionChains(screen.browser).drag_and_drop_by_offset(middle, 40, -30).perform()
    width, centre = (int(part) for part in screen.says("windowed").replace("W ", "").split("  L "))
    assert width > LUNG[0] + 100
    assert centre < LUNG[1] - 50
    hu = screen.study.volume.array[screen.k()]
    assert np.array_equal(screen.pixels("image")[..., 0], windowed(hu, (width, centre)))
    assert not screen.label("Lung").is_selected()
    screen.keys("1")
    assert screen.label("Lung").is_selected()


def test_overlays_are_the_masks(screen: Screen) -> None:
    screen.label("Boxes with scores").click()
    screen.label("Fill").click()
    lesions = screen.study.lesions[screen.k()]
    columns = np.arange(lesions.shape[1]) >= lesions.shape[1] // 2
    ground_glass, consolidation = lesions & ~columns, lesions & columns
    shown = screen.pixels("overlay")
    assert np.array_equal(shown[..., 3] > 0, lesions)
    assert np.allclose(shown[ground_glass][:, :3], BLUE, atol=3)
    assert np.allclose(shown[consolidation][:, :3], ORANGE, atol=3)
    assert set(shown[lesions][:, 3]) == {153}, "60 % opaque"
    screen.label("Consolidation").click()
    assert np.array_equal(screen.pixels("overlay")[..., 3] > 0, ground_glass)
    screen.label("Right lung").click()
    right = screen.study.lungs[screen.k()] & ~columns
    assert np.array_equal(screen.pixels("overlay")[..., 3] > 0, ground_glass | right)
    screen.label("Right lung").click()
    screen.label("Consolidation").click()


def test_contours_run_along_the_inside_of_the_border(screen: Screen) -> None:
    screen.label("Contour").click()
    lesions = screen.study.lesions[screen.k()]
    half = lesions.shape[1] // 2
    wanted = np.zeros_like(lesions)
    for part in (slice(0, half), slice(half, None)):
        mask = np.zeros_like(lesions)
        mask[:, part] = lesions[:, part]
        around = np.pad(mask, 1)
        inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
        wanted |= mask & ~inner
    assert np.array_equal(screen.pixels("overlay")[..., 3] > 0, wanted)
    screen.keys("o")
    assert not screen.pixels("overlay").any()
    screen.keys("o")
    screen.label("Right lung").click()
    screen.label("Left lung").click()
    assert screen.label("Boxes with scores").is_selected()
    yellow = (screen.pixels("overlay")[..., :3] == (255, 225, 77)).all(axis=2)
    top, left, bottom, right = screen.study.answer.boxes[0].box
    assert yellow[top - 1, left:right].mean() > 0.9
    assert yellow[top:bottom, right].mean() > 0.9


def test_the_bar_leads_to_an_image(screen: Screen) -> None:
    bar = screen.browser.find_element(By.CSS_SELECTOR, ".lesion-bar")
    height = bar.size["height"]
    for place in (2, 20):
        offset = round((place + 0.5) / 24 * height - height / 2)
        ActionChains(screen.browser).move_to_element_with_offset(bar, 0, offset).click().perform()
        screen.at(place)
        assert bar.get_attribute("aria-valuenow") == str(place + 1)
        hu = screen.study.volume.array[screen.k()]
        assert np.array_equal(screen.pixels("image")[..., 0], windowed(hu, LUNG))
    marks = screen.run(
        """const canvas = document.querySelector(".lesion-bar canvas"), wide = [...Array(100).keys()];
        const {data} = canvas.getContext("2d").getImageData(0, 0, 100, 24), filled = at => data[4 * at + 3];
        return [...Array(24).keys()].map(row => wide.filter(column => filled(100 * row + column)).length);"""
    )
    areas = [screen.study.lesions[k].sum() for k in screen.study.in_viewer_order]
    assert int(np.argmax(marks)) == int(np.argmax(areas))
    assert [mark > 0 for mark in marks] == [bool(area) for area in areas]


def test_the_whole_way_by_keys_and_wheel(screen: Screen) -> None:
    screen.keys(Keys.HOME)
    screen.at(0)
    screen.keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.PAGE_DOWN)
    screen.at(12)
    screen.keys(Keys.END)
    screen.at(23)
    screen.keys(Keys.ARROW_DOWN)
    screen.at(23)
    marked = [place for place, k in enumerate(screen.study.in_viewer_order) if screen.study.lesions[k].any()]
    screen.keys(Keys.HOME)
    screen.at(0)
    screen.keys("n")
    screen.at(next(place for place in marked if place > 0))
    screen.run(
        """document.querySelector("ct-viewer .screen").dispatchEvent(
            new WheelEvent("wheel", {deltaY: 120, bubbles: true, cancelable: true}))"""
    )
    screen.at(next(place for place in marked if place > 0) + 1)


def test_the_page_renews_itself_and_the_viewer_stays(screen: Screen) -> None:
    screen.keys(Keys.HOME)
    screen.at(0)
    screen.run(
        "document.querySelector('ct-viewer').mine = true; document.querySelector('.why').textContent = 'old'"
    )
    ward_note = "return document.querySelector('.why').textContent !== 'old'"
    screen.run(
        """import("/static/merge.js").then(async ({merge}) => {
            const text = await (await fetch(location.href)).text();
            const page = new DOMParser().parseFromString(text, "text/html");
            merge(document.getElementById("live"), page.getElementById("live"));
        })"""
    )
    screen.until(lambda: screen.run(ward_note))
    assert screen.run("return document.querySelector('ct-viewer').mine") is True
    assert screen.place() == 0


@needs_bundle
def test_lungs_and_infection_in_3d(screen: Screen) -> None:
    button = screen.browser.find_element(By.XPATH, "//ct-viewer//button[text()='3D view']")
    button.click()
    screen.until(lambda: screen.run("return document.querySelector('.space').dataset.shown !== undefined"))
    drawn = """
        const canvas = document.querySelector(".space canvas");
        document.querySelector(".space").dispatchEvent(new KeyboardEvent("keydown", {key: arguments[0]}));
        const copy = Object.assign(document.createElement("canvas"), {width: 200, height: 150});
        const context = copy.getContext("2d");
        context.drawImage(canvas, 0, 0, 200, 150);
        const {data} = context.getImageData(0, 0, 200, 150);
        let red = 0;
        for (let n = 0; n < data.length; n += 4) red += data[n] > 1.4 * data[n + 1] && data[n] > 90;
        return red;
    """
    front, turned = screen.run(drawn, "Home"), screen.run(drawn, "ArrowLeft")
    assert front > 50
    assert turned > 50
    assert button.get_attribute("aria-expanded") == "true"
    button.click()
    assert not screen.browser.find_element(By.CSS_SELECTOR, ".space").is_displayed()


def test_without_the_bundle_the_page_says_so(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("triage.web.viewer.BUNDLE", tmp_path / "none.js")
    page = Screen(screen.browser, screen.address.partition("/studies/")[0], screen.study)
    page.browser.find_element(By.XPATH, "//ct-viewer//button[text()='3D view']").click()
    page.until(lambda: "not part of this installation" in page.says("space"))
    assert "deploy/install" in page.says("space")


@pytest.mark.parametrize(("width", "height"), [(500, 900), (1280, 900), (1280, 2000), (1900, 700)])
def test_nothing_sticks_out(screen: Screen, width: int, height: int) -> None:
    screen.browser.set_window_size(width, height)
    page = Screen(screen.browser, screen.address.partition("/studies/")[0], screen.study)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    film, room = page.run(
        """return [".film", ".screen"].map(one => {
            const {left, right, top, bottom} = document.querySelector(one).getBoundingClientRect();
            return [left, right, top, bottom];
        })"""
    )
    assert film[1] - film[0] == pytest.approx(film[3] - film[2], abs=0.1)
    assert film[0] >= room[0] - 0.1
    assert film[1] <= room[1] + 0.1
    assert film[2] >= room[2] - 0.1
    assert film[3] <= room[3] + 0.1
    screen.browser.set_window_size(1280, 1000)


def test_the_console_is_silent(screen: Screen) -> None:
    said = [entry["message"] for entry in screen.browser.get_log("browser")]
    assert [one for one in said if "willReadFrequently" not in one] == []  # these tests read what is drawn
