"""Headless Chromium by its DevTools protocol over a pipe: no driver, no port, nothing to install but the browser."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from select import select
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",  # as root there is none to have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)
PATIENCE = 60.0


def chromium() -> str | None:
    """The browser's path, where there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A browser with one page; everything that it reports is in `events`."""

    def __init__(self, program: str, profile: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._count = 0
        self._buffer = b""
        commands, self._send = os.pipe()
        self._receive, answers = os.pipe()

        def place() -> None:  # the browser reads at 3 and writes at 4, whatever numbers the pipes have here
            high = os.dup(answers) if answers == 3 else answers
            os.dup2(commands, 3)
            os.dup2(high, 4)
            os.set_inheritable(3, True)  # which a copy onto itself does not make it
            os.set_inheritable(4, True)

        words = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(words, close_fds=False, preexec_fn=place, **options)
        os.close(commands)
        os.close(answers)
        self.session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next((t for t in targets if t["type"] == "page"), None)
        target = page["targetId"] if page else self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._send)  # without its pipe the browser ends
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._receive)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask, and wait for the answer; events that come before it are kept."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, path: Path, *, width: int, dark: bool = False, scripts: bool = True, scale: float = 1) -> None:
        """Load a page at a width, and wait until it is there."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not self.of("Page.loadEventFired"):
            self._next()

    def of(self, method: str) -> list[dict[str, Any]]:
        """What was reported by this name since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == method]

    def value(self, expression: str) -> Any:
        """What an expression gives in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        """Every address that was asked for."""
        return [event["request"]["url"] for event in self.of("Network.requestWillBeSent")]

    def complaints(self) -> list[str]:
        """What stands in the console, and errors that nobody caught."""
        found = [entry["entry"]["text"] for entry in self.of("Log.entryAdded")]
        found += [str(call["args"]) for call in self.of("Runtime.consoleAPICalled")]
        return found + [str(thrown["exceptionDetails"]) for thrown in self.of("Runtime.exceptionThrown")]

    def screenshot(self, height: int | None = None, whole: bool = False) -> bytes:
        """A PNG of what is seen: of the first `height` pixels, or of the whole page."""
        options: dict[str, Any] = {}
        if whole or height:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
            options = {"captureBeyondViewport": True, "clip": clip}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"])

    def _next(self) -> dict[str, Any]:
        """The next message; events are kept."""
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select([self._receive], [], [], max(0.0, until - time.monotonic()))
            piece = os.read(self._receive, 1 << 16) if ready else b""
            if not piece:
                raise TimeoutError("the browser does not answer" if not ready else "the browser ended")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message
