"""JSON is read with suspicion and written without NaN."""

import json
import math
import os
from typing import Any, TypedDict

import pytest

from jaxgpt.errors import UserError, library_errors
from jaxgpt.files import Count, finite, parse_json, read_json, write_json


class Shard(TypedDict):
    tokens: Count


def read(data, kind=Shard):
    return parse_json(data, kind, "manifest.json", "prepare it again")


def test_what_fits_the_schema_comes_back():
    assert read(b'{"tokens": 3, "more": [1]}') == {"tokens": 3}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe\xfd", "is damaged"),
        (b'{"tokens": "3"}', "got `str` - at `$.tokens`, which is '3'"),
        (b'{"tokens": -1}', "at `$.tokens`"),
        (b'{"tokens": ' + b"9" * 400 + b"}", "at `$.tokens`"),
        (b'{"tokens": ' + b"9" * 5000 + b"}", "is damaged"),
        (b'{"tokens": NaN}', "NaN is no JSON value"),
        (b'{"tokens": 1e999}', "at `$.tokens`"),
        (b"[]", "got `array`"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"tokens": 1, "b": ' + b"[" * 101 + b"]" * 101 + b"}", "nested too deeply"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_does_not_is_one_sentence_with_the_file_and_the_fix(data, why):
    with pytest.raises(UserError) as error:
        read(data)
    message = str(error.value)
    assert message.startswith("manifest.json is damaged (") and message.endswith("; prepare it again.")
    assert why in message and "\n" not in message and len(message) < 400


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "none.json", Any, "make it")


def test_what_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "."):
        with pytest.raises(UserError, match=r"is not a file; make it\.$"):
            read_json(tmp_path / name, Any, "make it")


def test_a_file_of_an_absurd_size_is_not_read(tmp_path):
    (tmp_path / "x.json").touch()
    os.truncate(tmp_path / "x.json", 2**40)  # which takes no room on the disk
    with pytest.raises(UserError, match="1,099,511,627,776 bytes"):
        read_json(tmp_path / "x.json", Any, "make it again")


def test_whatever_a_library_raises_is_one_sentence():
    class PanicException(BaseException):
        """As of a library in Rust."""

    for error in (PanicException("called\n  unwrap"), MemoryError(), ValueError("x" * 9999)):
        with pytest.raises(UserError) as caught, library_errors("a.bin is damaged", "restore it"):
            raise error
        assert str(caught.value).startswith("a.bin is damaged (")
        assert str(caught.value).endswith("; restore it.")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(KeyboardInterrupt), library_errors("a", "b"):
        raise KeyboardInterrupt


def test_nan_is_written_as_null(tmp_path):
    write_json(tmp_path / "x.json", {"loss": math.nan, "all": [1.5, math.inf, (2.0, -math.inf)]})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "all": [1.5, None, [2.0, None]]}
    assert finite({"a": {"b": math.nan}}) == {"a": {"b": None}}
