"""From names to files: local ones, and a Hub on loopback."""

import dataclasses
import hashlib
import threading
import time
from pathlib import Path

import hub_server
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sammed3d_backbone.loading import hub
from sammed3d_backbone.loading.hub import locate, sha256_of
from sammed3d_backbone.loading.registry import WEIGHTS, Weights

CONTENT = bytes(range(256)) * 4096  # 1 MiB, as good as weights for everything in this file
REPO, FILE = "someone/net", "deep/net.safetensors"
HUB = f"hf-hub:{REPO}"

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


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(ValueError, match=r"Did you mean 'turbo'\?"):
        locate("trubo")


@pytest.mark.parametrize("name", ["vit_b_256", "vit_b"])
def test_a_variant_given_as_weights_is_named_for_what_it_is(name):
    with pytest.raises(ValueError, match="is a variant"):
        locate(name)


@pytest.mark.parametrize("name", ["missing.pth", "folder/missing", Path("missing.pth")])
def test_a_missing_file_is_named(name):
    with pytest.raises(FileNotFoundError, match="missing"):
        locate(name)


@pytest.mark.parametrize("given", [3, "", b"tiny", ["tiny"], True])
def test_what_is_no_name_of_weights_is_refused(given):
    with pytest.raises((TypeError, ValueError), match="weights="):
        locate(given)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "~nobody-by-this-name/x.pth"])
def test_a_name_that_no_file_can_have_is_refused_in_few_words(name):
    with pytest.raises((ValueError, FileNotFoundError), match="weights") as caught:
        locate(name)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["hf-hub:net", "hf-hub:a/b:c", "hf-hub:"])
def test_a_name_that_is_not_valid_on_the_hub_is_refused(name):
    with pytest.raises(ValueError, match="hf-hub:OWNER/REPO"):
        locate(name)


def test_a_folder_holds_model_safetensors_or_the_named_file(tmp_path):
    (tmp_path / "other.pth").write_bytes(CONTENT)
    assert locate(tmp_path, "other.pth")[1] == tmp_path / "other.pth"
    with pytest.raises(FileNotFoundError, match=r"other\.pth"):
        locate(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    assert locate(tmp_path)[1] == tmp_path / "model.safetensors"


def test_a_file_name_without_a_repository_is_refused():
    with pytest.raises(ValueError, match="weights_file"):
        locate("tiny", "model.safetensors")


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
    monkeypatch.setattr(hub, "PACKAGE", tmp_path / "package")
    in_table(repo_id=None, filename="small.safetensors", sha256=hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(FileNotFoundError, match="reinstall"):
        locate("ours")
    for folder in (tmp_path / "weights", tmp_path / "package/weights"):  # a checkout, an install
        folder.mkdir(parents=True)
        (folder / "small.safetensors").write_bytes(CONTENT)
        assert locate("ours")[1] == folder / "small.safetensors"
    (folder / "small.safetensors").write_bytes(b"altered")
    with pytest.raises(ValueError, match="sha256"):
        locate("ours")


def test_a_file_is_resolved_redirected_and_cached(at_hub):
    record, path = locate(HUB, FILE)
    assert path.read_bytes() == CONTENT
    assert (record.repo_id, record.filename, record.revision) == (REPO, FILE, "main")
    assert locate(HUB, FILE)[1] == path
    assert len(at_hub.headers_of("store", "GET")) == 1


def test_a_file_whose_hash_the_table_knows_needs_no_request_once_cached(at_hub, in_table):
    in_table(sha256=hashlib.sha256(CONTENT).hexdigest())
    first = locate("ours")
    at_hub.requests.clear()
    assert locate("ours") == first
    assert not at_hub.requests


def test_a_revision_can_be_named(at_hub):
    old = next(iter(at_hub.commits[REPO]))
    at_hub.publish(REPO, FILE, b"newer")
    assert locate(f"{HUB}@{old}", FILE)[1].read_bytes() == CONTENT
    assert locate(HUB, FILE)[1].read_bytes() == b"newer"


def test_a_transfer_that_never_ends_leaves_no_file(at_hub, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda _: None)
    at_hub.cuts += [0] * 20
    with pytest.raises(ConnectionError, match=FILE):
        locate(HUB, FILE)
    assert not list((tmp_path / "hub").rglob("net.safetensors"))
    at_hub.cuts.clear()
    assert locate(HUB, FILE)[1].read_bytes() == CONTENT


def test_a_download_from_which_nothing_arrives_is_given_up(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(hub, "STALLED_S", 0.1)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: ended.wait())
    try:
        with pytest.raises(TimeoutError, match=r"net\.safetensors"):
            locate(HUB, FILE)
    finally:
        ended.set()


def test_a_slow_download_from_which_something_arrives_is_waited_for(monkeypatch, tmp_path):
    def slow(*_, tqdm_class, **__):
        with tqdm_class(disable=True) as bar:
            for _ in range(25):
                time.sleep(0.05)
                bar.update(1)
        (tmp_path / "net").write_bytes(CONTENT)
        return str(tmp_path / "net")

    monkeypatch.setattr(hub, "STALLED_S", 0.8)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", slow)
    assert locate(HUB, FILE)[1].read_bytes() == CONTENT


def test_a_missing_file_lists_the_candidates(at_hub, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.list_repo_files", lambda repo_id, revision: ["README.md", FILE]
    )
    with pytest.raises(FileNotFoundError, match=FILE):
        locate(HUB)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("hf-hub:someone/none", RepositoryNotFoundError),
        (f"{HUB}@none", RevisionNotFoundError),
    ],
)
def test_what_the_hub_does_not_have_is_an_error_of_the_hubs_library(at_hub, name, error):
    with pytest.raises(error):
        locate(name, FILE)


def test_a_gated_file_is_refused(at_hub):
    at_hub.gated.add(REPO)
    with pytest.raises(GatedRepoError):
        locate(HUB, FILE)


def test_offline_with_a_cache_works_and_asks_nobody(at_hub, offline):
    _, path = locate(HUB, FILE)
    at_hub.requests.clear()
    offline()
    assert locate(HUB, FILE)[1] == path
    assert not at_hub.requests


def test_offline_without_a_cache_names_file_repository_and_remedy(at_hub, offline):
    offline()
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE") as caught:
        locate(HUB, FILE)
    assert FILE in str(caught.value)
    assert REPO in str(caught.value)
    assert not at_hub.requests


def test_a_file_with_another_hash_than_the_tables_is_refused(at_hub, in_table):
    in_table(sha256="0" * 64)
    with pytest.raises(ValueError, match="sha256") as caught:
        locate("ours")
    assert hashlib.sha256(CONTENT).hexdigest() in str(caught.value)


def test_a_stale_cache_is_replaced_by_what_the_table_promises(at_hub, in_table):
    in_table(sha256=None)
    locate("ours")
    at_hub.publish(REPO, FILE, b"newer")
    in_table(sha256=hashlib.sha256(b"newer").hexdigest())
    assert locate("ours")[1].read_bytes() == b"newer"


def test_a_file_is_checked_against_the_hash_that_the_hub_announces(at_hub, caplog):
    _, path = locate(HUB, FILE)
    assert path.resolve().name == hashlib.sha256(CONTENT).hexdigest()
    assert not caplog.records
    path.resolve().write_bytes(b"altered")
    with pytest.raises(ValueError, match="sha256"):
        locate(HUB, FILE)


def test_a_file_without_any_known_hash_is_said_to_be_unverified(at_hub, caplog, monkeypatch):
    plain = Path(locate(HUB, FILE)[1]).resolve()
    copy = plain.rename(plain.with_name("etag"))  # what the cache holds for a file outside LFS
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(copy))
    locate(HUB, FILE)
    assert "not verified" in caplog.text
