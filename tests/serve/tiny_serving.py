"""A service of a tiny model, and a real server of it on a port of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from tiny import ONE, mesh, sharp_params

from jaxgpt.api import Model
from jaxgpt.config import GPT, Chat, Compute, Run
from jaxgpt.sample.load import Trained
from jaxgpt.text.tokenizer import ByteTokenizer

CONTEXT = 1024
TINY = GPT(vocab_size=ByteTokenizer().vocab_size, context=CONTEXT, layers=2, width=32, heads=4)
HI = [{"role": "user", "content": "Hi"}]


@cache
def tiny_model() -> Model:
    """A model of random weights that answers dialogues, in bytes."""
    run = Run(
        name="tiny",
        model=TINY,
        data=Chat(train=("a.jsonl",)),
        compute=Compute(dtype="float32", attention="xla"),
    )
    return Model(Trained(Path("tiny"), run, sharp_params(TINY), ByteTokenizer(), mesh(ONE), 1))


@contextlib.contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[str]:
    """A real server of an app, in a thread; gives its address. Port 0 is any free one."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
