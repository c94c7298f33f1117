"""The gender subspace of counterparts: the same subject by the same hand, once as a woman and once as a man.

Source: Bolukbasi et al., "Man is to Computer Programmer as Woman is to Homemaker? Debiasing Word Embeddings"
(NeurIPS 2016), section 6: the first principal components of differences within pairs, projected out ("hard
debiasing"). A difference of class means also holds whatever else the women and the men of a corpus differ in, such
as who drew them and what they do; a difference within a pair does not.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

# Directions that are tried.
SUBSPACES = (1, 2, 4)


def differences(
    e: Float[np.ndarray, "n d"], woman: Bool[np.ndarray, " n"], subject: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "pairs d"]:
    """Return mean(women) - mean(men) of every subject of which there are both, float64.

    Parameters
    ----------
    e : float array, shape (N, d)
        Embeddings of one modality.
    woman : bool array, shape (N,)
        Whether each shows a woman, not a man.
    subject : int array, shape (N,)
        The same number for items that differ in gender alone.
    """
    found = []
    for name in np.unique(subject):
        women, men = (subject == name) & woman, (subject == name) & ~woman
        if women.any() and men.any():
            found.append(e[women].mean(0, dtype=np.float64) - e[men].mean(0, dtype=np.float64))
    return np.array(found).reshape(len(found), e.shape[1])


def subspace(
    e: Float[np.ndarray, "n d"],
    woman: Bool[np.ndarray, " n"],
    subject: Int[np.ndarray, " n"],
    size: int = max(SUBSPACES),
) -> Float[np.ndarray, "size d"]:
    """Return the `size` orthonormal directions that hold most of the differences of counterparts, float32.

    Fewer where there are fewer pairs. Parameters as for `differences`, whose centred pairs they are the principal
    components of: a pair about its own mean is plus and minus half its difference.
    """
    axes = np.linalg.svd(differences(e, woman, subject), full_matrices=False)[2]
    directions: Float[np.ndarray, "size d"] = axes[:size].astype(np.float32)
    return directions
