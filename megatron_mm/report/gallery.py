"""One HTML page of generated documents, to look at in a browser: prompts, pictures and text in their order."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 70em; }
article { border-top: 1px solid #ccc; padding: 0.8em 0; }
h2 { font-size: 1em; margin: 0 0 0.6em; }
img { min-width: 112px; max-width: 512px; image-rendering: pixelated; vertical-align: top; margin: 0.2em; }
p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.4em 0; }
"""


def gallery(title: str, lines: Sequence[dict[str, Any]]) -> str:
    """The page, which lies beside the pictures that it shows.

    Args:
        lines: of samples.jsonl. Pictures that were given are put into the page itself.
    """
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = f"<h1>{escape(title)}</h1>\n{''.join(_article(line) for line in lines)}"
    return f"<!doctype html>\n<html><head>{head}</head>\n<body>{body}</body></html>\n"


def _article(line: dict[str, Any]) -> str:
    heading = escape(" ".join(part["text"] for part in line["prompt"] if "text" in part))
    given = "".join(f'<img alt="given" src="{_inline(Path(p["image"]))}">' for p in line["prompt"] if "image" in p)
    parts = [
        f"<p>{escape(part['text'])}</p>"
        if "text" in part
        else f'<img alt="{escape(part["image"])}" src="{escape(part["image"])}">'
        for part in line["segments"]
    ]
    return f"<article><h2>{heading} <small>#{line['sample']}</small></h2>{given}\n{''.join(parts)}</article>\n"


def _inline(path: Path) -> str:
    kind = path.suffix.lstrip(".").lower().replace("jpg", "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
