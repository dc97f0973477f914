"""The command `sammed3d serve`: refusals, greeting, end."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from sammed3d_backbone.cli import main

TINY = ["serve", "--variant", "tiny", "--random", "--port", "0"]


@pytest.mark.parametrize(
    ("arguments", "token"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "192.0.2.7", "--api-key", "k"], "--host"),
        (["--host", "no such host", "--api-key", "k"], "--host"),
        (["--axes", "LLS"], "axes"),
        (["--max-sessions", "0"], "max_sessions"),
        (["--max-windows", "0"], "max_windows"),
        (["--device", "cuda:99"], "--device"),
        (["--port", "70000"], "port"),
    ],
)
def test_refusals_are_one_line(capsys, arguments, token):
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert token in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("argument", ["--max-image-gb", "--idle-minutes"])
def test_a_measure_is_above_0(capsys, argument):
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, argument, "0"])
    error = capsys.readouterr().err
    assert argument in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "token"),
    [
        (["nowhere.nii.gz"], "nowhere.nii.gz"),
        (["scan.nii.gz", "--labels", "nowhere.nii.gz"], "nowhere.nii.gz"),
        (["scan.nii.gz", "--labels", "other.nii.gz"], "other.nii.gz"),
        (["scan.nii.gz", "--port", "70000"], "port"),
    ],
)
def test_view_refuses_in_one_line(capsys, monkeypatch, write_volume, arguments, token):
    monkeypatch.chdir(write_volume("scan.nii.gz").parent)
    write_volume("other.nii.gz", shape=(6, 7, 9))
    assert main(["view", *arguments, "--variant", "tiny", "--random"]) == 2
    error = capsys.readouterr().err
    assert token in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main([*TINY[:-1], port]) == 2
    assert port in capsys.readouterr().err


def test_a_missing_extra_is_named(capsys, monkeypatch):
    for name in ("sammed3d_backbone.serving.app", "starlette"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert main(TINY) == 2
    assert "sammed3d-backbone[serve]" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_it_says_what_to_type_and_ends_quietly(tmp_path):
    command = [sys.executable, "-c", "from sammed3d_backbone.cli import main; main()", *TINY]
    process = subprocess.Popen(
        [*command, "--api-key", "hidden-key"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # A shell ignores this signal for what it starts in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines = [process.stdout.readline() for _ in range(7)]
    host, port = re.search(r"http://([\d.]+):(\d+)", "".join(lines)).groups()
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    for wait_s in (0, 6):  # clients drop an idle connection after 5 s; the server keeps it longer
        time.sleep(wait_s)
        connection.request("GET", "/healthz")
        with connection.getresponse() as answer:
            assert answer.status == 200
            answer.read()
    connection.close()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == "stopped\n"
    assert err == ""
    assert not any("hidden-key" in line for line in lines)
    for program in ("3D Slicer", "MITK", "napari", "ITK-SNAP"):
        assert any(line.startswith(program) for line in lines)
    assert not list(tmp_path.iterdir())
