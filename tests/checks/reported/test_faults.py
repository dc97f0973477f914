"""What two rounds of hostile tests did to the package."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from boxes import write_boxes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sammed3d_backbone.recipes import finetune_unetr

from sammed3d_backbone import Predictor, Segmenter, config, sam
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.hub import model_card

from .tools import ball, cli, nifti, nnunet, run, segment, tune

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
NOISE = np.random.default_rng(0).normal(100, 30, (20, 20, 20))
TINY = ROOT / "weights/tiny.safetensors"


@pytest.mark.parametrize("name", ["{here}/photos", "!first/../../../photos", "..", ".", ""])
def test_01_curate_deletes_nothing_that_a_data_set_names(here, name):
    Path("photos").mkdir()
    Path("photos/a.txt").write_text("precious")
    write_boxes(Path("raw"), cases=1)
    entry = {"images": ["imagesTr/case_0.nii.gz"], "label": "labelsTr/case_0.nii.gz"}
    info = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "front": 1, "back": 2},
        "dataset": {"!first": entry, name.format(here=here): entry},
    }
    Path("raw/dataset.json").write_text(json.dumps(info))
    assert cli("curate", "raw", "out", "--min-side-mm", "1")[0] == 2
    assert Path("photos/a.txt").read_text() == "precious"
    assert not Path("out").exists()


def test_02_masks_follow_the_umask():
    before = os.umask(0o077)
    try:
        assert segment(ball(), "out.nii.gz", "--point", "20,20,20")[0] == 0
    finally:
        os.umask(before)
    assert Path("out.nii.gz").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["nan", torch.int8, torch.bool, torch.complex64, "bit"])
def test_03_a_damaged_model_is_used_for_nothing(fine_tuned, damage):
    model, given = fine_tuned(), str(nifti("scan.nii.gz", NOISE))
    tensors = load_file(model)
    with safe_open(model, "pt") as opened:
        metadata = opened.metadata()
    if damage == "bit":
        content = bytearray(Path(model).read_bytes())
        content[-4001] ^= 0x40
        Path(model).write_bytes(content)
    elif damage == "nan":
        tensors[next(n for n in tensors if n.endswith("norm1.weight"))][0] = float("nan")
        save_file(tensors, model, metadata=metadata)
    else:
        save_file({n: t.to(damage) for n, t in tensors.items()}, model, metadata=metadata)
    assert cli("predict", model, given, "out.nii.gz")[0] == 2
    assert cli("push", model, "me/x", "--dry-run")[0] == 2
    assert cli("verify", model)[0] == 1
    assert not Path("out.nii.gz").exists()


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


@pytest.mark.parametrize(
    "name", ["custom_checkpoint_1.pkl", "random_states_0.pkl", "optimizer.bin"]
)
def test_04_a_pickle_in_a_run_folder_is_not_run(name):
    folder = Path("runs/toy/checkpoints/0000002")
    folder.mkdir(parents=True)
    with (folder / name).open("wb") as file:
        pickle.dump(Evil(), file)
    code, said = tune(nnunet("data"))
    assert (code, name in said) == (2, True)
    assert not Path("EXECUTED").exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"clicks": [{"point_vox": "10,9,8"}]}',
        '{"clicks": [{"point_vox": ["a", 9, 8]}]}',
        '{"clicks": [{"point_vox": {"x": 10}}]}',
        '{"clicks": [{"point_vox": [1%s, 9, 8]}]}' % ("0" * 400),
        '{"clicks": [{"point_vox": [10, 9, 8]}], "settings": []}',
        "[" * 100_000,
    ],
)
def test_05_click_lists_that_are_none(text):
    Path("c.json").write_text(text)
    code, said = segment(ball(), "out.nii.gz", "--points", "c.json")
    assert (code, "Traceback" in said, len(said) < 2000) == (2, False, True)


@pytest.mark.parametrize(
    "changed",
    [
        {"training": None},
        {"validation": 5},
        {"training": [{"image": None, "label": "labelsTr/case_0.nii.gz"}]},
        {"training": [{"image": 5, "label": []}]},
        {"training": [], "dataset": {"a": {"images": [], "label": "labelsTr/case_0.nii.gz"}}},
        {"dataset": {"a": {"images": ["imagesTr/case_0.nii.gz"], "masks": None, "label": 1}}},
        {"labels": [1, 2]},
    ],
)
def test_05_descriptions_that_are_none(changed):
    write_boxes(Path("toy"), cases=1)
    info = json.loads(Path("toy/dataset.json").read_text())
    Path("toy/dataset.json").write_text(json.dumps(info | changed))
    code, said = cli("curate", "toy", "out")
    assert (code, "Traceback" in said) == (2, False)


def test_06_states_of_the_predictor():
    array = np.random.default_rng(0).normal(100, 5, (24, 24, 24)).astype("f4")
    predictor = Predictor(sam("tiny"))
    with pytest.raises(ValueError, match="undo"):
        predictor.undo()
    assert predictor.objects == []
    predictor.set_volume(array, np.eye(4))
    with pytest.raises(TypeError):
        predictor.click((1, 1, 1), object=["a"])
    with pytest.raises(ValueError, match="float32"):
        predictor.set_volume(np.where(array > 100, 1e300, array.astype("f8")), np.eye(4))
    affine = np.eye(4)
    affine[3] = [5, 5, 5, 7]
    with pytest.raises(ValueError, match="affine"):
        predictor.set_volume(array, affine)
    for bad in (np.full(array.shape, np.nan), np.full(array.shape, "x")):
        with pytest.raises((TypeError, ValueError)):
            predictor.mask_prompt(mask=bad)


def test_07_outputs_under_one_name_and_names_that_a_terminal_cannot_show():
    Path("sub").mkdir()
    names = ["--save-clicks", "sub/../out.nii.gz", "--force"]
    assert segment(ball(), "out.nii.gz", "--point", "20,20,20", *names)[0] == 2
    command = [sys.executable, "-m", "sammed3d_backbone", "segment", "scan.nii.gz", "o.nii.gz"]
    command[1:3] = ["-c", "import sys; from sammed3d_backbone.cli import main; sys.exit(main())"]
    command += ["--variant", "tiny", "--object", "na\u00efve", "--point", "20,20,20"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\xef" in done.stdout


def test_09_convert_keeps_damage_visible():
    content = bytearray(TINY.read_bytes())
    content[-2] ^= 0x40
    Path("bad.safetensors").write_bytes(content)
    assert cli("convert", "bad.safetensors", "good.safetensors")[0] == 2
    assert not Path("good.safetensors").exists()


@pytest.mark.parametrize("mm", [0.001, 99, 1000])
def test_10_sizes_from_headers(fine_tuned, mm):
    array = np.random.default_rng(0).normal(100, 5, (22, 18, 17)).astype("f4")
    nifti("scan.nii", array, np.diag([mm, mm, mm, 1.0]))
    assert cli("predict", fine_tuned(), "scan.nii", "out.nii.gz")[0] == 2
    if mm != 99:  # a volume of 2 m, of which the predictor encodes single windows
        assert segment("scan.nii", "out.nii.gz", "--point", "10,9,8")[0] == 2


def test_10_archives_that_unpack_to_more():
    torch.save({"a": torch.zeros(2)}, "p.pth")
    with zipfile.ZipFile("p.pth") as source, zipfile.ZipFile("b.pth", "w", 8) as bomb:
        for name in source.namelist():
            bomb.writestr(name, source.read(name) + b"0" * 2**24 * name.endswith("data.pkl"))
    began = time.monotonic()
    assert cli("info", "b.pth")[0] == 2
    torch.save({"a": torch.zeros(1).expand(100_000, 100_000)}, "h.pth")
    assert cli("verify", "h.pth")[0] == 2
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("command", ["segment", "convert", "features"])
def test_11_a_full_disk(command):
    ball()
    arguments = {
        "segment": ["scan.nii.gz", "o.nii.gz", "--point", "20,20,20", "--cache", "c"],
        "convert": [str(TINY), "x.safetensors"],
        "features": ["scan.nii.gz", "f.safetensors"],
    }[command]
    arguments += [] if command == "convert" else ["--variant", "tiny"]
    code = (
        "import resource, signal, sys; from sammed3d_backbone.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if command == "segment" else 2)
    assert Path("o.nii.gz").exists() == (command == "segment")
    names = {path.name for path in Path().iterdir()}
    assert names <= {"scan.nii.gz", "o.nii.gz", "c"}
    assert not list(Path().glob("c/*"))


def test_12_two_at_once():
    write_boxes(Path("toy"), cases=2)
    code = "import sys; from sammed3d_backbone.cli import main; sys.exit(main())"
    arguments = ["clicks", "toy", "--variant", "tiny", "--first", "centre", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stderr=-3)
        for _ in range(2)
    ]
    codes = sorted(process.wait() for process in both)
    lines = [json.loads(line) for line in Path("out/clicks.jsonl").read_text().splitlines()[1:]]
    steps = [(line["case"], line["class"], line["step"]) for line in lines]
    assert len(steps) == len({*steps}) == 4 * 10
    assert codes[0] == 0  # the other was refused, or came after the end and had nothing to do
    assert codes[1] in (0, 2)
    assert not Path("out/.lock").exists()


def test_13_what_push_publishes(fine_tuned, here):
    Path("secret").mkdir()
    Path("secret/w.safetensors").write_bytes(TINY.read_bytes())
    for given in ("secret/w.safetensors", "../" + here.name + "/secret/w.safetensors"):
        Path("runs").mkdir(exist_ok=True)
        name = f"run{len(given)}"
        code, said = tune(
            nnunet("data"),
            name=name,
            scratch=False,
            weights=given,
            lr=1e-4,
            steps=1,
            validate_every=1,
            warmup_steps=0,
            variant="tiny",
        )
        assert code == 0, said
        with safe_open(here / f"runs/{name}/last.safetensors", "pt") as opened:
            assert "secret" not in json.dumps(opened.metadata())
    hostile = "a | b <script>alert(1)</script> ![](http://127.0.0.1/x.png)\n\n# Heading"
    model = fine_tuned(
        labels={0: "background", 1: hostile, 2: "c"}, training={"dataset": {"note": hostile}}
    )
    page = str(model_card(Segmenter.from_pretrained(model).card, "me/x"))
    assert "<script>" not in page
    assert "\n# Heading" not in page
    assert "![](" not in page
    assert " | b" not in page.replace("\\|", "")


@pytest.mark.parametrize("name", ["w.safetensors", "z.pth"])
def test_14_files_without_end(name):
    if name == "w.safetensors":
        os.mkfifo(name)
    else:
        Path(name).symlink_to("/dev/zero")
    assert cli("info", name)[0] == 2
    assert segment(ball(), "o.nii.gz", "--point", "20,20,20", "--weights", name)[0] == 2
    assert segment(name, "o.nii.gz", "--point", "20,20,20")[0] == 2
    Path("c.yaml").symlink_to(name)
    with pytest.raises(FileNotFoundError):
        config.load(finetune_unetr.Config, Path("c.yaml"))


@pytest.mark.parametrize("text", ["lr: " + "9" * 400, "lr: " + "[" * 5000, "lr: " + "{a: " * 3000])
def test_15_configurations_that_are_none(text):
    Path("c.yaml").write_text(f"name: x\ndata: y\n{text}\n")
    code, said = run(lambda: config.parse(finetune_unetr.Config, ["c.yaml"]))
    assert (code, "Traceback" in said, len(said) < 20_000) == (2, False, True)


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "stray", "log"])
def test_16_damaged_checkpoints(damage):
    folder = nnunet("data")
    assert tune(folder)[0] == 0
    checkpoints = sorted(Path("runs/toy/checkpoints").glob("0*"))
    newest = checkpoints[-1]
    if damage == "cut":
        (newest / "model.safetensors").write_bytes(b"x" * 100)
    elif damage == "empty":
        (newest / "optimizer.safetensors").write_bytes(b"")
    elif damage == "gone":
        (newest / "checkpoint.json").unlink()
    elif damage == "stray":
        (newest.parent / "5x").mkdir()
    else:
        Path("runs/toy/metrics.jsonl").write_text("{}\n")
    assert tune(folder)[0] == 0


def test_17_a_killed_process_leaves_no_half_picture():
    script = (
        "import numpy as np; from pathlib import Path; from sammed3d_backbone.data.volume import "
        "Volume; from sammed3d_backbone.evaluation.figures import *\n"
        "v = Volume(np.random.rand(90, 90, 90), np.eye(4)); print('ready', flush=True)\n"
        "clicks_figure(Path('f.png'), v, [Clicked('a', v.array > 2, [])] * 3)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for delay in (0.1, 0.3, 0.5):
        with subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        content = Path("f.png").read_bytes() if Path("f.png").exists() else b""
        assert not content or content.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("shape", [(65, 63, 1), (1, 40, 40), (60, 1, 1)])
def test_18_a_picture_of_one_slice(shape):
    array = np.random.default_rng(0).normal(100, 5, shape).astype("f4")
    array[: shape[0] // 2 + 1] += 60
    nifti("v.nii.gz", array)
    point = ",".join(str(n // 2) for n in shape)
    assert segment("v.nii.gz", "o.nii.gz", "--point", point, "--png", "f.png")[0] == 0
    assert Path("f.png").is_file()


def test_19_yaml_that_grows():
    levels = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 8)]
    Path("c.yaml").write_text(f"name: x\ndata: y\nlr: [{', '.join(levels)}]\n")
    with pytest.raises(ValueError, match="alias") as error:
        config.load(finetune_unetr.Config, Path("c.yaml"))
    assert len(str(error.value)) < 2000


def test_a_header_says_nothing_about_the_patient():
    opened = nib.load(ball("in.nii"), mmap=False)
    opened.header["descrip"] = b"Anna Muster"
    opened.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Anna Muster"))
    nib.save(opened, "in.nii")
    assert segment("in.nii", "out.nii", "--point", "20,20,20")[0] == 0
    assert b"Anna" not in Path("out.nii").read_bytes()
    assert Volume.load("out.nii").shape == (40, 40, 40)
