"""The script as a user starts it: training, evaluation, refusals in one sentence, and learning on a toy."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ppo_trajsep_lux import RANGES, Agent, Args, check_args, load_checkpoint

ROOT = Path(__file__).parents[1]
SCRIPT = "ppo_trajsep_lux.py"
TINY = "--map-size 24 --factories-per-team 1 --max-units 16 --channels 8 --num-envs 2 --num-steps 64 --no-cuda"
TINY = tuple(TINY.split())


def run(cwd, *flags, check=True, **env):
    command = [sys.executable, str(ROOT / SCRIPT), *flags]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, done.stderr
    return done


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A short training run, as a user would start it."""
    cwd = tmp_path_factory.mktemp("run")
    done = run(cwd, *TINY, "--total-timesteps", "512", "--num-minibatches", "4", "--run-name", "smoke")
    return cwd, done


def test_training_writes_what_it_promises(finished_run):
    cwd, done = finished_run
    assert "parameters on cpu" in done.stdout and "minutes" in done.stdout
    assert json.loads((cwd / "runs/smoke/args.json").read_text())["map_size"] == 24
    rows = read_csv(cwd / "runs/smoke/progress.csv")
    assert [row["global_step"] for row in rows] == ["128", "256", "384", "512"]
    ended = [row for row in rows if row["charts/episodic_length"]]
    assert ended and all(100 <= float(row["charts/episodic_length"]) <= 151 for row in ended)
    blank = [row for row in rows if not row["charts/episodic_length"]]
    assert blank and all(row["charts/full_episodes"] == "" for row in blank)
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm", "explained_variance"):
        assert all(row[f"losses/{name}"] for row in rows)
    assert all(1 <= float(row["charts/active_cells"]) <= 17 for row in rows)
    assert list((cwd / "runs/smoke").glob("events.out.tfevents.*"))
    assert not list((cwd / "runs/smoke").glob("*.tmp"))


def test_the_loops_own_buffer_holds_the_last_step_of_an_episode(tmp_path):
    """The reset in the same step overwrites the last reward and done flags: the loop must not take those."""
    source, anchor = (ROOT / SCRIPT).read_text(), "        advantages = compute_gae("
    assert source.count(anchor) == 1
    spied = source.replace(
        anchor, f'        torch.save([entity_reward, entity_dones, obs["kind"]], "buffer.pt")\n{anchor}'
    )
    (tmp_path / "spied.py").write_text(spied)
    flags = [*TINY, "--num-envs", "1", "--num-steps", "160", "--total-timesteps", "160", "--run-name", "one"]
    done = subprocess.run([sys.executable, "spied.py", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = read_csv(tmp_path / "runs/one/progress.csv")
    assert row["charts/episodes"] == "1"
    length, (reward, dones, kind) = int(float(row["charts/episodic_length"])), torch.load(tmp_path / "buffer.pt")
    assert reward[:length].sum().item() == pytest.approx(float(row["charts/episodic_return"]), abs=1e-4)
    assert reward[length - 1].sum() < -0.9  # the factory's loss
    assert torch.equal(dones[length - 1].bool(), kind[length - 1] != 0)  # everything ended there


def test_evaluation_of_the_saved_model(finished_run):
    cwd, _ = finished_run
    done = run(cwd, "--evaluate", "runs/smoke/model.pt", "--eval-episodes", "3")
    assert "3 evaluation maps of size 24" in done.stdout  # the checkpoint's settings, not the defaults
    lines = done.stdout.strip().splitlines()
    assert lines[-2].startswith("| sampled |") and lines[-1].startswith("| greedy |")
    assert lines[1].count("|") == lines[-1].count("|") == 11
    again = run(cwd, "--evaluate", "runs/smoke/model.pt", "--eval-episodes", "3")
    assert again.stdout == done.stdout
    other_size = run(cwd, "--evaluate", "runs/smoke/model.pt", "--eval-episodes", "1", "--map-size", "32")
    assert "maps of size 32" in other_size.stdout


def test_same_seed_same_run(finished_run, tmp_path):
    """Also where processes start afresh in place of forking, as on macOS and Windows."""
    cwd, _ = finished_run
    spawn = 'import multiprocessing\n\nmultiprocessing.set_start_method("spawn", force=True)\n'
    (tmp_path / "sitecustomize.py").write_text(spawn)
    flags = [*TINY, "--total-timesteps", "512", "--num-minibatches", "4"]
    run(cwd, *flags, "--run-name", "again", PYTHONPATH=str(tmp_path))
    run(cwd, *flags, "--run-name", "other", "--seed", "2")
    timing = ("charts/seconds", "charts/SPS", "charts/rollout_seconds", "charts/update_seconds")
    rows = {
        name: [{k: v for k, v in row.items() if k not in timing} for row in read_csv(cwd / f"runs/{name}/progress.csv")]
        for name in ("smoke", "again", "other")
    }
    assert rows["smoke"] == rows["again"] != rows["other"]


def test_a_run_that_is_stopped_keeps_its_weights(tmp_path):
    folder = tmp_path / "runs/stopped"
    command = [sys.executable, str(ROOT / SCRIPT), *TINY, "--num-minibatches", "4", "--run-name", "stopped"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        while not (folder / "progress.csv").exists() or len(read_csv(folder / "progress.csv")) < 2:
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait() != 0
    args, weights = load_checkpoint(folder / "model.pt")
    Agent(args.channels, args.num_blocks, args.norm).load_state_dict(weights)
    assert args.channels == 8 and any(weight.any() for name, weight in weights.items() if name.endswith("bias"))


def test_groups_self_play_and_norms_run(tmp_path):
    for name, flags in {
        "groups": ["--num-groups", "2"],
        "self": ["--opponent", "self"],
        "poster": ["--norm", "poster", "--bf16"],
        "kl": ["--target-kl", "1e-5", "--no-anneal-lr", "--no-clip-vloss", "--no-norm-adv", "--no-save-model"],
    }.items():
        run(tmp_path, *TINY, "--total-timesteps", "256", "--num-minibatches", "4", "--run-name", name, *flags)
        rows = read_csv(tmp_path / f"runs/{name}/progress.csv")
        assert len(rows) == 2
        assert (tmp_path / f"runs/{name}/model.pt").exists() == (name != "kl")
        if name == "groups":  # two unit groups and a factory
            assert all(float(row["charts/active_cells"]) <= 3 for row in rows)


# ---- refusals


def one_sentence(done, *words):
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr


def test_an_existing_run_is_not_overwritten(finished_run):
    cwd, _ = finished_run
    before = (cwd / "runs/smoke/progress.csv").read_bytes()
    one_sentence(run(cwd, *TINY, "--run-name", "smoke", check=False), "runs/smoke exists", "--run-name")
    assert (cwd / "runs/smoke/progress.csv").read_bytes() == before


def test_checkpoint_refusals(finished_run):
    cwd, _ = finished_run
    one_sentence(run(cwd, "--evaluate", "nowhere.pt", check=False), "nowhere.pt cannot be read", "model.pt")
    (cwd / "damaged.pt").write_bytes((cwd / "runs/smoke/model.pt").read_bytes()[:1000])
    one_sentence(run(cwd, "--evaluate", "damaged.pt", check=False), "damaged.pt is damaged")
    torch.save({"other": 1}, cwd / "other.pt")
    one_sentence(run(cwd, "--evaluate", "other.pt", check=False), "not a model.pt of this script")
    wider = run(cwd, "--evaluate", "runs/smoke/model.pt", "--channels", "16", check=False)
    one_sentence(wider, "keep their script", "--channels")
    saved = str(cwd / "runs/smoke/model.pt")
    command = [sys.executable, str(ROOT / "ppo_global_lux.py"), "--evaluate", saved, "--no-cuda"]
    one_sentence(subprocess.run(command, capture_output=True, text=True), saved, "script")
    assert not (cwd / "runs" / "model.pt").exists()


def test_a_map_that_cannot_hold_the_factories(tmp_path):
    done = run(tmp_path, "--map-size", "24", "--factories-per-team", "10", check=False)
    one_sentence(done, "--map-size", "--factories-per-team")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", RANGES)
def test_every_number_is_checked(name):
    low, high = RANGES[name]
    for value in (low - 1, high * 2 + 1, float("nan")):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be between"):
            check_args(Args(**{name: value}))


def test_every_number_has_a_range():
    at_run_time = {"batch_size", "minibatch_size", "num_iterations"}
    numbers = {n for n, f in Args.__dataclass_fields__.items() if f.type in (int, float, float | None)}
    assert numbers - at_run_time == set(RANGES)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="--num-minibatches must divide"):
        check_args(Args(num_minibatches=7))
    with pytest.raises(ValueError, match="--total-timesteps must hold"):
        check_args(Args(total_timesteps=10))
    args = Args(opponent="self")
    check_args(args)
    assert args.batch_size == 2 * args.num_envs * args.num_steps
    assert args.num_iterations == args.total_timesteps // (args.num_envs * args.num_steps)


# ---- learning


def test_it_learns_to_dig_ice(tmp_path):
    """16,384 steps on a small map: the policy digs three times what any untrained seed does."""
    toy = "--map-size 24 --factories-per-team 2 --max-units 30 --channels 16 --no-cuda --no-anneal-lr"

    def ice_dug(name, *flags):
        run(tmp_path, *toy.split(), "--run-name", name, *flags)
        table = run(tmp_path, "--evaluate", f"runs/{name}/model.pt", "--eval-episodes", "8").stdout.splitlines()
        header, sampled = ([cell.strip() for cell in line.split("|")] for line in (table[1], table[-2]))
        return float(sampled[header.index("ice_dug")].split()[0].replace(",", ""))

    untrained = [
        ice_dug(f"untrained{seed}", "--seed", str(seed), "--total-timesteps", "1024", "--learning-rate", "1e-12")
        for seed in (1, 2, 3)
    ]
    trained = ice_dug("trained", "--total-timesteps", "16384")
    assert trained > 3 * max(untrained)
