"""The commands of recipes/README.md, with a few steps of a small network."""

import json
import re
import shlex
import shutil
import textwrap

import pytest

from sammed3d_backbone import cli
from sammed3d_backbone.data.folders import read_dataset


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
def test_ones_own_data_become_a_plan_a_model_and_predictions(
    layout, five_minutes, toy_data, small, runs, tmp_path, monkeypatch
):
    folder, target = tmp_path / "mine", tmp_path / "results"
    folder.mkdir()
    layout(folder, toy_data, five_minutes)
    monkeypatch.chdir(tmp_path)
    name = read_dataset(folder).name
    places = {
        "FOLDER": folder,
        "~/sammed3d_runs": runs,
        "NAME": name,
        "SCANS": toy_data / "imagesTr",
        "RESULTS": target,
    }
    (commands,) = blocks(five_minutes, "bash")
    for word, place in places.items():
        commands = commands.replace(word, str(place))
    # The plan's network, for few subjects, has no feature_size.
    quick = {k: v for k, v in small.items() if k not in ("name", "data", "feature_size")}
    quick = {k: list(v) if k == "spacing_mm" else v for k, v in quick.items()} | {"steps": 2}
    for line in commands.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "sammed3d"
        if words[0] == "train":
            at = next(n for n, word in enumerate([*words, "--"]) if word.startswith("--"))
            words[at:at] = [f"{key}={value}" for key, value in quick.items()]
        assert cli.main(words) == 0
    assert (runs / name / "results/report.html").is_file()
    scans = sorted(path.name for path in (toy_data / "imagesTr").iterdir())
    assert sorted(path.name for path in target.glob("*.nii.gz")) == scans
