"""A real Chromium without a screen, driven over the DevTools protocol: just enough to use a page and to watch it.

Everything that a page logs, and every request that it makes, is kept: a page that promises to make none is believed
only after it has been seen to.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run
--no-default-browser-check --disable-background-networking --disable-component-update --disable-sync
--disable-default-apps --disable-extensions --hide-scrollbars --mute-audio --remote-debugging-port=0"""


def find_browser() -> str | None:
    """The path of an installed Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path is not None), None)


class Browser:
    """One running browser; `open` gives pages.

    Raises:
        RuntimeError: if it does not start.
    """

    def __init__(self, executable: str):
        self._folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        profile = Path(self._folder.name)
        command = [executable, *_FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port, path = _until(lambda: _port(profile), 30, "Chromium did not open its port")
            self._socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=60, suppress_origin=True)
        except BaseException:
            self.close()
            raise
        self._number = 0
        self._pages: dict[str, Page] = {}

    def close(self) -> None:
        """End the browser and remove its profile."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def send(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """One command; events that arrive before its answer go to their pages."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message if session is None else {**message, "sessionId": session}))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            page = self._pages.get(answer.get("sessionId", ""))
            if page is not None:
                page.notice(answer["method"], answer["params"])

    def open(self, address: str = "about:blank", *, width: int = 1280, height: int = 860) -> Page:
        """A page of its own, at an address, when the page has loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(f"{domain}.enable")
        page.resize(width, height)
        if address != "about:blank":
            page.go(address)
        return page


class Page:
    """A tab.

    Attributes:
        errors: what went wrong: errors and warnings of the console, uncaught exceptions, refused content.
        requests: addresses that were asked for, the page's own among them.
    """

    def __init__(self, browser: Browser, session: str, target: str):
        self._browser, self._session, self._target = browser, session, target
        self.errors: list[str] = []
        self.requests: list[str] = []

    def send(self, method: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol."""
        return self._browser.send(method, self._session, **parameters)

    def notice(self, method: str, params: Any) -> None:
        """Keep an event that matters."""
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str([a.get("value", a.get("description")) for a in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])

    def go(self, address: str) -> None:
        """Load an address and wait until its data is there."""
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && document.documentElement.dataset.ready === 'true'")

    def show(self, path: str) -> None:
        """Go to a view by its hash, such as "#/component/3", and let it draw."""
        self.run(f"location.hash = {json.dumps(path)}")
        self.settle()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited.

        Raises:
            RuntimeError: if it throws.
        """
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", expression))
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait for two frames, in which lists and canvases are drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Until a JavaScript expression is true.

        Raises:
            TimeoutError: if it does not become so.
        """
        _until(lambda: self.run(condition) or None, seconds, f"never true: {condition}; {self.errors}")

    def each(self, selector: str, expression: str) -> list[Any]:
        """The value of an expression of `e` for every element."""
        return list(self.run(f"Array.from(document.querySelectorAll({json.dumps(selector)}), (e) => {expression})"))

    def texts(self, selector: str) -> list[str]:
        """The text of every element."""
        return self.each(selector, "e.textContent")

    def _place(self, selector: str, x: float, y: float) -> dict[str, float]:
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        return dict(self.run(f"(b => ({{x: b.x + {x} * b.width, y: b.y + {y} * b.height}}))({box})"))

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Press the mouse on a place within the first such element, as shares of its size."""
        where = "{block: 'center', behavior: 'instant'}"
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({where})")
        place = self._place(selector, x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
        self.settle()

    def press(self, text: str) -> None:
        """Press the button that says so."""
        self.run(f"[...document.querySelectorAll('button')].find((b) => b.textContent === {json.dumps(text)}).click()")
        self.settle()

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Move the mouse to a place within an element, as shares of its size."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **self._place(selector, x, y))
        self.settle()

    def choose(self, label: str, option: str) -> None:
        """Choose an option, by its text, in the list with a label."""
        self.run(
            f"""(() => {{
              const labels = [...document.querySelectorAll("label")];
              const list = labels.find((l) => l.textContent.startsWith({json.dumps(label)})).querySelector("select");
              list.value = [...list.options].find((o) => o.text === {json.dumps(option)}).value;
              list.dispatchEvent(new Event("change"));
            }})()"""
        )
        self.settle()

    def key(self, name: str) -> None:
        """Press and release a key, such as "j", "/" or "Escape"."""
        text = {"text": name} if len(name) == 1 else {"code": name}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=name, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=name)
        self.settle()

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)
        time.sleep(0.2)  # fields wait for a pause in typing
        self.settle()

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Set the size of the window."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def prefer(self, scheme: str, media: str = "") -> None:
        """Pretend that the system is "light" or "dark", and that the medium is a screen or "print"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def screenshot(self, path: Path | None = None, *, whole: bool = False) -> bytes:
        """The window, or the whole page, as PNG."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        content = base64.b64decode(shot["data"])
        if path is not None:
            path.write_bytes(content)
        return content

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"])

    def close(self) -> None:
        """Close the tab."""
        self._browser.send("Target.closeTarget", targetId=self._target)


def _port(profile: Path) -> tuple[str, str] | None:
    try:
        port, path = (profile / "DevToolsActivePort").read_text().split()
    except (OSError, ValueError):
        return None
    return port, path


def _until(check: Any, seconds: float, message: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = check()
        if found is not None:
            return found
        time.sleep(0.02)
    raise TimeoutError(message)
