"""Small texts that are all different."""

from __future__ import annotations

SENTENCE = "the cat sat on a mat while seven dogs ran over green hills and far away"
WORDS = SENTENCE.split(" ")


def story(number: int, words: int) -> str:
    """Some words that differ from number to number."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words)) + f" {number}."
