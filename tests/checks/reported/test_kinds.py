"""Two further inputs of each of the twelve kinds of fault of test_faults.py and test_reports.py."""

import copy
import json
import os
import pickle
import shutil
import site
import time
from argparse import Namespace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sammed3d_backbone.recipes import finetune_unetr, pretrain_promptable

from sammed3d_backbone import Segmenter, config, console, encoder
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.files import locked

from .tools import ball, cli, image, label, nifti, nnunet, run, score, segment, tune

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "weights/tiny.safetensors"


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


# 1. Paths built from data


def test_1_a_volume_whose_name_is_only_dots():
    nifti("raw/...nii.gz", image(0))
    nifti("raw/label.nii.gz", label())
    entry = {"image": "...nii.gz", "label": "label.nii.gz", "labels": {"1": "head", "2": "tail"}}
    Path("raw/labels.json").write_text(json.dumps([entry]))
    assert cli("curate", "raw", "out", "--min-side-mm", "1")[0] == 2
    assert not Path("out").exists()


def test_1_a_class_named_like_a_path(here):
    nnunet("raw/data", n=1, labels={"background": 0, "../../../head": 1, "/tail": 2})
    before = {path for path in here.rglob("*") if not path.is_relative_to(here / "out")}
    arguments = ["--variant", "tiny", "--first", "centre", "--out", "out"]
    assert cli("clicks", "raw/data", *arguments)[0] == 0
    assert cli("curate", "raw/data", "out2", "--min-side-mm", "1")[0] == 0
    new = {path.relative_to(here).parts[0] for path in here.rglob("*") if path not in before}
    assert new == {"out", "out2"}


def test_1_a_data_set_named_like_a_path(here):
    Path("deep/er/cwd").mkdir(parents=True)
    os.chdir("deep/er/cwd")
    nnunet("raw", n=1, name="a/../../../evil")
    before = {*here.rglob("*")}
    assert cli("clicks", "raw", "--variant", "tiny", "--first", "centre", "--cases", 1)[0] == 0
    new = {*here.rglob("*")} - before
    assert len({path.relative_to(here).parts[3] for path in new}) == 1


# 2. Models and files that are damaged but finite in form


def test_2_one_damaged_model_of_an_ensemble(fine_tuned):
    model = fine_tuned()
    Path("folds").mkdir()
    tensors = load_file(model)
    shutil.copyfile(model, "folds/fold_0.safetensors")
    tensors[next(iter(tensors))].view(-1)[0] = float("inf")
    from safetensors import safe_open

    with safe_open(model, "pt") as opened:
        save_file(tensors, "folds/fold_1.safetensors", metadata=opened.metadata())
    code, said = cli("predict", "folds", ball(), "out.nii.gz")
    assert (code, "fold_1" in said, Path("out.nii.gz").exists()) == (2, True, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {"1": "a", "2": "b", "3": "c"}},
        {"labels": {"0": "background", "1": "a", "5": "b"}},
        {"labels": {"0": "background", "1": "a", "2": "a"}},
        {"overlap": 0.99999},
        {"overlap": -1},
    ],
    ids=str,
)
def test_2_a_card_of_another_network(fine_tuned, changes):
    Segmenter.from_pretrained(fine_tuned()).save_pretrained("model")
    card = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(card | changes))
    code, said = cli("predict", "model", ball(), "out.nii.gz")
    assert (code, next(iter(changes)) in said) == (2, True)


def test_2_finite_weights_with_infinite_outputs(fine_tuned):
    tensors = {name: t * 1e30 for name, t in load_file(fine_tuned()).items()}
    Segmenter.from_pretrained("model.safetensors").save_pretrained("model")
    save_file(tensors, "model/model.safetensors")
    code, said = cli("predict", "model", ball(), "out.nii.gz")
    assert (code, "finite" in said, Path("out.nii.gz").exists()) == (2, True, False)
    save_file({name: t * 1e30 for name, t in load_file(TINY).items()}, "tiny.safetensors")
    given = ["--point", "20,20,20", "--weights", "tiny.safetensors"]
    assert segment("scan.nii.gz", "out.nii.gz", *given)[0] == 2
    arguments = ["f.safetensors", "--weights", "tiny.safetensors", "--variant", "tiny"]
    assert cli("features", "scan.nii.gz", *arguments)[0] == 2


def test_2_weights_with_a_flipped_bit():
    content = bytearray(TINY.read_bytes())
    content[len(content) // 2] ^= 0x40
    Path("bad.safetensors").write_bytes(content)
    given = ["--point", "20,20,20", "--weights", "bad.safetensors"]
    assert segment(ball(), "out.nii.gz", *given)[0] == 2
    assert not Path("out.nii.gz").exists()


# 3. Pickles on resume


def test_3_a_pickle_in_a_run_of_pretraining(here):
    folder = here / "runs/toy/checkpoints/0000001"
    folder.mkdir(parents=True)
    (folder / "random_states_0.pkl").write_bytes(pickle.dumps(Evil()))
    (folder / "scheduler.bin").write_bytes(pickle.dumps(Evil()))
    values = {"name": "toy", "sources": ["synthetic"], "shares": [1], "img_size": 32, "cpu": True}
    Path("c.yaml").write_text(json.dumps(values | {"steps": 2, "warmup_steps": 1}))
    cfg = config.load(pretrain_promptable.Config, Path("c.yaml"))
    code, said = run(lambda: console.run_program(lambda: pretrain_promptable.main(cfg), "x"))
    assert (code, ".pkl" in said or "scheduler.bin" in said) == (2, True)
    assert not Path("EXECUTED").exists()


def test_3_a_pickle_that_calls_itself_safetensors():
    Path("m.safetensors").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": {"a": Evil()}}, "m.ckpt")
    for key, name in (("init", "m.safetensors"), ("weights", "m.ckpt")):
        values = {"scratch": key == "init", key: str(Path(name).absolute())}
        assert tune(nnunet("data"), **values)[0] == 2
    assert not Path("EXECUTED").exists()


# 4. Sizes from headers


def test_4_an_nrrd_that_claims_a_petabyte():
    header = "NRRD0004\ntype: float\ndimension: 3\nsizes: 100000 100000 100000\nencoding: raw\n"
    header += "space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n"
    header += "space origin: (0,0,0)\n\n"
    Path("v.nrrd").write_bytes(header.encode() + bytes(1000))
    began = time.monotonic()
    code, said = segment("v.nrrd", "out.nii.gz", "--point", "1,1,1")
    assert (code, "v.nrrd" in said) == (2, True)
    assert time.monotonic() - began < 10


def test_4_a_spacing_that_makes_a_small_scan_large():
    fine = ["--spacing", "0.02,0.02,0.02"]
    code, said = segment(ball(), "out.nii.gz", "--point", "20,20,20", *fine)
    assert (code, "GiB" in said) == (2, True)
    code, said = cli("features", "scan.nii.gz", "f.safetensors", "--variant", "tiny", *fine)
    assert (code, "GiB" in said) == (2, True)


@pytest.mark.parametrize(
    "changes",
    [{"encoder": {"img_size": 100_000}}, {"adapter": {"feature_size": 10_000_000}}],
    ids=str,
)
def test_4_a_card_of_a_network_that_fits_no_memory(fine_tuned, changes):
    Segmenter.from_pretrained(fine_tuned()).save_pretrained("model")
    card = json.loads(Path("model/config.json").read_text())
    for key, value in changes.items():
        card[key] |= value
    Path("model/config.json").write_text(json.dumps(card))
    code, said = cli("predict", "model", ball(), "out.nii.gz")
    assert (code, "card" in said, "memory" in said) == (2, True, False)


def test_4_text_of_a_tebibyte():
    for name in ("c.json", "c.yaml"):
        with Path(name).open("wb") as file:
            file.truncate(2**40)  # takes no room on the disk
    folder = nnunet("data")
    for said in (
        segment(ball(), "out.nii.gz", "--points", "c.json"),
        cli("plan", folder, "--subjects", "c.json"),
        cli("curate", folder, "out", "--layout", "c.yaml"),
        cli("train", "c.yaml"),
    ):
        assert (said[0], "c.json" in said[1] or "c.yaml" in said[1]) == (2, True), said


# 5. Silently dropped or reinterpreted input


def test_5_a_key_of_a_configuration_that_occurs_twice():
    Path("c.yaml").write_text("name: x\ndata: y\nlr: 1.0e-3\nlr: 1.0e-4\n")
    with pytest.raises(ValueError, match="lr"):
        config.load(finetune_unetr.Config, Path("c.yaml"))


def test_5_a_key_of_a_card_that_occurs_twice(fine_tuned):
    Segmenter.from_pretrained(fine_tuned()).save_pretrained("model")
    card = Path("model/config.json").read_text().rstrip()
    Path("model/config.json").write_text(card[:-1] + ', "overlap": 0}')
    code, said = cli("predict", "model", ball(), "out.nii.gz")
    assert (code, "overlap" in said) == (2, True)


def test_5_weights_that_another_key_would_replace(fine_tuned):
    code, said = tune(nnunet("data"), init=fine_tuned(), weights="tiny", scratch=False)
    assert (code, "init" in said, "weights" in said) == (2, True, True)


@pytest.mark.parametrize(
    "labels",
    [
        {"1": "head", "01": "tail"},
        {"1": "head", "2": "head"},
        {"1": "head", "2": "head "},
        {"1": "head", "2": None},
    ],
)
def test_5_two_names_for_one_value_of_a_single_volume(labels):
    nifti("raw/a.nii.gz", image(0))
    nifti("raw/label.nii.gz", label())
    entry = {"image": "a.nii.gz", "label": "label.nii.gz", "labels": labels}
    Path("raw/labels.json").write_text(json.dumps([entry]))
    code, said = cli("curate", "raw", "out")
    assert (code, "label.nii.gz" in said) == (2, True)


def test_5_mirror_images_of_a_model_that_was_trained_without_them(fine_tuned):
    code, said = cli("predict", fine_tuned(), ball(), "out.nii.gz", "--mirror")
    assert (code, "--mirror" in said) == (0, True)


def test_5_a_width_that_the_decoder_does_not_have():
    code, said = tune(nnunet("data"), "--dry-run", model="linear", feature_size=8)
    assert (code, "feature_size" in said) == (2, True)


def test_5_options_that_would_be_ignored(fine_tuned):
    model, folder = fine_tuned(), nnunet("data")
    for option, arguments in (
        ("--probabilities", ("predict", model, ball(), "out.nii.gz", "--probabilities")),
        ("--jobs", ("predict", model, "scan.nii.gz", "out.nii.gz", "--jobs", 2)),
        ("--weights", ("clicks", folder, "--model", "os:getcwd", "--weights", "tiny")),
        ("--cases", ("clicks", "--compare", "a", "b", "--cases", 0)),
        ("--steps", ("train", "x.plan.yaml", "--steps", 0)),
    ):
        code, said = cli(*arguments)
        assert (code, option in said) == (2, True), said


# 6. Loops without end and hangs


def test_6_a_scan_that_is_a_fifo():
    os.mkfifo("v.nii")
    os.mkfifo("v.nrrd")
    for name in ("v.nii", "v.nrrd"):
        code, said = segment(name, "out.nii.gz", "--point", "1,1,1")
        assert (code, name in said) == (2, True)


@pytest.mark.parametrize("written", ["x.raw", "LIST\nx.raw", "../here/x.raw", "/dev/zero"])
def test_6_a_header_that_names_a_fifo_for_its_voxels(written):
    os.mkfifo("x.raw")
    header = "NDims = 3\nDimSize = 4 4 4\nElementSpacing = 1 1 1\nElementType = MET_FLOAT\n"
    for name in ("v.mhd", "v.mha"):
        Path(name).write_text(f"{header}ElementDataFile = {written}\n")
        code, said = segment(name, "out.nii.gz", "--point", "1,1,1")
        assert (code, Path(written.split()[-1]).name in said) == (2, True)


def test_6_a_list_of_folds_or_of_scores_that_is_a_fifo(fine_tuned):
    folder = nnunet("data")
    os.mkfifo(folder / "splits.json")
    os.mkfifo("scores.json")
    for code, said in (
        tune(folder, "--dry-run"),
        cli("push", fine_tuned(), "me/x", "--dry-run", "--scores", "scores.json"),
    ):
        assert (code, "FIFO" in said) == (2, True), said


def test_6_folders_that_hold_themselves():
    nnunet("raw/data", n=1)
    Path("raw/a").symlink_to(".")
    Path("raw/b").symlink_to("../raw")
    began = time.monotonic()
    assert cli("curate", "raw", "out", "--min-side-mm", "1")[0] == 0
    assert time.monotonic() - began < 30
    made = [path.relative_to("out").parts[0] for path in Path("out").rglob("decisions.json")]
    assert made == ["data"]


# 7. Work lost at the end


def test_7_an_output_below_a_file(fine_tuned, monkeypatch):
    monkeypatch.setattr(Segmenter, "predict", lambda *_, **__: pytest.fail("computed"))
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("computed"))
    model = fine_tuned()
    assert cli("predict", model, ball(), "scan.nii.gz/out.nii.gz")[0] == 2
    assert cli("export", model, "scan.nii.gz/out.pt2")[0] == 2


def test_7_names_that_are_nearly_too_long_and_a_plan_in_a_new_folder(fine_tuned):
    model, long = fine_tuned(), "x" * 245
    assert cli("predict", model, ball(), f"{long}.nii.gz")[0] == 0
    assert cli("predict", model, "scan.nii.gz", f"{long}xxxx.nii.gz")[0] == 2
    others = ["--save-clicks", f"{long}.json", "--png", f"{long}.png"]
    assert segment("scan.nii.gz", "out.nii.gz", "--point", "20,20,20", *others)[0] == 0
    plan = ["--modality", "mr", "--steps", 20, "--out", "new/x.plan.yaml"]
    assert cli("plan", nnunet("data"), *plan)[0] == 0


def test_7_one_bad_scan_of_a_folder(fine_tuned):
    for number in range(3):
        nifti(f"scans/s{number}.nii.gz", image(number))
    Path("scans/s1.nii.gz").write_bytes(Path("scans/s1.nii.gz").read_bytes()[:200])
    assert cli("predict", fine_tuned(), "scans", "out")[0] == 1
    assert sorted(p.name for p in Path("out").glob("*.gz")) == ["s0.nii.gz", "s2.nii.gz"]
    cases = json.loads(Path("out/manifest.json").read_text())["cases"]
    assert [case["id"] for case in cases if case["error"]] == ["s1"]


# 8. Two processes


def test_8_a_folder_that_another_process_writes(fine_tuned, monkeypatch):
    nifti("scans/s.nii.gz", image(0))
    folder = nnunet("data")
    for i in range(6):
        nifti(f"pred/case_{i}.nii.gz", label())
    with locked(Path("out")):
        code, said = cli("predict", fine_tuned(), "scans", "out")
        assert (code, "in use" in said) == (2, True)
        code, said = score(monkeypatch, "pred", folder.absolute(), "--out", "out")
        assert (code, "in use" in said) == (2, True)


def test_8_an_output_that_appears_meanwhile(fine_tuned, monkeypatch):
    predict = Segmenter.predict

    def meanwhile(*given, **how):
        Path("out.nii.gz").write_text("another's")
        return predict(*given, **how)

    monkeypatch.setattr(Segmenter, "predict", meanwhile)
    assert cli("predict", fine_tuned(), ball(), "out.nii.gz")[0] == 2
    assert Path("out.nii.gz").read_text() == "another's"


def test_8_results_that_are_there_are_not_replaced_unasked(monkeypatch):
    folder = nnunet("data").absolute()
    for i in range(6):
        nifti(f"pred/case_{i}.nii.gz", label())
    assert score(monkeypatch, "pred", folder, "--out", "ev")[0] is None
    code, said = score(monkeypatch, "pred", folder, "--out", "ev")
    assert (code, "ev/scores.csv" in said) == (2, True)
    assert score(monkeypatch, "pred", folder, "--out", "ev", "--force")[0] is None


# 9. Tracebacks for users


def test_9_a_table_of_scores_with_words_for_numbers(monkeypatch):
    folder = nnunet("data")
    for i in range(6):
        nifti(f"pred/case_{i}.nii.gz", label())
    assert score(monkeypatch, "pred", folder.absolute(), "--out", "ev")[0] is None
    table = Path("ev/scores.csv").read_text().replace(",1,", ",good,")
    Path("bad.csv").write_text(table)
    code, said = score(
        monkeypatch, "pred", folder.absolute(), "--out", "ev2", "--baseline", "bad.csv"
    )
    assert (code, "bad.csv" in said, "Traceback" in said) == (2, True, False)


@pytest.mark.parametrize("text", ["[]", '{"cases": 5}', '{"model": []', "\xff"])
def test_9_a_manifest_that_is_none(fine_tuned, text):
    nifti("scans/s.nii.gz", image(0))
    Path("out").mkdir()
    Path("out/manifest.json").write_text(text, encoding="latin-1")
    code, said = cli("predict", fine_tuned(), "scans", "out")
    assert (code, "manifest.json" in said, "Traceback" in said) == (2, True, False)


# 10. What leaves the machine


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
@pytest.mark.filterwarnings("ignore")
def test_10_exported_files_name_no_folder_of_this_machine(fine_tuned, name):
    assert cli("export", fine_tuned(), name)[0] == 0
    content = Path(name).read_bytes()
    for folder in (str(ROOT), *site.getsitepackages(), str(Path.home()) + "/", os.sep + "tmp"):
        assert folder.encode() not in content, folder


def test_10_converted_weights_name_no_folders(here):
    Path("hospital").mkdir()
    given = {"work_dir": f"{here}/hospital/x", "data_paths": ["~/ward/a", "../ward/b"]}
    content = {"state_dict": load_file(TINY), "args": Namespace(**given), "of": f"{here}/x"}
    torch.save(content, "hospital/w.pth")
    assert cli("convert", here / "hospital/w.pth", "out.safetensors")[0] == 0
    written = Path("out.safetensors").read_bytes()
    assert b"data_paths" in written
    for word in (b"hospital", b"ward", str(here).encode()):
        assert word not in written


def test_10_a_manifest_names_files_and_no_folders(fine_tuned, here):
    Path("secret").mkdir()
    shutil.move(fine_tuned(), "secret/m.safetensors")
    nifti("private/s.nii.gz", image(0))
    model = here / "secret/m.safetensors"
    assert cli("predict", model, here / "private", "out")[0] == 0
    Path("private/t.nii.gz").write_bytes(b"no scan")
    assert cli("predict", model, here / "private", "out")[0] == 1
    nnunet("hospital/raw", n=1)
    Path("hospital/raw/imagesTr/case_0_0000.nii.gz").write_bytes(b"no scan")
    assert cli("curate", here / "hospital/raw", "curated")[0] == 0
    for path in Path("curated").rglob("*.json*"):
        assert "hospital" not in path.read_text() or path.name == "summary.json", path
    written = Path("out/manifest.json").read_text()
    assert "t.nii.gz" in written
    assert "m.safetensors" in written
    assert "secret" not in written
    assert "private" not in written


# 11. Legitimate data refused


def test_11_weights_of_a_compiled_network():
    network, x = encoder("tiny"), torch.randn(1, 1, 64, 64, 64)
    content = {f"_orig_mod.module.{n}": t for n, t in network.state_dict().items()}
    torch.save({"state_dict": content}, "compiled.pth")
    with torch.no_grad():
        assert torch.equal(encoder("tiny", weights="compiled.pth")(x), network(x))


def test_11_labels_of_other_types_and_byte_orders():
    folder = nnunet("data")
    for i, dtype in enumerate([">i8", ">f8", ">u2", "<u8", "<f4", "<i1"]):
        kind = nib.Nifti2Image if i % 2 else nib.Nifti1Image
        header = kind.header_class(endianness=dtype[0])
        header.set_data_dtype(np.dtype(dtype))
        made = kind(label().astype(dtype)[..., None], np.eye(4), header, dtype=np.dtype(dtype))
        nib.save(made, folder / f"labelsTr/case_{i}.nii.gz")
    assert tune(folder, "--dry-run")[0] == 0
    assert len(read_dataset(folder).cases) == 6


def test_11_a_plan_for_patients_and_healthy_controls():
    folder = nnunet("data")
    for i in range(2):
        nifti(folder / f"labelsTr/case_{i}.nii.gz", 0 * label())
    assert cli("plan", folder, "--modality", "mr", "--out", "a.plan.yaml")[0] == 0
    for i in range(6):
        nifti(folder / f"labelsTr/case_{i}.nii.gz", 0 * label())
    code, said = cli("plan", folder, "--modality", "mr", "--out", "b.plan.yaml")
    assert (code, "labelled voxel" in said) == (2, True)


# 12. Contracts with other libraries


def test_12_an_encoder_is_copied_and_called_with_other_parameters():
    network, x = encoder("tiny"), torch.randn(1, 1, 64, 64, 64)
    other = copy.deepcopy(network)
    assert other.pretrained_cfg == network.pretrained_cfg
    zeros = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    with torch.no_grad():
        assert torch.equal(other(x), network(x))
        assert torch.equal(
            torch.func.functional_call(other, dict(network.named_parameters()), x), network(x)
        )
        assert torch.func.functional_call(network, zeros, x).abs().max() == 0


def test_12_parametrised_layers_are_used():
    network, x = encoder("tiny"), torch.randn(1, 1, 64, 64, 64)
    with torch.no_grad():
        expected = network(x)
        for name in ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.attn.proj"):
            torch.nn.utils.parametrizations.weight_norm(network.get_submodule(name))
        assert torch.allclose(network(x), expected, atol=1e-4)
        for parameter in network.blocks[0].attn.qkv.parametrizations.parameters():
            parameter.mul_(2)
        assert not torch.allclose(network(x), expected, atol=1e-2)
