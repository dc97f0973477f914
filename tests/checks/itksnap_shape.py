"""The answers to ITK-SNAP's requests beside those of another server: status, keys and types.

    sammed3d serve --variant tiny --weights tiny
    python -m itksnap_dls --mock-models --port 8911 --host 127.0.0.1  # from another environment
    python -m tests.checks.itksnap_shape http://127.0.0.1:1527 http://127.0.0.1:8911

`itksnap-dls` is GPL-3 and is only run, never imported. tests/serving/test_itksnap.py holds what
version 0.1.6 answers.
"""

import argparse
import base64
import gzip
import json
from typing import Any

import httpx
import numpy as np

SHAPE = (12, 10, 8)  # x, y, z

Shape = tuple[int, Any]  # status; keys and the names of their values' types


def shape_of(answer: httpx.Response) -> Shape:
    """Status and structure of an answer."""
    return answer.status_code, _kind(answer.json())


def _kind(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _kind(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_kind(value[0])] if value else []
    return type(value).__name__


def upload_form(**changes: Any) -> dict[str, Any]:
    """An upload as the program sends it, for httpx."""
    metadata = {
        "dimensions": SHAPE,
        "spacing": [1.0, 1.5, 2.0],
        "origin": [0.0, 0.0, 0.0],
        "direction": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        "components_per_pixel": 1,
        "component_type": "float32",
    }
    voxels = np.zeros(SHAPE, "<f4")
    voxels[4:9, 3:8, 2:6] = 100
    return {
        "files": {"file": ("image.gz", gzip.compress(voxels.tobytes(order="F")))},
        "data": {"metadata": json.dumps(metadata | changes)},
    }


def shapes(http: httpx.Client) -> dict[str, Shape]:
    """The program's requests in their order, by both generations of routes, and what they get.

    Returns:
        Paths without the session, and the shapes of the answers.
    """
    found = {path: shape_of(http.get(path)) for path in ("/status", "/v2/models")}
    for prefix, start in (("", "/start_session"), ("/v2", "/v2/start_session/nnInteractive")):
        answer = http.get(start)
        found[start] = shape_of(answer)
        token = answer.json()["session_id"]
        for suffix in ("", " of an ended session"):
            place = {"point": [6, 5, 4]} if prefix else {"x": 6, "y": 5, "z": 4}
            click = f"{prefix}/process_point_interaction"
            path = f"{prefix}/upload_raw"
            answer = http.post(f"{path}/{token}?filename=upload.nii.gz", **upload_form())
            found[path + suffix] = shape_of(answer)
            for foreground in ("true", "false"):
                query = place | {"foreground": foreground}
                answer = http.get(f"{click}/{token}", params=query)
                found[click + suffix] = shape_of(answer)
            if not suffix:
                mask = gzip.decompress(base64.b64decode(answer.json()["result"]))
                assert len(mask) == np.prod(SHAPE)
                assert set(mask) <= {0, 1}
            for path in (f"{prefix}/reset_interactions", f"{prefix}/end_session"):
                found[path + suffix] = shape_of(http.get(f"{path}/{token}"))
    return found


def main() -> int:
    """Prints the shapes of both servers; returns 1 if keys or types differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("ours", metavar="OURS", help="address of `sammed3d serve`")
    parser.add_argument("theirs", metavar="THEIRS", help="address of `itksnap_dls`")
    args = parser.parse_args()
    found = []
    for address in (args.ours, args.theirs):
        with httpx.Client(base_url=address, timeout=60) as http:
            found.append(shapes(http))
    ours, theirs = found
    for path, shape in theirs.items():
        equal = "same" if ours[path] == shape else f"differs: {ours[path]} instead of"
        print(f"{path}: {equal} {shape}")
    return int(any(ours[path][1] != shape[1] for path, shape in theirs.items()))


if __name__ == "__main__":
    raise SystemExit(main())
