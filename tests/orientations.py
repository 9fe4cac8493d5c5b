"""The 48 ways in which the axes of a source may point."""

from itertools import permutations, product

import numpy as np
from nibabel.orientations import axcodes2ornt

CODES = ["".join(codes) for axes in permutations(("LR", "PA", "IS")) for codes in product(*axes)]
SPACING_MM = (0.7, 1.1, 2.5)  # along the source's own axes


def oblique_affine(codes):
    """An affine whose axes point as `codes` say, turned by a few degrees, with edges of `SPACING_MM`."""
    ornt = axcodes2ornt(codes)
    matrix = np.zeros((3, 3))
    for axis, (world, flip) in enumerate(ornt):
        matrix[int(world), axis] = flip * SPACING_MM[axis]
    angle = np.radians(6)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ matrix
    affine[:3, 3] = (-31, 12, 5.5)
    return affine
