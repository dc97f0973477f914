"""Train the promptable network by clicks, from scratch or from public weights on own data.

    python recipes/pretrain_promptable.py recipes/configs/pretrain/tiny.yaml
    accelerate launch recipes/pretrain_promptable.py CONFIG weights=turbo variant=vit_b lr=8e-5

The first click falls into the object, later ones where the mask is wrong, on one encoding per
volume; large objects in simple volumes come first. Other objectives (objectives=) can be
added or replace the clicks: dense labels, reconstruction of hidden patches, contrast. The same
command resumes an interrupted run. Everything is written to SAMMED3D_RUNS/<name>; its
`last.safetensors` loads as `sam(variant, weights=FILE)`, and curve.png shows the progress; both are
renewed at every validation.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
)
from pydantic import Field, NonNegativeInt, PositiveInt
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Subset

from sammed3d_backbone import config, console, sam
from sammed3d_backbone.clickbench.cases import read_click_set
from sammed3d_backbone.data.datasets import LabelledCase, few_subjects, read_fold
from sammed3d_backbone.data.folders import folder_of, read_dataset
from sammed3d_backbone.data.preprocessing import SAM_MED3D, modality_of
from sammed3d_backbone.data.singles import DESCRIPTION
from sammed3d_backbone.loading.checkpoint import read, write
from sammed3d_backbone.loading.hub import locate
from sammed3d_backbone.loading.registry import PretrainingSet, Weights, to_metadata
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.pretraining.click_loss import Interaction, dice_per_click
from sammed3d_backbone.pretraining.contrast import Contrast
from sammed3d_backbone.pretraining.curve import draw_training_curve
from sammed3d_backbone.pretraining.dense_labels import DenseLabels
from sammed3d_backbone.pretraining.init import init_weights, warm_up_decoder
from sammed3d_backbone.pretraining.object_crops import (
    Curriculum,
    LabelledScan,
    ObjectStream,
    ScanSource,
    Source,
    SyntheticSource,
    read_scan,
)
from sammed3d_backbone.pretraining.objective import Objective
from sammed3d_backbone.pretraining.reconstruction import Reconstruction
from sammed3d_backbone.pretraining.sample_stream import InteractionPlan
from sammed3d_backbone.provenance import cores, library_versions, settings_of_card, strip_directory
from sammed3d_backbone.training import engine, optim
from sammed3d_backbone.training.runs import Progress, Run, State, open_run

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]

SYNTHETIC = "synthetic"  # the source that needs no files
SCORED_CLICKS = (1, 3, 5)
OTHER_FIGURES = {"patch_error", "nearest_same"}  # figures of the other objectives
DECODER = ("prompt_encoder", "mask_decoder")  # parts that take the rate of the decoder


class ScoredCrops(Protocol):
    """Crops of a validation, by number."""

    sources: Sequence[Any]  # with a name each

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Pretraining:
    """Arguments of all pretraining: which crops of which cases, and the loop."""

    name: str  # the run's folder below SAMMED3D_RUNS
    sources: tuple[str, ...]  # "synthetic", and data sets or folders with a labels.json
    shares: tuple[float, ...]  # relative frequency of each source
    exclude: tuple[str, ...] = ()  # names of data sets to refuse and of cases to leave out
    held_out_folds: tuple[int, ...] = ()  # their validation cases are not used at all
    val_cases: NonNegativeInt = 6  # subjects of each data set that are held out for validation
    scored: tuple[str, ...] = ()  # sources used for validation; (): all
    val_crops: PositiveInt = 24  # crops per validation
    spacing_mm: Positive = 1.5  # spacing that the network is meant for
    zoom: Factor = 2.0  # largest random factor on the spacing, up and down
    stretch: Factor = 1.15  # the same for each axis separately
    flips: tuple[Fraction, Fraction, Fraction] = (0.5, 0.5, 0.5)  # probabilities along R, A, S
    random_contrast: Fraction = 0.0  # share of real crops whose contrast is randomised
    # Names without Left and Right; one class may have several, as "Kidney|kidney_left"
    dense_classes: tuple[str, ...] = ()
    smallest_vox: tuple[int, int] = (2000, 200)  # smallest objects at first and at last
    structures: tuple[int, int] = (5, 12)  # most per synthetic volume at first and at last
    steps: PositiveInt = 1000  # optimiser steps
    first_step: NonNegativeInt = 0  # where samples and schedule start, for a stopped run
    decay_steps: NonNegativeInt | None = None  # in which a constant rate falls to 0; None: cosine
    batch: PositiveInt = 1  # volumes per process and pass
    accumulate: PositiveInt = 1  # passes per step, gradients are averaged
    lr: Positive = 5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_steps: NonNegativeInt = 100
    clip: Positive = 1.0  # largest norm of the gradient
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    mixed_precision: Literal["no", "bf16"] = "no"  # of clicks, on a CPU for encoder and maps only
    validate_every: PositiveInt = 500  # steps
    log_every: PositiveInt = 10  # steps
    save_every_s: float = 300.0  # seconds between checkpoints
    workers: NonNegativeInt = 0  # processes that prepare samples
    threads: NonNegativeInt = 0  # CPU threads per process; 0: all cores, shared by the processes
    cpu: bool = False  # use the CPU even if there is a GPU
    seed: NonNegativeInt = 0


@dataclass(frozen=True)
class Interactive(Pretraining):
    """Arguments of all training by clicks."""

    weights: str | None = None  # a name or file of whole promptable networks; None: random
    decoder_warmup_steps: int = 0  # steps of `warm_up_decoder` before the training
    rel_pos: Literal["sammed3d", "axial"] | None = None  # None: the variant's, the weights'
    point_pos: Literal["swapped", "aligned"] | None = None  # None: the variant's, the weights'
    img_size: int | None = None  # side of the crops in voxels; None: the variant's, the weights'
    objects: int = 12  # per volume
    interactions: int = 4  # steps per object
    graded: int | None = None  # steps that are part of the loss, drawn at random; None: all
    deep_share: Fraction = 0.5  # share of clicks at the deepest place of an error; others at random
    without_point: Fraction = 0.0  # share of later steps that only refine the last mask
    clicks: Literal["newest", "all"] = "newest"  # clicks that a step is given
    balance: Fraction = 0.5  # 1: an object's voxels weigh as much as all others; 0: as one each
    quality_weight: float = 0.1  # weight of the predicted Dice in the loss
    optimizer: Literal["adamw", "muon"] = "adamw"
    decoder_lr: Positive = 1.0  # factor on lr for prompt encoder and mask decoder
    compiled: bool = False  # compile the encoder with torch.compile

    def __post_init__(self) -> None:
        counts = ("objects", "interactions")
        if low := [key for key in counts if getattr(self, key) < 1]:
            raise ValueError(f"{low[0]}={getattr(self, low[0])}; give 1 or more")
        if self.graded is not None and not 1 <= self.graded <= self.interactions:
            raise ValueError(
                f"graded={self.graded} of interactions={self.interactions}; give 1 to "
                f"{self.interactions}, or null for all"
            )


@dataclass(frozen=True)
class Config(Interactive):
    """Arguments of the recipe."""

    variant: str = "tiny"
    objectives: tuple[Literal["clicks", "dense", "reconstruction", "contrast"], ...] = ("clicks",)
    dense_weight: float = 1.0  # weight relative to the clicks
    hidden_share: Fraction = 0.6  # share of patches that are hidden for reconstruction
    reconstruction_weight: float = 1.0  # weight relative to the clicks
    contrast_weight: float = 1.0  # weight relative to the clicks
    curriculum_steps: int = 0  # steps from the first to the last of these; 0: last from the start


# Arguments that may change when a run is resumed, since no result depends on them.
FREE = ("threads", "workers", "cpu", "save_every_s")


def main(cfg: Config) -> dict[str, float]:
    """Trains or resumes; returns the scores of the last validation."""
    accelerator, schedule, run = begin(cfg)
    network = make_network(cfg, cfg.variant, warm_up=not run.checkpoints, say=accelerator.print)
    side_vox = network.img_size[0]
    before = trained_before(cfg.weights)
    training, validation, seen = open_sources(cfg, before)
    per_step = cfg.batch * cfg.accumulate * accelerator.num_processes
    stream = ObjectStream(
        training,
        cfg.shares,
        side_vox,
        Curriculum(cfg.smallest_vox, cfg.structures, cfg.curriculum_steps * per_step),
        objects=cfg.objects,
        steps=cfg.interactions,
        samples=cfg.steps * per_step,
        seed=(cfg.seed, 0),
        augment=augmentation(cfg.flips),
        patches=math.prod(network.image_encoder.grid),
        classes=len(cfg.dense_classes),
        contrast_share=cfg.random_contrast,
        plan=InteractionPlan(cfg.graded, cfg.without_point),
        per_step=per_step,
    )

    def mine(crops: int) -> dict[str, Any]:
        return training_of(cfg, seen, crops, before, with_clicks="clicks" in cfg.objectives)

    return train_objective(
        cfg,
        accelerator,
        schedule,
        run,
        make_objective(cfg, network),
        stream,
        scored_stream(cfg, validation, network),
        lambda path, averaged, crops: save_weights(
            path, averaged, cfg, cfg.variant, seen, crops, mine(crops)
        ),
    )


def begin(cfg: Pretraining, free: Sequence[str] = FREE) -> tuple[Accelerator, engine.Schedule, Run]:
    """The accelerator, the numbers of the run, and its folder; says the configuration.

    Args:
        cfg: Configuration of the run.
        free: Keys that may change when it is resumed.
    """
    accelerator = engine.make_accelerator(
        accumulate=cfg.accumulate, mixed_precision=cfg.mixed_precision, cpu=cfg.cpu
    )
    torch.set_num_threads(cfg.threads or max(1, cores() // accelerator.num_processes))
    say = accelerator.print
    schedule = engine.Schedule(
        steps=cfg.steps,
        validate_every=cfg.validate_every,
        lr=cfg.lr,
        warmup_steps=cfg.warmup_steps,
        clip=cfg.clip,
        log_every=cfg.log_every,
        save_every_s=cfg.save_every_s,
        seed=cfg.seed,
        first_step=cfg.first_step,
        decay_steps=cfg.decay_steps,
    )
    run = open_run(cfg.name, cfg, free=free, writes=accelerator.is_main_process, say=say)
    say(f"{config.dump(cfg)}config digest: {config.digest(cfg, leave_out=('name', *free))}")
    return accelerator, schedule, run


def train_objective(
    cfg: Interactive,
    accelerator: Accelerator,
    schedule: engine.Schedule,
    run: Run,
    objective: Objective,
    stream: Dataset[dict[str, Tensor]],
    scored: ScoredCrops,
    save: Callable[[Path, Sam3D, int], None],
) -> dict[str, float]:
    """Trains a network by the losses of an objective, or resumes; see `train`.

    Args:
        cfg: Configuration of the run.
        accelerator: The one that `begin` returned, as are `schedule` and `run`.
        schedule: The numbers of the run.
        run: Its folder.
        objective: The losses, with the network.
        stream: Crops by number.
        scored: Crops for the validation.
        save: Writes the averaged network to a path, given the number of crops so far.
    """
    parts = nn.ModuleDict(dict(objective.network.named_children()))
    # Always in this order, since checkpoints number the optimiser's parameters.
    for name in ("reconstruction", "contrast", "dense", "imitation"):
        if (part := getattr(objective, name)) is not None:
            parts[name] = part
    scales = {name: cfg.decoder_lr if name in DECODER else 1.0 for name in parts}
    optimizer = optim.part_scaled(parts, scales, weight_decay=cfg.weight_decay, name=cfg.optimizer)
    accelerator.print(optim.describe(parts, optimizer, cfg.lr))
    means = engine.Means(accelerator)

    def step(model: nn.Module, batch: engine.Batch) -> Tensor:
        loss, figures = model(batch)
        means.note(figures)
        total: Tensor = loss
        return total

    return train(
        cfg,
        accelerator,
        schedule,
        run,
        objective,
        optimizer,
        stream,
        step,
        means,
        lambda averaged: validate(accelerator, averaged, scored, cfg.clicks),
        lambda path, averaged, crops: save(path, averaged.network, crops),
    )


def train(
    cfg: Pretraining,
    accelerator: Accelerator,
    schedule: engine.Schedule,
    run: Run,
    network: nn.Module,
    optimizer: Optimizer,
    stream: Dataset[dict[str, Tensor]],
    step: engine.Step,
    means: engine.Means,
    validate: Callable[[Any], dict[str, float]],
    save: Callable[[Path, Any, int], None],
) -> dict[str, float]:
    """The loop: trains or resumes, and at every stop validates, saves and draws.

    Args:
        cfg: Configuration of the run.
        accelerator: The one that `begin` returned, as are `schedule` and `run`.
        schedule: The numbers of the run.
        run: Its folder.
        network: Is trained, with everything else that has weights.
        optimizer: The optimiser of its weights.
        stream: Crops by number.
        step: Loss of a batch.
        means: Figures that `step` notes.
        validate: Scores the network with averaged weights; has an entry ``mean_dice``.
        save: Writes it to a path, given the number of crops so far.
    """
    ema = ModelEmaV3(network, decay=cfg.ema_decay, use_warmup=True)
    model, optimizer = accelerator.prepare(network, optimizer)
    ema.to(accelerator.device)
    progress = Progress(accelerator.num_processes, step=cfg.first_step)
    state = State(model, optimizer, ema, progress)
    per_step = cfg.batch * cfg.accumulate * accelerator.num_processes
    # Not before data and weights are there: what fails earlier leaves nothing.
    with run.begun(cfg):
        accelerator.wait_for_everyone()
        run.resume(accelerator, state)
        rest = Subset(stream, range(progress.step * per_step, cfg.steps * per_step))
        loader = accelerator.prepare(DataLoader(rest, cfg.batch, num_workers=cfg.workers))
        batches = iter(loader)
        scores: dict[str, float] = {}
        shown = accelerator.is_main_process
        with console.progress_bar(
            desc=cfg.name, unit="step", total=cfg.steps, initial=progress.step, shown=shown
        ) as bar:
            while progress.step < cfg.steps:
                steps = schedule.next_stop(progress.step) - progress.step
                some = islice(batches, steps * cfg.accumulate)
                engine.train(accelerator, step, state, some, run, schedule, bar, means.taken)
                scores = validate(ema.module)
                bar.write(f"step {progress.step}: {scores}")
                run.record(step=progress.step, **scores)
                progress.scored(scores["mean_dice"])
                if accelerator.is_main_process:
                    save(run.folder / "last.safetensors", ema.module, progress.step * per_step)
                    with console.optional(run.folder / "curve.png"):
                        draw_training_curve(run.folder / "curve.png", run.records())
                run.save(accelerator, state)
        return scores


def make_network(
    cfg: Interactive, variant: str, *, warm_up: bool, say: Callable[[str], object]
) -> Sam3D:
    """The network that the training starts from."""
    torch.manual_seed(cfg.seed)
    network = sam(
        variant,
        pretrained=cfg.weights is not None,
        weights=cfg.weights,
        img_size=cfg.img_size,
        rel_pos=cfg.rel_pos,
        point_pos=cfg.point_pos,
    )
    if cfg.weights is None:
        init_weights(network)
        if cfg.decoder_warmup_steps and warm_up:
            soft_dice = warm_up_decoder(network, cfg.decoder_warmup_steps)
            say(f"balls around clicks after the warm-up of the decoder: soft Dice {soft_dice:.3f}")
    if cfg.compiled:
        network.image_encoder.compile()
    return network


def scored_stream(
    cfg: Interactive, apart: Sequence[Source], network: Sam3D, *, part: int = 1
) -> ObjectStream:
    """The crops of held-out cases on which a network is scored.

    Args:
        cfg: Configuration of the run.
        apart: Validation sources, drawn equally often.
        network: The network that is scored.
        part: Selects a set of crops; 0 is used by the training.
    """
    return ObjectStream(
        apart,
        [1.0] * len(apart),
        network.img_size[0],
        Curriculum(cfg.smallest_vox, cfg.structures, 0),
        objects=4,
        steps=1,
        samples=cfg.val_crops,
        seed=(cfg.seed, part),
        patches=math.prod(network.image_encoder.grid),
    )


def make_interaction(cfg: Interactive, network: Sam3D) -> Interaction:
    """The loss of clicks."""
    return Interaction(
        network,
        clicks=cfg.clicks,
        deep_share=cfg.deep_share,
        balance=cfg.balance,
        quality_weight=cfg.quality_weight,
    )


def make_objective(cfg: Config, network: Sam3D) -> Objective:
    """The losses that the configuration names."""
    image_encoder = network.image_encoder
    return Objective(
        make_interaction(cfg, network),
        with_clicks="clicks" in cfg.objectives,
        reconstruction=(
            Reconstruction(image_encoder, cfg.hidden_share)
            if "reconstruction" in cfg.objectives
            else None
        ),
        contrast=Contrast(image_encoder) if "contrast" in cfg.objectives else None,
        dense=(
            DenseLabels(image_encoder.out_chans // 8, len(cfg.dense_classes))
            if "dense" in cfg.objectives
            else None
        ),
        reconstruction_weight=cfg.reconstruction_weight,
        contrast_weight=cfg.contrast_weight,
        dense_weight=cfg.dense_weight,
    )


def trained_before(weights: str | None) -> dict[str, Any] | None:
    """The training record of an earlier run in its weights; None if there is none."""
    if weights is None:
        return None
    _, metadata = read(locate(weights)[1])
    before: dict[str, Any] | None = json.loads(metadata.get("training", "null"))
    return before


def open_sources(
    cfg: Pretraining, before: Mapping[str, Any] | None
) -> tuple[list[Source], list[Source], dict[str, list[str]]]:
    """Training sources, validation sources, and the ids of the training cases by data set.

    Raises:
        ValueError: If a source is excluded, or a case that was trained on before is to be scored.
    """
    training: list[Source] = []
    scored: list[Source] = []
    seen: dict[str, list[str]] = {}
    for source in cfg.sources:
        if source == SYNTHETIC:
            training.append(SyntheticSource())
            if not cfg.scored or SYNTHETIC in cfg.scored:
                scored.append(SyntheticSource())
            seen[SYNTHETIC] = []
            continue
        name, mine, apart = choose_cases(cfg, source)
        require_unseen(name, apart, before)
        if mine:
            training.append(scan_source(cfg, name, mine, cfg.zoom, cfg.stretch))
        if apart:
            scored.append(scan_source(cfg, name, apart))
        seen[name] = [entry.case.id for entry in mine]
    return training, scored, seen


def require_unseen(
    name: str, apart: Sequence[LabelledCase], before: Mapping[str, Any] | None
) -> None:
    """Refuses to score cases that an earlier stage was trained on."""
    if known := {entry.case.id for entry in apart} & cases_before(before, name):
        raise ValueError(
            f"{min(known)} of {name} is held out for validation, but the weights were trained "
            "on it; give seed=, val_cases= and held_out_folds= of their run"
        )


def scan_source(
    cfg: Pretraining,
    name: str,
    cases: Sequence[LabelledCase],
    zoom: float = 1.0,
    stretch: float = 1.0,
) -> ScanSource:
    """Cases, opened, as a source of crops."""
    scans = [_scan_of(entry, cfg.dense_classes) for entry in cases]
    return ScanSource(name, scans, cfg.spacing_mm, zoom=zoom, stretch=stretch)


def _scan_of(entry: LabelledCase, dense_classes: Sequence[str]) -> LabelledScan:
    """A case with the numbers of its dense classes, and those that are annotated in it."""
    number_of = {
        name: number
        for number, names in enumerate(dense_classes, start=1)
        for name in names.split("|")
    }
    plain = {
        value: name.removeprefix("Left").removeprefix("Right")
        for value, name in (entry.labels or {}).items()
    }
    classes = {value: number_of[name] for value, name in plain.items() if name in number_of}
    drawn = {
        value
        for value, name in (entry.labels or {}).items()
        if entry.case.annotated is None or name in entry.case.annotated
    }
    # A class of two sides is known only if both are annotated.
    known = {
        number
        for number in classes.values()
        if all(value in drawn for value, other in classes.items() if other == number)
    }
    return read_scan(
        entry.case, SAM_MED3D.intensity_mode(modality_of(entry.modality)), classes, known
    )


def cases_before(before: Mapping[str, Any] | None, name: str) -> set[str]:
    """The cases of a data set that any earlier stage was trained on, or its teacher."""
    if before is None:
        return set()
    found = {*before.get("cases", {}).get(name, ())}
    for earlier in (before.get("before"), before.get("teacher", {}).get("training")):
        found |= cases_before(earlier, name)
    return found


def choose_cases(
    cfg: Pretraining, source: str
) -> tuple[str, list[LabelledCase], list[LabelledCase]]:
    """The name of a data set, its training cases, and its held-out cases.

    Folders with a labels.json are used for training only. Subjects are never on both sides.
    """
    folder = folder_of(source)
    found = read_click_set(folder)
    banned = banned_names(cfg, source, found.name)
    cases = [c for c in found.cases if not {c.case.id.lower(), c.case.subject.lower()} & banned]
    if (folder / DESCRIPTION).is_file():
        return found.name, cases, []
    dataset = read_dataset(folder)
    held_out = {name for fold in cfg.held_out_folds for name in read_fold(dataset, fold).val}
    cases = [c for c in cases if c.case.id not in held_out]
    apart: set[str] = set()
    if cfg.val_cases and (not cfg.scored or source in cfg.scored):
        apart.update(few_subjects(dataset, [c.case.id for c in cases], cfg.val_cases, cfg.seed))
    return (
        found.name,
        [c for c in cases if c.case.id not in apart],
        [c for c in cases if c.case.id in apart],
    )


def banned_names(cfg: Pretraining, source: str, name: str) -> set[str]:
    """Names in small letters of the cases and subjects to leave out.

    Raises:
        ValueError: If the source itself, whose data set has that name, is to be refused.
    """
    banned = {each.lower() for each in cfg.exclude}
    if hit := {name.lower(), *source.lower().split("/")} & banned:
        raise ValueError(
            f"{source} is refused, since exclude= names {min(hit)}; leave it out of sources="
        )
    return banned


def augmentation(flips: Sequence[float] = (0.5, 0.5, 0.5)) -> Compose:
    """Random changes that keep the meaning of the labels."""
    return Compose(
        [
            *(
                RandFlipd(["image", "label"], prob=prob, spatial_axis=axis)
                for axis, prob in enumerate(flips)
            ),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.6, 1.7), invert_image=True),
            RandScaleIntensityd("image", prob=0.3, factors=0.3),
            RandGaussianSmoothd("image", prob=0.15),
            RandGaussianNoised("image", prob=0.3, std=0.2),
        ]
    )


def validate(
    accelerator: Accelerator,
    objective: Objective,
    crops: ScoredCrops,
    clicks: Literal["newest", "all"],
) -> dict[str, float]:
    """Mean Dice after the scored clicks on fixed crops, in all and by source.

    The figures of the other objectives are added.
    """
    objective.eval()
    network = objective.network
    mine = []
    for number in range(accelerator.process_index, len(crops), accelerator.num_processes):
        crop = {key: value.to(accelerator.device) for key, value in crops[number].items()}
        with accelerator.autocast(), torch.no_grad():
            dice = dice_per_click(
                network, crop["image"], crop["objects"], max(SCORED_CLICKS), given=clicks
            )
            errors: dict[str, float] = {}
            if objective.reconstruction is not None or objective.contrast is not None:
                _, figures = objective({key: value[None] for key, value in crop.items()})
                errors = {key: float(figures[key]) for key in OTHER_FIGURES & figures.keys()}
        name = crops.sources[int(crop["source"])].name
        mine.append((number, name, dice.mean(0).tolist(), errors))
    rows = sorted(gather_object(mine))
    scores = {}
    for number in SCORED_CLICKS:
        of = [(name, dice[number - 1]) for _, name, dice, _ in rows]
        scores[f"dice_{number}"] = float(np.mean([dice for _, dice in of]))
        for name in sorted({name for name, _ in of}):
            scores[f"dice_{number}_{name}"] = float(np.mean([d for n, d in of if n == name]))
    for name in rows[0][3]:
        scores[name] = float(np.mean([errors[name] for *_, errors in rows]))
    return {"mean_dice": scores[f"dice_{max(SCORED_CLICKS)}"], **scores}


def save_weights(
    path: Path,
    network: Sam3D,
    cfg: Interactive,
    variant: str,
    seen: Mapping[str, list[str]],
    volumes: int,
    training: Mapping[str, Any],
    *,
    recipe: str = "pretrain_promptable",
    teacher: Weights | None = None,
) -> None:
    """Writes the network as weights that `sam` and `encoder` load, with a complete record.

    `held_out` is that of the first stage; data sets that a later stage adds count as seen.

    Args:
        path: File to write.
        network: The network.
        cfg: Configuration of the run.
        variant: Its size.
        seen: Ids of the training cases by data set.
        volumes: Number of training crops.
        training: Result of `training_of`.
        recipe: Name of the script that trained it.
        teacher: Record of the weights that the network was distilled from; None for none.
    """
    sources: list[Weights] = [w for w in (network.pretrained_cfg, teacher) if w is not None]
    stages = {entry.name: entry.stages for w in sources for entry in w.pretraining or ()}
    stage = 1 + max((max(numbers) for numbers in stages.values()), default=0)
    for name in seen:
        stages[name] = (*stages.get(name, ()), stage)
    undisclosed = [w.undisclosed_sets for w in sources]
    x, y, z = network.img_size
    record = Weights(
        name=cfg.name,
        variant=variant,
        filename=path.name,
        licence=None if teacher is None else teacher.licence,
        rel_pos=network.image_encoder.rel_pos,
        point_pos=network.prompt_encoder.point_pos,
        clicks=cfg.clicks,
        preprocessing=dataclasses.replace(
            SAM_MED3D,
            spacing_mm=(cfg.spacing_mm,) * 3,
            statistics="volume",
            crop_vox=(x, y, z),
        ),
        pretraining=tuple(PretrainingSet(name, numbers) for name, numbers in stages.items()),
        held_out=tuple(
            name
            for name in (sources[0].held_out if sources else cfg.exclude)
            if all(name in w.held_out for w in sources)
        ),
        undisclosed_sets=None if None in undisclosed else max(undisclosed, default=0),
        distilled_from=None if teacher is None else f"{teacher.name} (sha256 {teacher.sha256})",
        citation=None if teacher is None else teacher.citation,
        status=f"trained by recipes/{recipe}.py on {volumes} crops",
    )
    entries = {**to_metadata(record), "training": json.dumps(training)}
    write(path, network.state_dict(), entries, overwrite=True)


def training_of(
    cfg: Interactive,
    seen: Mapping[str, list[str]],
    volumes: int,
    before: Mapping[str, Any] | None,
    *,
    with_clicks: bool = True,
) -> dict[str, Any]:
    """The training record of a network: settings, cases, numbers of crops and clicks.

    Args:
        cfg: Configuration of the run.
        seen: Ids of the training cases by data set.
        volumes: Number of training crops.
        before: Training record of the initial weights.
        with_clicks: Whether it was trained by clicks.
    """
    objects = volumes * cfg.objects if with_clicks else 0
    return {
        "config": settings_of_card(dataclasses.asdict(cfg)),
        "cases": seen,
        "crops": volumes,
        "objects": objects,
        "most_clicks": objects * cfg.interactions,
        "initial_weights": (
            "random initialisation" if cfg.weights is None else strip_directory(cfg.weights)
        ),
        "before": before,
        "versions": library_versions(),
    }


if __name__ == "__main__":
    cfg, _ = config.parse(Config, description=__doc__)
    sys.exit(console.run_program(lambda: main(cfg), "pretrain_promptable"))
