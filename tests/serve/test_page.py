"""The command with ``--ui``: its page in a real browser, the lines of curl on ``/docs``, and its end."""

import contextlib
import html
import io
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from browser import Browser, chromium
from conftest import serving, stirred

import adaptkit
from adaptkit.predict.draw import laid

for name in ("fastapi", "uvicorn", "multipart", "prometheus_client", "gradio"):
    pytest.importorskip(name)

from adaptkit.serve.legend import percent  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:the head .* does not read all")

#: What a template engine, a browser or Gradio might take for more than a name.
NAMES = ["road", "<b>sky</b>", "a ${6 * 7} {{value}}", "tree", "car"]
GRADIOS = "Method not implemented."  #: what Gradio's own script says on every page
OTHER = "[...document.querySelectorAll('[role=option]')].find(o => o.innerText.includes('depth'))"
FILE = "document.querySelector('#image input[type=file]')"
PICTURE = "document.querySelector('#answer img')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    for seed, (name, head, said) in enumerate([
        ("seg", ("fpn", {"num_classes": 5}), {"task": "semantic-segmentation", "size": 32, "classes": NAMES}),
        ("depth", ("depth", {"max_depth": 10.0}), {"task": "depth-estimation", "size": 32}),
    ]):  # fmt: skip
        model = adaptkit.attach(adaptkit.demo_backbone(), "sfp", head=head)
        stirred(model, seed).save(folder / name, **said)
    noise = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    grey = Image.fromarray(noise).resize((112, 80), Image.Resampling.BICUBIC)
    grey.save(folder / "photo.jpg", quality=60)  # Gradio would compress it again on its way to colours
    return folder


@pytest.fixture(scope="module")
def where(folder):
    """Address of a server that is told to end while a client holds a heartbeat open, as Gradio's do."""
    words = ["--backbone", "demo", f"seg={folder / 'seg'}", f"depth={folder / 'depth'}", "--ui"]
    with contextlib.ExitStack() as after, serving(folder, *words) as where:
        to = urlsplit(where).hostname, urlsplit(where).port
        held = after.enter_context(socket.create_connection(to, timeout=60))  # closed when the server has ended
        held.sendall(b"GET /ui/gradio_api/heartbeat/abc HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in held.recv(4096)
        yield where


def test_the_lines_of_curl_work(where, folder, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    with urllib.request.urlopen(f"{where}/docs", timeout=60) as page:
        lines = [html.unescape(line) for line in re.findall(r"<pre>(.*?)</pre>", page.read().decode(), re.DOTALL)]
    shutil.copy(folder / "photo.jpg", tmp_path)
    ran = [line for line in lines if "/adapters/" not in line]  # these need --allow-mount, and are refused
    assert len(ran) == len(lines) - 2 == 8
    for line in ran:
        subprocess.run(line.replace("curl", "curl -sSf", 1), shell=True, check=True, cwd=tmp_path, timeout=60)
    assert Image.open(tmp_path / "answer.png").size == (112, 80)
    assert Image.open(tmp_path / "overlay.png").width > 112  # the legend


needs_browser = pytest.mark.skipif(chromium() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


def until(browser, script, seconds=60):
    """Wait until a line of script is true in the page, and return what it says."""
    deadline = time.monotonic() + seconds
    while not (said := browser.evaluate(script)):
        assert time.monotonic() < deadline, (
            f"{script}: never; the page says {browser.evaluate('document.body.innerText')}"
        )
        time.sleep(0.1)
    return said


def pressed(browser, element, then):
    """Press the mouse on an element until a line of script is true: while a page settles, it moves and is made anew."""
    for _ in range(30):
        if browser.evaluate(f"!!{element}"):
            browser.click(element)
        for _ in range(20):
            if browser.evaluate(then):
                return
            time.sleep(0.1)
    raise AssertionError(f"{element}: {then}: never; the page says {browser.evaluate('document.body.innerText')}")


def answered(browser, before=None):
    """The answer that is seen, once it is there and another than before: its address and pixels."""
    known = f"&& {PICTURE}.src !== {before!r}" if before else ""
    address = until(browser, f"{PICTURE} && {PICTURE}.complete && {PICTURE}.naturalWidth {known} && {PICTURE}.src")
    with urllib.request.urlopen(address, timeout=60) as data:
        return address, np.asarray(Image.open(io.BytesIO(data.read())))


@needs_browser
def test_a_picture_is_answered_in_a_browser(where, folder, browser):
    seen = np.asarray(Image.open(folder / "photo.jpg").convert("RGB"))
    expected = {
        name: adaptkit.from_pretrained(folder / name, backbone="demo").predict(folder / "photo.jpg")
        for name in ("seg", "depth")
    }
    browser.open(f"{where}/ui/")
    until(browser, f"document.querySelector('#task input')?.value === 'seg' && {FILE} !== null")
    browser.upload(FILE, folder / "photo.jpg")
    first, pixels = answered(browser)
    assert np.array_equal(pixels, np.asarray(laid(seen, expected["seg"])))
    legend = until(browser, "document.querySelector('#names .legend')?.innerText").split("\n")
    shares = {c["name"]: percent(c["share"]) for c in expected["seg"].json()["classes"]}
    assert len(shares) > 1
    for name, share in shares.items():
        assert share in legend[legend.index(name) + 1 :]
    assert browser.evaluate("getComputedStyle(document.querySelector('#names .legend')).display") == "grid"

    pressed(browser, "document.querySelector('#task input')", f"{OTHER}?.getBoundingClientRect().height > 0")
    pressed(browser, OTHER, "document.querySelector('#task').innerText.includes('depth')")
    pressed(browser, "document.querySelector('#predict')", f"{PICTURE}?.src !== {first!r}")
    _, pixels = answered(browser, first)
    assert np.array_equal(pixels, np.asarray(laid(seen, expected["depth"])))
    until(browser, "document.querySelector('#names').innerText.includes('median')")

    assert [line for line in browser.said if GRADIOS not in line] == []
    assert [a for a in browser.asked if not a.startswith((f"{where}/", "data:", "blob:"))] == []
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_what_is_wrong_is_said_on_the_page(where, browser):
    browser.open(f"{where}/ui/", width=390, height=800, dark=True)
    until(browser, "document.querySelector('#task input')?.value === 'seg'")
    said = "document.body.innerText.includes('choose a task and an image')"
    pressed(browser, "document.querySelector('#predict')", said)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_the_routes_are_read_in_a_browser(where, browser, width, dark):
    browser.open(f"{where}/docs", width=width, dark=dark)
    assert browser.said == []
    assert [a for a in browser.asked if not a.startswith("data:")] == [f"{where}/docs"]
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate("document.querySelectorAll('pre').length") == 10
