"""The explorer's page in headless Chromium: clicks and sliders change the pictures, and nothing outside is asked."""

import os
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("nicegui")
pytest.importorskip("typer")


def port_of(process):
    """The port that the command says, once it answers."""
    line = process.stdout.readline()
    port = int(line.split()[0].rpartition(":")[2])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return port
        except OSError:
            time.sleep(0.1)
    raise AssertionError(process.stdout.read())


@pytest.fixture(scope="module")
def served(run):
    """Starts the command with some options; the URL of its page."""
    started = []

    def start(*options):
        command = [sys.executable, "-m", "iin_fast.cli", "explore", str(run), "--no-browser", *options]
        environment = {k: v for k, v in os.environ.items() if "PYTEST" not in k}  # NiceGUI takes another port there
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, env=environment, cwd=run.parent, **pipes)
        started.append(process)
        return f"http://127.0.0.1:{port_of(process)}"

    yield start
    for process in started:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def url(served, run):
    return served("--decoder", f"{run.parent / 'decoder.py'}:decode")


@pytest.fixture
def page(browser, url):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(20_000)
    opened.goto(url)
    opened.wait_for_selector("[data-testid=view-edited] img")
    yield opened
    opened.close()


def picture(page, name="edited"):
    return page.get_attribute(f"[data-testid=view-{name}] img", "src")


def changed(page, before, name="edited"):
    """The picture once it is another one than ``before``."""
    page.wait_for_function(
        "([name, before]) => { const i = document.querySelector(`[data-testid=view-${name}] img`);"
        " return i && i.src !== before }",
        arg=[name, before],
    )
    return picture(page, name)


def became(page, expected, name="edited"):
    page.wait_for_function(
        "([name, expected]) => document.querySelector(`[data-testid=view-${name}] img`)?.src === expected",
        arg=[name, expected],
    )


def test_nothing_outside_of_this_machine_is_asked(browser, url):
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda found: asked.append(found.url))
    page.goto(url)
    page.wait_for_selector("[data-testid=view-edited] img")
    page.wait_for_load_state("networkidle")
    page.click("[data-testid=factor-0] button")
    page.wait_for_timeout(500)
    page.close()
    outside = [one for one in asked if not one.startswith((f"{url}/", url.replace("http", "ws") + "/", "data:"))]
    assert len(asked) > 5 and not outside


def test_a_click_swaps_and_all_swaps_are_b(page):
    assert picture(page) == picture(page, "A") != picture(page, "B")
    seen = picture(page)
    for k in range(3):
        page.click(f"[data-testid=factor-{k}] button")
        seen = changed(page, seen)
    assert seen == picture(page, "B")
    assert page.inner_text("[data-testid=code]").count("factors.replace") == 3
    page.click("[data-testid=reset]")
    became(page, picture(page, "A"))


def test_a_slider_changes_the_picture_and_the_code(page):
    before = picture(page)
    page.focus("[aria-label='to shape 1'] [tabindex]")
    page.keyboard.press("ArrowRight")
    changed(page, before)
    page.wait_for_function("document.querySelector('[data-testid=code]').innerText.includes('to shape 1')")
    assert "0.05 * axes['to shape 1']" in page.inner_text("[data-testid=code]")
    page.keyboard.press("ArrowLeft")
    became(page, before)


def test_a_drag_of_a_slider_is_followed(page):
    before = picture(page)
    box = page.locator("[aria-label='direction 1']").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, middle, steps=5)
    page.mouse.up()
    assert changed(page, before) != before


def test_samples_are_chosen_by_a_click_and_by_their_row(page):
    a, b = picture(page, "A"), picture(page, "B")
    page.click("[data-testid^=sample-] >> nth=4")
    a = changed(page, a, "A")
    became(page, a)
    page.click("text=choose B")
    page.click("[data-testid^=sample-] >> nth=7")
    b = changed(page, b, "B")
    page.fill("[data-testid=row]", "77")
    page.press("[data-testid=row]", "Enter")
    changed(page, b, "B")
    assert "row 77" in page.inner_text("[data-testid=view-B]")
    page.fill("[data-testid=row]", "3")  # a row that was trained on
    page.press("[data-testid=row]", "Enter")
    page.wait_for_selector("text=row 3 is none of the samples that are shown")


def test_a_swap_takes_the_new_b(page):
    page.click("[data-testid=factor-0] button")
    first = changed(page, picture(page, "A"))
    page.click("text=choose B")
    old = picture(page, "B")
    page.click("[data-testid^=sample-] >> nth=2")
    changed(page, old, "B")
    assert picture(page) == first
    page.click("[data-testid=factor-0] button")
    changed(page, first)


def test_others_can_be_drawn(page):
    before = page.get_attribute("[data-testid^=sample-] >> nth=0", "data-testid")
    page.click("[data-testid=others]")
    page.wait_for_function(
        "before => document.querySelector('[data-testid^=sample-]')?.dataset.testid !== before", arg=before
    )


def test_the_animation_goes_from_a_to_b(page):
    page.evaluate(
        """() => { window.seen = new Set(); new MutationObserver(() => {
        const image = document.querySelector('[data-testid=view-edited] img'); if (image) seen.add(image.src) })
        .observe(document.querySelector('[data-testid=view-edited]'), {childList: true, subtree: true}) }"""
    )
    page.click("[data-testid=play]")
    became(page, picture(page, "B"))
    assert page.evaluate("seen.size") > 5


def test_a_phone_needs_no_sideways_scrolling(browser, url):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(url)
    page.wait_for_selector("[data-testid=view-edited] img")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


def test_texts_are_shown_by_their_neighbours(browser, served, run):
    page = browser.new_page()
    page.goto(served("--latents", str(run.parent / "texts.npz")))
    page.wait_for_selector("text=(row 0, distance 0.00)")
    for k in range(3):
        page.click(f"[data-testid=factor-{k}] button")
    donor = page.inner_text("[data-testid=view-B]").split()[2]  # B: row 1 …
    page.wait_for_selector(f"text=text {donor} (row {donor}, distance 0.00)")
    page.close()


def test_only_the_names_of_this_machine_are_answered(url):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]))
    connection.request("GET", "/", headers={"Host": "elsewhere.example"})
    assert connection.getresponse().status == 400
