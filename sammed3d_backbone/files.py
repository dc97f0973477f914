"""Small text files that are whole at any moment, whatever kills the process."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes or replaces a file; until it is complete, the earlier one stays."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
