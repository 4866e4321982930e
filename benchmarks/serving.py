"""A server at rising load, beside a loop of single requests; and its memory over minutes of mixed load.

    python -m benchmarks.serving RUN [--levels 1 2 4 8 16] [--peer http://127.0.0.1:8080/v1]
    python -m benchmarks.serving RUN --soak 20

Starts `jaxgpt serve RUN` on a free port and asks it for streams, as many at a time as the level says, each
client sending its next request when its last one ended. Every prompt has 32 to 200 words that no other has,
and every answer has at most `new` tokens. Reported are tokens per second of all clients,
the time to the first token and between tokens (median and 99th percentile, by the clients' clocks), and the
same tokens from `Generator.generate`, one request after another. `--peer` asks another server of the same
kind in the same way.

With `--soak`, clients come and go for so many minutes: short and long, streamed and whole, cancelled
half-way, refused, with a rule, with alternatives; the server's resident memory is read every ten seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import tyro

import jaxgpt

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "this",
    "are",
    "or",
    "his",
    "from",
    "at",
    "which",
    "but",
]


def words(seed: int, count: int) -> str:
    """A prompt that begins like no other."""
    source = random.Random(seed)
    return " ".join([str(seed), *(source.choice(WORDS) for _ in range(count))])


@contextlib.contextmanager
def server(run: str, options: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """A running server: its address and process."""
    command = [sys.executable, "-m", "jaxgpt.cli", "serve", run, "--port", "0", *options]
    with log.open("w") as file, subprocess.Popen(command, stderr=file, text=True) as process:
        try:
            address, until = "", time.monotonic() + 300
            while not address:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(log.read_text())
                found = [word for word in log.read_text().split() if word.startswith("http://")]
                address = found[0].rstrip("/") if found else ""
                time.sleep(0.2)
            yield address + "/v1", process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


async def stream(client: httpx.AsyncClient, base: str, model: str, prompt: str, new: int) -> list[float]:
    """The times of a streamed answer's pieces, after when it was asked for."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new,
        "stream": True,
        "temperature": 0.8,
        "top_p": 0.9,
    }
    start, stamps = time.perf_counter(), list[float]()
    async with client.stream("POST", f"{base}/completions", json=body | {"stop": None}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                stamps.append(time.perf_counter() - start)
    return stamps


async def level(base: str, model: str, clients: int, requests: int, new: int) -> dict[str, float]:
    """What so many clients see."""
    todo, found = iter(range(requests)), list[list[float]]()

    async def client() -> None:
        # A connection for each request: some servers close one that a client would take again.
        alone = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=600, limits=alone) as http:
            for i in todo:
                seed = 1000 * clients + i
                found.append(
                    await stream(http, base, model, words(seed, random.Random(seed).randint(32, 200)), new)
                )

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    first = sorted(stamps[0] for stamps in found)
    between = sorted(b - a for stamps in found for a, b in itertools.pairwise(stamps))

    def share(values: list[float], p: float) -> float:
        return 1e3 * values[min(len(values) - 1, int(p * len(values)))]

    return {
        "clients": clients,
        "tokens/s": sum(map(len, found)) / seconds,
        "first p50": share(first, 0.5),
        "first p99": share(first, 0.99),
        "between p50": share(between, 0.5),
        "between p99": share(between, 0.99),
    }


def loop(run: str, requests: int, new: int) -> float:
    """Tokens per second of single requests in turn, in this process."""
    model = jaxgpt.load(run)
    rates = []
    for i in range(requests + 1):
        start = time.perf_counter()
        seed = 1000 + i
        made = model.generate(
            words(seed, random.Random(seed).randint(32, 200)), max_new_tokens=new, temperature=0.8, top_p=0.9
        )
        rates.append(len(made.ids) / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def soak(
    base: str, model: str, pid: int, minutes: float, clients: int = 6
) -> list[tuple[float, float]]:
    """(minute, MiB) of the server under mixed load."""
    start, memory, done = time.monotonic(), list[tuple[float, float]](), [0]
    end = start + 60 * minutes

    async def one(http: httpx.AsyncClient, source: random.Random) -> None:
        kind, prompt = source.randrange(7), words(source.getrandbits(30), source.choice([3, 30, 120, 250]))
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": source.choice([1, 8, 32, 96])}
        if kind == 0:
            body |= {"temperature": 0, "logprobs": 3}
        if kind == 1:
            body |= {"n": 3, "seed": 7}
        if kind == 2:
            body |= {"max_tokens": -1}  # refused
        if kind == 3:
            with contextlib.suppress(httpx.HTTPError, TimeoutError):
                async with asyncio.timeout(source.random() * 2):
                    await stream(http, base, model, prompt, 200)
            return
        if kind == 4:
            await stream(http, base, model, prompt, 24)
            return
        await http.post(f"{base}/completions", json=body)

    async def client(number: int) -> None:
        source = random.Random(number)
        async with httpx.AsyncClient(timeout=600) as http:
            while time.monotonic() < end:
                await one(http, source)
                done[0] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(((time.monotonic() - start) / 60, resident(pid)))
            await asyncio.sleep(10)

    await asyncio.gather(watch(), *(client(i) for i in range(clients)))
    print(f"{done[0]} requests in {minutes:g} minutes")
    return memory


def table(rows: list[dict[str, float]]) -> None:
    """Print what the levels gave."""
    print(
        "| clients | tokens/s | first token p50 / p99, ms | between tokens p50 / p99, ms |\n|---|---|---|---|"
    )
    for row in rows:
        first, between = (
            f"{row[f'{name} p50']:.0f} / {row[f'{name} p99']:.0f}" for name in ("first", "between")
        )
        print(f"| {row['clients']:.0f} | {row['tokens/s']:.1f} | {first} | {between} |")


def main(
    run: Annotated[str, tyro.conf.Positional],
    *,
    levels: tuple[int, ...] = (1, 2, 4, 8, 16),
    requests: int = 24,
    new: int = 48,
    soak_minutes: Annotated[float, tyro.conf.arg(name="soak")] = 0.0,
    peer: str = "",
    serve: tuple[str, ...] = (),
    log: Path = Path("serving.log"),
) -> None:
    """Measure.

    Args:
      run: a run's folder or a Hugging Face model's.
      levels: clients at a time.
      requests: of a level.
      new: tokens of an answer.
      soak_minutes: of mixed load; 0 measures speed.
      peer: address of another server of the same model.
      serve: more options of `jaxgpt serve`.
      log: what the server writes.
    """
    name = Path(run).name
    with server(run, list(serve), log) as (base, pid):
        print(f"load of the machine: {os.getloadavg()[0]:.1f}", flush=True)
        if soak_minutes:
            memory = asyncio.run(soak(base, name, pid, soak_minutes))
            for minute, size in memory[:: max(1, len(memory) // 20)]:
                print(f"minute {minute:4.1f}: {size:.0f} MiB", flush=True)
            half = [size for minute, size in memory if minute >= soak_minutes / 2]
            print(f"growth in the second half: {100 * (half[-1] / half[0] - 1):+.2f} %")
            return
        asyncio.run(level(base, name, 2, 4, new))  # warms connections and programs
        rows = [asyncio.run(level(base, name, clients, requests, new)) for clients in levels]
        print("jaxgpt serve")
        table(rows)
        if peer:
            asyncio.run(level(peer, name, 2, 4, new))
            print(f"\n{peer}")
            table([asyncio.run(level(peer, name, clients, requests, new)) for clients in levels])
    print(f"\nloop of single requests: {loop(run, 6, new):.1f} tokens/s")


if __name__ == "__main__":
    tyro.cli(main)
