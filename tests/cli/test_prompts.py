"""sammed3d segment and features: a NIfTI and clicks in, labels or token maps out."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from standin import StandIn

from sammed3d_backbone import encoder
from sammed3d_backbone.cli import main
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.features import token_maps
from sammed3d_backbone.loading.checkpoint import read

AFFINE = np.array([[-1.5, 0, 0, 40], [0, -1.5, 0, 31], [0, 0, 1.5, -7], [0, 0, 0, 1]])


@pytest.fixture
def known(monkeypatch):
    """The network whose answer is known, in place of a trained one."""
    monkeypatch.setattr("sammed3d_backbone.sam", lambda variant, **how: StandIn())


@pytest.fixture
def scan(tmp_path):
    """Two bright balls, around (22, 40, 36) and (36, 54, 36), axes towards L, P, S."""
    i, j, k = np.ogrid[:90, :80, :70]
    first = (i - 22) ** 2 + (j - 40) ** 2 + (k - 36) ** 2 < 9**2
    second = (i - 36) ** 2 + (j - 54) ** 2 + (k - 36) ** 2 < 7**2
    Volume(np.where(first | second, 200, 50).astype(np.int16), AFFINE).save(tmp_path / "in.nii.gz")
    return str(tmp_path / "in.nii.gz")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "out.nii.gz"


# --- segment -----------------------------------------------------------------------------------


def test_a_click_becomes_a_mask_with_the_inputs_affine(known, scan, out, capsys):
    assert main(["segment", scan, str(out), "--point", "22,40,36"]) == 0
    mask, source = Volume.load(out), Volume.load(scan)
    assert mask.affine.tobytes() == source.affine.tobytes()
    assert set(np.unique(mask.array)) == {0, 1}
    printed = capsys.readouterr().out
    voxels = int(mask.array.sum())
    assert f"1 object: {voxels} voxels, {voxels * 1.5**3 / 1000:.2f} ml, 1 windows" in printed
    assert "1 of 1 clicks agreed" in printed
    assert "SAM-Med3D" in printed
    assert printed.splitlines()[-1] == str(out)


def test_points_in_mm_are_the_same_points(known, scan, out, tmp_path):
    x, y, z = (AFFINE @ [22, 40, 36, 1])[:3]
    assert main(["segment", scan, str(out), "--mm", f"--point={x},{y},{z}"]) == 0
    assert main(["segment", scan, str(tmp_path / "vox.nii"), "--point", "22,40,36"]) == 0
    assert np.array_equal(Volume.load(out).array, Volume.load(tmp_path / "vox.nii").array)


def test_points_belong_to_the_object_named_before_them(known, scan, out, capsys):
    command = ["segment", scan, str(out), "--object", "left", "--point", "22,40,36"]
    command += ["--object", "both", "--point", "22,40,36", "--point", "36,54,36"]
    command += ["--object", "right", "--point", "22,40,36", "--point", "36,54,36"]
    command += ["--negative", "22,40,37", "--json", "--merge", "first", "--stability"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["value"], row["object"]) for row in result["objects"]] == [
        (1, "left"),
        (2, "both"),
        (3, "right"),
    ]
    assert result["objects"][2]["voxels"] == 0  # "both" was first
    assert result["objects"][0]["stability"] == 1
    assert result["out"] == str(out)
    assert any("overlapped" in note and note.endswith("first") for note in result["notes"])
    labels = Volume.load(out).array
    assert (labels[22, 40, 36], labels[36, 54, 36]) == (1, 2)


@pytest.mark.parametrize(
    "settings", [[], ["--enforce-clicks", "--no-follow", "--clicks", "all", "--modality", "ct"]]
)
def test_a_saved_click_list_gives_the_same_file(known, scan, out, tmp_path, settings):
    clicks = str(tmp_path / "clicks.json")
    command = ["segment", scan, str(out), *settings, "--save-clicks", clicks, "--point"]
    assert main([*command, "22,40,36", "--negative", "36,54,36"]) == 0
    assert main(["segment", scan, str(tmp_path / "b.nii.gz"), "--points", clicks]) == 0
    contents = [gzip.decompress(p.read_bytes()) for p in (out, tmp_path / "b.nii.gz")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("before", [[], ["--object", "spleen"]])
def test_an_object_without_points_is_refused(known, scan, out, capsys, before):
    after = [] if before else ["--object", "liver"]
    command = ["segment", scan, str(out), *before, "--object", "kidney", "--point", "22,40,36"]
    assert main([*command, *after]) == 2
    assert "--object" in capsys.readouterr().err
    assert not out.exists()


def test_a_figure_shows_every_object(known, scan, out, tmp_path):
    figure = tmp_path / "fig.png"
    command = ["segment", scan, str(out), "--png", str(figure), "--object", "left", "--point"]
    assert main([*command, "22,40,36", "--object", "right", "--point", "36,54,36"]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_encoded_windows_are_kept_on_request(known, scan, out, tmp_path):
    cache = tmp_path / "cache"
    assert main(["segment", scan, str(out), "--point", "22,40,36", "--cache", str(cache)]) == 0
    assert len(list(cache.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("switch", ["--clicks=all", "--no-follow", "--enforce-clicks"])
def test_every_switch_is_taken(known, scan, out, switch):
    assert main(["segment", scan, str(out), "--point", "22,40,36", switch]) == 0


def test_the_whole_command_runs_with_a_real_network(scan, out, capsys):
    command = ["segment", scan, str(out), "--point", "22,40,36", "--variant", "tiny", "--no-follow"]
    assert main([*command, "--random", "--modality", "mr"]) == 0
    assert Volume.load(out).shape == (90, 80, 70)
    assert "random initialisation" in capsys.readouterr().out


def test_a_dicom_series_becomes_a_dicom_seg(known, tmp_path, capsys):
    pytest.importorskip("highdicom", reason="needs the extra dicom")
    from dicom_series import write_series
    from highdicom.seg import segread

    def half_bright(image, number):
        image.PixelData = np.full((6, 5), 612 if number < 10 else 537, np.uint16).tobytes()

    series = write_series(tmp_path / "in", slices=20, change=half_bright)
    other = write_series(tmp_path / "in" / "other", slices=3)
    command = ["segment", str(tmp_path / "in"), str(tmp_path / "out.dcm"), "--point", "2,3,4"]
    assert main([*command, "--object", "liver", "--point", "2,3,9"]) == 2
    assert other in capsys.readouterr().err
    assert main([*command, "--object", "liver", "--point", "2,3,9", "--series", series]) == 0
    assert "modality='ct'" in capsys.readouterr().out
    names = [item.SegmentLabel for item in segread(tmp_path / "out.dcm").SegmentSequence]
    assert names
    assert set(names) <= {"object", "liver"}


# --- features ----------------------------------------------------------------------------------


def test_features_are_token_maps_with_their_affine(scan, tmp_path, capsys):
    out = tmp_path / "new" / "maps.safetensors"
    command = ["features", scan, str(out), "--variant", "tiny", "--random"]
    assert main([*command, "--blocks", "11,2"]) == 0
    tensors, metadata = read(out)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "neck": (128, 12, 10, 9),
        "block_2": (192, 12, 10, 9),
        "block_11": (192, 12, 10, 9),
        "affine": (4, 4),
    }
    assert metadata["volume"] == "in.nii.gz"
    assert "neck: 128 x 12 x 10 x 9" in capsys.readouterr().out


def test_features_are_drawn_without_a_file_of_them(scan, tmp_path, capsys):
    out = tmp_path / "new" / "fig.png"
    command = ["features", scan, "--png", str(out), "--variant", "tiny", "--random"]
    assert main([*command, "--block", "3", "--modality", "mr"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.parent.iterdir()] == ["fig.png"]
    assert capsys.readouterr().out.splitlines()[-1] == str(out)


def test_weights_alone_choose_the_variant(scan, tmp_path):
    out = tmp_path / "maps.safetensors"
    assert main(["features", scan, str(out), "--weights", "tiny"]) == 0
    assert read(out)[0]["neck"].shape[0] == 128


@pytest.mark.slow
def test_a_fine_tuned_encoder_gives_its_blocks_at_its_spacing(scan, tmp_path, fine_tuned, capsys):
    out, figure = tmp_path / "maps.safetensors", tmp_path / "fig.png"
    command = ["features", scan, str(out), "--variant", "tiny", "--weights", fine_tuned()]
    assert main([*command, "--blocks", "2,5", "--png", str(figure)]) == 0
    tensors, metadata = read(out)
    assert set(tensors) == {"block_2", "block_5", "affine"}
    assert json.loads(metadata["preprocessing"])["spacing_mm"] == [2.0, 2.0, 2.0]
    assert figure.is_file()
    assert "spacing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outputs", "remedy"),
    [
        ((), "OUT.safetensors"),
        (("--png", "fig.jpg"), "fig.jpg"),
        (("maps.pt",), "maps.pt"),
        (("--png", "precious.png"), "precious.png"),
        (("--png", "fig.png", "--block", "12"), "-12 to 11"),
        (("maps.safetensors", "--block", "12"), "-12 to 11"),
    ],
)
def test_features_that_cannot_be_written_are_refused(
    scan, tmp_path, monkeypatch, capsys, outputs, remedy
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious.png").write_text("precious")
    assert main(["features", scan, *outputs, "--variant", "tiny", "--random"]) == 2
    assert remedy in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in.nii.gz", "precious.png"}
    assert (tmp_path / "precious.png").read_text() == "precious"


def test_the_figure_shows_the_numbers_of_the_file(scan, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "sammed3d_backbone.evaluation.figures.features_figure",
        lambda path, volume, maps, affine, **_: drawn.update(maps, affine=affine),
    )
    out = tmp_path / "maps.safetensors"
    command = ["features", scan, str(out), "--variant", "tiny", "--random", "--blocks"]
    assert main([*command, "2,5", "--png", str(tmp_path / "fig.png"), "--modality", "mr"]) == 0
    tensors, _ = read(out)
    assert set(drawn) == {"block_2", "block_5", "affine"}
    assert all(torch.equal(tensors[name], torch.as_tensor(part)) for name, part in drawn.items())


def test_features_follow_the_statistics_of_the_preprocessing(scan, tmp_path, capsys):
    maps = {}
    for statistics in ("crop", "volume"):
        out = tmp_path / f"{statistics}.safetensors"
        torch.manual_seed(0)
        command = ["features", scan, str(out), "--variant", "tiny", "--random"]
        assert main([*command, "--statistics", statistics]) == 0
        maps[statistics] = read(out)[0]["neck"]
    assert (maps["crop"] - maps["volume"]).abs().max() > 1e-3


def test_a_token_lies_where_its_affine_says(scan):
    torch.manual_seed(0)
    array = Volume.load(scan).array[:, :50, :50]
    bright = np.zeros_like(array)
    bright[50, 20, 41] = 1e6
    network = encoder("tiny", pretrained=False)
    found, plain = (
        token_maps(network, Volume(a, AFFINE), SAM_MED3D, blocks=[0])
        for a in (array + bright, array)
    )
    change = (found.maps["block_0"] - plain.maps["block_0"]).norm(dim=0)
    token = np.unravel_index(int(change.argmax()), change.shape)
    place_mm = found.affine @ [*token, 1]
    away_mm = np.abs((place_mm - AFFINE @ [50, 20, 41, 1])[:3])
    assert (away_mm <= 8 * 1.5 / 2).all()


# --- before any work, and after it ----------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    """Fails as soon as a network is asked for."""
    monkeypatch.setattr("sammed3d_backbone.sam", lambda *_, **__: pytest.fail("work began"))


@pytest.mark.parametrize(
    ("arguments", "token"),
    [
        (["--object", "a", "--point", "9,9,9", "--object", "b", "--negative", "1,1,1"], "'b'"),
        (["--negative", "1,1,1", "--object", "b", "--point", "9,9,9"], "'object'"),
        (["--point", "9,9,9", "--save-clicks", "file/c.json"], "file"),
        (["--point", "9,9,9", "--png", "closed/f.png"], "closed"),
        (["--point", "9,9,9", "--save-clicks", "sub/../out.nii.gz"], "out.nii.gz"),
        (["--point", "9,9,9", "--save-clicks", "in.nii.gz", "--force"], "in.nii.gz"),
        (
            ["--point", "9,9,9", "--weights", "w.safetensors", "--png", "fifo.png", "--force"],
            "fifo",
        ),
    ],
)
def test_what_cannot_end_well_is_refused_before_any_work(
    no_work, scan, tmp_path, monkeypatch, capsys, arguments, token
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")
    assert main(["segment", scan, "out.nii.gz", *arguments]) == 2
    assert token in capsys.readouterr().err
    assert not (tmp_path / "out.nii.gz").exists()


def test_folders_of_all_outputs_are_made(known, scan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs = ["a/out.nii.gz", "--save-clicks", "b/c/clicks.json", "--png", "d/fig.png"]
    assert main(["segment", scan, *outputs, "--point", "22,40,36"]) == 0
    for path in ("a/out.nii.gz", "b/c/clicks.json", "d/fig.png"):
        assert (tmp_path / path).is_file()


def test_the_mask_stays_where_its_picture_fails(known, scan, out, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("sammed3d_backbone.evaluation.figures.clicks_figure", fail)
    assert main(["segment", scan, str(out), "--point", "22,40,36", "--png", "f.png"]) == 2
    assert Volume.load(out).array.any()
    assert "1 object" in capsys.readouterr().out


def test_an_output_that_appears_meanwhile_is_not_replaced(known, scan, out, monkeypatch, capsys):
    from sammed3d_backbone.inference.interactive import Predictor

    predict = Predictor.predict

    def meanwhile(self, *args):
        out.parent.mkdir()
        out.write_text("of another process")
        return predict(self, *args)

    monkeypatch.setattr(Predictor, "predict", meanwhile)
    assert main(["segment", scan, str(out), "--point", "22,40,36"]) == 2
    assert out.read_text() == "of another process"


def test_a_full_disk_under_the_cache_costs_the_cache_only(known, scan, out, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sammed3d_backbone.inference.interactive.embedding_cache.write", full)
    command = ["segment", scan, str(out), "--point", "22,40,36", "--cache", str(tmp_path / "c")]
    assert main(command) == 0
    assert Volume.load(out).array.any()
