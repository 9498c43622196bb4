"""Runs the comparisons: every variant of a figure with every seed, several at a time.

    python ablations/run.py baselines                      the four scripts, seeds 1 to 3, at the CPU scale
    python ablations/run.py fig4 --seeds 4 5 --scale paper
    python ablations/run.py all --dry-run                  print the missing commands, one a line, for a scheduler
    python ablations/run.py --script ablations/mine_lux.py --flags="--x 1" --label "mine" --scale tiny

Each run is a process of its own with its log beside it in runs/. Its command goes on where it stopped
and does nothing if it is finished, so all of this can be started again at any time. A finished run
leaves its curve in ablations/results/<scale>/<variant>/seed<N>.csv, and what made it beside it in
seed<N>.json; it is skipped from then on. Commands that ran elsewhere leave theirs when the same figure
is run here over the same runs/. A run that fails stops no other; the exit status is then 1. A runner
that ends, even by kill -9 on Linux, ends its runs.
"""

import argparse
import csv
import ctypes
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCALES = {
    "cpu": "--small --total-timesteps 53248",
    "cpu24": "--small --map-size 24 --factories-per-team 1 --max-units 15 --total-timesteps 53248",
    "cpu40": "--small --map-size 40 --factories-per-team 3 --max-units 45 --total-timesteps 53248",
    "paper": "--total-timesteps 102400",
    "tiny": "--map-size 24 --factories-per-team 1 --max-units 8 --channels 4 "  # seconds, for trying out
    "--num-envs 2 --num-steps 64 --num-minibatches 2 --total-timesteps 1024",
}


@dataclass(frozen=True)
class Variant:
    name: str  # of its folder under results/
    label: str  # in tables and pictures
    script: str
    flags: str = ""
    paper_ice: str = ""  # the paper's ice transferred, for the tables


ROLLOUT, RATE = "--num-envs 4 --num-steps 1024 --num-minibatches 16 --update-epochs 4", "--learning-rate 3e-4"
ENTROPY, VIEWS, TOP = "--ent-coef 0.01 --no-anneal-ent", "--no-augment", "--samples-per-step 1 --keep top"
PAPER_PPO = f"--total-timesteps 102400 {ROLLOUT} {RATE} {ENTROPY} {VIEWS}"  # probably: the organisers' baseline's
TWELFTH = " ".join(  # of the script's rewards: the team's, in a twelfth of its size
    f"--reward-{name} {value / 12:.3g}"
    for name, value in (("ice-dug", 0.001), ("ice-delivered", 0.0005), ("ice-received", 0.0005))
    + (("rubble-cleared", 0.001), ("factory-alive", 0.001), ("unit-lost", -0.1), ("factory-lost", -1))
)
TASKS = "--tasks cave mountain mountain-lean"
GPAE = "--team-scale 1 --ent-coef 0.05"  # what it learns with on every seed
TABLE = f"""
trajsep | trajectory separation | ppo_trajsep_lux.py | | 44,472 +- 12,065
ippo | IPPO | ippo_lux.py | |
mappo | MAPPO (global advantage) | mappo_lux.py | | 2,643 +- 3,353
ippo_share | IPPO, equal shares | ippo_lux.py | --team-scale 0 |
mappo_share | MAPPO, equal shares | mappo_lux.py | --team-scale 0 |
global | one global trajectory | ppo_global_lux.py | | 3,066 +- 2,996
global_grad_10 | one global trajectory, gradient clip 10 | ppo_global_lux.py | --max-grad-norm 10 |
global_no_value_clip | one global trajectory, no value clip | ppo_global_lux.py | --no-clip-vloss |
global_twelfth | one global trajectory, rewards / 12 | ppo_global_lux.py | {TWELFTH} |
ippo_grad_10 | IPPO, gradient clip 10 | ippo_lux.py | --max-grad-norm 10 |
ippo_no_value_clip | IPPO, no value clip | ippo_lux.py | --no-clip-vloss |
mappo_grad_10 | MAPPO, gradient clip 10 | mappo_lux.py | --max-grad-norm 10 |
mappo_no_value_clip | MAPPO, no value clip | mappo_lux.py | --no-clip-vloss |
poster_norms | the poster's norms | poster_norms | |
heavies | heavy units only | heavies | |
epochs_2 | 2 epochs in place of 3 | ppo_trajsep_lux.py | --update-epochs 2 |
trajsep_paper_ppo | trajectory separation, the paper's PPO | ppo_trajsep_lux.py | {PAPER_PPO} | 44,472 +- 12,065
global_paper_ppo | one global trajectory, the paper's PPO | ppo_global_lux.py | {PAPER_PPO} | 3,066 +- 2,996
global_paper_rollout | one global trajectory, rollout as in the paper | ppo_global_lux.py | {ROLLOUT} |
global_paper_learning_rate | one global trajectory, learning rate as in the paper | ppo_global_lux.py | {RATE} |
global_paper_entropy | one global trajectory, entropy as in the paper | ppo_global_lux.py | {ENTROPY} |
global_paper_no_symmetries | one global trajectory, no symmetries as in the paper | ppo_global_lux.py | {VIEWS} |
trajsep_paper_rollout | trajectory separation, rollout as in the paper | ppo_trajsep_lux.py | {ROLLOUT} |
trajsep_paper_learning_rate | trajectory separation, learning rate as in the paper | ppo_trajsep_lux.py | {RATE} |
groups_1 | units by id modulo 1 | ppo_trajsep_lux.py | --num-groups 1 | 3,573 +- 3,753
groups_2 | units by id modulo 2 | ppo_trajsep_lux.py | --num-groups 2 | 14,388
groups_4 | units by id modulo 4 | ppo_trajsep_lux.py | --num-groups 4 | 29,459
groups_8 | units by id modulo 8 | ppo_trajsep_lux.py | --num-groups 8 | 32,049
groups_16 | units by id modulo 16 | ppo_trajsep_lux.py | --num-groups 16 | 36,847
global_critic | global critic | global_critic | | 30,687 +- 9,844
units_only | all factories in one | mixed | --no-separate-factories | 43,528 +- 11,327
two_trajectories | one for factories, one for units | mixed |\
 --no-separate-factories --no-separate-units | 6,162 +- 4,413
own_reward_75 | own reward 75% | own_reward | --own-reward 0.75 | about 33,800
own_reward_50 | own reward 50% | own_reward | --own-reward 0.5 | about 24,000
own_reward_25 | own reward 25% | own_reward | --own-reward 0.25 |
own_reward_0 | own reward 0% (global reward) | own_reward | --own-reward 0 | 9,614 +- 8,094
coma | COMA | ablations/coma_lux.py | |
gpae_95 | GPAE, lambda 0.95, paid the whole reward, entropy 0.05 | ablations/gpae_lux.py |\
 --gae-lambda 0.95 {GPAE} |
gpae_50 | GPAE, lambda 0.5 | ablations/gpae_lux.py | --gae-lambda 0.5 |
gpae_0 | GPAE, lambda 0, paid the whole reward, entropy 0.05 | ablations/gpae_lux.py | --gae-lambda 0 {GPAE} |
gpae_reuse_2 | GPAE, each rollout used twice | ablations/gpae_lux.py | --num-steps 32 --reuse 2 {GPAE} |
gpae_reuse_2_plain | GPAE, each rollout used twice, no importance weights | ablations/gpae_lux.py |\
 --num-steps 32 --reuse 2 --importance none {GPAE} |
gpae_steps_32 | GPAE, each rollout used once, as long as those used twice | ablations/gpae_lux.py |\
 --num-steps 32 {GPAE} |
dae_50 | DAE, beta 0.5 | ablations/dae_lux.py | --beta 0.5 |
dae_100 | DAE, beta 1, paid the whole reward | ablations/dae_lux.py | --beta 1 --team-scale 1 |
ippo_whole | IPPO, paid the whole reward | ippo_lux.py | --team-scale 1 |
mappo_whole | MAPPO, paid the whole reward | mappo_lux.py | --team-scale 1 |
coma_whole | COMA, paid the whole reward, 1 epoch | ablations/coma_lux.py | --team-scale 1 --update-epochs 1 |
gpae_50_whole | GPAE, lambda 0.5, paid the whole reward | ablations/gpae_lux.py | --gae-lambda 0.5 --team-scale 1 |
gpae_50_whole_entropy | GPAE, lambda 0.5, paid the whole reward, entropy 0.05 | ablations/gpae_lux.py |\
 --gae-lambda 0.5 {GPAE} |
dae_25_whole | DAE, beta 0.25, paid the whole reward | ablations/dae_lux.py | --beta 0.25 --team-scale 1 |
vdn_whole | VDN, paid the whole reward, less chance | ablations/vdn_lux.py |\
 --team-scale 1 --exploration-fraction 0.1 |
vdn_whole_end | VDN, paid the whole reward, chance down to 1% | ablations/vdn_lux.py |\
 --team-scale 1 --exploration-fraction 0.1 --end-e 0.01 |
trajsep_entropy | trajectory separation, entropy 0.05 | ppo_trajsep_lux.py | --ent-coef 0.05 |
mappo_entropy | MAPPO, entropy 0.05 | mappo_lux.py | --ent-coef 0.05 |
ippo_whole_entropy | IPPO, paid the whole reward, entropy 0.05 | ippo_lux.py | {GPAE} |
difference | difference rewards | ablations/difference_lux.py | |
difference_free | difference rewards without branches | own_reward |\
 --own-reward 0.9 --reward-ice-delivered 0.001 --reward-ice-received 0 |
trama_parent | no classes, all tasks | ablations/trama_lux.py | {TASKS} --num-classes 1 |
trama_cave | no classes, caves only | ablations/trama_lux.py | --tasks cave --num-classes 1 |
trama_mountain | no classes, mountains only | ablations/trama_lux.py | --tasks mountain --num-classes 1 |
trama_mountain_lean | no classes, lean mountains only | ablations/trama_lux.py | --tasks mountain-lean --num-classes 1 |
trama_oracle | told the task | ablations/trama_lux.py | {TASKS} --class-source task |
trama | TRAMA | ablations/trama_lux.py | {TASKS} |
trama_uniform | told a class by chance | ablations/trama_lux.py | {TASKS} --class-source uniform |
quadrant | units by quadrant | grouping | --grouping quadrant | 22,385
closest_factory | units by closest factory | grouping | --grouping closest-factory | 27,009
closest_heavy | units by closest heavy | grouping | --grouping closest-heavy | 35,224
top_advantage_1 | 1 by top advantage | sample_reduction | {TOP}-advantage | 38,072
top_advantage_1_all_values | 1 by top advantage, all values | sample_reduction | {TOP}-advantage --no-reduce-values |
top_abs_advantage_1 | 1 by top absolute advantage | sample_reduction | {TOP}-abs-advantage | 33,926
top_return_1 | 1 by top return | sample_reduction | {TOP}-return | 23,156
random_1 | 1 at random | sample_reduction | --samples-per-step 1 --keep random | 2,550
random_2 | 2 at random | sample_reduction | --keep random --samples-per-step 2 |
random_4 | 4 at random | sample_reduction | --keep random --samples-per-step 4 |
random_8 | 8 at random | sample_reduction | --keep random --samples-per-step 8 |
random_16 | 16 at random | sample_reduction | --keep random --samples-per-step 16 |
"""
VARIANTS = {}
for row in TABLE.strip().split("\n"):
    name, label, script, flags, paper_ice = (cell.strip() for cell in row.split("|"))
    script = script if script.endswith(".py") else f"ablations/trajsep_{script}_lux.py"
    VARIANTS[name] = Variant(name, label, script, flags, paper_ice)
FIGURES = {  # the first variant of each is what the others are compared with
    "baselines": "trajsep ippo mappo ippo_share mappo_share global",
    "rivals": "trajsep ippo mappo global coma gpae_95 gpae_50 gpae_0 gpae_reuse_2 dae_50 dae_100"
    " difference difference_free mappo_whole coma_whole gpae_50_whole gpae_50_whole_entropy dae_25_whole vdn_whole"
    " vdn_whole_end",
    "reuse": "gpae_95 gpae_reuse_2 gpae_reuse_2_plain gpae_steps_32",
    "controls": "trajsep global global_grad_10 global_no_value_clip global_twelfth ippo ippo_grad_10"
    " ippo_no_value_clip ippo_whole mappo mappo_grad_10 mappo_no_value_clip mappo_whole"
    " trajsep_entropy mappo_entropy ippo_whole_entropy",
    "size": "trajsep mappo gpae_50_whole_entropy coma_whole",  # at the scales cpu24, cpu and cpu40
    "specialists": "trama_parent trama_cave trama_mountain trama_mountain_lean",  # then cross_play.py
    "trama": "trama_parent trama_oracle trama trama_uniform",
    "norms": "trajsep poster_norms",
    "more_ice": "trajsep heavies",
    "epochs": "trajsep epochs_2",
    "paper_ppo": "trajsep trajsep_paper_ppo global global_paper_ppo",
    "paper_ppo_parts": "global global_paper_rollout global_paper_learning_rate global_paper_entropy"
    " global_paper_no_symmetries trajsep trajsep_paper_rollout trajsep_paper_learning_rate",
    "fig8": "trajsep global_critic own_reward_0 mappo",
    "fig4": "trajsep groups_1 groups_2 groups_4 groups_8 groups_16",
    "fig3": "trajsep units_only groups_1 two_trajectories global",
    "fig9": "trajsep own_reward_75 own_reward_50 own_reward_25 own_reward_0",
    "fig5": "trajsep quadrant closest_factory closest_heavy groups_4 groups_8",
    "fig6": "trajsep top_advantage_1 top_advantage_1_all_values top_abs_advantage_1 top_return_1 random_1",
    "fig7": "trajsep random_1 random_2 random_4 random_8 random_16",
    "headline": "trajsep_paper_ppo global_paper_ppo",  # at the paper's scale, if no other is asked for
}
FIGURES = {figure: [VARIANTS[name] for name in names.split()] for figure, names in FIGURES.items()}


def output(*command):
    """What a program prints, in one line; None where it is missing or fails."""
    if shutil.which(command[0]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return None if done.returncode else " ".join(done.stdout.split())


def processor():
    info = Path("/proc/cpuinfo")
    models = re.findall("model name\\s*: (.*)", info.read_text()) if info.exists() else []
    cpu = models[0] if models else platform.processor() or platform.machine()
    gpu = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return f"{cpu}, {os.cpu_count()} cores" + (f"; {gpu}" if gpu else "")


def replace(path, content):
    """Write a file in one piece: nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)


def end_with(runner):
    """In the new process, before its command begins: on Linux it gets a SIGTERM when the runner is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != runner:  # it went in between
            os._exit(1)


class Run:
    def __init__(self, variant, seed, scale):
        self.variant, self.process = variant, None
        self.name = f"{scale}-{variant.name}-{seed}"
        self.result = ROOT / f"ablations/results/{scale}/{variant.name}/seed{seed}.csv"
        self.folder, self.log = ROOT / "runs" / self.name, ROOT / f"runs/{self.name}.log"
        flags = f"{SCALES[scale]} {variant.flags} --seed {seed} --run-name {self.name} --resume"
        self.words = [variant.script, *shlex.split(flags)]
        self.command = f"python {shlex.join(self.words)}"

    def script_hash(self):
        return hashlib.sha256((ROOT / self.variant.script).read_bytes()).hexdigest()

    def is_outdated(self):
        """Whether the stored curve is known to come from another command or another version of the script."""
        try:
            made = json.loads(self.result.with_suffix(".json").read_text())
            return (made["command"], made["script_sha256"]) != (self.command, self.script_hash())
        except (OSError, ValueError, KeyError):  # not recorded by this program
            return False

    def start(self, threads):
        """Start the process; a sentence instead if it would go on with what another version of the script began."""
        copy, begun = self.folder / "script.py", self.folder.with_name(f"{self.name}.command")
        away = f"rename or remove {self.folder}, or go back to what began it"
        if copy.exists() and copy.read_bytes() != (ROOT / self.variant.script).read_bytes():
            return f"was begun by another version of {self.variant.script}: {away}"
        if (
            copy.exists() and begun.exists() and begun.read_text() != self.command
        ):  # a resumed run keeps what is not said
            return f"was begun by another command, {begun.read_text()}: {away}"
        self.collected = self.ended()
        changed = output("git", "status", "--porcelain", "-uno", "--", ".", ":!ablations/results")
        self.version = {
            "commit": output("git", "rev-parse", "--short", "HEAD") or "unknown",
            "clean": changed == "" == output("git", "ls-files", "--others", "--exclude-standard", "*.py"),
            "script_sha256": self.script_hash(),
        }
        begun.parent.mkdir(exist_ok=True)
        begun.write_text(self.command)
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the runner alone, which passes it on once
                preexec_fn=partial(end_with, os.getpid()),
            )

    def ended(self):
        """Whether the run's folder holds a run that is finished, on whatever machine."""
        try:
            last = list(csv.DictReader((self.folder / "progress.csv").read_text().splitlines()))[-1]
            settings = json.loads((self.folder / "args.json").read_text())
            batch = settings["num_envs"] * settings["num_steps"]
            return int(last["global_step"]) + batch > settings["total_timesteps"]
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return False

    def store(self):
        """Copy the curve of the ended process to results/; a sentence instead if it failed or is not whole."""
        if self.process.returncode:
            lines = self.log.read_text(errors="replace").strip().split("\n")
            boxes = [i for i, line in enumerate(lines) if line.startswith("╭")]  # the flags' parser draws one
            said = lines[boxes[-1] + 1].strip("│ ") if boxes and lines[-1].startswith("╰") else lines[-1]
            return f"failed with exit status {self.process.returncode} ({said}): see {self.log}"
        try:
            settings = json.loads((self.folder / "args.json").read_text())
            batch = settings["num_envs"] * settings["num_steps"]
            steps = settings["total_timesteps"] // batch * batch
            curve = (self.folder / "progress.csv").read_bytes()
            last = list(csv.DictReader(curve.decode().splitlines()))[-1]
            made = {"label": self.variant.label, "command": self.command, **self.version}
            if self.collected:  # the same script, but perhaps on another machine
                made["recorded"] = "collected from a run that was finished"
            else:
                made |= {"processor": processor(), "torch": version("torch")}
            made |= {"bf16": settings.get("bf16"), "steps": steps}
            made |= {"seconds": float(last["charts/seconds"]), "settings": settings}
            if int(last["global_step"]) != steps:
                return f"is not whole: {self.folder}/progress.csv ends at step {last['global_step']} of {steps}"
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            return f"left no whole curve in {self.folder}: {error!r}"
        replace(self.result.with_suffix(".json"), (json.dumps(made, indent=2) + "\n").encode())
        replace(self.result, curve)


def attempt(step, *given):
    """What a step of a run says, or the sentence of a disk that is full or may not be written."""
    try:
        return step(*given)
    except OSError as error:
        return f"stopped at {error}"


def run_all(runs, jobs, threads):
    """Start the runs as slots come free; a sentence for each that failed."""
    waiting, running, failed = list(runs), [], []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                if run.result.exists():  # another runner's
                    print(run.name, "was finished elsewhere", flush=True)
                elif problem := attempt(run.start, threads):
                    failed.append(f"{run.name} {problem}")
                else:
                    running.append(run)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                if problem := attempt(run.store):
                    failed.append(f"{run.name} {problem}")
                print(run.name, problem or "is finished", f"({len(waiting) + len(running)} to go)", flush=True)
            time.sleep(0.2)
    finally:  # also on a signal: no run goes on unseen
        for run in running:
            run.process.terminate()
        for run in running:
            run.process.wait()
    return failed


def stop(number, frame):
    print("Stopped: the same command goes on where its runs are.", file=sys.stderr)
    sys.exit(128 + number)


def own_variant(script, flags, label):
    name = re.sub("[^a-z0-9]+", "_", label.lower()).strip("_")
    if not (ROOT / script).is_file():
        sys.exit(f"--script: there is no {script} in {ROOT}.")
    try:
        shlex.split(flags)
    except ValueError as error:
        sys.exit(f"--flags {flags!r}: {str(error)[:1].lower()}{str(error)[1:]}.")
    if not 0 < len(name) <= 100 or name in VARIANTS:
        why = "which is taken, empty or longer than 100 letters"
        sys.exit(f"--label {label!r} gives the results folder {name!r}, {why}: choose another.")
    return Variant(name, label, os.path.normpath(script), flags)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", nargs="?", choices=[*FIGURES, "all"])
    parser.add_argument("--script", help="a variant of your own, in place of a figure")
    parser.add_argument("--flags", default="", help='its flags, in one piece: --flags="--x 1"')
    parser.add_argument("--label", help="its name in tables; its results folder is named by it (default: the script's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--scale", choices=SCALES, help="default: cpu, or paper for the headline")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=max(1, cores // 2), help="runs at a time (default: cores / 2)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the missing runs and stop")
    args = parser.parse_args()
    if (args.figure is None) == (args.script is None):
        sys.exit("Name a figure, or a variant of your own with --script.")
    if args.figure and (args.label or args.flags):
        sys.exit("--label and --flags are for a variant of your own: name it with --script, in place of a figure.")
    if args.jobs < 1:
        sys.exit(f"--jobs must be at least 1, got {args.jobs}.")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        sys.exit(f"--seeds must be 0 or more and none twice, got {' '.join(map(str, args.seeds))}.")
    scale = args.scale or ("paper" if args.figure == "headline" else "cpu")
    if args.script:
        variants = [own_variant(args.script, args.flags, args.label or Path(args.script).stem)]
    else:
        variants = dict.fromkeys(v for name in FIGURES if args.figure in (name, "all") for v in FIGURES[name])
    runs = [Run(variant, seed, scale) for seed in args.seeds for variant in variants]
    if outdated := [run.name for run in runs if run.result.exists() and run.is_outdated()]:
        kept = f"Of another command or script, and kept: {' '.join(outdated)}"
        if args.script:  # else seeds of several versions would come under one name
            sys.exit(f"{kept}. Nothing was run: give another --label, or remove them and their folders in runs/.")
        print(f"{kept} (to run one anew, remove its curve and its folder in runs/)", file=sys.stderr)
    runs = [run for run in runs if not run.result.exists()]
    if args.dry_run:
        print(*[run.command for run in runs], sep="\n", end="\n" if runs else "")
        return
    if not runs:
        print("Every one of these runs is finished.")
        return
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, stop)
    if failed := run_all(runs, args.jobs, max(1, cores // args.jobs)):
        sys.exit(f"{len(failed)} of {len(runs)} runs failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
