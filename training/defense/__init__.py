"""Attacks on the image tower, the detector's calibration, and the study of what the defence is worth."""
