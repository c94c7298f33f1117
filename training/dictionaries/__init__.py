"""The dictionaries: training every kind, measuring them, choosing size and default."""
