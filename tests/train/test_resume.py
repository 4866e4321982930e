"""A run that was cut off goes on as if nothing had happened: bitwise, wherever it was cut."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tiny import assert_same
from tiny_runs import STEPS, command, curve, records, restore, saved

KILLED = -signal.SIGKILL
# Each with the newest step that must be on disk by then: a save waits for the one before it. Saving
# makes a folder under another name, fills it in a thread, and renames it when it is whole.
CHAINS = {
    "text on one device": (
        "text_config",
        1,
        ("--mesh.data", "1", "--mesh.fsdp", "1", "--mesh.tensor", "1"),
        [
            ("record|step 7 loss|SIGKILL", KILLED, 4),
            ("record|step 9 loss|SIGTERM", 75, 10),
            ("os.mkdir|checkpoint-tmp/rest|SIGKILL", KILLED, 10),
        ],
    ),
    "dialogues with dropout and accumulation on fsdp=8": (
        "chat_config",
        8,
        (),
        [
            ("record|step 7 loss|SIGKILL", KILLED, 4),
            ("os.rename|checkpoints/9.|SIGKILL", KILLED, 8),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_a_killed_run_goes_on_bitwise_equal(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Losses of every step, parameters, optimizer, counters and the data's position."""
    fixture, devices, flags, faults = CHAINS[name]
    config = request.getfixturevalue(fixture)
    whole = command(config, "--runs", str(tmp_path / "whole"), *flags, devices=devices)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("\n") == 1
    folder, cut = tmp_path / "whole" / config.stem, tmp_path / "cut" / config.stem
    again = ("--runs", str(tmp_path / "cut"), *flags)
    for fault, code, newest in faults:
        done = command(config, *again, devices=devices, fault=fault)
        assert done.returncode == code, done.stderr
        assert max(saved(cut)) >= newest
    assert "checkpoint-tmp" in str(list((cut / "checkpoints").iterdir()))  # cut while saving
    done = command(config, *again, devices=devices)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("cut", "whole") == whole.stdout
    assert "resuming" in done.stderr
    assert [r["step"] for r in records(cut)] == list(range(1, STEPS + 1))
    assert curve(cut) == curve(folder)
    sizes = {"data": 1, "fsdp": devices, "tensor": 1}
    assert_same(restore(cut, sizes)[0], restore(folder, sizes)[0])
    assert restore(cut, sizes)[1] == restore(folder, sizes)[1]
    assert saved(cut)[-1] == STEPS
    assert not list((cut / "checkpoints").glob("*tmp*"))
