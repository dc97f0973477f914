"""The server for viewers: `sammed3d serve`, and `view` with its own page."""

import argparse
import ipaddress
import logging
import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sammed3d_backbone.cli.checks import positive
from sammed3d_backbone.cli.prompts import add_network, add_scan, chosen_network, dicom_options

if TYPE_CHECKING:
    from sammed3d_backbone.cli import Commands
    from sammed3d_backbone.serving.labelling import OpenScan

KEY_VARIABLE = "SAMMED3D_API_KEY"
MODALITY = "of the images; ct clamps intensities to [-1000, 1000] HU"


def add_serve(commands: "Commands") -> None:
    """Declares `sammed3d serve`."""
    parser = commands.add_parser(
        "serve",
        help="segment by clicks in 3D Slicer, MITK, napari or ITK-SNAP",
        description=(
            "Runs until Ctrl-C. The programs keep their own windows and tools; this command only "
            "answers their clicks, and prints what to type in each of them; examples/viewers.md "
            "says what to install. For a first look: sammed3d serve --variant tiny --weights tiny"
        ),
    )
    images = parser.add_argument_group("images")
    images.add_argument("--modality", choices=("ct", "mr", "us"), help=MODALITY)
    images.add_argument(
        "--axes",
        default="LPS",
        metavar="XYZ",
        help="where the axes i, j, k of an image point if its program does not say so: LPS for an "
        "axial series from DICOM (default), RAS for NIfTI in napari",
    )
    images.add_argument(
        "--max-image-gb",
        type=positive,
        default=4,
        metavar="GB",
        help="largest image; 4 when left out",
    )
    add_network(parser)
    _add_server(parser)
    parser.set_defaults(run=_run_serve)


def add_view(commands: "Commands") -> None:
    """Declares `sammed3d view`."""
    parser = commands.add_parser(
        "view",
        help="segment a scan by clicks in a browser",
        description=(
            "Opens a page that shows the scan, and runs until Ctrl-C. What is saved goes through "
            "the browser's downloads; nothing else is written. Nothing but this machine is asked."
        ),
    )
    add_scan(parser)
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="masks to start from, on the scan's grid"
    )
    parser.add_argument(
        "--channel", type=int, metavar="N", help="channel of a 4-D file, counted from 0"
    )
    parser.add_argument("--modality", choices=("ct", "mr", "us"), help=MODALITY)
    parser.add_argument(
        "--no-follow", action="store_true", help="begin with objects cut off at their window"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    add_network(parser)
    _add_server(parser)
    parser.set_defaults(run=_run_view)


def _add_server(parser: argparse.ArgumentParser) -> None:
    """Declares where a server listens, and to whom."""
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="127.0.0.1 when left out")
    server.add_argument("--port", type=int, default=1527, help="1527 when left out; 0 is any")
    server.add_argument(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        metavar="KEY",
        help=f"needed from every program; also read from {KEY_VARIABLE}",
    )
    server.add_argument(
        "--max-sessions", type=int, default=4, metavar="N", help="at a time; 4 when left out"
    )
    server.add_argument(
        "--idle-minutes",
        type=positive,
        default=240,
        metavar="M",
        help="without work, after which a session ends; 240 when left out",
    )
    server.add_argument(
        "--max-windows",
        type=int,
        default=8,
        metavar="N",
        help="into which one object is followed, fewer being faster; 8 when left out",
    )


def _run_serve(args: argparse.Namespace) -> int:
    _require_extra("serve")
    if not args.api_key and not _is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} lets other machines in; give an --api-key, or keep 127.0.0.1 and "
            "connect by ssh -L"
        )
    images = {"axes": args.axes, "max_image_bytes": int(args.max_image_gb * 2**30)}
    return _run(args, images, None, lambda port, name: _say(args, port, name))


def _run_view(args: argparse.Namespace) -> int:
    _require_extra("view")
    from sammed3d_backbone.serving.labelling import OpenScan

    # On a machine with several users everybody reaches the loopback interface.
    args.api_key = args.api_key or secrets.token_urlsafe(16)
    scan = OpenScan.load(
        args.source,
        channel=args.channel,
        modality=args.modality,
        labels=args.labels,
        **dicom_options(args),
    )
    return _run(
        args, {"follow": not args.no_follow}, scan, lambda port, name: _show(args, port, name)
    )


def _require_extra(command: str) -> None:
    try:
        import sammed3d_backbone.serving.app  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{command} needs {error.name}; pip install 'sammed3d-backbone[serve]'"
        ) from None


def _run(
    args: argparse.Namespace,
    more: dict[str, Any],
    scan: "OpenScan | None",
    say: Callable[[int, str], None],
) -> int:
    """Serves until Ctrl-C; `say` gets the port and the name of the weights."""
    from sammed3d_backbone import sam
    from sammed3d_backbone.serving.app import Settings, build_app, listening, serve

    settings = Settings(
        modality=args.modality,
        api_key=args.api_key or None,
        hosts=(args.host,),
        max_sessions=args.max_sessions,
        idle_s=60 * args.idle_minutes,
        max_windows=args.max_windows,
        **more,
    )
    with listening(args.host, args.port) as listener:  # before the network is loaded
        model = chosen_network(sam, args)
        record = getattr(model, "pretrained_cfg", None)
        name = "random" if record is None else record.name
        license = getattr(record, "licence", None) or "not known"
        app = build_app(model, settings, name=name, license=license, scan=scan)
        logging.getLogger("sammed3d_backbone.serving").setLevel(logging.INFO)
        try:
            say(listener.getsockname()[1], name)
            serve(app, listener)
        except KeyboardInterrupt:
            print("stopped")
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _show(args: argparse.Namespace, port: int, name: str) -> None:
    """Prints the page's address and opens it."""
    host = "localhost" if args.host in ("0.0.0.0", "::") else args.host
    address = f"{_address(host, port)}/#key={args.api_key}"
    print(
        f"weights {name} on {args.device}; modality {args.modality or 'not given'}\n"
        f"page        {address}\n"
        f"elsewhere   ssh -L {port}:localhost:{port} {socket.gethostname()}\n"
        "            typed there, opens the same page there\n"
        "Ctrl-C ends it.",
        flush=True,
    )
    if not args.no_browser and _has_screen():
        webbrowser.open(address)


def _has_screen() -> bool:
    """Whether a browser has a window to open; else one of text would take over the terminal."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, screens))


def _say(args: argparse.Namespace, port: int, name: str) -> None:
    """Prints what to type in each program."""
    host = "localhost" if args.host in ("0.0.0.0", "::") else args.host
    address = _address(host, port)
    key = "the one of --api-key" if args.api_key else "leave empty"
    modality = args.modality or "not given: intensities are taken as they are"
    print(
        f"weights {name} on {args.device}; modality {modality}; axes {args.axes.upper()}\n"
        f"3D Slicer   nnInteractive > Remote: Server URL {address}, API key: {key}\n"
        f"MITK        nnInteractive > Remote: URL {address}, API key: {key}\n"
        f"napari      nnInteractive > Remote: URL {address}, API key: {key}\n"
        + (
            f"ITK-SNAP    AI tools > server: host {host}, port {port}\n"
            if not args.api_key
            else "ITK-SNAP    cannot send a key; start without one and connect by ssh -L\n"
        )
        + f'Python      nnInteractiveRemoteInferenceSession("{address}")\n'
        "Ctrl-C ends it. The programs belong to others, who do not endorse this one.",
        flush=True,
    )
