"""The figure of synthetic volumes."""

from sammed3d_backbone.recipes.studies import preview_synthetic
from sammed3d_backbone.recipes.studies.preview_synthetic import Config


def test_the_figure_shows_the_volumes_that_were_asked_for(tmp_path):
    out = tmp_path / "new" / "preview.png"
    preview_synthetic.main(out, Config(side_vox=24, volumes=1, structures=(2, 3)))
    one = out.read_bytes()
    preview_synthetic.main(out, Config(side_vox=24, volumes=1, structures=(2, 3), seed=1))
    assert one.startswith(b"\x89PNG")
    assert out.read_bytes() != one
