"""The runner and the report, on made-up scripts and made-up curves."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ablations"))
import report  # noqa: E402
import run  # noqa: E402

FAKE = """
import os, sys
name, seed = sys.argv[sys.argv.index("--run-name") + 1], sys.argv[sys.argv.index("--seed") + 1]
os.makedirs(f"runs/{name}")
print("seed", seed)
if "--fail" in sys.argv and seed == "2":
    sys.exit("out of luck")
with open(f"runs/{name}/progress.csv", "w") as file:
    file.write(f"global_step\\n4096\\n{seed}\\n")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    good = run.Variant("good", "good", "fake.py")
    bad = run.Variant("bad", "bad", "fake.py", "--fail")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "FIGURES", {"one": (good,), "two": (good, bad)})
    return tmp_path


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    run.main()


def test_runs_are_kept_and_skipped_and_a_failure_stops_no_other(project, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="1 of 4 runs failed: cpu-bad-2"):
        call(monkeypatch, "two", "--seeds", "1", "2", "--jobs", "2")
    results = project / "ablations/results/cpu"
    assert sorted(str(p.relative_to(results)) for p in results.glob("*/*")) == [
        "bad/seed1.csv",
        "good/seed1.csv",
        "good/seed2.csv",
    ]
    assert "out of luck" in (project / "runs/cpu-bad-2.log").read_text()
    (results / "good/seed1.csv").write_text("kept")
    (results / "good/seed2.csv").unlink()  # as after an interruption: a folder, but no result
    (project / "runs/cpu-good-2/mine.txt").write_text("partial")
    call(monkeypatch, "one", "--seeds", "1", "2")
    assert (results / "good/seed1.csv").read_text() == "kept" and (results / "good/seed2.csv").exists()
    assert [path.read_text() for path in project.glob("runs/cpu-good-2-interrupted-*/mine.txt")] == ["partial"]
    capsys.readouterr()
    call(monkeypatch, "one", "--seeds", "1", "2")
    assert "finished" in capsys.readouterr().out


def test_a_stopped_runner_leaves_no_run_behind(tmp_path):
    (tmp_path / "ablations").mkdir()
    shutil.copy(ROOT / "ablations/run.py", tmp_path / "ablations")
    fake = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"
    (tmp_path / "ppo_trajsep_lux.py").write_text(fake)
    command = [sys.executable, "ablations/run.py", "norms", "--seeds", "1", "--jobs", "1"]
    runner = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "runs/cpu-trajsep-1.log", time.time() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.time() < deadline:
        time.sleep(0.1)
    pid = int(log.read_text())
    runner.terminate()
    assert "run again to go on" in runner.communicate()[1] and runner.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_dry_run_prints_the_missing_commands(project, monkeypatch, capsys):
    call(monkeypatch, "all", "--dry-run", "--seeds", "5")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("python fake.py --map-size 32") for line in lines)
    assert not (project / "runs").exists()
    with pytest.raises(SystemExit, match="--jobs must be at least 1"):
        call(monkeypatch, "one", "--jobs", "0")


def test_every_command_of_every_figure_is_understood():
    """Each script takes the flags that the figures give it (a run of no steps ends with its own sentence)."""
    scripts = {(variant.script, variant.flags) for variants in run.FIGURES.values() for variant in variants}
    for script, flags in sorted(scripts):
        command = [sys.executable, script, *run.SCALES["cpu"].split(), *flags.split(), "--total-timesteps", "1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "--total-timesteps must hold one rollout" in done.stderr, (script, flags, done.stderr)


def test_the_progress_bar_knows_how_long_a_run_is():
    default, longer = run.FIGURES["paper_ppo"][:2]
    assert [run.Run(variant, 1, "cpu").total_steps() for variant in (default, longer)] == [53248, 102400]


def curve(path, ice, full_from, episodes=2):
    """A run of 4 rows of 4,096 steps; the ice of the last two rows and when episodes last 1,000 steps are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["global_step", "charts/episodes", *[f"charts/{m}" for m in report.METRICS], "charts/full_episodes"]
        )
        for i, value in enumerate([0, "", *ice]):
            full = float(i >= full_from)
            count = 0 if value == "" else episodes if i < 3 else 1
            row = ["" if value == "" else v for v in (value, 500 + 500 * full, value, 2000, 1.5, full)]
            writer.writerow([4096 * (i + 1), count, *row])


def test_report_by_hand(tmp_path, monkeypatch, capsys):
    for seed, ice in ((1, (10, 40)), (2, (20, 50)), (3, (30, 60))):  # means by episodes: (2 x 10 + 40) / 3 = 20, 30, 40
        curve(tmp_path / f"cpu/trajsep/seed{seed}.csv", ice, full_from=2)
    for seed, ice in ((1, (1, 1)), (2, (4, 4))):
        curve(tmp_path / f"cpu/ippo/seed{seed}.csv", ice, full_from=9 if seed == 1 else 3)
    assert report.untrained(tmp_path / "cpu", "ice_transferred") is None
    (tmp_path / "cpu/untrained").mkdir()
    for seed, ice in ((1, "1,008.50"), (2, "2.50")):
        rows = ["model.pt: 3 maps", "| actions | episodic_length | ice_transferred |", "|---|---|---|"]
        rows += [f"| sampled | 130.00 +- 4.00 | {ice} +- 1.00 |", "| greedy | 1.00 +- 0.00 | 7.00 +- 0.00 |"]
        (tmp_path / f"cpu/untrained/seed{seed}_eval.txt").write_text("\n".join(rows))
    assert report.untrained(tmp_path / "cpu", "ice_transferred") == 505.5
    monkeypatch.setattr(sys, "argv", ["report.py", "baselines", "--results", str(tmp_path)])
    report.main()
    text = capsys.readouterr().out
    assert text == (tmp_path / "cpu/baselines.md").read_text()
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line
    }
    lines = [line for line in text.splitlines() if line.startswith("| trajectory separation")]
    assert "| 1 2 3 | 30.0 +- 10.0 | 1,000 +- 0 |" in lines[0]
    assert lines[1] == "| trajectory separation | 12,288 | 12,288 | 1: 12,288; 2: 12,288; 3: 12,288 |"
    lines = [line for line in text.splitlines() if line.startswith("| IPPO")]
    assert "| 1 2 | 2.5 +- 2.1 |" in lines[0]
    # d = (30 - 2.5) / sqrt((100 + 4.5) / 2); t = 27.5 / sqrt(100 / 3 + 4.5 / 2)
    assert f"d = {27.5 / np.sqrt(104.5 / 2):.1f}" in lines[0]
    t, df = 27.5 / np.sqrt(100 / 3 + 2.25), (100 / 3 + 2.25) ** 2 / ((100 / 3) ** 2 / 2 + 2.25**2 / 1)
    from scipy.stats import t as student

    assert f"p = {2 * student.sf(t, df):.2g}" in lines[0]
    assert lines[1] == "| IPPO | 16,384 | never | 1: never; 2: 16,384 |"
    assert rows["MAPPO (global advantage)"][1] == "missing"
    assert (tmp_path / "cpu/baselines.png").stat().st_size > 10_000


def test_claims_by_hand(tmp_path, monkeypatch, capsys):
    ice = {
        "trajsep": (90, 100, 110),
        "global_critic": (49, 50, 51),
        "own_reward_0": (60, 61, 62),
        "mappo": (10, 62, 99),
    }
    for name, values in ice.items():
        for seed, value in enumerate(values):
            curve(tmp_path / f"cpu/{name}/seed{seed}.csv", (value, value), full_from=2)
    curve(tmp_path / "cpu/global/seed1.csv", (1, 1), full_from=2)  # one seed is too few
    monkeypatch.setattr(sys, "argv", ["report.py", "claims", "--results", str(tmp_path)])
    report.main()
    text = capsys.readouterr().out
    assert text == (tmp_path / "cpu/claims.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [row[0] for row in rows[:4]] == ["Fig. 8"] * 4
    assert rows[0][1:5] == ["trajectory separation", "global critic", f"{30687 / 44472:.2f}", "0.50"]
    verdicts = [row[-1] for row in rows]
    assert verdicts[:4] == ["holds", "the other way round", "the same order, p above 0.05", "missing"]
    assert rows[-1][2] == "MAPPO (global advantage)" and float(rows[-1][4]) == 0.57
    for seed in range(3):  # now MAPPO is above, and both too wide to tell
        curve(tmp_path / f"cpu/own_reward_0/seed{seed}.csv", (seed * 9, seed * 9), full_from=2)
        curve(tmp_path / f"cpu/mappo/seed{seed}.csv", (seed * 99, seed * 99), full_from=2)
    report.main()
    assert (tmp_path / "cpu/claims.md").read_text().splitlines()[4].endswith("| not seen, p above 0.05 |")


def test_every_claim_is_about_a_variant_of_a_figure():
    names = {variant.name for variants in run.FIGURES.values() for variant in variants}
    assert {name for _, *ranking in report.CLAIMS for name in ranking} <= names


def test_spread():
    assert report.spread([1.0, 2.0, 3.0]) == "2.0 +- 1.0"
    assert report.spread([1000.0, 3000.0]) == "2,000 +- 1,414"
    assert report.spread([2.5]) == "2.5"


def test_report_without_runs_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", "baselines", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="run `python ablations/run.py baselines` first"):
        report.main()


@pytest.mark.parametrize("path", sorted((ROOT / "ablations/results").glob("*/*.md")), ids=lambda path: path.stem)
def test_committed_tables_are_those_of_the_committed_curves(path, tmp_path, monkeypatch):
    """Made anew from the CSV files they are the same, and the README shows them or says where they are."""
    shutil.copytree(path.parent, tmp_path / path.parent.name)
    monkeypatch.setattr(sys, "argv", ["report.py", path.stem, "--scale", path.parent.name, "--results", str(tmp_path)])
    report.main()
    assert (tmp_path / path.parent.name / path.name).read_text() == path.read_text()
    readme = (ROOT / "README.md").read_text()
    assert path.read_text() in readme or f"({path.relative_to(ROOT)})" in readme
