"""The promptable model on volumes: clicks in, masks on the volume's own grid out."""

from sammed3d_backbone.predictor.merging import merge
from sammed3d_backbone.predictor.prediction import Prediction
from sammed3d_backbone.predictor.session import Predictor

__all__ = ["Prediction", "Predictor", "merge"]
