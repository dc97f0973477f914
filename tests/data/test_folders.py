"""From a folder to a data set, whatever layout it has."""

import json

import pytest

from sammed3d_backbone.data.datasets import DatasetError
from sammed3d_backbone.data.folders import find_dataset, read_dataset


def test_a_case_listed_twice_is_refused(decathlon):
    folder = decathlon(cases=1)
    info = json.loads((folder / "dataset.json").read_text())
    info["training"] *= 2
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match="case_0 is listed 2 times; keep one"):
        read_dataset(folder)


def test_an_annotated_class_that_does_not_exist_is_refused(decathlon):
    folder = decathlon(cases=1)
    info = json.loads((folder / "dataset.json").read_text())
    info["training"][0]["annotated"] = ["neck"]
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match=r"\['neck'\] are not classes.*dataset\.json"):
        read_dataset(folder)


@pytest.mark.parametrize("layout", ["decathlon", "nnunet"])
def test_all_missing_files_are_named_at_once(layout, request):
    folder = request.getfixturevalue(layout)()
    gone = sorted((folder / "imagesTr").iterdir())[:2]
    for path in gone:
        path.unlink()
    with pytest.raises(DatasetError, match=r"copy it or remove case_\d") as caught:
        read_dataset(folder)
    for path in gone:
        assert str(path) in str(caught.value)


def test_a_folder_without_description_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass the folder that holds it"):
        read_dataset(tmp_path)


def test_a_data_set_is_found_by_path_or_by_name(decathlon, monkeypatch, tmp_path):
    folder = decathlon()
    assert find_dataset(str(folder)) == folder
    monkeypatch.setenv("SAMMED3D_DATA", str(folder.parent))
    monkeypatch.chdir(tmp_path.parent.parent)
    assert find_dataset(folder.name) == folder


def test_a_data_set_that_is_nowhere_says_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("SAMMED3D_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no_such_set.*set SAMMED3D_DATA"):
        find_dataset("no_such_set")


def test_a_folder_that_exists_is_not_replaced_by_a_data_set_of_that_name(
    decathlon, monkeypatch, tmp_path
):
    folder = decathlon()
    monkeypatch.setenv("SAMMED3D_DATA", str(folder.parent))
    (tmp_path / "here" / folder.name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileNotFoundError, match=r"dataset\.json"):
        find_dataset(folder.name)
