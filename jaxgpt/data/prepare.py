"""`jaxgpt data prepare`: text files to ArrayRecord shards of token ids, in parallel, resumable.

The folder it writes:
  manifest.json     tokenizer, settings, sources, counts and shards; its presence means it is whole
  tokenizer/        the tokenizer, so that the folder is self-contained
  train/, validation/
    NNNNN.arrayrecord   one record = the ids of a document, or of `RECORD_TOKENS` of them in turn
    lengths.npy         [D] tokens of each document, in the order of the records
  .work/            finished jobs while it is under way; gone at the end

A document is `<|bos|>`, its text, `<|eos|>`. The sources are cut into jobs by their sizes alone and
each job writes its own shards, so that the result is the same bytes for any number of workers and
any number of interruptions.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from jaxgpt.config import changed_fields
from jaxgpt.config.bounds import Part, Share, Steps, StepsOr0, Workers, bounded
from jaxgpt.config.filters import NO_FILTERS, Filters
from jaxgpt.data import jobs
from jaxgpt.data.canaries import make_canaries, planted, write_canaries
from jaxgpt.data.corpus import read_lengths
from jaxgpt.data.documents import Span, cut
from jaxgpt.data.duplicates import find_duplicates
from jaxgpt.data.sources import Report, Sources, expand
from jaxgpt.errors import UserError, require, require_known
from jaxgpt.files import read_json, write_json
from jaxgpt.text.filters import Tally, add_tallies, make_filters
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import ByteTokenizer, Tokenizer

log = logging.getLogger(__name__)

_AGAIN = "run the same command again: finished work is kept"
JOB_BYTES = (1 << 20, 64 << 20)
"""Minimum and maximum bytes of source in one job; between them a corpus gives about 64 jobs."""


@bounded
def prepare(
    sources: Sources,
    out: Path,
    *,
    tokenizer: str = "byte",
    validation: Part = 0.01,
    split: Literal["document", "tail"] = "document",
    field: str = "text",
    max_bad: Share = 0.01,
    filters: Annotated[Filters, tyro.conf.arg(name="")] = NO_FILTERS,
    canary: StepsOr0 = 0,
    canary_repeats: tuple[Steps, ...] = (1, 4, 16),
    workers: Workers = 0,
    overwrite: bool = False,
) -> None:
    """Turn text files into a folder of token ids that `jaxgpt train` reads.

    Running it again continues where it was stopped; a finished folder is left as it is.

    Args:
      sources: .txt (one document per file), .jsonl or .parquet files (the first two also as .gz or .zst),
        folders or globs.
      out: the folder to write.
      tokenizer: a folder written by `jaxgpt tokenizer train`, or `byte`.
      validation: share of the text held out for validation.
      split: what is held out: whole documents, chosen by a hash of their text so that copies stay
        together, or the tail of every document (for a corpus that is one file).
      field: the field of a JSON line or the column of a Parquet file that holds the text; a path such as
        `a.b[0].c` reaches into objects and lists.
      max_bad: maximum share of bad lines; above it, the command fails.
      filters: what is left out or changed.
      canary: number of random texts to plant in the training text, so that `jaxgpt eval RUN --safety` can
        tell what a model remembers; they are listed in canaries.json.
      canary_repeats: how often a canary is planted, in turn.
      workers: number of processes that tokenize; 0 means one per core.
      overwrite: rewrite a finished folder, if it is damaged or was made with other settings.
    """
    require_known(split, ("document", "tail"), f"split is {split!r}")
    text = ByteTokenizer() if tokenizer == "byte" else load_tokenizer(tokenizer)
    files = expand(sources)
    plan = plan_jobs(files)
    settings = _settings(files, text, validation, split, field, filters)
    require(bool(canary_repeats), "--canary-repeats is empty; say how often a canary is planted.")
    canaries = make_canaries(canary, canary_repeats) if canary else None
    if canaries:
        settings["canaries"] = canaries["repeats"]
        plan.append([])  # the job that writes them
    make_filters(filters)  # what a filter needs is here
    out = Path(out)
    held = _held(out, settings, overwrite)
    if held == "all":
        shutil.rmtree(out / ".work", ignore_errors=True)  # left by a kill right at the end
        print(f"{out} is already prepared with these settings.", file=sys.stderr)
        return
    try:
        with jobs.locked(out / ".work"):
            if held == "other":
                _discard(out)
            write_json(out / ".work" / "settings.json", settings)
            text.save(out / "tokenizer")
            more = tuple(planted(canaries)) if canaries else ()
            job = jobs.Job(str(out), validation, split, field, filters, more)
            if filters.duplicates != "keep":
                _mark_duplicates(job, plan, workers or _cores(), max_bad)
            if canaries:
                write_canaries(out, canaries)
            reports = jobs.run_all(job, plan, workers or _cores(), max_bad)
            manifest = _assemble(out, settings, plan, reports, max_bad)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"writing {out} failed ({why}); fix that and {_AGAIN}.") from None
    _say(out, manifest)


def _mark_duplicates(job: jobs.Job, plan: list[list[Span]], workers: int, max_bad: float) -> None:
    """Leave beside the keys of each job's documents which of them stood there before."""
    work = Path(job.out) / ".work"
    jobs.run_all(replace(job, stage="keys"), plan, workers, max_bad)
    if all(jobs.repeated_of(work, i).is_file() for i in range(len(plan))):
        return
    found = find_duplicates([jobs.keys_of(work, i) for i in range(len(plan))], job.filters)
    for i, repeated_D in enumerate(found):
        jobs.write_npy(jobs.repeated_of(work, i), repeated_D)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan_jobs(files: list[str]) -> list[list[Span]]:
    """The sources as jobs: lists of spans of about equal size, by the sizes of the files alone."""
    total = sum(Path(f).stat().st_size for f in files)
    size = min(max(total // 64, JOB_BYTES[0]), JOB_BYTES[1])
    plan: list[list[Span]] = []
    filled = size
    for path in files:
        for span in cut(path, size):
            if filled >= size:
                plan.append([])
                filled = 0
            plan[-1].append(span)
            filled += span.size
    return plan


def _settings(
    files: list[str], tokenizer: Tokenizer, validation: float, split: str, field: str, filters: Filters
) -> dict[str, Any]:
    """Everything that decides the result; a folder with other settings is not touched."""
    stats = [(f, Path(f).stat()) for f in files]
    wide = tokenizer.vocab_size > 1 << 16
    return {
        "version": 1,
        "tokenizer": {
            "kind": tokenizer.kind,
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
        },
        "validation": validation,
        "split": split,
        "field": field,
        "dtype": "uint32" if wide else "uint16",
        "record_tokens": jobs.RECORD_TOKENS,
        "sources": [
            {"path": str(Path(f).resolve()), "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for f, s in stats
        ],
        # Only where there are any, so that what was prepared before there were filters still counts.
        **({"filters": changed_fields(filters)} if filters != NO_FILTERS else {}),
        **({"filter_files": [_digest(f) for f in filters.files]} if filters.files else {}),
    }


def _digest(path: str) -> str:
    """Of a file's bytes: a list of words that was edited is another, wherever it lies."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a text file.") from None


def _held(out: Path, settings: dict[str, Any], overwrite: bool) -> Literal["all", "part", "nothing", "other"]:
    """What `out` holds of this work; `UserError` when it is another's and not to be replaced."""
    held = None
    for path in (out / "manifest.json", out / ".work" / "settings.json"):
        if path.is_file():
            try:
                held = read_json(path, dict[str, Any], "pass --overwrite to write it anew")
            except UserError:
                if path.name == "manifest.json" and not overwrite:
                    raise
                held = {}
            break
    if held is None:
        foreign = [p.name for p in out.iterdir() if p.name != ".work"] if out.is_dir() else []
        require(not out.exists() or out.is_dir(), f"{out} is a file; name a folder.")
        require(
            not foreign,
            f"{out} is not empty and was not written by `jaxgpt data prepare` "
            f"(it holds {', '.join(sorted(foreign)[:3])}); name another folder.",
        )
        return "nothing"
    optional = dict.fromkeys(("filters", "filter_files", "canaries"))
    changed = [k for k in {**settings, **optional} if held.get(k) != settings.get(k)]
    whole = (out / "manifest.json").is_file()
    if not changed:
        return "part" if not whole else "other" if overwrite else "all"
    if not whole:
        log.warning("unfinished work in %s had other settings (%s) and is replaced", out, ", ".join(changed))
        return "other"
    require(
        overwrite,
        f"{out} was prepared with other settings ({', '.join(changed)}); name another folder, or pass "
        "--overwrite to replace it.",
    )
    return "other"


def _discard(out: Path) -> None:
    (out / "manifest.json").unlink(missing_ok=True)  # first: a folder without it is not whole
    (out / "canaries.json").unlink(missing_ok=True)
    for name in ("train", "validation", "tokenizer"):
        shutil.rmtree(out / name, ignore_errors=True)
    for path in [*(out / ".work").glob("job-*"), *(out / ".work").glob("keys-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _assemble(
    out: Path,
    settings: dict[str, Any],
    plan: list[list[Span]],
    reports: list[jobs.JobReport],
    max_bad: float,
) -> dict[str, Any]:
    """Check the counts, move the shards into place and write the manifest, which is the end."""
    report = Report()
    for r in reports:
        report.merge(r["report"])
    report.check(max_bad)
    filtered: dict[str, Tally] = {}
    for r in reports:
        add_tallies(filtered, r.get("filters", {}))
    splits: dict[str, dict[str, Any]] = {}
    for split in ("train", "validation"):
        found: list[jobs.Counts] = [r["train"] if split == "train" else r["validation"] for r in reports]
        shards: list[dict[str, Any]] = [{"job": i, **c} for i, c in enumerate(found) if c["documents"]]
        totals = {k: sum(s[k] for s in shards) for k in ("documents", "tokens", "bytes", "records")}
        splits[split] = {**totals, "shards": shards}
    try:
        _check_splits(settings, splits, filtered)
    except UserError:  # as it would be every time: what is here is of no use to other settings
        _discard(out)
        shutil.rmtree(out / ".work")
        raise
    for split, part in splits.items():
        (out / split).mkdir(exist_ok=True)
        lengths = []
        for shard in part["shards"]:
            work = out / ".work" / jobs.name_of(shard["job"])
            shard["file"] = f"{shard.pop('job'):05d}.arrayrecord"
            lengths.append(read_lengths(work / f"{split}.npy", shard["documents"]))
            if (work / f"{split}.arrayrecord").exists():  # else an earlier run moved it
                os.replace(work / f"{split}.arrayrecord", out / split / shard["file"])
        jobs.write_npy(out / split / "lengths.npy", np.concatenate(lengths))
    lines = {
        "lines": report.lines,
        "bad": report.bad,
        "empty": report.empty,
        "bad_examples": report.examples,
    }
    manifest = {**settings, "splits": splits, **lines} | ({"filtered": filtered} if filtered else {})
    write_json(out / "manifest.json", manifest)
    shutil.rmtree(out / ".work", ignore_errors=True)
    return manifest


def _check_splits(
    settings: dict[str, Any], splits: dict[str, dict[str, Any]], filtered: dict[str, Tally]
) -> None:
    documents = sum(part["documents"] for part in splits.values())
    dropped = [f"{name} {tally['dropped']:,}" for name, tally in filtered.items() if tally["dropped"]]
    require(
        documents > 0 or not dropped, f"the filters drop all documents ({', '.join(dropped)}); loosen them."
    )
    require(documents > 0, "the sources hold no text; name files that do.")
    for split, part in splits.items():
        require(
            part["documents"] > 0,
            f"no text falls into the {split} split with --validation {settings['validation']:g} "
            f"--split {settings['split']} ({documents} documents in all); use --split tail, which "
            "takes the end of every document, or another --validation.",
        )


def _say(out: Path, manifest: dict[str, Any]) -> None:
    for split, part in manifest["splits"].items():
        print(
            f"{out}/{split}: {part['documents']:,} documents, {part['tokens']:,} tokens, "
            f"{part['bytes']:,} bytes of text",
            file=sys.stderr,
        )
    for name, tally in manifest.get("filtered", {}).items():
        changed = f", {tally['changed']:,} changed" if tally["changed"] else ""
        print(f"filter {name}: {tally['dropped']:,} of {tally['seen']:,} dropped{changed}", file=sys.stderr)
