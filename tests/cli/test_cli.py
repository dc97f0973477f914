"""The command line: what it prints, what it writes, and its exit codes."""

import argparse
import hashlib
import json

import pytest
import torch

from sammed3d_backbone import cli, encoder, sam
from sammed3d_backbone.cli import main
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.loading.checkpoint import ENCODER, content_sha256, read
from sammed3d_backbone.loading.registry import WEIGHTS, Weights
from sammed3d_backbone.loading.variants import VARIANTS, DecoderSizes, Variant


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """A variant of a small network."""
    sizes = Variant(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=2,
        global_attn_indexes=(1,),
        window_size=3,
        out_chans=8,
        decoder=DecoderSizes(mask_in_chans=4, num_heads=2, mlp_dim=8, iou_head_hidden_dim=8),
    )
    monkeypatch.setitem(VARIANTS, "toy", sizes)


@pytest.fixture
def tensors():
    """A whole toy network, one tensor of it in another number format."""
    state = sam("toy", pretrained=False, point_pos="aligned").state_dict()
    token = "mask_decoder.iou_token.weight"
    return {**state, token: state[token].half()}


@pytest.fixture
def checkpoint(tmp_path, tensors):
    """A training run's file."""
    path = tmp_path / "run.pth"
    torch.save({"model_state_dict": tensors, "args": argparse.Namespace(lr=1.0), "epoch": 9}, path)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


# --- info ------------------------------------------------------------------------------------


def test_ctrl_c_while_arguments_are_read_is_one_line(monkeypatch, capsys):
    def stop(commands):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "COMMANDS", (stop,))
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err.splitlines() == ["sammed3d: interrupted"]


def test_info_alone_lists_the_table(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for record in WEIGHTS.values():
        assert record.name in printed
        assert record.filename in printed


def test_info_of_a_name_prints_its_record_without_a_download(capsys):
    assert main(["info", "turbo"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == str(WEIGHTS["turbo"])
    assert WEIGHTS["turbo"].sha256 in printed


def test_info_of_a_file_prints_what_is_in_it(checkpoint, tensors, capsys):
    values = sum(t.numel() for name, t in tensors.items() if name.startswith("mask_decoder."))
    assert main(["info", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert f"sha256: {sha256(checkpoint)}" in printed
    assert "variant: toy" in printed
    assert "layout: model_state_dict, full model, 189 tensors" in printed
    assert "image_encoder: 54 tensors" in printed
    assert f"mask_decoder: 120 tensors, {values:,} values, float16, float32" in printed
    assert "metadata epoch: 9" in printed
    assert 'metadata args: {"lr": 1.0}' in printed


def test_info_shortens_long_metadata(tmp_path, tensors, capsys):
    path = tmp_path / "a.pth"
    torch.save({"model_state_dict": tensors, "note": "long " * 100}, path)
    main(["info", str(path)])
    assert "... (500 characters)" in capsys.readouterr().out


# --- convert ---------------------------------------------------------------------------------


def test_a_converted_file_holds_the_same_tensors_and_knows_its_source(
    tmp_path, checkpoint, tensors, capsys
):
    target = tmp_path / "out.safetensors"
    assert main(["convert", str(checkpoint), str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    found, metadata = read(target)
    assert same(found, tensors)
    assert metadata["source_sha256"] == sha256(checkpoint)
    assert metadata["source_file"] == "run.pth"
    assert metadata["epoch"] == "9"
    assert json.loads(metadata["weights_record"])["variant"] == "toy"


def test_a_converted_copy_of_listed_weights_carries_their_record(
    tmp_path, checkpoint, monkeypatch, capsys
):
    listed = Weights(
        name="ours",
        variant="toy",
        sha256=sha256(checkpoint),
        licence="CC0",
        preprocessing=SAM_MED3D,
    )
    monkeypatch.setitem(WEIGHTS, "ours", listed)
    target = tmp_path / "out.safetensors"
    assert main(["convert", str(checkpoint), str(target)]) == 0
    record = encoder("toy", weights=target).pretrained_cfg
    assert (record.licence, record.preprocessing) == ("CC0", SAM_MED3D)
    assert record.status == "local file, made from ours"


def test_converting_twice_keeps_tensors_and_facts(tmp_path, checkpoint, tensors):
    once, twice = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    assert main(["convert", str(checkpoint), str(once)]) == 0
    assert main(["convert", str(once), str(twice)]) == 0
    found, metadata = read(twice)
    assert same(found, tensors)
    assert metadata["source_sha256"] == sha256(once)
    assert metadata["epoch"] == "9"


def test_convert_replaces_a_file_only_when_forced(tmp_path, checkpoint, capsys):
    target = tmp_path / "out.safetensors"
    target.write_text("precious", encoding="utf-8")
    assert main(["convert", str(checkpoint), str(target)]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert target.read_text(encoding="utf-8") == "precious"
    assert main(["convert", "--force", str(checkpoint), str(target)]) == 0
    assert main(["verify", str(target)]) == 0


# --- verify ----------------------------------------------------------------------------------


def verdicts(capsys):
    return [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]


def test_a_good_file_verifies(checkpoint, capsys):
    loaded = content_sha256(sam("toy", weights=str(checkpoint)).state_dict())
    assert main(["verify", str(checkpoint)]) == 0
    assert verdicts(capsys) == [
        ["-", f"sha256 {sha256(checkpoint)}: no such file in the table"],
        ["ok", "all values of 189 tensors are finite"],
        ["-", f"weights_sha256 {loaded} of the loaded network, in click lists"],
        ["ok", "the 189 tensors of the toy promptable network are there"],
    ]


def test_a_listed_file_verifies_against_the_table(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(
        WEIGHTS, "ours", Weights(name="ours", variant="toy", sha256=sha256(checkpoint))
    )
    assert main(["verify", str(checkpoint)]) == 0
    assert verdicts(capsys)[0] == ["ok", f"sha256 {sha256(checkpoint)} is that of 'ours'"]


def test_a_file_that_bears_a_listed_name_but_other_content_fails(checkpoint, capsys):
    impostor = checkpoint.rename(checkpoint.with_name("sam_med3d_turbo.pth"))
    assert main(["verify", str(impostor)]) == 1
    mark, sentence = verdicts(capsys)[0]
    assert mark == "WRONG"
    assert "is not that of 'turbo'" in sentence


def test_one_altered_value_in_a_converted_file_fails(tmp_path, checkpoint, capsys):
    target = tmp_path / "out.safetensors"
    main(["convert", str(checkpoint), str(target)])
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    capsys.readouterr()
    assert main(["verify", str(target)]) == 1
    assert [mark for mark, said in verdicts(capsys) if "content_sha256" in said] == ["WRONG"]
    assert main(["convert", str(target), str(tmp_path / "again.safetensors")]) == 2
    assert "content_sha256" in capsys.readouterr().err
    assert not (tmp_path / "again.safetensors").exists()


def test_the_home_folder_is_found_in_every_output(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(checkpoint), "~/made/out.safetensors"]) == 0
    assert (tmp_path / "made" / "out.safetensors").exists()
    assert not (tmp_path / "~").exists()


def test_a_folder_that_was_removed_is_named(tmp_path, checkpoint, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["convert", str(checkpoint), "out.safetensors"]) == 2
    assert "folder was removed" in capsys.readouterr().err


def test_wrong_arguments_make_a_short_line_of_plain_text(capsys):
    with pytest.raises(SystemExit):
        main(["info", "tiny", "\x1b[31m" + "x" * 5000])
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert len(said) < 800


def test_convert_refuses_values_that_are_not_finite(tmp_path, capsys):
    torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "out.safetensors")]) == 2
    assert "non-finite" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.pop(f"{ENCODER}neck.0.weight"), "no known variant"),
        (lambda t: t.pop(f"{ENCODER}neck.1.bias"), "neck.1.bias"),
        (lambda t: t.update({f"{ENCODER}neck.1.bias": torch.zeros(7)}), "(7,) instead of (8,)"),
        (lambda t: t.update({f"{ENCODER}new.bias": torch.zeros(7)}), "new.bias"),
        (
            lambda t: t.update({"mask_decoder.x": torch.tensor([float("nan")])}),
            "not finite in 1 tensors, such as mask_decoder.x",
        ),
    ],
    ids=["no neck", "one missing", "misshapen", "left over", "not finite"],
)
def test_a_bad_file_fails_and_says_where(tmp_path, tensors, damage, said, capsys):
    damage(tensors)
    torch.save(tensors, tmp_path / "a.pth")
    assert main(["verify", str(tmp_path / "a.pth")]) == 1
    assert [sentence for mark, sentence in verdicts(capsys) if mark == "WRONG" and said in sentence]


def test_a_tensor_of_no_known_part_is_mentioned(tmp_path, tensors, capsys):
    torch.save({**tensors, "head.bias": torch.zeros(1)}, tmp_path / "a.pth")
    assert main(["verify", str(tmp_path / "a.pth")]) == 0
    assert verdicts(capsys)[-1][1].endswith("network are there, 1 unexpected")


def test_an_encoder_alone_verifies_as_what_it_is(tmp_path, tensors, capsys):
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER)}
    torch.save(mine, tmp_path / "a.pth")
    assert main(["verify", str(tmp_path / "a.pth")]) == 0
    assert verdicts(capsys)[-1] == ["ok", "the 54 tensors of the toy encoder are there"]


def test_a_file_of_the_challenge_verifies_and_its_corners_are_mentioned(tmp_path, tensors, capsys):
    corners = {f"prompt_encoder.point_embeddings.{i}.weight": torch.ones(1, 8) for i in (2, 3)}
    torch.save({**tensors, **corners}, tmp_path / "a.pth")
    assert main(["verify", str(tmp_path / "a.pth")]) == 0
    assert verdicts(capsys)[-1][1].endswith("network are there, 2 box corners not used")


def test_a_decoder_with_a_hole_fails_where_its_encoder_is_whole(tmp_path, tensors, capsys):
    del tensors["mask_decoder.mask_tokens.weight"]
    torch.save(tensors, tmp_path / "a.pth")
    assert main(["verify", str(tmp_path / "a.pth")]) == 1
    assert "missing (mask_decoder.mask_tokens.weight)" in verdicts(capsys)[-1][1]


def test_a_named_variant_is_what_the_file_is_held_against(checkpoint, capsys):
    assert main(["verify", str(checkpoint), "--variant", "tiny"]) == 1
    assert "blocks.3.norm1.weight" in verdicts(capsys)[-1][1]


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "trubo"], "Did you mean 'turbo'?"),
        (["info", "vit_l_256"], "'vit_l_256' is a variant"),
        (["info", "missing.pth"], "no weights file 'missing.pth'"),
        (["verify", "missing.pth"], "no weights file 'missing.pth'"),
        (["convert", "missing.pth", "out.safetensors"], "no weights file 'missing.pth'"),
        (["verify", "--variant", "huge", "{file}"], "unknown variant 'huge'"),
        (["convert", "{file}", "out.pth"], "give it the ending .safetensors"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    checkpoint, tmp_path, arguments, said, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([a.format(file=checkpoint) for a in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("sammed3d: error: ")
    assert said in printed
    assert printed.count("\n") == 1


def test_the_command_needs_a_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
