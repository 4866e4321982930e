"""The option --profile A:B: how it is read, and what is refused."""

from __future__ import annotations

import pytest

from jaxgpt.errors import UserError
from jaxgpt.profile.profiler import Profiler, take_steps


def test_it_is_taken_out_of_the_arguments() -> None:
    assert take_steps(["c.py", "--train.steps", "5"]) == (["c.py", "--train.steps", "5"], None)
    for words in (["--profile", "2:3"], ["--profile=2:3"]):
        rest, found = take_steps(["c.py", *words, "--name", "x"])
        assert rest == ["c.py", "--name", "x"]
        assert found is not None
        assert (found.first, found.last) == (2, 3)


@pytest.mark.parametrize("value", ["", "5", "0:3", "3:2", "a:b", "1:2:3", "-1:2", "1:", "1.0:2", " 1:2"])
def test_what_is_no_pair_of_steps(value: str) -> None:
    said = r"^--profile is '.*'; it must be A:B, the first and the last step .* 1 <= A <= B, such as 10:12\.$"
    for words in (["--profile", value], [f"--profile={value}"]):
        with pytest.raises(UserError, match=said):
            take_steps(["c.py", *words])
    with pytest.raises(UserError, match=said):
        take_steps(["c.py", "--profile"])


def test_steps_that_a_run_does_not_come_to() -> None:
    profiler = Profiler(5, 8)
    profiler.check(8)
    profiler.check(8, 4)
    with pytest.raises(UserError, match=r"^--profile 5:8 ends after the run's last step, 7; .* 1 to 7\.$"):
        profiler.check(7)
    said = r"^--profile 5:8 begins before the run's next step, 6; name steps from 6 to 9\.$"
    with pytest.raises(UserError, match=said):
        profiler.check(9, 5)
    with pytest.raises(UserError, match=r"next step, 9; it has done all its steps\.$"):
        profiler.check(8, 8)
