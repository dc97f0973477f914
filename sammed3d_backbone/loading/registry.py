"""The weights table: where each file comes from, what it was trained on and what input it expects.

A record is data only. `hub.py` finds its file, `checkpoint.py` reads it, `factory.py` builds the
network.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

from sammed3d_backbone.data.preprocessing import SAM_MED3D, Preprocessing
from sammed3d_backbone.loading.calibration import DiceCalibration

LISTED = "listed, not downloaded"
METADATA_KEY = "weights_record"


@dataclass(frozen=True)
class PretrainingSet:
    """One dataset that a network was trained on.

    Args:
        name: Name in the list of its source.
        stages: Stages of the pretraining that used it, counted from 1.
    """

    name: str
    stages: tuple[int, ...]


@dataclass(frozen=True)
class UnetrDecoder:
    """The decoder of a UNETR that was trained on the encoder of the same file.

    Args:
        feature_size: Channels at full resolution, as in `adapters.unetr`.
        patch_size: Side of the encoder's patches, in voxels.
        out_indices: Blocks whose maps it reads.
        classes: Classes that it was trained on, without the background; their layer is not stored.
    """

    feature_size: int
    patch_size: int
    out_indices: tuple[int, ...]
    classes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line."""
        return f"feature_size {self.feature_size}, trained on {', '.join(self.classes)}"


@dataclass(frozen=True)
class Weights:
    """Everything needed to use one weights file, as far as it is known; None is "not known".

    Args:
        name: Name in the table, or the `weights=` argument.
        variant: Network size, a name in `variants.VARIANTS`.
        repo_id: Hub repository; None for a file of this package or of the user.
        filename: Path inside the repository, or the file's name.
        revision: Branch, tag or commit on the Hub.
        sha256: SHA-256 of the file.
        licence: Licence of the weights, as their source states it.
        rel_pos: Relative positions that the weights were trained with: "sammed3d" or "axial".
        point_pos: Position code of clicks that they were trained with: "swapped" or "aligned".
        clicks: What each step of an interaction was given in training, the "newest" click or "all".
        dice_calibration: How the predicted Dice follows from a mask; without it none is shown.
        unetr: The UNETR decoder that the file holds beside its encoder; None for none.
        preprocessing: How a scan becomes the network's input.
        pretraining: The published list of training sets.
        held_out: Sets that the source says were kept out of training.
        undisclosed_sets: Number of further training sets whose names are not public.
        distilled_from: Name and sha256 of the teacher whose answers it was trained on.
        citation: Reference to cite when using them.
        status: Whether this project trained, opened or only lists the file.
    """

    name: str
    variant: str | None = None
    repo_id: str | None = None
    filename: str | None = None
    revision: str | None = None
    sha256: str | None = None
    licence: str | None = None
    rel_pos: Literal["sammed3d", "axial"] | None = None
    point_pos: str | None = None
    clicks: Literal["newest", "all"] | None = None
    dice_calibration: DiceCalibration | None = None
    unetr: UnetrDecoder | None = None
    preprocessing: Preprocessing | None = None
    pretraining: tuple[PretrainingSet, ...] | None = field(default=None, repr=False)
    held_out: tuple[str, ...] = field(default=(), repr=False)
    undisclosed_sets: int | None = None
    distilled_from: str | None = None
    citation: str | None = field(default=None, repr=False)
    status: str = "not in the table"

    def __str__(self) -> str:
        """The record as lines of `field: value`, lists of datasets counted."""
        rows = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.pretraining is not None:
            later = sum(max(entry.stages) > 1 for entry in self.pretraining)
            rows["pretraining"] = f"{len(self.pretraining)} named sets, {later} beyond stage 1"
        rows["unetr"] = self.unetr or "none in the file"
        rows["distilled_from"] = self.distilled_from or "no teacher"
        rows["held_out"] = ", ".join(self.held_out) or None
        del rows["preprocessing"]
        rows |= self.preprocessing.to_dict() if self.preprocessing else {"preprocessing": None}
        return "\n".join(f"{key}: {_shown(value)}" for key, value in rows.items())


def _shown(value: object) -> str:
    if value is None:
        return "not known"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return str(value)


# Source: supplement of the SAM-Med3D paper (arXiv:2310.15161), Table 1. Its text says 44 sets in
# the second stage, its table ticks 43.
_STAGE_1_ONLY = """
    ASC18 BraTS13 BraTS15 BraTS18 BraTS19 CrossMoDA21 CrossMoDA22 hvsmr16 LUNA16 MSD_Heart
    MSD_Hippocampus MSD_Prostate PICAI RibFrac2020 StructSeg19
"""
_BOTH_STAGES = """
    AbdomenCT-1K AMOS22 ATM22 BrainPTM BraTS20 BraTS21 BTCV_Cervix CAUSE07 CHAOS COSMOS22
    COVID19CTscans CT_ORG CTPelvic1k FLARE21 FLARE22 HeartSegMRI ISLESSISS ISLESSPES VerSe19
    VerSe20 VESSEL12 KiTS19 KiTS21 KIPA22 LAScarQS22 LITS MMWHS MSD_BrainTumour MSD_Colon
    MSD_HepaticVessel MSD_Liver MSD_Lung MSD_Pancreas MSD_Spleen Parse22 Promise09 Promise12
    ProstateMRISeg SegThor SLIVER07 STACOM_SLAWT Totalsegmentator WORD
"""
SA_MED3D_140K = tuple(
    sorted(
        (
            *(PretrainingSet(name, (1,)) for name in _STAGE_1_ONLY.split()),
            *(PretrainingSet(name, (1, 2)) for name in _BOTH_STAGES.split()),
        ),
        key=lambda entry: entry.name.lower(),
    )
)
_HELD_OUT = """
    BTCV HaN-Seg FeTA21 FeTA22 iSeg17 iSeg19 MRBrains13 MRBrains18 cSeg22 SEG.A.2023 ATLAS TDSC-ABUS
"""
SA_MED3D_HELD_OUT = tuple(_HELD_OUT.split())

# Source: files and readme of huggingface.co/blueyo0/SAM-Med3D. None of the files was opened here,
# and only turbo's hash is published. Training used the stored axis order, inference RAS.
_TURBO = Weights(
    name="turbo",
    variant="vit_b",
    repo_id="blueyo0/SAM-Med3D",
    filename="sam_med3d_turbo.pth",
    revision="main",
    sha256="899a46d04d3b70f723282ceb489149373558bf0aaba389a346f5ab57da5cdd3c",
    licence="Apache-2.0 by its model card; the training sets have terms of their own",
    rel_pos="sammed3d",
    point_pos="swapped",
    clicks="newest",
    preprocessing=SAM_MED3D,
    pretraining=SA_MED3D_140K,
    held_out=SA_MED3D_HELD_OUT,
    undisclosed_sets=24,
    citation=(
        "Wang et al., SAM-Med3D, arXiv:2310.15161; IEEE TNNLS 2025, doi 10.1109/TNNLS.2025.3586694"
    ),
    status=LISTED,
)


def _challenge(name: str, filename: str, data: str) -> Weights:
    """`turbo` fine-tuned for the CVPR 2025 challenge; preprocessing and data list are unknown."""
    return dataclasses.replace(
        _TURBO,
        name=name,
        filename=filename,
        sha256=None,
        preprocessing=None,
        pretraining=(*SA_MED3D_140K, PretrainingSet(data, (3,))),
        held_out=(),
        undisclosed_sets=None,
    )


# Source: huggingface.co/timm/samvit_base_patch16.sa1b. SAM itself began with MAE weights, whose
# images the card does not name. The network is 2-D: load it with `inflate=`.
_SAM_2D = Weights(
    name="sam_2d",
    variant="vit_b",
    repo_id="timm/samvit_base_patch16.sa1b",
    filename="model.safetensors",
    revision="main",
    licence="Apache-2.0 by its model card",
    rel_pos="axial",
    pretraining=(PretrainingSet("SA-1B", (1,)),),
    citation="Kirillov et al., Segment Anything, ICCV 2023, arXiv:2304.02643",
    status=LISTED,
)

# Trained by this project; the card is weights/tiny.md. A test compares this with the file's own
# record.
_TINY = Weights(
    name="tiny",
    variant="tiny",
    filename="tiny.safetensors",
    sha256="8502a56f0e345cb26872b558b110feb6eb9c85062413ceb153d4e5a3f426f9e9",
    licence=(
        "Apache-2.0; trained on scans under MIT, Apache-2.0, BSD-3-Clause and CC BY, whose authors "
        "weights/tiny.md names"
    ),
    rel_pos="axial",
    point_pos="aligned",
    clicks="all",
    dice_calibration=DiceCalibration(intercept=-1.7848, slope=1.2282, per_click=0.1317),
    preprocessing=dataclasses.replace(
        SAM_MED3D, statistics="volume", crop_vox=(64, 64, 64), spacing_mm=(2.0, 2.0, 2.0)
    ),
    pretraining=tuple(
        PretrainingSet(name, (1,))
        for name in (
            "synthetic",
            "HeadNeckCT",
            "HeadNeckCTMore",
            "totalsegmentator",
            "tptbox_spine",
            "glioma",
            "openms_lesion",
            "pyradiomics_tumour",
            "sct_spinalcord_mr",
        )
    ),
    held_out=("hippocampus", "voxelmorph_brain", "abdomen_mr"),
    undisclosed_sets=0,
    citation="this package, and the data sets of weights/tiny.md",
    status="trained by this project, installed with the package",
)

WEIGHTS: dict[str, Weights] = {
    "tiny": _TINY,
    "turbo": _TURBO,
    "turbo_bbox_init": dataclasses.replace(
        _TURBO, name="turbo_bbox_init", filename="sam_med3d_turbo_bbox_init.pth", sha256=None
    ),
    "cvpr_coreset": _challenge(
        "cvpr_coreset", "sam_med3d_turbo_cvpr_coreset.pth", "CVPR 2025 challenge, coreset"
    ),
    "cvpr_alldata": _challenge(
        "cvpr_alldata", "sam_med3d_turbo_cvpr_alldata.pth", "CVPR 2025 challenge, all data"
    ),
    "sam_2d": _SAM_2D,
}

# The weights that `encoder(variant)` loads by default.
DEFAULT_WEIGHTS = {"tiny": "tiny", "vit_b": "turbo"}


def list_weights() -> list[str]:
    """Names in the weights table, for `encoder(weights=...)`."""
    return sorted(WEIGHTS)


def default_weights(variant: str) -> str:
    """The name of a variant's default weights.

    Raises:
        ValueError: If none were published for it.
    """
    if variant in DEFAULT_WEIGHTS:
        return DEFAULT_WEIGHTS[variant]
    raise ValueError(
        f"no weights are published for variant {variant!r}; pass pretrained=False for random "
        f"initialisation, or weights= with a file; {sorted(DEFAULT_WEIGHTS)} have weights"
    )


def to_metadata(record: Weights) -> dict[str, str]:
    """The record as an entry for the metadata of a safetensors file."""
    return {METADATA_KEY: json.dumps(dataclasses.asdict(record))}


def from_metadata(record: Weights, metadata: dict[str, str]) -> Weights:
    """The record in a file's metadata, with name, place and hash of the one given.

    A record of the weights table is complete and returned as it is. Fields of the metadata that
    this version does not know are ignored.

    Raises:
        ValueError: If the file's entry is not a valid record.
    """
    if METADATA_KEY not in metadata or record.variant is not None:
        return record
    from pydantic import TypeAdapter, ValidationError

    try:
        inner = TypeAdapter(Weights).validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"the metadata entry {METADATA_KEY!r} of {record.name} is not a valid weights record "
            f"({field}: {first['msg']}); write the file again with `sammed3d convert`"
        ) from None
    return dataclasses.replace(
        inner,
        name=record.name,
        repo_id=record.repo_id,
        filename=record.filename,
        revision=record.revision,
        sha256=record.sha256,
        status=f"{record.status}, made from {inner.name}",
    )
