"""Files appear complete or not at all; names cannot leave their folder."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from sammed3d_backbone.files import (
    atomic_path,
    file_name,
    inside,
    locked,
    read_text,
    require_file,
    write_json,
    write_text,
)

UNSAFE = [
    "",
    ".",
    "..",
    "../a",
    "a/b",
    "/etc",
    "a\\b",
    ".hidden",
    "a\0",
    "a\n",
    "\ud800",
    "é" * 101,
]


def test_text_is_written_and_replaced(tmp_path):
    for text in ("one", "zwölf"):
        write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    write_json(tmp_path / "a.txt", {"a": [1]})
    assert (tmp_path / "a.txt").read_text() == '{\n "a": [\n  1\n ]\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_exception_leaves_the_earlier_file_and_no_other(tmp_path):
    write_text(tmp_path / "a.txt", "complete")

    def break_off():
        with atomic_path(tmp_path / "a.txt") as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["complete"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"

    def write(letter, n):
        for _ in range(50):
            write_text(path, letter * n)

    threads = [threading.Thread(target=write, args=args) for args in (("a", 90_000), ("b", 60_000))]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        seen.add(path.read_text() if path.exists() else "")
    assert seen <= {"", "a" * 90_000, "b" * 60_000}
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_exclusive_creation_replaces_nothing(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    path = tmp_path / "a"
    with pytest.raises(FileExistsError), atomic_path(path, overwrite=False):
        path.write_text("of another process")
    with pytest.raises(FileExistsError), atomic_path(path, overwrite=False):
        pytest.fail("entered")
    assert path.read_text() == "of another process"
    with atomic_path(tmp_path / "b", overwrite=False) as draft:
        draft.write_text("new")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {
        "a": "of another process",
        "b": "new",
    }


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_could_leave_their_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="file"):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "!first", "sub-01_ses 2", "a..b", "Niere rechts ü"])
def test_other_names_are_joined(tmp_path, name):
    assert inside(tmp_path, name, ".nii.gz") == tmp_path / f"{name}.nii.gz"


def test_every_text_has_a_file_name_of_its_own(tmp_path):
    texts = [*UNSAFE, "a/b", "a_b", "a b", "A_b", "Niere", "x" * 300, "x" * 301, "_-", ".."]
    texts = list(dict.fromkeys(texts))
    texts.remove("\ud800")
    names = [file_name(text) for text in texts]
    assert len({*names}) == len(texts)
    assert all(inside(tmp_path, name).parent == tmp_path for name in names)
    assert (file_name("a_b"), file_name("Niere.li-1")) == ("a_b", "Niere.li-1")


HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from sammed3d_backbone.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_that_another_process_holds_is_refused_until_it_is_killed(tmp_path, root, nested):
    folder = tmp_path / "new" / "results" if nested else tmp_path
    arguments = [sys.executable, "-c", HOLDER, str(folder), str(root)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(FileExistsError, match=f"{holder.pid} on {socket.gethostname()}"):
            locked(folder).__enter__()
        holder.kill()
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_folder_is_free_again_after_an_exception(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for name in ("fifo", "link", "s"):
            with pytest.raises(ValueError, match=name):
                require_file(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        require_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        require_file(tmp_path / "nothing")


def test_text_may_have_a_byte_order_mark_and_has_a_largest_size(tmp_path):
    path = tmp_path / "text.json"
    path.write_text("{}", encoding="utf-8-sig")
    assert read_text(path) == "{}"
    path.write_text("é", encoding="latin-1")
    with pytest.raises(ValueError, match=r"text\.json"):
        read_text(path)
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(ValueError, match=r"text\.json"):
        read_text(path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo"):
        read_text(tmp_path / "fifo")
