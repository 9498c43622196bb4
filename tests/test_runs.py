"""Every script but the original, started as a user would start it: two iterations, and its policy evaluated."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--map-size 24 --factories-per-team 1 --max-units 8 --channels 4 --num-envs 2 --num-steps 32 "
FLAGS += "--num-minibatches 2 --update-epochs 1 --total-timesteps 128 --run-name test"
EVALUATE = "--evaluate runs/test/model.pt --eval-episodes 1 --num-envs 1"


def start(script, folder, flags):
    """What a script prints."""
    command = [sys.executable, str(ROOT / script), *flags.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def progress(folder):
    """The rows of progress.csv."""
    with open(folder / "runs/test/progress.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "script, flags",
    [
        ("ippo_lux.py", ""),
        ("mappo_lux.py", "--opponent self"),
        ("ppo_global_lux.py", ""),
        ("ablations/trajsep_global_critic_lux.py", ""),
        ("ablations/trajsep_own_reward_lux.py", "--own-reward 0.5"),
        ("ablations/trajsep_mixed_lux.py", "--no-separate-factories"),
        ("ablations/trajsep_grouping_lux.py", "--grouping closest-heavy"),
        ("ablations/trajsep_sample_reduction_lux.py", "--keep top-advantage"),
        ("ablations/trajsep_sample_reduction_lux.py", "--keep top-advantage --no-reduce-values"),
    ],
)
def test_each_script_trains_and_evaluates(tmp_path, script, flags):
    start(script, tmp_path, f"{FLAGS} {flags}")
    table = start(script, tmp_path, EVALUATE)
    assert table.count("\n| sampled |") == table.count("\n| greedy |") == 1
    rows = progress(tmp_path)
    assert [row["global_step"] for row in rows] == ["64", "128"]
    for row in rows:
        assert all(np.isfinite(float(row[key])) for key in row if key.startswith("losses/"))
        assert float(row["losses/grad_norm"]) > 0
    if "sample_reduction" in script:  # the factory acts in every step; the first unit comes in the second
        cells = [float(row["charts/active_cells"]) for row in rows]
        assert all(n > 1 for n in cells) if "no-reduce" in flags else all(0 < n <= 1 for n in cells)


def test_as_many_samples_as_groups_are_the_parent_to_the_bit(tmp_path):
    curves = []
    for script, flags in (
        ("ppo_trajsep_lux.py", ""),
        ("ablations/trajsep_sample_reduction_lux.py", "--keep top-return --samples-per-step 9"),
    ):
        folder = tmp_path / script.replace("/", "-")
        folder.mkdir()
        start(script, folder, f"{FLAGS} {flags}")
        timing = ("charts/seconds", "charts/SPS", "charts/rollout_seconds", "charts/update_seconds")
        curves.append([{key: row[key] for key in row if key not in timing} for row in progress(folder)])
    assert curves[0] == curves[1] and len(curves[0]) == 2
