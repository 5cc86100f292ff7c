"""A headless Chromium, told over its pipe what to do (the DevTools protocol): a page, a width, dark or light, print."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium():
    """Path of a Chromium; None where there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page at a time; ``asked`` are the addresses that it requested, ``said`` its errors and console lines."""

    def __init__(self) -> None:
        self.home = tempfile.mkdtemp(prefix="chromium-")
        ours, theirs = os.pipe(), os.pipe()  # what we read, what it reads
        names = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={self.home}", "about:blank"]  # fmt: skip

        def wired():
            reading, writing = os.dup(theirs[0]), os.dup(ours[1])  # 3 and 4 may be among the four
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        self.process = subprocess.Popen(names, preexec_fn=wired, close_fds=False, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(theirs[0])
        os.close(ours[1])
        self.reading, self.writing, self.held, self.number = ours[0], theirs[1], b"", 0
        self.said: list[str] = []
        self.asked: list[str] = []
        self.loaded = False
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    session: str | None = None

    def call(self, method: str, **params: Any) -> Any:
        """Ask for something and return the answer; ``RuntimeError`` says what it says."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, seconds: float = 60.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\0" not in self.held:
            ready, _, _ = select.select([self.reading], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self.reading, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("the browser does not answer")
            self.held += part
        line, self.held = self.held.split(b"\0", 1)
        message = json.loads(line)
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])
            case "Log.entryAdded":
                self.said.append(params["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.said.append(params["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled":
                self.said.append(str(params["args"]))
        return message

    def open(self, url: str, width: int = 1200, height: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Load a page at this width, and wait until it is there."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        for page in ("about:blank", url):  # what the page before says on leaving is none of this one's
            self.said, self.asked, self.loaded = [], [], False
            self.call("Page.navigate", url=page)
            while not self.loaded:
                self._next()

    def evaluate(self, expression: str) -> Any:
        """Return what a line of script says in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def upload(self, element: str, path: str | Path) -> None:
        """Choose a file in the ``<input type=file>`` that a line of script finds."""
        found = self.call("Runtime.evaluate", expression=element)["result"]
        self.call("DOM.setFileInputFiles", objectId=found["objectId"], files=[str(path)])

    def click(self, element: str) -> None:
        """Press the mouse in the middle of what a line of script finds."""
        place = self.evaluate(
            f"(e => (e.scrollIntoView({{block: 'nearest'}}), (r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(e.getBoundingClientRect())))({element})"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def picture(self, path: str | Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def printed(self, path: str | Path) -> None:
        """Write the page as a PDF of A4."""
        shot = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError, RuntimeError):
            self.session = None
            self.call("Browser.close")
        self.process.kill()
        self.process.wait()
        os.close(self.reading)
        os.close(self.writing)
        shutil.rmtree(self.home, ignore_errors=True)
