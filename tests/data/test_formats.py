"""NRRD and what ITK reads: the same voxels at the same places as SimpleITK has them."""

import nibabel as nib
import numpy as np
import pytest

nrrd = pytest.importorskip("nrrd", reason="needs the extra nrrd")
sitk = pytest.importorskip("SimpleITK", reason="needs the extra itk")

from orientations import ORIENTATIONS, oriented  # noqa: E402

from sammed3d_backbone.data import formats  # noqa: E402
from sammed3d_backbone.data.volume import Volume  # noqa: E402

ROTATION = np.linalg.qr([[0.64, -0.36, 2.4], [0.48, 0.48, -1.2], [0.0, 0.8, 1.6]])[0]
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = ROTATION * [0.8, 1 / 3, 3.1]
OBLIQUE[:3, 3] = -31.1, 12.7, 101.3
SHEARED = OBLIQUE.copy()
SHEARED[0, 2] += 0.5
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
NRRD = {
    "space": "left-posterior-superior",
    "space directions": np.eye(3),
    "space origin": np.zeros(3),
}


def scan(codes="RAS", shape=(4, 5, 6)):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return oriented(Volume(array, OBLIQUE), codes, (0, 0, 0))[0]


def of_itk(path):
    """SimpleITK's voxels (X, Y, Z) and affine in RAS+ mm."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS @ affine


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_what_is_written_is_what_simpleitk_reads(tmp_path, suffix):
    for codes in ORIENTATIONS:
        volume = scan(codes)
        volume.save(tmp_path / f"v{suffix}")
        array, affine = of_itk(tmp_path / f"v{suffix}")
        assert np.array_equal(array, volume.array)
        assert np.allclose(affine, volume.affine, rtol=0, atol=1e-12)
        back = Volume.load(tmp_path / f"v{suffix}")
        assert np.array_equal(back.array, volume.array)
        assert np.allclose(back.affine, volume.affine, rtol=0, atol=1e-12)


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd", ".vtk"])
@pytest.mark.parametrize("compressed", [False, True])
def test_what_simpleitk_writes_is_read(tmp_path, suffix, compressed):
    image = sitk.GetImageFromArray((scan().array * 1000).astype(np.int16).T)
    if suffix != ".vtk":
        image.SetDirection((LPS[:3, :3] @ ROTATION).ravel().tolist())
    image.SetSpacing([0.8, 1 / 3, 3.1])
    image.SetOrigin([31.1, -12.7, 101.3])
    sitk.WriteImage(image, str(tmp_path / f"v{suffix}"), useCompression=compressed)
    array, affine = of_itk(tmp_path / f"v{suffix}")
    volume = Volume.load(tmp_path / f"v{suffix}")
    assert np.array_equal(volume.array, array)
    assert np.allclose(volume.affine, affine, rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", ["right-anterior-superior", "left-anterior-superior", "RAS"])
def test_every_space_with_a_place_in_the_body_is_read(tmp_path, space):
    signs = np.diag([-1.0 if space.startswith("left") else 1.0, 1.0, 1.0])
    header = {
        "space": space,
        "space directions": (signs @ OBLIQUE[:3, :3]).T,
        "space origin": signs @ OBLIQUE[:3, 3],
    }
    nrrd.write(str(tmp_path / "v.nrrd"), scan().array, header)
    assert np.allclose(Volume.load(tmp_path / "v.nrrd").affine, OBLIQUE, rtol=0, atol=1e-12)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_channels_are_written_and_read(tmp_path, suffix):
    volume = Volume(np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype("f4"), OBLIQUE)
    volume.save(tmp_path / f"v{suffix}")
    back = Volume.load(tmp_path / f"v{suffix}")
    assert np.array_equal(back.array, volume.array)
    assert np.allclose(back.affine, OBLIQUE)


def test_sheared_axes_are_written_as_nrrd_and_refused_by_itk(tmp_path):
    volume = Volume(scan().array, SHEARED)
    volume.save(tmp_path / "v.nrrd")
    assert np.allclose(Volume.load(tmp_path / "v.nrrd").affine, SHEARED)
    with pytest.raises(ValueError, match="right angles"):
        volume.save(tmp_path / "v.mha")
    assert not (tmp_path / "v.mha").exists()


@pytest.mark.parametrize(
    ("header", "shape", "token"),
    [
        ({}, (4, 5, 6), "space"),
        ({"spacings": [1, 1, 1]}, (4, 5, 6), "space"),
        (NRRD | {"space": "scanner-xyz"}, (4, 5, 6), "scanner-xyz"),
        (NRRD | {"space units": ["um", "um", "um"]}, (4, 5, 6), "um"),
        (NRRD | {"encoding": "ascii"}, (4, 5, 6), "ascii"),
        (
            NRRD
            | {
                "kinds": ["RGB-color", "domain", "domain", "domain"],
                "space directions": np.vstack([np.full(3, np.nan), np.eye(3)]),
            },
            (3, 4, 5, 6),
            "RGB-color",
        ),
    ],
)
def test_an_nrrd_without_a_place_or_with_colours_is_refused(tmp_path, header, shape, token):
    nrrd.write(str(tmp_path / "v.nrrd"), np.ones(shape, np.float32), header)
    with pytest.raises(ValueError, match=rf"v\.nrrd.*{token}"):
        Volume.load(tmp_path / "v.nrrd")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"sizes: 4 5 6", b"sizes: 4000000 500000 6"),
        lambda content: content.replace(b"sizes: 4 5 6", b"sizes: 4 5 60"),
        lambda content: content.replace(b"encoding: gzip", b"encoding: gzip\nbyte skip: 3"),
        lambda content: content.replace(
            b"encoding: gzip", b"encoding: raw\ndata file: /etc/passwd"
        ),
        lambda content: content[:-20] + bytes(255 - b for b in content[-20:]),
        lambda content: b"",
        lambda content: b"NRRD0004\nnonsense\n\n",
    ],
)
def test_a_damaged_nrrd_is_refused_with_its_path(tmp_path, change):
    scan().save(tmp_path / "v.nrrd")
    (tmp_path / "v.nrrd").write_bytes(change((tmp_path / "v.nrrd").read_bytes()))
    with pytest.raises(ValueError, match=r"v\.nrrd"):
        Volume.load(tmp_path / "v.nrrd")


@pytest.mark.parametrize("name", ["v.mha", "v.xyz", "v"])
def test_what_nothing_reads_is_refused_with_its_path(tmp_path, name):
    (tmp_path / name).write_bytes(b"no image " * 40)
    with pytest.raises(ValueError, match=name):
        Volume.load(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        (b"NDims = 3", b"NDims = 99"),  # ends the process in ITK
        (b"ElementSpacing", b"ElementColour"),
        (b"NDims = 3", b"NDims = 3\nDistanceUnits = cm"),
        (b"NDims = 3", b"NDims = 3\nElementToIntensityFunctionSlope = 2"),
        (b"DimSize = 4 5 6", b"DimSize = 4 5 7"),
        (b"ElementDataFile = LOCAL", b"ElementDataFile : /etc/passwd"),
    ],
)
def test_a_metaimage_that_itk_misreads_is_refused(tmp_path, given, changed):
    scan().save(tmp_path / "v.mha")
    content = (tmp_path / "v.mha").read_bytes()
    assert content.count(given) == 1
    (tmp_path / "w.mha").write_bytes(content.replace(given, changed))
    with pytest.raises(ValueError, match=r"w\.mha|/etc/passwd"):
        Volume.load(tmp_path / "w.mha")


def test_damaged_voxels_of_a_metaimage_are_refused(tmp_path):
    scan(shape=(20, 20, 20)).save(tmp_path / "v.mha")
    content = bytearray((tmp_path / "v.mha").read_bytes())
    content[-200:-196] = bytes(4)
    (tmp_path / "v.mha").write_bytes(content)
    with pytest.raises(ValueError, match=r"v\.mha: .*damaged"):
        Volume.load(tmp_path / "v.mha")


def test_a_nifti_pair_that_itk_places_elsewhere_is_refused(tmp_path):
    array = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    pair = nib.Nifti1Pair(array, OBLIQUE)
    nib.save(pair, tmp_path / "same.hdr")
    assert np.allclose(Volume.load(tmp_path / "same.hdr").affine, OBLIQUE, atol=1e-4)
    pair.set_sform(SHEARED, 2)
    nib.save(pair, tmp_path / "other.hdr")
    nib.save(nib.Spm99AnalyzeImage(array, np.diag([2, 2, 3, 1])), tmp_path / "analyze.hdr")
    for name in ("other.hdr", "analyze.hdr"):
        with pytest.raises(ValueError, match=name):
            Volume.load(tmp_path / name)


def test_a_format_without_directions_is_said(tmp_path, caplog):
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.int16)), str(tmp_path / "v.tif"))
    assert Volume.load(tmp_path / "v.tif").shape == (6, 5, 4)
    assert "v.tif" in caplog.text


def test_an_unknown_ending_is_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match=r"v\.tif"):
        scan().save(tmp_path / "v.tif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["v.nrrd", "v.mha", "v.dcm"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM" if name == "v.dcm" else b"NRRD0004\n")
    with pytest.raises(ValueError, match=r"pip install 'sammed3d-backbone\["):
        Volume.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"pip install 'sammed3d-backbone\["):
        scan().save(tmp_path / name)
