"""Fine-tune UNETR or another decoder on a 3-D encoder, score it on the original grid, draw it.

    python recipes/finetune_unetr.py recipes/configs/hippocampus.yaml
    accelerate launch recipes/finetune_unetr.py recipes/configs/hippocampus.yaml fold=1 lr=5e-4

With --dry-run it says what the run will be and cost. The same command goes on where a stopped run
was. Everything lies in SAMMED3D_RUNS/<name>; recipes/accelerate/ is for GPUs and several machines.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from sammed3d_backbone import config, encoder
from sammed3d_backbone.adapters.controls import ZeroedEncoder
from sammed3d_backbone.adapters.lora import add_lora
from sammed3d_backbone.data.crops import CropStream
from sammed3d_backbone.data.datasets import Dataset, Fold, few_subjects, read_fold, with_subjects
from sammed3d_backbone.data.folders import find_dataset, read_dataset
from sammed3d_backbone.data.layouts import read_layout
from sammed3d_backbone.data.preparation import load_image, prepare_cases
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.evaluation.report import About, write_results
from sammed3d_backbone.evaluation.scores import score_cases, summarise
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import (
    Segmenter,
    adapters,
    build_network,
    init_from_checkpoint,
    wrap_encoder,
)
from sammed3d_backbone.loading.exposure import seen_in_pretraining
from sammed3d_backbone.provenance import (
    command_line,
    cores,
    library_versions,
    provenance,
    strip_directory,
)
from sammed3d_backbone.training import engine, optim
from sammed3d_backbone.training.dry_run import rehearse
from sammed3d_backbone.training.freezing import set_frozen
from sammed3d_backbone.training.losses import partial_dice_ce
from sammed3d_backbone.training.runs import Progress, Run, State, open_run
from sammed3d_backbone.training.validation import validate


@dataclass(frozen=True)
class Config:
    """The knobs."""

    name: str  # of the run's folder below SAMMED3D_RUNS
    data: str  # folder of the data set, or its name below SAMMED3D_DATA
    layout: str | None = None  # YAML file that describes the folder, seen from recipes/
    fold: int = 0  # of splits.json or the published split; without, of `folds` dealt by subject
    folds: int = 5
    subjects: str | None = None  # JSON file, case -> subject, seen from recipes/
    labels: int | None = None  # train on this many subjects, drawn by the seed; None: all
    model: Literal[  # the last has no encoder: MONAI's, the baseline to beat
        "unetr", "flexible_unet", "segresnet", "linear_head", "expanding_head", "basicunet"
    ] = "unetr"
    pyramid: Literal["simple", "multi_level", "conv_stem"] = (
        "conv_stem"  # of flexible_unet and segresnet
    )
    control: Literal["none", "zero_encoder"] = "none"  # zero_encoder: what the decoder can alone
    variant: str = "tiny"
    pretrained: bool = True  # false: random initialisation, with the settings of fine-tuning
    weights: str | None = None  # a name, a file, hf-hub:OWNER/REPO; None: the variant's default
    inflate: Literal["center", "mean"] | None = None  # for weights of a 2-D SAM encoder
    init: str | None = None  # fine-tuned model of the same classes to train on from
    scratch: bool = False  # the fair twin: no weights, its own learning rate, no layer decay
    rel_pos: Literal["sammed3d", "axial"] = "sammed3d"
    channels: Literal["repeat", "shared"] = "repeat"  # see adapters/channels.py
    channel_gains: tuple[float, ...] | None = None  # of repeat; None: the same for all
    peft: Literal["none", "lora", "bottleneck"] = "none"  # all that learns in the encoder
    peft_size: int = 8  # rank of LoRA, channels of bottlenecks
    feature_size: int = 16  # channels of the decoder at full resolution
    spacing_mm: tuple[float, float, float] | None = (1.5, 1.5, 1.5)  # None: each volume's own
    intensity: str = "zscore_positive"  # see data/intensity.py
    img_size: int = 64  # side of the crop in voxels
    patch_size: int | None = None  # side of a token in voxels; None: the variant's
    on_foreground: float = 0.5  # share of crops centred on a labelled voxel
    foreground_weight: float = 1.0  # of a labelled voxel in the cross-entropy
    flip_axes: tuple[int, ...] = ()  # 0 left-right, 1 back-front, 2 feet-head
    rotate_degrees: float = 15.0
    zoom: float = 0.15  # largest relative change of size
    freeze: Literal["none", "encoder", "decoder_first"] = "none"  # see training/freezing.py
    freeze_steps: int = 0  # decoder_first: steps before the encoder learns too
    steps: int = 1000  # of the optimiser
    batch: int = 2  # crops per process and pass
    accumulate: int = 1  # passes per step, whose gradients are averaged
    checkpointing: bool = False  # keep less for the backward pass and compute it again
    channels_last: bool = False  # channels side by side in memory: faster on some CPUs
    lr: float = 3e-4  # of the decoder, with pretrained weights
    scratch_lr: float = 1e-3  # of everything, with scratch=true
    layer_decay: float = 0.75  # factor on lr per encoder block, from the last one down
    weight_decay: float = 0.05
    warmup_steps: int = 50
    clip: float = 1.0  # of the gradient's norm
    drop_path_rate: float = 0.1
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "bf16"] = "no"
    overlap: float = 0.5  # of sliding windows
    one_piece: bool = False  # predict the largest part of every class only: organs, not lesions
    validate_every: int = 250  # steps
    log_every: int = 25  # steps
    save_every_s: float = 300.0  # seconds between checkpoints
    cache: str | None = None  # folder that keeps prepared cases for the next start; None: memory
    workers: int = 0  # processes that make crops
    threads: int = 0  # CPU threads per process; 0: all cores, shared by the processes
    cpu: bool = False  # even where there is a GPU
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("folds", "img_size", "steps", "batch", "accumulate", "validate_every")
        if low := [key for key in (*counts, "log_every") if getattr(self, key) < 1]:
            raise ValueError(f"{low[0]}={getattr(self, low[0])}; give 1 or more")
        positive = ("lr", "scratch_lr", "foreground_weight")
        if low := [key for key in positive if not 0 < getattr(self, key) < math.inf]:
            raise ValueError(f"{low[0]}={getattr(self, low[0])}; give a number above 0")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap={self.overlap}; give 0 or more, and less than 1")
        if not {*self.flip_axes} <= {0, 1, 2}:
            raise ValueError(f"flip_axes={self.flip_axes}; give axes among [0, 1, 2]")
        if (self.freeze == "decoder_first") != (0 < self.freeze_steps < self.steps):
            raise ValueError(
                f"freeze={self.freeze}, freeze_steps={self.freeze_steps}, steps={self.steps}; "
                "give decoder_first 1 or more freeze_steps, but fewer than steps, and others none"
            )
        has_plan = self.checkpointing or self.freeze != "none" or self.channels == "shared"
        if self.model == "basicunet" and has_plan:
            raise ValueError(
                f"model={self.model} has no encoder to freeze, to recompute or to share; "
                "leave out freeze=, checkpointing= and channels=, or take model=unetr"
            )
        if self.weights is not None and (self.scratch or not self.pretrained):
            raise ValueError(
                f"weights={self.weights} contradicts scratch=true and pretrained=false"
            )
        given = not self.scratch and self.control == "none" and self.model != "basicunet"
        if self.peft != "none" and (self.peft_size < 1 or self.freeze != "none" or not given):
            raise ValueError(
                f"peft={self.peft} freezes trained weights and learns beside them; give a "
                "peft_size of 1 or more, and leave out freeze=, scratch=, control= and basicunet"
            )
        if self.peft == "lora" and self.init is not None:
            raise ValueError(
                "peft=lora begins at an encoder, not at a whole network; pass init= as weights="
            )


# Keys that may change when a run goes on: they say where and how fast, not what.
FREE = ("cache", "threads", "workers", "cpu", "checkpointing", "channels_last", "save_every_s")
DRY_RUN = "check everything, say what the run will be, need and cost, and leave no trace"


def main(cfg: Config, *, dry_run: bool = False) -> dict[str, Any]:
    """Trains or goes on, evaluates, draws; returns the scores, or what a dry run found out."""
    # What is frozen for a while gets no gradient meanwhile, for which DDP has to be prepared.
    waits = DistributedDataParallelKwargs(find_unused_parameters=cfg.freeze == "decoder_first")
    accelerator = Accelerator(
        mixed_precision=cfg.mixed_precision,
        cpu=cfg.cpu,
        gradient_accumulation_steps=cfg.accumulate,
        kwargs_handlers=[waits],
    )
    torch.set_num_threads(cfg.threads or max(1, cores() // accelerator.num_processes))
    say = accelerator.print
    # Before minutes of reading: a name that is taken is refused.
    run = open_run(cfg.name, cfg, free=FREE, writes=accelerator.is_main_process, say=say)
    say(f"{config.dump(cfg)}hash of what counts: {config.digest(cfg, leave_out=('name', *FREE))}")

    dataset, fold = choose_cases(cfg)
    say(f"{dataset.name}: {len(fold.train)} cases to train on, {len(fold.val)} to validate on")
    say(f"fold {cfg.fold} of {fold.rule}")
    card = make_card(cfg, dataset)
    torch.manual_seed(cfg.seed)
    network, start = make_model(cfg, card, dataset.name)
    card = begin(cfg, card, fold, network, start)
    say("\n".join(f"{key}: {value}" for key, value in start.items()))
    ids = (*fold.train, *fold.val)  # together, so that all that is wrong is told at once
    cache = None if cfg.cache is None else Path(cfg.cache).expanduser()
    prepared = prepare_cases(
        dataset, ids, card.preprocessing, cache=cache, progress=accelerator.is_main_process
    )
    train, val = prepared[: len(fold.train)], prepared[len(fold.train) :]
    lr = cfg.scratch_lr if cfg.scratch else cfg.lr
    # Decay protects what was learned before; beside a frozen encoder all that learns is new.
    decay = 1.0 if cfg.scratch or cfg.peft != "none" else cfg.layer_decay
    optimizer = optim.layer_decayed(network, lr, layer_decay=decay, weight_decay=cfg.weight_decay)
    ema = ModelEmaV3(network, decay=cfg.ema_decay, use_warmup=True)
    segmenter = Segmenter(ema.module, card)  # always the averaged weights
    progress = Progress(accelerator.num_processes)
    schedule = engine.Schedule(
        steps=cfg.steps,
        validate_every=cfg.validate_every,
        lr=lr,
        warmup_steps=cfg.warmup_steps,
        freeze_steps=cfg.freeze_steps,
        clip=cfg.clip,
        log_every=cfg.log_every,
        save_every_s=cfg.save_every_s,
        seed=cfg.seed,
    )

    def step(model: nn.Module, batch: engine.Batch) -> Tensor:
        if cfg.freeze == "decoder_first":
            set_frozen(network.encoder, progress.step < cfg.freeze_steps)
        loss_of = partial(
            partial_dice_ce,
            annotated=batch["annotated"],
            foreground_weight=cfg.foreground_weight,
        )
        # Logits (B, K, X, Y, Z), or a list of them, each of half the resolution and weight.
        return DeepSupervisionLoss(loss_of)(model(batch["image"]), batch["label"].float())

    per_step = cfg.batch * cfg.accumulate * accelerator.num_processes
    stream = CropStream(
        train,
        cfg.img_size,
        samples=cfg.steps * per_step,
        seed=cfg.seed,
        on_foreground=cfg.on_foreground,
        augment=augmentation(cfg),
    )

    def batches_after(steps: int) -> Iterator[engine.Batch]:
        rest = Subset(stream, range(steps * per_step, len(stream)))
        return iter(accelerator.prepare(DataLoader(rest, cfg.batch, num_workers=cfg.workers)))

    model, optimizer = accelerator.prepare(network, optimizer)
    ema.to(accelerator.device)
    if dry_run:
        cost = rehearse(accelerator, step, model, batches_after(0), optimizer, ema, schedule)
        say(f"{optim.describe(network, optimizer)}\n{cost}")
        return cost.figures()

    state = State(model, optimizer, ema, progress)
    run.begin(cfg)  # not before data and weights are there: what fails earlier leaves nothing
    accelerator.wait_for_everyone()
    if run.resume(accelerator, state):
        say(f"resuming after step {progress.step} of {cfg.steps}")
    batches = batches_after(progress.step)
    keeps = accelerator.is_main_process and cfg.control == "none"  # a control is of no other use
    with tqdm(
        total=cfg.steps,
        initial=progress.step,
        desc=cfg.name,
        unit="step",
        disable=not accelerator.is_main_process,
    ) as bar:
        while progress.step < cfg.steps:
            steps = schedule.next_stop(progress.step) - progress.step
            now = islice(batches, steps * cfg.accumulate)
            engine.train(accelerator, step, state, now, run, schedule, bar)
            scores = validate(accelerator, segmenter.logits, val, dataset.classes)
            summary = summarise(scores, dataset.classes)
            if accelerator.is_main_process:
                bar.write(f"step {progress.step}: validation Dice {summary['mean_dice']}")
            run.record(step=progress.step, **summary)
            is_best = progress.scored(summary["mean_dice"])
            if is_best and keeps:
                segmenter.save(run.folder / "best.safetensors")
            run.save(accelerator, state)

    if keeps:
        segmenter.save(run.folder / "last.safetensors")
    return evaluate(accelerator, cfg, run, segmenter, dataset, fold, progress)


def choose_cases(cfg: Config) -> tuple[Dataset, Fold]:
    """The data set and which of its cases train and validate; no image is read yet."""
    here = Path(__file__).parent
    layout = None if cfg.layout is None else read_layout(here / cfg.layout)
    dataset = read_dataset(find_dataset(cfg.data, layout), layout)
    if cfg.subjects is not None:
        dataset = with_subjects(dataset, here / cfg.subjects)
    fold = read_fold(dataset, cfg.fold, folds=cfg.folds)  # the same cases for every seed
    if cfg.labels is not None:
        fold = replace(fold, train=few_subjects(dataset, fold.train, cfg.labels, cfg.seed))
    return dataset, fold


def make_card(cfg: Config, dataset: Dataset) -> Card:
    """What will travel with the weights."""
    in_chans = 1 if cfg.channels == "shared" else len(dataset.channels)
    sizes: dict[str, Any] = {"in_chans": in_chans, "img_size": cfg.img_size}
    if cfg.patch_size is not None:
        sizes["patch_size"] = cfg.patch_size
    knobs: dict[str, Any] = {}
    if cfg.model not in ("linear_head", "basicunet"):
        knobs["feature_size"] = cfg.feature_size
    if cfg.model in ("flexible_unet", "segresnet"):
        knobs["kind"] = cfg.pyramid
    has_encoder = cfg.model != "basicunet"
    return Card(
        network=cfg.model,
        encoder={"variant": cfg.variant, "rel_pos": cfg.rel_pos, **sizes} if has_encoder else {},
        adapter=knobs,
        labels=dataset.labels,
        channels=dataset.channels,
        preprocessing=Preprocessing(
            spacing_mm=cfg.spacing_mm,
            intensity={"default": cfg.intensity},
            statistics="volume",
            crop_vox=(cfg.img_size,) * 3,
        ),
        overlap=cfg.overlap,
        shared=cfg.channels == "shared",
        bottleneck=cfg.peft_size if cfg.peft == "bottleneck" else 0,
        keep_largest_component=cfg.one_piece,
        training={
            "config": {
                key: strip_directory(value) if isinstance(value, str) else value
                for key, value in dataclasses.asdict(cfg).items()
            },
            "dataset": {"name": dataset.name, "note": dataset.note, **dataset.about},
        },
        versions=library_versions(),
    )


def make_model(cfg: Config, card: Card, dataset_name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network to train, and what is to be said about its start, here and in the report."""
    start: dict[str, Any] = {}
    if cfg.model != "basicunet":
        is_random = cfg.scratch or not cfg.pretrained or cfg.control == "zero_encoder"
        backbone = encoder(
            pretrained=not is_random,
            weights=None if is_random else cfg.weights,
            inflate=None if is_random else cfg.inflate,
            drop_path_rate=cfg.drop_path_rate,
            channel_gains=cfg.channel_gains,
            **card.encoder,
        )
        record = backbone.pretrained_cfg
        start["weights"] = f"{cfg.variant}: random initialisation"
        if (report := backbone.load_report) is not None:
            start["weights"] = str(replace(report, source=strip_directory(report.source)))
        if record is not None:
            record = replace(record, name=strip_directory(record.name))
        start["contamination"] = str(seen_in_pretraining(record, dataset_name))
        start["citations"] = [record.citation] if record and record.citation else []
        if cfg.peft == "lora":
            add_lora(backbone, rank=cfg.peft_size)
        backbone = wrap_encoder(backbone, card)
        if cfg.control == "zero_encoder":
            backbone = ZeroedEncoder(backbone)
        model = adapters()[cfg.model](backbone, len(card.labels), **card.adapter)
        model.set_grad_checkpointing(cfg.checkpointing)
        if cfg.freeze == "encoder":
            set_frozen(model.encoder, True)
    else:
        model = build_network(card)
    if cfg.channels_last:
        model.to(memory_format=torch.channels_last_3d)
    parts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    start["parameters"] = {
        "all": sum(parts.values()),
        "encoder": parts.get("encoder", 0),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    return model, start


def begin(cfg: Config, card: Card, fold: Fold, network: nn.Module, start: dict[str, Any]) -> Card:
    """The card with the network's start and all cases it will have seen; fills it from `init`."""
    seen = set(fold.train)
    if cfg.init is not None:
        told, trained_on = init_from_checkpoint(network, card, cfg.init, fold.val)
        start.update(told)
        seen.update(trained_on)
    return replace(card, training={**card.training, "start": start, "cases": sorted(seen)})


def augmentation(cfg: Config) -> Compose:
    """Random changes that leave the meaning of the labels alone.

    Flips only along `flip_axes`: a flip that turns one class into another would teach nonsense.
    """
    both = ["image", "label"]
    angle = math.radians(cfg.rotate_degrees)
    return Compose(
        [
            *(RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in cfg.flip_axes),
            RandAffined(
                both,
                prob=0.5,
                rotate_range=(angle, angle, angle),
                scale_range=(cfg.zoom, cfg.zoom, cfg.zoom),
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

    The last weights, not the best: those were picked on these very cases.
    """
    results = run.folder / "results"
    scores = score_cases(
        lambda case: segmenter.predict(load_image(case)),
        dataset,
        fold.val[accelerator.process_index :: accelerator.num_processes],
        folder=results / "predictions",
        progress=accelerator.is_main_process,
    )
    scores = sorted(gather_object(scores), key=lambda score: score.case)
    if not accelerator.is_main_process:
        return summarise(scores, dataset.classes)
    about = About(
        title=f"{cfg.name}: {cfg.model} on {dataset.name}, fold {cfg.fold}",
        command=command_line(accelerator.num_processes),
        model="averaged weights of the last step",
        **segmenter.card.training["start"],
        steps=progress.step,
        seconds=round(progress.seconds, 1),
        cpu_seconds=round(progress.cpu_seconds, 1),
        peak_memory_mb=round(progress.peak_bytes / 1e6),
        dataset=segmenter.card.training["dataset"],
        split=f"fold {cfg.fold} of {fold.rule}; {len(fold.train)} cases trained on",
        config=dataclasses.asdict(cfg),
        provenance=provenance(Path(__file__).parent),
    )
    summary = write_results(results, scores, dataset, about, run.records())
    for key, value in summary["dice"].items():
        accelerator.print(f"Dice {key}: {value}")
    accelerator.print(f"mean Dice {summary['mean_dice']} over {summary['cases']} cases")
    pages = f"{results / 'report.html'} and {results / 'figure.png'}"
    accelerator.print(f"training took {progress.seconds:.0f} s; see {pages}")
    return summary


if __name__ == "__main__":
    try:
        cfg, flags = config.parse(Config, description=__doc__, flags={"dry_run": DRY_RUN})
        main(cfg, **flags)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
