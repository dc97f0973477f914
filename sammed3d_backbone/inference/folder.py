"""A folder of scans -> a folder of labels, with a manifest from which an interrupted run resumes.

In one process the next scan is read and the last one written while the network computes, one of
each at a time, so that memory does not grow with the number of scans.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from torch import Tensor
from tqdm import tqdm

from sammed3d_backbone.console import progress_bar
from sammed3d_backbone.data.formats import NRRD_SUFFIXES
from sammed3d_backbone.data.nifti import SUFFIXES
from sammed3d_backbone.data.preparation import load_channels
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import (
    atomic_path,
    file_name,
    inside,
    read_text,
    reading,
    without_folders,
    write_json,
)
from sammed3d_backbone.loading.hub import sha256_of
from sammed3d_backbone.parallel import workers
from sammed3d_backbone.provenance import library_versions, resident_bytes

Predict = Callable[[Volume], tuple[Volume, Tensor | None]]
# What one scan may raise without ending the run; torch raises RuntimeError.
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)
MANIFEST = "manifest.json"
IMAGES = (*SUFFIXES, *NRRD_SUFFIXES, ".mha", ".mhd")  # endings that make a file a scan
CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net's names: CASE_0000, CASE_0001, ...


@dataclass(frozen=True)
class ScanFiles:
    """The files of one scan: one per channel, or one file or DICOM folder that holds all."""

    id: str
    paths: tuple[Path, ...]

    def hashes(self) -> dict[str, str]:
        """File name -> SHA-256, of every file."""
        files = [
            file
            for path in self.paths
            for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
            if file.is_file()
        ]
        return {file.name: sha256_of(file) for file in files}


def is_one_scan(source: Path) -> bool:
    """Whether a path is a file, or a folder of DICOM files and nothing else."""
    return not source.is_dir() or not any(
        path.is_dir() or path.name.lower().endswith(IMAGES) for path in source.iterdir()
    )


def _stems(folder: Path) -> dict[str, Path]:
    """Name without its ending -> path, of all files and folders that hold scans."""
    stems: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        ending = next((s for s in IMAGES if path.name.endswith(s)), None)
        if ending is None and not path.is_dir():
            if path.name.lower().endswith(IMAGES):
                raise ValueError(f"{path} is not read; write the ending in lower case")
            continue
        stem = path.name.removesuffix(ending or "")
        if stem in stems:
            raise ValueError(f"{stems[stem]} and {path} would both be {stem}; rename one")
        stems[stem] = path
    return stems


def scans_in(folder: Path) -> list[ScanFiles]:
    """The scans of a folder, sorted by id.

    Files ``ID_0000.nii.gz``, ``ID_0001.nii.gz``, ... are the channels of one scan; a folder in it
    is a DICOM series.

    Raises:
        ValueError: If there is no scan, two have one id, a channel is missing, or an ending is in
            upper case.
    """
    stems = _stems(folder)
    grouped: dict[str, dict[int, Path]] = {}
    for stem, path in stems.items():
        channel = CHANNEL.fullmatch(stem)
        name, number = stem, 0
        if channel and f"{channel[1]}_0000" in stems:
            name, number = channel[1], int(channel[2])
        name = file_name(name)
        if number in (channels := grouped.setdefault(name, {})):
            raise ValueError(f"{channels[number]} and {path} would both be {name}; rename one")
        channels[number] = path
    for name, channels in grouped.items():
        if [*channels] != [*range(len(channels))]:
            raise ValueError(
                f"{folder}: {name} has the channels {[*channels]}; number them 0000, 0001, ... "
                "without gaps"
            )
    if not grouped:
        raise ValueError(f"{folder} holds no {', '.join(IMAGES)} and no folder; give a scan")
    return [ScanFiles(name, tuple(paths.values())) for name, paths in sorted(grouped.items())]


def predict_scans(
    predict: Predict,
    scans: Sequence[ScanFiles],
    target: Path,
    about: Mapping[str, Any],
    *,
    overwrite: bool,
    progress: bool,
    jobs: int = 1,
    backend: str | None = None,
) -> list[dict[str, Any]]:
    """Predicts scans; see `Segmenter.predict_folder`.

    Args:
        predict: Volume -> labels, and probabilities if they are to be written. With a back end or
            several jobs it is sent to other processes.
        scans: The scans that `scans_in` found.
        target: Folder of the results; exists.
        about: Identifies model and settings; an earlier run is resumed if it has the same.
        overwrite: Whether to replace other results.
        progress: Whether to show a progress bar.
        jobs: See `parallel.workers`.
        backend: See `parallel.workers`.
    """
    done = {} if overwrite else _finished(target, about, scans)
    entries = {scan.id: done[scan.id] for scan in scans if scan.id in done}
    pending = [scan for scan in scans if scan.id not in done]
    made: Iterable[dict[str, Any]] = _in_turn(predict, pending, target)
    if jobs != 1 or backend is not None:
        made = _by_workers(predict, pending, target, jobs, backend)
    bar = progress_bar(
        made,
        desc="predicting",
        unit="scan",
        total=len(scans),
        initial=len(done),
        shown=progress,
    )
    for entry in bar:
        if entry["error"] is not None:
            tqdm.write(f"{entry['id']} failed: {entry['error']}")
        entries[entry["id"]] = entry
        cases = [entries[name] for name in sorted(entries)]
        write_json(target / MANIFEST, {"versions": library_versions(), **about, "cases": cases})
    return [entries[scan.id] for scan in scans]


def _in_turn(
    predict: Predict, scans: Sequence[ScanFiles], target: Path
) -> Iterator[dict[str, Any]]:
    """The entries of scans that are predicted here, one after another."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        last: tuple[ScanFiles, float, Future[str]] | None = None
        for scan, reading in _read_ahead(reader, scans):
            began = time.monotonic()
            try:
                labels, probs = predict(reading.result())
            except FAILURES as error:
                failed: Future[str] = Future()
                failed.set_exception(error)
                yield _entry(scan, began, failed.result)
                continue
            if last is not None:
                yield _entry(*last[:2], last[2].result)
            last = (scan, began, writer.submit(_save, target / scan.id, labels, probs))
            del labels, probs, reading
        if last is not None:
            yield _entry(*last[:2], last[2].result)


def _by_workers(
    predict: Predict, scans: Sequence[ScanFiles], target: Path, jobs: int, backend: str | None
) -> Iterator[dict[str, Any]]:
    """The entries of scans that workers predict, as they come."""
    found = [
        ScanFiles(scan.id, tuple(path.resolve() for path in scan.paths)) for scan in scans
    ]  # a worker's current folder may be another
    with workers("loky" if backend is None else backend, jobs):
        tasks = (joblib.delayed(_predict_scan)(predict, scan, target.resolve()) for scan in found)
        yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(tasks)


def _predict_scan(predict: Predict, scan: ScanFiles, target: Path) -> dict[str, Any]:
    """The entry of a scan that is read, predicted and written here."""

    def made() -> str:
        labels, probs = predict(load_channels(scan.paths))
        return _save(target / scan.id, labels, probs)

    return _entry(scan, time.monotonic(), made)


def _entry(scan: ScanFiles, began: float, saved: Callable[[], str]) -> dict[str, Any]:
    """The entry of a scan in the manifest; `saved` returns the hash of its labels' file."""
    entry: dict[str, Any] = {"id": scan.id, "error": None}
    try:
        entry["files"] = scan.hashes()
        entry |= {"output": f"{scan.id}.nii.gz", "sha256": saved()}
    except FAILURES as error:
        entry["error"] = without_folders(str(error), scan.paths) or type(error).__name__
    entry["seconds"] = round(time.monotonic() - began, 2)
    entry["peak_memory_mb"] = round(resident_bytes("VmHWM") / 1e6)
    return entry


def _save(stem: Path, labels: Volume, probs: Tensor | None) -> str:
    """Writes the results of a scan; returns the hash of its labels' file."""
    path = stem.with_name(f"{stem.name}.nii.gz")
    labels.save(path)
    if probs is not None:
        with atomic_path(stem.with_name(f"{stem.name}.npz")) as draft:
            np.savez_compressed(draft, probabilities=probs.half().numpy())
    return sha256_of(path)


def _read_ahead(
    reader: ThreadPoolExecutor, scans: Sequence[ScanFiles]
) -> Iterator[tuple[ScanFiles, Future[Volume]]]:
    """Every scan with its volume, while the next one is being read."""
    waiting: list[tuple[ScanFiles, Future[Volume]]] = []
    for scan in scans:
        waiting.append((scan, reader.submit(load_channels, scan.paths)))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _finished(
    target: Path, about: Mapping[str, Any], scans: Sequence[ScanFiles]
) -> dict[str, dict[str, Any]]:
    """The entries of an earlier run whose outputs are there.

    Raises:
        FileExistsError: If there are outputs of another model, of other settings, of a scan that
            has changed since, or of unknown origin.
    """
    path = target / MANIFEST
    names = {f"{scan.id}.nii.gz" for scan in scans}
    if not path.is_file():
        if there := sorted(names & {entry.name for entry in target.iterdir()}):
            raise FileExistsError(
                f"{target / there[0]} exists; choose another folder, or pass --overwrite"
            )
        return {}
    with reading(path):
        earlier = json.loads(read_text(path))
        if any(earlier.get(key) != value for key, value in about.items()):
            raise FileExistsError(
                f"{path} is of another model or other settings; choose another folder, or pass "
                "--overwrite"
            )
        endings = (".nii.gz", ".npz") if about["settings"]["probabilities"] else (".nii.gz",)
        done = {
            entry["id"]: entry
            for entry in earlier["cases"]
            if entry["error"] is None
            and all(inside(target, entry["id"], ending).is_file() for ending in endings)
        }
        for scan in scans:
            if scan.id in done and scan.hashes() != done[scan.id]["files"]:
                raise FileExistsError(
                    f"{target / scan.id}.nii.gz is of another scan than {scan.paths[0]}, which has "
                    "changed since; choose another folder, or pass --overwrite"
                )
        return done
