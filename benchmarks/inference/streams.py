"""Do sixteen concurrent clients all get their answers, in fair shares, from a server whose memory stays bounded?

The program starts `fedtune serve` and lets clients stream completions from it without a pause, with different seeds and
lengths, then cuts connections in the middle of answers. It prints errors, tokens for each client, the server's memory,
and the time until a disconnected client's slot is free.

    python benchmarks/inference/streams.py runs/demo-1/onnx/int4                  # a minute
    python benchmarks/inference/streams.py MODEL_DIR --seconds 5 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

PROMPT = "dim the attic lights =>"
CUTS = 5
SETTLED = 0.2  # the share of the time after which memory should no longer grow
SAMPLE_SECONDS = 0.25


class Client:
    """One client, which sends one streaming request after the other; `tokens` counts the tokens it got."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens = self.requests = 0
        self.errors: list[str] = []

    async def run(self, http: httpx.AsyncClient, model: str, end: float) -> None:
        """Sends requests until `end`."""
        while time.monotonic() < end:
            body = {
                "model": model,
                "prompt": PROMPT,
                "max_tokens": 40 + 10 * (self.requests % 8),
                "temperature": 1.0,
                "seed": 1000 * self.number + self.requests,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            try:
                await self._stream(http, body)
            except (httpx.HTTPError, ValueError, KeyError, AssertionError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")
            self.requests += 1

    async def _stream(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        async with http.stream("POST", "/completions", json=body) as response:
            assert response.status_code == 200, response.status_code
            last = ""
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                last = line.removeprefix("data: ")
                if last != "[DONE]" and (usage := json.loads(last).get("usage")):
                    self.tokens += usage["completion_tokens"]
            assert last == "[DONE]", f"a stream ended with {last[:200]}"


async def load(url: str, process: psutil.Process, streams: int, seconds: float) -> dict[str, Any]:
    """Runs many clients and returns the figures."""
    memory: list[tuple[float, int]] = []
    limits = httpx.Limits(max_connections=streams + 4)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        model = (await http.get("/models")).json()["data"][0]["id"]
        began = time.monotonic()
        clients = [Client(number) for number in range(streams)]
        tasks = [asyncio.create_task(client.run(http, model, began + seconds)) for client in clients]
        while not all(task.done() for task in tasks):
            memory.append((time.monotonic() - began, process.memory_info().rss))
            await asyncio.sleep(SAMPLE_SECONDS)
        took = time.monotonic() - began
        await asyncio.gather(*tasks)
    settled = max(rss for moment, rss in memory if moment <= max(SETTLED * seconds, 2 * SAMPLE_SECONDS))
    tokens = [client.tokens for client in clients]
    return {
        "streams": streams,
        "seconds": round(took, 1),
        "requests": sum(client.requests for client in clients),
        "errors": [error for client in clients for error in client.errors],
        "tokens_per_second": round(sum(tokens) / took, 1),
        "tokens_least": min(tokens),
        "tokens_most": max(tokens),
        "memory_mb_settled": round(settled / 1e6, 1),
        "memory_mb_largest": round(max(rss for _, rss in memory) / 1e6, 1),
    }


def cut(url: str) -> float:
    """Measures the seconds for which a client that disconnects in the middle of its answer still holds a slot."""
    health = url.removesuffix("/v1") + "/health"
    with httpx.Client(base_url=url, timeout=30) as http:
        model = http.get("/models").json()["data"][0]["id"]
        # Random words, since the trained model's answers end too soon.
        body = {"model": model, "prompt": PROMPT, "max_tokens": 200, "temperature": 2.0, "stream": True}
        while True:
            with http.stream("POST", "/completions", json=body) as response:
                next(response.iter_bytes())
                active = http.get(health).json()["active"]
            gone = time.monotonic()
            while http.get(health).json()["active"]:
                time.sleep(0.005)
            if active:
                return time.monotonic() - gone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a directory that fedtune export wrote")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    command = [sys.executable, "-m", "fedtune.server.cli", "serve", str(options.model), "--port", "0"]
    with subprocess.Popen([*command, "--slots", str(options.streams)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().split()[-1]
            found = asyncio.run(load(url, psutil.Process(server.pid), options.streams, options.seconds))
            found["slot_freed_seconds"] = round(max(cut(url) for _ in range(CUTS)), 3)
        finally:
            server.terminate()
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:20} {value if name != 'errors' else len(value)}")
    for error in found["errors"][:5]:
        print(error)


if __name__ == "__main__":
    main()
