"""The doors: for each, a valid input, how it is spoiled, and what reads it."""

import gzip
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import yaml
from safetensors.torch import save
from sammed3d_backbone.recipes import finetune_unetr

from sammed3d_backbone import Predictor, config, sam
from sammed3d_backbone.cli.clicks import _compare
from sammed3d_backbone.clickbench.cases import read_npz
from sammed3d_backbone.data.cache import read_prepared
from sammed3d_backbone.data.datasets import read_fold, with_subjects
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.layouts import read_described, read_layout
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.data.singles import read_singles
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.interactive.embedding_cache import _read_encoding
from sammed3d_backbone.inference.segmenter import Segmenter, build_network
from sammed3d_backbone.inference.validation import validate_volume
from sammed3d_backbone.loading.checkpoint import read
from sammed3d_backbone.loading.opening import CARD_KEY, open_weights

from .mutations import spoiled_bytes, spoiled_value

LABELS = {"background": 0, "head": 1}
CARD = Card(
    network="basicunet",
    encoder={},
    adapter={"features": [2, 2, 2, 2, 2, 2]},
    labels=dict(enumerate(LABELS)),
    channels=("CT",),
    preprocessing=SAM_MED3D,
)


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("EXECUTED", "w")


@dataclass(frozen=True)
class Door:
    """One way in.

    Args:
        name: Name of the file, which an error has to contain unless `is_named` is false.
        spoil: Random generator -> content of the file; None -> content that is right.
        open: Reads the file.
        extra: Files beside it, name -> content.
        is_named: Whether an error names the file or its folder.
    """

    name: str
    spoil: Callable[[np.random.Generator], bytes]
    open: Callable[[Path], object]
    extra: Callable[[], dict[str, bytes]] = dict
    is_named: bool = True


def _json(content):
    return lambda rng: _text(rng, json.dumps(spoiled_value(rng, content())))


def _yaml(content):
    def spoil(rng):
        try:
            text = yaml.safe_dump(spoiled_value(rng, content()))
        except (yaml.YAMLError, UnicodeError):
            text = "a: ["
        return _text(rng, text)

    return spoil


def _text(rng, text):
    content = text.encode("utf-8", "surrogatepass")
    return spoiled_bytes(rng, content) if rng and rng.random() < 0.25 else content


def _bytes(content):
    return lambda rng: spoiled_bytes(rng, content())


@cache
def _nifti(dtype="int16", extension=".nii"):
    array = np.random.default_rng(0).integers(0, 2, (6, 5, 4)).astype(dtype)
    content = nib.Nifti1Image(array, np.diag([1.5, 1.5, 2, 1])).to_bytes()
    return gzip.compress(content, 1) if extension == ".nii.gz" else content


@cache
def _torch(zipped=True):
    file = io.BytesIO()
    content = {"state_dict": {"a.weight": torch.ones(3, 4), "b": torch.zeros(2)}, "epoch": 3}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _pickle(rng):
    """A pickle that runs code, in several protocols and containers."""
    content = {"a": torch.ones(2).numpy(), "b": Evil()}
    if rng.random() < 0.5:
        return pickle.dumps(content, protocol=int(rng.integers(0, 6)))
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=bool(rng.random() < 0.5))
    return file.getvalue()


@cache
def _model():
    torch.manual_seed(0)
    return {n: t.clone() for n, t in build_network(CARD).state_dict().items()}


def _carded(rng):
    card = spoiled_value(rng, json.loads(json.dumps(CARD.to_dict())))
    text = _text(rng, json.dumps(card)).decode("utf-8", "replace")
    return save(_model(), {CARD_KEY: text})


def _dataset():
    return {
        "channel_names": {"0": "CT"},
        "labels": dict(LABELS),
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "dataset": {
            name: {"images": ["image.nii.gz"], "label": "label.nii.gz", "subject": name}
            for name in ("a", "b")
        },
    }


def _listed():
    entry = {"image": "image.nii.gz", "label": "label.nii.gz", "fold": 0, "truncated": ["head"]}
    return {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "head"},
        "training": [entry],
    }


def _volumes():
    packed = _nifti("uint8", ".nii.gz")
    return {"image.nii.gz": packed, "label.nii.gz": packed}


def _described():
    return {**_volumes(), "dataset.json": json.dumps(_dataset()).encode()}


def _bids():
    return {
        "dataset_description.json": b'{"Name": "Toy"}',
        "sub-1/anat/sub-1_T1w.nii.gz": _nifti("uint8", ".nii.gz"),
        "derivatives/x/sub-1/anat/sub-1_dseg.nii.gz": _nifti("uint8", ".nii.gz"),
        "derivatives/x/dseg.tsv": b"index\tname\n0\tbackground\n1\thead\n",
    }


def _clicks():
    clicks = [{"object": "a", "point_vox": [2, 2, 2], "positive": True}, {"point_mm": [1, 1, 1]}]
    return {"format": "sammed3d-clicks/2", "clicks": clicks, "settings": {"follow": True}}


@cache
def _predictor():
    predictor = Predictor(sam("tiny", pretrained=False))
    predictor.set_volume(np.arange(64.0).reshape(4, 4, 4), np.eye(4))
    return predictor


def _journal(rng):
    line = {
        "case": "v", "subject": "v", "class": "c", "first": "centre", "step": 1,
        "clicks": [{"vox": [1, 1, 1], "mm": [1, 1, 1], "positive": True, "repeat": False}],
        "dice": 0.5, "nsd_2mm": 0.5, "nsd": 0.5, "hd95_mm": 1.0, "volume_error": 0.1,
        "agreement": 1.0, "agreement_all": 1.0, "slices": [0.5, 0.5, 0.5], "failure": None,
    }  # fmt: skip
    lines = [{"format": 1, "protocol": "clickbench/1"}, line, {**line, "step": 2}]
    which = int(rng.integers(len(lines))) if rng else 0
    lines[which] = spoiled_value(rng, lines[which])
    return _text(rng, "".join(json.dumps(each) + "\n" for each in lines))


def _npz():
    file = io.BytesIO()
    array = np.zeros((3, 4, 5), np.uint8)
    np.savez_compressed(file, imgs=array, gts=array, spacing=np.ones(3))
    return file.getvalue()


def _layout():
    return {
        "name": "toy", "channels": ["CT"], "classes": ["head"], "images": ["{case}/image.nii.gz"],
        "label": "{case}/label.nii.gz", "values": [3], "cases": ".+", "subject": "(.+)",
    }  # fmt: skip


def _knobs():
    return {"name": "x", "data": "y", "lr": 1e-4, "spacing_mm": [1, 1, 1], "flip_axes": [0, 2]}


def _in_folder(path):
    return path.parent


DOORS = {
    "NIfTI": Door("v.nii", _bytes(_nifti), lambda path: validate_volume(path)),
    "NIfTI, packed": Door(
        "v.nii.gz", _bytes(lambda: _nifti("float32", ".nii.gz")), lambda path: Volume.load(path)
    ),
    "NIfTI, a spoiled header that is packed": Door(
        "v.nii.gz",
        lambda rng: gzip.compress(spoiled_bytes(rng, _nifti("float64")), 1),
        lambda path: Volume.load(path),
    ),
    "pth": Door("w.pth", _bytes(_torch), read),
    "pth, legacy": Door("w.pth", _bytes(lambda: _torch(zipped=False)), read),
    "pickles that run code": Door("w.pth", _pickle, open_weights),
    "safetensors": Door(
        "w.safetensors", _bytes(lambda: save({"a": torch.ones(3)}, {"b": "c"})), open_weights
    ),
    "fine-tuned model": Door("m.safetensors", _carded, Segmenter.from_pretrained),
    "dataset.json": Door(
        "dataset.json", _json(_dataset), lambda path: read_dataset(path.parent), _volumes
    ),
    "dataset.json, lists": Door(
        "dataset.json", _json(_listed), lambda path: read_dataset(path.parent), _volumes
    ),
    "splits.json": Door(
        "splits.json",
        _json(lambda: [{"train": ["a"], "val": ["b"]}]),
        lambda path: read_fold(read_dataset(path.parent), 0),
        _described,
    ),
    "subjects.json": Door(
        "subjects.json",
        _json(lambda: {"a": "x", "b": "y"}),
        lambda path: with_subjects(read_dataset(path.parent), path),
        _described,
    ),
    "labels.json": Door(
        "labels.json",
        _json(lambda: [{"image": "image.nii.gz", "label": "label.nii.gz", "labels": {"1": "a"}}]),
        lambda path: read_singles(path.parent),
        _volumes,
    ),
    "BIDS description": Door(
        "dataset_description.json",
        _json(lambda: {"Name": "Toy", "License": "CC0"}),
        lambda path: read_dataset(path.parent),
        _bids,
    ),
    "BIDS table": Door(
        "derivatives/x/dseg.tsv",
        _bytes(lambda: b"index\tname\n0\tbackground\n1\thead\n"),
        lambda path: read_dataset(path.parents[2]),
        _bids,
    ),
    "click list": Door("c.json", _json(_clicks), lambda path: _predictor().load_clicks(path)),
    "journal": Door("clicks.jsonl", _journal, lambda path: _compare(path, path)),
    "configuration": Door(
        "c.yaml", _yaml(_knobs), lambda path: config.load(finetune_unetr.Config, path)
    ),
    "layout": Door(
        "l.yaml", _yaml(_layout), lambda path: read_described(path.parent, read_layout(path), [])
    ),
    "npz": Door("a.npz", _bytes(_npz), lambda path: read_npz(path, spacing_is_xyz=True)),
    "encoded window": Door(
        "e.safetensors", _bytes(lambda: save({"embedding": torch.ones(3)})), _read_encoding
    ),
    "prepared case": Door(
        "p.safetensors",
        _bytes(lambda: save({"image": torch.ones(3), "label": torch.ones(3)})),
        read_prepared,
    ),
}
