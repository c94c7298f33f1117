"""Dictionaries: a tower's embedding as activations of features, behind one interface.

Importing this package registers every kind.
"""

from services.dictionaries.base import (
    Dictionary,
    Modality,
    SparseRow,
    dictionary_kinds,
    load_dictionary,
    sparse_rows,
)
from services.dictionaries.ncl import NCL
from services.dictionaries.neurons import Neurons
from services.dictionaries.pair import SAEPair, match_features
from services.dictionaries.sae import SAE, topk_relu

__all__ = [
    "NCL",
    "SAE",
    "Dictionary",
    "Modality",
    "Neurons",
    "SAEPair",
    "SparseRow",
    "dictionary_kinds",
    "load_dictionary",
    "match_features",
    "sparse_rows",
    "topk_relu",
]
