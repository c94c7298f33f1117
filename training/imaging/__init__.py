"""Steering: doses of features, and attributes, fitted, chosen and measured on a finished bundle."""
