"""The result folder of a benchmark, written line by line; a run that was cut off is resumed.

    OUT/clicks.jsonl    a header, then one line per target, track and step; two runs are identical
        times.jsonl     seconds and peak memory of the same steps; these differ
        masks/          the last mask of every target and track

The clicks of a line can be replayed with another model; its scores are those of `scoring`. A run
that was cut off is resumed after its last complete target.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import file_name, inside, read_text, reading, write_text

FORMAT = 1  # version of the file; others are refused
Line = dict[str, Any]
Key = tuple[str, str, str]  # case, class, track


class Journal:
    """The result folder of one run, new or resumed.

    Raises:
        ValueError: If the folder holds results of another header, or its files are damaged.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], steps: int) -> None:
        self.folder = folder
        self._lines, self._times = folder / "clicks.jsonl", folder / "times.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        header = json.loads(json.dumps({"format": FORMAT, **header}))
        with reading(self._lines):
            earlier, kept = _whole_targets(self._lines, steps)
            self._done = {key_of(line) for line in kept}
            changed = sorted(k for k in {*earlier, *header} if earlier.get(k) != header.get(k))
        if earlier and changed:
            changes = ", ".join(f"{k} ({earlier.get(k)!r} -> {header.get(k)!r})" for k in changed)
            raise ValueError(f"{folder} holds results of another run: {changes}; choose another")
        with reading(self._times):
            times = [line for line in _read(self._times) if key_of(line) in self._done]
        write_text(self._lines, "".join(map(_dumped, [header, *kept])))
        write_text(self._times, "".join(map(_dumped, times)))

    def has(self, key: Key) -> bool:
        """Whether a target and track is complete."""
        return key in self._done

    def write(self, lines: Sequence[Line], times: Sequence[Line], mask: Volume | None) -> None:
        """All steps of one target and track."""
        if mask is not None:
            mask.save(mask_path(self.folder, lines[-1]))
        for path, new in ((self._times, times), (self._lines, lines)):
            with path.open("a", encoding="utf-8", newline="\n") as file:
                file.write("".join(map(_dumped, new)))
        self._done.add(key_of(lines[-1]))


def read_journal(folder: Path) -> tuple[Line, list[Line]]:
    """Header and lines of a result folder or of its clicks.jsonl.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its format is another one.
    """
    path = folder / "clicks.jsonl" if folder.is_dir() else folder
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; name a folder that sammed3d clicks --out has written")
    with reading(path):
        header, *lines = _read(path) or [{}]
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} has no header of format {FORMAT}; run the benchmark again")
        set(map(key_of, lines))
    return header, lines


def read_times(folder: Path) -> list[Line]:
    """The lines of times.jsonl; none where only clicks.jsonl exists."""
    return _read(folder / "times.jsonl")


def mask_path(folder: Path, line: Line) -> Path:
    """The file of the last mask of a line's target and track."""
    case, name, track = key_of(line)
    return inside(inside(folder / "masks", case), file_name(name), f".{track}.nii.gz")


def _whole_targets(path: Path, steps: int) -> tuple[Line, list[Line]]:
    """The header of an earlier run, and the lines of all targets that it completed."""
    header, *lines = _read(path) or [{}]
    counts: dict[Key, int] = {}
    for line in lines:
        counts[key_of(line)] = counts.get(key_of(line), 0) + (steps if "dropped" in line else 1)
    return header, [line for line in lines if counts[key_of(line)] == steps]


def _read(path: Path) -> list[Line]:
    """The lines of a file; one cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = read_text(path).splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _dumped(line: Mapping[str, Any]) -> str:
    return json.dumps(line) + "\n"


def key_of(line: Mapping[str, Any]) -> Key:
    """Case, class and track of a line."""
    return line["case"], line["class"], line["first"]
