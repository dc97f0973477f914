"""A fine-tuned model goes to a Hub on loopback and comes back."""

import json
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants

from sammed3d_backbone import encoder
from sammed3d_backbone.cli import main
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.hub import model_card, upload
from sammed3d_backbone.inference.segmenter import Segmenter, build_network

loopback_hub = hub_server.loopback_hub  # a fixture
# huggingface_hub hands its upload to httpx in a way that httpx has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = Card(
    network="unetr",
    encoder={"variant": "tiny", "in_chans": 1, "img_size": 16},
    adapter={"feature_size": 4},
    labels={0: "background", 1: "head", 2: "tail"},
    channels=("MRI",),
    preprocessing=Preprocessing(
        (1.0, 1.0, 2.0), {"default": "zscore_positive"}, "volume", (16, 16, 16)
    ),
    training={
        "dataset": {"name": "Toes", "reference": "Doe et al., 2020", "licence": "CC BY-SA 4.0"},
        "start": {"weights": "tiny: random weights, as asked\nmore", "data_overlap": "none seen"},
        "cases": ["a", "b", "c"],
    },
)
ROWS = [
    {"class": "head", "cases": 9, "dice": [0.8, 0.7, 0.9], "nsd": [0.9, 0.8, 1.0]},
    {"class": "tail", "cases": 1, "dice": [0.5, None, None], "nsd": [0.4, None, None]},
]
SCORES = {
    "title": "toes, fold 0",
    "tolerance_mm": 1.0,
    "tables": {"all": [row | {"hd95_mm": [None, None, None]} for row in ROWS]},
}


@pytest.fixture
def hub(loopback_hub, monkeypatch):
    """The Hub, at which we are `me`."""
    loopback_hub.owners["secret"] = "me"
    monkeypatch.setenv("HF_TOKEN", "secret")
    return loopback_hub


@pytest.fixture
def run(tmp_path):
    """What a run leaves: a model, and scores beside it."""
    torch.manual_seed(0)
    (tmp_path / "run/results").mkdir(parents=True)
    Segmenter(build_network(CARD), CARD).save(tmp_path / "run/last.safetensors")
    (tmp_path / "run/results/scores.json").write_text(json.dumps(SCORES))
    return tmp_path / "run"


def test_a_model_goes_up_and_comes_back_by_its_address(hub, run, tmp_path, rng, capsys):
    assert main(["push", str(run / "last.safetensors"), "me/toes"]) == 0
    said = capsys.readouterr().out
    (commit,) = hub.commits["me/toes"]
    assert f"/me/toes/commit/{commit}" in said
    files = hub.files("me/toes")
    assert set(files) == {"model.safetensors", "config.json", "README.md"}
    here = Segmenter.from_pretrained(run / "last.safetensors")
    assert Card.from_json(files["config.json"].decode()) == here.card
    address = "me/toes"
    assert f"sammed3d predict {address}" in said
    there = Segmenter.from_pretrained(address)
    assert there.card == here.card
    volume = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(there.logits(volume), here.logits(volume))
    backbone = encoder("tiny", weights="hf-hub:me/toes").state_dict()
    assert torch.equal(backbone["pos_embed"], here.model.encoder.state_dict()["pos_embed"])
    scan, target = str(tmp_path / "in.nii.gz"), str(tmp_path / "out.nii.gz")
    Volume(rng.normal(100, 20, (16, 16, 8)).astype(np.float32), np.eye(4)).save(scan)
    assert main(["predict", address, scan, target]) == 0
    assert Volume.load(target).shape == (16, 16, 8)


def test_a_second_push_is_a_new_commit_of_the_same_repository(hub, run):
    model = str(run / "last.safetensors")
    assert main(["push", model, "me/toes", "--private"]) == 0
    assert main(["push", model, "me/toes", "--message", "better"]) == 0
    assert len(hub.commits["me/toes"]) == 2
    assert hub.private == {"me/toes"}


def test_a_dry_run_shows_the_page_and_asks_nobody(hub, run, capsys):
    assert main(["push", str(run / "last.safetensors"), "me/toes", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "| head | 9 | 0.800 (0.700 to 0.900) | 0.900 (0.800 to 1.000) | - |" in said
    assert hub.requests == []


def test_scores_of_the_last_weights_are_not_said_of_others(run, capsys):
    (run / "last.safetensors").rename(run / "best.safetensors")
    best = str(run / "best.safetensors")
    assert main(["push", best, "me/toes", "--dry-run"]) == 0
    assert "## Scores" not in capsys.readouterr().out
    scores = str(run / "results/scores.json")
    assert main(["push", best, "me/toes", "--dry-run", "--scores", scores]) == 0
    assert "## Scores" in capsys.readouterr().out


def test_the_page_says_what_how_and_where_from():
    page = str(model_card(CARD, "me/toes", scores=SCORES, licence="cc-by-sa-4.0"))
    _, head, body = page.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["license"] == "cc-by-sa-4.0"
    assert metadata["library_name"] == "sammed3d-backbone"
    for part in (
        "# toes\n",
        "head, tail",
        "sammed3d predict me/toes IN.nii.gz OUT.nii.gz",
        "1.0 x 1.0 x 2.0",
        "Toes",
        "CC BY-SA 4.0",
        "cases: 3",
        "tiny: random weights, as asked\n",
        "none seen",
        "NSD at 1 mm",
        "| tail | 1 | 0.500 | 0.400 | - |",
        "data: Doe et al., 2020",
        "arXiv:2310.15161",
    ):
        assert part in body


def test_the_lines_of_the_page_run(hub, run, tmp_path, monkeypatch, rng):
    main(["push", str(run / "last.safetensors"), "me/toes"])
    page = hub.files("me/toes")["README.md"].decode()
    monkeypatch.chdir(tmp_path)
    Volume(rng.normal(100, 20, (16, 16, 8)).astype(np.float32), np.eye(4)).save("IN.nii.gz")
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert Path("OUT.nii.gz").is_file()


def test_little_is_known_of_a_bare_card():
    used = Preprocessing(None, {"default": "ct"}, "crop", (16, 16, 16))
    page = str(
        model_card(Card("unetr", {}, {}, {0: "background", 1: "toe"}, ("CT",), used), "me/t")
    )
    assert "toe" in page
    assert "None" not in page
    assert "## Scores" not in page


@pytest.mark.parametrize(
    ("repo_id", "token", "remedy"),
    [
        ("toes", "secret", "OWNER/NAME"),
        ("../toes", "secret", "OWNER/NAME"),
        ("me/toes", "wrong", "hf auth login"),
        ("you/toes", "secret", "HF_TOKEN"),
    ],
)
def test_what_the_hub_does_not_allow_is_one_line(
    hub, run, monkeypatch, capsys, repo_id, token, remedy
):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(run / "last.safetensors"), repo_id]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert remedy in line
    assert hub.commits == {}


@pytest.mark.parametrize("text", ["[]", "{}", '{"tables": {"all": [{"class": "toe"}]}}'])
def test_scores_of_another_form_are_named(hub, run, tmp_path, capsys, text):
    (tmp_path / "s.json").write_text(text)
    given = ["--scores", str(tmp_path / "s.json")]
    assert main(["push", str(run / "last.safetensors"), "me/toes", *given]) == 2
    assert "s.json" in capsys.readouterr().err
    assert hub.commits == {}


def test_a_missing_model_is_named(hub, capsys):
    assert main(["push", "none.safetensors", "me/toes"]) == 2
    assert "none.safetensors" in capsys.readouterr().err


@pytest.fixture
def files(run, tmp_path):
    """A folder as it is uploaded."""
    Segmenter.from_pretrained(run / "last.safetensors").save_pretrained(tmp_path / "files")
    return tmp_path / "files"


def test_a_transfer_that_breaks_leaves_no_commit(hub, files, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between its tries
    hub.cuts = [0] * 20
    with pytest.raises(ConnectionError, match="me/toes"):
        upload(files, "me/toes")
    assert hub.commits["me/toes"] == {}


def test_offline_is_said(hub, files, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        upload(files, "me/toes")


def test_a_hub_in_trouble_is_said(hub, files, monkeypatch):
    monkeypatch.setattr(
        hub_server._HubHandler, "create", lambda self, *_: self.reply(418, {"error": "tea"})
    )
    with pytest.raises(ConnectionError, match="me/toes"):
        upload(files, "me/toes")
