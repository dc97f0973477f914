"""From the name of weights to a local file: the weights table, a path, or a Hub repository.

Caching, offline mode, mirrors, tokens, progress bars and errors are huggingface_hub's own.
"""

import dataclasses
import difflib
import hashlib
import logging
import os
import re
import reprlib
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path

from sammed3d_backbone.files import require_file
from sammed3d_backbone.loading.registry import DEFAULT_WEIGHTS, WEIGHTS, Weights
from sammed3d_backbone.loading.variants import VARIANTS

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
STALLED_S = 300.0  # between two chunks of a download, which have up to 10 MB
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

# hf-hub:OWNER/REPO or hf-hub:OWNER/REPO@REV, as in timm.
_HUB_NAME = re.compile(r"hf-hub:(?P<repo_id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SHORT = reprlib.Repr()  # shows a path of usual length whole
_SHORT.maxstring = 300


def locate(
    weights: str | os.PathLike[str], weights_file: str | None = None
) -> tuple[Weights, Path]:
    """The record of some weights and a local file with their content.

    A file that is not in the Hub's cache is downloaded. It is checked against the sha256 of the
    weights table, or else against the one that the Hub announces.

    Args:
        weights: A name in the weights table, a local file or folder, or `hf-hub:OWNER/REPO[@REV]`.
        weights_file: File in the folder or Hub repository; None is `model.safetensors`.

    Raises:
        ValueError: If the name is unknown, or a file does not have the promised sha256.
        FileNotFoundError: If there is no such file, locally or in the repository.
        OSError: If the Hub refuses access or cannot be reached (errors of huggingface_hub).
    """
    record, path = resolve(weights, weights_file)
    return record, fetch(record) if path is None else path


def resolve(
    weights: str | os.PathLike[str], weights_file: str | None = None
) -> tuple[Weights, Path | None]:
    """The record of some weights and, for a local file, its path; nothing is downloaded.

    Arguments and errors are those of `locate`.
    """
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(f"weights={weights!r}: expected a name, a file, or 'hf-hub:OWNER/REPO'")
    if weights == "":
        raise ValueError("weights='': expected a name, a file, or 'hf-hub:OWNER/REPO'")
    text = str(os.fspath(weights))
    hub = _HUB_NAME.fullmatch(text)
    if hub is not None:
        return Weights(
            name=text,
            repo_id=hub["repo_id"],
            filename=weights_file or WEIGHTS_FILE,
            revision=hub["revision"] or "main",
            status="from the Hub, not in the table",
        ), None
    try:
        path = Path(text).expanduser()
        found = path.exists()
    except (OSError, RuntimeError):  # too long for a name, or ~ of a user that does not exist
        raise _unknown(text) from None
    if path.is_dir():
        path = path / (weights_file or WEIGHTS_FILE)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; pass weights_file= with one of "
                f"{[p.name for p in sorted(path.parent.iterdir()) if p.suffix in WEIGHTS_SUFFIXES]}"
            )
        return _described(path), path
    if weights_file is not None:
        raise ValueError(
            f"weights_file={weights_file!r} names a file of a Hub repository or folder, but "
            f"weights={text!r}; pass weights='hf-hub:OWNER/REPO' or the folder"
        )
    if text in WEIGHTS:
        record = WEIGHTS[text]
        return record, _packaged(record) if record.repo_id is None else None
    if found:
        return _described(path), path
    raise _unknown(text)


def fetch(record: Weights) -> Path:
    """The file of a record in the Hub's cache, downloaded if need be and checked.

    Raises:
        ValueError: If the file does not have the sha256 of the table or of the Hub.
        FileNotFoundError: If the repository has no such file; the candidates are listed.
        OSError: If the Hub refuses access or cannot be reached (errors of huggingface_hub).
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    repo_id, filename = str(record.repo_id), str(record.filename)
    if record.sha256 is not None:
        # Content that the table fixes cannot be outdated: no request if it is cached.
        cached = find_cached(record)
        if cached is not None and sha256_of(cached) == record.sha256:
            return cached
    try:
        path = _downloaded(repo_id, filename, record.revision)
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id}@{record.revision} has no file {filename!r}; pass weights_file= with one of "
            f"{_candidates(record)}"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ConnectionError(
            f"weights {record.name!r}: {filename} of {repo_id} is not in the cache and cannot be "
            f"downloaded ({reason}); go online (without HF_HUB_OFFLINE=1), set HF_ENDPOINT to a "
            "mirror, pass the path of a copy as weights=, or take weights='tiny', which installs "
            "with the package"
        ) from error
    except (OSError, TypeError, ValueError):  # huggingface_hub's own
        raise
    except Exception as error:  # raised by its HTTP library, which differs between releases
        raise ConnectionError(
            f"the download of {filename} from {repo_id} broke off: {error}"
        ) from (error)
    # The cache names the content of a large file by the sha256 that the Hub announced.
    announced = path.resolve().name
    expected = record.sha256 or (announced if re.fullmatch(r"[0-9a-f]{64}", announced) else None)
    if expected is None:
        logger.warning("%s: no sha256 is known, so the file is not verified", record.name)
    else:
        _require_sha256(record, path, expected)
    return path


def find_cached(record: Weights) -> Path | None:
    """The file of a record in the Hub's cache, unchecked; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(
        str(record.repo_id), str(record.filename), revision=record.revision
    )
    return Path(cached) if isinstance(cached, str) else None


def needs_download(weights: str | os.PathLike[str]) -> bool:
    """Whether `locate` would download these weights; no request is made."""
    record, path = resolve(weights)
    return path is None and find_cached(record) is None


def _downloaded(repo_id: str, filename: str, revision: str | None) -> Path:
    """The file in the Hub's cache; gives up when nothing arrives for `STALLED_S`.

    huggingface_hub waits for each packet only, so a server that sends a byte now and then would be
    waited for without end. The thread that waits ends with the process.

    Raises:
        TimeoutError: If nothing arrives.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import tqdm

    arrived = [time.monotonic()]

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            arrived.append(time.monotonic())
            return super().update(n)

    outcome: Future[str] = Future()

    def download() -> None:
        try:
            outcome.set_result(
                hf_hub_download(repo_id, filename, revision=revision, tqdm_class=Bar)
            )
        except BaseException as error:  # noqa: BLE001 (raised where it is waited for)
            outcome.set_exception(error)

    threading.Thread(target=download, daemon=True).start()
    while not wait([outcome], timeout=min(1.0, STALLED_S)).done:
        if time.monotonic() - arrived[-1] > STALLED_S:
            raise TimeoutError(
                f"nothing has come of {filename} from {repo_id} for {STALLED_S:.0f} s; try again, "
                "or download it by hand and pass its path"
            )
    return Path(outcome.result())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: If it is not a file, as `require_file`, which also says what to do.
    """
    require_file(path)
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _described(path: Path) -> Weights:
    """The record of a local file: the table's if its content is listed there, else a bare one."""
    digest = sha256_of(path)
    for record in WEIGHTS.values():
        if record.sha256 == digest:
            return dataclasses.replace(record, status=f"local file with the hash of {record.name}")
    return Weights(name=str(path), filename=path.name, sha256=digest, status="local file")


def _packaged(record: Weights) -> Path:
    """A weights file of the installed package, or of the checkout that the package lies in."""
    places = [folder / "weights" / str(record.filename) for folder in (PACKAGE, PACKAGE.parent)]
    for path in places:
        if path.is_file():
            _require_sha256(record, path, str(record.sha256))
            return path
    raise FileNotFoundError(
        f"{record.filename} is missing in {places[0].parent}; reinstall sammed3d-backbone"
    )


def _require_sha256(record: Weights, path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise ValueError(
            f"{path} has sha256 {found}, but {record.name!r} is expected to have {expected}; "
            "delete the file and try again, or pass its path to use this content"
        )


def _candidates(record: Weights) -> list[str]:
    """Names of the weights files in a record's repository."""
    from huggingface_hub import HfApi, constants

    hub = HfApi(endpoint=constants.ENDPOINT)
    names = hub.list_repo_files(str(record.repo_id), revision=record.revision)
    return [name for name in names if name.endswith(WEIGHTS_SUFFIXES)]


def _unknown(text: str) -> Exception:
    """The error for weights that are not in the table, on disk or a Hub name."""
    known = f"expected one of {sorted(WEIGHTS)}, a file, or 'hf-hub:OWNER/REPO'"
    if text.startswith("hf-hub:"):
        return ValueError(f"weights={text!r} is not a valid Hub name; expected hf-hub:OWNER/REPO")
    if Path(text).suffix or len(Path(text).parts) > 1:
        return FileNotFoundError(f"no weights file {_SHORT.repr(text)}; {known}")
    near = difflib.get_close_matches(text, WEIGHTS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if text in VARIANTS:
        default = DEFAULT_WEIGHTS.get(text)
        those = f"its weights are {default!r}" if default else "no weights are published for it"
        hint = f" {text!r} is a variant: {those}; pretrained=False is random initialisation."
    return ValueError(f"unknown weights {reprlib.repr(text)}; {known}.{hint}")
