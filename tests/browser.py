"""A headless Chromium, told what to do through a pipe in its DevTools protocol: no driver, no port.

https://chromedevtools.github.io/devtools-protocol/ describes the commands and events.
"""

import json
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",  # containers are root and have no user namespaces
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    """The path of an installed Chromium or Chrome, or None. Of some systems' only a script is there
    that says how to install it.
    """
    for path in filter(None, map(shutil.which, NAMES)):
        if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


class Page:
    """A tab: what it was sent to, and what it said on the way."""

    def __init__(self, read: int, write: int):
        self._read, self._write, self._buffer = read, write, b""
        self._number, self._session = 0, None
        self.events: list[dict[str, Any]] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")
        self.command("Page.setLifecycleEventsEnabled", enabled=True)

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The command's result; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            found = os.read(self._read, 1 << 20)
            assert found, "the browser has ended"
            self._buffer += found
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Load a file in a window of this size, and wait until all of it is there."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.events.clear()
        loader = self.command("Page.navigate", url=path.resolve().as_uri())["loaderId"]
        while not any(  # of this page: the one before it may be late
            (one["loaderId"], one["name"]) == (loader, "load")
            for one in self.said("Page.lifecycleEvent")
        ):
            self.events.append(self._next())

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.command("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def said(self, method: str) -> list[dict[str, Any]]:
        """The parameters of the events of this name since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def errors(self) -> list[str]:
        """Exceptions, console messages, refusals of the page's policy since it was opened."""
        found = [json.dumps(one) for one in self.said("Runtime.exceptionThrown")]
        found += [json.dumps(one) for one in self.said("Runtime.consoleAPICalled")]
        return found + [one["entry"]["text"] for one in self.said("Log.entryAdded")]

    def requests(self) -> list[str]:
        """Every address that was asked for since the page was opened."""
        return [one["request"]["url"] for one in self.said("Network.requestWillBeSent")]


@contextmanager
def open_browser(path: str):
    """A `Page` of the browser at `path`, which ends with the block."""
    read_commands, write_commands = os.pipe()
    read_answers, write_answers = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # the browser reads from descriptor 3 and writes to 4
        process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}',
                path,
                *FLAGS,
                f"--user-data-dir={profile}",
            ],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            yield Page(read_answers, write_commands)
        finally:
            os.close(write_commands)  # which it takes for the end
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(read_answers)
