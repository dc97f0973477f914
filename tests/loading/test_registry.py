"""The weights table, the Hub on loopback, pins, records in files, and what was seen before."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
from huggingface_hub import constants

from sammed3d_backbone.loading import registry as pretrained
from sammed3d_backbone.loading.registry import (
    DEFAULT_WEIGHTS,
    LISTED,
    SA_MED3D_140K,
    SA_MED3D_HELD_OUT,
    WEIGHTS,
    Weights,
    default_weights,
    from_metadata,
    list_weights,
    locate,
    seen_in_pretraining,
    sha256_of,
    to_metadata,
)
from sammed3d_backbone.loading.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(256)) * 4096  # 1 MiB, as good as weights for everything in this file
REPO, FILE = "someone/net", "deep/net.safetensors"
HUB_FILE = f"{REPO}:{FILE}"


loopback_hub = hub_server.loopback_hub  # a fixture


@pytest.fixture
def at_hub(loopback_hub):
    """The loopback Hub with one file, which this process asks."""
    loopback_hub.publish(REPO, FILE, CONTENT)
    return loopback_hub


@pytest.fixture
def offline(monkeypatch):
    """A call that turns the network off."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def in_table(monkeypatch):
    """A call that puts a record on the loopback Hub's file into the table."""

    def put(**fields):
        record = Weights(
            **{"name": "ours", "repo_id": REPO, "filename": FILE, "revision": "main", **fields}
        )
        monkeypatch.setitem(WEIGHTS, "ours", record)
        return record

    return put


# --- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_record_is_complete_and_frozen(name):
    record = WEIGHTS[name]
    assert record.name == name
    assert record.variant in VARIANTS
    assert record.rel_pos in ("sammed3d", "axial")
    assert record.licence
    assert record.citation
    assert record.pretraining
    assert record.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", record.sha256)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.sha256 = ""


def test_the_public_files_are_listed_and_none_is_said_to_have_been_opened():
    public = {r.filename for r in WEIGHTS.values() if r.repo_id == "blueyo0/SAM-Med3D"}
    assert public == {
        "sam_med3d_turbo.pth",
        "sam_med3d_turbo_bbox_init.pth",
        "sam_med3d_turbo_cvpr_coreset.pth",
        "sam_med3d_turbo_cvpr_alldata.pth",
    }
    assert {r.status for r in WEIGHTS.values() if r.filename in public} == {LISTED}


def test_turbo_is_what_a_user_needs_to_know():
    turbo = WEIGHTS["turbo"]
    assert turbo.sha256.startswith("899a46d0")
    assert (turbo.variant, turbo.rel_pos) == ("vit_b", "sammed3d")
    assert (turbo.spacing_mm, turbo.crop_vox) == ((1.5, 1.5, 1.5), (128, 128, 128))
    assert turbo.orientation == "RAS"
    assert "[-1000, 1000] HU" in turbo.normalisation
    assert "over the whole resampled volume" in turbo.normalisation


def test_a_printed_record_names_every_field_and_counts_the_datasets():
    lines = dict(line.split(": ", 1) for line in str(WEIGHTS["turbo"]).splitlines())
    assert lines.keys() == {field.name for field in dataclasses.fields(Weights)}
    assert lines["pretraining"] == "58 named sets, 43 beyond stage 1"
    assert lines["spacing_mm"] == "1.5 x 1.5 x 1.5"
    assert "repo_id: not known" in str(Weights(name="mine"))


def test_defaults_are_in_the_table_and_belong_to_their_variant():
    assert (default_weights("vit_b"), default_weights("tiny")) == ("turbo", "tiny")
    for variant, name in DEFAULT_WEIGHTS.items():
        assert WEIGHTS[name].variant == variant


def test_a_variant_without_weights_says_how_to_start_at_random():
    with pytest.raises(ValueError, match=r"pass pretrained=False for a random start"):
        default_weights("vit_h_256")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_b_256", r"variant \(crop 256\^3 voxels\) without weights yet.*pretrained=False"),
        ("vit_b", r"variant \(crop 128\^3 voxels\), not weights; its weights are 'turbo'"),
    ],
)
def test_a_variant_given_as_weights_is_named_for_what_it_is(name, said):
    with pytest.raises(ValueError, match=said):
        locate(name)


# --- names and local files -------------------------------------------------------------------


def test_an_unknown_name_gets_the_nearest_one_and_the_list():
    with pytest.raises(ValueError, match=r"Did you mean 'turbo'\?") as caught:
        locate("trubo")
    assert str(list_weights()) in str(caught.value)
    assert "'none' for a random start" in str(caught.value)


@pytest.mark.parametrize("name", ["missing.pth", "folder/missing", Path("missing")])
def test_a_missing_file_says_what_may_be_given(name):
    with pytest.raises(FileNotFoundError, match=r"'repo_id:file' for one on the Hub"):
        locate(name)


def test_a_folder_is_told_to_name_the_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="give the weights file inside it"):
        locate(tmp_path)


def test_a_local_file_is_found_with_its_hash(tmp_path):
    path = tmp_path / "mine.pth"
    path.write_bytes(CONTENT)
    record, found = locate(str(path))
    assert found == path
    assert record.sha256 == hashlib.sha256(CONTENT).hexdigest() == sha256_of(path)
    assert (record.status, record.pretraining, record.variant) == ("local file", None, None)


def test_a_local_copy_of_listed_weights_is_recognised_by_its_content(tmp_path, in_table):
    listed = in_table(sha256=hashlib.sha256(CONTENT).hexdigest(), licence="CC0")
    (tmp_path / "renamed.pth").write_bytes(CONTENT)
    record, _ = locate(tmp_path / "renamed.pth")
    assert record == dataclasses.replace(listed, status="local file with the hash of ours")


def test_weights_that_install_with_the_package_are_found_without_network(
    tmp_path, in_table, monkeypatch
):
    monkeypatch.setattr(pretrained.importlib.resources, "files", lambda package: tmp_path)
    in_table(repo_id=None, filename="small.safetensors", sha256=hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(FileNotFoundError, match="is missing from the installation; install again"):
        locate("ours")
    (tmp_path / "small.safetensors").write_bytes(CONTENT)
    assert locate("ours")[1] == tmp_path / "small.safetensors"
    (tmp_path / "small.safetensors").write_bytes(b"altered")
    with pytest.raises(ValueError, match="Delete it and run again"):
        locate("ours")


# --- the Hub on loopback ---------------------------------------------------------------------


def test_a_file_is_resolved_redirected_and_cached(at_hub, caplog):
    record, path = locate(HUB_FILE)
    assert path.read_bytes() == CONTENT
    assert (record.repo_id, record.filename, record.revision) == (REPO, FILE, "main")
    assert f"downloading {FILE} (1 MB)" in caplog.text
    assert len(at_hub.asked("store", "GET")) == 1


def test_a_cached_file_is_not_fetched_again(at_hub, caplog):
    locate(HUB_FILE)
    caplog.clear()
    assert locate(HUB_FILE)[1].read_bytes() == CONTENT
    assert "downloading" not in caplog.text
    assert len(at_hub.asked("store", "GET")) == 1


def test_a_file_whose_hash_the_table_knows_needs_no_request_once_cached(at_hub, in_table):
    in_table(sha256=hashlib.sha256(CONTENT).hexdigest())
    first = locate("ours")
    at_hub.requests.clear()
    assert locate("ours") == first
    assert not at_hub.requests


def test_a_revision_can_be_named(at_hub):
    old = next(iter(at_hub.commits[REPO]))
    at_hub.publish(REPO, FILE, b"newer")
    assert locate(f"{REPO}@{old}:{FILE}")[1].read_bytes() == CONTENT
    assert locate(HUB_FILE)[1].read_bytes() == b"newer"


def test_a_renamed_repository_is_followed(at_hub):
    at_hub.moved["someone/old"] = REPO
    assert locate(f"someone/old:{FILE}")[1].read_bytes() == CONTENT


def test_a_broken_transfer_goes_on_where_it_stopped(at_hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # what is kept of a transfer
    at_hub.cuts.append(400_000)
    assert locate(HUB_FILE)[1].read_bytes() == CONTENT
    first, second = at_hub.asked("store", "GET")
    assert "Range" not in first
    assert second["Range"] == "bytes=400000-"


def test_a_transfer_that_never_ends_leaves_no_file(at_hub, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda _: None)
    at_hub.cuts += [0] * 20
    with pytest.raises(ConnectionError, match="run it again, or fetch the file by other means"):
        locate(HUB_FILE)
    assert not list((tmp_path / "hub").rglob("net.safetensors"))
    at_hub.cuts.clear()
    assert locate(HUB_FILE)[1].read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "error", "remedy"),
    [
        ("someone/none:net.pth", FileNotFoundError, "check the name, and for a private one log in"),
        (f"{REPO}:none.pth", FileNotFoundError, r"has no file 'none\.pth'; see http.*/tree/main"),
        (f"{REPO}@none:{FILE}", FileNotFoundError, "use a branch, tag or full commit"),
    ],
)
def test_what_the_hub_does_not_have_is_named(at_hub, name, error, remedy):
    with pytest.raises(error, match=remedy):
        locate(name)


def test_a_gated_file_asks_for_a_login(at_hub):
    at_hub.tokens[REPO] = "hf_right"
    with pytest.raises(PermissionError, match=r"accept its terms .* `hf auth login`"):
        locate(HUB_FILE)


def test_a_wrong_token_is_told_apart_from_none(at_hub, monkeypatch):
    at_hub.tokens[REPO] = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PermissionError, match="correct HF_TOKEN"):
        locate(HUB_FILE)


def test_the_right_token_opens_a_gated_file_and_stays_at_the_hub(at_hub, monkeypatch):
    at_hub.tokens[REPO] = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert locate(HUB_FILE)[1].read_bytes() == CONTENT
    sent = {key.lower() for headers in at_hub.asked("store", "GET") for key in headers}
    assert "authorization" not in sent


def test_a_failing_hub_says_so(at_hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    handler = at_hub._hub.RequestHandlerClass
    monkeypatch.setattr(handler, "resolve", lambda self, *_: self.answer(503))
    with pytest.raises(FileNotFoundError, match="set HF_ENDPOINT to a mirror") as caught:
        locate(HUB_FILE)
    assert "503" in str(caught.value)


def test_a_huggingface_hub_that_lacks_an_argument_is_no_broken_transfer(monkeypatch):
    def older(repo_id, filename, *, revision):
        raise AssertionError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", older)
    with pytest.raises(TypeError, match="dry_run"):
        locate(HUB_FILE)


def test_offline_with_a_cache_works_and_asks_nobody(at_hub, offline):
    _, path = locate(HUB_FILE)
    at_hub.requests.clear()
    offline()
    assert locate(HUB_FILE)[1] == path
    assert not at_hub.requests


def test_offline_without_a_cache_says_what_to_unset(at_hub, offline):
    offline()
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set; unset it once"):
        locate(HUB_FILE)
    assert not at_hub.requests


# --- hashes and pins -------------------------------------------------------------------------


def test_a_file_with_another_hash_than_the_tables_is_refused(at_hub, in_table):
    in_table(sha256="0" * 64)
    with pytest.raises(ValueError, match="pass its path instead of the name") as caught:
        locate("ours")
    assert hashlib.sha256(CONTENT).hexdigest() in str(caught.value)


def test_a_stale_cache_is_replaced_by_what_the_table_promises(at_hub, in_table):
    in_table(sha256=None)
    locate("ours")
    at_hub.publish(REPO, FILE, b"newer")
    in_table(sha256=hashlib.sha256(b"newer").hexdigest())
    assert locate("ours")[1].read_bytes() == b"newer"


def test_a_hash_that_is_not_known_is_pinned_at_first_use(at_hub, tmp_path, caplog):
    locate(HUB_FILE)
    (pin,) = (tmp_path / "assets" / "sammed3d_backbone" / "pins").iterdir()
    assert str(pin) in caplog.text
    pinned = json.loads(pin.read_text(encoding="utf-8"))
    assert pinned["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert (pinned["repo_id"], pinned["commit"]) == (REPO, next(iter(at_hub.commits[REPO])))


def test_a_file_that_changed_under_its_pin_is_refused_with_both_ways_out(at_hub, tmp_path):
    locate(HUB_FILE)
    old = next(iter(at_hub.commits[REPO]))
    at_hub.publish(REPO, FILE, b"newer")
    with pytest.raises(ValueError, match="has changed since its first use") as caught:
        locate(HUB_FILE)
    keep, accept = re.search(r"pass '(.*)'; to accept .* delete (.*)$", str(caught.value)).groups()
    assert keep == f"{REPO}@{old}:{FILE}"
    assert locate(keep)[1].read_bytes() == CONTENT
    Path(accept).unlink()
    assert locate(HUB_FILE)[1].read_bytes() == b"newer"


def test_a_damaged_pin_is_named(at_hub, tmp_path):
    locate(HUB_FILE)
    (pin,) = (tmp_path / "assets" / "sammed3d_backbone" / "pins").iterdir()
    pin.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="delete it to pin anew"):
        locate(HUB_FILE)


def test_a_pin_that_cannot_be_written_is_a_warning(at_hub, tmp_path, caplog):
    (tmp_path / "assets").write_text("in the way", encoding="utf-8")
    assert locate(HUB_FILE)[1].read_bytes() == CONTENT
    assert "is not pinned, a later change goes unseen" in caplog.text


@pytest.mark.slow
def test_the_environment_alone_steers_a_download(at_hub, tmp_path):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, each in a process of its own."""
    at_hub.tokens[REPO] = "hf_right"
    code = (
        "import sys; from sammed3d_backbone.loading.registry import locate;"
        "print(locate(sys.argv[1])[1].read_bytes() == bytes(range(256)) * 4096)"
    )
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LD_LIBRARY_PATH")}
    environment = {**kept, "HF_ENDPOINT": at_hub.endpoint, "HF_HOME": str(tmp_path)}
    environment["TQDM_POSITION"] = "-1"  # a progress bar without a terminal

    def run(**more):
        return subprocess.run(
            [sys.executable, "-c", code, HUB_FILE],
            cwd=ROOT,
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=False,
        )

    online = run(HF_TOKEN="hf_right")
    assert online.stdout.strip() == "True", online.stderr
    assert "downloading" in online.stderr
    assert "1.05M" in online.stderr  # the progress bar
    at_hub.requests.clear()
    offline = run(HF_HUB_OFFLINE="1")
    assert offline.stdout.strip() == "True", offline.stderr
    assert not at_hub.requests


# --- records in the metadata of files --------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_record_survives_a_files_metadata(name):
    outside = Weights(name="a.safetensors", sha256="1", status="local file")
    inside = from_metadata(outside, to_metadata(WEIGHTS[name]))
    assert inside == dataclasses.replace(
        WEIGHTS[name],
        name="a.safetensors",
        repo_id=None,
        filename=None,
        revision=None,
        sha256="1",
        status=f"local file, made from {name}",
    )


def test_a_file_without_a_record_keeps_the_one_from_outside():
    assert from_metadata(Weights(name="a"), {"format": "pt"}) == Weights(name="a")


def test_a_record_of_a_later_release_is_read_as_far_as_it_is_known():
    entry = json.dumps({"name": "later", "spacing_mm": [1, 1, 1], "a_new_field": 3})
    record = from_metadata(Weights(name="a"), {"weights_record": entry})
    assert record.spacing_mm == (1, 1, 1)


@pytest.mark.parametrize("entry", ["", "[]", "{}", "3", '{"name": "a", "pretraining": [{}]}'])
def test_metadata_that_is_no_record_is_refused(entry):
    with pytest.raises(ValueError, match="write the file again with `sammed3d convert`"):
        from_metadata(Weights(name="a"), {"weights_record": entry})


# --- contamination ---------------------------------------------------------------------------


def test_the_pretraining_list_has_the_published_counts():
    assert len(SA_MED3D_140K) == 58
    assert sum(entry.stages == (1, 2) for entry in SA_MED3D_140K) == 43
    assert sum(entry.stages == (1,) for entry in SA_MED3D_140K) == 15
    assert len(SA_MED3D_HELD_OUT) == 12
    assert len({entry.name for entry in SA_MED3D_140K} | set(SA_MED3D_HELD_OUT)) == 70


@pytest.mark.parametrize(
    ("asked", "verdict", "names"),
    [
        ("AMOS22", "seen", ["AMOS22 (stage 1 and 2)"]),
        ("amos", "seen", ["AMOS22"]),
        ("MSD_Hippocampus", "seen", ["MSD_Hippocampus (stage 1)"]),
        ("Task04_Hippocampus", "seen", ["MSD_Hippocampus"]),
        ("Dataset004_Hippocampus", "seen", ["MSD_Hippocampus"]),
        ("MSD_Task03_Liver", "seen", ["MSD_Liver"]),
        ("Hippocampus", "seen", ["MSD_Hippocampus (stage 1)"]),
        ("Liver", "seen", ["MSD_Liver (stage 1 and 2)"]),
        ("BRATS", "seen", ["MSD_BrainTumour (stage 1 and 2)", "BraTS21"]),
        ("LeftAtrium", "seen", ["MSD_Heart (stage 1)"]),
        ("BrainTumour", "seen", ["MSD_BrainTumour"]),
        ("Heart", "seen", ["MSD_Heart"]),
        ("PROSTATE", "seen", ["MSD_Prostate"]),
        ("Lung", "seen", ["MSD_Lung"]),
        ("Pancreas", "seen", ["MSD_Pancreas"]),
        ("Hepatic Vessel", "seen", ["MSD_HepaticVessel"]),
        ("Spleen", "seen", ["MSD_Spleen"]),
        ("Colon", "seen", ["MSD_Colon"]),
        ("MSD", "seen", ["MSD_Colon", "MSD_Spleen", "MSD_Lung (stage 1 and 2)"]),
        ("TotalSegmentator", "seen", ["Totalsegmentator"]),
        ("TotalSegmentator v2", "related", ["Totalsegmentator"]),
        ("BraTS", "seen", ["BraTS13 (stage 1)", "BraTS21 (stage 1 and 2)"]),
        ("BraTS 2021", "related", ["BraTS21"]),
        ("BraTS23", "related", ["BraTS13", "BraTS21"]),
        ("KiTS23", "related", ["KiTS19", "KiTS21"]),
        ("ISLES22", "related", ["ISLESSISS"]),
        ("Dataset218_AMOS2022_postChallenge_task1", "related", ["AMOS22"]),
        ("BTCV", "held out", ["BTCV"]),
        ("BTCV_Cervix", "seen", ["BTCV_Cervix"]),
        ("SEG.A. 2023", "held out", ["SEG.A.2023"]),
        ("FeTA", "held out", ["FeTA21, FeTA22"]),
        ("FeTA24", "related", ["FeTA21 (held out)"]),
        ("CAS2023", "not listed", ["24 further sets are not public"]),
        ("ACDC", "not listed", ["24 further sets are not public"]),
        ("OpenKBP", "not listed", ["24 further sets are not public"]),
        ("Dataset501_Liver", "not listed", ["Dataset501_Liver is not in"]),
    ],
)
def test_turbo_and_a_dataset(asked, verdict, names):
    exposure = seen_in_pretraining(WEIGHTS["turbo"], asked)
    assert exposure.verdict == verdict
    for name in names:
        assert name in str(exposure)


def test_the_decathlons_own_name_for_a_task_is_known(shared_data):
    content = (shared_data / "hippocampus" / "dataset.json").read_text(encoding="utf-8")
    exposure = seen_in_pretraining(WEIGHTS["turbo"], json.loads(content)["name"])
    assert (exposure.verdict, "MSD_Hippocampus" in str(exposure)) == ("seen", True)


def test_challenge_weights_claim_nothing_about_what_their_list_leaves_out():
    exposure = seen_in_pretraining(WEIGHTS["cvpr_alldata"], "BTCV")
    assert exposure.verdict == "not listed"
    assert "the list is incomplete" in str(exposure)


@pytest.mark.parametrize(
    ("record", "verdict", "said"),
    [
        (None, "none", "random start"),
        (Weights(name="mine"), "not known", "the pretraining data of mine are not known"),
        (Weights(name="mine", pretraining=(), undisclosed_sets=0), "not listed", "complete"),
    ],
)
def test_weights_without_a_list_say_so(record, verdict, said):
    exposure = seen_in_pretraining(record, "AMOS22")
    assert exposure.verdict == verdict
    assert said in str(exposure)
