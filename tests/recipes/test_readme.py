"""The commands of recipes/README.md, with a few steps of a small network."""

import json
import re
import shlex
import shutil
import textwrap

import pytest
from sammed3d_backbone.recipes import finetune_unetr

from sammed3d_backbone import cli, config
from sammed3d_backbone.data.volume import Volume


def blocks(text, language):
    """The code blocks of a language, in order."""
    found = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return [textwrap.dedent(" " * 3 + block if block[:3] != "   " else block) for block in found]


@pytest.fixture(scope="module")
def five_minutes(root):
    """The section on one's own data."""
    text = (root / "recipes/README.md").read_text(encoding="utf-8")
    return text.partition("## Use your own data in five minutes")[2].partition("\n## ")[0]


def decathlon(folder, toy_data, text):
    for kind in ("imagesTr", "labelsTr"):
        shutil.copytree(toy_data / kind, folder / kind)
    exec(blocks(text, "python")[0].replace("FOLDER", str(folder)), {})


def nnunet(folder, toy_data, text):
    shutil.copytree(toy_data / "labelsTr", folder / "labelsTr")
    (folder / "imagesTr").mkdir()
    for path in (toy_data / "imagesTr").iterdir():
        shutil.copy(path, folder / "imagesTr" / path.name.replace(".nii", "_0000.nii"))
    (folder / "dataset.json").write_text(blocks(text, "json")[0])


def bids(folder, toy_data, text):
    for i, path in enumerate(sorted((toy_data / "imagesTr").iterdir())):
        anat, labels = f"sub-{i}/anat", f"derivatives/manual/sub-{i}/anat"
        for where in (anat, labels):
            (folder / where).mkdir(parents=True)
        shutil.copy(path, folder / anat / f"sub-{i}_T1w.nii.gz")
        label = toy_data / "labelsTr" / path.name
        shutil.copy(label, folder / labels / f"sub-{i}_dseg.nii.gz")
    (folder / "derivatives/manual/dseg.tsv").write_text(blocks(text, "tsv")[0])
    described = {"Name": "Mine", "BIDSVersion": "1.10.0"}
    (folder / "dataset_description.json").write_text(json.dumps(described))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [decathlon, nnunet, bids], ids=lambda layout: layout.__name__)
def test_ones_own_data_become_a_model_and_a_prediction(
    layout, five_minutes, toy_data, small, runs, root, tmp_path, monkeypatch
):
    monkeypatch.chdir(root)
    folder, target = tmp_path / "mine", tmp_path / "labels.nii.gz"
    folder.mkdir()
    layout(folder, toy_data, five_minutes)
    scan = next((toy_data / "imagesTr").iterdir())
    places = {
        "FOLDER": folder,
        "~/sammed3d_runs": runs,
        "SCAN.nii.gz": scan,
        "LABELS.nii.gz": target,
    }
    (commands,) = blocks(five_minutes, "bash")
    for word, place in places.items():
        commands = commands.replace(word, str(place))
    train, predict = map(shlex.split, commands.splitlines())
    assert train[:2] == ["python", "recipes/finetune_unetr.py"]
    quick = {k: v for k, v in small.items() if k not in ("name", "data")} | {"variant": "tiny"}
    quick |= {"steps": 2, "workers": 0, "mixed_precision": "no", "cache": tmp_path / "cache"}
    arguments = [
        *train[2:],
        *(f"{k}={list(v) if k == 'spacing_mm' else v}" for k, v in quick.items()),
    ]
    cfg, _ = config.parse(finetune_unetr.Config, arguments)
    finetune_unetr.main(cfg)
    assert (runs / "mine/results/report.html").is_file()
    assert predict[0] == "sammed3d"
    assert cli.main(predict[1:]) == 0
    assert Volume.load(target).shape == Volume.load(scan).shape
