"""tools/watch.py: what it records, and the page in a headless Chromium, where there is one."""

import base64
import gzip
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import PARENT, ROOT, make_run, refused, tool, tool_here

sys.path.insert(0, str(ROOT / "tools"))
import evaluate  # noqa: E402
import load  # noqa: E402
import watch  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GAMMA, LAMBDA = 0.99, 0.95


def recording(path):
    data = re.search(r'type="text/plain">([^<]*)<', path.read_text())[1]
    return json.loads(gzip.decompress(base64.b64decode(data)))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A page of a whole game in self-play, with its GIF and replay."""
    folder = tmp_path_factory.mktemp("watch")
    run = make_run(folder / "run", opponent="self", factories_per_team=2)
    files = {"-o": folder / "page.html", "--gif": folder / "map.gif", "--replay": folder / "replay.json"}
    flags = [flag for pair in files.items() for flag in pair]
    done = tool("watch.py", run, *flags)
    assert done.returncode == 0, done.stderr
    refused(tool_here("watch.py", run, "-o", files["-o"]), "exists already")
    return run, *files.values()


def test_the_policy_that_comes_with_the_repository(tmp_path):
    """The README's command; in three steps each factory has built a heavy unit."""
    page = tmp_path / "page.html"
    done = tool_here("watch.py", ROOT / "ablations/trained", "--steps", 3, "-o", page)
    assert done.returncode == 0, done.stderr
    kinds = [entity["kind"] for entity in recording(page)["entities"]]
    assert kinds == [3, 3, 2, 2]  # factories, heavy units


def test_it_plays_the_game_that_evaluate_plays(watched):
    run, page, *_ = watched
    data = recording(page)
    script, args, agent = load.load(run)
    frames, rollout, *_ = watch.play(script, args, agent, 0, 1000, None)
    stats = evaluate.play(0, {"run": run, "best": False, "script": None, "map_size": None}, False)
    assert data["steps"] == len(frames) == stats["episodic_length"]
    lost = [entity["lost"] for entity in data["entities"] if entity["kind"] != script.FACTORY]
    assert len(lost) > 2 and data["theirs"] and data["entities"][0]["born"] == 0
    paid = sum(sum(entity["reward"]) for entity in data["entities"])
    assert paid == pytest.approx(rollout["rewards"].sum().item(), abs=1e-3)  # rewards have four decimals
    for entity in data["entities"]:
        legal = [[p for p in step if p >= 0] for step in entity["probs"]]
        assert all(98 <= sum(step) <= 102 and step for step in legal)
        assert all(step[action] >= 0 for step, action in zip(entity["probs"], entity["action"], strict=True))
    # in the map's directions: whoever moves has chosen to
    deltas = {0: (0, 0), 1: (0, -1), 2: (1, 0), 3: (0, 1), 4: (-1, 0)}
    moved = 0
    for entity in data["entities"]:
        tiles = [divmod(tile, data["size"]) for tile in entity["tile"]]
        for (x, y), after, action in zip(tiles, tiles[1:], entity["action"], strict=False):
            if after != (x, y):
                moved += 1
                assert after == (x + deltas[action][0], y + deltas[action][1])
    assert moved > 20


def test_what_is_lost_in_the_last_step_is_lost(tmp_path):
    """The game ends because the last factory starves: it is lost, and what stands on it ends with the game."""
    run = make_run(tmp_path / "run")
    script, args, agent = load.load(run)
    frames, *_ = watch.play(script, args, agent, 0, 1000, None)
    assert len(frames) < 1000 and frames[-1]["lost"][args.max_units] and not frames[0]["lost"][args.max_units]


def test_an_action_of_a_scripts_own_is_shown_by_its_number(tmp_path):
    source = tmp_path / "mine_lux.py"
    text = PARENT.read_text()
    names = "NO_OP, UP, RIGHT, DOWN, LEFT, DIG, DELIVER, PICK_UP = range"
    assert text.count(names) == 1
    source.write_text(text.replace("PICK_UP", "GRAB"))
    done = tool_here("watch.py", make_run(tmp_path / "run", source), "--steps", 2, "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    units, factories = recording(tmp_path / "page.html")["labels"]
    assert units["6"] == "deliver" and units["7"] == "action 7" and "7" not in factories


def test_names_with_a_dot_and_files_that_are_the_same(tmp_path):
    run = make_run(tmp_path / "lr0.001")
    for where, name in ((run, "lr0.001"), (run / "model.pt", "lr0.001-model")):
        done = tool_here("watch.py", where, "--steps", 1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert recording(tmp_path / f"{name}-0.html")["run"] == name
    refused(
        tool_here("watch.py", run, "-o", "x", "--gif", "x", cwd=tmp_path), "cannot be written to x: give another name"
    )
    assert not (tmp_path / "x").exists()


def test_values_are_the_mean_over_all_eight_views(watched):
    script, args, agent = load.load(watched[0])
    _, rollout, *_ = watch.play(script, args, agent, 0, 1, None)
    env = script.LuxEnv(args)
    env.reset(options={"map_seed": 0}, seed=0)
    views = [script.observe(env.views[0], env.masks[0], symmetry) for symmetry in range(8)]
    tensors = [{key: torch.from_numpy(value[None].copy()) for key, value in view.items()} for view in views]
    values = torch.stack([agent.get_value(obs)[0] for obs in tensors])
    assert torch.allclose(rollout["values"][0, 0], values.mean(0), atol=1e-2 if args.bf16 else 1e-5)
    assert not torch.allclose(values[0], values.mean(0), atol=2e-2)


def gae(rewards, values, next_values):
    advantages, last = [], 0.0
    for reward, value, later in zip(reversed(rewards), reversed(values), reversed(next_values), strict=True):
        last = reward + GAMMA * later - value + GAMMA * LAMBDA * last
        advantages.append(last)
    return advantages[::-1]


def assert_same_up_to_normalising(found, expected):
    slope, offset = np.polyfit(expected, found, 1)
    assert slope > 0 and np.abs(slope * np.array(expected) + offset - found).max() < 0.02 * np.std(found)


def test_own_and_shared_advantages_by_hand(watched):
    data = recording(watched[1])
    own, hand = [], []
    steps = np.zeros((3, data["steps"]))  # of the team: rewards, values, values of those who live on
    for entity in data["entities"]:
        later = [*entity["value"][1:], 0.0]  # nothing comes after a death or the game's end
        own += entity["own"]
        hand += gae(entity["reward"], entity["value"], later)
        life = slice(entity["born"], entity["born"] + len(later))
        steps[:, life] += (entity["reward"], entity["value"], later)
    assert_same_up_to_normalising(own, hand)
    assert_same_up_to_normalising(data["shared"], gae(*steps.tolist()))
    assert np.corrcoef(data["shared"][:20], [e for e in data["entities"] if not e["born"]][0]["own"][:20])[0, 1] < 0.999


@pytest.mark.parametrize("name", ["ppo_global", "ippo", "mappo"])
def test_the_other_scripts(tmp_path, name):
    run = make_run(tmp_path / "run", ROOT / f"{name}_lux.py")
    script, args, agent = load.load(run)
    _, rollout, *_ = watch.play(script, args, agent, 0, 30, None)
    columns = watch.credit(script, args, rollout)
    living = (rollout["kind"] != script.EMPTY)[:, 0].numpy()
    assert all(np.isfinite(column).all() and column.shape == living.shape for column in columns.values())
    same = np.allclose(columns["own"][living], columns["shared"][living])
    assert same == (name != "ippo")  # these two train on one trajectory of the team
    own = rollout["rewards"][:, 0].numpy()
    paid = own if name == "ppo_global" else np.repeat(own.sum(1, keepdims=True) / 12, own.shape[1], 1)
    assert np.allclose(columns["reward"], paid, atol=1e-6)


def test_moments():
    def entity(name, slot, born, own, lost=False, did=()):
        return {"name": name, "slot": slot, "born": born, "own": own, "lost": lost, "did": {"ice_dug": dict(did)}}

    first = entity("light 1", 0, 0, [0.1, 0.1, -2.0], lost=True)
    heir = entity("light 2", 0, 4, [0.0, 0.0])
    digger = entity("heavy 3", 1, 0, [0.0, 3.0, 3.0, 0.0, 0.0, 0.0], did={1: 20})
    found = watch.moments([first, digger, heir], [-0.5, 0.2, 0.4, 0.0, 1.5, 0.0])
    assert [(kind, step, index) for kind, step, index, _ in found] == [
        *[("diluted", 1, 1), ("posthumous", 2, 0), ("inherited", 4, 2)]
    ]
    assert "in the place of light 1" in found[2][3] and "own -2.00, shared +0.40" in found[1][3]
    assert watch.moments([first], [0.1, 0.1, -2.0]) == watch.moments([digger], [0, 3.0, 0, 0, 0, 0]) == []


def test_gif_and_replay(watched):
    _, page, gif, replay = watched
    data = recording(page)
    with Image.open(gif) as image:
        assert image.n_frames == (data["steps"] + 9) // 10 and image.size == (192, 192)
    game = json.loads(replay.read_text())
    count = len(game["actions"])
    assert len(game["observations"]) == count + 1 and count == data["steps"] + 1 + 2 * 2  # bids and placements
    rubble = np.array(game["observations"][0]["board"]["rubble"])
    for obs in game["observations"][1:-1]:  # all but the end, which no action answers
        for tile, value in obs["board"]["rubble"].items():
            rubble[tuple(map(int, tile.split(",")))] = value
    board = np.array(data["rubble"])
    for change in data["rubble_changes"]:
        board[change[::2]] = change[1::2]
    assert (rubble.ravel() == board).all() and (board != data["rubble"]).any()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--map-seed", -1), "--map-seed must be from 0"),
        (("--steps", 0), "--steps at least 1"),
        (("-o", "no/such/page.html"), "folder that does not exist"),
    ],
)
def test_flags_that_cannot_be(watched, tmp_path, flags, words):
    refused(tool_here("watch.py", watched[0], *flags, cwd=tmp_path), words)
    assert not list(tmp_path.iterdir())


def test_a_script_whose_functions_ask_for_something_else(tmp_path):
    run = make_run(tmp_path / "run")
    text = PARENT.read_text()
    (run / "script.py").write_text(
        text.replace("def compute_gae(trajectories,", "def compute_gae(trajectories, horizon,")
    )
    refused(tool_here("watch.py", run, "--steps", 2, cwd=tmp_path), "compute_gae of this script needs 'horizon'")
    (run / "script.py").write_text(text.replace("get_value", "get_worth"))
    refused(tool_here("watch.py", run, "--steps", 2, cwd=tmp_path), "has no get_value")


SCENARIO = """
<script>
const errors = [], result = { errors }
window.onerror = message => { errors.push(String(message)) }
const text = id => document.getElementById(id)?.textContent ?? null
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }))
const numbers = () => Object.fromEntries(["name", "clock", "reward", "value", "own", "team"].map(id => [id, text(id)]))
const wait = ms => new Promise(done => setTimeout(done, ms))
const column = n => [...document.querySelectorAll("#table tbody tr:not(.gone)")].map(row => row.cells[n].textContent)
async function scenario() {
  await started
  const box = document.getElementById("page").getBoundingClientRect()
  result.size = [box.width, box.height, document.documentElement.scrollHeight]
  for (let i = 0; i < STEP; i++) press("ArrowRight")
  press("ArrowLeft")
  const map = document.getElementById("map"), { left, top, width } = map.getBoundingClientRect(), cell = width / SIZE
  map.dispatchEvent(new MouseEvent("click", { clientX: left + (X + 0.5) * cell, clientY: top + (Y + 0.5) * cell }))
  result.selected = numbers()
  result.actions = text("actions")
  result.masked = document.querySelectorAll("#actions span.masked").length / 2
  result.chosen = document.querySelector("#actions span.chosen").textContent
  press("s")
  result.shared = numbers()
  document.querySelectorAll("#table th")[3].click()
  result.sorted = column(3)
  document.querySelector("#table tbody tr").click()
  result.first = text("name")
  press("s"); press("2")
  result.legend = text("legend")
  press("ArrowDown")
  result.moment = numbers()
  document.getElementById("moments").lastElementChild.click()
  result.last = text("clock")
  const pixels = map.getContext("2d").getImageData(0, 0, map.width, map.height).data
  result.colours = new Set(new Uint32Array(pixels.buffer)).size
  press("Home"); document.getElementById("play").click()
  await wait(1050)
  press(" ")
  result.played = text("clock")
  press("End")
  result.end = text("clock")
  document.querySelectorAll("#table th")[0].click()
  const slider = document.getElementById("slider")
  slider.value = LATER
  slider.dispatchEvent(new Event("input"))
  result.later = text("clock")
  result.gone = [...document.querySelectorAll("#table tbody tr")].map(row => row.classList.contains("gone"))
}
scenario().catch(error => errors.push(String(error))).finally(() => {
  const textContent = JSON.stringify(result)
  document.body.append(Object.assign(document.createElement("pre"), { id: "result", textContent }))
})
</script>
"""


def browse(page, scenario, folder):
    """What a scenario, a script at the page's end, has written into its element `result`."""
    copy = folder / "page.html"
    copy.write_text(page.read_text() + scenario)
    quiet = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update"]
    flags = ["headless", "no-sandbox", *quiet, "disable-sync", f"user-data-dir={folder / 'profile'}"]
    flags += ["window-size=1280,800", "enable-logging=stderr", "virtual-time-budget=20000", "dump-dom"]
    command = [CHROMIUM, *(f"--{flag}" for flag in flags), copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    result = json.loads(re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)[1].replace("&gt;", ">"))
    assert result["errors"] == []
    return result


def number(text):
    return float(text.replace("\u2212", "-"))


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_the_page_in_a_browser(watched, tmp_path):
    data = recording(watched[1])
    step = 12
    born = [i for i, e in enumerate(data["entities"]) if e["born"] <= step < e["born"] + len(e["own"])]
    tiles = {i: data["entities"][i]["tile"][step - data["entities"][i]["born"]] for i in born}
    alone = [
        i for i, tile in tiles.items() if list(tiles.values()).count(tile) == 1 and data["entities"][i]["kind"] < 3
    ]
    index, tile = alone[0], tiles[alone[0]]
    lives = [range(e["born"], e["born"] + len(e["own"])) for e in data["entities"]]
    gone = [[t not in life for life in lives] for t in range(data["steps"])]
    later = next(t for t, flags in enumerate(gone) if flags != sorted(flags))  # one is lost before another
    entity, at = data["entities"][index], step - data["entities"][index]["born"]
    scenario = SCENARIO.replace("LATER", str(later)).replace("STEP", str(step + 1)).replace("SIZE", str(data["size"]))
    scenario = scenario.replace("X +", f"{tile // data['size']} +").replace("Y +", f"{tile % data['size']} +")
    result = browse(watched[1], scenario, tmp_path)
    assert result["size"][:2] == [1280, 800] and result["size"][2] <= 800

    for numbers in (result["selected"], result["shared"]):
        assert numbers["name"] == entity["name"] and numbers["clock"].startswith(f"step {step} of {data['steps'] - 1}")
        for name, digits in (("reward", 4), ("value", 3), ("own", 2)):
            assert number(numbers[name]) == pytest.approx(entity[name][at], abs=0.51 * 10**-digits)
    assert result["selected"]["team"] is None
    assert number(result["shared"]["team"]) == pytest.approx(data["shared"][step], abs=0.0051)
    probs, labels = entity["probs"][at], data["labels"][entity["kind"] == 3]
    assert result["masked"] == sum(probs[int(action)] < 0 for action in labels)
    assert result["chosen"] == labels[str(entity["action"][at])]
    for action, label in labels.items():
        shown = "masked" if probs[int(action)] < 0 else f"{probs[int(action)]}%"
        assert f"{label}{shown}" in result["actions"]
    column = [number(text) for text in result["sorted"]]
    assert column == sorted(column, reverse=True) and len(column) == len(born)
    best = max(born, key=lambda i: data["entities"][i]["own"][step - data["entities"][i]["born"]])
    assert result["first"] == data["entities"][best]["name"]
    assert "value" in result["legend"] and "advantage" not in result["legend"]
    kind, when, who, _ = data["moments"][0]
    assert result["moment"]["clock"].startswith(f"step {when} of")
    assert result["moment"]["name"] == data["entities"][who]["name"] and result["moment"]["team"] is not None
    assert result["last"].startswith(f"step {data['moments'][-1][1]} of") and result["colours"] > 20
    assert 5 <= int(result["played"].split()[1]) <= 12
    assert result["end"].startswith(f"step {data['steps'] - 1} of")
    assert result["later"].startswith(f"step {later} of") and result["gone"] == sorted(gone[later])  # the living first


# ---- the simulated truth


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A page of 24 steps with the truth in three, and its replay; the same game without the truth."""
    folder = tmp_path_factory.mktemp("judged")
    run = make_run(folder / "run")
    for name, flags in (("plain", ()), ("truth", ("--truth", 3, "--replay", folder / "replay.json"))):
        done = tool_here("watch.py", run, "--steps", 24, *flags, "-o", folder / f"{name}.html")
        assert done.returncode == 0, done.stderr
    return run, folder


def test_the_truth_in_a_recording(judged):
    run, folder = judged
    plain, data = (recording(folder / f"{name}.html") for name in ("plain", "truth"))
    assert data["truths"] == [0, 8, 16] and plain["truths"] == []
    script, args, agent = load.load(run)
    env, generator = script.LuxEnv(args), torch.Generator().manual_seed(0)
    obs, _ = env.reset(options={"map_seed": 0}, seed=0)
    for _ in range(8):
        obs = env.step(load.act(agent, obs, generator)[1].numpy())[0]
    probs, action = load.act(agent, obs, generator)
    expected = watch.quick_truth(agent, env, obs, action[0], probs[0], GAMMA)
    told = 0
    for entity, same in zip(data["entities"], plain["entities"], strict=True):
        truth = entity.pop("truth")
        assert same.pop("truth") == {} and entity == same  # the game went on as without it
        for step in truth:
            assert sum(p >= 0 for p in entity["probs"][int(step) - entity["born"]]) > 1
        if "8" in truth:
            assert truth["8"] == pytest.approx(expected[:, entity["slot"]], abs=1e-5)
            told += 1
    assert told == np.isfinite(expected[0]).sum() > 0
    game = json.loads((folder / "replay.json").read_text())
    assert len(game["actions"]) == 24 + 1 + 2  # what is tried is not in the replay


SEEN = """
<script>
const result = { errors: [], truths: [] }
window.onerror = message => { result.errors.push(String(message)) }
async function scenario() {
  await started
  for (let step = 0; step < 24; step++)
    for (let i = 0; i < data.entities.length; i++) {
      state.step = step; choose(i)
      const truth = document.getElementById("truth")
      if (truth) result.truths.push([i, step, truth.textContent, document.getElementById("facts").textContent])
    }
}
scenario().catch(error => result.errors.push(String(error))).finally(() => {
  const textContent = JSON.stringify(result)
  document.body.append(Object.assign(document.createElement("pre"), { id: "result", textContent }))
})
</script>
"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_the_page_says_the_truth_where_it_is_known(judged, tmp_path):
    _, folder = judged
    data, shown = recording(folder / "truth.html"), browse(folder / "truth.html", SEEN, tmp_path)["truths"]
    known = {(i, int(t)): x for i, entity in enumerate(data["entities"]) for t, x in entity["truth"].items()}
    assert known.keys() == {(i, step) for i, step, *_ in shown} and known
    for i, step, text, facts in shown:
        brings, error = known[i, step]
        assert number(text) == pytest.approx(brings, abs=0.000051) and f"\u00b1 {error:.4f}"[:-1] in facts


def test_the_truth_is_not_for_self_play(watched, tmp_path):
    refused(tool_here("watch.py", watched[0], "--truth", 1, cwd=tmp_path), "trained in self-play")
