"""Reading what users have, refusing what is not weights, and fitting it loudly."""

import argparse
import io
import json
import os
import pathlib
import pickle
import stat
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sammed3d_backbone.loading.checkpoint import (
    ENCODER,
    STEM,
    CheckpointError,
    content_sha256,
    read,
    write,
)
from sammed3d_backbone.loading.fitting import LoadReport, fit
from sammed3d_backbone.loading.hub import locate

GOLDEN = Path(__file__).parents[1] / "golden" / "keys_vit_b.json"


@pytest.fixture(scope="module")
def full():
    """A whole promptable network's tensors: the released names, every size cut down."""
    generator = torch.Generator().manual_seed(0)
    shapes = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return {
        name: torch.randn([min(n, 6) for n in shape], generator=generator)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def encoder_part(full):
    """The encoder's tensors under its own names."""
    return {n.removeprefix(ENCODER): t for n, t in full.items() if n.startswith(ENCODER)}


@pytest.fixture(scope="module")
def shapes(encoder_part):
    """What an encoder of that size asks for."""
    return {name: tuple(tensor.shape) for name, tensor in encoder_part.items()}


def training_run(tensors):
    """What a training run of the original code saves."""
    return {
        "epoch": 7,
        "model_state_dict": tensors,
        "optimizer_state_dict": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 8e-4}]},
        "losses": [1.5, 1.25],
        "best_loss": np.inf,
        "best_dice": np.float64(0.5),
        "args": argparse.Namespace(task_name="mine", lr=8e-4, work_dir=pathlib.Path("work")),
        "used_datas": ["data/a", "data/b"],
    }


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


# --- layouts ---------------------------------------------------------------------------------


LAYOUTS = {
    "bare": lambda t: t,
    "model_state_dict": lambda t: {"model_state_dict": t},
    "state_dict": lambda t: {"state_dict": t, "epoch": 3},
    "training run with its argument namespace": training_run,
    "module. prefix": lambda t: {f"module.{n}": v for n, v in t.items()},
    "compiled and parallel": lambda t: {f"module._orig_mod.{n}": v for n, v in t.items()},
    "parameters": lambda t: {n: torch.nn.Parameter(v) for n, v in t.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_every_public_layout_gives_the_same_tensors(tmp_path, full, layout, zipped):
    torch.save(layout(full), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    tensors, metadata = read(tmp_path / "a.pth")
    assert same(tensors, full)
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
    assert "full model, 324 tensors" in metadata["layout"]


def test_a_safetensors_file_gives_its_tensors_and_metadata(tmp_path, full):
    safetensors.torch.save_file(full, tmp_path / "a.safetensors", {"made": "by hand"})
    tensors, metadata = read(tmp_path / "a.safetensors")
    assert same(tensors, full)
    assert metadata["made"] == "by hand"


def test_a_training_run_tells_its_arguments_and_epoch(tmp_path, full):
    torch.save(training_run(full), tmp_path / "a.pth")
    _, metadata = read(tmp_path / "a.pth")
    assert metadata["epoch"] == "7"
    assert metadata["best_loss"] == "inf"
    assert json.loads(metadata["args"]) == {
        "task_name": "mine",
        "lr": 8e-4,
        "work_dir": "not read",
    }


@pytest.mark.parametrize(
    ("prefix", "said"),
    [(ENCODER, "encoder only, under 'image_encoder.', 189 tensors"), ("", "encoder only, 189")],
)
def test_an_encoder_alone_is_recognised(tmp_path, encoder_part, prefix, said):
    torch.save({prefix + n: t for n, t in encoder_part.items()}, tmp_path / "a.pth")
    _, metadata = read(tmp_path / "a.pth")
    assert said in metadata["layout"]


def test_the_challenge_files_two_more_point_embeddings_are_recognised(tmp_path, full):
    corners = {f"prompt_encoder.point_embeddings.{i}.weight": torch.zeros(1, 6) for i in (2, 3)}
    torch.save({"model_state_dict": {**full, **corners}}, tmp_path / "a.pth")
    tensors, metadata = read(tmp_path / "a.pth")
    assert len(tensors) == 326
    assert "full model of the challenge, 326 tensors" in metadata["layout"]


def test_half_of_the_names_wrapped_is_left_alone(tmp_path):
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth")[0].keys() == {"module.a", "b"}


# --- refusals --------------------------------------------------------------------------------


class Hostile:
    """Runs a command when unpickled without care."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class HostileBuiltin(Hostile):
    def __reduce__(self):
        return exec, (f"import os; os.system({self.command!r})",)


@pytest.mark.parametrize("hostile", [Hostile, HostileBuiltin])
@pytest.mark.parametrize(
    "save",
    [
        lambda content, path: torch.save(content, path),
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: torch.save(content, path, pickle_protocol=4),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
        lambda content, path: path.write_bytes(pickle.dumps(content, protocol=0)),
    ],
    ids=["zip", "old format", "protocol 4", "raw pickle", "raw pickle of protocol 0"],
)
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, hostile, save):
    proof = tmp_path / "it ran"
    content = {"model_state_dict": {"a": torch.zeros(1)}, "args": hostile(f"touch '{proof}'")}
    save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="nothing was run"):
        read(tmp_path / "a.pth")
    assert not proof.exists()


def test_a_plain_name_cannot_smuggle_a_real_class_in(tmp_path):
    # The stand-ins hold what they are given and call nothing.
    sneaky = argparse.Namespace(path=pathlib.Path("/etc/passwd"), number=np.float32(1))
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": sneaky}, tmp_path / "a.pth")
    _, metadata = read(tmp_path / "a.pth")
    assert json.loads(metadata["args"]) == {"path": "not read", "number": "not read"}


def test_reading_leaves_no_global_allowed_and_keeps_those_of_the_caller(tmp_path, full):
    torch.save(training_run(full), tmp_path / "a.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        read(tmp_path / "a.pth")
        assert set(torch.serialization.get_safe_globals()) == before


def test_a_pickled_model_is_refused_with_what_to_save_instead(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="state_dict") as caught:
        read(tmp_path / "a.pth")
    assert "torch.nn.modules.linear.Linear" in str(caught.value)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.pth", b"", "empty"),
        ("a.safetensors", b"", "empty"),
        ("a.pth", LFS, "Git LFS"),
        ("a.safetensors", LFS, "Git LFS"),
        ("a.pth", b"\n<!DOCTYPE html><html>", "web page"),
        ("a.pth", b"<html><body>404", "web page"),
        ("a.pth", b"not a checkpoint at all", "not a readable"),
        ("a.pth", b"PK\x03\x04", "not a readable"),
        ("a.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "safetensors"),
        ("a.safetensors", b"PK\x03\x04" + bytes(20), ".pth"),
    ],
)
def test_what_is_no_weights_file_is_named_for_what_it_is(tmp_path, name, content, remedy):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=remedy):
        read(tmp_path / name)


def test_safetensors_under_a_torch_name_is_told_to_be_renamed(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"rename it to \.safetensors"):
        read(tmp_path / "a.pth")


def test_safetensors_with_a_long_description_under_another_name_are_known(tmp_path):
    write(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"about": "x" * 2000})
    (tmp_path / "a.safetensors").rename(tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"rename it to \.safetensors"):
        read(tmp_path / "a.bin")


def test_a_folder_names_the_files_inside(tmp_path):
    (tmp_path / "best.pth").touch()
    with pytest.raises(IsADirectoryError, match=r"best\.pth"):
        read(tmp_path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (torch.zeros(3), r"holds a Tensor, not tensors by name; save `model.state_dict\(\)`"),
        ([torch.zeros(3)], r"holds a list, not tensors by name"),
        ({}, "holds no tensors; is it the right file"),
        ({"model_state_dict": {}}, "holds no tensors; is it the right file"),
        ({"weights": {"a": torch.zeros(3)}}, "holds weights where dense tensors by name"),
        ({"a": torch.zeros(3), "epoch": 3}, "holds epoch where dense tensors by name"),
        ({3: torch.zeros(3)}, "holds 3 where dense tensors by name"),
        ({"a": torch.zeros(3).to_sparse()}, "holds a where dense tensors by name"),
        ({"a": torch.zeros(3, device="meta")}, "holds a where dense tensors by name"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*invariant checks:UserWarning")  # torch, on sparse tensors
def test_a_file_without_tensors_by_name_says_what_it_holds(tmp_path, content, remedy):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=remedy):
        read(tmp_path / "a.pth")


@pytest.fixture(scope="module")
def samples(full):
    """One small file of each format, as bytes, behind a name that prints short."""
    few = dict(list(full.items())[:8])
    files = {".safetensors": safetensors.torch.save(few)}
    for suffix, zipped in ((".pth", True), (".old.pth", False)):
        buffer = io.BytesIO()
        torch.save(training_run(few), buffer, _use_new_zipfile_serialization=zipped)
        files[suffix] = buffer.getvalue()
    return files.__getitem__


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(suffix=st.sampled_from([".safetensors", ".pth", ".old.pth"]), share=st.floats(0, 0.999))
def test_a_file_cut_short_anywhere_is_refused(tmp_path, samples, suffix, share):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(samples(suffix)[: int(share * len(samples(suffix)))])
    with pytest.raises(CheckpointError, match="again"):
        read(path)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    suffix=st.sampled_from([".safetensors", ".pth", ".old.pth"]),
    share=st.floats(0, 0.999),
    value=st.integers(0, 255),
)
def test_a_damaged_byte_is_refused_or_harmless_but_never_another_error(
    tmp_path, samples, suffix, share, value
):
    damaged = bytearray(samples(suffix))
    damaged[int(share * len(damaged))] = value
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damaged)
    try:
        tensors, _ = read(path)
    except CheckpointError:
        return
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())


# --- fitting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", ENCODER])
def test_an_encoder_fits_itself_bit_for_bit(encoder_part, shapes, prefix):
    state, report = fit(
        {prefix + n: t for n, t in encoder_part.items()}, shapes, part=ENCODER, source="me"
    )
    assert same(state, encoder_part)
    assert report == LoadReport(source="me", matched=tuple(shapes))


def test_the_other_parts_of_a_full_model_are_counted_as_not_used(full, shapes, encoder_part):
    state, report = fit(full, shapes, part=ENCODER)
    assert same(state, encoder_part)
    assert (len(report.matched), len(report.unused), report.unexpected) == (189, 135, ())
    assert "not used by this network: mask_decoder 120, prompt_encoder 15" in str(report)


def test_a_full_network_takes_every_part(full):
    state, report = fit(full, {name: tuple(t.shape) for name, t in full.items()})
    assert same(state, full)
    assert not report.unused


def test_a_tensor_of_no_known_part_is_reported(full, shapes):
    _, report = fit({**full, "head.weight": torch.zeros(2)}, shapes, part=ENCODER)
    assert report.unexpected == ("head.weight",)
    assert "unexpected: head.weight" in str(report)


def test_missing_tensors_raise_with_their_names(full, shapes):
    short = {n: t for n, t in full.items() if "blocks.11" not in n}
    with pytest.raises(CheckpointError, match="variant") as e:
        fit(short, shapes, part=ENCODER, source="short.pth")
    assert "short.pth" in str(e.value)
    assert "15 of its 189 tensors are missing (blocks.11.norm1.weight" in str(e.value)
    assert "and 11 more" in str(e.value)


def test_tensors_left_over_in_the_encoder_raise(full, shapes):
    deeper = {**full, f"{ENCODER}blocks.12.norm1.weight": torch.zeros(6)}
    with pytest.raises(CheckpointError, match=r"1 are left over \(blocks\.12\.norm1\.weight\)"):
        fit(deeper, shapes, part=ENCODER)


def test_misshapen_tensors_raise_with_both_shapes(encoder_part, shapes):
    wrong = {**encoder_part, "neck.0.weight": torch.zeros(6, 5, 1, 1, 1)}
    with pytest.raises(CheckpointError, match="img_size") as e:
        fit(wrong, shapes)
    assert "neck.0.weight (6, 5, 1, 1, 1) instead of (6, 6, 1, 1, 1)" in str(e.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_raise(encoder_part, shapes, value):
    bad = {**encoder_part, "neck.1.bias": torch.full((6,), value)}
    with pytest.raises(CheckpointError, match=r"neck\.1\.bias"):
        fit(bad, shapes)


@pytest.mark.parametrize(
    ("dtype", "rule"),
    [
        (torch.float16, "widened without loss"),
        (torch.bfloat16, "widened without loss"),
        (torch.float64, "rounded"),
    ],
)
def test_other_float_formats_become_float32_and_are_reported(encoder_part, shapes, dtype, rule):
    stored = {n: t.to(dtype) for n, t in encoder_part.items()}
    state, report = fit(stored, shapes)
    assert same(state, {n: t.float() for n, t in stored.items()})
    assert {change.rule for change in report.adapted} == {rule}
    assert len(report.adapted) == 189


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_format_that_is_no_weight_raises(encoder_part, shapes, dtype):
    wrong = {**encoder_part, "neck.1.bias": torch.zeros(6).to(dtype)}
    with pytest.raises(CheckpointError, match="save the network in float32"):
        fit(wrong, shapes)


def response(kernel, image):
    """What the stem makes of an image: (B, C, X, Y, Z) -> (B, E, x, y, z)."""
    return torch.nn.functional.conv3d(image, kernel)


@pytest.fixture
def kernels(generator):
    """A stem of one channel, and an image for it."""
    return (
        torch.randn(5, 1, 4, 4, 4, generator=generator),
        torch.randn(2, 1, 8, 8, 8, generator=generator),
    )


@pytest.mark.parametrize("gains", [None, (1, 0, 0, 0), (0.5, 0.25, 0.25, 0), [0.1, 0.2, 0.3, 0.4]])
def test_equal_channels_keep_the_response_of_one(kernels, gains):
    kernel, image = kernels
    state, report = fit({STEM: kernel}, {STEM: (5, 4, 4, 4, 4)}, channel_gains=gains)
    assert torch.allclose(
        response(state[STEM], image.expand(-1, 4, -1, -1, -1)), response(kernel, image), atol=1e-5
    )
    (change,) = report.adapted
    assert (change.before, change.after) == ("(5, 1, 4, 4, 4)", "(5, 4, 4, 4, 4)")
    assert "4 channels" in change.rule


def test_gains_of_the_first_channel_ignore_the_others(kernels):
    kernel, image = kernels
    state, report = fit({STEM: kernel}, {STEM: (5, 2, 4, 4, 4)}, channel_gains=(1, 0))
    noisy = torch.cat([image, torch.full_like(image, 1e3)], dim=1)
    assert torch.allclose(response(state[STEM], noisy), response(kernel, image), atol=1e-5)
    assert "gains (1, 0)" in str(report)


def test_several_channels_are_summed_into_one(generator):
    kernel = torch.randn(5, 3, 4, 4, 4, generator=generator)
    image = torch.randn(1, 1, 8, 8, 8, generator=generator)
    state, report = fit({STEM: kernel}, {STEM: (5, 1, 4, 4, 4)})
    expected = response(kernel, image.expand(-1, 3, -1, -1, -1))
    assert torch.allclose(response(state[STEM], image), expected, atol=1e-5)
    assert report.adapted[0].rule == "summed over 3 channels"


def test_the_stem_of_a_full_network_is_adapted_under_its_longer_name(kernels):
    name = ENCODER + STEM
    state, _ = fit({name: kernels[0]}, {name: (5, 4, 4, 4, 4)})
    assert torch.equal(state[name], kernels[0].expand(-1, 4, -1, -1, -1) / 4)


@pytest.mark.parametrize(
    ("have", "need", "gains", "remedy"),
    [
        (3, 4, None, "build it with in_chans=3"),
        (1, 4, (0.5, 0.5), "channel_gains has 2 entries"),
        (3, 3, (1, 0, 0), "gains spread one channel over in_chans"),
        (1, 2, (1, 1), "divide them by their sum"),
        (1, 2, (float("nan"), 1), "divide them by their sum"),
    ],
)
def test_contradictory_channels_are_refused(have, need, gains, remedy):
    with pytest.raises(CheckpointError, match=remedy):
        fit(
            {STEM: torch.ones(5, have, 4, 4, 4)},
            {STEM: (5, need, 4, 4, 4)},
            channel_gains=gains,
        )


# --- writing ---------------------------------------------------------------------------------


def test_what_was_written_is_read_back_bit_for_bit(tmp_path, full):
    mixed = {**full, "half": torch.ones(3).half(), "count": torch.tensor(3)}
    write(tmp_path / "a.safetensors", mixed, {"note": "hello"})
    tensors, metadata = read(tmp_path / "a.safetensors")
    assert same(tensors, mixed)
    assert {n: t.dtype for n, t in tensors.items()} == {n: t.dtype for n, t in mixed.items()}
    assert metadata["note"] == "hello"
    assert metadata["content_sha256"] == content_sha256(mixed)


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    write(tmp_path / "a.safetensors", {"a": base, "b": base[:, 1], "c": base.T}, {})
    tensors, _ = read(tmp_path / "a.safetensors")
    assert same(tensors, {"a": base, "b": base[:, 1], "c": base.T})


def test_the_content_hash_sees_names_shapes_formats_and_values():
    a = torch.arange(6.0)
    hashes = {
        content_sha256({"a": a}),
        content_sha256({"b": a}),
        content_sha256({"a": a.reshape(2, 3)}),
        content_sha256({"a": a.double()}),
        content_sha256({"a": a + 1}),
    }
    assert len(hashes) == 5
    assert content_sha256({"a": a, "b": a}) == content_sha256({"b": a, "a": a})


def test_an_existing_file_is_replaced_only_on_request(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"a": torch.zeros(1)}, {})
    with pytest.raises(FileExistsError, match="choose another name, or allow overwriting"):
        write(path, {"a": torch.ones(1)}, {})
    assert read(path)[0]["a"] == 0
    write(path, {"a": torch.ones(1)}, {}, overwrite=True)
    assert read(path)[0]["a"] == 1


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write(path, {"a": torch.zeros(1)}, {})

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(path, {"a": torch.ones(1)}, {}, overwrite=True)
    assert read(path)[0]["a"] == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_and_closed_before_it_gets_its_name(tmp_path, monkeypatch):
    opened, synced = [], []
    mkstemp, fsync, replace = tempfile.mkstemp, os.fsync, Path.replace

    def watched_mkstemp(**options):
        made = mkstemp(**options)
        opened.append(made[0])
        return made

    def watched_fsync(descriptor):
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)
        opened.append(descriptor)

    def watched_replace(draft, target):
        assert synced == [draft.stat().st_ino]
        for descriptor in opened:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)
        return replace(draft, target)

    monkeypatch.setattr(tempfile, "mkstemp", watched_mkstemp)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    assert read(tmp_path / "a.safetensors")[0]["a"] == 0


def test_a_written_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").touch()
    write(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("name", "error", "remedy"),
    [
        ("a.pth", ValueError, r"give it the ending \.safetensors"),
        ("none/a.safetensors", FileNotFoundError, "make it first"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(tmp_path, name, error, remedy):
    with pytest.raises(error, match=remedy):
        write(tmp_path / name, {"a": torch.zeros(1)}, {})


@pytest.mark.parametrize("wrapper", ["model.", "net.", "model.module.", "_orig_mod.network."])
@pytest.mark.parametrize("beside", [{}, {"criterion.weight": torch.ones(3)}])
@pytest.mark.parametrize("key", ["state_dict", "model", "net"])
def test_the_names_of_wrappers_are_taken_off(tmp_path, full, wrapper, beside, key):
    content = {key: {**{wrapper + n: t for n, t in full.items()}, **beside}, "epoch": 1}
    torch.save(content, tmp_path / "a.ckpt")
    tensors, _ = read(tmp_path / "a.ckpt")
    assert same(tensors, {**full, **beside})


def test_an_array_beside_the_tensors_is_not_run_and_not_read(tmp_path, full):
    content = {"model": full, "curve": np.arange(3.0), "weights": np.ones((2, 2), np.float32)}
    torch.save(content, tmp_path / "a.pth")
    assert same(read(tmp_path / "a.pth")[0], full)


@pytest.mark.parametrize("inner", ["data.pkl", "version", "byteorder"])
def test_an_archive_that_unpacks_to_more_than_it_is_is_refused_unread(tmp_path, full, inner):
    torch.save(full, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as source,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in source.namelist():
            padding = b"0" * 2**22 if name.endswith(inner) else b""
            bomb.writestr(name, source.read(name) + padding)
    with pytest.raises(CheckpointError, match="unpack"):
        read(tmp_path / "b.pth")


@pytest.mark.parametrize("shape", [(100_000, 100_000), (2**40,)])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path, shape, zipped):
    lying = {"a": torch.zeros(1).expand(*shape)}
    torch.save(lying, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="claims"):
        read(tmp_path / "a.pth")


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        read(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        locate(tmp_path / "w.safetensors")
