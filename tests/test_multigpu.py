"""Training on several ranks (gloo on CPUs): the update of one process, resume, and what a rank's death does."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ONE, TWO = ROOT / "ppo_trajsep_lux.py", ROOT / "ablations/trajsep_multigpu_lux.py"
FLAGS = "--map-size 24 --factories-per-team 1 --max-units 8 --channels 4 --num-envs 4 --num-steps 32 "
FLAGS += "--num-minibatches 2 --no-cuda --run-name test"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
TIMES = ("charts/seconds", "charts/SPS", "charts/rollout_seconds", "charts/update_seconds")


def start(script, folder, port, flags="", **kwargs):
    """A run in a folder, on two ranks where a port is given."""
    folder.mkdir(exist_ok=True)
    command = [*TORCHRUN, str(port)] if port else [sys.executable]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(script), *FLAGS.split(), *flags.split()], cwd=folder, env=env, **kwargs)


def rows(folder):
    path = folder / "runs/test/progress.csv"
    with open(path) as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def weights(folder):
    return torch.load(folder / "runs/test/model.pt", weights_only=True)["model"]


def test_two_ranks_make_the_update_of_one_process(tmp_path):
    """With actions and minibatches that chance has no part in, weights agree within float32's rounding."""
    folders = []
    for script, port in ((ONE, None), (TWO, 29611)):
        source = script.read_text()
        for old, new in (
            ("distribution.sample()", "distribution.probs.argmax(-1)"),
            ("torch.randperm(args.batch_size, device=device)", "torch.arange(args.batch_size)"),
        ):
            assert source.count(old) == 1
            source = source.replace(old, new)
        copy = tmp_path / script.name
        copy.write_text(source)
        folders.append(tmp_path / script.stem)
        assert start(copy, folders[-1], port, "--total-timesteps 384 --no-augment").wait(300) == 0
    one, two = map(weights, folders)
    begun = torch.load(folders[0] / "runs/test/previous.pt", weights_only=True)["model"]
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
    assert any((one[name] - begun[name]).abs().max() > 1e-4 for name in one)  # the updates were larger than that
    for left, right in zip(*map(rows, folders), strict=True):
        for name in ("losses/policy_loss", "losses/value_loss", "losses/entropy", "charts/active_cells"):
            assert float(left[name]) == pytest.approx(float(right[name]), rel=1e-3, abs=1e-6)
        assert left["global_step"] == right["global_step"] and left["charts/episodes"] == right["charts/episodes"]


def test_a_killed_rank_ends_all_and_the_run_goes_on(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(TWO, whole, 29612, "--total-timesteps 640").wait(300) == 0
    run = start(TWO, cut, 29613, "--total-timesteps 640", stderr=subprocess.PIPE, text=True)
    while not (cut / "runs/test/checkpoint.pt").exists():
        assert run.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    done = torch.load(cut / "runs/test/checkpoint.pt", weights_only=True)["iteration"]
    assert 1 <= done < 5, errors
    others = start(TWO, cut, None, "--total-timesteps 640 --resume", stderr=subprocess.PIPE, text=True)
    assert "torchrun" in others.communicate(timeout=120)[1] and others.returncode == 1
    assert start(TWO, cut, 29614, "--total-timesteps 640 --resume").wait(300) == 0
    assert rows(cut) == rows(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(cut)[name])
    again = start(TWO, cut, 29615, "--resume", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert len(re.findall("is finished", again.communicate(timeout=120)[0])) == 2 and again.returncode == 0


def test_a_ranks_part_must_fit_the_minibatches(tmp_path):
    """The maps of a rollout divide by 16, those of each rank do not."""
    flags = "--num-steps 20 --num-minibatches 16 --total-timesteps 160"
    run = start(TWO, tmp_path, 29616, flags, stderr=subprocess.PIPE, text=True)
    assert "--num-minibatches must divide the 40 maps" in run.communicate(timeout=120)[1] and run.returncode != 0
    assert not (tmp_path / "runs").exists()


def test_ranks_that_see_different_checkpoints_are_refused(tmp_path):
    """Two machines whose runs/ is not the same: one would go on, the other begin."""
    assert start(TWO, tmp_path / "0", 29617, "--total-timesteps 256").wait(300) == 0
    (tmp_path / "0/runs/test/checkpoint.pt").unlink()  # the one before is of step 128
    (tmp_path / "1").mkdir()
    ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29618", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TWO), *FLAGS.split(), "--total-timesteps", "256", "--resume"]
    runs = []
    for rank in "01":
        env = {**os.environ, **ports, "RANK": rank, "LOCAL_RANK": rank}
        runs.append(subprocess.Popen(command, cwd=tmp_path / rank, env=env, stderr=subprocess.PIPE, text=True))
    for run in runs:
        errors = run.communicate(timeout=120)[1]
        assert "do not see the same runs/test: their checkpoints are of steps [128, 0]" in errors
        assert run.returncode == 1
