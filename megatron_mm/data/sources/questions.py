"""Questions and answers from JSON lines, about pictures or not, with or without the reasoning between them.

A line is {"question": ..., "answer": ...} and may have "reasoning" (a chain of thought), "image" (a file, beside the
JSON file or absolute; or a list of files) and "id". What is asked is given (`prompt_segments`); what is learnt is

    <think>
    reasoning
    </think>
    answer

or the answer alone: one format for text and pictures, as MMaDA's mixed long chain-of-thought stage has it
(arXiv 2505.15809).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_mm.data.shards import Record
from megatron_mm.data.sources.base import Source, add_own_data_arguments, is_held_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_own_data_arguments(parser, "file of JSON lines", "questions")


def load(args: argparse.Namespace) -> Source:
    """
    Raises:
        ValueError: no file, a line that is not as described, or a picture that is not there.
    """
    if not args.src.is_file():
        raise ValueError(f"--src {args.src} is no file: give one of JSON lines.")
    splits: dict[str, list[Record]] = {"train": [], "val": []}
    for record in _records(args.src):
        splits["val" if is_held_out(record.key, args.held_out) else "train"].append(record)
    return Source(args.src.stem, args.licence, str(args.src), "", splits)


def answer_text(answer: str, reasoning: str | None) -> str:
    """What is learnt of a question."""
    return f"<think>\n{reasoning}\n</think>\n{answer}" if reasoning else answer


def _records(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _record(path, number, line)


def _record(path: Path, number: int, line: str) -> Record:
    try:
        entry = json.loads(line)
        question, answer, reasoning = entry["question"], entry["answer"], entry.get("reasoning")
        images = entry.get("image") or []
        images = [images] if isinstance(images, str) else list(images)
        key = str(entry.get("id", f"{path.stem}-{number:08d}")).replace(".", "_")
        pictures = [(path.parent / image).read_bytes() for image in images]
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError, OSError) as error:
        raise ValueError(
            f"{path}, line {number}: {type(error).__name__}: {error}; a line is a JSON object with question, "
            "answer and, if there are, reasoning and image."
        ) from error
    return Record(key, (*pictures, question, answer_text(answer, reasoning)), {"prompt_segments": len(pictures) + 1})
