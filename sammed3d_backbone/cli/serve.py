"""The server for viewers: `sammed3d serve`."""

import argparse
import ipaddress
import logging
import os
from typing import TYPE_CHECKING

from sammed3d_backbone.cli.checks import on_device
from sammed3d_backbone.cli.prompts import add_network

if TYPE_CHECKING:
    from sammed3d_backbone.cli import Commands

KEY_VARIABLE = "SAMMED3D_API_KEY"


def add_serve(commands: "Commands") -> None:
    """Declares `sammed3d serve`."""
    parser = commands.add_parser(
        "serve",
        help="segment by clicks in 3D Slicer, MITK, napari or ITK-SNAP",
        description=(
            "Runs until Ctrl-C. The programs keep their own windows and tools; this command only "
            "answers their clicks. examples/viewers.md says what to install in each."
        ),
    )
    images = parser.add_argument_group("images")
    images.add_argument("--modality", choices=("ct", "mr", "us"), help="ct is clamped to HU")
    images.add_argument(
        "--axes",
        default="LPS",
        metavar="XYZ",
        help="where the axes i, j, k of an image point if its program does not say so: LPS for an "
        "axial series from DICOM (default), RAS for NIfTI in napari",
    )
    add_network(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="127.0.0.1 when left out")
    server.add_argument("--port", type=int, default=1527, help="1527 when left out; 0 is any")
    server.add_argument(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        metavar="KEY",
        help=f"needed from every program; also read from {KEY_VARIABLE}",
    )
    server.add_argument("--max-sessions", type=int, default=4, metavar="N", help="4 when left out")
    server.add_argument(
        "--idle-minutes", type=float, default=240, metavar="M", help="240 when left out"
    )
    server.add_argument(
        "--max-windows", type=int, default=27, metavar="N", help="of one object; 27 when left out"
    )
    server.add_argument(
        "--max-image-gb", type=float, default=4, metavar="GB", help="of one image; 4 when left out"
    )
    parser.set_defaults(run=_run_serve)


def _run_serve(args: argparse.Namespace) -> int:
    try:
        from sammed3d_backbone.serving.app import Settings, build_app, listening, serve
    except ImportError as error:
        raise ValueError(
            f"serve needs {error.name}; pip install 'sammed3d-backbone[serve]'"
        ) from None
    from sammed3d_backbone import sam

    if not args.api_key and not _is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} lets other machines in; give an --api-key, or keep 127.0.0.1 and "
            "connect by ssh -L"
        )
    settings = Settings(
        modality=args.modality,
        axes=args.axes,
        api_key=args.api_key or None,
        hosts=(args.host,),
        max_sessions=args.max_sessions,
        idle_s=60 * args.idle_minutes,
        max_image_bytes=int(args.max_image_gb * 2**30),
        max_windows=args.max_windows,
    )
    with listening(args.host, args.port) as listener:  # before the network is loaded
        model = sam(args.variant, pretrained=not args.random, weights=args.weights)
        record = getattr(model, "pretrained_cfg", None)
        name = "random" if record is None else record.name
        license = getattr(record, "licence", None) or "not known"
        app = build_app(on_device(model, args.device), settings, name=name, license=license)
        logging.getLogger("sammed3d_backbone.serving").setLevel(logging.INFO)
        try:
            _say(args, listener.getsockname()[1], name)
            serve(app, listener)
        except KeyboardInterrupt:
            print("stopped")
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(args: argparse.Namespace, port: int, name: str) -> None:
    """Prints what to type in each program."""
    host = "localhost" if args.host in ("0.0.0.0", "::") else args.host
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
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
