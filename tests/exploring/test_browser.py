"""The site in a browser, from the disk: no errors, no requests elsewhere, and controls do what they say."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sites import CLASSES, KS, ODD_NAMES, data

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright, which drives a browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

PAGES = (
    "index.html",
    f"clusters.html#k={KS[1]}",
    f"cluster.html#{KS[0]}/1",
    "image.html#0",
    "map.html",
    "findings.html",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator[Any]:
    """A page that fails the test when it complains, or asks for anything but files of the disk."""
    page, faults = browser.new_page(), []
    page.set_default_timeout(15_000)
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(request.url))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or faults.append(request.url))
    yield page
    page.close()
    assert not faults


def go(page: Any, site: Path, address: str) -> None:
    page.goto("about:blank")  # or a page of which only what is behind # differs would stay
    page.goto(f"{site.as_uri()}/{address}")
    settle(page)


def settle(page: Any) -> None:
    """Wait until the page says that it is there."""
    page.wait_for_selector("main:not([aria-busy])")


def sizes(page: Any) -> list[int]:
    """Of the clusters whose cards are shown."""
    ids = page.locator("#cards strong").all_inner_texts()
    table = data(Path(page.url.removeprefix("file://")).parent, f"clusters/{ids[0].split(' of ')[1]}")
    return [table["size"][int(text.split()[1])] for text in ids]


@pytest.mark.slow
@pytest.mark.parametrize("address", PAGES)
def test_every_link_of_every_page_leads_to_a_page(address, page, site):
    go(page, site, address)
    links = {link.evaluate("link => link.href") for link in page.locator("a[href]").all()}
    assert links
    for link in sorted(links)[:12]:
        if link.endswith((".csv", "#main")):
            continue
        page.goto("about:blank")
        page.goto(link)
        settle(page)
        assert page.locator(".note").count() == 0, link
        assert page.locator("h1").inner_text()


def test_odd_names_are_shown_and_never_interpreted(page, site):
    paths = data(site, "images/0")["paths"]
    for name in ODD_NAMES:
        number = next(number for number, path in enumerate(paths) if path.endswith(f"/{name}"))
        go(page, site, f"image.html#{number}")
        shown = page.locator("#name").evaluate("element => element.textContent")
        assert shown.startswith(paths[number])
        assert page.locator("#picture").get_attribute("aria-label") == shown
        assert page.locator("main img, main b, main script").count() == 0


def test_clusters_are_sorted_and_filtered(page, site):
    go(page, site, f"clusters.html#k={KS[1]}")
    assert len(sizes(page)) == KS[1]
    page.select_option("[name=sort]", "size")
    assert sizes(page) == sorted(sizes(page), reverse=True)
    page.select_option("[name=sort]", "-size")
    assert sizes(page) == sorted(sizes(page))
    table = data(site, f"clusters/{KS[1]}")
    least = sorted(set(table["size"]))[-1]
    page.fill("[name=least]", str(least))
    assert set(sizes(page)) == {least}
    assert page.locator("#count").inner_text().startswith(f"{table['size'].count(least)} of {KS[1]}")
    # The address says it, so that it can be kept; and it is obeyed.
    address = page.url
    page.fill("[name=least]", "")
    label = max(set(table["label"]))
    page.select_option("[name=label]", str(label))
    assert page.locator("#cards > li").count() == table["label"].count(label)
    assert data(site, "site")["labels"][label] == sorted(CLASSES)[label]
    go(page, site, address.rpartition("/")[2])
    assert set(sizes(page)) == {least}


def test_cards_show_the_nearest_images_and_lead_to_their_cluster(page, site):
    go(page, site, f"clusters.html#k={KS[0]}&sort=size")
    card, table = page.locator("#cards > li").first, data(site, f"clusters/{KS[0]}")
    biggest = int(np.argmax(table["size"]))
    assert card.locator(".picture").count() == min(8, max(table["size"]))
    names = [picture.get_attribute("aria-label") for picture in card.locator(".picture").all()]
    nearest = data(site, f"members/{KS[0]}/0")[biggest]["images"][:8]
    paths = data(site, "images/0")["paths"]
    assert [name.rpartition(", label ")[0] for name in names] == [paths[image] for image in nearest]
    card.locator("a").click()
    page.wait_for_url("**/cluster.html**", wait_until="commit")
    settle(page)
    assert page.locator("h1").inner_text() == f"Cluster {biggest} of {KS[0]}"
    assert page.locator("#members .thumb").count() == min(96, max(table["size"]))
    before = page.locator("#members .thumb").count()
    if page.locator("#more").is_visible():
        page.click("#more")
        assert page.locator("#members .thumb").count() > before
    page.click("#after")
    page.wait_for_function(f"document.title === 'Cluster {(biggest + 1) % KS[0]} of {KS[0]}'")


def place_of(page: Any, position: list[int]) -> tuple[float, float]:
    """Where a position of the map is on the page at first."""
    box = page.locator("#map").evaluate(
        "map => [map.getBoundingClientRect().left, map.getBoundingClientRect().top, map.clientWidth, map.clientHeight]"
    )
    scale = min(box[2:]) / 10_000 * 0.94
    # The canvas has a border of one pixel.
    return tuple(
        begin + 1 + (length - 10_000 * scale) / 2 + at * scale
        for begin, length, at in zip(box[:2], box[2:], position, strict=True)
    )


@pytest.mark.parametrize("show", ["images", "prototypes"])
def test_the_map_shows_what_is_pointed_at_and_opens_its_cluster(show, page, site):
    points = data(site, "map")
    page.set_viewport_size({"width": 1200, "height": 1200})
    go(page, site, "map.html")
    page.select_option("[name=show]", show)
    page.select_option("[name=k]", str(KS[0]))
    at = np.array(points["at"])
    if show == "images":
        far = np.linalg.norm(at[:, None] - at[None], axis=2) + 1e9 * np.eye(len(at))
        number = int(far.min(1).argmax())  # no other point is near it
        cluster, position = points["clusters"][0][number], points["at"][number]
        said = data(site, "images/0")["paths"][points["images"][number]]
    else:
        cluster, position = next((c, at) for c, at in enumerate(points["prototypes"][0]) if at[0] >= 0)
        said = f"prototype of cluster {cluster} of {KS[0]}"
    page.mouse.move(*place_of(page, position))
    page.wait_for_selector("#tip:not([hidden])")
    assert said in page.locator("#tip").evaluate("tip => tip.textContent")
    page.mouse.click(*place_of(page, position))
    page.wait_for_url(f"**/cluster.html#{KS[0]}/{cluster}", wait_until="commit")
    settle(page)


def test_the_map_by_keyboard(page, site):
    go(page, site, "map.html")
    page.focus("#map")
    for key in ("ArrowRight", "ArrowUp", "+", "-", "ArrowLeft"):
        page.keyboard.press(key)
    page.wait_for_selector("#selected a[href^='image.html']")
    for colour in ("label", "tightness", "cluster"):
        page.select_option("[name=colour]", colour)
    page.focus("#map")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/cluster.html**")
    settle(page)  # to close it while it loads would be a failed request


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_do_not_scroll_sideways(scheme, page, site):
    page.set_viewport_size({"width": 340, "height": 700})
    page.emulate_media(color_scheme=scheme)
    for address in PAGES:
        go(page, site, address)
        assert page.evaluate("document.documentElement.scrollWidth") <= 340, address
        style = "getComputedStyle(document.body)"
        text, back = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
        assert (sum(map(int, text[4:-1].split(","))) > sum(map(int, back[4:-1].split(",")))) == (scheme == "dark")


def test_every_control_has_a_name_and_every_picture_a_text(page, site):
    for address in PAGES:
        go(page, site, address)
        controls = page.locator("button:visible, select:visible, input:visible").all()
        named = "control => Boolean(control.labels.length || control.innerText || control.ariaLabel)"
        assert all(control.evaluate(named) for control in controls)
        assert page.locator("[role=img]:not([aria-label])").count() == 0
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        before = page.url
        page.keyboard.press("Enter")
        if address != "index.html":  # which has no script
            assert page.evaluate("document.activeElement.id") == "main"
            assert page.url == before
