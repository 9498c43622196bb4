"""An exported agent, driven over its pipe as the official kit drives it."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from luxai_s2 import env as stock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import export  # noqa: E402
import load  # noqa: E402
import submission  # noqa: E402

lux = load.import_script(ROOT / "ppo_trajsep_lux.py")


def make_run(folder, opinions=100, water=0, **settings):
    """A run's folder with an untrained policy, nearly uniform with opinions=1; `water` favours watering."""
    settings = {"map_size": 32, "factories_per_team": 2, "max_units": 12, "channels": 8, "bf16": False} | settings
    args = lux.Args(**settings)
    torch.manual_seed(1)
    agent = lux.Agent(args)
    agent.actor_head.weight.data *= opinions
    agent.actor_head.bias.data[(lux.FACTORY - 1) * lux.NUM_ACTIONS + lux.WATER] += water
    folder.mkdir()
    (folder / "script.py").write_text((ROOT / "ppo_trajsep_lux.py").read_text())
    torch.save({"script": "ppo_trajsep_lux", "args": vars(args), "model": agent.state_dict()}, folder / "model.pt")
    return agent, args


def export_run(run, folder, greedy=False):
    export.export(Namespace(run=run, folder=folder, greedy=greedy, best=False, script=None))


class Kit:
    """Talks to a main.py with the lines that the official runner writes."""

    def __init__(self, folder):
        pipe, command = subprocess.PIPE, [sys.executable, "main.py"]
        self.process = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def ask(self, engine, news, player):
        info = {"env_cfg": {"map_size": engine.env_cfg.map_size}} if engine.env_steps == 0 else {}
        message = {"obs": news, "step": engine.env_steps, "remainingOverageTime": 600, "player": player}
        message |= {"reward": 0.0, "info": info}
        self.process.stdin.write(json.dumps(message, default=lambda array: array.tolist()) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        """What it wrote to stderr."""
        return self.process.communicate(timeout=60)[1]


class Recorder(lux.MeteredLux):
    """The engine of the policy's own environment, which keeps what was sent to it."""

    def reset(self, *args, **kwargs):
        self.sent = []
        return super().reset(*args, **kwargs)

    def step(self, actions):
        self.sent.append(actions)
        return super().step(actions)


def plain(orders):
    return {key: order.tolist() if hasattr(order, "tolist") else order for key, order in orders.items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    agent, args = make_run(folder / "run")
    export_run(folder / "run", folder / "sampled")
    export_run(folder / "run", folder / "greedy", greedy=True)
    return folder, agent, args


def compare(kit, agent, args, factories, size, greedy, steps):
    """Play on the stock engine with what the agent answers, and in the policy's own environment in self-play."""
    own = vars(args) | {"opponent": "self", "augment": False, "map_size": size, "factories_per_team": factories}
    env = lux.LuxEnv(lux.Args(**own))
    rules = {"map_size": size, "MIN_FACTORIES": factories, "MAX_FACTORIES": factories, "verbose": 0}
    env.engine = Recorder(**rules)
    obs, _ = env.reset(options={"map_seed": 5})
    generators = [torch.Generator().manual_seed(side) for side in range(2)]
    engine = stock.LuxAI_S2(**rules)
    before = engine.reset(seed=env.engine.seed_val)[0]["player_0"]
    news, kinds, grown = engine.state.get_compressed_obs(), set(), False
    for turn in range(1 + 2 * factories + steps):
        if turn >= len(env.engine.sent):
            action = []
            for side, generator in enumerate(generators):  # one at a time, as the agent does
                with torch.no_grad():
                    seen = {key: torch.from_numpy(value[side : side + 1]) for key, value in obs.items()}
                    probs = agent.get_distribution(seen).probs[0]
                action.append(probs.argmax(-1) if greedy else probs.multinomial(1, generator=generator)[:, 0])
            obs, _, over, _, _ = env.step(torch.stack(action).numpy())
            assert not over
        orders = {player: kit.ask(engine, news, player) for player in lux.PLAYERS}
        for player in lux.PLAYERS:
            assert orders[player] == plain(env.engine.sent[turn][player]), (turn, player)
            kinds |= {
                (player, order if isinstance(order, int) else tuple(row[0] for row in order))
                for key, order in orders[player].items()
                if turn > 2 * factories
            }
        after, _, terminations, _, _ = engine.step({player: dict(orders[player]) for player in lux.PLAYERS})
        assert not terminations["player_0"]
        news, before = engine.state.get_change_obs(before), after["player_0"]
        grown |= before["board"]["lichen"].any()
    return kinds, grown


def test_it_acts_as_the_policy_does_in_its_own_environment(exported):
    """Both sides, two sizes, another number of factories than in training; and a second game in the same process."""
    folder, agent, args = exported
    kit = Kit(folder / "sampled")
    for size, factories, steps in ((48, 4, 40), (64, 3, 40)):
        kinds, grown = compare(kit, agent, args, factories, size, greedy=False, steps=steps)
        for player in lux.PLAYERS:  # moves; stopping, an empty order; a new unit
            assert {(player, (0,)), (player, ())} <= kinds and {(player, 0), (player, 1)} & kinds
        assert grown and {("player_0", 2), ("player_1", 2)} & kinds  # lichen, by watering
    assert kit.end() == ""


def test_greedy(exported):
    folder, agent, args = exported
    kit = Kit(folder / "greedy")
    kinds, _ = compare(kit, agent, args, 2, 32, greedy=True, steps=12)
    assert kinds
    assert kit.end() == ""


def test_a_player_hands_each_view_to_the_next(exported, monkeypatch):
    """The engine judges watering by the lichen of two steps."""
    views = []

    class Seen(lux.View):
        def __init__(self, *args):
            super().__init__(*args)
            views.append((self, args[-1]))

    monkeypatch.setattr(lux, "View", Seen)
    _, agent, args = exported
    players = {name: submission.Player(lux, lambda: (agent, args.max_units), name, 0) for name in lux.PLAYERS}
    engine = lux.MeteredLux(map_size=32, MIN_FACTORIES=1, MAX_FACTORIES=1, verbose=0)
    obs = engine.reset(seed=5)[0]["player_0"]
    for _ in range(6):
        obs = engine.step({name: player.act(obs) for name, player in players.items()})[0]["player_0"]
    assert [previous for _, previous in views] == [None, None] + [view for view, _ in views[:4]]


def import_main(path):
    spec = importlib.util.spec_from_file_location("main_of_agent", path)
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    return main


def test_agent_fn_takes_what_the_kit_passes_to_it(exported, capsys):
    """The official runner can import an agent; it then passes the observation as a JSON text in a namespace."""
    main = import_main(exported[0] / "sampled/main.py")
    engine = lux.MeteredLux(map_size=32, MIN_FACTORIES=1, MAX_FACTORIES=1, verbose=0)
    engine.reset(seed=5)
    for expected in ({"faction", "bid"}, {"spawn", "metal", "water"}, set()):  # the other side's turn in the end
        obs = json.dumps(engine.state.get_obs(), default=lambda array: array.tolist())
        turn = {"obs": obs, "step": engine.env_steps, "player": "player_0", "reward": 0, "info": {}}
        action = main.agent_fn(Namespace(**turn, remainingOverageTime=600), {"env_cfg": {}})
        assert action.keys() == expected
        engine.step({"player_0": action, "player_1": {"faction": "MotherMars", "bid": 0}})
    assert capsys.readouterr().err == ""


def test_without_its_script_it_still_bids(exported, tmp_path, capsys):
    (tmp_path / "main.py").write_text((exported[0] / "sampled/main.py").read_text())
    main, obs = import_main(tmp_path / "main.py"), {"board": {}, "teams": {}, "real_env_steps": -3}
    for step, answer in ((0, {"faction": "AlphaStrike", "bid": 0}), (1, {})):
        assert main.agent_fn(Namespace(obs=obs, step=step, player="player_0")) == answer
    assert "FileNotFoundError" in capsys.readouterr().err


def test_a_damaged_model_says_so_and_plays_on(exported, tmp_path):
    """It bids and places its factories; from then on it does nothing, and explains that once.

    What the script prints is no answer.
    """
    folder, _, _ = exported
    (tmp_path / "main.py").write_text((folder / "sampled/main.py").read_text())
    (tmp_path / "script.py").write_text("print('hello')\n")
    with open(tmp_path / "script.py", "a") as file:
        file.write((folder / "sampled/script.py").read_text())
    (tmp_path / "model.pt").write_bytes((folder / "run/model.pt").read_bytes()[:1000])
    kit, engine = Kit(tmp_path), stock.LuxAI_S2(map_size=32, MIN_FACTORIES=1, MAX_FACTORIES=1, verbose=0)
    before = engine.reset(seed=5)[0]["player_0"]
    news = engine.state.get_compressed_obs()
    for _ in range(8):
        orders = {player: kit.ask(engine, news, player) for player in lux.PLAYERS}
        after, _, terminations, _, _ = engine.step(orders)
        assert not terminations["player_0"]
        news, before = engine.state.get_change_obs(before), after["player_0"]
    assert orders == {"player_0": {}, "player_1": {}} and all(before["factories"][p] for p in lux.PLAYERS)
    errors = kit.end()
    assert errors.count("no orders, because of") == 1 and "load_policy" in errors and "hello" in errors


def test_refusals(exported, tmp_path):
    folder, _, _ = exported
    there = tmp_path / "there"
    there.mkdir()
    command = [sys.executable, str(ROOT / "tools/export.py"), str(folder / "run"), str(there)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"{there} exists already: give the name of a new folder.\n"
    assert not list(there.iterdir())
    with pytest.raises(load.Refusal, match=f"There is no {there}/model.pt"):
        export_run(there, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_only_what_it_takes_to_play_is_exported(exported, tmp_path):
    folder, agent, args = exported
    (tmp_path / "script.py").write_text((folder / "run/script.py").read_text())
    model = torch.load(folder / "run/model.pt", weights_only=True)
    torch.save(model | {"optimizer": torch.zeros(10**6)}, tmp_path / "checkpoint.pt")
    export_run(tmp_path / "checkpoint.pt", tmp_path / "new/agent")
    assert {path.name for path in (tmp_path / "new/agent").iterdir()} == {"main.py", "script.py", "model.pt"}
    content = torch.load(tmp_path / "new/agent/model.pt", weights_only=True)
    assert content.keys() == {"script", "args", "model"} and content["args"] == vars(args)
    assert all(torch.equal(content["model"][name], tensor) for name, tensor in agent.state_dict().items())
