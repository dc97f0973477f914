"""Train a small promptable network on the answers of a large one, with or without labels.

    python recipes/distill.py recipes/configs/pretrain/distill.yaml teacher=turbo student=tiny \
        data=FOLDER

FOLDER holds scans alone, or a data set with labels. Of every scan a fixed number of crops is cut;
the teacher encodes each once, at its own spacing and crop, and is clicked in the body. Its
embedding, through a learned linear projection, and its masks are what the student learns, by the
loop of clicks of pretrain_promptable.py; where there are labels, these are objects, too. The
teacher's answers are kept in `cache=`, so that later epochs, runs and students need no teacher. The
same command resumes an interrupted run. The run's `last.safetensors` loads as
`sam(student, weights=FILE)` and states teacher, data and licence.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, PositiveInt
from sammed3d_backbone.recipes.pretrain_promptable import (
    FREE,
    SYNTHETIC,
    Fraction,
    Interactive,
    ScoredCrops,
    augmentation,
    banned_names,
    begin,
    choose_cases,
    make_interaction,
    make_network,
    require_unseen,
    save_weights,
    scan_source,
    scored_stream,
    train_objective,
    trained_before,
    training_of,
)

from sammed3d_backbone import config, console, sam
from sammed3d_backbone.clickbench.cases import read_click_set
from sammed3d_backbone.data.checks import pair_problems
from sammed3d_backbone.data.datasets import DatasetError, LabelledCase
from sammed3d_backbone.data.folders import folder_of
from sammed3d_backbone.data.geometry import TripleMm
from sammed3d_backbone.data.preparation import load_channels, load_image, load_label
from sammed3d_backbone.data.preprocessing import (
    SAM_MED3D,
    Modality,
    modality_of,
    preprocessing_of,
)
from sammed3d_backbone.inference.folder import ScanFiles, scans_in
from sammed3d_backbone.loading.hub import locate, sha256_of
from sammed3d_backbone.loading.opening import variant_for
from sammed3d_backbone.loading.registry import Weights
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.pretraining.answers import Answers, AnswerStream, objects_in, write_answer
from sammed3d_backbone.pretraining.imitation import Imitation
from sammed3d_backbone.pretraining.object_crops import Source, SyntheticSource
from sammed3d_backbone.pretraining.objective import Objective
from sammed3d_backbone.pretraining.sample_stream import InteractionPlan
from sammed3d_backbone.pretraining.synthetic import Synthesis, synthetic_sample
from sammed3d_backbone.pretraining.teacher import Teacher, answer_crop
from sammed3d_backbone.pretraining.views import (
    CropPlace,
    FieldOfView,
    RawScan,
    Variation,
    draw_places,
)
from sammed3d_backbone.provenance import strip_directory
from sammed3d_backbone.training.runs import runs_folder

CACHE = "teacher_answers"  # folder below SAMMED3D_RUNS
VARIANCE_CROPS = 32  # of which the variance of the teacher's channels is taken
FORMAT = 1  # version of the files; part of their names


@dataclass(frozen=True)
class Config(Interactive):
    """Arguments of the recipe."""

    teacher: str = "turbo"  # a name or file of a whole promptable network
    student: str = "tiny"  # a size
    data: str | None = None  # a folder of scans or a data set; or several as sources=
    sources: tuple[str, ...] = ()  # "synthetic", data sets, and folders of scans
    shares: tuple[float, ...] = ()  # relative frequency of each source; (): equal
    modality: Modality | None = None  # of scans in a plain folder; None: not known
    labels: bool = True  # False: labels are not used
    label_share: Fraction = 0.5  # share of the objects that are labels, where a crop has both
    crops: PositiveInt = 2000  # fixed crops, by shares=, and evenly over the scans of a source
    teacher_clicks: PositiveInt = 8  # clicks of the teacher on a crop
    stability: Fraction = 0.6  # of a mask of the teacher, see `pretraining.teacher.Teacher`
    embedding_weight: Annotated[float, Field(ge=0)] = 1.0  # weight relative to the clicks
    cache: str | None = None  # folder of the teacher's answers; None: below SAMMED3D_RUNS

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data is None) == (not self.sources):
            raise ValueError("give data=FOLDER with scans, or several as sources=, and not both")
        sources = self.sources or (self.data,)
        if self.shares and (len(self.shares) != len(sources) or min(self.shares) <= 0):
            raise ValueError(
                f"shares={[*self.shares]} of {len(sources)} sources; give each one above 0, or none"
            )

    @property
    def all_sources(self) -> dict[str, float]:
        """Folders and names of the data, and the share of each."""
        sources = self.sources if self.data is None else (self.data,)
        shares = self.shares or (1.0,) * len(sources)
        return {source: each / sum(shares) for source, each in zip(sources, shares, strict=True)}

    @property
    def variation(self) -> Variation:
        """How the crops of scans are varied."""
        return Variation(self.zoom, self.stretch, self.flips)


@dataclass(frozen=True)
class ScanEntry:
    """A scan of which crops are cut; a synthetic one is its seed, and has one crop."""

    id: str
    files: tuple[Path, ...]
    open: Callable[[], RawScan]
    modality: str = ""
    is_synthetic: bool = False

    def sha256(self) -> str:
        """A hash of its content."""
        hashes = [sha256_of(path) for path in self.files if path.is_file()]
        return sha256_text(f"{hashes or self.id}")


@dataclass(frozen=True)
class Scans:
    """The scans of a source, and its share of all crops."""

    name: str
    scans: Sequence[ScanEntry]
    share: float


def main(cfg: Config) -> dict[str, float]:
    """Distils or resumes; returns the scores of the last validation."""
    accelerator, schedule, run = begin(cfg, free=(*FREE, "cache"))
    network = make_network(cfg, cfg.student, warm_up=not run.checkpoints, say=accelerator.print)
    teacher = open_teacher(cfg, accelerator)
    record: Weights = teacher.network.pretrained_cfg
    lineage = {
        "name": record.name,
        "sha256": record.sha256,
        "licence": record.licence,
        "training": trained_before(cfg.teacher),
    }
    before = trained_before(cfg.weights)
    spacing_mm: TripleMm = (cfg.spacing_mm,) * 3
    x, y, z = network.img_size
    mine = replace(SAM_MED3D, spacing_mm=spacing_mm, statistics="volume", crop_vox=(x, y, z))
    student = FieldOfView.of(network, mine, spacing_mm)
    training, apart, validation = open_data(
        cfg, {"before": before, "teacher": lineage}, student, teacher
    )
    sources, unlabelled = (
        [answers_of(cfg, accelerator, student, teacher, each) for each in found]
        for found in (training, apart)
    )
    per_step = cfg.batch * cfg.accumulate * accelerator.num_processes
    stream = AnswerStream(
        sources,
        [each.share for each in training],
        objects=cfg.objects,
        steps=cfg.interactions,
        samples=cfg.steps * per_step,
        seed=(cfg.seed, 0),
        smallest_vox=cfg.smallest_vox[1],
        label_share=cfg.label_share,
        augment=augmentation((0.0, 0.0, 0.0)),  # flipped before the teacher saw it
        contrast_share=cfg.random_contrast,
        plan=InteractionPlan(cfg.graded, cfg.without_point),
        per_step=per_step,
    )
    scored: ScoredCrops = (
        scored_stream(cfg, validation, network)
        if validation
        else AnswerStream(
            unlabelled,
            [1.0] * len(unlabelled),
            objects=4,
            steps=1,
            samples=cfg.val_crops,
            seed=(cfg.seed, 1),
            smallest_vox=cfg.smallest_vox[1],
        )
    )
    some = torch.stack([stream[n]["embedding"] for n in range(min(VARIANCE_CROPS, len(stream)))])
    objective = Objective(
        make_interaction(cfg, network),
        imitation=Imitation(
            network.image_encoder.out_chans,
            teacher.network.image_encoder.out_chans,
            teacher.field.covers(student, student.tokens),
            float(some.transpose(0, 1).flatten(1).var(1).mean()),
        ),
        imitation_weight=cfg.embedding_weight,
    )
    seen = {each.name: [s.id for s in each.scans if not s.is_synthetic] for each in training}

    def save(path: Path, averaged: Sam3D, crops: int) -> None:
        about = {**training_of(cfg, seen, crops, before), "teacher": lineage}
        save_weights(
            path, averaged, cfg, cfg.student, seen, crops, about, recipe="distill", teacher=record
        )

    return train_objective(cfg, accelerator, schedule, run, objective, stream, scored, save)


def open_teacher(cfg: Config, accelerator: Accelerator) -> Teacher:
    """The teacher, with the hash of its file in its record.

    Raises:
        ValueError: If there are no such weights, or they lack a mask decoder.
    """
    network = sam(variant_for(cfg.teacher), weights=cfg.teacher).eval().requires_grad_(False)
    record: Weights = network.pretrained_cfg
    network.pretrained_cfg = replace(
        record, name=strip_directory(record.name), sha256=sha256_of(locate(cfg.teacher)[1])
    )
    preprocessing, notes = preprocessing_of(network)
    for note in notes:
        accelerator.print(note)
    return Teacher(
        network.to(accelerator.device),
        FieldOfView.of(network, preprocessing, (cfg.spacing_mm,) * 3),
        cfg.teacher_clicks,
        cfg.stability,
        cfg.smallest_vox[1],
        accelerator.autocast,
    )


def open_data(
    cfg: Config, before: Mapping[str, Any], student: FieldOfView, teacher: Teacher
) -> tuple[list[Scans], list[Scans], list[Source]]:
    """Scans to train on, scans without labels to score on, and labelled crops to score on.

    Agreement with the teacher is scored only where no source has labels.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If a folder holds no scans, is excluded, or a case is to be scored that start or
            teacher were trained on.
    """
    training: list[Scans] = []
    plain: list[Scans] = []
    validation: list[Source] = []
    for source, share in cfg.all_sources.items():
        if source == SYNTHETIC:
            scans = synthetic_scans(cfg, student, teacher, math.ceil(share * cfg.crops))
            training.append(Scans(source, scans, share))
            validation += [SyntheticSource()] * (not cfg.scored or source in cfg.scored)
        elif is_labelled(folder := folder_of(source)):
            name, mine, held_out = choose_cases(cfg, source)
            require_unseen(name, held_out, before)
            scans = [scan_of_case(entry, labels=cfg.labels) for entry in mine]
            training.append(Scans(name, scans, share))
            validation += [scan_source(cfg, name, held_out)] if held_out else []
        else:
            banned = banned_names(cfg, source, folder.name)
            found = [scan for scan in scans_in(folder) if scan.id.lower() not in banned]
            scans = [scan_of_files(scan, cfg.modality) for scan in found]
            scans.sort(key=lambda scan: sha256_text(f"{cfg.seed}:{scan.id}"))
            plain.append(Scans(folder.name, scans, share))
    if not plain and cfg.modality is not None:
        raise ValueError(
            f"modality={cfg.modality} is of scans without labels, and a data set names its own; "
            "leave it out"
        )
    apart: list[Scans] = []
    for each in plain:
        if len(each.scans) < (1 if validation else 2):
            raise ValueError(
                f"{each.name} holds {len(each.scans)} scans; give two or more, as one is for "
                "validation"
            )
        number = 0 if validation else max(1, min(cfg.val_cases, len(each.scans) // 2))
        training.append(replace(each, scans=each.scans[number:]))
        apart.append(replace(each, scans=each.scans[:number]))
    return training, [] if validation else apart, validation


def is_labelled(folder: Path) -> bool:
    """Whether a folder is a data set with labels; others hold scans alone.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; pass data=FOLDER with scans or a data set")
    try:
        read_click_set(folder)
    except FileNotFoundError:
        return False
    return True


def scan_of_case(entry: LabelledCase, *, labels: bool) -> ScanEntry:
    """A case of a data set."""
    case = entry.case

    def open_scan() -> RawScan:
        image = load_image(case)
        label = load_label(case) if labels else None
        if label and (problems := pair_problems(case.label, label, case.images[0], image)):
            raise DatasetError(f"{case.id} cannot be used:", problems)
        return RawScan.of(image, label, modality_of(entry.modality))

    files = (*case.images, *(case.label_files if labels else ()))
    return ScanEntry(case.id, files, open_scan, modality_of(entry.modality) or "")


def scan_of_files(scan: ScanFiles, modality: Modality | None) -> ScanEntry:
    """A scan of a plain folder."""
    files = tuple(
        file
        for path in scan.paths
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
    )
    return ScanEntry(
        scan.id,
        files,
        lambda: RawScan.of(load_channels(scan.paths), modality=modality),
        modality or "",
    )


def synthetic_scans(
    cfg: Config, student: FieldOfView, teacher: Teacher, number: int
) -> list[ScanEntry]:
    """So many synthetic volumes, which fill the view of both networks."""
    extent_mm = max(field.side_vox * max(field.spacing_mm) for field in (student, teacher.field))
    side_vox = math.ceil(extent_mm / cfg.spacing_mm)
    most = cfg.structures[1]
    how = Synthesis((min(3, most), most), cfg.smallest_vox[1])

    def scan(number: int) -> ScanEntry:
        def open_scan() -> RawScan:
            sample = synthetic_sample(seed, side_vox, how)
            return RawScan(
                sample.image[0],
                sample.labels[0] if cfg.labels else None,
                (cfg.spacing_mm,) * 3,
                is_normalised=True,
            )

        seed = int(np.random.default_rng((cfg.seed, 2, number)).integers(2**32))
        return ScanEntry(f"{seed} {side_vox} {how}", (), open_scan, is_synthetic=True)

    return [scan(number) for number in range(number)]


def answers_of(
    cfg: Config,
    accelerator: Accelerator,
    student: FieldOfView,
    teacher: Teacher,
    source: Scans,
) -> Answers:
    """The teacher's answers on all crops of a source; those that are missing are written.

    Raises:
        ValueError: If no crop has an object.
    """
    folder = Path(cfg.cache).expanduser() if cfg.cache else runs_folder() / CACHE
    name = source.name
    number = math.ceil(source.share * cfg.crops / len(source.scans))  # of each scan
    settings = {
        "format": FORMAT,
        "teacher": teacher.network.pretrained_cfg.sha256,
        "fields": [asdict(student), asdict(teacher.field)],
        "variation": asdict(cfg.variation),
        "labels": cfg.labels,
        "numbers": (cfg.teacher_clicks, cfg.stability, cfg.smallest_vox[1], cfg.seed),
        "precision": cfg.mixed_precision,
    }
    paths: list[Path] = []
    start = time.process_time()
    bar = console.progress_bar(
        source.scans, desc=f"teacher on {name}", unit="scan", shown=accelerator.is_main_process
    )
    for turn, entry in enumerate(bar):
        digest = sha256_text(json.dumps([settings, entry.sha256()], default=str))
        # The modality decides how intensities are treated; crops do not depend on it.
        named = sha256_text(digest + entry.modality) if entry.modality else digest
        mine = [folder / f"{named[:32]}-{n}.safetensors" for n in range(number)]
        paths += mine
        missing = [n for n, path in enumerate(mine) if objects_in(path) is None]
        if missing and turn % accelerator.num_processes == accelerator.process_index:
            answer_scan(cfg, entry, digest, {n: mine[n] for n in missing}, student, teacher)
    accelerator.wait_for_everyone()
    found = tuple(path for path in paths if objects_in(path))
    seconds = time.process_time() - start
    accelerator.print(
        f"{name}: {len(found)} of {len(paths)} crops have objects, {seconds:.0f} CPU s; in {folder}"
    )
    if not found:
        raise ValueError(f"no crop of {name} has an object; lower stability= or smallest_vox=")
    return Answers(name, found)


def answer_scan(
    cfg: Config,
    entry: ScanEntry,
    digest: str,
    missing: Mapping[int, Path],
    student: FieldOfView,
    teacher: Teacher,
) -> None:
    """Writes the teacher's answers on some crops of a scan, by number."""
    try:
        scan = entry.open()
    except ValueError as error:
        raise ValueError(f"{entry.id}: {error}") from None
    seed = int(digest, 16)
    smallest_vox = cfg.smallest_vox[1]
    if entry.is_synthetic:
        middle = [(n - 1) / 2 for n in scan.image.shape]
        places = [CropPlace(middle, (1.0, 1.0, 1.0))]
    else:
        rng = np.random.default_rng(seed)
        # The first places are the same, whatever the number.
        number = max(missing) + 1
        places = draw_places(rng, scan, student, number, cfg.variation, smallest_vox)
    for number, path in missing.items():
        rng = np.random.default_rng((seed, number))
        answer = answer_crop(rng, scan, places[number], student, teacher)
        write_answer(path, answer, smallest_vox)


def sha256_text(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    cfg, _ = config.parse(Config, description=__doc__)
    sys.exit(console.run_program(lambda: main(cfg), "distill"))
