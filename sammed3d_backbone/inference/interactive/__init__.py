"""The promptable model on volumes: clicks in, masks on the volume's own grid out."""

from sammed3d_backbone.inference.interactive.prediction import Prediction
from sammed3d_backbone.inference.interactive.predictor import Predictor

__all__ = ["Prediction", "Predictor"]
