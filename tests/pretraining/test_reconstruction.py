"""Hidden patches: what is hidden, what counts, what is trained."""

import pytest
import torch

from sammed3d_backbone import sam
from sammed3d_backbone.pretraining.reconstruction import Reconstruction


@pytest.fixture
def network():
    torch.manual_seed(0)
    return sam("nano", pretrained=False, img_size=16)


@pytest.fixture
def volumes():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 1, 16, 16, 16, generator=generator)


@pytest.fixture
def draws():
    return torch.rand(2, 8, generator=torch.Generator().manual_seed(2))


class Spy(torch.nn.Module):
    """Keeps what it is shown and makes a map of zeros."""

    def forward(self, image):
        self.seen = image
        return torch.zeros(len(image), 64, 2, 2, 2)


def test_the_encoder_sees_zeros_in_place_of_the_hidden_patches_and_all_the_rest(network, volumes):
    draws = torch.ones(2, 8)
    draws[0, 1], draws[1, 6] = 0.1, 0.1  # patches (0, 0, 1) and (1, 1, 0)
    spy = Spy()
    Reconstruction(network.image_encoder, 0.5)(spy, volumes, draws)
    wanted = volumes.clone()
    wanted[0, 0, :8, :8, 8:] = 0
    wanted[1, 0, 8:, 8:, :8] = 0
    assert torch.equal(spy.seen, wanted)


def test_the_mean_of_each_patch_gets_an_error_of_one_whatever_its_brightness(
    network, volumes, draws
):
    head = Reconstruction(network.image_encoder)
    torch.nn.init.zeros_(head.to_voxels.bias)
    assert head(Spy(), 7 * volumes + 3, draws).item() == pytest.approx(1, abs=1e-4)


def test_only_hidden_patches_count(network, volumes):
    draws = torch.ones(2, 8)
    draws[:, 0] = 0.1
    head = Reconstruction(network.image_encoder, 0.5)
    before = head(Spy(), volumes, draws)
    volumes[:, :, 8:] += torch.randn(2, 1, 8, 16, 16)
    assert torch.equal(head(Spy(), volumes, draws), before)


def test_halves_of_a_batch_make_up_the_whole(network, volumes, draws):
    head = Reconstruction(network.image_encoder)
    encoder = network.image_encoder
    halves = [head(encoder, volumes[i : i + 1], draws[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(head(encoder, volumes, draws), torch.stack(halves).mean())


def test_a_few_steps_lower_the_error(network, volumes, draws):
    head = Reconstruction(network.image_encoder)
    smooth = torch.nn.functional.avg_pool3d(volumes, 5, 1, 2)
    both = torch.nn.ModuleList([network.image_encoder, head])
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3)
    errors = []
    for _ in range(12):
        loss = head(network.image_encoder, smooth, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_hiding_nothing_or_everything_is_refused(network, share):
    with pytest.raises(ValueError, match="give a share between 0 and 1"):
        Reconstruction(network.image_encoder, share)
