"""Bad input: what is said, and that nothing is lost. The rows are in refused_inputs.py."""

import re

import numpy as np
import pytest
import refused_inputs
import torch
from refused_inputs import AFFINE, GRID
from standin import StandIn

from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.loading.factory import sam


def by_what(row):
    return row.what


@pytest.mark.parametrize("row", refused_inputs.VOLUMES, ids=by_what)
def test_a_volume_that_cannot_be_used_is_refused_and_the_last_one_stays(predictor, balls, row):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    with pytest.raises(row.kind, match=re.escape(row.said)):
        predictor.set_volume(*row.given)
    assert predictor.predict().mask.shape == balls[0].shape


@pytest.mark.parametrize("row", refused_inputs.CLICKS, ids=by_what)
def test_a_click_that_cannot_be_meant_is_refused_and_the_others_stay(predictor, balls, row):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    before = predictor.predict().mask
    with pytest.raises(row.kind, match=re.escape(row.said)):
        predictor.click(**row.given)
    assert np.array_equal(predictor.predict().mask, before)


@pytest.mark.parametrize("row", refused_inputs.MASKS, ids=by_what)
def test_a_mask_prompt_that_cannot_be_used_is_refused(predictor, row):
    predictor.set_volume(GRID, AFFINE)
    with pytest.raises(row.kind, match=re.escape(row.said)):
        predictor.mask_prompt(**row.given)
    assert predictor.objects == []


@pytest.mark.parametrize("row", refused_inputs.FILES, ids=by_what)
def test_the_command_refuses_a_bad_file_and_writes_nothing(tmp_path, row):
    code, said = refused_inputs.run_file(row, tmp_path)
    assert code == 2
    assert row.said in said
    assert not (tmp_path / "out.nii.gz").exists()


@pytest.mark.parametrize("row", refused_inputs.COMMANDS, ids=by_what)
def test_the_command_refuses_what_it_cannot_do_and_writes_nothing(tmp_path, row):
    code, said = refused_inputs.run_command(row, tmp_path)
    assert code == 2
    assert row.said in said
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"in.nii.gz", "fig.png", "web.pth", "list.json", "folder.nii.gz"}
    assert (tmp_path / "fig.png").read_text() == "precious"


@pytest.mark.parametrize("row", refused_inputs.IN_THE_WAY, ids=by_what)
def test_the_command_overwrites_nothing_unasked(tmp_path, row):
    code, said = refused_inputs.run_command(row, tmp_path)
    assert code == 2
    assert row.said in said
    out, source = tmp_path / "out.nii.gz", tmp_path / "in.nii.gz"
    assert out.read_bytes() in (b"precious", source.read_bytes())


@pytest.mark.parametrize("row", refused_inputs.NOTES, ids=by_what)
def test_what_is_odd_without_being_wrong_is_segmented_with_a_note(row):
    assert row.said in refused_inputs.noted(row.given)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, ">i2", ">f4"])
def test_every_type_of_number_is_taken(dtype):
    assert refused_inputs.noted((refused_inputs.balls().astype(dtype), {})) == ""


def test_paths_may_hold_any_letters(tmp_path):
    folder = tmp_path / "mäßig groß 体积"
    folder.mkdir()
    row = refused_inputs.Row("", "in.nii.gz über.nii.gz --point 22,40,36", "")
    assert refused_inputs.run_command(row, folder)[0] == 0
    assert (folder / "über.nii.gz").is_file()


def test_an_unknown_modality_is_refused(predictor):
    with pytest.raises(ValueError, match="modality"):
        predictor.set_volume(GRID, AFFINE, modality="pet")


def test_a_click_may_contradict_another_objects(predictor, balls):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36), object="left")
    predictor.click((36, 54, 36), object="right")
    predictor.click((22, 40, 36), positive=False, object="right")
    assert predictor.predict("right").mask.any()


def test_a_click_is_the_voxel_that_it_lies_in(predictor, balls):
    predictor.set_volume(balls[0])
    predictor.click((22.4, 39.6, 36.0))
    with pytest.raises(ValueError, match=r"\(22, 40, 36\)"):
        predictor.click((22, 40, 36), False)


@pytest.mark.parametrize("call", [("click",), ("mask_prompt", GRID), ("predict",)], ids=str)
def test_without_a_volume_there_is_nothing_to_do(predictor, call):
    name, *given = call
    with pytest.raises(ValueError, match="set_volume"):
        getattr(predictor, name)(*given)


def test_without_a_positive_click_there_is_no_answer(predictor, balls):
    predictor.set_volume(balls[0])
    with pytest.raises(ValueError, match="click"):
        predictor.predict()
    predictor.click((22, 40, 36), False)
    with pytest.raises(ValueError, match="'object'"):
        predictor.predict()
    with pytest.raises(ValueError, match="'liver'"):
        predictor.predict("liver")


@pytest.mark.parametrize(
    ("name", "value"), [("clicks", "last"), ("max_windows", 0)], ids=["clicks", "max_windows"]
)
def test_settings_have_ranges_whenever_they_are_set(predictor, model, balls, name, value):
    with pytest.raises(ValueError, match=name):
        Predictor(model, **{name: value})
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    setattr(predictor, name, value)
    with pytest.raises(ValueError, match=name):
        predictor.predict()


@pytest.mark.parametrize("model", [None, "tiny", torch.nn.Linear(2, 2), StandIn], ids=str)
def test_what_is_not_a_promptable_network_is_refused(model):
    with pytest.raises(TypeError, match="promptable network"):
        Predictor(model)


@pytest.mark.parametrize("number_format", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_in_another_number_format_is_refused(number_format):
    with pytest.raises(ValueError, match="float32"):
        Predictor(sam("tiny", pretrained=False, img_size=16).to(number_format))


@pytest.mark.parametrize("given", ["3", 2.5, None, float("nan"), 0])
def test_a_number_of_windows_that_is_none_is_refused(model, given):
    with pytest.raises(ValueError, match="max_windows"):
        Predictor(model, max_windows=given)


def test_a_long_list_for_a_point_makes_a_short_message(predictor):
    predictor.set_volume(GRID, AFFINE)
    with pytest.raises(ValueError, match="point_vox") as caught:
        predictor.click(range(100_000))
    assert len(str(caught.value)) < 200


def test_points_affines_and_volumes_may_be_tensors_in_training(predictor):
    volume = torch.from_numpy(GRID).bfloat16().requires_grad_()
    predictor.set_volume(volume, torch.from_numpy(AFFINE).requires_grad_())
    predictor.click(torch.ones(3, requires_grad=True))
    assert predictor.predict().mask.shape == GRID.shape


def test_an_object_named_by_a_number_is_found_by_it(predictor, balls):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36), object=3)
    assert predictor.clicks_on(3) == predictor.clicks_on("3") != []
    assert predictor.stability(3, trials=1) > 0


def test_the_callers_autocast_does_not_change_a_mask():
    predictor = Predictor(sam("tiny", pretrained=False, img_size=16))
    predictor.set_volume(GRID, AFFINE)
    predictor.click((2, 3, 4))
    expected = predictor.predict()
    predictor.set_volume(GRID, AFFINE)
    predictor.click((2, 3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        found = predictor.predict()
    assert np.array_equal(found.mask, expected.mask)
