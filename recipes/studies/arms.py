"""The fine-tuning recipe with the arguments that only studies need.

    python recipes/studies/arms.py recipes/configs/hippocampus.yaml weights=tiny peft=lora

Takes all arguments of `finetune_unetr.py`, and those of `ArmConfig`.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from sammed3d_backbone.recipes import finetune_unetr
from torch import nn

from sammed3d_backbone import config, console
from sammed3d_backbone.adapters.controls import ZeroedEncoder
from sammed3d_backbone.adapters.registry import accepted_options
from sammed3d_backbone.data.datasets import Dataset, Fold, few_subjects
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.training.finetuning import build_model

TEST_SEED = 2026  # draws the subjects to test on, whatever the seed of a run


@dataclass(frozen=True)
class ArmConfig(finetune_unetr.Config):
    """The recipe's knobs and those of studies."""

    test_subjects: PositiveInt | None = None  # test on so many, always the same; None: the fold's
    num_subjects: PositiveInt | None = None  # so many of the others, drawn by the seed; None: all
    # drawn: train on the drawn; others: on all but the drawn and the tested; inside: train on the
    # drawn, test on these others
    part: Literal["drawn", "others", "inside"] = "drawn"
    control: Literal["none", "zero_encoder"] = "none"  # zero_encoder: what the decoder can do alone
    pyramid: Literal["simple", "multi_level", "conv_stem"] = "conv_stem"  # flexible_unet, segresnet
    rel_pos: Literal["sammed3d", "axial"] | None = None  # None: the weights', the variant's
    patch_size: PositiveInt | None = None  # side of a token in voxels; None: the variant's
    inflate: Literal["center", "mean"] | None = None  # for weights of a 2-D SAM encoder
    channels: Literal["repeat", "shared"] = "repeat"  # see adapters/channels.py
    channel_gains: tuple[float, ...] | None = None  # share of each input channel; None: equal
    peft: Literal["none", "lora", "bottleneck"] = "none"  # trained beside a frozen encoder
    peft_size: PositiveInt = 8  # rank of LoRA, width of bottlenecks
    drop_path_rate: float = 0.1
    layer_decay: PositiveFloat = finetune_unetr.LAYER_DECAY  # factor on lr per encoder block
    channels_last: bool = False  # memory layout that is faster on some CPUs

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model == "basicunet" and (self.channels == "shared" or self.peft != "none"):
            raise ValueError(
                "model=basicunet has no encoder; leave out channels= and peft=, or take model=unetr"
            )
        if self.peft != "none" and (self.freeze or self.scratch):
            raise ValueError(
                f"peft={self.peft} freezes pretrained weights and trains small parts beside them; "
                "leave out freeze= and scratch="
            )
        if self.part != "drawn" and self.num_subjects is None:
            raise ValueError(
                f"part={self.part} is about subjects that are not drawn; give num_subjects="
            )
        if self.peft == "lora" and self.init is not None:
            raise ValueError(
                "peft=lora starts from an encoder, not a network; pass init= as weights="
            )

    def adapted(self, card: Card) -> Card:
        """The recipe's card with the settings of this arm."""
        if not card.encoder:
            return card
        encoder: dict[str, Any] = {**card.encoder}
        if self.rel_pos is not None:
            encoder["rel_pos"] = self.rel_pos
        if self.channels == "shared":
            encoder["in_chans"] = 1
        if self.patch_size is not None:
            encoder["patch_size"] = self.patch_size
        return replace(
            card,
            encoder=encoder,
            adapter={**card.adapter, **accepted_options(card.network, kind=self.pyramid)},
            shared=self.channels == "shared",
            bottleneck=self.peft_size if self.peft == "bottleneck" else 0,
        )

    def draw(self, dataset: Dataset, fold: Fold) -> Fold:
        """The cases to train and test on, in place of the fold's."""
        if self.test_subjects is not None:
            ids = tuple(case.id for case in dataset.cases)
            val = few_subjects(dataset, ids, self.test_subjects, TEST_SEED)
            rule = f"{self.test_subjects} subjects to test on, by seed {TEST_SEED}"
            fold = Fold(tuple(name for name in ids if name not in val), val, rule)
        if self.num_subjects is None:
            return fold
        drawn = few_subjects(dataset, fold.train, self.num_subjects, self.seed)
        others = tuple(name for name in fold.train if name not in drawn)
        if self.part == "others":
            return replace(fold, train=others)
        return replace(fold, train=drawn, val=others if self.part == "inside" else fold.val)

    def build(self, card: Card, dataset_name: str, **given: Any) -> tuple[nn.Module, Card]:  # noqa: ANN401
        """The network of this arm and its card, in place of `finetuning.build_model`."""
        network, card = build_model(
            self.adapted(card),
            dataset_name,
            inflate=self.inflate,
            lora_rank=self.peft_size if self.peft == "lora" else 0,
            channel_gains=self.channel_gains,
            wrap=ZeroedEncoder if self.control == "zero_encoder" else None,
            drop_path_rate=self.drop_path_rate,
            **given,
        )
        if self.channels_last:
            network.to(memory_format=torch.channels_last_3d)
        return network, card


def fine_tune(cfg: ArmConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Trains or resumes one arm; returns its scores, or the cost of a dry run."""
    if cfg.peft != "none":
        cfg = replace(cfg, layer_decay=1.0)  # what is pretrained is frozen and needs no protection
    return finetune_unetr.main(
        cfg, dry_run=dry_run, draw=cfg.draw, layer_decay=cfg.layer_decay, build=cfg.build
    )


if __name__ == "__main__":
    cfg, flags = config.parse(
        ArmConfig, description=__doc__, flags={"dry_run": finetune_unetr.DRY_RUN}
    )
    sys.exit(console.run_program(lambda: fine_tune(cfg, **flags), "arms"))
