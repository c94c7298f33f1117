"""Tests that share one service on a tiny bundle with every calibration and a pipeline."""
