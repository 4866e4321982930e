"""Stopping on a signal: one press asks, however often it arrives; a later one is not held back."""

from __future__ import annotations

import os
import signal

import pytest
from tiny_runs import text_run, write_config

from jaxgpt.cli import main
from jaxgpt.train import loop, signals
from jaxgpt.train.signals import StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_arrives_twice_at_once_is_one(number, monkeypatch) -> None:
    clock, outer = [100.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    before = signal.signal(number, lambda *_: outer.append(number))
    try:
        with StopSignal() as stop:
            stop.begin()
            assert not stop.seen(1, 1)
            for _ in range(3):  # as from `timeout -s INT uv run jaxgpt train`
                os.kill(os.getpid(), number)
            assert stop.seen(1, 1) and stop.name == number.name and not outer
            clock[0] += signals.ONE_PRESS
            os.kill(os.getpid(), number)
            assert outer == [number]
        os.kill(os.getpid(), number)
        assert outer == [number, number]
    finally:
        signal.signal(number, before)


def test_before_the_first_step_a_signal_ends_it_at_once_and_an_ignored_one_stays_so(monkeypatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.name
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(signals.Interrupted), StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            raise AssertionError("the signal was held back")
        assert stop.name == "SIGHUP"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_it_compiles_leaves_no_folder(corpus, tmp_path, monkeypatch, capfd) -> None:
    """Code 75, and the same command starts again."""
    config = write_config(text_run(corpus, tmp_path / "runs"), tmp_path)

    def compiling(self: loop.Loop, *_: object) -> None:
        assert (tmp_path / "runs" / "text" / "config.json").is_file()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Loop, "compile", compiling)
    assert main(["train", str(config)]) == 75
    assert capfd.readouterr().out.endswith("SIGTERM at step 0; run the same command to go on\n")
    assert not (tmp_path / "runs").exists()
