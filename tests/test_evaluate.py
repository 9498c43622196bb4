"""tools/evaluate.py: the same numbers by any number of jobs; and what tools/load.py refuses of a model file."""

import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
import torch
import warm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import evaluate  # noqa: E402
import load  # noqa: E402

SCRIPTS = [*ROOT.glob("*_lux.py"), *ROOT.glob("ablations/*_lux.py")]
PARENT = ROOT / "ppo_trajsep_lux.py"
TINY = {"map_size": 24, "factories_per_team": 1, "max_units": 16, "channels": 8}


def make_run(folder, source=PARENT, **settings):
    """A run's folder as a script leaves it, of a policy that nobody has trained."""
    script = load.import_script(source)
    torch.manual_seed(0)
    args = script.Args(**TINY | settings)
    folder.mkdir()
    model = {"script": source.stem, "args": asdict(args), "model": script.Agent(args).state_dict()}
    torch.save(model, folder / "model.pt")
    shutil.copy(source, folder / "script.py")
    return folder


def tool(name, *flags, cwd=None):
    """What a tool says that is started with these flags."""
    return warm.start([ROOT / "tools" / name, *flags], cwd)


def tool_here(name, *flags, cwd="."):
    """The same in this process, which has imported torch already: seconds less."""
    before, status = os.getcwd(), 0
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, flags)])
        patch.chdir(cwd)
        try:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        except SystemExit as end:
            assert isinstance(end.code, str)  # the tools end by a sentence
            status = print(end.code, file=err) or 1
    assert os.getcwd() == before
    return subprocess.CompletedProcess([name, *flags], status, out.getvalue(), err.getvalue())


def refused(done, *words):
    """One sentence on stderr, a status that is not zero, nothing on stdout."""
    assert done.returncode == 1 and not done.stdout, done.stdout
    assert done.stderr.count("\n") == 1 and all(word in done.stderr for word in words), done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("evaluate") / "run")


def test_the_numbers_do_not_depend_on_the_jobs(run, tmp_path):
    tables, files = [], []
    for jobs in (1, 2):
        path = tmp_path / f"{jobs}.json"
        done = tool("evaluate.py", run, "--episodes", 2, "--jobs", jobs, "--json", path)
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout)
        files.append(path.read_text())
    assert tables[0] == tables[1] and files[0] == files[1]
    content = json.loads(files[0])
    assert [row["map_seed"] for row in content["maps"]] == [0, 1]
    assert content["args"]["channels"] == 8 and content["greedy"] is False
    table = [line.replace(",", "").split() for line in tables[0].splitlines()[1:]]
    assert [line[0] for line in table] == [*content["mean"]] == [*content["std"]] == [*content["maps"][0]][1:]
    assert content["maps"][0]["episodic_return"] != content["maps"][1]["episodic_return"]
    for name, mean, _, std in table:  # of two values, by hand
        one, other = (row[name] for row in content["maps"])
        assert content["mean"][name] == pytest.approx((one + other) / 2)
        assert content["std"][name] == pytest.approx(abs(one - other) / 2)
        assert (float(mean), float(std)) == pytest.approx((content["mean"][name], content["std"][name]), abs=0.0051)

    refused(tool_here("evaluate.py", run, "--json", tmp_path / "1.json"), "exists already")
    assert (tmp_path / "1.json").read_text() == files[0]


def test_greedy_play_and_another_map_size(run):
    where = {"run": run, "best": False, "script": None, "map_size": None}
    sampled, greedy = (evaluate.play(0, where, greedy) for greedy in (False, True))
    assert sampled != greedy and sampled == evaluate.play(0, where, False)
    larger = load.load(run, map_size=32)[1]
    assert larger.map_size == 32 and evaluate.play(0, where | {"map_size": 32}, False) != sampled


def test_lichen_is_what_the_factories_are_paid_for(run, tmp_path):
    content = torch.load(run / "model.pt", weights_only=True)
    content["args"]["reward_lichen"] = 1.0
    torch.save(content, tmp_path / "model.pt")
    (tmp_path / "script.py").write_bytes((run / "script.py").read_bytes())
    where = {"best": False, "script": None, "map_size": None}
    found = [[evaluate.play(n, where | {"run": folder}, False) for n in range(6)] for folder in (run, tmp_path)]
    assert sum(paid["lichen_gained"] for paid in found[1]) > 0
    for plain, paid in zip(*found, strict=True):
        assert paid["episodic_return"] - plain["episodic_return"] == pytest.approx(paid["lichen_gained"], abs=1e-3)
        assert 0 <= paid["lichen"] <= paid["lichen_gained"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"episodes": 0}, "--episodes must be between 1 and"),
        ({"jobs": 0}, "--jobs must be at least 1"),
        ({"map_size": 23}, "--map-size must be between 24 and 64, got 23."),
        ({"map_size": 0}, "--map-size must be between 24 and 64, got 0."),
        ({"best": True}, "best.pt"),
        ({"json": Path("no/such/folder.json")}, "folder that does not exist"),
    ],
)
def test_flags_that_cannot_be(run, flags, words):
    usual = {"best": False, "script": None, "map_size": None, "episodes": 1, "greedy": False, "json": None, "jobs": 1}
    with pytest.raises(load.Refusal, match=words):
        evaluate.evaluate(Namespace(run=run, **usual | flags))


@pytest.mark.parametrize("source", SCRIPTS, ids=lambda path: path.stem)
def test_a_run_of_each_script_loads(tmp_path, source):
    make_run(tmp_path / "run", source)
    script, args, agent = load.load(tmp_path / "run")
    assert args.channels == 8 and script.__file__ == str(tmp_path / "run" / "script.py")
    assert all(weight.device.type == "cpu" for weight in agent.state_dict().values())


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("clip_reward: float | None = None", (None, 0.5, 2), ("0.5", [1.0])),
        ("clip_reward: tuple[float, float] = (0.5, 0.25)", ((1.0, 2.0),), (0.5, None)),
        ("clip_reward: list[int] = field(default_factory=list)", ([], [3]), ((3,), 3)),
        ("clip_reward: Literal['a', 'b'] = 'a'", ("a", "b"), ("c", None)),
    ],
)
def test_a_setting_of_a_scripts_own(tmp_path, field, good, bad):
    """A changed copy may have a setting of any type that tyro knows."""
    source = tmp_path / "mine_lux.py"
    text = PARENT.read_text()
    assert text.count("    seed: int = 1\n") == 1
    source.write_text(text.replace("    seed: int = 1\n", f"    {field}\n    seed: int = 1\n"))
    run = make_run(tmp_path / "run", source)
    content = torch.load(run / "model.pt", weights_only=True)
    for value in (*good, *bad):
        content["args"]["clip_reward"] = value
        torch.save(content, run / "model.pt")
        if value in good:
            assert load.load(run)[1].clip_reward == value
        else:
            with pytest.raises(load.Refusal, match="the setting clip_reward is wrong"):
                load.load(run)


def test_a_function_with_more_parameters_than_a_tool_knows():
    def compute_gae(trajectories, gamma, clip=10.0, *rest, **more):
        return trajectories, gamma, clip, rest, more

    assert load.call(compute_gae, {"trajectories": 1, "gamma": 2, "rest": 3}) == (1, 2, 10.0, (), {})
    assert load.call(compute_gae, {"trajectories": 1, "gamma": 2, "clip": 3}) == (1, 2, 3, (), {})
    with pytest.raises(load.Refusal, match="needs 'gamma'"):
        load.call(compute_gae, {"trajectories": 1})


def test_bfloat16_is_left_off_where_the_run_or_this_processor_has_it_off(tmp_path, monkeypatch):
    """A GPU does not count: the tools play on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for able, said, expected in ((True, False, False), (False, True, False), (True, True, True)):
        run = make_run(tmp_path / f"{able}{said}", bf16=said)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        assert load.load(run)[1].bf16 is expected


def test_best_another_script_and_a_lone_file(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    content = torch.load(folder / "model.pt", weights_only=True)
    content["model"]["actor_head.bias"][0] = 7
    torch.save(content, folder / "best.pt")
    for _, _, agent in (load.load(folder, best=True), load.load(folder / "best.pt")):
        assert agent.actor_head.bias[0] == 7
    assert load.load(folder)[2].actor_head.bias[0] == 0

    lone = shutil.copy(run / "model.pt", tmp_path / "lone.pt")
    with pytest.raises(load.Refusal, match="ppo_trajsep_lux.py is, which made"):
        load.load(Path(lone))
    assert load.load(Path(lone), script=PARENT)[1].channels == 8
    with pytest.raises(load.Refusal, match="was made by ppo_trajsep_lux.py, not by ippo_lux.py"):
        load.load(folder, script=ROOT / "ippo_lux.py")
    # a copy of another script, whose name does not tell
    shutil.copy(ROOT / "ippo_lux.py", folder / "script.py")
    with pytest.raises(load.Refusal, match="team_scale|num_groups"):
        load.load(folder)
    (tmp_path / "script.py").write_text("x = 1\n")
    with pytest.raises(load.Refusal, match="not a training script"):
        load.load(Path(lone))


def broken(path, how):
    """Put something that is no whole model file in the place of one."""
    data = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "packed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model/data.pkl", bytes(10**8))
    elif how == "code":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/data.pkl", pickle.dumps(Touch(path.with_name("touched")), 2))
            archive.writestr("model/version", "3")
    else:
        flipped = bytearray(data)
        flipped[data.index(b"actor_head.bias") if how == "name flipped" else len(data) // 2] ^= 1
        contents = {"text": b"no model\n", "empty": b"", "short": data[:-100], "start": data[:3000]}
        path.write_bytes(contents.get(how, bytes(flipped)))


class Touch:
    """Unpickled as code, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
        ("text", "not a model file"),
        ("empty", "is empty"),
        ("short", "is damaged"),
        ("start", "is damaged"),
        ("bit flipped", "is damaged"),
        ("name flipped", "is damaged"),
        ("packed", "unpacks to more than it holds"),
        ("code", "is damaged, or no model file"),
    ],
)
def test_files_that_are_no_whole_model(run, tmp_path, how, words):
    folder = shutil.copytree(run, tmp_path / "run")
    broken(folder / "model.pt", how)
    with pytest.raises(load.Refusal, match=words) as refusal:
        load.load(folder)
    assert str(folder / "model.pt") in str(refusal.value)
    assert not (folder / "touched").exists()


def edit(content, what):
    args, weights = content["args"], content["model"]
    if what == "a setting missing":
        del args["gamma"]
    elif what == "a setting unknown":
        args["surprise"] = 1
    elif what == "a text for a number":
        args["channels"] = "8"
    elif what == "a choice that is none":
        args["opponent"] = "me"
    elif what == "a list for a choice":
        args["opponent"] = [["idle"]]
    elif what == "not a number":
        args["gamma"] = float("nan")
    elif what == "huge":
        args["channels"] = 4096
    elif what == "beyond the range":
        args["channels"] = 10**9
    elif what == "NaN":
        weights["critic_head.weight"][0, 0] = float("nan")
    elif what == "a tensor missing":
        del weights["actor_head.bias"]
    elif what == "a tensor unknown":
        weights["extra"] = torch.zeros(1)
    elif what == "a list for a tensor":
        weights["actor_head.bias"] = [0.0] * 24
    elif what == "half precision":
        weights["actor_head.bias"] = weights["actor_head.bias"].half()
    elif what == "settings missing":
        del content["args"]
    elif what == "weights only":
        content["model"] = weights["actor_head.bias"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("a setting missing", "lacks the setting gamma"),
        ("a setting unknown", "has an unknown setting surprise"),
        ("a text for a number", "the setting channels is wrong"),
        ("a choice that is none", "the setting opponent is wrong"),
        ("a list for a choice", "the setting opponent is wrong"),
        ("not a number", "--gamma must be between"),
        ("huge", "does not fit the settings"),
        ("beyond the range", "--channels must be between"),
        ("NaN", "the tensor critic_head.weight is not finite"),
        ("a tensor missing", "lacks the tensor actor_head.bias"),
        ("a tensor unknown", "has an unknown tensor extra"),
        ("a list for a tensor", "the tensor actor_head.bias does not fit"),
        ("half precision", "the tensor actor_head.bias does not fit"),
        ("settings missing", "damaged, or no model file"),
        ("weights only", "not a model file"),
    ],
)
def test_a_models_content_is_checked_before_a_network_is_built(run, tmp_path, monkeypatch, what, words):
    folder = shutil.copytree(run, tmp_path / "run")
    content = torch.load(folder / "model.pt", weights_only=True)
    edit(content, what)
    torch.save(content, folder / "model.pt")
    start = time.time()
    with pytest.raises(load.Refusal) as refusal:
        load.load(folder)
    assert words in str(refusal.value) and str(folder / "model.pt") in str(refusal.value)
    assert time.time() - start < 20  # a network of 4,096 channels would take minutes
