"""Stored answers of a teacher: files, and the samples that are made of them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from sammed3d_backbone.pretraining.answers import Answers, AnswerStream, objects_in, write_answer
from sammed3d_backbone.pretraining.teacher import Answer

SIDE = 16


@pytest.fixture
def stored(tmp_path):
    """Writes an answer with masks and labels."""

    def write(masks=2, values=(1, 2)):
        labels = torch.zeros(SIDE, SIDE, SIDE, dtype=torch.int16)
        for value in values:
            labels[4 * value : 4 * value + 3] = value
        logits = torch.full((masks, 8, 8, 8), -1.0)
        logits[:, :4, :, :] = 1
        path = tmp_path / "a.safetensors"
        answer = Answer(
            torch.randn(SIDE, SIDE, SIDE).half(),
            labels,
            torch.randn(5, 2, 2, 2).half(),
            logits.half(),
            torch.zeros(masks, 3, dtype=torch.int16),
        )
        write_answer(path, answer, smallest_vox=10)
        return path

    return write


def stream(path, **changes):
    options = {"objects": 4, "steps": 2, "samples": 3, "seed": (0,), "smallest_vox": 10} | changes
    return AnswerStream([Answers("a", (path,))], [1.0], **options)


def test_files_say_how_many_objects_they_hold(stored, tmp_path):
    assert objects_in(stored()) == 4
    assert objects_in(stored(masks=0, values=())) == 0
    assert objects_in(tmp_path / "missing.safetensors") is None
    (tmp_path / "cut.safetensors").write_bytes(stored().read_bytes()[:40])
    assert objects_in(tmp_path / "cut.safetensors") is None


@pytest.mark.parametrize(
    ("masks", "values", "label_share", "labelled"),
    [(2, (1, 2), 0.5, 2), (2, (1, 2), 1.0, 2), (2, (1,), 0.5, 1), (0, (1,), 0.0, 4), (2, (), 1, 0)],
)
def test_samples_mix_masks_and_labels(stored, masks, values, label_share, labelled):
    sample = stream(stored(masks, values), label_share=label_share)[0]
    objects = sample["objects"]
    assert objects.shape == (4, SIDE, SIDE, SIDE)
    sizes = objects.flatten(1).sum(1)
    assert (sizes == 3 * SIDE**2).sum() == labelled
    assert sizes.min() > 0
    assert sample["embedding"].dtype == torch.float32


def test_samples_are_functions_of_their_number(stored):
    one, two = stream(stored(), contrast_share=0.5), stream(stored(), contrast_share=0.5)
    two[2]
    assert all(torch.equal(tensor, two[1][name]) for name, tensor in one[1].items())


def test_a_file_that_lacks_a_tensor_is_made_again(stored):
    path = stored()
    tensors = load_file(path)
    del tensors["logits"]
    save_file(tensors, path, {"objects": "4"})
    assert objects_in(path) is None


@pytest.mark.parametrize("part", ["image", "embedding", "logits"])
def test_a_file_with_values_that_are_not_finite_is_named(stored, part):
    path = stored()
    tensors = load_file(path)
    tensors[part][0, 0, 0] = float("nan")
    save_file(tensors, path, {"objects": "4"})
    with pytest.raises(ValueError, match=path.name):
        stream(path)[0]


def test_answers_that_are_not_finite_are_not_kept(stored):
    path = stored()
    answer = Answer(**load_file(path))
    path.unlink()
    with pytest.raises(ValueError, match="teacher="):
        write_answer(path, answer._replace(embedding=answer.embedding / 0), smallest_vox=10)
    assert not path.exists()


def test_a_file_that_is_cut_while_it_is_in_use_is_named(stored):
    path = stored()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=path.name):
        stream(path)[0]
