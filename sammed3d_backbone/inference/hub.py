"""A fine-tuned model and a page that describes it -> a repository on the Hub.

Two files are sent: the model, and the page as README.md. No image and no case leaves the machine.
The way back is `export.load_model` with `repo_id:file`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sammed3d_backbone.inference.segmenter import Card
from sammed3d_backbone.loading.registry import WEIGHTS

METRICS = {"dice": "Dice", "nsd": "NSD", "hd95_mm": "HD95, mm"}  # keys of scores.json


def model_page(
    card: Card,
    address: str,
    *,
    scores: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> str:
    """The README.md of a model: what it segments, how to use it, where it comes from.

    Args:
        card: Of the model.
        address: `repo_id:file`, from where it will be loaded.
        scores: Content of the ``scores.json`` of its run; None: not known.
        licence: Of the model, by the Hub's name, such as "cc-by-sa-4.0".
    """
    head = {
        "library_name": "sammed3d-backbone",
        "pipeline_tag": "image-segmentation",
        "tags": ["medical", "3d", "segmentation", "monai", "sam-med3d", card.network],
        **({"license": licence} if licence else {}),
    }
    structures = [name for value, name in card.labels.items() if value]
    spacing = card.spacing_mm
    start = card.training.get("start", {})
    dataset = card.training.get("dataset", {})
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {address.partition(':')[0].partition('/')[2]}",
        f"Segments {', '.join(structures)} in 3-D volumes ({', '.join(card.channels)}). Research "
        "software: no medical device, not for clinical decisions.",
        f"```bash\nsammed3d predict {address} IN.nii.gz OUT.nii.gz\n```",
        "```python\n"
        "from sammed3d_backbone.data.volume import Volume\n"
        "from sammed3d_backbone.inference.segmenter import load_model, segment_volume\n\n"
        f'segment_volume(load_model("{address}"), Volume.load("IN.nii.gz")).save("OUT.nii.gz")\n'
        "```",
        _list(
            {
                "network": card.network,
                "labels": ", ".join(f"{value} {name}" for value, name in card.labels.items()),
                "input channels": ", ".join(card.channels),
                "spacing": f"{' x '.join(map(str, spacing))} mm"
                if spacing
                else "each volume's own",
                "intensity": card.intensity,
                "window": f"{card.crop_vox} voxels a side",
            }
        ),
        "Orientation, spacing and intensities are the package's work; labels come back on the "
        "volume's own grid.",
        "## Training",
        _list(
            {
                "data": dataset.get("name"),
                "licence of the data": dataset.get("licence"),
                "note": dataset.get("note"),
                "cases trained on": len(card.training.get("cases", ())),
                "began with": start.get("weights", "").partition("\n")[0],
                "pretraining": start.get("contamination"),
                "versions": ", ".join(f"{name} {it}" for name, it in card.versions.items()),
            }
        ),
        *_scores(scores),
        "## Please cite",
        _list(
            {
                "data": dataset.get("reference"),
                "weights": "; ".join(start.get("citations", ())),
                "encoder": WEIGHTS["turbo"].citation,
            }
        ),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def push_model(
    path: Path, repo_id: str, page: str, *, private: bool = False, message: str | None = None
) -> str:
    """Sends a model and its page in one commit; makes the repository if there is none.

    An earlier file of that name and an earlier page are replaced; the history keeps them.

    Args:
        path: The model.
        repo_id: `owner/name`.
        page: Content of README.md.
        private: Whether a new repository is hidden from others.
        message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If the repository's name is none, or the Hub does not take the page.
        PermissionError: If the Hub wants a token, or another one.
        ConnectionError: If the transfer broke.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, errors

    require_repo_id(repo_id)
    hub = HfApi(endpoint=constants.ENDPOINT)
    files = [
        CommitOperationAdd(path.name, str(path)),
        CommitOperationAdd("README.md", page.encode()),
    ]
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        commit = hub.create_commit(repo_id, files, commit_message=message or f"Add {path.name}")
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise PermissionError(
                f"{constants.ENDPOINT} wants to know who you are; log in with `hf auth login`, or "
                "set HF_TOKEN to a token that may write"
            ) from error
        if status == 403:
            raise PermissionError(
                f"your token may not write to {repo_id}; take a token that may, or a repository "
                "of your own"
            ) from error
        raise ConnectionError(
            f"{constants.ENDPOINT} failed on {repo_id}: {error}; push again later"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise ConnectionError("HF_HUB_OFFLINE is set; unset it to push") from error
    except (ValueError, TypeError):  # the page is not taken, or a fault of this code
        raise
    except Exception as error:  # the HTTP library below huggingface_hub changes between releases
        reason = error.__cause__ or error
        raise ConnectionError(
            f"the push to {constants.ENDPOINT}/{repo_id} broke off: {reason}; push again"
        ) from error
    return commit.commit_url


def require_repo_id(repo_id: str) -> None:
    """Refuses what is no name of a repository.

    Raises:
        ValueError: If it is not of the form owner/name.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"{repo_id!r} is no repository; give OWNER/NAME, such as me/hippocampus")


def _scores(scores: Mapping[str, Any] | None) -> list[str]:
    """What the model scored on cases that it did not see, with intervals."""
    if scores is None or "tables" not in scores:
        return []
    rows = [f"| class | cases | {' | '.join(METRICS.values())} |", "|---|---|---|---|---|"]
    for row in scores["tables"]["all"]:
        cells = " | ".join(_with_interval(*row[metric]) for metric in METRICS)
        rows.append(f"| {row['class']} | {row['cases']} | {cells} |")
    return [
        "## Scores",
        f"{scores.get('title', '')}; {scores.get('split', '')}. With 95 % bootstrap intervals by "
        f"subject; NSD at {scores.get('tolerance_mm', 2):g} mm; on the grid of the files.",
        "\n".join(rows),
    ]


def _with_interval(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _list(facts: Mapping[str, object]) -> str:
    """What is known, a line each."""
    return "\n".join(f"- {key}: {value}" for key, value in facts.items() if value)
