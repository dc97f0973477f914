"""Fine-tune UNETR or another decoder on a 3-D encoder, score it on the original grid, draw it.

    python recipes/finetune_unetr.py recipes/configs/hippocampus.yaml
    accelerate launch recipes/finetune_unetr.py recipes/configs/hippocampus.yaml fold=1 lr=5e-4

With --dry-run it checks everything and measures the cost. The same command resumes a run that was
stopped. Everything lies in SAMMED3D_RUNS/<name>; recipes/accelerate/ is for GPUs and several
machines; recipes/studies/arms.py is the same training with the arguments that only studies need.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from sammed3d_backbone import config, console
from sammed3d_backbone.data.crops import CropStream
from sammed3d_backbone.data.datasets import Dataset, Fold, read_fold
from sammed3d_backbone.data.folders import open_dataset
from sammed3d_backbone.data.limits import GRID_TOLERANCE
from sammed3d_backbone.data.preparation import prepare_cases
from sammed3d_backbone.evaluation.scores import summarise_scores
from sammed3d_backbone.inference.card import MAX_OVERLAP
from sammed3d_backbone.inference.segmenter import Segmenter
from sammed3d_backbone.provenance import cores
from sammed3d_backbone.training import engine, finetuning, optim
from sammed3d_backbone.training.augmentation import Kind, augmentation
from sammed3d_backbone.training.dry_run import DryRun
from sammed3d_backbone.training.freezing import set_frozen
from sammed3d_backbone.training.losses import multi_scale_dice_ce
from sammed3d_backbone.training.runs import Progress, State, open_run
from sammed3d_backbone.training.validation import validate

CLIP_NORM = 1.0  # largest norm of all gradients together
EMA_DECAY = 0.999  # less during the first 30,000 steps, see timm's ModelEmaV3
SAVE_EVERY_S = 300.0  # seconds between checkpoints
WEIGHT_DECAY = 0.05
LAYER_DECAY = 0.75  # factor on lr per pretrained encoder block, from the last one down
# Keys that may change when a run is resumed: they say where, how fast and how strictly, not what.
FREE = ("cache", "threads", "workers", "cpu", "checkpointing", "grid_tolerance")
DRY_RUN = "check everything, measure what the run costs, and write nothing"

PositiveRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Config:
    """The knobs. `config.load` and `config.build` check the values."""

    name: str  # folder of the run below SAMMED3D_RUNS
    # Data
    data: str  # folder of the data set, or its name below SAMMED3D_DATA
    layout: str | None = None  # YAML file that describes the folder, relative to recipes/
    subjects: str | None = None  # JSON file, case -> subject, relative to recipes/
    grid_tolerance: Fraction = GRID_TOLERANCE  # between image and label, as a share of a voxel
    # of splits.json or the published split; else of `folds` random ones by subject; all: one after
    # another, with one report and an ensemble
    fold: NonNegativeInt | Literal["all"] = 0
    folds: PositiveInt = 5
    # Model
    model: str = "unetr"  # a name in adapters/registry.py, or basicunet: MONAI's, no encoder
    feature_size: PositiveInt | None = None  # channels at full resolution; None: the weights', 16
    variant: str = "tiny"
    weights: str | None = None  # a name, a file, hf-hub:OWNER/REPO; None: the variant's default
    transfer: Literal["whole", "encoder"] = "whole"  # whether weights' UNETR decoder is loaded too
    scratch: bool = False  # random initialisation, and no layer decay
    init: str | None = None  # fine-tuned model of the same classes to continue from
    freeze: Literal["encoder"] | NonNegativeInt = 0  # encoder: for good; N: for the first N steps
    # Preprocessing; None leaves a field to the weights, see data/preprocessing.py
    spacing_mm: tuple[float, float, float] | None = None  # [0, 0, 0]: that of each scan
    intensity: str | None = None  # see data/intensity.py
    statistics: Literal["crop", "volume"] | None = None  # voxels behind mean and deviation
    crop_vox: PositiveInt | None = None  # side of the crop in voxels
    # Training
    on_foreground: Fraction = 0.5  # share of crops centred on a labelled voxel
    foreground_weight: PositiveRate = 1.0  # weight of a labelled voxel in the cross-entropy
    flip_axes: tuple[Literal[0, 1, 2], ...] = ()  # 0 left-right, 1 back-front, 2 feet-head
    strong: tuple[Kind, ...] = ()  # as strong as nnU-Net's, see training/augmentation.py
    steps: PositiveInt = 1000  # optimiser steps
    batch: PositiveInt = 2  # crops per process and pass
    accumulate: PositiveInt = 1  # passes per step, whose gradients are averaged
    lr: PositiveRate | None = None  # rate of the decoder; None: 3e-4, or 1e-3 with scratch
    warmup_steps: NonNegativeInt = 50
    mixed_precision: Literal["no", "bf16"] = "no"
    checkpointing: bool = False  # recompute blocks in the backward pass to save memory
    compiled: bool = False  # torch.compile: minutes at the start, then faster steps
    validate_every: PositiveInt = 250  # steps; ten lines of the log in between
    seed: NonNegativeInt = 0
    # Prediction
    overlap: Annotated[float, Field(ge=0, le=MAX_OVERLAP)] = (
        0.5  # share that sliding windows overlap
    )
    keep_largest_component: bool = False  # per class: for organs, not lesions
    # Machine
    cache: str | None = None  # folder that keeps prepared cases for the next start; None: memory
    workers: NonNegativeInt | None = None  # processes that make crops; None: by the machine
    threads: NonNegativeInt = 0  # CPU threads per process; 0: all cores, shared by the processes
    cpu: bool = False  # even where there is a GPU

    def __post_init__(self) -> None:
        if self.scratch and self.weights is not None:
            raise ValueError(
                f"weights={self.weights} with scratch=true, which is random initialisation; leave "
                "out one of them"
            )
        if self.init is not None and self.weights is not None:
            raise ValueError(
                f"init={self.init} with weights={self.weights}, which it would replace; leave out "
                "one of them"
            )
        if self.freeze != "encoder" and self.freeze >= self.steps:
            raise ValueError(
                f"freeze={self.freeze}, steps={self.steps}; give fewer steps, or freeze=encoder to "
                "freeze it for good"
            )
        if len({*self.flip_axes}) < len(self.flip_axes):
            raise ValueError(f"flip_axes={list(self.flip_axes)}; name each axis once")
        if self.model == "basicunet" and (self.checkpointing or self.freeze or self.weights):
            raise ValueError(
                "model=basicunet has no encoder; leave out weights=, freeze= and checkpointing=, "
                "or take model=unetr"
            )


def main(
    cfg: Config,
    *,
    dry_run: bool = False,
    draw: Callable[[Dataset, Fold], Fold] | None = None,
    layer_decay: float = LAYER_DECAY,
    build: finetuning.Build = finetuning.build_model,
) -> dict[str, Any]:
    """Trains or resumes, evaluates, draws.

    Args:
        cfg: The configuration.
        dry_run: Measure up to three steps; download and write nothing.
        draw: Chooses other cases to train and validate on than the fold's; for studies.
        layer_decay: Factor on the learning rate per pretrained block.
        build: Builds the network, as `finetuning.build_model` does; for controls of studies.

    Returns:
        The scores; of a dry run the cost.
    """
    first_steps = cfg.freeze if isinstance(cfg.freeze, int) else 0  # without the encoder
    accelerator = engine.make_accelerator(
        accumulate=cfg.accumulate,
        mixed_precision=cfg.mixed_precision,
        cpu=cfg.cpu,
        partly_frozen=first_steps > 0,
    )
    is_main = accelerator.is_main_process
    say = accelerator.on_main_process(tqdm.write)
    threads = cfg.threads or max(1, cores() // accelerator.num_processes)
    torch.set_num_threads(threads)
    schedule = engine.Schedule(
        steps=cfg.steps,
        validate_every=cfg.validate_every,
        lr=cfg.lr or (1e-3 if cfg.scratch else 3e-4),
        warmup_steps=cfg.warmup_steps,
        freeze_steps=first_steps,
        clip=CLIP_NORM,
        log_every=max(1, cfg.validate_every // 10),
        save_every_s=SAVE_EVERY_S,
        seed=cfg.seed,
    )
    run = open_run(cfg.name, cfg, free=FREE, writes=is_main and not dry_run, say=say)
    say(f"{config.dump(cfg)}config digest: {config.digest(cfg, leave_out=('name', *FREE))}")
    cost = DryRun(accelerator.device, cfg.steps) if dry_run else None

    # Data
    dataset, fold = choose_cases(cfg, draw)
    say(f"{dataset.name}: {len(fold.train)} cases to train on, {len(fold.val)} to validate on")
    say(f"fold {cfg.fold} of {fold.rule}")

    # Model
    torch.manual_seed(cfg.seed)
    network, card = finetuning.start_network(
        cfg, dataset, fold, build=build, downloads=not dry_run, say=say
    )

    # Crops
    prepared = prepare_cases(
        dataset,
        (*fold.train, *fold.val),  # together, so that all problems are reported at once
        card.preprocessing,
        cache=None if cfg.cache is None or dry_run else Path(cfg.cache).expanduser(),
        jobs=threads,
        progress=is_main,
    )
    train, val = prepared[: len(fold.train)], prepared[len(fold.train) :]
    per_step = cfg.batch * cfg.accumulate * accelerator.num_processes
    crops = CropStream(
        train,
        card.preprocessing,
        samples=cfg.steps * per_step,
        seed=cfg.seed,
        on_foreground=cfg.on_foreground,
        augment=augmentation(cfg.flip_axes, cfg.strong),
    )

    # Optimiser: layer decay protects what was pretrained
    optimizer = optim.layer_decayed(
        network, layer_decay=1.0 if cfg.scratch else layer_decay, weight_decay=WEIGHT_DECAY
    )
    ema = ModelEmaV3(network, decay=EMA_DECAY, use_warmup=True)
    segmenter = Segmenter(ema.module, card)  # the averaged weights are scored and saved
    # In between they compute as the training does, at the end as others will predict.
    between = replace(segmenter, precision="float32" if cfg.mixed_precision == "no" else "bf16")
    save = accelerator.on_main_process(segmenter.save)
    model, optimizer = accelerator.prepare(network, optimizer)
    ema.to(accelerator.device)

    # The loop
    progress = Progress(accelerator.num_processes)
    state = State(model, optimizer, ema, progress)
    # Not before data and weights are read: what fails earlier leaves nothing.
    with run.begun(cfg):
        accelerator.wait_for_everyone()
        run.resume(accelerator, state)
        rest = Subset(crops, range(progress.step * per_step, len(crops)))
        workers = engine.loader_workers(cfg.workers, accelerator.device)
        batches = iter(accelerator.prepare(DataLoader(rest, cfg.batch, num_workers=workers)))
        quiet = not is_main or dry_run
        bar = console.progress_bar(
            desc=cfg.name, unit="step", total=cfg.steps, initial=progress.step, shown=not quiet
        )
        meter = engine.Meter(accelerator, run, progress, schedule, bar)
        while progress.step < cfg.steps:
            began = time.monotonic()
            model.train()
            if first_steps:
                set_frozen(network.encoder, progress.step < first_steps)
            optim.set_lr(optimizer, schedule.lr_at(progress.step))
            for number in range(cfg.accumulate):
                batch = next(batches)
                engine.seed_step(cfg.seed, progress.step, number, accelerator.process_index)
                with accelerator.accumulate(model):
                    logits = model(batch["image"])  # (B, K, X, Y, Z), or a list, fine to coarse
                    loss = multi_scale_dice_ce(
                        logits,
                        batch,
                        foreground_weight=cfg.foreground_weight,
                        regions=[*dataset.regions.values()],
                    )
                    accelerator.backward(loss)
                    norm = None
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
                    optimizer.step()  # this and the next do nothing before the last pass
                    optimizer.zero_grad()
                meter.note(loss, norm, len(batch["image"]))
            progress.step += 1
            ema.update(network, step=progress.step)
            bar.update()
            if cost is not None:
                if cost.measured(began):
                    middle = [sorted(val, key=lambda case: case.image.numel())[len(val) // 2]]
                    cost.validated(
                        partial(validate, accelerator, between.logits, middle, dataset.targets),
                        len(val) * (schedule.stops + 1),  # the report scores each once more
                    )
                    say(f"{optim.describe(network, optimizer, schedule.lr)}\n{cost}")
                    return cost.figures()
                continue
            meter.log(state)
            if schedule.is_stop(progress.step):
                scores = validate(accelerator, between.logits, val, dataset.targets)
                summary = summarise_scores(scores, [*dataset.targets])
                say(f"step {progress.step}: validation Dice {summary['mean_dice']}")
                run.record(step=progress.step, **summary)
                if progress.scored(summary["mean_dice"]):
                    save(run.folder / "best.safetensors")
                meter.save(state)
                meter.restart()
        bar.close()

        # The last averaged weights are scored, not the best: those were chosen on these very cases.
        save(run.folder / "last.safetensors")
        return finetuning.report(
            accelerator, run, segmenter, dataset, fold, progress, dataclasses.asdict(cfg)
        )


def train(cfg: Config, *, dry_run: bool = False) -> dict[str, Any]:
    """`main`, or with ``fold=all`` that for every fold, see `finetuning.train_folds`."""
    if cfg.fold != "all":
        return main(cfg, dry_run=dry_run)
    dataset, _ = choose_cases(replace(cfg, fold=0))
    return finetuning.train_folds(main, cfg, dataset, free=FREE, dry_run=dry_run)


def choose_cases(
    cfg: Config, draw: Callable[[Dataset, Fold], Fold] | None = None
) -> tuple[Dataset, Fold]:
    """The data set and which of its cases train and validate; no image is read yet."""
    here = Path(__file__).parent
    layout, subjects = (name and here / name for name in (cfg.layout, cfg.subjects))
    dataset = open_dataset(cfg.data, layout, subjects)
    dataset = replace(dataset, grid_tolerance=cfg.grid_tolerance)
    fold = read_fold(dataset, cfg.fold, folds=cfg.folds)  # the same cases for every seed
    return dataset, fold if draw is None else draw(dataset, fold)


if __name__ == "__main__":
    cfg, flags = config.parse(Config, description=__doc__, flags={"dry_run": DRY_RUN})
    sys.exit(console.run_program(lambda: train(cfg, **flags), "finetune_unetr"))
