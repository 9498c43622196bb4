"""The runner of the ablations, on made-up scripts, with real processes and real signals."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ablations"))
import run  # noqa: E402

# Keeps the contract of a script: --resume goes on or does nothing, a lock guards the folder, SIGTERM ends it
FAKE = """
import fcntl, json, os, shutil, sys, time
flag = lambda name: sys.argv[sys.argv.index(name) + 1]
folder, seed, rows = f"runs/{flag('--run-name')}", flag("--seed"), 4
os.makedirs(folder, exist_ok=True)
lock = open(f"{folder}/lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(f"{folder} is in use by another process.")
print("pid", os.getpid(), flush=True)
if "--fail" in sys.argv and seed == "2":
    sys.exit("out of luck")
shutil.copy(__file__, f"{folder}/script.py")
settings = {"num_envs": 2, "num_steps": 5, "total_timesteps": 45, "bf16": False}  # 4 rollouts, 40 steps
json.dump(settings, open(f"{folder}/args.json", "w"))
path = f"{folder}/progress.csv"
if not os.path.exists(path):
    open(path, "w").write("global_step,charts/seconds\\n")
done = len(open(path).readlines()) - 1
for row in range(done, 3 if "--cut" in sys.argv else 4):
    time.sleep(float(os.environ.get("SLEEP") or flag("--sleep") if "--sleep" in sys.argv else 0))
    with open(path, "a") as file:
        file.write(f"{10 * (row + 1)},{row}.5\\n")
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "ablations").mkdir()
    shutil.copy(ROOT / "ablations/run.py", tmp_path / "ablations")
    (tmp_path / "fake.py").write_text(FAKE)
    return tmp_path


def start(project, *flags, label="mine", **options):
    command = [sys.executable, "ablations/run.py", "--script", "fake.py", "--label", label, "--scale", "tiny", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=project, **pipes, **options)


def call(project, *flags, **options):
    runner = start(project, *flags, **options)
    out, err = runner.communicate(timeout=60)
    return runner.returncode, out, err


def wait_for(condition, seconds=30):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def is_alive(pid):
    """Whether the process is there and not only waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_runs_are_stored_with_what_made_them_and_a_failure_stops_no_other(project):
    code, out, err = call(project, "--seeds", "1", "2", "3", "--flags=--fail", "--jobs", "2")
    assert code == 1 and "1 of 3 runs failed" in err
    assert "tiny-mine-2 failed with exit status 1 (out of luck): see " in err
    results = project / "ablations/results/tiny/mine"
    assert sorted(path.name for path in results.iterdir()) == ["seed1.csv", "seed1.json", "seed3.csv", "seed3.json"]
    curve = (project / "runs/tiny-mine-3/progress.csv").read_bytes()
    assert (results / "seed3.csv").read_bytes() == curve and curve.count(b"\n") == 5
    made = json.loads((results / "seed3.json").read_text())
    command = f"python fake.py {run.SCALES['tiny']} --fail --seed 3 --run-name tiny-mine-3 --resume"
    assert (made["command"], made["label"], made["steps"], made["seconds"]) == (command, "mine", 40, 3.5)
    assert made["settings"]["num_steps"] == 5 and made["bf16"] is False and made["torch"] and made["processor"]
    assert (made["commit"], made["clean"]) == ("unknown", False)  # no repository here
    (results / "seed1.csv").write_text("kept")
    code, out, _ = call(project, "--seeds", "1", "3", "--flags=--fail")
    assert code == 0 and "finished" in out and (results / "seed1.csv").read_text() == "kept"


def test_the_commit_and_whether_the_tree_was_clean_are_recorded(project):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (project / ".gitignore").write_text("runs/\n__pycache__/\n")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=project, check=True)
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], cwd=project, capture_output=True, text=True).stdout
    assert call(project, "--seeds", "1")[0] == 0
    assert call(project, "--seeds", "2")[0] == 0  # the first one's results do not make it unclean
    (project / "notes.txt").write_text("")  # nor do notes
    assert call(project, "--seeds", "3")[0] == 0
    (project / "new").mkdir()
    (project / "new/other.py").write_text("")
    assert call(project, "--seeds", "4")[0] == 0
    shutil.rmtree(project / "new")
    (project / ".gitignore").write_text("runs/\n__pycache__/\nmore/\n")
    assert call(project, "--seeds", "5")[0] == 0
    made = [json.loads((project / f"ablations/results/tiny/mine/seed{i}.json").read_text()) for i in range(1, 6)]
    assert [one["clean"] for one in made] == [True, True, True, False, False]
    assert {one["commit"] for one in made} == {commit.strip()}


def test_a_curve_that_is_not_whole_is_never_stored(project):
    code, _, err = call(project, "--seeds", "1", "--flags=--cut")
    assert code == 1 and "progress.csv ends at step 30 of 40" in err
    assert not list(project.glob("ablations/results/tiny/mine/*"))
    code, _, err = call(project, "--seeds", "2", "--flags=--fail")  # nothing was left at all
    assert code == 1 and "out of luck" in err


def test_a_second_runner_beside_the_first_stores_no_half_of_its_curve(project):
    first = start(project, "--seeds", "1", "--flags=--sleep 0.7")
    wait_for(lambda: (project / "runs/tiny-mine-1/progress.csv").exists())
    code, _, err = call(project, "--seeds", "1", "--flags=--sleep 0.7")
    assert code == 1 and "runs/tiny-mine-1 is in use by another process." in err
    assert first.poll() is None and not list(project.glob("ablations/results/tiny/mine/*"))
    first.communicate(timeout=60)
    assert (project / "ablations/results/tiny/mine/seed1.csv").read_text().count("\n") == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name)
def test_an_ended_runner_ends_its_runs_and_the_same_command_goes_on(project, number):
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent is gone")
    heard = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}  # not ignored, as under nohup or in "&"
    heard = {} if number == signal.SIGKILL else heard
    runner = start(project, "--seeds", "1", "--flags=--sleep 600", start_new_session=True, **heard)
    log = project / "runs/tiny-mine-1.log"
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
    pid = int(log.read_text().split()[-1])
    assert is_alive(pid) or sys.platform != "linux"
    os.kill(runner.pid, number)
    _, err = runner.communicate(timeout=30)
    assert runner.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or err == "Stopped: the same command goes on where its runs are.\n"
    wait_for(lambda: not is_alive(pid))
    assert call(project, "--seeds", "1", "--flags=--sleep 600", env={**os.environ, "SLEEP": "0.01"})[0] == 0
    assert (project / "ablations/results/tiny/mine/seed1.csv").exists()


def test_under_nohup_a_hangup_stops_nothing(project):
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    runner = start(project, "--seeds", "1", "--flags=--sleep 0.3", **ignored)
    wait_for(lambda: (project / "runs/tiny-mine-1/progress.csv").exists())
    os.kill(runner.pid, signal.SIGHUP)
    assert "tiny-mine-1 is finished" in runner.communicate(timeout=30)[0] and runner.returncode == 0


def test_a_changed_script_reuses_no_old_curve_in_silence(project):
    assert call(project, "--seeds", "1")[0] == 0
    assert "kept" not in call(project, "--seeds", "1")[2]
    (project / "fake.py").write_text(FAKE + "# changed\n")
    code, _, err = call(project, "--seeds", "1")
    said = "Of another command or script, and kept: tiny-mine-1. Nothing was run: give another --label"
    assert code == 1 and said in err
    assert call(project, "--seeds", "1", "2")[0] == 1 and not (project / "runs/tiny-mine-2").exists()
    (project / "ablations/results/tiny/mine/seed1.csv").unlink()  # the run's folder is still there
    code, _, err = call(project, "--seeds", "1")
    assert code == 1 and "tiny-mine-1 was begun by another version of fake.py: rename or remove " in err
    shutil.rmtree(project / "runs/tiny-mine-1")
    assert call(project, "--seeds", "1")[0] == 0
    code, _, err = call(project, "--seeds", "1", "--flags=--sleep 0")  # another command under the same label
    assert code == 1 and said in err
    (project / "ablations/results/tiny/mine/seed1.csv").unlink()  # a resumed run would keep what is no longer said
    code, _, err = call(project, "--seeds", "1", "--flags=--sleep 0")
    assert code == 1 and "tiny-mine-1 was begun by another command, python fake.py" in err


def test_a_flag_that_the_script_does_not_know_is_named(project):
    shutil.copy(ROOT / "ppo_trajsep_lux.py", project / "fake.py")
    code, _, err = call(project, "--seeds", "1", "--flags=--gama 1")
    assert code == 1 and "tiny-mine-1 failed with exit status 2 (Unrecognized options: --gama" in err


def test_what_ended_elsewhere_is_collected_and_says_no_machine(project):
    command = call(project, "--dry-run", "--seeds", "1")[1]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, cwd=project, check=True, timeout=60)
    assert call(project, "--seeds", "1")[0] == 0
    made = json.loads((project / "ablations/results/tiny/mine/seed1.json").read_text())
    assert made["recorded"] == "collected from a run that was finished" and "processor" not in made


def test_a_disk_that_may_not_be_written_stops_no_other_run(project):
    (project / "ablations/results/tiny").mkdir(parents=True)
    (project / "ablations/results/tiny/mine").write_text("in the way")
    code, out, err = call(project, "--seeds", "1", "2")
    assert code == 1 and "2 of 2 runs failed" in err and "Traceback" not in err
    assert err.count("stopped at [Errno") == 2


def test_dry_run_prints_the_missing_commands_one_a_line(project):
    code, out, _ = call(project, "--dry-run", "--seeds", "5", "7", '--flags=--x "two words"')
    lines = [shlex.split(line) for line in out.splitlines()]
    assert code == 0 and [words[:2] for words in lines] == [["python", "fake.py"]] * 2
    assert all("two words" in words and words[-1] == "--resume" for words in lines)
    assert not (project / "runs").exists()


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    run.main()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("fig4 --seeds 1 2 1", "--seeds must be 0 or more and none twice, got 1 2 1"),
        ("fig4 --seeds -1", "--seeds must be 0 or more and none twice, got -1"),
        ("fig4 --jobs 0", "--jobs must be at least 1"),
        ("", "Name a figure, or a variant of your own"),
        ("fig4 --script mappo_lux.py", "Name a figure, or a variant of your own"),
        ("--script mappo_lux.py --label mine --flags=--x'a", '--flags "--x\'a": no closing quotation.'),
        ("--script nowhere.py", "there is no nowhere.py"),
        ("fig4 --label mine", "--label and --flags are for a variant of your own"),
        (f"--script mappo_lux.py --label {'x' * 101}", "taken, empty or longer than 100 letters"),
        ("--script mappo_lux.py --label MAPPO", "'mappo', which is taken, empty"),
        ("--script mappo_lux.py --label ...", "'', which is taken, empty"),
    ],
)
def test_what_a_user_does_wrong_ends_in_one_sentence(monkeypatch, flags, sentence):
    with pytest.raises(SystemExit, match=sentence):
        main(monkeypatch, *flags.split(), "--dry-run")


def test_the_headline_is_at_the_papers_scale(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    main(monkeypatch, "headline", "--dry-run", "--seeds", "1")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("--run-name ")[1] for line in lines] == [
        "paper-trajsep_paper_ppo-1 --resume",
        "paper-global_paper_ppo-1 --resume",
    ]
    assert all("--small" not in line and "--num-envs 4 --num-steps 1024" in line for line in lines)


@pytest.mark.parametrize("script", sorted({variant.script for variant in run.VARIANTS.values()}))
def test_each_script_takes_the_flags_that_the_figures_give_it(script):
    spec = importlib.util.spec_from_file_location(f"flags_of_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    for variant in run.VARIANTS.values():
        for scale in run.SCALES if variant.script == script else ():
            words = run.Run(variant, 3, scale).words[1:]
            args = tyro.cli(module.Args, args=words)
            length = [word for before, word in zip(words, words[1:], strict=False) if before == "--total-timesteps"][-1]
            assert (args.seed, args.total_timesteps) == (3, int(length)), (variant.name, scale)
