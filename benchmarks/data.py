"""Measures the throughput per core of `jaxgpt data prepare`, and the wait for data in a `gpt2_124m` step.

    python benchmarks/data.py SOURCE... [--repeat 20] [--step-seconds 0.13]

The sources are written `repeat` times into one JSONL corpus (about 15 MB is enough) and prepared with one and
with two workers, as bytes and with SentencePiece. Then a consumer takes batches of 480 x 1,024 tokens from
the loader and sleeps `step-seconds` between them, the duration of a step. The default is 0.49M tokens at 40 %
MFU on eight H100s: 855 MFLOP x 491,520 / (8 x 989e12 x 0.4).
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import tyro

from jaxgpt.config import Text
from jaxgpt.data.loader import train_iterator
from jaxgpt.data.prepare import prepare
from jaxgpt.data.sources import read_documents
from jaxgpt.data.train_tokenizer import train_tokenizer
from jaxgpt.text.load import load_tokenizer


def main(
    sources: tyro.conf.Positional[list[str]],
    repeat: int = 20,
    step_seconds: float = 0.13,
    batches: int = 40,
) -> None:
    """Run the benchmark, and print a table and one JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = list(read_documents(sources))
        with (work / "corpus.jsonl").open("w", encoding="utf-8") as file:
            for i in range(repeat):
                file.writelines(json.dumps({"text": f"{i} {t}"}) + "\n" for t in texts)
        size = (work / "corpus.jsonl").stat().st_size / 1e6
        corpus = [str(work / "corpus.jsonl")]
        train_tokenizer(corpus, work / "tokenizer", vocab_size=8192)
        record = {"corpus_mb": round(size, 1), "load": os.getloadavg()[0]}
        for name in ("byte", str(work / "tokenizer")):
            for workers in (1, 2):
                out = work / f"{Path(name).name}{workers}"
                start = time.perf_counter()
                prepare(corpus, out, tokenizer=name, workers=workers)
                seconds = time.perf_counter() - start
                record[f"prepare_{Path(name).name}_{workers}_workers_mb_per_s"] = round(size / seconds, 2)
        record |= _wait(work / "tokenizer2", work / "tokenizer", step_seconds, batches)
    for name, value in record.items():
        print(f"{name:<45} {value}")
    print(json.dumps(record))


def _wait(data: Path, tokenizer: Path, step_seconds: float, batches: int) -> dict[str, float]:
    stream = train_iterator(
        Text(path=str(data)), load_tokenizer(tokenizer), model_length=1024, batch_size=480, seed=0
    )
    next(stream)
    waits = []
    for _ in range(batches):
        time.sleep(step_seconds)
        start = time.perf_counter()
        next(stream)
        waits.append(time.perf_counter() - start)
    stream.close()
    share = statistics.median(waits) / (step_seconds + statistics.median(waits))
    return {
        "wait_ms_median": round(1e3 * statistics.median(waits), 3),
        "wait_ms_max": round(1e3 * max(waits), 3),
        "wait_share_of_step": round(share, 5),
    }


if __name__ == "__main__":
    tyro.cli(main)
