"""Images of other libraries carry their affine; the predictor takes it from them."""

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.validation import validate_volume

AFFINE = np.array([[0, -1.5, 0, 4], [0.7, 0, 0, -3], [0, 0, 3, 9], [0, 0, 0, 1.0]])
ARRAY = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


class OfTorchIO:
    """What TorchIO's ScalarImage has."""

    data, affine = ARRAY[None], AFFINE


@pytest.mark.parametrize(
    "image",
    [
        nib.Nifti1Image(ARRAY, AFFINE),
        nib.Nifti2Image(ARRAY[..., None], AFFINE),
        nib.Spm99AnalyzeImage(ARRAY, AFFINE),
        MetaTensor(ARRAY[None], affine=AFFINE),
        MetaTensor(ARRAY, affine=AFFINE),
        OfTorchIO(),
    ],
    ids=lambda image: type(image).__name__,
)
def test_an_image_with_an_affine_is_taken_as_it_is(image):
    volume = validate_volume(image).volume
    assert np.array_equal(volume.array, ARRAY)
    assert np.allclose(volume.affine, AFFINE)
    with pytest.raises(TypeError, match="affine"):
        validate_volume(image, np.eye(4))


def test_channels_of_others_are_channels():
    both = np.stack([ARRAY, ARRAY + 1])
    for image in (
        nib.Nifti1Image(np.moveaxis(both, 0, -1), AFFINE),
        MetaTensor(both, affine=AFFINE),
        Volume(both, AFFINE),
    ):
        assert np.array_equal(validate_volume(image, channel=1).volume.array, ARRAY + 1)
