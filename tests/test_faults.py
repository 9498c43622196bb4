"""What can go wrong with a run, tried on real processes with real signals: one sentence, and nothing lost.

A cut is a copy of the script with some code put in, mostly a signal to itself at a given place.
"""

import ast
import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_script import SCRIPT, curve, one_sentence, read_csv, run, together
from warm import Warm

import ppo_trajsep_lux as script

TINY = "--map-size 24 --factories-per-team 1 --max-units 8 --channels 4 --num-envs 2 --num-steps 32 --no-cuda"
TINY += " --num-minibatches 2"
SOURCE = SCRIPT.read_text()
# places in the script, each the beginning of a line that is there once
ROLLOUT = "            last, next_obs = to_tensors(last, device)"
UPDATE = "                optimizer.step()\n"
GRADIENT = "                grad_norm = nn.utils.clip_grad_norm_("
RATIO = "                ratio = logratio.exp()\n"
LOSS = "                loss = pg_loss - ent_coef"
CHECK = "        losses = torch.stack(losses)"
SAVING = '        if os.path.exists(in_run("checkpoint.pt")):'
WORKER = "        for number in (signal.SIGINT, signal.SIGTERM):"  # in one that does not ignore them yet
STARTED = '    modes = {"copy": False'  # before workers are started
REPLAY = "        self.np_random.bit_generator.state = game"  # in a worker of a run that goes on
END = "    for process in envs.processes:"
WRITTEN = "        file.flush()\n"
RENAMED = '    with open(path + ".tmp", "wb") as file:\n'
WORKER_1 = "os.kill(envs.processes[1].pid, "
IN_WORKER_1 = "if '-1' in multiprocessing.current_process().name: os.kill(os.getpid(), "
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def cut(folder, *places):
    """A copy of the script in `folder` with code before each (place, code); it keeps its name."""
    source = SOURCE
    for place, code in places:
        assert source.count(place) == 1, place
        indent = place[: len(place) - len(place.lstrip())]
        source = source.replace(place, f"{indent}{code}\n{place}")
    folder.mkdir(exist_ok=True)
    (folder / SCRIPT.name).write_text(source)
    return folder / SCRIPT.name


def begin(cwd, flags, path=SCRIPT, **options):
    """Start a script and go on at once."""
    command = [str(path), *flags.split()]
    if not options:
        return Warm(command, cwd)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, *command], cwd=cwd, **pipes, **options)


def end(process, seconds=120, check=True):
    """Wait for its end: what `subprocess.run` returns. A process that does not end is killed; its status is None."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert not check, "it does not end"
        return subprocess.CompletedProcess(process.args, None, *process.communicate())
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def family(process):
    """The ids of the living processes of its session, in the order of their start."""
    ids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            number, rest = stat.parent.name, stat.read_text().rpartition(")")[2].split()
            if int(rest[3]) == process.pid and rest[0] not in "ZX":
                ids.append(int(number))
    return sorted(ids)


def gone(process, seconds=5):
    """Whether all its processes are gone after that time at most."""
    limit = time.time() + seconds
    while family(process) and time.time() < limit:
        time.sleep(0.05)
    return not family(process)


def wait_for(condition, process, seconds=60):
    limit = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < limit
        time.sleep(0.02)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder, name="model.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of seven iterations against both opponents, in the folders idle and self."""
    cwd = tmp_path_factory.mktemp("whole")
    together(*[partial(run, cwd, f"{TINY} {SEVEN[name]}") for name in SEVEN])
    return cwd / "runs"


SEVEN = {name: f"--opponent {name} --run-name {name} --total-timesteps 448" for name in ("idle", "self")}


@pytest.fixture
def copied(whole, tmp_path):
    """A folder with a copy of the finished run `idle`, and its last checkpoint."""
    shutil.copytree(whole / "idle", tmp_path / "runs/idle")
    return tmp_path


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Where a run was stopped in its third iteration."""
    cwd = tmp_path_factory.mktemp("begun")
    done = run(cwd, f"{TINY} {SEVEN['idle']}", cut(cwd / "cut", (UPDATE, f"if iteration == 3: {KILL}")), check=False)
    assert done.returncode == -9 and len(read_csv(cwd / "runs/idle/progress.csv")) == 2
    return cwd


@pytest.fixture
def two(begun, tmp_path):
    """A folder with a copy of that run."""
    shutil.copytree(begun / "runs", tmp_path / "runs")
    return tmp_path


# ---- a run that goes on


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Where each run was killed four times and continued: in a rollout, an update, a save and between two renames."""
    newest = "path.endswith('checkpoint.pt') and content['iteration'] == "

    def chain(opponent):
        cwd = tmp_path_factory.mktemp(opponent)
        flags, folder = f"{TINY} {SEVEN[opponent]} --resume", cwd / "runs" / opponent
        for rows, (place, code) in {
            2: (ROLLOUT, f"if iteration == 3 and step == 9: {KILL}"),
            3: (UPDATE, f"if iteration == 4: {KILL}"),
            5: (WRITTEN, f"if {newest}5: file.flush(); file.truncate(999); {KILL}"),
            6: (RENAMED, f"if {newest}6: {KILL}"),  # the last one is previous.pt already
        }.items():
            assert run(cwd, flags, cut(cwd / f"cut{rows}", (place, code)), check=False).returncode == -9
            assert len(read_csv(folder / "progress.csv")) == rows
            assert (folder / "checkpoint.pt").exists() == (rows < 4)
        assert "steps 320 to 448" in run(cwd, flags).stdout  # it had five iterations
        return folder

    return dict(zip(SEVEN, together(*[partial(chain, name) for name in SEVEN]), strict=True))


@pytest.mark.parametrize("opponent", SEVEN)
def test_killed_and_continued_is_the_uninterrupted_run_to_the_bit(whole, chains, opponent):
    folder = chains[opponent]
    assert curve(folder) == curve(whole / opponent) and len(curve(folder)) == 7
    assert same_weights(weights(folder), weights(whole / opponent))
    seconds = [float(row["charts/seconds"]) for row in read_csv(folder / "progress.csv")]
    assert seconds == sorted(set(seconds))
    events = EventAccumulator(str(folder)).Reload().Scalars("losses/entropy")
    assert [event.step for event in events] == [64, 128, 192, 256, 320, 384, 448]
    assert [event.value for event in events] == pytest.approx([float(row["losses/entropy"]) for row in curve(folder)])


def test_a_finished_run_is_left_as_it_is(copied):
    folder = copied / "runs/idle"
    before, times = contents(folder), {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = run(copied, f"{TINY} {SEVEN['idle']} --resume --track")
    assert done.stdout + done.stderr == "runs/idle is finished.\n"
    assert before == contents(folder) and times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_without_its_last_checkpoint_a_run_goes_on_from_the_one_before(copied, whole):
    """A damaged one is named first; nothing else is needed than to delete it."""
    folder = copied / "runs/idle"
    checkpoint = folder / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:50_000])
    before = contents(folder)
    done = run(copied, f"{TINY} {SEVEN['idle']} --resume", check=False)
    one_sentence(done, "runs/idle/checkpoint.pt", "damaged", "delete it")
    assert contents(folder) == before
    checkpoint.unlink()
    done = run(copied, f"{TINY} {SEVEN['idle']} --resume")
    assert "steps 384 to 448" in done.stdout
    assert curve(folder) == curve(whole / "idle") and same_weights(weights(folder), weights(whole / "idle"))


def test_a_run_that_has_lost_both_checkpoints_is_not_begun_anew(copied, monkeypatch):
    folder = copied / "runs/idle"
    for name in ("checkpoint.pt", "previous.pt"):
        (folder / name).unlink()
    before = contents(folder)
    status, said = read_flags(f"{TINY} {SEVEN['idle']} --resume", copied, monkeypatch)
    assert status == 1 and "runs/idle has lost its checkpoint.pt" in said
    assert contents(folder) == before
    rows = (folder / "progress.csv").read_text().splitlines(keepends=True)
    (folder / "progress.csv").write_text("".join(rows[:2]))  # killed after the first row, before its checkpoint
    assert read_flags(f"{TINY} {SEVEN['idle']} --resume", copied, monkeypatch)[0] == 0


# ---- the lines that read flags and checkpoint, in this process


def lines_of_main(first, last):
    """The statements of the main block from the one that begins with `first` to before `last`, compiled."""
    statements, inside = [], False
    for statement in ast.parse(SOURCE).body[-1].body:
        text = ast.get_source_segment(SOURCE, statement)
        inside = (inside or text.startswith(first)) and not text.startswith(last)
        statements += [statement] * inside
    assert statements, first
    return compile(ast.Module(statements, []), str(SCRIPT), "exec")


FLAGS_AND_CHECKPOINT = lines_of_main("args,", "torch.manual_seed(")


class Hang(BaseException):
    """It took too long."""


def hang(*_):
    raise Hang


class Left(Exception):
    """In place of the end of this process."""


def leave(status, sentence):
    raise Left(status, sentence)


@contextlib.contextmanager
def as_main(flags, cwd, monkeypatch, seconds=20):
    """What the main block's lines find; the flags and the folder are a user's."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    here = Path.cwd()
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        os.chdir(cwd)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(SCRIPT), *flags])
            patch.setattr(sys, "excepthook", sys.excepthook)
            yield {**vars(script), "__name__": "__main__", "leave": leave}
    finally:
        signal.alarm(0)
        os.chdir(here)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_flags(flags, cwd, monkeypatch):
    """(status, what is said) for a command line, up to where the run would begin; status 0 if it would."""
    said, flags = io.StringIO(), flags.split() if isinstance(flags, str) else flags
    with as_main(flags, cwd, monkeypatch) as space, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            exec(FLAGS_AND_CHECKPOINT, space)
        except Left as ended:
            return ended.args
        except SystemExit as ended:  # of tyro
            return ended.code or 0, said.getvalue()
        except script.Refusal as refusal:
            return 1, str(refusal)
    return 0, space["args"]


def test_flags_that_differ_are_refused_by_name(copied, monkeypatch):
    for flag, name in {
        "--learning-rate 0.002": "--learning-rate",
        "--total-timesteps 512": "--total-timesteps",
        "--no-anneal-lr": "--anneal-lr",
        "--opponent self": "--opponent",
        "--seed 2": "--seed",
        "--small": "--small",
    }.items():
        status, said = read_flags(f"{TINY} {SEVEN['idle']} --resume {flag}", copied, monkeypatch)
        assert status == 1 and name in said and "runs/idle" in said
    (copied / "runs/idle/checkpoint.pt").unlink()
    status, args = read_flags(f"{TINY} {SEVEN['idle']} --resume --track", copied, monkeypatch)
    assert status == 0 and args.track


def test_what_a_run_was_begun_with_need_not_be_said_again(copied, monkeypatch):
    (copied / "runs/idle/checkpoint.pt").unlink()
    said = script.Args(**torch.load(copied / "runs/idle/model.pt", weights_only=True)["args"])
    said.resume = True
    for flags in ("", "--total-timesteps 448"):  # less than one rollout of the default settings
        status, args = read_flags(f"--run-name idle --resume {flags}", copied, monkeypatch)
        assert status == 0, args
        assert args.num_envs == 2 and args.total_timesteps == 448 and args.channels == 4


def test_a_run_whose_folder_was_renamed_goes_on(copied, monkeypatch):
    """Also one that was begun without a name, whose settings then have none."""
    (copied / "runs/idle/checkpoint.pt").unlink()
    os.replace(copied / "runs/idle", copied / "runs/other")
    status, args = read_flags("--run-name other --resume", copied, monkeypatch)
    assert status == 0 and args.run_name == "other" and args.num_envs == 2
    status, said = read_flags("--run-name other --resume --gamma 0.5", copied, monkeypatch)
    assert status == 1 and said.startswith("--gamma was another")


@pytest.mark.parametrize("name", ["../../x", "/x/y", "a/b", "a/", ".", "..", "x" * 300])
def test_a_run_name_is_one_plain_folder(name, tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "here").mkdir()
    for resume in ([], ["--resume"]):
        status, said = read_flags(["--run-name", name, *resume], tmp_path / "here", monkeypatch)
        assert status == 1 and "--run-name must be" in said and len(said) < 400 and "\n" not in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "x"]


@pytest.mark.parametrize("name", ["größe", "a\nb", "\udcff"])
def test_a_run_name_is_printable(name, tmp_path, monkeypatch):
    status, said = read_flags(["--run-name", name], tmp_path, monkeypatch)
    assert status == 1 and "--run-name must be" in said and "\n" not in said


def test_resume_needs_a_name(tmp_path, monkeypatch):
    status, said = read_flags("--resume", tmp_path, monkeypatch)
    assert status == 1 and "--run-name" in said and "--resume needs" in said


def test_good_run_names(tmp_path, monkeypatch):
    for name in ("x", "a.b", "trajsep_lux__1__17", "2026-01-01", "x" * 200):
        assert read_flags(["--run-name", name], tmp_path, monkeypatch)[0] == 0


VALUES = "0 1 -1 2 7 3.5 64 1e9 -1e30 nan inf 10000000000000000000000 ../x None idle self 1_000 ü --"


def flag_lines(rng, number):
    """Flag lines of one to three flags, most of which exist, with values of which some fit."""
    names = [name.replace("_", "-") for name in script.Args.__dataclass_fields__]
    names += ["no-anneal-lr", "no-cuda", "no-such-flag", ""]
    for _ in range(number):
        line = []
        for _ in range(rng.integers(1, 4)):
            line += [f"--{rng.choice(names)}"] + [str(rng.choice(VALUES.split()))] * (rng.random() < 0.8)
        yield line


def test_no_flag_line_ends_in_a_traceback(tmp_path, monkeypatch):
    statuses = [read_flags(line, tmp_path, monkeypatch)[0] for line in flag_lines(np.random.default_rng(0), 60)]
    assert set(statuses) == {0, 1, 2}
    assert not list(tmp_path.iterdir())


# ---- damaged checkpoints, in this process

LOADING = next(
    statement
    for statement in ast.walk(ast.parse(SOURCE).body[-1])
    if isinstance(statement, ast.If) and "agent.load_state_dict" in ast.unparse(statement.orelse)
).orelse
LOADING = compile(ast.Module(LOADING, []), str(SCRIPT), "exec")


class OneEnvironment:
    """In place of the workers: it replays the games in this process."""

    def set_attr(self, name, games):
        for game in games:
            env = script.LuxEnv(self.args)
            setattr(env, name, game)


def load(cwd, monkeypatch):
    """What a run reads on resuming: (status, what is said or the weights)."""
    with as_main(["--run-name", "idle", "--resume"], cwd, monkeypatch) as space:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(FLAGS_AND_CHECKPOINT, space)
            args = space["args"]
            space["agent"] = script.Agent(args)
            space["optimizer"] = torch.optim.Adam(space["agent"].parameters(), lr=args.learning_rate, eps=1e-8)
            space["envs"], space["device"], space["recent"] = OneEnvironment(), "cpu", []
            space["envs"].args = args
            exec(LOADING, space)
        except script.Refusal as refusal:
            return 1, str(refusal)
    return 0, space["agent"].state_dict()


def damage(rng, whole):
    """A file cut off somewhere, or with up to four bits of it turned."""
    if rng.random() < 0.2:
        return whole[: rng.integers(len(whole))]
    damaged = bytearray(whole)
    for _ in range(rng.integers(1, 5)):
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
    return bytes(damaged)


@pytest.fixture
def resumable(copied):
    """That run with six iterations of its seven."""
    os.replace(copied / "runs/idle/previous.pt", copied / "runs/idle/checkpoint.pt")
    return copied


def test_damaged_checkpoints_are_found(resumable, monkeypatch):
    path, rng = resumable / "runs/idle/checkpoint.pt", np.random.default_rng(0)
    good, (status, first) = path.read_bytes(), load(resumable, monkeypatch)
    assert status == 0
    found = 0
    for case in range(40):
        path.write_bytes(b"" if case == 0 else b"text" if case == 1 else damage(rng, good))
        status, said = load(resumable, monkeypatch)
        if status:
            assert said.startswith("runs/idle/checkpoint.pt is damaged") and "\n" not in said
            found += 1
        else:  # a turned bit that nobody reads
            assert same_weights(said, first)
    assert found > 30


def test_a_damaged_older_checkpoint_does_not_matter(resumable, monkeypatch):
    folder = resumable / "runs/idle"
    (folder / "previous.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:1000])
    assert load(resumable, monkeypatch)[0] == 0


# ---- stopped, killed, stuck or diverged in the third iteration

HERE, LATER = "os.kill(os.getpid(), signal.SIGINT)", "import threading; threading.Timer({}, os.killpg, (0, 2)).start()"
SAY_STOPPED, SAY_LOST = "Stopped at step 128; rerun it with --resume", "environment [1] died or hangs"
SAY_SLOW = "processes did not start in 10 minutes"
LEAVING = "    for process in multiprocessing.active_children():\n"
CASES = {  # status, what the sentence says, what has happened: (place, code)
    "SIGINT in a rollout": (130, SAY_STOPPED, (ROLLOUT, f"if step == 9: {HERE}")),
    "SIGINT to the group in a rollout": (130, SAY_STOPPED, (ROLLOUT, "if step == 9: os.killpg(0, signal.SIGINT)")),
    "SIGTERM in an update": (143, SAY_STOPPED, (UPDATE, "os.kill(os.getpid(), signal.SIGTERM)")),
    "SIGINT while it saves": (130, SAY_STOPPED, (SAVING, HERE)),
    "SIGINT with a stuck worker": (130, SAY_STOPPED, (UPDATE, f"{WORKER_1}signal.SIGSTOP); {HERE}")),
    "SIGINT while it waits for a stuck worker": (
        *(130, SAY_STOPPED),
        (ROLLOUT, f"if step == 9: {WORKER_1}signal.SIGSTOP); {LATER.format(1)}"),
    ),
    "SIGINT before workers are started": (130, "Stopped at step", (STARTED, "os.killpg(0, signal.SIGINT)")),
    "SIGINT while workers are started": (130, "Stopped at step", (STARTED, LATER.format(0.01))),
    "SIGINT that reaches a worker as it is forked": (
        *(130, "Stopped at step"),
        (STARTED, "os.register_at_fork(after_in_child=lambda: os.killpg(0, signal.SIGINT))"),
    ),
    "SIGINT that reaches a worker before it ignores it": (
        *(130, "Stopped at step"),
        (WORKER, "if '-1' in multiprocessing.current_process().name: os.killpg(0, signal.SIGINT)"),
    ),
    "SIGINT again": (
        *(130, SAY_STOPPED),
        (LEAVING, f"globals().setdefault('again', []).append(1); len(again) > 1 or {HERE}"),
        (UPDATE, HERE),
    ),
    "SIGKILL in an update": (-9, "", (UPDATE, KILL)),
    "a worker killed in a rollout": (1, SAY_LOST, (ROLLOUT, f"{WORKER_1}signal.SIGKILL)")),
    "a worker killed in an update": (1, SAY_LOST, (CHECK, f"{WORKER_1}signal.SIGKILL)")),
    "a worker stuck in a rollout": (1, SAY_LOST, (ROLLOUT, f"{WORKER_1}signal.SIGSTOP)")),
    "a worker stuck in an update": (1, SAY_LOST, (CHECK, f"{WORKER_1}signal.SIGSTOP)")),
    "a worker killed at the start": (1, "rerun it with --resume", (WORKER, f"{IN_WORKER_1}signal.SIGKILL)")),
    "a worker killed while it replays": (1, SAY_LOST, (REPLAY, f"{IN_WORKER_1}signal.SIGKILL)")),
    "a worker stuck at the start": (1, SAY_SLOW, (WORKER, f"{IN_WORKER_1}signal.SIGSTOP)")),
    "a worker stuck while it replays": (1, SAY_SLOW, (REPLAY, f"{IN_WORKER_1}signal.SIGSTOP)")),
    "a worker stuck at the end": (0, "", (END, f"{WORKER_1}signal.SIGSTOP)")),
    "policy loss": (1, "policy_loss is not finite in iteration 3", (LOSS, "pg_loss = pg_loss * torch.inf")),
    "value loss": (1, "value_loss is not finite in iteration 3", (LOSS, "v_loss = v_loss * torch.nan")),
    "gradient": (
        *(1, "grad_norm is not finite in iteration 3"),
        (GRADIENT, "next(agent.parameters()).grad.mul_(torch.inf)"),
    ),
    "weight": (1, "weight is not finite in iteration 3", (CHECK, "next(agent.parameters()).data.mul_(torch.nan)")),
    "ratio": (1, "not finite in iteration 3: lower --learning-rate", (RATIO, "logratio = logratio + 90")),
}


@pytest.fixture(scope="module")
def outcomes(begun, tmp_path_factory):
    """How each case ended, from a copy of the run with two iterations: its folder, the end, whether all are gone."""

    def play(name):
        cwd = tmp_path_factory.mktemp("case")
        shutil.copytree(begun / "runs", cwd / "runs")
        path = cut(cwd / "cut", *CASES[name][2:])
        if "a worker" in name:
            path.write_text(path.read_text().replace("timeout=60", "timeout=3").replace("Timer(600", "Timer(9"))
        process = begin(cwd, f"{TINY} {SEVEN['idle']} --resume", path)
        done = end(process, 90, check=False)
        return cwd, done, gone(process)

    return dict(zip(CASES, together(*[partial(play, name) for name in CASES]), strict=True))


@LINUX
@pytest.mark.parametrize("name", CASES)
def test_a_run_ends_with_a_sentence_and_all_it_had(begun, outcomes, name):
    (cwd, done, all_gone), (status, words, *_) = outcomes[name], CASES[name]
    if words:
        one_sentence(done, words, status=status)
    assert done.returncode == status and (words or done.stderr == "")
    assert all_gone and "Traceback" not in done.stdout
    before, after = contents(begun / "runs/idle"), contents(cwd / "runs/idle")
    if status == 0:  # it went on to its end
        before = {}
    if name.endswith(" saves") or (name.endswith("in an update") and status == 1):  # the newest policy was saved
        before = {Path("checkpoint.pt"): before[Path("checkpoint.pt")]}
    assert all(after[path] == content for path, content in before.items())
    assert all(tensor.isfinite().all() for tensor in weights(cwd / "runs/idle").values())


@LINUX
def test_in_use_then_killed(tmp_path):
    """A second process is refused while the first lives; kill -9 leaves no worker, also not a stuck one."""
    flags = f"{TINY} --run-name used --resume --total-timesteps 100000"
    process = begin(tmp_path, flags)
    wait_for((tmp_path / "runs/used/checkpoint.pt").exists, process)
    one_sentence(run(tmp_path, flags, check=False), "Another process", "runs/used")
    one_sentence(run(tmp_path, flags.replace("--resume", ""), check=False), "exists already", "--resume")
    assert process.poll() is None and len(family(process)) == 3
    os.kill(family(process)[2], signal.SIGSTOP)
    process.kill()
    assert end(process).returncode == -9
    assert gone(process)


def test_nohup(two, whole):
    """SIGHUP, which a terminal sends when it is closed, is ignored by what was started with nohup."""
    path = cut(two / "cut", (ROLLOUT, "os.killpg(0, signal.SIGHUP)"))
    command = f"trap '' HUP; exec {sys.executable} {path} {TINY} {SEVEN['idle']} --resume"
    command = ["bash", "-c", command]
    done = subprocess.run(command, cwd=two, start_new_session=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert curve(two / "runs/idle") == curve(whole / "idle")


@pytest.mark.parametrize("steps", ["", "--num-minibatches 1 --update-epochs 1"], ids=["many steps", "one step"])
def test_a_learning_rate_of_a_million(tmp_path, steps):
    flags = f"{TINY} --total-timesteps 256 --run-name fast --learning-rate 1e6"
    one_sentence(run(tmp_path, f"{flags} {steps}", check=False), "not finite in iteration", "--learning-rate")
    for path in (tmp_path / "runs/fast").glob("*.pt"):
        assert all(tensor.isfinite().all() for tensor in weights(path.parent, path.name).values())


# ---- disk, memory, output


def test_runs_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").touch()
    one_sentence(run(tmp_path, f"{TINY} {SEVEN['idle']}", check=False), "runs/idle")
    assert (tmp_path / "runs").read_bytes() == b""


def test_too_few_file_descriptors(tmp_path):
    command = ["bash", "-c", f"ulimit -n 24; {sys.executable} {SCRIPT} {TINY} {SEVEN['idle']} --num-envs 12"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    one_sentence(done, "Too many open files", "--num-envs")
    assert not (tmp_path / "runs").exists()


def test_an_error_that_speaks_of_memory_keeps_its_traceback(monkeypatch):
    said = []
    monkeypatch.setattr(script, "leave", lambda status, sentence: said.append(sentence))
    monkeypatch.setattr(sys, "__excepthook__", lambda *error: said.append("traceback"))
    shared = RuntimeError("more than one element of the written-to tensor refers to a single memory location")
    cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes")
    gpu = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    for error in (shared, KeyError("memory"), cpu, gpu):
        script.explain(None, type(error), error, None)
    assert [sentence == "traceback" for sentence in said] == [True, False, True, False, False, False]
    assert "error in the code" in said[1] and "fewer --num-envs" in said[4] and "fewer --num-envs" in said[5]
    script.explain(None, EOFError, EOFError(), None)  # a worker that died while workers were started
    assert len(said) == 7 and said[6].startswith("EOFError: see to it")


def test_more_memory_than_there_is(tmp_path):
    flags = f"{TINY} --run-name big --num-steps 400000000 --total-timesteps 1000000000"
    one_sentence(run(tmp_path, flags, check=False), "memory")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A folder whose runs/ has 300 kB."""
    (tmp_path / "runs").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(tmp_path / "runs")]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs a user who may mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path / "runs")], check=True)


def test_a_full_disk(small_disk, whole):
    """The last whole checkpoint stays; with room again the run goes on."""
    flags, folder = f"{TINY} {SEVEN['idle']} --resume", small_disk / "runs/idle"
    done = run(small_disk, flags, check=False)
    one_sentence(done, "No space left on device", "--resume")
    iterations = [torch.load(path, weights_only=True)["iteration"] for path in folder.glob("[cp]*.pt")]
    assert iterations and max(iterations) >= 1
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())
    rows = read_csv(folder / "progress.csv")
    assert rows and all(None not in row.values() for row in rows)
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk / "runs")], check=True)
    run(small_disk, flags)
    assert curve(folder) == curve(whole / "idle") and same_weights(weights(folder), weights(whole / "idle"))


@LINUX
@pytest.mark.parametrize("options", ["size=64k", "size=64k,ro"], ids=["small", "read-only"])
def test_no_shared_memory(tmp_path, options):
    """The environments' processes and the main one share /dev/shm, here another one in a mount namespace."""
    apart = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {options} none /dev/shm && exec "$@"', "sh"]
    try:
        if subprocess.run([*apart, "true"], capture_output=True).returncode:
            pytest.skip("needs a user who may mount a tmpfs")
    except FileNotFoundError:
        pytest.skip("needs unshare")
    command = [*apart, sys.executable, str(SCRIPT), *f"{TINY} {SEVEN['idle']}".split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    one_sentence(done, "--num-envs")
    assert not (tmp_path / "runs").exists()


@LINUX
@pytest.mark.parametrize("ends", ["| head -c 0", "2>&1 | head -c 0", ">&- 2>&-"], ids=["pipe", "both", "closed"])
def test_output_that_nobody_reads(two, whole, ends):
    """A run that cannot say a word ends as any other: its sentence if it can be read, no worker."""
    command = f"{sys.executable} {SCRIPT} {TINY} {SEVEN['idle']} --resume {ends}; exit ${{PIPESTATUS[0]}}"
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=two, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    done = end(process, 40)
    assert gone(process)
    if "|" not in ends:
        assert done.returncode == 0 and curve(two / "runs/idle") == curve(whole / "idle")
    elif ends.startswith("|"):
        one_sentence(done, "Broken pipe")
    else:
        assert done.returncode == 1


def test_output_in_ascii(tmp_path):
    run(tmp_path, f"{TINY} --run-name ascii --total-timesteps 64", PYTHONIOENCODING="ascii")
    assert len(read_csv(tmp_path / "runs/ascii/progress.csv")) == 1


def test_tracking_without_a_login(tmp_path):
    """No network is asked: without a key there is nobody to log in."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | {"HOME": str(tmp_path)}
    process = begin(tmp_path, f"{TINY} {SEVEN['idle']} --track", env=env)
    done = end(process, 60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "wandb" in done.stderr.splitlines()[-1] and "login" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
    assert gone(process)


def test_an_error_while_tracking(tmp_path):
    """Weights and Biases puts an excepthook of its own in the place of the script's, which prints a traceback."""
    flags = f"{TINY} --total-timesteps 256 --run-name fast --learning-rate 1e6 --track"
    done = run(tmp_path, flags, check=False, WANDB_MODE="offline")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "not finite in iteration" in done.stderr
    assert (tmp_path / "wandb").is_dir()


# ---- random play


def random_games(rng, steps, sizes, factories):
    """Random legal play at every size and number of factories; how much the process grows meanwhile, in MB."""
    played = 0
    for size, number in [(size, number) for size in sizes for number in factories]:
        env = script.LuxEnv(
            script.Args(map_size=size, factories_per_team=number, max_units=8 * number, opponent="self")
        )
        try:
            env.reset(seed=int(rng.integers(1000)))
        except script.Refusal:
            assert size < 32 and number > 2  # no room
            continue
        over = True
        for step in range(steps):
            if over:
                env.reset()
            score = rng.random((2, env.num_slots, script.NUM_ACTIONS))
            obs, _, over, _, _ = env.step(np.where(obs_mask(env), score, -1).argmax(-1))
            assert step % 20 or env.observation_space.contains(obs)
        played += 1
    return played


def obs_mask(env):
    """The masks as the network sees them: the environment turns actions back."""
    return np.array(
        [
            script.observe(view, mask, env.symmetry)["action_mask"]
            for view, mask in zip(env.views, env.masks, strict=True)
        ]
    )


def test_random_play_at_all_sizes():
    rng = np.random.default_rng(0)
    assert random_games(rng, 60, (24, 40), (1, 10)) == 3
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert random_games(rng, 300, (24, 64), (1, 4)) == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB: a bigger map is not free
