"""Every encoder under every adapter: the pairs and checks of tests/checks/check_adapters.py."""

import pytest
import torch

from sammed3d_backbone.adapters.contract import check_encoder
from tests.checks.check_adapters import CUBE, ENCODERS, NETWORKS, PYRAMIDS, Pair


@pytest.mark.parametrize("source", ENCODERS.values(), ids=ENCODERS)
def test_the_encoder_fulfils_the_contract(source):
    check_encoder(source.make(source.channels, CUBE))


def pairs():
    """Every pair; the quick ones are the first encoder under each adapter, each under UNETR."""
    first = next(iter(ENCODERS))
    for encoder in ENCODERS:
        for adapter in (*PYRAMIDS, *NETWORKS):
            quick = encoder == first or adapter == "unetr"
            yield pytest.param(
                encoder,
                adapter,
                id=f"{encoder}-{adapter}",
                marks=() if quick else pytest.mark.slow,
            )


@pytest.mark.parametrize(("encoder", "adapter"), [*pairs()])
def test_a_pair_passes_every_check(encoder, adapter):
    torch.manual_seed(0)
    assert Pair(ENCODERS[encoder], adapter).failed() == []
