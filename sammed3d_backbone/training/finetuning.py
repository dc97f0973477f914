"""The two ends of a fine-tuning: the network with its card and weights, and the final report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn

from sammed3d_backbone.adapters.contract import Encoder
from sammed3d_backbone.adapters.lora import add_lora
from sammed3d_backbone.adapters.registry import accepted_options, adapter
from sammed3d_backbone.data.datasets import Dataset, Fold, read_folds
from sammed3d_backbone.data.preparation import load_image
from sammed3d_backbone.data.preprocessing import DEFAULT, SAM_MED3D, Preprocessing
from sammed3d_backbone.evaluation.report import About, write_results
from sammed3d_backbone.evaluation.scores import read_scores, score_cases, summarise_scores
from sammed3d_backbone.files import copy_file
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import Segmenter, build_network, wrap_encoder
from sammed3d_backbone.loading.checkpoint import read
from sammed3d_backbone.loading.exposure import seen_in_pretraining
from sammed3d_backbone.loading.factory import encoder
from sammed3d_backbone.loading.hub import needs_download, resolve
from sammed3d_backbone.loading.inflation import DepthFilter
from sammed3d_backbone.loading.opening import CARD_KEY
from sammed3d_backbone.loading.registry import DEFAULT_WEIGHTS, from_metadata
from sammed3d_backbone.provenance import (
    command_line,
    library_versions,
    provenance,
    settings_of_card,
    strip_directory,
)
from sammed3d_backbone.training.compilation import compile_in_place
from sammed3d_backbone.training.freezing import set_frozen
from sammed3d_backbone.training.runs import Progress, Run, open_run, runs_folder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FEATURE_SIZE = 16  # of a decoder, where neither configuration nor weights say another


def make_card(
    cfg: DataclassInstance, dataset: Dataset, say: Callable[[str], object] = print
) -> Card:
    """The card of a network that is to be trained.

    Its preprocessing is that of the weights, unless the configuration sets `spacing_mm` ((0, 0, 0)
    keeps that of each scan), `intensity`, `statistics` or `crop_vox`; says what is overridden. A
    decoder whose `feature_size` the configuration leaves open has that of the weights, or 16.

    Args:
        cfg: Configuration of the recipe.
        dataset: Gives channels and classes; its channels decide whether it is CT.
        say: Prints a line.
    """
    settings = dataclasses.asdict(cfg)
    weights = settings["weights"] or DEFAULT_WEIGHTS.get(settings["variant"])
    known, feature_size = (None, None) if weights is None else _stated_by(weights)
    if known is None:
        known = SAM_MED3D
        say("preprocessing: the weights do not state theirs; that of SAM-Med3D is assumed")
    modes, is_ct = known.intensity, {name.upper() for name in dataset.channels} == {"CT"}
    known = replace(
        known, intensity={DEFAULT: modes.get("ct" if is_ct else DEFAULT, modes[DEFAULT])}
    )
    given: dict[str, Any] = {}
    if (spacing_mm := settings["spacing_mm"]) is not None:
        given["spacing_mm"] = spacing_mm if any(spacing_mm) else None
    if settings["intensity"] is not None:
        given["intensity"] = {DEFAULT: settings["intensity"]}
    if settings["statistics"] is not None:
        given["statistics"] = settings["statistics"]
    if settings["crop_vox"] is not None:
        given["crop_vox"] = (settings["crop_vox"],) * 3
    preprocessing = replace(known, **given)
    for name in given:
        if (now := getattr(preprocessing, name)) != (before := getattr(known, name)):
            say(f"preprocessing: {name}={now} instead of {before}")
    say(f"preprocessing: {preprocessing.to_dict()}")
    if dataset.regions:
        say(f"regions: {dataset.about['regions']}; trained and scored, written as single values")
    has_encoder = settings["model"] != "basicunet"
    asked = {"feature_size": settings["feature_size"]}
    if asked["feature_size"] and not (has_encoder and accepted_options(settings["model"], **asked)):
        raise ValueError(f"model={settings['model']} has no feature_size; leave out feature_size=")
    whole = not settings["scratch"] and settings["transfer"] == "whole"
    encoder = {
        "variant": settings["variant"],
        "in_chans": len(dataset.channels),
        "img_size": preprocessing.crop_vox[0],
    }
    return Card(
        network=settings["model"],
        encoder=encoder if has_encoder else {},
        adapter=accepted_options(
            settings["model"],
            feature_size=settings["feature_size"] or (whole and feature_size) or FEATURE_SIZE,
            variant=settings["variant"],
        )
        if has_encoder
        else {},
        labels=dataset.labels,
        channels=dataset.channels,
        preprocessing=preprocessing,
        overlap=settings["overlap"],
        keep_largest_component=settings["keep_largest_component"],
        training={
            "config": settings_of_card(settings),
            "dataset": {"name": dataset.name, "note": dataset.note, **dataset.about},
        },
        versions=library_versions(),
    )


def _stated_by(weights: str) -> tuple[Preprocessing | None, int | None]:
    """Preprocessing and `feature_size` of a UNETR decoder, as far as weights state them."""
    record, path = resolve(weights)
    if path is not None and record.preprocessing is None:
        metadata = read(path)[1]
        if CARD_KEY in metadata:
            card = Card.from_json(metadata[CARD_KEY])
            width = card.adapter.get("feature_size") if card.network == "unetr" else None
            return card.preprocessing, width
        record = from_metadata(record, metadata)
    return record.preprocessing, record.unetr.feature_size if record.unetr else None


def build_model(
    card: Card,
    dataset_name: str,
    *,
    scratch: bool = False,
    weights: str | None = None,
    inflate: DepthFilter | None = None,
    drop_path_rate: float = 0.1,
    lora_rank: int = 0,
    channel_gains: Sequence[float] | None = None,
    transfer: Literal["whole", "encoder"] = "whole",
    wrap: Callable[[Encoder], Encoder] | None = None,
) -> tuple[nn.Module, Card]:
    """The card's network with pretrained weights; the card then says which.

    Args:
        card: Describes the network.
        dataset_name: Name of the data set, to look up whether the weights were trained on it.
        scratch: Random initialisation.
        weights: See `encoder`, as for `inflate` and `channel_gains`.
        inflate: How weights of a 2-D encoder are converted.
        drop_path_rate: Stochastic depth of the last block.
        lora_rank: Rank of LoRA in the encoder; 0 is none.
        channel_gains: See `encoder`.
        transfer: Whether the decoder of a UNETR is filled too, if the weights hold one.
        wrap: Replaces the encoder in front of the decoder; for controls.
    """
    if not card.encoder:
        return build_network(card), _with_start(card, {})
    backbone: Any = encoder(
        pretrained=not scratch,
        weights=weights,
        inflate=inflate,
        drop_path_rate=drop_path_rate,
        channel_gains=channel_gains,
        **card.encoder,
    )
    # Neither the tensors nor the variant say which relative positions the weights came with.
    card = replace(card, encoder={**card.encoder, "rel_pos": backbone.rel_pos})
    record, loaded = backbone.pretrained_cfg, backbone.load_report
    start: dict[str, Any] = {"weights": f"{card.encoder['variant']}: random initialisation"}
    if loaded is not None:
        start["weights"] = str(replace(loaded, source=strip_directory(loaded.source)))
    if record is not None:
        record = replace(record, name=strip_directory(record.name))
    start["data_overlap"] = str(seen_in_pretraining(record, dataset_name))
    start["citations"] = [record.citation] if record and record.citation else []
    if lora_rank:
        add_lora(backbone, rank=lora_rank)
    wrapped = wrap_encoder(backbone, card)
    if wrap is not None:
        wrapped = wrap(wrapped)
    source = weights or DEFAULT_WEIGHTS.get(card.encoder["variant"])
    if scratch or inflate is not None or wrap is not None or transfer == "encoder":
        source = None
    options = {**card.adapter, **accepted_options(card.network, weights=source)}
    network = adapter(card.network)(wrapped, len(card.labels), **options)
    if (loaded := getattr(network, "load_report", None)) is not None:
        start["weights"] = str(replace(loaded, source=strip_directory(loaded.source)))
    return network, _with_start(card, start)


Build = Callable[..., tuple[nn.Module, Card]]


def start_network(
    cfg: DataclassInstance,
    dataset: Dataset,
    fold: Fold,
    *,
    build: Build = build_model,
    downloads: bool = True,
    say: Callable[[str], object] = print,
) -> tuple[nn.Module, Card]:
    """The network to train, as the configuration names it, and its card; says what it starts from.

    Args:
        cfg: The recipe's configuration.
        dataset: The data set.
        fold: The cases to train and validate on.
        build: Builds the network.
        downloads: False puts random initialisation in the place of what would be downloaded.
        say: Prints a line.
    """
    card = make_card(cfg, dataset, say)
    start = dataclasses.asdict(cfg)
    if not downloads:
        start = _without_downloads(start, say)
    network: Any
    given = {key: start[key] for key in ("scratch", "weights", "transfer")}
    network, card = build(card, dataset.name, **given)
    if start["checkpointing"]:
        network.set_grad_checkpointing()
    if start["compiled"]:
        compile_in_place(network)
    if start["freeze"] == "encoder":
        set_frozen(network.encoder, True)
    card = record_start(card, network, fold, init=start["init"])
    say("\n".join(f"{key}: {value}" for key, value in card.training["start"].items()))
    return network, card


def _without_downloads(settings: Mapping[str, Any], say: Callable[[str], object]) -> dict[str, Any]:
    """The settings with random initialisation for what would have to be downloaded."""
    start = dict(settings)
    weights = start["weights"] or DEFAULT_WEIGHTS.get(start["variant"])
    is_used = not start["scratch"] and start["model"] != "basicunet"
    if is_used and weights is not None and needs_download(weights):
        say(f"dry run: weights {weights} are not downloaded; random initialisation stands for them")
        start |= {"scratch": True, "weights": None}
    if start["init"] is not None and not Path(start["init"]).expanduser().exists():
        say(f"dry run: init={start['init']} is not downloaded")
        start["init"] = None
    return start


def record_start(card: Card, network: nn.Module, fold: Fold, *, init: str | None = None) -> Card:
    """The card with the numbers of parameters and all cases that the network will have seen.

    Args:
        card: The card that `build_model` returned.
        network: Its network.
        fold: The cases to train and validate on.
        init: A fine-tuned model whose values the network takes over; None is none.
    """
    start = {**card.training["start"], "parameters": count_parameters(network)}
    seen = {*fold.train}
    if init is not None:
        origin, trained_on = init_from_checkpoint(network, card, init, fold.val)
        start |= origin
        seen.update(trained_on)
    card = _with_start(card, start)
    return replace(card, training={**card.training, "cases": sorted(seen)})


def init_from_checkpoint(
    model: nn.Module, card: Card, source: str, val: Collection[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Copies all values of a fine-tuned model into a network of the same classes and sizes.

    Args:
        model: Network to fill.
        card: Card of that network.
        source: Fine-tuned model, as for `Segmenter.from_pretrained`.
        val: Validation cases, which the fine-tuned model must not have been trained on.

    Returns:
        Provenance of the values, for the report; and the cases that they were trained on.

    Raises:
        ValueError: If the model has other classes or sizes, or was trained on cases of `val`.
    """
    earlier = Segmenter.from_pretrained(source)
    if dict(earlier.card.labels) != dict(card.labels):
        raise ValueError(
            f"init={source} has labels {earlier.card.labels}, the data have {card.labels}; pass it "
            "as weights= to load its encoder only"
        )
    cases = tuple(earlier.card.training.get("cases", ()))
    if seen := {*cases} & {*val}:
        raise ValueError(
            f"init={source} was trained on {len(seen)} of the validation cases, for example "
            f"{min(seen)}; choose the fold that it was trained on"
        )
    try:
        model.load_state_dict(earlier.model.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"init={source} has other sizes ({str(error).splitlines()[1].strip()}); give the "
            "variant=, img_size= and feature_size= that it was trained with"
        ) from None
    before = earlier.card.training.get("start", {})
    name = strip_directory(source)
    return {
        "weights": f"all values of the fine-tuned {name}",
        "data_overlap": before.get("data_overlap", f"unknown: {name} does not say"),
    }, cases


def _with_start(card: Card, start: Mapping[str, Any]) -> Card:
    """The card with what the network starts from."""
    return replace(card, training={**card.training, "start": dict(start)})


def count_parameters(network: nn.Module) -> dict[str, int]:
    """Numbers of parameters: all, those of the encoder, and those that are trained."""
    parts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()
    }
    return {
        "all": sum(parts.values()),
        "encoder": parts.get("encoder", 0),
        "trained": sum(p.numel() for p in network.parameters() if p.requires_grad),
    }


def report(
    accelerator: Accelerator,
    run: Run,
    segmenter: Segmenter,
    dataset: Dataset,
    fold: Fold,
    progress: Progress,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Scores a finished run on the grid of the files, and writes tables, figure and page.

    Every process predicts its share of the validation cases; the main process writes.

    Args:
        accelerator: Knows the processes.
        run: Its folder gets `results/`.
        segmenter: The network to score.
        dataset: The data set.
        fold: The cases that were trained on and those to score.
        progress: Cost of the training.
        settings: The recipe's configuration, for the page.
    """
    results = run.folder / "results"
    failed: dict[str, str] = {}
    mine = score_cases(
        lambda case: segmenter.predict(load_image(case)),
        dataset,
        fold.val[accelerator.process_index :: accelerator.num_processes],
        folder=results / "predictions",
        failed=failed,
        progress=accelerator.is_main_process,
    )
    scores = sorted(gather_object(mine), key=lambda score: score.case)
    failed = dict(sorted(gather_object([*failed.items()])))
    for case, why in failed.items():
        accelerator.print(f"{case} is not scored: {why}")
    if not scores:
        raise ValueError(f"none of the {len(failed)} validation cases of {run.folder} has a score")
    if not accelerator.is_main_process:
        return summarise_scores(scores, [*dataset.targets])
    number = f"fold {settings['fold']}"
    about = About(
        title=f"{settings['name']}: {settings['model']} on {dataset.name}, {number}",
        command=command_line(accelerator.num_processes),
        model="averaged weights of the last step",
        **segmenter.card.training["start"],
        failed=failed,
        steps=progress.step,
        seconds=round(progress.seconds, 1),
        cpu_seconds=round(progress.cpu_seconds, 1),
        peak_memory_mb=round(progress.peak_bytes / 1e6),
        dataset=segmenter.card.training["dataset"],
        split=f"{number} of {fold.rule}; {len(fold.train)} cases trained on",
        config=settings,
        provenance=provenance(Path(__file__).parent),
    )
    summary = write_results(results, scores, dataset, about, run.records())
    for key, value in summary["dice"].items():
        accelerator.print(f"Dice {key}: {value}")
    accelerator.print(f"mean Dice {summary['mean_dice']} over {summary['cases']} cases")
    pages = f"{results / 'report.html'} and {results / 'figure.png'}"
    accelerator.print(f"training took {progress.seconds:.0f} s; see {pages}")
    return summary


def train_folds(
    train: Callable[..., dict[str, Any]],
    cfg: DataclassInstance,
    dataset: Dataset,
    *,
    free: Collection[str],
    dry_run: bool,
) -> dict[str, Any]:
    """Trains the folds that are not finished, and reports on all.

    The runs are called ``NAME/fold_0``, ``NAME/fold_1``, ...; jobs of their own may train them,
    with these names and ``fold=``. ``NAME/results`` has every case scored by the network that did
    not train on it, and ``NAME/ensemble`` the networks.

    Args:
        train: Trains one fold and scores it; with ``dry_run=True`` measures it.
        cfg: The recipe's configuration.
        dataset: The data set.
        free: Keys that may change when a run is resumed.
        dry_run: Only measure the first fold.

    Returns:
        The scores; of a dry run the cost.
    """
    settings = dataclasses.asdict(cfg)
    name, folds = settings["name"], len(read_folds(dataset, folds=settings["folds"]))
    parts = [replace(cfg, name=f"{name}/fold_{n}", fold=n) for n in range(folds)]
    if dry_run:
        return train(parts[0], dry_run=True)
    for number, part in enumerate(parts):
        run = open_run(f"{name}/fold_{number}", part, free=free)
        if not (run.folder / "results/report.html").is_file():
            train(part)
    return report_folds(runs_folder() / name, folds, dataset, settings)


def report_folds(
    folder: Path, folds: int, dataset: Dataset, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Joins finished runs of all folds: one report, and the networks as an ensemble.

    Args:
        folder: Holds the runs ``fold_0``, ``fold_1``, ...; gets ``results`` and ``ensemble``.
        folds: Number of runs.
        dataset: The data set.
        settings: The recipe's configuration, for the page.

    Returns:
        The summary of the scores.
    """
    runs = [folder / f"fold_{number}" for number in range(folds)]
    results, ensemble = folder / "results", folder / "ensemble"
    if not PartialState().is_main_process:
        return {}
    (results / "predictions").mkdir(parents=True, exist_ok=True)
    ensemble.mkdir(exist_ok=True)
    scores, written = [], []
    for run in runs:
        scores += read_scores(run / "results/scores.csv")
        written.append(json.loads((run / "results/scores.json").read_text(encoding="utf-8")))
        for path in (run / "results/predictions").iterdir():
            copy_file(path, results / "predictions" / path.name)
        copy_file(run / "last.safetensors", ensemble / f"{run.name}.safetensors")
    known = {field.name for field in dataclasses.fields(About)}
    about = replace(
        About(**{key: value for key, value in written[0].items() if key in known}),
        title=f"{settings['name']}: {settings['model']} on {dataset.name}, all folds",
        command=command_line(PartialState().num_processes),
        split=f"{folds} folds; every case scored by the network that was not trained on it",
        seconds=sum(each["seconds"] for each in written),
        cpu_seconds=sum(each["cpu_seconds"] for each in written),
        config=settings,
    )
    ordered = sorted(scores, key=lambda score: score.case)
    summary = write_results(results, ordered, dataset, about)
    PartialState().print(
        f"mean Dice {summary['mean_dice']} over {summary['cases']} cases, out of fold; see "
        f"{results / 'report.html'}\nensemble: {ensemble}"
    )
    return summary
