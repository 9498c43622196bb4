"""The training's path on a GPU, run on fake tensors: one device throughout, and no needless waiting for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ppo_trajsep_lux.py"
FLAGS = "--map-size 24 --factories-per-team 1 --max-units 4 --channels 4 --num-envs 2 --num-steps 4 "
FLAGS += "--num-minibatches 2 --total-timesteps 16 --no-save-model"  # two iterations


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


def broken(folder, old, new):
    """A copy of the script with a fault in it."""
    source, path = SCRIPT.read_text(), folder / "faulty_lux.py"
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))
    return path


@pytest.mark.parametrize("flags", ["", "--bf16 --norm poster --num-groups 2", "--opponent self --target-kl 9"])
def test_training_stays_on_the_device(tmp_path, flags):
    status, syncs, output = train(SCRIPT, tmp_path, flags)
    assert status == 0, output
    assert "parameters on gpu" in output
    source = SCRIPT.read_text()
    rollout = part(source, "rollout", "trajectories")
    assert [count for line, count in syncs.items() if line in rollout] == [8]  # the actions of each step
    assert not [line for line in syncs if line in part(source, "trajectories", "update")]
    # only --target-kl has to look at a number, once an epoch
    in_update = [count for line, count in syncs.items() if line in part(source, "update", "logging")]
    assert in_update == ([2 * 3] if "target-kl" in flags else [])


def test_a_tensor_left_on_the_cpu_is_found(tmp_path):
    path = broken(tmp_path, "entity_reward = torch.zeros(shape).to(device)", "entity_reward = torch.zeros(shape)")
    status, _, output = train(path, tmp_path)
    assert status != 0 and "on the same device" in output


def test_a_host_sync_in_the_update_is_found(tmp_path):
    path = broken(
        tmp_path, '["value_loss"].append(v_loss.detach())', '["value_loss"].append(v_loss.mul(v_loss.item()))'
    )
    status, syncs, output = train(path, tmp_path)
    assert status == 0, output
    update = part(path.read_text(), "update", "logging")
    assert [count for line, count in syncs.items() if line in update] == [2 * 3 * 2]
