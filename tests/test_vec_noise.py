"""The numpy stand-in for vec-noise gives the official noise and the official maps."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from luxai_s2.env import LuxAI_S2
from vec_noise import snoise2

REFERENCE = Path(__file__).parent / "reference"  # made with the C extension vec-noise 1.1.4
MAP_HASHES = json.loads((REFERENCE / "map_hashes.json").read_text())


def test_noise_equals_the_c_extension():
    data = np.load(REFERENCE / "snoise2.npz")
    compared = 0
    for key in data:
        name, _, octaves = key.partition("_octaves")
        if octaves:
            noise = snoise2(data[f"{name}_x"], data[f"{name}_y"], octaves=int(octaves))
            assert noise.dtype == np.float32
            np.testing.assert_allclose(noise, data[key], rtol=0, atol=1e-6)
            compared += 1
    assert compared == 5


@pytest.mark.parametrize("name", MAP_HASHES)
def test_official_map(name):
    size, seed = map(int, name.split("/"))
    env = LuxAI_S2(map_size=size)
    env.reset(seed=seed)
    board = env.state.board
    content = b"".join(layer.astype("<i4").tobytes() for layer in (board.rubble, board.ice, board.ore))
    assert f"{hashlib.sha256(content).hexdigest()[:16]}/{board.factories_per_team}" == MAP_HASHES[name]


def test_unsupported_arguments_say_so():
    x = np.zeros((2, 2))
    with pytest.raises(NotImplementedError, match="not supported"):
        snoise2(x, x, repeatx=4)
    with pytest.raises(NotImplementedError, match="not supported"):
        snoise2(x, x, base=1.0)
    with pytest.raises(ValueError, match="octaves"):
        snoise2(x, x, octaves=0)
    with pytest.raises(ValueError, match="one shape"):
        snoise2(x, np.zeros(3))
