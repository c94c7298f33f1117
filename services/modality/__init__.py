"""Which modality a feature is about: scores, intervals, significance, labels and names, and the tables of them.

`services.modality.table.score_pairs` does all of it for activations over image-text pairs; the other functions are
its parts, one equation each. Nothing is imported here: the gateway reads the tables and must not load scipy.
"""
