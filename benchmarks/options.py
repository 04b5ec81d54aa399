"""Types of options, which refuse what would fail after minutes of timing."""

import argparse
import json
import math
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least 1, got {text}"
        )
    return int(text)


def seconds(text: str) -> float:
    """Reads a finite number above 0."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def output_file(text: str) -> Path:
    """Reads the name of a file that can be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write a file {path}")
    return path


def picture_file(text: str) -> Path:
    """Reads the name of a PNG file; the library that draws it must be installed."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, got {text}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise argparse.ArgumentTypeError("needs matplotlib") from error
    return output_file(text)


def write_json(report: dict[str, Any], path: Path | None) -> None:
    """Writes a report, where a file was asked for."""
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
