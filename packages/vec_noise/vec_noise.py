"""2-D simplex noise in plain numpy: the one function of `vec-noise` that luxai-s2 calls.

luxai-s2 requires the C extension `vec-noise`, which neither builds under PEP 517 nor compiles
against numpy 2. This module stands in for it and gives the official maps.

Algorithm: Perlin's simplex noise as described in S. Gustavson, "Simplex noise demystified"
(2005), with Perlin's published permutation (Improved Noise reference implementation, 2002) and
octaves added as fractal Brownian motion. All arithmetic is float32, as in the C extension,
because luxai-s2 thresholds the noise and a last digit can decide over a tile.
"""

import numpy as np

__all__ = ["snoise2"]

# fmt: off
PERMUTATION = np.array([
    151, 160, 137, 91, 90, 15, 131, 13, 201, 95, 96, 53, 194, 233, 7, 225, 140, 36, 103, 30, 69, 142,
    8, 99, 37, 240, 21, 10, 23, 190, 6, 148, 247, 120, 234, 75, 0, 26, 197, 62, 94, 252, 219, 203, 117,
    35, 11, 32, 57, 177, 33, 88, 237, 149, 56, 87, 174, 20, 125, 136, 171, 168, 68, 175, 74, 165, 71,
    134, 139, 48, 27, 166, 77, 146, 158, 231, 83, 111, 229, 122, 60, 211, 133, 230, 220, 105, 92, 41,
    55, 46, 245, 40, 244, 102, 143, 54, 65, 25, 63, 161, 1, 216, 80, 73, 209, 76, 132, 187, 208, 89,
    18, 169, 200, 196, 135, 130, 116, 188, 159, 86, 164, 100, 109, 198, 173, 186, 3, 64, 52, 217, 226,
    250, 124, 123, 5, 202, 38, 147, 118, 126, 255, 82, 85, 212, 207, 206, 59, 227, 47, 16, 58, 17, 182,
    189, 28, 42, 223, 183, 170, 213, 119, 248, 152, 2, 44, 154, 163, 70, 221, 153, 101, 155, 167, 43,
    172, 9, 129, 22, 39, 253, 19, 98, 108, 110, 79, 113, 224, 232, 178, 185, 112, 104, 218, 246, 97,
    228, 251, 34, 242, 193, 238, 210, 144, 12, 191, 179, 162, 241, 81, 51, 145, 235, 249, 14, 239, 107,
    49, 192, 214, 31, 181, 199, 106, 157, 184, 84, 204, 176, 115, 121, 50, 45, 127, 4, 150, 254, 138,
    236, 205, 93, 222, 114, 67, 29, 24, 72, 243, 141, 128, 195, 78, 66, 215, 61, 156, 180,
])
# fmt: on
# The 12 gradients point at a cube's edge midpoints; 2-D noise uses their x and y.
GRADIENTS = np.array(
    [[1, 1], [-1, 1], [1, -1], [-1, -1], [1, 0], [-1, 0], [1, 0], [-1, 0], [0, 1], [0, -1], [0, 1], [0, -1]],
    dtype=np.float32,
)
SKEW = np.float32(0.3660254037844386)  # (sqrt(3) - 1) / 2: squares to pairs of triangles
UNSKEW = np.float32(0.21132486540518713)  # (3 - sqrt(3)) / 6: and back


def _noise2(x, y):
    """One octave at float32 arrays `x`, `y` of one shape; float32 of that shape, about [-1, 1]."""
    skew = (x + y) * SKEW
    i, j = np.floor(x + skew), np.floor(y + skew)
    unskew = (i + j) * UNSKEW
    x0, y0 = x - (i - unskew), y - (j - unskew)  # distance from the cell's first corner
    lower = x0 > y0  # which of the cell's two triangles
    cell_i, cell_j = i.astype(np.int64) & 255, j.astype(np.int64) & 255

    total = np.zeros_like(x)
    two_unskew = UNSKEW * np.float32(2)
    one = np.float32(1)
    for step_i, step_j, dx, dy in (
        (0, 0, x0, y0),
        (lower, ~lower, x0 - lower.astype(np.float32) + UNSKEW, y0 - (~lower).astype(np.float32) + UNSKEW),
        (1, 1, x0 + two_unskew - one, y0 + two_unskew - one),
    ):
        row = PERMUTATION[(cell_j + step_j) & 255]
        gradient = GRADIENTS[PERMUTATION[(cell_i + step_i + row) & 255] % 12]
        reach = np.float32(0.5) - dx * dx - dy * dy
        falloff = reach * reach * reach * reach
        corner = falloff * (gradient[..., 0] * dx + gradient[..., 1] * dy)
        total += np.where(reach > 0, corner, np.float32(0))
    return total * np.float32(70)


def snoise2(x, y, octaves=1, persistence=0.5, lacunarity=2.0, repeatx=None, repeaty=None, base=0.0):
    """2-D simplex noise with fractal octaves, element by element.

    Args:
        x, y: arrays (or numbers) of one shape, in cells of the noise lattice; taken as float32.
        octaves: how many layers are added, at least 1.
        persistence: amplitude of each layer relative to the one before.
        lacunarity: frequency of each layer relative to the one before.
        repeatx, repeaty, base: accepted only at their defaults (luxai-s2 never sets them).

    Returns:
        float32 array of the inputs' shape, about [-1, 1].

    Raises:
        ValueError: octaves below 1, or x and y of different shapes.
        NotImplementedError: repeatx, repeaty or base set.
    """
    if repeatx is not None or repeaty is not None or base != 0.0:
        raise NotImplementedError(
            "snoise2: repeatx, repeaty and base are not supported by this numpy stand-in; leave them at their defaults."
        )
    if int(octaves) != octaves or octaves < 1:
        raise ValueError(f"snoise2: octaves must be a whole number of at least 1, got {octaves}.")
    x, y = np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.float32)
    if x.shape != y.shape:
        raise ValueError(f"snoise2: x and y must have one shape, got {x.shape} and {y.shape}.")
    total, frequency, amplitude, most = np.zeros_like(x), np.float32(1), np.float32(1), np.float32(0)
    for _ in range(int(octaves)):
        total = total + _noise2(x * frequency, y * frequency) * amplitude
        most += amplitude
        frequency *= np.float32(lacunarity)
        amplitude *= np.float32(persistence)
    return total / most
