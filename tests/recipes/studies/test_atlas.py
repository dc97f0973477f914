"""The atlas on phantoms: a body, a bone that moves with two organs, and scans that end anywhere."""

import json

import numpy as np
import pytest
from sammed3d_backbone.recipes.studies import atlas

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.scores import read_scores

AFFINE = np.diag([-4.0, -4.0, 4.0, 1.0])  # LPS


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Five CTs in the Decathlon's layout; in one of them an organ was not looked for."""
    folder = tmp_path_factory.mktemp("phantoms")
    rng = np.random.default_rng(0)
    i, j, _ = np.indices((40, 36, 60))
    body = ((i - 20) / 17) ** 2 + ((j - 18) / 15) ** 2 < 1
    names = [f"case_{n}" for n in range(5)]
    for n, name in enumerate(names):
        middle = 30 + rng.integers(-6, 7)  # where the organs are along the body
        image = np.where(body, 30.0, -1000.0) + rng.normal(0, 10, body.shape)
        image[16:24, 24:30, middle - 3 : middle + 3] = 900
        label = np.zeros(body.shape, np.uint8)
        label[10:16, 12:20, middle - 5 : middle + 3] = 1
        label[24:30, 12:20, middle - 5 : middle + 3] = 2
        if n == 1:
            label[label == 2] = 0
        above = slice(0, 60 - 4 * n)
        Volume(image[..., above].astype(np.float32), AFFINE).save(folder / f"i/{name}.nii.gz")
        Volume(label[..., above], AFFINE).save(folder / f"l/{name}.nii.gz")
    training = [{"image": f"i/{n}.nii.gz", "label": f"l/{n}.nii.gz"} for n in names]
    training[1]["annotated"] = ["left"]
    info = {
        "name": "Phantoms",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "left", "2": "right"},
        "training": training,
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    (folder / "splits.json").write_text(json.dumps([{"train": names[:4], "val": names[4:]}]))
    return folder


@pytest.mark.slow
def test_organs_are_found_where_the_image_says(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(atlas, "CANVAS_VOX", (48, 40, 64))
    summary = atlas.run(str(phantoms), 0, tmp_path)
    assert summary["model"].endswith("aligned by the image")
    assert min(summary["dice"].values()) > 0.9
    on_train = summary["config"]["dice of training cases, each by the atlas of the others"]
    assert on_train["image"]["right"] > on_train["centre"]["right"] + 0.1
    assert [score.case for score in read_scores(tmp_path / "scores.csv")] == ["case_4", "case_4"]


def test_a_shift_is_found_where_only_a_part_overlaps(rng):
    scene = rng.normal(size=(16, 16, 16)).astype(np.float32)
    inside = np.ones_like(scene)
    inside[:, :, :6] = 0  # the image begins here
    template = scene[3:11, 5:13, 4:12] * 2 + 1  # correlation does not mind gain and offset
    weight = np.ones(template.shape, dtype=bool)
    assert atlas.best_shift(scene, inside, template, weight) == (3, 5, 4)


def test_a_case_is_predicted_by_the_others(phantoms):
    dataset = atlas.read_dataset(phantoms)
    placed = []
    for case in dataset.cases[:3]:
        volume = atlas.load_image(case)
        placed.append(atlas.place(case, volume, dataset, atlas.by_centre(volume)))
    others, all_but_one = atlas.Counts.of(placed[1:]), atlas.Counts.of(placed).without(placed[0])
    assert np.allclose(others.probs, all_but_one.probs)
    assert np.allclose(others.mean_image, all_but_one.mean_image, atol=1e-3)
    assert not all_but_one.known[1][~placed[2].inside].any()  # case_1 knows nothing of the right


def test_other_data_than_ct_are_refused(toy_data, tmp_path):
    with pytest.raises(ValueError, match="give a data set with the one channel CT"):
        atlas.run(str(toy_data), 0, tmp_path)
