"""Bad inputs: the exception's class, what its message names, and that nothing is left on disk.

Each row spoils a small data set, a configuration or a file in its own way and then runs the recipe
or `sammed3d predict` on it, in a folder of its own.
"""

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from sammed3d_backbone.recipes import finetune_unetr
from sammed3d_backbone.recipes.finetune_unetr import Config
from torch import Tensor

from sammed3d_backbone import cli, config, encoder
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import Segmenter, build_network
from sammed3d_backbone.loading.checkpoint import write
from sammed3d_backbone.training.runs import open_run

CLASSES = ("head", "tail")
SHAPE = (12, 10, 9)
RAMP = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)  # an image with contrast
KNOBS = {
    "name": "toy",
    "data": "data",
    "folds": 3,
    "scratch": True,
    "feature_size": 4,
    "crop_vox": 16,
    "steps": 2,
    "validate_every": 2,
    "warmup_steps": 1,
    "threads": 1,
    "cpu": True,
}


class Workplace:
    """A folder with a good data set and a good configuration, ready to be spoilt."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        for i in range(6):
            self.image(i, np.random.default_rng(i).normal(100, 20, SHAPE))
            self.label(i, self.labels())
        self.describe()
        knobs = {**KNOBS, "data": str(self.data)}
        (root / "toy.yaml").write_text(json.dumps(knobs), encoding="utf-8")

    def labels(self) -> np.ndarray:
        """Labels with both classes."""
        array = np.zeros(SHAPE, np.uint8)
        array[2:5, 2:6, 2:6], array[6:9, 2:6, 2:6] = 1, 2
        return array

    def image(self, case: int, array: np.ndarray, affine: np.ndarray | None = None) -> None:
        """Replaces an image; channels come last."""
        self.nifti(f"imagesTr/case_{case}.nii.gz", array.astype(np.float32), affine)

    def label(self, case: int, array: np.ndarray, affine: np.ndarray | None = None) -> None:
        """Replaces a label."""
        self.nifti(f"labelsTr/case_{case}.nii.gz", array, affine)

    def nifti(self, name: str, array: np.ndarray, affine: np.ndarray | None = None) -> None:
        """Writes a file of the data set as it is, however bad."""
        path = self.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(array, None)
        image.header.set_sform(np.eye(4) if affine is None else affine, code=1)
        nib.save(image, path)

    def describe(self, **changes: object) -> None:
        """Writes dataset.json."""
        names = [f"case_{i}.nii.gz" for i in range(6)]
        info = {
            "name": "Toy",
            "modality": {"0": "MRI"},
            "labels": dict(enumerate(("background", *CLASSES))),
            "training": [
                {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names
            ],
        }
        self.json("dataset.json", info | changes)

    def entry(self, case: int, **changes: object) -> None:
        """Changes what dataset.json says of a case."""
        info = json.loads((self.data / "dataset.json").read_text())
        info["training"][case] |= changes
        self.json("dataset.json", info)

    def json(self, name: str, content: object) -> None:
        """Writes a JSON file of the data set."""
        (self.data / name).write_text(json.dumps(content), encoding="utf-8")

    def layout(self, **changes: object) -> str:
        """Writes a layout that fits the data set, changed, and gives the argument for it."""
        content = {
            "name": "Toy",
            "channels": ["MRI"],
            "classes": list(CLASSES),
            "images": ["imagesTr/{case}.nii.gz"],
            "label": "labelsTr/{case}.nii.gz",
        }
        (self.root / "layout.yaml").write_text(json.dumps(content | changes))
        return f"layout={self.root / 'layout.yaml'}"

    def model(self) -> Path:
        """A fine-tuned model of one channel."""
        card = Card(
            network="unetr",
            encoder={"variant": "tiny", "in_chans": 1, "img_size": 16},
            adapter={"feature_size": 4},
            labels=dict(enumerate(("background", *CLASSES))),
            channels=("MRI",),
            preprocessing=Preprocessing(
                None, {"default": "zscore_positive"}, "volume", (16, 16, 16)
            ),
        )
        Segmenter(build_network(card), card).save(self.root / "model.safetensors")
        return self.root / "model.safetensors"

    def weights(self, tensors: Mapping[str, Tensor] | None = None) -> Path:
        """A weights file of the tiny encoder, or of other tensors."""
        tensors = tensors or encoder("tiny", pretrained=False).state_dict()
        write(self.root / "weights.safetensors", dict(tensors), {})
        return self.root / "weights.safetensors"


Spoil = Callable[[Workplace], Sequence[str] | None]


@dataclass(frozen=True)
class Row:
    """One bad input."""

    given: str
    names: str  # what the message has to name
    spoil: Spoil  # returns the arguments that go with it
    command: str = "finetune"


def finetune(place: Workplace, arguments: Sequence[str]) -> None:
    """The recipe, as its command line runs it."""
    finetune_unetr.main(config.load(Config, place.root / "toy.yaml", arguments))


def predict(_place: Workplace, arguments: Sequence[str]) -> None:
    """`sammed3d predict`; its message as an error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(["predict", *arguments])
    if code:
        raise ValueError(said.getvalue().strip().removeprefix("sammed3d: error: "))


COMMANDS = {"finetune": finetune, "predict": predict}


# --- how each is spoilt ----------------------------------------------------------------------


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _at(value: float) -> np.ndarray:
    """Labels with one voxel of a value."""
    array = np.zeros(SHAPE, np.float32)
    array[3, 3, 3] = value
    return array


def _with_nan() -> np.ndarray:
    array = np.full(SHAPE, 100.0)
    array[5, 5, 5] = np.nan
    return array


def _two_channels(place: Workplace) -> None:
    """The data set as nnU-Net 2 has it, one channel of one case missing."""
    shutil.rmtree(place.data)
    for i in range(3):
        place.label(i, place.labels())
        for channel in range(2):
            place.nifti(f"imagesTr/case_{i}_{channel:04d}.nii.gz", RAMP)
    (place.data / "imagesTr/case_1_0001.nii.gz").unlink()
    place.json(
        "dataset.json",
        {
            "channel_names": {"0": "T1", "1": "T2"},
            "labels": {"background": 0, "head": 1, "tail": 2},
            "file_ending": ".nii.gz",
        },
    )


def _text(place: Workplace) -> None:
    (place.data / "labelsTr/case_2.nii.gz").write_text("no image")


def _missing_pair(place: Workplace) -> None:
    (place.data / "imagesTr/case_1.nii.gz").unlink()
    (place.data / "labelsTr/case_4.nii.gz").unlink()


def _colours(place: Workplace) -> None:
    place.nifti("imagesTr/case_2.nii.gz", np.zeros(SHAPE, [(c, "u1") for c in "RGB"]))


def _moved(place: Workplace) -> None:
    affine = np.eye(4)
    affine[:3, 3] = 0, 0, 2.5
    place.image(2, np.ones(SHAPE), affine)


def _annotated(place: Workplace) -> None:
    place.entry(2, annotated=list(CLASSES))
    place.label(2, _at(1))


def _many(place: Workplace) -> None:
    """Something else in each of four cases."""
    _cut(place.data / "imagesTr/case_0.nii.gz")
    place.label(1, _at(7))
    place.image(2, np.ones((12, 10, 8)))
    place.label(3, np.zeros(SHAPE, np.uint8))


def _split(place: Workplace, *folds: tuple[str, str]) -> None:
    """A splits.json of cases by number."""
    place.json(
        "splits.json",
        [
            {"train": [f"case_{i}" for i in train], "val": [f"case_{i}" for i in val]}
            for train, val in folds
        ],
    )


def _split_person(place: Workplace) -> None:
    place.entry(0, subject="Ada")
    place.entry(5, subject="Ada")
    _split(place, ("0123", "45"))


def _subjects(place: Workplace) -> list[str]:
    (place.root / "subjects.json").write_text(json.dumps({"case_0": "Ada"}))
    return [f"subjects={place.root / 'subjects.json'}"]


def _bids(place: Workplace) -> None:
    """The data set as BIDS, without names for its labels."""
    shutil.rmtree(place.data)
    for i in range(3):
        place.nifti(f"sub-{i}/anat/sub-{i}_T1w.nii.gz", RAMP)
        place.nifti(f"derivatives/manual/sub-{i}/anat/sub-{i}_dseg.nii.gz", place.labels())
    place.json("dataset_description.json", {"Name": "Toy"})


def _masks(place: Workplace) -> list[str]:
    """A mask per class, one of them missing and one with other values."""
    for i in range(6):
        for name in CLASSES:
            place.nifti(f"masks/case_{i}/{name}.nii.gz", (place.labels() > 0).astype(np.uint8))
    place.nifti("masks/case_2/tail.nii.gz", place.labels())
    return [place.layout(label="masks/{case}/{class}.nii.gz"), "fold=0"]


def _broken_weights(place: Workplace) -> list[str]:
    path = place.weights()
    _cut(path)
    return ["scratch=false", f"weights={path}"]


def _pickle(place: Workplace) -> list[str]:
    torch.save({"model": os.system}, place.root / "weights.pth")
    return ["scratch=false", f"weights={place.root / 'weights.pth'}"]


def _earlier_run(place: Workplace) -> list[str]:
    cfg = config.load(Config, place.root / "toy.yaml")
    open_run(cfg.name, cfg).begin(cfg)
    return ["lr=0.01", "steps=99"]


def _unreadable_run(place: Workplace) -> None:
    cfg = config.load(Config, place.root / "toy.yaml")
    run = open_run(cfg.name, cfg)
    run.begin(cfg)
    (run.folder / "config.yaml").write_text("steps: many\n")


def _predict(place: Workplace, source: str = "data/imagesTr/case_0.nii.gz") -> list[str]:
    return [str(place.model()), str(place.root / source), str(place.root / "out.nii.gz")]


def _predict_two_channels(place: Workplace) -> list[str]:
    place.image(0, np.ones((*SHAPE, 2)))
    return _predict(place)


def _predict_nan(place: Workplace) -> list[str]:
    place.image(0, _with_nan())
    return _predict(place)


def _predict_over(place: Workplace) -> list[str]:
    arguments = _predict(place)
    shutil.copy(arguments[1], arguments[2])
    return arguments


def _without_card(place: Workplace) -> list[str]:
    return [str(place.weights()), *_predict(place)[1:]]


def _cut_model(place: Workplace) -> list[str]:
    arguments = _predict(place)
    _cut(Path(arguments[0]))
    return arguments


def _says(*arguments: str) -> Spoil:
    """Nothing is spoilt but the arguments."""
    return lambda _: arguments


ROWS = (
    # the data set's folder
    Row("a folder that is not there", "/nowhere", _says("data=/nowhere")),
    Row("dataset.json cut off", "dataset.json", lambda p: _cut(p.data / "dataset.json")),
    Row("no names for the labels", "labels", lambda p: p.describe(labels=None)),
    Row(
        "label values with gaps",
        "[0, 2]",
        lambda p: p.describe(labels={"0": "background", "2": "head"}),
    ),
    Row("an image and a label are missing", "case_4.nii.gz", _missing_pair),
    Row("a channel of one case is missing", "case_1_0001.nii.gz", _two_channels),
    Row("a case is listed twice", "case_2", lambda p: p.entry(3, image="imagesTr/case_2.nii.gz")),
    Row("annotated names no class", "heart", lambda p: p.entry(3, annotated=["heart"])),
    Row("BIDS without names for the labels", "dseg.tsv", _bids),
    Row("a layout with a misspelt key", "clases", lambda p: [p.layout(clases=["head"])]),
    Row(
        "a layout without {case}", "{case}", lambda p: [p.layout(images=["imagesTr/image.nii.gz"])]
    ),
    Row(
        "a layout of other files",
        "{case}.mha",
        lambda p: [p.layout(images=["{case}.mha"], label="{case}.nii")],
    ),
    # files
    Row(
        "an image cut off",
        "imagesTr/case_2.nii.gz",
        lambda p: _cut(p.data / "imagesTr/case_2.nii.gz"),
    ),
    Row("a text file named .nii.gz", "labelsTr/case_2.nii.gz", _text),
    Row(
        "an affine that flattens space",
        "imagesTr/case_2.nii.gz",
        lambda p: p.image(2, np.ones(SHAPE), np.diag([1, 1, 0, 1])),
    ),
    Row("colours", "imagesTr/case_2.nii.gz", _colours),
    Row("NaN in an image", "imagesTr/case_2.nii.gz", lambda p: p.image(2, _with_nan())),
    Row(
        "an image with three channels",
        "imagesTr/case_2.nii.gz",
        lambda p: p.image(2, np.ones((*SHAPE, 3))),
    ),
    Row(
        "image and label of other shapes",
        "labelsTr/case_2.nii.gz",
        lambda p: p.image(2, np.ones((12, 10, 8))),
    ),
    Row("image and label in other places", "labelsTr/case_2.nii.gz", _moved),
    Row("labels outside the declared classes", "[7]", lambda p: p.label(2, _at(7))),
    Row("negative labels", "[-1]", lambda p: p.label(2, _at(-1))),
    Row(
        "labels that are no whole numbers", "labelsTr/case_2.nii.gz", lambda p: p.label(2, _at(0.5))
    ),
    Row(
        "a label with four axes",
        "labelsTr/case_2.nii.gz",
        lambda p: p.label(2, np.ones((*SHAPE, 2), np.uint8)),
    ),
    Row(
        "an empty label", "labelsTr/case_2.nii.gz", lambda p: p.label(2, np.zeros(SHAPE, np.uint8))
    ),
    Row("an annotated class without voxels", "tail", _annotated),
    Row("a mask with other values than 0 and 1", "masks/case_2/tail.nii.gz", _masks),
    Row("four bad cases at once", "case_3", _many),
    # folds and subjects
    Row("a case in train and val", "case_3", lambda p: _split(p, ("0123", "34"))),
    Row("a person in train and val", "Ada", _split_person),
    Row(
        "a case validated in two folds",
        "case_4",
        lambda p: _split(p, ("0123", "45"), ("0235", "14")),
    ),
    Row("a split of cases that are not there", "case_9", lambda p: _split(p, ("012", "39"))),
    Row("a fold that does not exist", "fold=7", _says("fold=7")),
    Row("more folds than subjects", "folds=", _says("folds=7")),
    Row("a case without a subject", "case_1", _subjects),
    # knobs
    Row("a misspelt knob", "layer_dcay", _says("layer_dcay=0.9")),
    Row("text for a number", "lr", _says("lr=fast")),
    Row("a knob out of range", "steps", _says("steps=0")),
    Row("a negative learning rate", "lr", _says("lr=-1")),
    Row("windows that do not move on", "overlap", _says("overlap=1")),
    Row("an axis that does not exist", "flip_axes", _says("flip_axes=[3]")),
    Row("a spacing with two numbers", "spacing_mm", _says("spacing_mm=[1, 1]")),
    Row("a spacing of zero", "spacing_mm", _says("spacing_mm=[0, 1, 1]")),
    Row("an unknown intensity", "minmax", _says("intensity=minmax")),
    Row("a crop that does not split into patches", "img_size=(20", _says("crop_vox=20")),
    Row("an unknown variant", "vit_x", _says("variant=vit_x")),
    # weights
    Row("misspelt weights", "turbos", _says("scratch=false", "weights=turbos")),
    Row(
        "weights that are not there",
        "/nowhere/w.pth",
        _says("scratch=false", "weights=/nowhere/w.pth"),
    ),
    Row("a variant without weights", "vit_l_256", _says("scratch=false", "variant=vit_l_256")),
    Row(
        "weights of another network",
        "weights.safetensors",
        lambda p: ["scratch=false", f"weights={p.weights({'fc.weight': torch.ones(4)})}"],
    ),
    Row("a weights file cut off", "weights.safetensors", _broken_weights),
    Row("a pickle that would run code", "weights.pth", _pickle),
    # runs
    Row("a name that leaves the folder of runs", "../toy", _says("name=../toy")),
    Row("another configuration under the same name", "steps", _earlier_run),
    Row("a run's configuration that cannot be read", "runs/toy", _unreadable_run),
    # sammed3d predict
    Row(
        "a model that is not there",
        "/nowhere.safetensors",
        lambda p: ["/nowhere.safetensors", *_predict(p)[1:]],
        "predict",
    ),
    Row("a model without its card", "weights.safetensors", _without_card, "predict"),
    Row("a model cut off", "model.safetensors", _cut_model, "predict"),
    Row(
        "a volume that is not there", "none.nii.gz", lambda p: _predict(p, "none.nii.gz"), "predict"
    ),
    Row("a volume with two channels", "channels", _predict_two_channels, "predict"),
    Row("a volume with NaN", "non-finite", _predict_nan, "predict"),
    Row("an output that exists", "out.nii.gz", _predict_over, "predict"),
    Row(
        "an output of another format", "out.mha", lambda p: [*_predict(p)[:2], "out.mha"], "predict"
    ),
)


def files(root: Path) -> dict[str, bytes]:
    """Every file with its content."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.given.replace(" ", "_"))
def test_a_bad_input_is_refused_by_name_and_leaves_nothing(row, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # the command line's own
    monkeypatch.setenv("SAMMED3D_RUNS", str(tmp_path / "runs"))
    place = Workplace(tmp_path)
    arguments = [str(argument) for argument in row.spoil(place) or ()]
    before = files(tmp_path)
    with pytest.raises((ValueError, OSError)) as refused:
        COMMANDS[row.command](place, arguments)
    assert row.names in str(refused.value)
    assert files(tmp_path) == before
