"""The study page in a real browser: what is drawn is what was judged, pixel for pixel."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Locator, Page, Route, expect

from tests.browser import Browse, Site, browse, chromium, served
from tests.needs import needs_chromium, needs_npm
from tests.study_page import Judged, judged_phantom

pytestmark = needs_chromium
__all__ = ["browse", "chromium"]

LUNG, MEDIASTINUM, BONE = (1500, -600), (400, 40), (2000, 300)
BLUE, ORANGE = (86, 196, 255), (255, 146, 40)
READ_BACK = "willReadFrequently"
"""Chromium's advice to who reads what is drawn: these tests do."""


class Screen:
    """The page of one study, and what its canvases show."""

    def __init__(self, page: Page, study: Judged) -> None:
        self.page, self.study = page, study
        self.viewer = page.locator("ct-viewer")
        self.screen = self.viewer.locator(".screen")
        page.goto(f"/studies/{study.uid}")
        expect(page.locator("ct-viewer[data-place]:not([data-place=''])")).to_be_visible()

    def place(self) -> int:
        """Of the image that is drawn, masks and all."""
        return int(self.viewer.get_attribute("data-place") or -1)

    def at(self, place: int) -> None:
        expect(self.viewer).to_have_attribute("data-place", str(place))

    def says(self, what: str) -> str:
        return self.viewer.locator(f".{what}").inner_text()

    def pixels(self, canvas: str) -> NDArray[np.uint8]:
        """RGBA, (rows, columns, 4)."""
        width, height, coded = self.viewer.locator(f"canvas.{canvas}").evaluate(
            """canvas => {
                const {width, height} = canvas, step = 8192;
                const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
                let text = "";
                for (let n = 0; n < data.length; n += step)
                    text += String.fromCharCode(...data.subarray(n, n + step));
                return [width, height, btoa(text)];
            }"""
        )
        return np.frombuffer(base64.b64decode(coded), np.uint8).reshape(height, width, 4)

    def keys(self, *keys: str) -> None:
        for key in keys:
            self.screen.press(key)

    def label(self, text: str) -> Locator:
        return self.viewer.get_by_label(text, exact=True)

    def k(self) -> int:
        """Place in the series of the image that is shown."""
        return self.study.in_viewer_order[self.place()]


def windowed(hu: NDArray[np.int16], window: tuple[int, int]) -> NDArray[np.uint8]:
    """The linear VOI LUT function (DICOM PS3.3 C.11.2.1.2) onto 0 to 255, rounded half up."""
    width, centre = window
    grey = ((hu - (centre - 0.5)) / (width - 1) + 0.5) * 255
    return np.clip(np.floor(grey + 0.5), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from served(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def study(site: Site) -> Judged:
    settings = {"rows": 128, "slices": 24, "slice_spacing": 8.0}
    return judged_phantom(site.ward, seed=5, classes=True, boxes=True, **settings)


@pytest.fixture
def screen(site: Site, study: Judged, browse: Browse) -> Screen:
    return Screen(browse(site.address, READ_BACK), study)


def test_it_opens_where_most_lesion_is(screen: Screen) -> None:
    most = int(np.argmax([screen.study.lesions[k].sum() for k in screen.study.in_viewer_order]))
    screen.at(most)
    assert screen.study.series.instances[screen.k()].instance_number == most + 1
    assert screen.says("where") == f"Image {most + 1} of 24"
    sides = [screen.says(f"edge-{edge}") for edge in ("left", "right", "top", "bottom")]
    assert sides == ["R", "L", "A", "P"]


def test_greys_are_those_of_the_window(screen: Screen) -> None:
    hu = screen.study.volume.array[screen.k()]
    for name, window in (("Mediastinum", MEDIASTINUM), ("Bone", BONE), ("Lung", LUNG)):
        screen.label(name).check()
        shown = screen.pixels("image")
        assert np.array_equal(shown, np.dstack([windowed(hu, window)] * 3 + [np.full(hu.shape, 255)])), name
        assert screen.viewer.locator(".windowed").text_content() == f"W {window[0]}  L {window[1]}"


def test_a_drag_sets_the_window(screen: Screen) -> None:
    box = screen.screen.bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    screen.page.mouse.move(x, y)
    screen.page.mouse.down()
    screen.page.mouse.move(x + 40, y - 30, steps=3)
    screen.page.mouse.up()
    width, centre = (int(part) for part in screen.says("windowed").replace("W ", "").split("  L "))
    assert width > LUNG[0] + 100
    assert centre < LUNG[1] - 50
    hu = screen.study.volume.array[screen.k()]
    assert np.array_equal(screen.pixels("image")[..., 0], windowed(hu, (width, centre)))
    expect(screen.label("Lung")).not_to_be_checked()
    screen.keys("1")
    expect(screen.label("Lung")).to_be_checked()


def test_overlays_are_the_masks(screen: Screen) -> None:
    screen.label("Boxes with scores").uncheck()
    screen.label("Fill").check()
    lesions = screen.study.lesions[screen.k()]
    columns = np.arange(lesions.shape[1]) >= lesions.shape[1] // 2
    ground_glass, consolidation = lesions & ~columns, lesions & columns
    shown = screen.pixels("overlay")
    assert np.array_equal(shown[..., 3] > 0, lesions)
    assert np.allclose(shown[ground_glass][:, :3], BLUE, atol=3)
    assert np.allclose(shown[consolidation][:, :3], ORANGE, atol=3)
    assert set(shown[lesions][:, 3]) == {153}, "60 % opaque"
    screen.label("Consolidation").uncheck()
    assert np.array_equal(screen.pixels("overlay")[..., 3] > 0, ground_glass)
    screen.label("Right lung").check()
    right = screen.study.lungs[screen.k()] & ~columns
    assert np.array_equal(screen.pixels("overlay")[..., 3] > 0, ground_glass | right)


def test_contours_run_along_the_inside_of_the_border(screen: Screen) -> None:
    boxes = screen.label("Boxes with scores")
    boxes.uncheck()
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
    boxes.check()
    yellow = (screen.pixels("overlay")[..., :3] == (255, 225, 77)).all(axis=2)
    top, left, bottom, right = screen.study.answer.boxes[0].box
    assert yellow[top - 1, left:right].mean() > 0.9
    assert yellow[top:bottom, right].mean() > 0.9


def test_the_bar_leads_to_an_image(screen: Screen) -> None:
    bar = screen.page.locator(".lesion-bar")
    box = bar.bounding_box()
    assert box
    for place in (2, 20):
        bar.click(position={"x": box["width"] / 2, "y": (place + 0.5) / 24 * box["height"]})
        screen.at(place)
        expect(bar).to_have_attribute("aria-valuenow", str(place + 1))
        hu = screen.study.volume.array[screen.k()]
        assert np.array_equal(screen.pixels("image")[..., 0], windowed(hu, LUNG))
    marks = bar.locator("canvas").evaluate(
        """canvas => {
            const {data} = canvas.getContext("2d").getImageData(0, 0, 100, 24), wide = [...Array(100).keys()];
            const filled = at => data[4 * at + 3];
            return [...Array(24).keys()].map(row => wide.filter(column => filled(100 * row + column)).length);
        }"""
    )
    areas = [screen.study.lesions[k].sum() for k in screen.study.in_viewer_order]
    assert int(np.argmax(marks)) == int(np.argmax(areas))
    assert [mark > 0 for mark in marks] == [bool(area) for area in areas]


def test_the_whole_way_by_keys_and_wheel(screen: Screen) -> None:
    screen.keys("Home")
    screen.at(0)
    screen.keys("ArrowDown", "ArrowDown", "PageDown")
    screen.at(12)
    screen.keys("End")
    screen.at(23)
    screen.keys("ArrowDown")
    screen.at(23)
    marked = [place for place, k in enumerate(screen.study.in_viewer_order) if screen.study.lesions[k].any()]
    screen.keys("Home")
    screen.at(0)
    screen.keys("n")
    first = next(place for place in marked if place > 0)
    screen.at(first)
    screen.screen.hover()
    screen.page.mouse.wheel(0, 120)
    screen.at(first + 1)


def test_the_page_renews_itself_and_the_viewer_stays(screen: Screen) -> None:
    screen.keys("Home")
    screen.at(0)
    screen.viewer.evaluate("viewer => { viewer.mine = true; }")
    why = screen.page.locator(".why")
    said = why.text_content() or ""
    why.evaluate("why => { why.textContent = 'old'; }")
    screen.page.evaluate(
        """async () => {
            const {merge} = await import("/static/merge.js");
            const text = await (await fetch(location.href)).text();
            const page = new DOMParser().parseFromString(text, "text/html");
            merge(document.getElementById("live"), page.getElementById("live"));
        }"""
    )
    expect(why).to_have_text(said)
    assert screen.viewer.evaluate("viewer => viewer.mine") is True
    assert screen.place() == 0


Box = tuple[float, float, float, float]


def film(screen: Screen) -> Box:
    """Left, top, width and height of the image on the screen, however much is cut off."""
    box = screen.viewer.locator(".film").bounding_box()
    assert box
    return box["x"], box["y"], box["width"], box["height"]


def test_keys_zoom_and_move(screen: Screen) -> None:
    place, whole = screen.place(), film(screen)
    screen.keys("+", "=")
    left, top, width, height = film(screen)
    assert (width, height) == pytest.approx((1.25**2 * whole[2], 1.25**2 * whole[3]), abs=1)
    assert left + width / 2 == pytest.approx(whole[0] + whole[2] / 2, abs=1), "the middle stays"
    assert "× 1.6" in screen.says("windowed")
    screen.keys("Control+ArrowRight", "Control+ArrowDown")
    assert film(screen) == pytest.approx((left - 40, top - 40, width, height), abs=1)
    screen.keys(*(["Control+ArrowRight"] * 20))
    assert film(screen)[0] + width == pytest.approx(whole[0] + whole[2], abs=1), "its edge is the end"
    screen.keys("-", "0")
    assert film(screen) == pytest.approx(whole, abs=0.1)
    assert screen.place() == place


def test_the_mouse_zooms_where_it_points_and_moves(screen: Screen) -> None:
    place, whole, mouse = screen.place(), film(screen), screen.page.mouse
    x, y = whole[0] + 0.7 * whole[2], whole[1] + 0.4 * whole[3]
    mouse.move(x, y)
    screen.page.keyboard.down("Control")
    mouse.wheel(0, -240)
    expect(screen.viewer.locator(".windowed")).to_contain_text("×")
    left, top, width, height = film(screen)
    assert width > 1.5 * whole[2]
    assert ((x - left) / width, (y - top) / height) == pytest.approx((0.7, 0.4), abs=0.01)
    for held in ("left", "middle"):  # the middle button needs no key
        mouse.down(button=held)
        mouse.move(x + 30, y + 20, steps=3)
        mouse.up(button=held)
        assert film(screen) == pytest.approx((left + 30, top + 20, width, height), abs=1), held
        mouse.move(x, y)
        screen.page.keyboard.up("Control")
        left, top = left + 30, top + 20
    assert screen.says("windowed").startswith(f"W {LUNG[0]}"), "and not the window"
    screen.screen.dblclick()
    assert film(screen) == pytest.approx(whole, abs=0.1)
    assert screen.place() == place


def test_fingers_zoom_move_and_scroll(site: Site, study: Judged, browse: Browse) -> None:
    small = {"viewport": {"width": 400, "height": 800}, "has_touch": True}
    screen = Screen(browse(site.address, READ_BACK, **small), study)
    place, whole = screen.place(), film(screen)
    touch = screen.page.context.new_cdp_session(screen.page)
    x, y = whole[0] + whole[2] / 2, whole[1] + whole[3] / 2

    def fingers(kind: str, *at: tuple[float, float]) -> None:
        points = [{"x": x + a, "y": y + b, "id": n} for n, (a, b) in enumerate(at)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    fingers("touchStart", (-30, 0), (30, 0))
    for step in (40, 50, 60):
        fingers("touchMove", (-step, 0), (step, 0))
    fingers("touchEnd")
    assert film(screen)[2] == pytest.approx(2 * whole[2], rel=0.05)
    assert screen.place() == place
    fingers("touchStart", (0, 0))
    fingers("touchMove", (0, whole[3] / 6))
    fingers("touchEnd")
    expect(screen.viewer).not_to_have_attribute("data-place", str(place))
    assert film(screen)[2] == pytest.approx(2 * whole[2], rel=0.05)


def test_what_images_there_are_is_asked_once_and_with_the_page(
    site: Site, study: Judged, browse: Browse
) -> None:
    page, asked = browse(site.address), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    Screen(page, study)
    scripts = [n for n, address in enumerate(asked) if "touched.js" in address or "merge.js" in address]
    found = [n for n, address in enumerate(asked) if "viewer.json" in address]
    assert len(found) == 1
    assert found[0] < min(scripts), "before any script has run"


def test_masks_that_come_late_are_drawn_then(site: Site, study: Judged, browse: Browse) -> None:
    page, waiting = browse(site.address, READ_BACK), list[Route]()

    def hold(route: Route) -> None:
        waiting.append(route)

    page.route("**/marks.json", hold)
    page.goto(f"/studies/{study.uid}")
    viewer = page.locator("ct-viewer")
    expect(viewer.locator(".where")).to_contain_text("of 24")
    expect(viewer.get_by_label("Right lung")).to_have_count(0)
    for route in waiting:
        route.continue_()
    expect(viewer.get_by_label("Right lung")).to_be_visible()
    viewer.locator(".screen").press("Home")
    viewer.locator(".screen").press("ArrowDown")
    expect(viewer).to_have_attribute("data-place", "1")


def test_without_webgl_the_page_says_so(
    site: Site, study: Judged, browse: Browse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triage.web.viewer.BUNDLE", Path(__file__))
    page = browse(site.address)
    page.add_init_script(
        """const usual = HTMLCanvasElement.prototype.getContext;
        HTMLCanvasElement.prototype.getContext = function (kind, ...more) {
            return kind.startsWith("webgl") ? null : usual.call(this, kind, ...more);
        };"""
    )
    screen = Screen(page, study)
    screen.viewer.get_by_role("button", name="3D view").click()
    expect(screen.viewer.locator(".space")).to_contain_text("This browser draws no 3D")


@needs_npm
def test_a_3d_view_without_room_draws_nothing_and_goes_on_when_there_is_some(screen: Screen) -> None:
    button, space = screen.viewer.get_by_role("button", name="3D view"), screen.page.locator(".space")
    button.click()
    button.click()  # before it is there
    expect(space).to_be_hidden()
    button.click()
    expect(space).to_have_attribute("data-shown", "")
    two_frames = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    for style in ("height: 0; min-height: 0", ""):
        space.evaluate("(one, style) => { one.style = style; }", style)
        screen.page.evaluate(two_frames)
        space.press("ArrowLeft")
    expect(space.locator("canvas")).to_be_visible()


@needs_npm
def test_lungs_and_infection_in_3d(screen: Screen) -> None:
    button, space = screen.viewer.get_by_role("button", name="3D view"), screen.page.locator(".space")
    button.click()
    expect(screen.page.locator(".space[data-shown]")).to_be_visible()
    drawn = """(space, key) => {
        space.dispatchEvent(new KeyboardEvent("keydown", {key}));
        const copy = Object.assign(document.createElement("canvas"), {width: 200, height: 150});
        const context = copy.getContext("2d");
        context.drawImage(space.querySelector("canvas"), 0, 0, 200, 150);
        const {data} = context.getImageData(0, 0, 200, 150);
        let red = 0;
        for (let n = 0; n < data.length; n += 4) red += data[n] > 1.4 * data[n + 1] && data[n] > 90;
        return red;
    }"""
    assert space.evaluate(drawn, "Home") > 50
    assert space.evaluate(drawn, "ArrowLeft") > 50
    expect(button).to_have_attribute("aria-expanded", "true")
    button.click()
    expect(space).to_be_hidden()


def test_without_the_bundle_the_page_says_so(
    site: Site, study: Judged, browse: Browse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("triage.web.viewer.BUNDLE", tmp_path / "none.js")
    screen = Screen(browse(site.address), study)
    screen.viewer.get_by_role("button", name="3D view").click()
    expect(screen.page.locator(".space")).to_contain_text("not part of this installation")
    expect(screen.page.locator(".space")).to_contain_text("deploy/install")


@pytest.mark.parametrize(("width", "height"), [(400, 900), (1280, 900), (1280, 2000), (1900, 700)])
def test_nothing_sticks_out(site: Site, study: Judged, browse: Browse, width: int, height: int) -> None:
    page = browse(site.address, viewport={"width": width, "height": height})
    Screen(page, study)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    film, room = page.evaluate(
        """[".film", ".screen"].map(one => {
            const {left, right, top, bottom} = document.querySelector(one).getBoundingClientRect();
            return [left, right, top, bottom];
        })"""
    )
    assert film[1] - film[0] == pytest.approx(film[3] - film[2], abs=0.1)
    assert film[0] >= room[0] - 0.1
    assert film[1] <= room[1] + 0.1
    assert film[2] >= room[2] - 0.1
    assert film[3] <= room[3] + 0.1
