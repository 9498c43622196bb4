"""The training's path on a GPU, run on fake tensors: one device throughout, and no needless waiting for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ppo_trajsep_lux.py"
FLAGS = "--map-size 24 --factories-per-team 1 --max-units 4 --channels 4 --num-envs 2 --num-steps 4 "
FLAGS += "--num-minibatches 2 --total-timesteps 16 --run-name test"  # two iterations


def train(path, folder, flags=""):
    """Exit status, the host syncs as {line of the script: count}, and what went wrong."""
    command = [sys.executable, str(ROOT / "tests/fake_gpu.py"), str(path), *FLAGS.split(), *flags.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    rows = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else []
    return done.returncode, {row["line"]: row["count"] for row in rows}, done.stdout + done.stderr


def part(source, banner, end):
    """Line numbers between two comments."""
    lines = source.splitlines()
    return range(lines.index(f"        # ---- {banner}"), lines.index(f"        # ---- {end}"))


def broken(folder, *faults):
    """A copy of the script with faults in it: (old text, new text)."""
    source, path = SCRIPT.read_text(), folder / "faulty_lux.py"
    for old, new in faults:
        assert source.count(old) == 1
        source = source.replace(old, new)
    path.write_text(source)
    return path


@pytest.mark.parametrize("flags", ["--bf16 --num-groups 2", "--no-bf16 --opponent self"])
def test_training_stays_on_the_device(tmp_path, flags):
    """From the first observation to the last checkpoint; the CPU waits for actions, and for numbers at the end."""
    status, syncs, output = train(SCRIPT, tmp_path, flags)
    assert status == 0, output
    assert "parameters on gpu" in output
    assert {"model.pt", "checkpoint.pt", "previous.pt"} <= {file.name for file in tmp_path.glob("runs/test/*")}
    source = SCRIPT.read_text()
    rollout = part(source, "rollout", "trajectories")
    assert [count for line, count in syncs.items() if line in rollout] == [8]  # the actions of each step
    assert not [line for line in syncs if line in part(source, "trajectories", "logging")]
    assert [line for line in syncs if line in part(source, "logging", "saving, the checkpoint last")]


def test_a_tensor_left_on_the_cpu_is_found(tmp_path):
    path = broken(tmp_path, ("torch.zeros(3, *shape, device=device)", "torch.zeros(3, *shape)"))
    status, _, output = train(path, tmp_path)
    assert status != 0 and "on the same device" in output


def test_a_host_sync_is_found(tmp_path):
    path = broken(
        tmp_path,
        ("        group = group_index(", "        assert entity_mask.any()\n        group = group_index("),
        ("loss.backward()", "(loss * loss.item()).backward()"),
    )
    status, syncs, output = train(path, tmp_path)
    assert status == 0, output
    source = path.read_text()
    assert [count for line, count in syncs.items() if line in part(source, "trajectories", "update")] == [2]
    assert [count for line, count in syncs.items() if line in part(source, "update", "logging")] == [2 * 3 * 2]
