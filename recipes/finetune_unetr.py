"""Fine-tune UNETR or another decoder on a 3-D encoder, score it on the original grid, draw it.

    python recipes/finetune_unetr.py recipes/configs/hippocampus.yaml
    accelerate launch recipes/finetune_unetr.py recipes/configs/hippocampus.yaml fold=1 lr=5e-4

With --dry-run it checks everything and measures the cost. The same command resumes a run that was
stopped. Everything lies in SAMMED3D_RUNS/<name>; recipes/accelerate/ is for GPUs and several
machines. The training loop is `train_step` and the loop at the end of `main`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from monai.losses import DeepSupervisionLoss
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
)
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from sammed3d_backbone import config
from sammed3d_backbone.adapters.registry import accepted_options
from sammed3d_backbone.data.crops import CropStream
from sammed3d_backbone.data.datasets import Dataset, Fold, few_subjects, read_fold, with_subjects
from sammed3d_backbone.data.folders import find_dataset, read_dataset
from sammed3d_backbone.data.layouts import read_layout
from sammed3d_backbone.data.preparation import prepare_cases
from sammed3d_backbone.evaluation.scores import summarise_scores
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import Segmenter, init_from_checkpoint
from sammed3d_backbone.loading.registry import DEFAULT_WEIGHTS
from sammed3d_backbone.provenance import cores, library_versions, strip_directory
from sammed3d_backbone.training import engine, finetuning, optim
from sammed3d_backbone.training.dry_run import DryRun
from sammed3d_backbone.training.freezing import set_frozen
from sammed3d_backbone.training.losses import partial_dice_ce
from sammed3d_backbone.training.runs import Progress, Run, State, open_run
from sammed3d_backbone.training.validation import validate

CLIP_NORM = 1.0
WEIGHT_DECAY = 0.05
# Keys that may change when a run is resumed: they say where and how fast, not what.
FREE = ("cache", "threads", "workers", "cpu", "checkpointing", "save_every_s")
DRY_RUN = "check everything, measure what the run costs, and write nothing"


@dataclass(frozen=True)
class Config:
    """The knobs."""

    name: str  # folder of the run below SAMMED3D_RUNS
    data: str  # folder of the data set, or its name below SAMMED3D_DATA
    layout: str | None = None  # YAML file that describes the folder, relative to recipes/
    fold: int = 0  # of splits.json or the published split; else of `folds` dealt by subject
    folds: int = 5
    subjects: str | None = None  # JSON file, case -> subject, relative to recipes/
    model: str = "unetr"  # a name in adapters/registry.py, or basicunet: MONAI's, no encoder
    pyramid: Literal["simple", "multi_level", "conv_stem"] = "conv_stem"  # flexible_unet, segresnet
    feature_size: int = 16  # channels of the decoder at full resolution
    variant: str = "tiny"
    weights: str | None = None  # a name, a file, hf-hub:OWNER/REPO; None: the variant's default
    inflate: Literal["center", "mean"] | None = None  # for weights of a 2-D SAM encoder
    init: str | None = None  # fine-tuned model of the same classes to continue from
    scratch: bool = False  # random initialisation, and no layer decay
    rel_pos: Literal["sammed3d", "axial"] = "sammed3d"
    patch_size: int | None = None  # side of a token in voxels; None: the variant's
    channels: Literal["repeat", "shared"] = "repeat"  # see adapters/channels.py
    peft: Literal["none", "lora", "bottleneck"] = "none"  # what is trained in the encoder
    peft_size: int = 8  # rank of LoRA, width of bottlenecks
    freeze: Literal["none", "encoder", "decoder_first"] = "none"  # see training/freezing.py
    freeze_steps: int = 0  # decoder_first: steps before the encoder is trained too
    # What None leaves to the weights' own preprocessing; see data/preprocessing.py
    spacing_mm: tuple[float, float, float] | None = None  # [0, 0, 0]: that of each scan
    intensity: str | None = None  # see data/intensity.py
    statistics: Literal["crop", "volume"] | None = None  # voxels behind mean and deviation
    crop_vox: int | None = None  # side of the crop in voxels
    on_foreground: float = 0.5  # share of crops centred on a labelled voxel
    foreground_weight: float = 1.0  # of a labelled voxel in the cross-entropy
    flip_axes: tuple[int, ...] = ()  # 0 left-right, 1 back-front, 2 feet-head
    steps: int = 1000  # optimiser steps
    batch: int = 2  # crops per process and pass
    accumulate: int = 1  # passes per step, whose gradients are averaged
    lr: float | None = None  # of the decoder; None: 3e-4 with pretrained weights, 1e-3 from scratch
    layer_decay: float = 0.75  # factor on lr per encoder block, from the last one down
    warmup_steps: int = 50
    drop_path_rate: float = 0.1
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "bf16"] = "no"
    checkpointing: bool = False  # recompute blocks in the backward pass to save memory
    overlap: float = 0.5  # of sliding windows
    keep_largest_component: bool = False  # of every class: for organs, not lesions
    validate_every: int = 250  # steps
    log_every: int = 25  # steps
    save_every_s: float = 300.0  # seconds between checkpoints
    cache: str | None = None  # folder that keeps prepared cases for the next start; None: memory
    workers: int = 0  # processes that make crops
    threads: int = 0  # CPU threads per process; 0: all cores, shared by the processes
    cpu: bool = False  # even where there is a GPU
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("folds", "steps", "batch", "accumulate", "validate_every", "log_every")
        if low := [key for key in counts if getattr(self, key) < 1]:
            raise ValueError(f"{low[0]}={getattr(self, low[0])}; give 1 or more")
        rates = {"lr": self.lr, "foreground_weight": self.foreground_weight}
        if low := [
            key for key, rate in rates.items() if rate is not None and not 0 < rate < math.inf
        ]:
            raise ValueError(f"{low[0]}={rates[low[0]]}; give a number above 0")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap={self.overlap}; give 0 or more, and less than 1")
        if not {*self.flip_axes} <= {0, 1, 2}:
            raise ValueError(f"flip_axes={self.flip_axes}; give axes among [0, 1, 2]")
        if self.scratch and self.weights is not None:
            raise ValueError(
                f"weights={self.weights} with scratch=true, which is random initialisation; leave "
                "out one of them"
            )
        if (self.freeze == "decoder_first") != (0 < self.freeze_steps < self.steps):
            raise ValueError(
                f"freeze={self.freeze}, freeze_steps={self.freeze_steps}, steps={self.steps}; give "
                "decoder_first 1 or more freeze_steps, but fewer than steps, and the others none"
            )
        needs_encoder = self.checkpointing or self.freeze != "none" or self.channels == "shared"
        if self.model == "basicunet" and (needs_encoder or self.peft != "none"):
            raise ValueError(
                "model=basicunet has no encoder; leave out freeze=, checkpointing=, channels= and "
                "peft=, or take model=unetr"
            )
        if self.peft != "none" and (self.peft_size < 1 or self.freeze != "none" or self.scratch):
            raise ValueError(
                f"peft={self.peft} freezes pretrained weights and trains small parts beside them; "
                "give a peft_size of 1 or more, and leave out freeze= and scratch="
            )
        if self.peft == "lora" and self.init is not None:
            raise ValueError(
                "peft=lora starts from an encoder, not a network; pass init= as weights="
            )


def main(  # noqa: C901 (the whole training in one place)
    cfg: Config,
    *,
    dry_run: bool = False,
    num_subjects: int | None = None,
    build: Callable[..., tuple[nn.Module, dict[str, Any]]] = finetuning.build_model,
) -> dict[str, Any]:
    """Trains or resumes, evaluates, draws.

    Args:
        cfg: The configuration.
        dry_run: Measure up to three steps and write nothing.
        num_subjects: Train on so many subjects, drawn by the seed; None is all.
        build: Builds the network, as `finetuning.build_model` does; for controls of studies.

    Returns:
        The scores; of a dry run the cost.
    """
    # A part that is frozen for a while has no gradients, for which DDP has to be prepared.
    unused = DistributedDataParallelKwargs(find_unused_parameters=cfg.freeze == "decoder_first")
    accelerator = Accelerator(
        mixed_precision=cfg.mixed_precision,
        cpu=cfg.cpu,
        gradient_accumulation_steps=cfg.accumulate,
        kwargs_handlers=[unused],
    )
    is_main, say = accelerator.is_main_process, accelerator.print
    threads = cfg.threads or max(1, cores() // accelerator.num_processes)
    torch.set_num_threads(threads)
    run = open_run(cfg.name, cfg, free=FREE, writes=is_main, say=say)
    say(f"{config.dump(cfg)}config digest: {config.digest(cfg, leave_out=('name', *FREE))}")
    cost = DryRun(accelerator.device, cfg.steps) if dry_run else None

    # Data and model
    dataset, fold = choose_cases(cfg, num_subjects)
    say(f"{dataset.name}: {len(fold.train)} cases to train on, {len(fold.val)} to validate on")
    say(f"fold {cfg.fold} of {fold.rule}")
    card = make_card(cfg, dataset, say)
    torch.manual_seed(cfg.seed)
    network, card = make_model(cfg, card, dataset, fold, build)
    say("\n".join(f"{key}: {value}" for key, value in card.training["start"].items()))
    prepared = prepare_cases(
        dataset,
        (*fold.train, *fold.val),  # together, so that all problems are reported at once
        card.preprocessing,
        cache=None if cfg.cache is None else Path(cfg.cache).expanduser(),
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
        augment=augmentation(cfg.flip_axes),
    )

    def batches_after(steps: int) -> Iterator[engine.Batch]:
        rest = Subset(crops, range(steps * per_step, len(crops)))
        return iter(accelerator.prepare(DataLoader(rest, cfg.batch, num_workers=cfg.workers)))

    # Optimiser: layer decay protects what was pretrained; beside a frozen encoder there is nothing.
    decay = 1.0 if cfg.scratch or cfg.peft != "none" else cfg.layer_decay
    optimizer = optim.layer_decayed(network, layer_decay=decay, weight_decay=WEIGHT_DECAY)
    ema = ModelEmaV3(network, decay=cfg.ema_decay, use_warmup=True)
    segmenter = Segmenter(ema.module, card)  # the averaged weights are scored and saved
    schedule = engine.Schedule(
        steps=cfg.steps,
        validate_every=cfg.validate_every,
        lr=cfg.lr or (1e-3 if cfg.scratch else 3e-4),
        warmup_steps=cfg.warmup_steps,
        freeze_steps=cfg.freeze_steps,
        clip=CLIP_NORM,
        log_every=cfg.log_every,
        save_every_s=cfg.save_every_s,
        seed=cfg.seed,
    )
    model, optimizer = accelerator.prepare(network, optimizer)
    ema.to(accelerator.device)
    progress = Progress(accelerator.num_processes)
    state = State(model, optimizer, ema, progress)
    if cost is None:
        run.begin(cfg)  # not before data and weights are read: what fails earlier leaves nothing
        accelerator.wait_for_everyone()
        if run.resume(accelerator, state):
            say(f"resuming after step {progress.step} of {cfg.steps}")
    else:
        run = Run(run.folder, writes=False)
    batches = batches_after(progress.step)
    bar = tqdm(
        total=cfg.steps,
        initial=progress.step,
        desc=cfg.name,
        unit="step",
        disable=not is_main or dry_run,
    )
    meter = engine.Meter(accelerator, run, progress, schedule, bar)

    def train_step() -> None:
        model.train()
        if cfg.freeze == "decoder_first":
            set_frozen(network.encoder, progress.step < cfg.freeze_steps)
        optim.set_lr(optimizer, schedule.lr_at(progress.step))
        for number in range(cfg.accumulate):
            batch = next(batches)
            engine.seed_step(cfg.seed, progress.step, number, accelerator.process_index)
            with accelerator.accumulate(model):
                logits = model(batch["image"])  # (B, K, X, Y, Z), or a list, fine to coarse
                loss_of = partial(
                    partial_dice_ce,
                    annotated=batch["annotated"],
                    foreground_weight=cfg.foreground_weight,
                )
                loss = DeepSupervisionLoss(loss_of)(logits, batch["label"].float())
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
        cost.measure(train_step)
        say(f"{optim.describe(network, optimizer, schedule.lr)}\n{cost}")
        return cost.figures()

    while progress.step < cfg.steps:
        train_step()
        save_due = meter.log()
        if progress.step % cfg.validate_every == 0 or progress.step == cfg.steps:
            scores = validate(accelerator, segmenter.logits, val, dataset.classes)
            summary = summarise_scores(scores, dataset.classes)
            if is_main:
                bar.write(f"step {progress.step}: validation Dice {summary['mean_dice']}")
            run.record(step=progress.step, **summary)
            if progress.scored(summary["mean_dice"]) and is_main:
                segmenter.save(run.folder / "best.safetensors")
            meter.save(state)
            meter.restart()
        elif save_due:
            meter.save(state)
    bar.close()
    if is_main:
        segmenter.save(run.folder / "last.safetensors")
    return evaluate(accelerator, cfg, run, segmenter, dataset, fold, progress)


def choose_cases(cfg: Config, num_subjects: int | None = None) -> tuple[Dataset, Fold]:
    """The data set and which of its cases train and validate; no image is read yet."""
    here = Path(__file__).parent
    layout = None if cfg.layout is None else read_layout(here / cfg.layout)
    dataset = read_dataset(find_dataset(cfg.data, layout), layout)
    if cfg.subjects is not None:
        dataset = with_subjects(dataset, here / cfg.subjects)
    fold = read_fold(dataset, cfg.fold, folds=cfg.folds)  # the same cases for every seed
    if num_subjects is not None:
        fold = replace(fold, train=few_subjects(dataset, fold.train, num_subjects, cfg.seed))
    return dataset, fold


def make_card(cfg: Config, dataset: Dataset, say: Callable[[str], object] = print) -> Card:
    """The description that is saved with the weights; says what it overrides."""
    preprocessing, notes = finetuning.choose_preprocessing(
        cfg.weights or DEFAULT_WEIGHTS.get(cfg.variant),  # without weights: as the fair twin
        dataset,
        spacing_mm=cfg.spacing_mm,
        intensity=cfg.intensity,
        statistics=cfg.statistics,
        crop_vox=cfg.crop_vox,
    )
    say("\n".join(f"preprocessing: {note}" for note in notes))
    encoder: dict[str, Any] = {
        "variant": cfg.variant,
        "rel_pos": cfg.rel_pos,
        "in_chans": 1 if cfg.channels == "shared" else len(dataset.channels),
        "img_size": preprocessing.crop_vox[0],
    }
    if cfg.patch_size is not None:
        encoder["patch_size"] = cfg.patch_size
    adapter: dict[str, Any] = {}
    if cfg.model != "basicunet":
        adapter = accepted_options(cfg.model, feature_size=cfg.feature_size, kind=cfg.pyramid)
    return Card(
        network=cfg.model,
        encoder={} if cfg.model == "basicunet" else encoder,
        adapter=adapter,
        labels=dataset.labels,
        channels=dataset.channels,
        preprocessing=preprocessing,
        overlap=cfg.overlap,
        shared=cfg.channels == "shared",
        bottleneck=cfg.peft_size if cfg.peft == "bottleneck" else 0,
        keep_largest_component=cfg.keep_largest_component,
        training={
            "config": {
                key: strip_directory(value) if isinstance(value, str) else value
                for key, value in dataclasses.asdict(cfg).items()
            },
            "dataset": {"name": dataset.name, "note": dataset.note, **dataset.about},
        },
        versions=library_versions(),
    )


def make_model(
    cfg: Config,
    card: Card,
    dataset: Dataset,
    fold: Fold,
    build: Callable[..., tuple[nn.Module, dict[str, Any]]] = finetuning.build_model,
) -> tuple[nn.Module, Card]:
    """The network to train, and the card with its start and all cases that it will have seen."""
    network, start = build(
        card,
        dataset.name,
        scratch=cfg.scratch,
        weights=cfg.weights,
        inflate=cfg.inflate,
        drop_path_rate=cfg.drop_path_rate,
        lora_rank=cfg.peft_size if cfg.peft == "lora" else 0,
    )
    if card.encoder:
        network.set_grad_checkpointing(cfg.checkpointing)
        if cfg.freeze == "encoder":
            set_frozen(network.encoder, True)
    start["parameters"] = finetuning.count_parameters(network)
    seen = {*fold.train}
    if cfg.init is not None:
        origin, trained_on = init_from_checkpoint(network, card, cfg.init, fold.val)
        start |= origin
        seen.update(trained_on)
    training = {**card.training, "start": start, "cases": sorted(seen)}
    return network, replace(card, training=training)


def augmentation(flip_axes: Sequence[int]) -> Compose:
    """Random changes that keep the meaning of the labels.

    Args:
        flip_axes: Axes along which no class becomes another when it is mirrored.
    """
    both = ["image", "label"]
    angle, zoom = math.radians(15), 0.15
    return Compose(
        [
            *(RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in flip_axes),
            RandAffined(
                both,
                prob=0.5,
                rotate_range=(angle, angle, angle),
                scale_range=(zoom, zoom, zoom),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandGaussianNoised("image", prob=0.15, std=0.1),
            RandGaussianSmoothd(
                "image", prob=0.15, sigma_x=(0.3, 0.9), sigma_y=(0.3, 0.9), sigma_z=(0.3, 0.9)
            ),
            RandScaleIntensityd("image", prob=0.3, factors=0.25),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        ]
    )


def evaluate(
    accelerator: Accelerator,
    cfg: Config,
    run: Run,
    segmenter: Segmenter,
    dataset: Dataset,
    fold: Fold,
    progress: Progress,
) -> dict[str, Any]:
    """Scores, figures and report of the last averaged weights, on the grid of the files.

    The last weights, not the best: those were chosen on these very cases.
    """
    title = f"{cfg.name}: {cfg.model} on {dataset.name}, fold {cfg.fold}"
    split = f"fold {cfg.fold} of {fold.rule}; {len(fold.train)} cases trained on"
    return finetuning.report(
        accelerator,
        run,
        segmenter,
        dataset,
        fold.val,
        progress,
        title=title,
        split=split,
        config=dataclasses.asdict(cfg),
    )


if __name__ == "__main__":
    try:
        cfg, flags = config.parse(Config, description=__doc__, flags={"dry_run": DRY_RUN})
        main(cfg, **flags)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
