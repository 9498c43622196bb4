"""The script as a user starts it: what a run writes, the same seed the same run, what is refused, learning on a toy."""

import csv
import json
import math
import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import warm

from ppo_trajsep_lux import RANGES, Agent, Args, Refusal, check_args

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "ppo_trajsep_lux.py"
TINY = "--map-size 24 --factories-per-team 1 --max-units 16 --channels 8 --num-envs 2 --num-steps 64 --no-cuda"
TINY += " --num-minibatches 4"
TIMES = ("charts/seconds", "charts/SPS", "charts/rollout_seconds", "charts/update_seconds")


def run(cwd, flags, script=SCRIPT, check=True, **env):
    """Start a script as a user would, and wait for its end. With other environment variables, Python starts anew."""
    command = [str(script), *flags.split()]
    if env:
        options = {"env": {**os.environ, **env}, "capture_output": True, "text": True, "timeout": 900}
        done = subprocess.run([sys.executable, *command], cwd=cwd, **options)
    else:
        done = warm.start(command, cwd)
    assert not check or done.returncode == 0, done.stderr
    return done


def one_sentence(done, *words, status=1):
    """The command ended with this status and one line on stderr, in which all the words are."""
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr
    assert done.returncode == status


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def curve(folder):
    """The rows of a run's progress.csv, without what the clock says."""
    return [{key: row[key] for key in row if key not in TIMES} for row in read_csv(folder / "progress.csv")]


def together(*tasks):
    """The results of functions that mostly wait for processes, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


PROGRAMS = [path for folder in (".", "ablations", "tools", "tests") for path in sorted((ROOT / folder).glob("*.py"))]
PROGRAMS = [path for path in PROGRAMS if re.search("^import (argparse|tyro)$", path.read_text(), re.M)]
PROGRAMS = [str(path.relative_to(ROOT)) for path in PROGRAMS if not path.name.startswith("test_")]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_says_how_to_use_it(program, tmp_path, monkeypatch, capsys):
    for folder in ("ablations", "tools", "tests"):  # as the folder of a program that is started
        monkeypatch.syspath_prepend(ROOT / folder)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert end.value.code in (0, None) and "usage: " in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A short training run."""
    cwd = tmp_path_factory.mktemp("run")
    return cwd, run(cwd, f"{TINY} --total-timesteps 530 --run-name smoke")


def test_training_writes_what_it_promises(finished_run):
    cwd, done = finished_run
    folder = cwd / "runs/smoke"
    saved = json.loads((folder / "args.json").read_text())
    assert saved["map_size"] == 24 and set(saved) == set(asdict(Args()))
    assert (folder / "script.py").read_bytes() == SCRIPT.read_bytes()
    rows = read_csv(folder / "progress.csv")
    assert [row["global_step"] for row in rows] == ["128", "256", "384", "512"]
    ended = [row for row in rows if row["charts/episodic_length"]]
    assert ended and all(100 <= float(row["charts/episodic_length"]) <= 151 for row in ended)
    blank = [row for row in rows if not row["charts/episodic_length"]]
    assert blank and all(row["charts/full_episodes"] == "" for row in blank)
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm", "explained_variance"):
        assert all(math.isfinite(float(row[f"losses/{name}"])) for row in rows)
    assert all(float(row["losses/grad_norm"]) > 0 for row in rows)
    assert all(1 <= float(row["charts/active_cells"]) <= 17 for row in rows)
    seconds = [float(row["charts/seconds"]) for row in rows]
    assert seconds[0] > 0 and seconds == sorted(set(seconds))
    assert list(folder.glob("events.out.tfevents.*")) and not list(folder.glob("*.tmp"))
    assert not (folder / "best.pt").exists()  # sixteen episodes have not ended


def test_models_can_be_read_without_running_what_they_hold(finished_run):
    """`model.pt` is the newest policy; neither file needs pickled objects."""
    model, checkpoint = (
        torch.load(finished_run[0] / f"runs/smoke/{name}.pt", weights_only=True) for name in ("model", "checkpoint")
    )
    assert model["script"] == checkpoint["script"] == "ppo_trajsep_lux"
    assert checkpoint["iteration"] == 4 and len(checkpoint["rows"]) == 4
    args = Args(**model["args"])
    assert args.channels == 8
    torch.manual_seed(args.seed)
    agent = Agent(args)
    untrained = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    agent.load_state_dict(model["model"])
    for name, tensor in agent.state_dict().items():
        assert torch.equal(tensor, checkpoint["model"][name]) and tensor.isfinite().all()
        assert not torch.equal(tensor, untrained[name])


def test_without_a_terminal_it_says_how_far_it_is(finished_run):
    lines = finished_run[1].stdout.splitlines()
    # 530 is no multiple of a rollout of 128 steps
    assert "parameters on cpu" in lines[0] and "steps 0 to 512 in rollouts of 128" in lines[0]
    assert lines[1].startswith("step 128, ") and "steps/s" in lines[1] and "minutes left" in lines[1]
    for word in ("step 512, ", "episodic_return -", "episodic_length 1", "ice_transferred "):
        assert word in lines[-2]
    assert lines[-1].startswith("runs/smoke is finished") and "tools/evaluate.py runs/smoke" in lines[-1]
    assert finished_run[1].stderr == ""


def test_the_loops_own_buffer_holds_the_last_step_of_an_episode(tmp_path):
    """The reset in the same step overwrites the last reward and done flags: the loop must not take those."""
    source, anchor = SCRIPT.read_text(), "        advantages = compute_gae("
    assert source.count(anchor) == 1
    spied = source.replace(
        anchor, f'        torch.save([entity_reward, entity_dones, obs["kind"]], "buffer.pt")\n{anchor}'
    )
    (tmp_path / "spied.py").write_text(spied)
    run(tmp_path, f"{TINY} --num-envs 1 --num-steps 160 --total-timesteps 160 --run-name one", tmp_path / "spied.py")
    (row,) = read_csv(tmp_path / "runs/one/progress.csv")
    assert row["charts/episodes"] == "1"
    length, (reward, dones, kind) = int(float(row["charts/episodic_length"])), torch.load(tmp_path / "buffer.pt")
    assert reward[:length].sum().item() == pytest.approx(float(row["charts/episodic_return"]), abs=1e-4)
    assert reward[length - 1].sum() < -0.9  # the factory's loss
    assert torch.equal(dones[length - 1].bool(), kind[length - 1] != 0)  # everything ended there


def test_same_seed_same_run(finished_run, tmp_path):
    """Also where processes start afresh in place of forking, as on macOS and Windows."""
    cwd, _ = finished_run
    spawn = 'import multiprocessing\n\nmultiprocessing.set_start_method("spawn", force=True)\n'
    (tmp_path / "sitecustomize.py").write_text(spawn)
    flags = f"{TINY} --total-timesteps 256"
    together(
        partial(run, cwd, f"{flags} --run-name again --no-anneal-lr --no-anneal-ent", PYTHONPATH=str(tmp_path)),
        partial(run, cwd, f"{flags} --run-name same --no-anneal-lr --no-anneal-ent"),
        partial(run, cwd, f"{flags} --run-name other --no-anneal-lr --no-anneal-ent --seed 2"),
    )
    again, same, other = (curve(cwd / f"runs/{name}") for name in ("again", "same", "other"))
    assert again == same != other
    assert same[0] != curve(cwd / "runs/smoke")[0] or same != curve(cwd / "runs/smoke")[:2]  # flags count


def test_groups_self_play_and_other_losses_run(tmp_path):
    flags = {
        "groups": "--num-groups 2 --no-bf16",
        "self": "--opponent self --no-augment",
        "unclipped": "--no-anneal-lr --no-clip-vloss --bf16",
    }
    tiny = f"{TINY} --total-timesteps 256 --run-name"
    together(*[partial(run, tmp_path, f"{tiny} {name} {flags[name]}") for name in flags])
    for name in flags:
        rows = read_csv(tmp_path / f"runs/{name}/progress.csv")
        assert len(rows) == 2
        if name == "groups":  # two unit groups and a factory
            assert all(float(row["charts/active_cells"]) <= 3 for row in rows)
        learning_rates = {row["charts/learning_rate"] for row in rows}
        assert (len(learning_rates) == 1) == (name == "unclipped")


# ---- refusals


def test_an_existing_run_is_not_overwritten(finished_run):
    cwd, _ = finished_run
    before = {path: path.read_bytes() for path in (cwd / "runs/smoke").iterdir()}
    one_sentence(run(cwd, f"{TINY} --run-name smoke", check=False), "runs/smoke exists", "--run-name", "--resume")
    assert before == {path: path.read_bytes() for path in (cwd / "runs/smoke").iterdir()}


def test_a_map_that_cannot_hold_the_factories(tmp_path):
    done = run(tmp_path, "--map-size 24 --factories-per-team 10", check=False)
    one_sentence(done, "--map-size", "--factories-per-team")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "gpu, cpu, flags, expected",
    [
        *[(True, False, [], True), (True, False, ["--no-cuda"], False), (False, False, [], False)],
        *[(False, True, [], True), (True, True, ["--no-cuda"], True)],
    ],
)
def test_bfloat16_by_default(gpu, cpu, flags, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": cpu})
    monkeypatch.setattr(sys, "argv", ["ppo_trajsep_lux.py", *flags])
    assert Args().bf16 is expected


def complaint(**settings):
    """What check_args says; nothing if all is well."""
    try:
        check_args(Args(**settings))
    except Refusal as refusal:
        return str(refusal)
    return ""


@pytest.mark.parametrize("name", [name for name, value in asdict(Args()).items() if type(value) in (int, float)])
def test_every_number_is_checked(name):
    whole = isinstance(getattr(Args(), name), int)
    low, high = map(int if whole else float, RANGES.get(name, (1, 10**9) if whole else (-1000, 1000)))
    below, above = (low - 1, high + 1) if whole else (math.nextafter(low, -math.inf), math.nextafter(high, math.inf))
    sentence = f"--{name.replace('_', '-')} must be between"
    assert sentence not in complaint(**{name: low}) and sentence not in complaint(**{name: high})
    for value in (below, above, math.nan, math.inf, -math.inf):
        assert sentence in complaint(**{name: value})


@pytest.mark.parametrize(
    "name, low, high",
    [
        *[("map_size", 24, 64), ("factories_per_team", 1, 10), ("num_envs", 1, 1000), ("seed", 0, 2**32 - 1)],
        *[("gamma", 0.0, 1.0), ("gae_lambda", 0.0, 1.0), ("ent_coef", 0.0, 100.0), ("vf_coef", 0.0, 100.0)],
        *[("learning_rate", 1e-12, 1e6), ("clip_coef", 1e-12, 1e6), ("max_grad_norm", 1e-12, 1e6)],
        *[("num_groups", 0, 1000), ("channels", 4, 4096), ("max_units", 1, 1000), ("num_steps", 1, 10**9)],
    ],
)
def test_what_the_numbers_may_be(name, low, high):
    assert RANGES.get(name, (1, 10**9)) == (low, high)


def test_every_special_range_is_of_a_number():
    assert set(RANGES) <= set(asdict(Args()))


def test_sizes_that_do_not_fit():
    assert "--num-minibatches must divide" in complaint(num_minibatches=7)
    assert "--total-timesteps must hold" in complaint(total_timesteps=10)
    args = Args(opponent="self")
    check_args(args)
    assert args.batch_size == 2 * args.num_envs * args.num_steps
    assert args.num_iterations == args.total_timesteps // (args.num_envs * args.num_steps)


# ---- learning


def test_it_learns_to_dig_ice(tmp_path):
    """14,336 steps on a small map: in their last quarter the policy digs three times what any untrained seed does."""
    toy = "--map-size 24 --factories-per-team 2 --max-units 30 --channels 16 --no-cuda --no-anneal-lr"

    def ice_dug(name, flags):
        """Of the episodes that ended in the last quarter of the run, on average."""
        run(tmp_path, f"{toy} --run-name {name} {flags}")
        rows = read_csv(tmp_path / f"runs/{name}/progress.csv")
        rows = [row for row in rows[-len(rows) // 4 :] if row["charts/ice_dug"]]
        episodes = [int(row["charts/episodes"]) for row in rows]
        return sum(n * float(row["charts/ice_dug"]) for n, row in zip(episodes, rows, strict=True)) / sum(episodes)

    untrained = "--total-timesteps 1536 --learning-rate 1e-12 --seed"
    trained, *others = together(
        partial(ice_dug, "trained", "--total-timesteps 14336"),
        *[partial(ice_dug, f"untrained{seed}", f"{untrained} {seed}") for seed in (1, 2, 3)],
    )
    assert trained > 3 * max(others)
