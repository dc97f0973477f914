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


def _missing_pair(place: Workplace) -> None:
    (place.data / "imagesTr/case_1.nii.gz").unlink()
    (place.data / "labelsTr/case_4.nii.gz").unlink()


def _many(place: Workplace) -> None:
    """A different fault in each of four cases."""
    _cut(place.data / "imagesTr/case_0.nii.gz")
    place.label(1, _at(7))
    place.image(2, np.ones((12, 10, 8)))
    place.label(3, np.full(SHAPE, 0.5))


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


def _pickle(place: Workplace) -> list[str]:
    torch.save({"model": os.system}, place.root / "weights.pth")
    return ["scratch=false", f"weights={place.root / 'weights.pth'}"]


def _earlier_run(place: Workplace) -> list[str]:
    cfg = config.load(Config, place.root / "toy.yaml")
    with open_run(cfg.name, cfg).begun(cfg):
        pass
    return ["lr=0.01", "steps=99"]


def _predict(place: Workplace, source: str = "data/imagesTr/case_0.nii.gz") -> list[str]:
    return [str(place.model()), str(place.root / source), str(place.root / "out.nii.gz")]


def _predict_nan(place: Workplace) -> list[str]:
    place.image(0, _with_nan())
    return _predict(place)


def _predict_over(place: Workplace) -> list[str]:
    arguments = _predict(place)
    shutil.copy(arguments[1], arguments[2])
    return arguments


def _without_card(place: Workplace) -> list[str]:
    return [str(place.weights()), *_predict(place)[1:]]


def _says(*arguments: str) -> Spoil:
    """Bad arguments for good files."""
    return lambda _: arguments


ROWS = (
    Row("dataset.json cut off", "dataset.json", lambda p: _cut(p.data / "dataset.json")),
    Row("an image and a label are missing", "case_4.nii.gz", _missing_pair),
    Row(
        "an image cut off",
        "imagesTr/case_2.nii.gz",
        lambda p: _cut(p.data / "imagesTr/case_2.nii.gz"),
    ),
    Row("NaN in an image", "imagesTr/case_2.nii.gz", lambda p: p.image(2, _with_nan())),
    Row("labels outside the declared classes", "[7]", lambda p: p.label(2, _at(7))),
    Row("four bad cases at once", "case_3", _many),
    Row("a person in train and val", "Ada", _split_person),
    Row("a case without a subject", "case_1", _subjects),
    Row("a misspelt knob", "layer_dcay", _says("layer_dcay=0.9")),
    Row("text for a number", "lr", _says("lr=fast")),
    Row("misspelt weights", "turbos", _says("scratch=false", "weights=turbos")),
    Row(
        "weights of another network",
        "weights.safetensors",
        lambda p: ["scratch=false", f"weights={p.weights({'fc.weight': torch.ones(4)})}"],
    ),
    Row("a pickle that would run code", "weights.pth", _pickle),
    Row("a name that leaves the folder of runs", "../toy", _says("name=../toy")),
    Row("another configuration under the same name", "steps", _earlier_run),
    Row("a model without its card", "weights.safetensors", _without_card, "predict"),
    Row(
        "a volume that is not there", "none.nii.gz", lambda p: _predict(p, "none.nii.gz"), "predict"
    ),
    Row("a volume with NaN", "non-finite", _predict_nan, "predict"),
    Row("an output that exists", "out.nii.gz", _predict_over, "predict"),
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
