"""Matches: of runs in this process, and of programs that behave and misbehave."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import warm
from test_export import make_run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import match  # noqa: E402

# Places its factory on the first free tile and does nothing after that, but for its fault
BOT = """
import json, sys, time
for line in sys.stdin:
    turn = json.loads(line)
    obs, answer = turn["obs"], {}
    if turn["step"] == 0:
        answer = {"faction": "AlphaStrike", "bid": 0}
    elif obs["real_env_steps"] < 0:
        mask = obs["board"]["valid_spawns_mask"]
        spot = [(x, y) for x in range(len(mask)) for y in range(len(mask)) if mask[x][y]][0]
        answer = {"spawn": spot, "metal": 150, "water": 150}
    if turn["step"] == STEP:
        FAULT
    print(json.dumps(answer), flush=True)
"""


def make_bot(folder, fault="pass", step=7):
    folder.mkdir()
    (folder / "main.py").write_text(BOT.replace("STEP", str(step)).replace("FAULT", fault))
    return folder


def settings(a, b, **changes):
    values = {"map_size": 24, "factories": 1, "games": 2, "python": sys.executable, "seconds": (9, 600)}
    return Namespace(**(values | changes), agents={"A": Path(a), "B": Path(b)})


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(match, "EPISODE_STEPS", 20)


def run(*words):
    return warm.start([ROOT / "tools/match.py", *words])


def test_a_run_against_itself_is_mirrored_whatever_the_jobs(tmp_path):
    """The games are the same in two processes as one after the other in this one."""
    make_run(tmp_path / "run", opinions=1, water=3, max_units=4, channels=4)
    words = f"--games 2 --map-size 24 --factories 1 --jobs 2 --json {tmp_path}/match.json"
    done = run(tmp_path / "run", tmp_path / "run", *words.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("game 1, map") and "| games won |" in done.stdout
    content = json.loads((tmp_path / "match.json").read_text())
    flags = settings(tmp_path / "run", tmp_path / "run")
    maps = match.find_maps(flags)
    assert [match.play(flags, maps, number) for number in range(2)] == content["games"]
    won, draws = content["won"], content["draws"]
    assert won["A"] == won["B"] and won["A"] + won["B"] + draws == 2
    first, second = content["games"]
    assert first["player_0"] == "A" and first["steps"] > 20
    assert first["A"] != first["B"]  # the two sides do not play alike
    swap = {"A": "B", "B": "A", None: None}
    second |= {"A": second["B"], "B": second["A"], "winner": swap[second["winner"]]}
    assert first == second | {"player_0": "A", "player_1": "B"}


def test_lichen_wins(tmp_path, short, monkeypatch):
    """A policy that waters against a program that does not; ice is counted for the side whose factory got it."""

    class Generous(match.lux.MeteredLux):
        def step(self, actions):
            result = super().step(actions)
            self.meters["ice_received"] = {"factory_0": 1, "factory_1": 100}  # by id: of player_0, of player_1
            return result

    monkeypatch.setattr(match.lux, "MeteredLux", Generous)
    make_run(tmp_path / "run", max_units=4, channels=4, water=10)
    flags = settings(tmp_path / "run", make_bot(tmp_path / "bot"))
    for number, name in enumerate("AB"):
        game = match.play(flags, [0], number)
        assert (game["winner"], game["end"], game["steps"], game["crash"]) == ("A", "lichen", 20, None)
        assert game["A"]["lichen"] > 0 and game["B"]["lichen"] == 0
        assert game["player_0"] == name and game["A"]["factories"] == game["B"]["factories"] == 1
        assert (
            20 < game["B" if number == 0 else "A"]["ice_delivered"] / 100 <= 23
            and 20 < game[name]["ice_delivered"] <= 23
        )


def test_who_does_nothing_starves_and_that_is_a_draw(tmp_path):
    """The factories of both run dry in the same step."""
    make_bot(tmp_path / "bot")
    flags = settings(tmp_path / "bot", tmp_path / "bot/main.py")
    game = match.play(flags, [3], 0)
    assert game["winner"] is None and game["end"] == "draw" and 150 <= game["steps"] <= 152
    assert game["A"]["factories"] == game["B"]["factories"] == 0
    assert game["map_seed"] == 3 and game["crash"] is None


@pytest.mark.parametrize("step", [0, 7])
def test_a_program_that_does_not_answer_loses(tmp_path, short, step):
    """As in the official kit, whose engine takes no answer for an order that it refuses."""
    slow = make_bot(tmp_path / "slow", "time.sleep(100)", step)
    game = match.play(settings(slow, make_bot(tmp_path / "bot"), seconds=(0.5, 1.5)), [0], 0)
    assert (game["winner"], game["end"]) == ("B", "crash")
    assert game["crash"] == f"{slow} used up its time at step {step}"


@pytest.mark.parametrize("fault", ["sys.exit(3)", "answer = {'factory_9': 1}"])
def test_two_that_crash_in_one_step_draw(tmp_path, short, fault):
    bots = [make_bot(tmp_path / name, fault, 7) for name in ("one", "two")]
    for number in range(2):
        game = match.play(settings(*bots), [0], number)
        assert game["winner"] is None and game["end"] == "draw"
        assert all(str(bot) in game["crash"] for bot in bots)


def test_two_sides_of_one_run_have_a_memory_each(tmp_path, short, monkeypatch):
    make_run(tmp_path / "run", opinions=1, water=3, max_units=4, channels=4)
    agents = []
    act = match.submission.Player.act

    def note(player, obs):
        agents.append((player.player, id(player.policy()[0])))
        return act(player, obs)

    monkeypatch.setattr(match.submission.Player, "act", note)
    match.play(settings(tmp_path / "run", tmp_path / "run"), [0], 0)
    assert len({*agents}) == 2 == len({agent for _, agent in agents})


def test_overage_is_used_up(tmp_path, short):
    """A program that is a bit too slow every turn has some turns, then no more."""
    slow = make_bot(tmp_path / "slow", "pass\n    time.sleep(0.1)")
    flags = settings(slow, make_bot(tmp_path / "bot"), seconds=(0.02, 1))
    game = match.play(flags, [0], 0)
    assert game["winner"] == "B" and "used up its time" in game["crash"] and game["steps"] > 0
    flags.seconds = (5, 1)
    assert match.play(flags, [0], 0)["crash"] is None


@pytest.mark.parametrize(
    "fault, step, what",
    [
        ("sys.exit(3)", 7, "ended at step 7"),
        ("sys.exit(3)", 0, "ended at step 0"),
        ("print('hello')", 7, "answered b'hello\\n' at step 7"),
        ("answer = [1]", 7, "answered b'[1]\\n' at step 7"),
        ("answer = {'unit_9': 3}", 7, "answered b'{\"unit_9\": 3}\\n' at step 7"),
        ("answer = {'factory_9': 1}", 7, "gave orders that the engine refuses at step 8"),
        ("answer = {}", 0, "gave orders that the engine refuses at step 1"),
    ],
)
def test_a_program_that_crashes_is_named_and_loses(tmp_path, short, fault, step, what):
    bad = make_bot(tmp_path / "bad", fault, step)
    game = match.play(settings(make_bot(tmp_path / "bot"), bad), [0], step % 2)
    assert game["crash"] == f"{bad} {what}"
    assert game["winner"] == "A" and game["end"] == "crash"


def test_the_table():
    """7 wins and 3 losses of 10 that were decided: an exact interval of 35% to 93%, from tables."""
    side = {"lichen": 4, "ice_delivered": 2000, "factories": 1}
    game = {"winner": None, "end": "draw", "steps": 100, "A": side, "B": side | {"lichen": 8}, "player_0": "A"}
    won = [game | {"winner": "A", "end": end} for end in 4 * ["elimination"] + 2 * ["lichen"] + ["crash"]]
    lost = [game | {"winner": "B", "end": "lichen", "steps": 1000}] * 2
    lost.append(lost[0] | {"player_0": "B"})
    table, figures = match.report(settings("a", "b"), [game, game, *won, *lost])
    rows = dict(line.strip("| ").split(" | ", 1) for line in table.splitlines() if " | " in line)
    assert rows["12 games"] == "A: a | B: b"
    assert rows["games won"] == "7 | 3"
    assert rows["... by elimination"] == "4 | 0"
    assert rows["... by lichen"] == "2 | 3"
    assert rows["... by a crash of the other"] == "1 | 0"
    assert rows["lichen, mean"] == "4.0 | 8.0"
    assert rows["ice delivered, mean"] == "2,000.0 | 2,000.0"
    assert rows["... as player_0"] == "7 | 1"
    assert "mean length 325 steps; 2 draws. Of the 10 games that were decided, A won 70%" in table
    assert "(95% interval: 35% to 93%)" in table
    assert figures["won"] == {"A": 7, "B": 3} and figures["draws"] == 2
    table, figures = match.report(settings("a", "b"), [game])
    assert table.endswith("1 draws.") and figures["share_of_decided"] == []


def test_maps_have_ice_and_are_evaluation_maps(monkeypatch):
    class Dry(match.lux.MeteredLux):
        def reset(self, seed):
            obs, info = super().reset(seed=seed)
            obs["player_0"]["board"]["ice"] *= seed % 2
            return obs, info

    monkeypatch.setattr(match.lux, "MeteredLux", Dry)
    assert match.find_maps(settings("a", "b", games=5)) == [1, 3, 5]


def test_refusals(tmp_path):
    bot, there = make_bot(tmp_path / "bot"), tmp_path / "there.json"
    there.write_text("precious")
    flags = vars(settings(bot, bot)) | {"jobs": 1, "json": None}
    for changes, sentence in (
        ({"games": 0}, "--games must be between 1 and 10000, got 0."),
        ({"map_size": 65}, "--map-size must be between 24 and 64, got 65."),
        ({"json": there}, f"{there} exists already, or its folder does not: give --json another name."),
        (
            {"json": tmp_path / "no/x.json"},
            "no/x.json exists already, or its folder does not: give --json another name.",
        ),
        ({"agents": {"A": bot, "B": tmp_path / "no"}}, f"There is no {tmp_path}/no"),
    ):
        with pytest.raises(match.load.Refusal, match=".*") as error:
            match.match(Namespace(**flags | changes))
        assert sentence in str(error.value)
    assert there.read_text() == "precious"
    done = run(bot, tmp_path / "no")
    assert done.returncode == 1 and done.stderr.startswith("There is no ") and done.stderr.count("\n") == 1


MATCHES = sorted((ROOT / "ablations/results/matches").glob("*.json"))


def test_there_are_committed_matches():
    """Else the next test would be none."""
    assert MATCHES


@pytest.mark.parametrize("path", MATCHES, ids=lambda path: path.stem)
def test_the_page_tells_the_committed_matches(path):
    """From the games themselves: who won how often, and how long they lasted."""
    games = json.loads(path.read_text())["games"]
    won = [sum(game["winner"] == name for game in games) for name in "AB"]
    share, steps = won[0] / sum(won), sum(game["steps"] for game in games) / len(games)
    cells = f"| {won[0]} | {won[1]} | {len(games) - sum(won)} | {share:.0%} ["
    rows = [row for row in (ROOT / "ablations/README.md").read_text().splitlines() if cells in row]
    assert len(rows) == 1 and rows[0].endswith(f" | {steps:,.0f} |")
