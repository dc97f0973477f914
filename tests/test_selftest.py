"""The selftest passes for a correct network, fails for another, and checks weights."""

import hashlib
import json

import pytest
import torch

from sammed3d_backbone import encoder, sam, selftest
from sammed3d_backbone.cli import main
from sammed3d_backbone.loading.checkpoint import write
from sammed3d_backbone.loading.opening import CARD_KEY
from sammed3d_backbone.loading.registry import WEIGHTS, Weights, to_metadata
from sammed3d_backbone.loading.variants import VARIANTS

SMALL = selftest.CASES["small network"]


@pytest.fixture
def small(monkeypatch):
    """Only the small network is compared; its sizes are those of a variant, too."""
    monkeypatch.setattr(selftest, "CASES", {"small network": SMALL})
    monkeypatch.setitem(VARIANTS, "small", SMALL)


def verdicts(capsys):
    return [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]


# --- against the reference -------------------------------------------------------------------


def test_this_machine_reproduces_the_reference(capsys):
    assert main(["selftest"]) == 0
    *checks, last = verdicts(capsys)
    assert {mark for mark, _ in checks} == {"ok"}
    assert {sentence.split(":")[0] for _, sentence in checks} == set(selftest.CASES)
    assert " ".join(last).startswith("this machine computes what the reference does: worst")


def axial_positions(network):
    for block in network.image_encoder.blocks:
        block.attn.rel_pos = "axial"


def unswapped_axes(network):
    network.prompt_encoder.pe_layer.point_pos = "aligned"


def residual_in_the_first_layer(network):
    network.mask_decoder.transformer.layers[0].is_first = False


def another_epsilon(network):
    network.mask_decoder.transformer.norm_final_attn.eps = 1e-3


@pytest.mark.parametrize(
    ("mistake", "found_in"),
    [
        (axial_positions, "image embedding"),
        (unswapped_axes, "position code"),
        (residual_in_the_first_layer, "mask after the first click"),
        (another_epsilon, "mask after the first click"),
    ],
)
def test_a_mistake_in_the_network_fails_and_is_located(
    small, monkeypatch, mistake, found_in, capsys
):
    network = selftest.network_of(SMALL)
    mistake(network)
    monkeypatch.setattr(selftest, "network_of", lambda _: network)
    assert main(["selftest"]) == 1
    *checks, last = verdicts(capsys)
    wrong = [sentence for mark, sentence in checks if mark == "WRONG"]
    assert found_in in wrong[0]
    assert " ".join(last).startswith(f"{len(wrong)} checks failed")


def test_an_error_that_is_no_number_is_wrong():
    assert not selftest.Check("case", "tensor", float("nan")).is_right


def test_the_numbers_of_the_test_are_the_same_on_every_machine():
    # Worked out from the raw bits 11207706, 14734484 and 433489, which NumPy promises to keep.
    weight = selftest.network_of(SMALL).mask_decoder.iou_token.weight[0, :3]
    torch.testing.assert_close(weight, torch.tensor([0.2910388, 0.6551372, -0.8212727]))


# --- weights ---------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path, small):
    """A promptable file of the small variant."""
    path = tmp_path / "a.safetensors"
    write(path, selftest.network_of(SMALL).state_dict(), to_metadata(Weights("mine", "small")))
    return path


def test_promptable_weights_are_loaded_and_run_on_a_phantom(weights, capsys):
    assert main(["selftest", "--weights", str(weights)]) == 0
    assert verdicts(capsys)[-4:-1] == [
        [
            "-",
            f"sha256 {hashlib.sha256(weights.read_bytes()).hexdigest()}: no such file in the table",
        ],
        ["ok", "all 189 tensors of the weights load strictly"],
        ["ok", "mask logits of a click on a phantom: finite"],
    ]


def test_listed_weights_are_checked_by_name(weights, monkeypatch, capsys):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    listed = Weights("ours", "small", filename=str(weights), sha256=digest)
    monkeypatch.setitem(WEIGHTS, "ours", listed)
    assert main(["selftest", "--weights", str(weights)]) == 0
    assert ["ok", f"sha256 {digest} is that of 'ours'"] in verdicts(capsys)


def test_an_encoder_alone_is_checked_as_one(tmp_path, small, capsys):
    path = tmp_path / "a.pth"
    torch.save(encoder("small", pretrained=False, rel_pos="axial").state_dict(), path)
    assert main(["selftest", "--weights", str(path)]) == 0
    assert verdicts(capsys)[-2] == ["ok", "image embedding on a phantom: finite"]


def test_weights_that_lack_a_tensor_fail(tmp_path, small, capsys):
    state = sam("small", pretrained=False).state_dict()
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "a.pth")
    assert main(["selftest", "--weights", str(tmp_path / "a.pth")]) == 1
    mark, sentence = verdicts(capsys)[-2]
    assert (mark, "mask_decoder.iou_token.weight" in sentence) == ("WRONG", True)


def test_weights_that_overflow_fail(tmp_path, small, capsys):
    network = sam("small", pretrained=False)
    with torch.no_grad():
        # What is multiplied at the very end, so that no random weight makes it small.
        network.mask_decoder.output_upscaling[3].bias.fill_(3e38)
        network.mask_decoder.output_hypernetworks_mlps[0].layers[-1].bias.fill_(3e38)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    assert main(["selftest", "--weights", str(tmp_path / "a.pth")]) == 1
    assert verdicts(capsys)[-2] == ["WRONG", "mask logits of a click on a phantom: not finite"]


def test_what_cannot_be_tested_names_the_command_that_can(tmp_path, small, capsys):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
    card = {CARD_KEY: json.dumps({"network": "unetr"})}
    write(tmp_path / "b.safetensors", {"encoder.x": torch.ones(1)}, card)
    for name in ("a.pth", "b.safetensors"):
        assert main(["selftest", "--weights", str(tmp_path / name)]) == 2
        assert "`sammed3d verify`" in capsys.readouterr().err


def test_the_phantom_is_normalised_and_bright_in_the_middle():
    volume = selftest.phantom((16, 20, 24))
    assert volume.shape == (1, 1, 16, 20, 24)
    torch.testing.assert_close(volume.mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(volume.std(), torch.tensor(1.0))
    assert volume[0, 0, 6:10, 8:12, 10:14].mean() > 1
