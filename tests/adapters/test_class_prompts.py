"""A learned prompt per class on the promptable network's mask decoder."""

from dataclasses import replace

import pytest
import torch

from sammed3d_backbone import class_prompts, encoder, sam, unetr
from sammed3d_backbone.adapters.channels import SharedEncoder
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import Segmenter, build_network
from sammed3d_backbone.loading.checkpoint import CheckpointError, read, write
from sammed3d_backbone.loading.registry import Weights, to_metadata
from sammed3d_backbone.loading.variants import VARIANTS, DecoderSizes, Variant

TOY = Variant(
    img_size=16,
    patch_size=4,
    embed_dim=24,
    depth=2,
    num_heads=2,
    global_attn_indexes=(0, 1),
    out_chans=24,
    rel_pos="axial",
    decoder=DecoderSizes(
        mask_in_chans=4,
        num_heads=2,
        mlp_dim=8,
        iou_head_hidden_dim=8,
        point_pos="aligned",
        high_resolution=True,
    ),
)
# As the released networks: no high-resolution maps, and the position code with swapped axes.
RELEASED = replace(
    TOY,
    out_chans=48,
    rel_pos="sammed3d",
    decoder=replace(TOY.decoder, high_resolution=False, point_pos="swapped"),
)
FRESH = {"prompts", "bias"}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """Variants that cost nothing."""
    monkeypatch.setitem(VARIANTS, "toy", TOY)
    monkeypatch.setitem(VARIANTS, "toy_released", RELEASED)


@pytest.fixture
def stored(tmp_path):
    """Writes promptable weights of a variant."""

    def write_variant(variant="toy"):
        torch.manual_seed(0)
        network = sam(variant, pretrained=False)
        record = Weights(name=variant, variant=variant, rel_pos=VARIANTS[variant].rel_pos)
        path = tmp_path / f"{variant}.safetensors"
        write(path, network.state_dict(), to_metadata(record))
        return path

    return write_variant


@pytest.fixture
def volume(generator):
    return torch.randn(2, 1, 16, 16, 16, generator=generator)


@pytest.mark.parametrize("variant", ["toy", "toy_released"])
def test_a_class_prompted_like_a_click_gets_the_promptable_networks_mask(stored, variant, volume):
    path = stored(variant)
    network = class_prompts(encoder(variant, weights=path), 3, variant=variant, weights=path).eval()
    whole = sam(variant, weights=path).eval()
    code = whole.prompt_encoder
    click = torch.cat([code.point_embeddings[1].weight, code.not_a_point_embed.weight])
    with torch.no_grad():
        network.prompts.copy_(click.expand_as(network.prompts))
        logits = network(volume)
        for image, given in zip(volume.split(1), logits.split(1), strict=True):
            encoding = whole.encode(image)
            dense = code(masks=torch.zeros(1, 1, *code.mask_size))[1]
            low_res, _ = whole.mask_decoder(
                encoding.embedding, code.get_dense_pe(), click[None], dense, maps=encoding.maps
            )
            wanted = whole.upsample(low_res)
            torch.testing.assert_close(given[:, 1:2], wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(given[:, 2:3], wanted, rtol=1e-4, atol=1e-4)
    assert not logits[:, 0].any()


def test_the_file_fills_everything_but_what_belongs_to_the_classes(stored):
    path = stored()
    network = class_prompts(encoder("toy", pretrained=False), 4, variant="toy", weights=path)
    report, names = network.load_report, set(network.state_dict())
    assert set(report.missing) == FRESH
    # The constant embedding of an empty mask is computed from the file, not stored in it.
    assert set(report.matched) == names - FRESH
    assert not report.unexpected
    assert not {name for name in report.unused if name in names}
    file = read(path)[0]
    for name, tensor in network.mask_decoder.state_dict().items():
        assert torch.equal(tensor, file[f"mask_decoder.{name}"])
    distance = network.prompts[:, 0] - file["prompt_encoder.point_embeddings.1.weight"]
    assert 0.3 < distance.std() < 0.7  # near the click, apart from each other


def test_every_parameter_gets_a_gradient(stored, volume):
    path = stored()
    network = class_prompts(encoder("toy", weights=path), 3, variant="toy", weights=path)
    weight = torch.randn(2, 3, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    (network(volume) * weight).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_recomputed_blocks_give_the_same_gradient(stored, volume):
    path, grads = stored(), []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        network = class_prompts(encoder("toy", weights=path), 3, variant="toy", weights=path)
        network.set_grad_checkpointing(checkpointing)
        network(volume).square().mean().backward()
        grads.append(network.prompts.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shared", [False, True])
def test_several_equal_channels_give_what_one_gave(stored, shared, volume):
    path, networks = stored(), []
    for channels in (1, 2):
        backbone = encoder("toy", weights=path, in_chans=1 if shared else channels)
        backbone = SharedEncoder(backbone, channels) if shared else backbone
        networks.append(class_prompts(backbone, 3, variant="toy", weights=path).eval())
    one, two = networks
    two.load_state_dict({name: one.state_dict()[name] for name in FRESH}, strict=False)
    torch.testing.assert_close(
        two(volume.expand(-1, 2, -1, -1, -1)), one(volume), rtol=1e-4, atol=1e-4
    )


def test_another_grid_reads_positions_of_its_own(stored, generator):
    path = stored()
    network = class_prompts(
        encoder("toy", weights=path, img_size=24), 2, variant="toy", weights=path
    )
    assert network(torch.randn(1, 1, 24, 24, 24, generator=generator)).shape == (1, 2, 24, 24, 24)


def test_a_fine_tuned_network_starts_one_of_other_classes(stored, tmp_path):
    path = stored()
    card = Card(
        network="class_prompts",
        encoder={"variant": "toy", "in_chans": 1, "img_size": 16, "rel_pos": "axial"},
        adapter={"variant": "toy"},
        labels={0: "background", 1: "liver", 2: "spleen"},
        channels=("MRI",),
        preprocessing=replace(SAM_MED3D, spacing_mm=(1.0, 1.0, 1.0), crop_vox=(16, 16, 16)),
    )
    model = tmp_path / "model.safetensors"
    earlier = class_prompts(encoder("toy", weights=path), 3, variant="toy", weights=path)
    Segmenter(earlier, card).save(model)
    later = class_prompts(encoder("toy", weights=model), 5, variant="toy", weights=model)
    for name, tensor in earlier.state_dict().items():
        if name not in FRESH:
            assert torch.equal(tensor, later.state_dict()[name]), name
    distance = later.prompts - earlier.prompts.mean(0)
    assert 0.3 < distance.std() < 0.7
    rebuilt = build_network(card)
    rebuilt.load_state_dict(earlier.state_dict())


def test_a_file_with_an_encoder_only_fills_that_and_says_so(tmp_path, caplog):
    alone = encoder("toy", pretrained=False)
    path = tmp_path / "encoder.safetensors"
    record = Weights(name="toy", variant="toy", rel_pos="axial")
    write(
        path, {f"image_encoder.{k}": v for k, v in alone.state_dict().items()}, to_metadata(record)
    )
    network = class_prompts(encoder("toy", weights=path), 2, variant="toy", weights=path)
    assert "mask_decoder.mask_tokens.weight" in network.load_report.missing
    assert "no mask decoder" in caplog.text


def test_what_cannot_be_built_is_refused(stored):
    path = stored()
    backbone = encoder("toy", weights=path)
    with pytest.raises(ValueError, match="out_channels"):
        class_prompts(backbone, 1, variant="toy")
    with pytest.raises(CheckpointError, match="variant"):
        class_prompts(encoder("toy", weights=path), 2, variant="toy_released", weights=path)
    unetr(backbone, 2)  # takes the neck away
    with pytest.raises(ValueError, match="neck"):
        class_prompts(backbone, 2, variant="toy")
