"""The weights table: where trained values come from and all that is needed to use them.

In goes a name, a file or `repo_id:file`; out come a frozen record and a local path whose
content is the one that was promised. Reading the file is `checkpoint.py`, putting it into a
network is `factory.py`.
"""

import dataclasses
import difflib
import hashlib
import importlib.resources
import json
import logging
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sammed3d_backbone.loading.variants import VARIANTS

logger = logging.getLogger(__name__)

LISTED = "listed, not downloaded"
METADATA_KEY = "weights_record"


@dataclass(frozen=True)
class PretrainingSet:
    """One dataset that a network was trained on.

    Args:
        name: As its source lists it.
        stages: Stages of the pretraining that used it, counted from 1.
    """

    name: str
    stages: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """Everything needed to use one weights file, as far as it is known; None is "not known".

    Args:
        name: Name in the table, or what was asked for.
        variant: Sizes it belongs to, a name in `variants.VARIANTS`.
        repo_id: Hub repository; None for a file of this package or of the user.
        filename: Path inside the repository, or the file's name.
        revision: Branch, tag or commit on the Hub.
        sha256: Of the file; where it is not known, the first download pins it.
        licence: Of the weights, as their source states it.
        rel_pos: Form of the relative positions that the values were trained with.
        point_pos: Form of the decoder's position code that they were trained with.
        spacing_mm: Voxel spacing along X, Y, Z.
        crop_vox: Input size along X, Y, Z.
        orientation: Directions of array axes 0, 1, 2.
        normalisation: What happens to intensities before the network.
        pretraining: The published list of training sets.
        held_out: Sets that the source says were kept out of training.
        undisclosed_sets: Number of further training sets whose names are not public.
        citation: What to cite when using them.
        status: What this project has done with the file.
    """

    name: str
    variant: str | None = None
    repo_id: str | None = None
    filename: str | None = None
    revision: str | None = None
    sha256: str | None = None
    licence: str | None = None
    rel_pos: str | None = None
    point_pos: str | None = None
    spacing_mm: tuple[float, float, float] | None = None
    crop_vox: tuple[int, int, int] | None = None
    orientation: str | None = None
    normalisation: str | None = None
    pretraining: tuple[PretrainingSet, ...] | None = field(default=None, repr=False)
    held_out: tuple[str, ...] = field(default=(), repr=False)
    undisclosed_sets: int | None = None
    citation: str | None = field(default=None, repr=False)
    status: str = "not in the table"

    def __str__(self) -> str:
        """The record as lines of `field: value`, lists of datasets counted."""
        rows = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.pretraining is not None:
            later = sum(max(entry.stages) > 1 for entry in self.pretraining)
            rows["pretraining"] = f"{len(self.pretraining)} named sets, {later} beyond stage 1"
        rows["held_out"] = ", ".join(self.held_out) or None
        return "\n".join(f"{key}: {_shown(value)}" for key, value in rows.items())


def _shown(value: object) -> str:
    if value is None:
        return "not known"
    if isinstance(value, tuple):
        return " x ".join(str(entry) for entry in value)
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
SA_MED3D_HELD_OUT = (
    "BTCV",
    "HaN-Seg",
    "FeTA21",
    "FeTA22",
    "iSeg17",
    "iSeg19",
    "MRBrains13",
    "MRBrains18",
    "cSeg22",
    "SEG.A.2023",
    "ATLAS",
    "TDSC-ABUS",
)

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
    spacing_mm=(1.5, 1.5, 1.5),
    crop_vox=(128, 128, 128),
    orientation="RAS",
    normalisation=(
        "CT clamped to [-1000, 1000] HU; then z-score with the mean and unbiased deviation "
        "of the crop's voxels above 0; this package takes them, on purpose, over the whole "
        "resampled volume, so that all windows of a scan share one scale"
    ),
    pretraining=SA_MED3D_140K,
    held_out=SA_MED3D_HELD_OUT,
    undisclosed_sets=24,
    citation=(
        "Wang et al., SAM-Med3D, arXiv:2310.15161; IEEE TNNLS 2025, doi 10.1109/TNNLS.2025.3586694"
    ),
    status=LISTED,
)


def _challenge(name: str, filename: str, data: str) -> Weights:
    """Turbo trained on for the CVPR 2025 challenge; its preprocessing and data list are unknown."""
    return dataclasses.replace(
        _TURBO,
        name=name,
        filename=filename,
        sha256=None,
        spacing_mm=None,
        orientation=None,
        normalisation=None,
        pretraining=(*SA_MED3D_140K, PretrainingSet(data, (3,))),
        held_out=(),
        undisclosed_sets=None,
    )


# Source: huggingface.co/timm/samvit_base_patch16.sa1b. SAM itself began with MAE weights, whose
# images the card does not name. Of a 2-D network: `inflation.py` makes it fit.
_SAM2D = Weights(
    name="sam2d:hub",
    variant="vit_b",
    repo_id="timm/samvit_base_patch16.sa1b",
    filename="model.safetensors",
    revision="main",
    licence="Apache-2.0 by its model card",
    rel_pos="axial",
    normalisation=(
        "2-D: RGB minus ImageNet's mean over its deviation; volumes come z-scored, as one colour"
    ),
    pretraining=(PretrainingSet("SA-1B", (1,)),),
    citation="Kirillov et al., Segment Anything, ICCV 2023, arXiv:2304.02643",
    status=LISTED,
)

# Ours, in weights/ with its card; tests hold the record against what the file says of itself.
_TINY = Weights(
    name="tiny",
    variant="tiny",
    filename="tiny.safetensors",
    sha256="952d8ed026b9a663374ec4186365f0dcb1fb1131e6fe00372349ea4d1d2498b4",
    licence=(
        "Apache-2.0; trained on scans under MIT, Apache-2.0, BSD-3-Clause and CC BY, whose authors "
        "weights/tiny.md names"
    ),
    rel_pos="sammed3d",
    point_pos="aligned",
    spacing_mm=(1.5, 1.5, 1.5),
    crop_vox=(64, 64, 64),
    orientation="RAS",
    normalisation=(
        "CT clamped to [-1000, 1000] HU; then z-score with mean and deviation of the whole "
        "volume's voxels above 0"
    ),
    pretraining=(
        PretrainingSet("synthetic", (1, 2)),
        PretrainingSet("HeadNeckCT", (1, 2)),
        PretrainingSet("totalsegmentator", (1,)),
        PretrainingSet("tptbox_spine", (1,)),
        PretrainingSet("glioma", (1,)),
        PretrainingSet("openms_lesion", (1, 2)),
        PretrainingSet("pyradiomics_tumour", (1, 2)),
        PretrainingSet("sct_spinalcord_mr", (1, 2)),
    ),
    held_out=("hippocampus", "voxelmorph_brain"),
    undisclosed_sets=0,
    citation="this package, and the data sets of weights/tiny.md",
    status="trained here, installed with the package",
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
    "sam2d:hub": _SAM2D,
}

# What `encoder(variant)` loads when it is not told.
DEFAULT_WEIGHTS = {"tiny": "tiny", "vit_b": "turbo"}


def list_weights() -> list[str]:
    """Names that `encoder(weights=...)` knows besides "none", files and `repo_id:file`."""
    return sorted(WEIGHTS)


# --- from a name to a file -------------------------------------------------------------------

# org/repo:path/in/repo, or org/repo@revision:path/in/repo
_HUB_FILE = re.compile(
    r"(?P<repo_id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?:(?P<filename>[^:]+)"
)


def default_weights(variant: str) -> str:
    """The name of the weights that a variant starts from.

    Raises:
        ValueError: If none were published for it.
    """
    if variant in DEFAULT_WEIGHTS:
        return DEFAULT_WEIGHTS[variant]
    raise ValueError(
        f"no weights are published for {variant!r}; pass weights='none' for a random start, "
        f"or a file, or choose one of {sorted(DEFAULT_WEIGHTS)}"
    )


def _require_no_variant(name: str) -> None:
    """Refuses the name of a network where that of weights is needed, saying what there is."""
    if name not in VARIANTS:
        return
    side = VARIANTS[name].img_size
    crop = f"{name!r} is a variant (crop {side}^3 voxels)"
    if name in DEFAULT_WEIGHTS:
        raise ValueError(f"{crop}, not weights; its weights are {DEFAULT_WEIGHTS[name]!r}")
    raise ValueError(
        f"{crop} without weights yet; start at random with encoder({name!r}, weights='none'), or "
        "give a weights file"
    )


def locate(weights: str | os.PathLike[str]) -> tuple[Weights, Path]:
    """The record of some weights and a local file with exactly that content.

    Downloads what is not in the Hub's cache, after saying how large it is.

    Args:
        weights: A name in the table, a local file, or `repo_id:file` on the Hub, with
            `repo_id@revision:file` for one revision.

    Raises:
        ValueError: If the name is unknown, or the file is not the one that was pinned.
        FileNotFoundError: If there is no such file here, on the Hub, or in the offline cache.
        PermissionError: If the Hub wants a token, or acceptance of its terms.
        ConnectionError: If the transfer broke.
    """
    if isinstance(weights, str) and weights in WEIGHTS:
        record = WEIGHTS[weights]
        return record, _packaged(record) if record.repo_id is None else _download(record)
    path = Path(weights).expanduser()
    if path.exists():
        return describe(path), path
    hub = _HUB_FILE.fullmatch(str(weights))
    if hub:
        record = Weights(
            name=str(weights),
            repo_id=hub["repo_id"],
            filename=hub["filename"],
            revision=hub["revision"] or "main",
            status="from the Hub, not in the table",
        )
        return record, _download(record)
    if isinstance(weights, os.PathLike) or path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(
            f"no weights file {str(weights)!r}; give an existing .safetensors or .pth file, "
            f"'repo_id:file' for one on the Hub, or a name of {list_weights()}"
        )
    _require_no_variant(str(weights))
    near = difflib.get_close_matches(str(weights), WEIGHTS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"unknown weights {weights!r}; known: {list_weights()}, 'none' for a random start, "
        f"a file, or 'repo_id:file' on the Hub.{hint}"
    )


def describe(path: Path) -> Weights:
    """The record of a local file: the table's if the content is known there, else a bare one."""
    digest = sha256_of(path)
    for record in WEIGHTS.values():
        if record.sha256 == digest:
            return dataclasses.replace(record, status=f"local file with the hash of {record.name}")
    return Weights(name=str(path), filename=path.name, sha256=digest, status="local file")


def sha256_of(path: Path) -> str:
    """Hash of a file's content, in hexadecimal.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the weights file inside it")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _packaged(record: Weights) -> Path:
    """A file that was installed with the package."""
    folder = importlib.resources.files("sammed3d_backbone.weights")
    path = Path(str(folder)) / str(record.filename)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the installation; install again")
    _require_hash(record, path)
    return path


def _download(record: Weights) -> Path:
    """The record's file in the Hub's cache, with the hash that the record or the pin demands."""
    if record.sha256 is not None:
        # Content that the table fixes cannot go stale: no request where it is cached already.
        cached = _cached(record)
        if cached is not None and sha256_of(cached) == record.sha256:
            return cached
        path = _fetch(record)
        _require_hash(record, path)
        return path
    path = _fetch(record)
    pin = _pin_path(record)
    if pin.is_file():
        _require_pin(record, path, pin)
    else:
        _pin(record, path, pin)
    return path


def _cached(record: Weights) -> Path | None:
    """The newest cached file of a record, without asking the network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        str(record.repo_id), str(record.filename), revision=record.revision
    )
    return Path(found) if isinstance(found, str) else None


def _fetch(record: Weights) -> Path:
    """Ask the Hub for a file; errors say what to do."""
    from huggingface_hub import constants, errors, hf_hub_download

    repo_id, filename = str(record.repo_id), str(record.filename)
    place = f"{repo_id}@{record.revision}"
    try:
        plan = hf_hub_download(repo_id, filename, revision=record.revision, dry_run=True)
        _announce(record, (plan.file_size or 0) if plan.will_download else None)
        return Path(hf_hub_download(repo_id, filename, revision=record.revision))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{place} is gated: accept its terms at {constants.ENDPOINT}/{record.repo_id} and "
            "log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        # The Hub answers an anonymous request for a missing repository like one for a private one.
        raise FileNotFoundError(
            f"no repository {record.repo_id} at {constants.ENDPOINT} that you may read; check "
            "the name, and for a private one log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{record.repo_id} has no revision {record.revision!r}; use a branch, tag or full "
            "commit of that repository"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(_unreachable(record, error)) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{place} has no file {record.filename!r}; see "
            f"{constants.ENDPOINT}/{record.repo_id}/tree/{record.revision}"
        ) from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(
                f"{constants.ENDPOINT} refused the token for {place}; log in again with "
                "`hf auth login`, or correct HF_TOKEN"
            ) from error
        raise ConnectionError(
            f"{constants.ENDPOINT} failed on {record.filename} of {place}: {error}; try later"
        ) from error
    except TypeError:  # a fault of this code or of the release of huggingface_hub, not of the net
        raise
    except Exception as error:  # the HTTP library below huggingface_hub changes between releases
        raise ConnectionError(
            f"the download of {record.filename} from {place} broke off: {error}; run it again, "
            "or fetch the file by other means and pass its path"
        ) from error


def _announce(record: Weights, n_bytes: int | None) -> None:
    """Say how large a download will be; None is no download, since the cache has the file."""
    from huggingface_hub import constants

    if n_bytes is not None:
        logger.warning(
            "downloading %s (%.0f MB) from %s into %s",
            record.filename,
            n_bytes / 1e6,
            f"{constants.ENDPOINT}/{record.repo_id}",
            constants.HF_HUB_CACHE,
        )


def _unreachable(record: Weights, error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
        remedy = "unset it once to download"
    else:
        reason = f"{constants.ENDPOINT} cannot be reached ({error.__cause__ or error})"
        remedy = "check the connection, or set HF_ENDPOINT to a mirror"
    return (
        f"{record.filename} of {record.repo_id}@{record.revision} is not in the cache "
        f"{constants.HF_HUB_CACHE} and {reason}; {remedy}, or pass the path of a local copy"
    )


def _require_hash(record: Weights, path: Path) -> None:
    found = sha256_of(path)
    if found != record.sha256:
        raise ValueError(
            f"{path} is not the file of the weights table: {record.name!r} has sha256 "
            f"{record.sha256}, this one {found}. Delete it and run again in case the copy is "
            "damaged; to use this other content, pass its path instead of the name"
        )


def _require_pin(record: Weights, path: Path, pin: Path) -> None:
    try:
        pinned = json.loads(pin.read_text(encoding="utf-8"))
        promised, commit = str(pinned["sha256"]), str(pinned["commit"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the pin {pin} is damaged ({error}); delete it to pin anew") from error
    found = sha256_of(path)
    if found != promised:
        raise ValueError(
            f"{record.name!r} has changed since its first use: its sha256 is {found} in {path}, "
            f"pinned is {promised}. To keep the first content pass "
            f"'{record.repo_id}@{commit}:{record.filename}'; to accept the new one delete {pin}"
        )


def _pin_path(record: Weights) -> Path:
    """Where the hash of a first download is kept: the Hub's folder for such files."""
    from huggingface_hub import constants

    key = f"{record.repo_id}@{record.revision}:{record.filename}"
    name = re.sub(r"[^\w.@-]+", "--", key)
    return Path(constants.HF_ASSETS_CACHE) / "sammed3d_backbone" / "pins" / f"{name}.json"


def _pin(record: Weights, path: Path, pin: Path) -> None:
    """Remember a first download; several processes may do so at once."""
    content = {
        "repo_id": record.repo_id,
        "revision": record.revision,
        "filename": record.filename,
        "commit": path.parts[path.parts.index("snapshots") + 1],
        "sha256": sha256_of(path),
    }
    try:
        pin.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=pin.parent, suffix=".draft")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        Path(draft).replace(pin)
    except OSError as error:
        logger.warning("%s is not pinned, a later change goes unseen: %s", record.name, error)
        return
    logger.warning(
        "pinned %s at first use: sha256 %s, recorded in %s", record.name, content["sha256"], pin
    )


# --- records in the metadata of files --------------------------------------------------------


def to_metadata(record: Weights) -> dict[str, str]:
    """The record as an entry of a safetensors file's metadata."""
    return {METADATA_KEY: json.dumps(dataclasses.asdict(record))}


def from_metadata(record: Weights, metadata: dict[str, str]) -> Weights:
    """The record that a file carries, with its place and hash from the one found outside.

    A file without one, or one whose content the table lists, keeps the record from outside. Fields
    that this release does not know are passed over, so that files of later releases stay readable.

    Raises:
        ValueError: If the file's entry is not a record.
    """
    listed = {known.sha256 for known in WEIGHTS.values() if known.sha256 is not None}
    if METADATA_KEY not in metadata or record.sha256 in listed:
        return record
    try:
        inner = _parsed(json.loads(metadata[METADATA_KEY]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the metadata entry {METADATA_KEY!r} of {record.name} is not a weights record "
            f"({error}); write the file again with `sammed3d convert`"
        ) from error
    return dataclasses.replace(
        inner,
        name=record.name,
        repo_id=record.repo_id,
        filename=record.filename,
        revision=record.revision,
        sha256=record.sha256,
        status=f"{record.status}, made from {inner.name}",
    )


def _parsed(fields: dict[str, Any]) -> Weights:
    known = {f.name for f in dataclasses.fields(Weights)}
    kept: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in fields.items()
        if key in known
    }
    if kept.get("pretraining") is not None:
        kept["pretraining"] = tuple(
            PretrainingSet(str(entry["name"]), tuple(entry["stages"]))
            for entry in kept["pretraining"]
        )
    return Weights(**kept)


# --- contamination ---------------------------------------------------------------------------

# The Decathlon numbers its tasks; nnU-Net and MONAI name the folders after them.
_DECATHLON = {
    1: "BrainTumour",
    2: "Heart",
    3: "Liver",
    4: "Hippocampus",
    5: "Prostate",
    6: "Lung",
    7: "Pancreas",
    8: "HepaticVessel",
    9: "Spleen",
    10: "Colon",
}
# Task 1 calls itself by the series that it is made of, task 2 by what is segmented.
_DECATHLON_NAMES = {"brats": "BrainTumour", "leftatrium": "Heart"} | {
    name.lower(): name for name in _DECATHLON.values()
}
# Series whose members' names do not simply end in a year.
_SERIES = {"isles": ("ISLESSISS", "ISLESSPES"), "sega": ("SEG.A.2023",)}


@dataclass(frozen=True)
class Exposure:
    """Whether a network saw a dataset in pretraining.

    Args:
        dataset: What was asked.
        verdict: "seen"; "related" for another edition of a listed series; "held out" where the
            source says so; "not listed"; "not known" where there is no list; "none" for a
            random start.
        sentence: The statement to print beside a score.
    """

    dataset: str
    verdict: Literal["seen", "related", "held out", "not listed", "not known", "none"]
    sentence: str

    def __str__(self) -> str:
        """The statement."""
        return self.sentence


def seen_in_pretraining(record: Weights | None, dataset_name: str) -> Exposure:
    """Whether a dataset was in the pretraining data of some weights.

    Names are compared without case and punctuation; `MSD_Liver`, `Task03_Liver` and
    `Dataset003_Liver` are the same set, and a bare series such as `BraTS` stands for all of
    its editions. The Decathlon's dataset.json gives its tasks bare names such as `Liver`, so
    such a name is taken for the task.

    Args:
        record: The weights' record; None for a random start.
        dataset_name: The dataset that a network is to be scored on.
    """
    if record is None:
        return Exposure(dataset_name, "none", "random start: no dataset was seen in pretraining")
    if record.pretraining is None:
        return Exposure(
            dataset_name,
            "not known",
            f"the pretraining data of {record.name} are not known: it cannot be said whether "
            f"{dataset_name} was among them",
        )
    stages = {entry.name: entry.stages for entry in record.pretraining}
    same, edition = _matches(dataset_name, tuple(stages))
    held, held_edition = _matches(dataset_name, record.held_out)
    if same:
        listed = ", ".join(f"{name} (stage {_joined(stages[name])})" for name in same)
        return Exposure(
            dataset_name,
            "seen",
            f"{dataset_name} was in the pretraining data of {record.name}: {listed}; a score "
            "on it is not a score on unseen data",
        )
    if held:
        return Exposure(
            dataset_name,
            "held out",
            f"{dataset_name} was kept out of the pretraining data of {record.name} "
            f"(listed as {', '.join(held)})",
        )
    if edition or held_edition:
        listed = ", ".join((*edition, *(f"{name} (held out)" for name in held_edition)))
        return Exposure(
            dataset_name,
            "related",
            f"{dataset_name} itself is not listed in the pretraining data of {record.name}, "
            f"other editions are: {listed}; they may share cases",
        )
    rest = {
        None: "the list is incomplete",
        0: "the list is complete",
    }.get(record.undisclosed_sets, f"{record.undisclosed_sets} further sets are not public")
    return Exposure(
        dataset_name,
        "not listed",
        f"{dataset_name} is not in the published pretraining data of {record.name} ({rest})",
    )


def _joined(stages: tuple[int, ...]) -> str:
    return " and ".join(str(stage) for stage in stages)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _matches(asked: str, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Listed names that are the asked set, and those that are another edition of it."""
    plain = _plain(asked)
    task = re.fullmatch(r"(?:msd)?(?:task|dataset)(\d{2,3})([a-z].*)", plain)
    if task:
        organ = _plain(_DECATHLON.get(int(task[1]), ""))
        plain = f"msd{organ}" if organ and task[2] == organ else task[2]
    exact = tuple(name for name in names if _plain(name) == plain)
    if exact:
        return exact, ()
    named = None if task else _DECATHLON_NAMES.get(plain)
    series = tuple(name for name in names if _series(name) == plain or name == f"MSD_{named}")
    if series:
        return series, ()
    return (), tuple(name for name in names if re.fullmatch(rf"{_series(name)}(v?\d.*)", plain))


def _series(name: str) -> str:
    """A dataset's name without its edition."""
    for series, members in _SERIES.items():
        if name in members:
            return series
    plain = _plain(name)
    return "msd" if plain.startswith("msd") else re.sub(r"\d+$", "", plain)
