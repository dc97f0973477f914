"""The Hub repository of a fine-tuned model: its model card, and the upload of a folder.

Only the files of that folder are sent: `model.safetensors`, `config.json` and `README.md`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.loading.registry import WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TEMPLATE = Path(__file__).with_name("model_card.md")


def model_card(
    card: Card,
    repo_id: str,
    *,
    scores: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> ModelCard:
    """The README of a model repository: what it segments, how to use it, where it comes from.

    Args:
        card: Card of the model.
        repo_id: `OWNER/NAME` of the repository.
        scores: Content of the run's ``scores.json``; None leaves the section out.
        licence: Licence identifier of the Hub, for example "cc-by-sa-4.0".
    """
    from huggingface_hub import ModelCard, ModelCardData

    from sammed3d_backbone.evaluation.metrics import METRICS

    start = card.training.get("start", {})
    dataset = card.training.get("dataset", {})
    rows = [] if scores is None else scores["tables"]["all"]
    readme: ModelCard = ModelCard.from_template(
        ModelCardData(
            library_name="sammed3d-backbone",
            pipeline_tag="image-segmentation",
            tags=["medical", "3d", "segmentation", "monai", "sam-med3d", card.network],
            license=licence,
        ),
        template_path=str(TEMPLATE),
        name=repo_id.partition("/")[2],
        repo_id=repo_id,
        structures=escaped(", ".join(name for value, name in card.labels.items() if value)),
        channels=escaped(", ".join(card.channels)),
        facts=_known(
            {
                "network": card.network,
                "labels": ", ".join(f"{value} {name}" for value, name in card.labels.items()),
                "input channels": ", ".join(card.channels),
                **card.preprocessing_rows(),
            }
        ),
        training=_known(
            {
                "data": dataset.get("name"),
                "licence of the data": dataset.get("licence"),
                "note": dataset.get("note"),
                "training cases": len(card.training.get("cases", ())),
                "initial weights": start.get("weights", "").partition("\n")[0],
                "overlap with pretraining": start.get("data_overlap"),
                "versions": ", ".join(f"{name} {it}" for name, it in card.versions.items()),
            }
        ),
        metrics=[metric.head for metric in METRICS.values()],
        scores=[
            [
                escaped(row["class"]),
                row["cases"],
                *(_with_interval(*row[metric]) for metric in METRICS),
            ]
            for row in rows
        ],
        scores_of=escaped("; ".join(str((scores or {}).get(k, "")) for k in ("title", "split"))),
        tolerance_mm=f"{(scores or {}).get('tolerance_mm', 2):g}",
        citations=_known(
            {
                "data": dataset.get("reference"),
                "weights": "; ".join(start.get("citations", ())),
                "encoder": WEIGHTS["turbo"].citation,
            }
        ),
    )
    return readme


def upload(folder: Path, repo_id: str, *, private: bool = False, message: str | None = None) -> str:
    """Uploads a folder as one commit; creates the repository if it does not exist.

    Args:
        folder: All its files are uploaded.
        repo_id: `OWNER/NAME`.
        private: Whether a new repository is private.
        message: Commit message.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If the repository's name is not valid, or the Hub rejects the README.
        PermissionError: If the Hub asks for a token, or for one with write access.
        ConnectionError: If the transfer failed.
    """
    from huggingface_hub import HfApi, constants, errors

    require_repo_id(repo_id)
    hub = HfApi(endpoint=constants.ENDPOINT)
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message or "Upload model"
        )
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(
                f"{constants.ENDPOINT} refused to write to {repo_id}; log in with `hf auth login` "
                "or set HF_TOKEN to a token with write access"
            ) from error
        raise ConnectionError(f"upload to {repo_id} failed: {error}; push again later") from error
    except (ValueError, TypeError):  # a README that the Hub rejects, or a fault of this code
        raise
    except Exception as error:  # the HTTP library below huggingface_hub differs between releases
        reason = error.__cause__ or error
        raise ConnectionError(f"upload to {repo_id} failed: {reason}; push again") from error
    return commit.commit_url


def require_repo_id(repo_id: str) -> None:
    """Checks that a text is a valid repository id.

    Raises:
        ValueError: If it is not of the form OWNER/NAME.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id):
        raise ValueError(
            f"invalid repository id {repo_id!r}: expected OWNER/NAME, for example me/hippocampus"
        )


def _with_interval(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _known(facts: Mapping[str, object]) -> list[tuple[str, str]]:
    """The facts that have a value, for Markdown."""
    return [(key, escaped(value)) for key, value in facts.items() if value]


def escaped(value: object) -> str:
    """Text that Markdown, and HTML inside of it, show as it is, in one line."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", text)
