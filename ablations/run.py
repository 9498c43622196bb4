"""Runs the comparisons: every variant of a figure with every seed, several at a time.

    python ablations/run.py baselines                      the four scripts, seeds 1 to 3, at the CPU scale
    python ablations/run.py fig4 --seeds 1 2 --scale paper
    python ablations/run.py all --dry-run                  print the commands, one a line, for a scheduler

Each run is a process of its own with its log beside it in runs/. A finished run leaves its curve in
ablations/results/<scale>/<variant>/seed<N>.csv, and is skipped from then on; one that was
interrupted starts anew, and its old folder is kept under another name. A run that fails stops no
other; the failures are listed at the end, with their logs, and the exit status is 1.
"""

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SCALES = {
    "cpu": "--map-size 32 --factories-per-team 2 --max-units 30 --channels 24 --total-timesteps 53248 --bf16",
    "paper": "--total-timesteps 102400 --bf16",
}


@dataclass(frozen=True)
class Variant:
    name: str  # of its folder under results/
    label: str  # in tables and pictures
    script: str
    flags: str = ""
    paper_ice: str = ""  # the paper's ice transferred, for the tables


def ablation(name, label, script, flags, paper_ice=""):
    return Variant(name, label, f"ablations/trajsep_{script}_lux.py", flags, paper_ice)


def samples(keep, count, paper_ice=""):
    flags = f"--keep {keep} --samples-per-step {count}"
    return ablation(f"{keep.replace('-', '_')}_{count}", f"{count} by {keep}", "sample_reduction", flags, paper_ice)


TRAJSEP = Variant("trajsep", "trajectory separation", "ppo_trajsep_lux.py", "", "44,472 +- 12,065")
MODULO = {
    n: Variant(f"groups_{n}", f"units by id modulo {n}", "ppo_trajsep_lux.py", f"--num-groups {n}", ice)
    for n, ice in ((1, "3,573 +- 3,753"), (2, "14,388"), (4, "29,459"), (8, "32,049"), (16, "36,847"))
}
MAPPO = Variant("mappo", "MAPPO (global advantage)", "mappo_lux.py", "", "2,643 +- 3,353")
GLOBAL = Variant("global", "one global trajectory", "ppo_global_lux.py", "", "3,066 +- 2,996")
GLOBAL_REWARD = ablation(
    "own_reward_0", "own reward 0% (global reward)", "own_reward", "--own-reward 0", "9,614 +- 8,094"
)
PAPER_PPO_PARTS = {  # probably the paper's: those of the organisers' baseline; and no symmetries
    "rollout": "--num-envs 4 --num-steps 1024 --num-minibatches 16 --update-epochs 4",
    "learning rate": "--learning-rate 3e-4",
    "entropy": "--ent-coef 0.01 --no-anneal-ent",
    "no symmetries": "--no-augment",
}
PAPER_PPO = f"--total-timesteps 102400 {' '.join(PAPER_PPO_PARTS.values())}"


def paper_part(variant, part):
    name = f"{variant.name}_paper_{part.replace(' ', '_')}"
    return Variant(name, f"{variant.label}, {part} as in the paper", variant.script, PAPER_PPO_PARTS[part])


FIGURES = {  # the first variant of each is what the others are compared with
    "baselines": (TRAJSEP, Variant("ippo", "IPPO", "ippo_lux.py"), MAPPO, GLOBAL),
    "norms": (TRAJSEP, Variant("poster_norms", "the poster's norms", "ppo_trajsep_lux.py", "--norm poster")),
    "epochs": (TRAJSEP, Variant("epochs_2", "2 epochs in place of 3", "ppo_trajsep_lux.py", "--update-epochs 2")),
    "paper_ppo": (
        TRAJSEP,
        Variant(
            "trajsep_paper_ppo", "trajectory separation, paper's PPO, 102,400 steps", "ppo_trajsep_lux.py", PAPER_PPO
        ),
        GLOBAL,
        Variant(
            "global_paper_ppo", "one global trajectory, paper's PPO, 102,400 steps", "ppo_global_lux.py", PAPER_PPO
        ),
    ),
    "paper_ppo_parts": (
        GLOBAL,
        *[paper_part(GLOBAL, part) for part in PAPER_PPO_PARTS],
        TRAJSEP,
        *[paper_part(TRAJSEP, part) for part in ("rollout", "learning rate")],  # those that the other does not bear
    ),
    "fig8": (
        TRAJSEP,
        ablation("global_critic", "global critic", "global_critic", "", "30,687 +- 9,844"),
        GLOBAL_REWARD,
        MAPPO,
    ),
    "fig4": (
        TRAJSEP,
        *MODULO.values(),
    ),
    "fig3": (
        TRAJSEP,
        ablation("units_only", "all factories in one", "mixed", "--no-separate-factories", "43,528 +- 11,327"),
        MODULO[1],
        ablation(
            "two_trajectories",
            "one for factories, one for units",
            "mixed",
            "--no-separate-factories --no-separate-units",
            "6,162 +- 4,413",
        ),
        GLOBAL,
    ),
    "fig9": (
        TRAJSEP,
        *[
            ablation(f"own_reward_{share}", f"own reward {share}%", "own_reward", f"--own-reward {share / 100}", ice)
            for share, ice in ((75, "about 33,800"), (50, "about 24,000"), (25, ""))
        ],
        GLOBAL_REWARD,
    ),
    "fig5": (
        TRAJSEP,
        *[
            ablation(name.replace("-", "_"), f"units by {name}", "grouping", f"--grouping {name}", ice)
            for name, ice in (("quadrant", "22,385"), ("closest-factory", "27,009"), ("closest-heavy", "35,224"))
        ],
        *[MODULO[n] for n in (4, 8)],
    ),
    "fig6": (
        TRAJSEP,
        samples("top-advantage", 1, "38,072"),
        ablation(
            "top_advantage_1_all_values",
            "1 by top-advantage, values on all",
            "sample_reduction",
            "--keep top-advantage --samples-per-step 1 --no-reduce-values",
        ),
        samples("top-abs-advantage", 1, "33,926"),
        samples("top-return", 1, "23,156"),
        samples("random", 1, "2,550"),
    ),
    "fig7": (TRAJSEP, *[samples("random", count, "2,550" if count == 1 else "") for count in (1, 2, 4, 8, 16)]),
}


@dataclass
class Run:
    variant: Variant
    seed: int
    scale: str
    process: subprocess.Popen | None = None

    def __post_init__(self):
        self.name = f"{self.scale}-{self.variant.name}-{self.seed}"
        self.result = ROOT / "ablations/results" / self.scale / self.variant.name / f"seed{self.seed}.csv"
        self.folder = ROOT / "runs" / self.name
        self.log = ROOT / "runs" / f"{self.name}.log"

    def command(self, python):
        flags = f"{SCALES[self.scale]} {self.variant.flags} --seed {self.seed} --run-name {self.name}"
        return [python, self.variant.script, *flags.split()]

    def total_steps(self):
        words = self.command("")
        return int(words[len(words) - words[::-1].index("--total-timesteps")])  # the last one counts

    def start(self, threads):
        if self.folder.exists():
            self.folder.rename(f"{self.folder}-interrupted-{time.time():.0f}")
        self.log.parent.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                self.command(sys.executable), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def steps(self):
        """Environment steps so far."""
        try:
            with open(self.folder / "progress.csv") as file:
                return max((int(row["global_step"]) for row in csv.DictReader(file)), default=0)
        except (OSError, ValueError, TypeError):  # not there yet, or its last row is being written
            return 0

    def keep(self):
        """Copy the curve to results/, in one piece or not at all."""
        self.result.parent.mkdir(parents=True, exist_ok=True)
        part = self.result.with_suffix(".part")
        shutil.copy(self.folder / "progress.csv", part)
        part.replace(self.result)


def run_all(runs, jobs, threads):
    """Start the runs as slots come free; the list of those that failed."""
    waiting, running, failed = list(runs), [], []
    done_steps = 0
    with tqdm(total=sum(run.total_steps() for run in runs), unit="step", smoothing=0.02) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(waiting.pop(0))
                    running[-1].start(threads)
                time.sleep(2)
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    done_steps += run.total_steps()
                    if run.process.returncode == 0:
                        run.keep()
                    else:
                        failed.append(run)
                        tqdm.write(f"{run.name} failed with exit status {run.process.returncode}: see {run.log}")
                progress.n = done_steps + sum(run.steps() for run in running)
                progress.set_postfix_str(", ".join(run.name for run in running), refresh=True)
        finally:  # also on Ctrl-C or SIGTERM: no run goes on unseen
            for run in running:
                run.process.terminate()
            for run in running:
                run.process.wait()
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FIGURES, "all"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=max(1, cores // 2), help="runs at a time (default: cores / 2)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the missing runs and stop")
    args = parser.parse_args()
    if args.jobs < 1:
        sys.exit(f"--jobs must be at least 1, got {args.jobs}.")
    variants = dict.fromkeys(v for name in FIGURES if args.figure in (name, "all") for v in FIGURES[name])
    runs = [Run(variant, seed, args.scale) for seed in args.seeds for variant in variants]
    runs = [run for run in runs if not run.result.exists()]
    if args.dry_run:
        for run in runs:
            print(" ".join(run.command("python")))
        return
    if not runs:
        print("Every run of this figure is finished.")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped: finished runs are kept, run again to go on."))
    failed = run_all(runs, args.jobs, max(1, cores // args.jobs))
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed: " + ", ".join(f"{run.name} ({run.log})" for run in failed))


if __name__ == "__main__":
    main()
