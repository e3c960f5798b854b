"""The command `serve` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import httpx


class Started:
    """A server in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ojfa_export", "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        line = self.process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), self.process.stderr.read()
        self.url = line.removeprefix("listening on ").strip()
        threading.Thread(target=lambda: self.log.extend(self.process.stderr)).start()
        while httpx.get(f"{self.url}/health").status_code != 200:
            assert self.process.poll() is None, self.log
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()
        self.process.wait()
