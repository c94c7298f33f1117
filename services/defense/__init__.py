"""Adversarial images: telling them from clean ones, and filtering what an attack moved out of their embeddings.

`screen` does all of it for one batch; the other modules are its parts, one formula a function. Nothing here needs
torch but `services.defense.smoothing`, which runs beside the towers.
"""

from services.defense.calibration import DefenseCalibration
from services.defense.detector import Detector
from services.defense.features import FeatureStatistics, Look, Reason
from services.defense.filtering import FilterChoice, FilterMode
from services.defense.screen import Screened, screen

__all__ = [
    "DefenseCalibration",
    "Detector",
    "FeatureStatistics",
    "FilterChoice",
    "FilterMode",
    "Look",
    "Reason",
    "Screened",
    "screen",
]
