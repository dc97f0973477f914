"""The fine-tuning recipe with what only studies change: fewer subjects, controls, channel gains."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from sammed3d_backbone.recipes import finetune_unetr
from torch import nn

from sammed3d_backbone.adapters.controls import ZeroedEncoder
from sammed3d_backbone.training.finetuning import build_model


@dataclass(frozen=True)
class ArmConfig(finetune_unetr.Config):
    """The recipe's knobs and three more."""

    num_subjects: int | None = None  # train on this many subjects, drawn by the seed; None: all
    control: Literal["none", "zero_encoder"] = "none"  # zero_encoder: what the decoder can do alone
    channel_gains: tuple[float, ...] | None = None  # share of each input channel; None: equal
    channels_last: bool = False  # memory layout that is faster on some CPUs


def fine_tune(cfg: ArmConfig) -> dict[str, Any]:
    """Trains or resumes one arm; returns its scores."""

    def build(*card_and_name: Any, **given: Any) -> tuple[nn.Module, dict[str, Any]]:  # noqa: ANN401
        wrap = ZeroedEncoder if cfg.control == "zero_encoder" else None
        gains = cfg.channel_gains
        network, start = build_model(*card_and_name, channel_gains=gains, wrap=wrap, **given)
        if cfg.channels_last:
            network.to(memory_format=torch.channels_last_3d)
        return network, start

    return finetune_unetr.main(cfg, num_subjects=cfg.num_subjects, build=build)
