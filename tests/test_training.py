"""What the main block does with the functions above it: trainings in this process, whose variables are then looked at.

The environments step in this process, one after the other; all else is the script as it is.
"""

import ast
import contextlib
import csv
import itertools
import signal
import sys
import types
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parent.parent
PARENT = "ppo_trajsep_lux.py"
FLAGS = "--map-size 24 --factories-per-team 1 --max-units 8 --channels 4 --num-envs 2 --num-steps 32 --no-bf16 "
FLAGS += "--num-minibatches 2 --total-timesteps 64 --no-cuda --run-name test"
FROZEN = "--learning-rate 1e-12"  # so that the network at the end says what it said in the rollout


class InTurn(gym.vector.SyncVectorEnv):
    """The part of AsyncVectorEnv that the scripts use, without its processes."""

    processes = parent_pipes = ()

    def reset_async(self, seed):
        self.answer = self.reset(seed=seed)

    def step_async(self, actions):
        self.answer = self.step(actions)

    def call_async(self, name):
        self.answer = self.call(name)

    def reset_wait(self, timeout):
        return self.answer

    step_wait = call_wait = reset_wait


def train(script, flags, cwd, change=lambda script: None):
    """The variables that a training leaves behind. `change` gets the script's functions before it begins."""
    module = types.ModuleType("__main__")
    module.__file__ = str(ROOT / script)
    *functions, main = ast.parse((ROOT / script).read_text()).body
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *FLAGS.split(), *flags.split()])
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setitem(sys.modules, "__main__", module)
        patch.setattr(gym.vector, "AsyncVectorEnv", InTurn)
        try:
            exec(compile(ast.Module(functions, []), module.__file__, "exec"), vars(module))
            module.make_worker_env = module.LuxEnv
            module.calls = defaultdict(list)
            change(module)
            exec(compile(ast.Module([main], []), module.__file__, "exec"), vars(module))
        finally:  # as with the end of a process
            torch.use_deterministic_algorithms(False)
            if "lock" in vars(module):
                module.lock.lock.release()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return module


def recording(*names):
    """A change that notes in `calls` what each of these functions was called with and what it answered."""

    def change(script):
        for name in names:

            def noted(*given, name=name, function=getattr(script, name)):
                answer = function(*given)
                script.calls[name].append((given, answer))
                return answer

            setattr(script, name, noted)

    return change


def rows(cwd):
    with open(cwd / "runs/test/progress.csv") as file:
        return list(csv.DictReader(file))


def column(cwd, name):
    return [float(row[name]) for row in rows(cwd)]


def living(run):
    return run.obs["kind"] != 0


def team_rewards(run):
    """What the team earned in each step: (num_steps, num_rows)."""
    return (run.entity_reward * living(run)).sum(-1)


# ---- the parent's rollout


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """One long rollout of a policy that does not learn, in which an episode of each environment ends, not together."""
    cwd = tmp_path_factory.mktemp("frozen")
    return cwd, train(PARENT, f"{FROZEN} --num-steps 160 --total-timesteps 320", cwd)


def test_the_buffers_hold_what_the_network_said_of_each_observation(frozen):
    _, run = frozen
    with torch.no_grad():
        for t in range(run.args.num_steps):
            seen = {key: buffer[t] for key, buffer in run.obs.items()}
            torch.testing.assert_close(run.entity_values[t], run.agent.get_value(seen), rtol=1e-4, atol=1e-5)
            logprobs = run.agent.get_distribution(seen).log_prob(run.actions[t])
            torch.testing.assert_close(run.entity_logprobs[t], logprobs, rtol=1e-4, atol=1e-5)
        last = run.agent.get_value(run.next_obs)
    torch.testing.assert_close(run.entity_values[-1], last, rtol=1e-4, atol=1e-5)
    assert (last[run.next_obs["kind"] != 0].abs() > 1e-4).all()
    assert torch.equal(run.batch["logprobs"], (run.entity_logprobs * living(run)).flatten(0, 1))


def test_targets_are_advantages_and_values(frozen):
    _, run = frozen
    assert run.advantages.abs().max() > 0.1 and run.trajectories.values.abs().max() > 0.1
    assert torch.equal(run.batch["returns"], (run.advantages + run.trajectories.values).flatten(0, 1))


def ends_of_episodes(run, cwd):
    """How long the one episode of each row of the buffer (environment, side) was; the log says the same."""
    (row,) = rows(cwd)
    lengths, returns = [], []
    for i in range(run.num_rows):
        alive, done = living(run)[:, i], run.entity_dones[:, i].bool()
        (end,) = [t for t in range(len(alive)) if alive[t].any() and torch.equal(alive[t], done[t] & alive[t])]
        lengths.append(end + 1)
        returns.append(run.entity_reward[: end + 1, i].sum().item())
    assert float(row["charts/episodic_length"]) == np.mean(lengths)
    assert float(row["charts/episodic_return"]) == pytest.approx(np.mean(returns), abs=1e-4)
    return lengths


def test_the_last_step_of_an_episode_is_its_own_environments(frozen):
    """The reset in the same step overwrites the last reward and done flags: the loop must not take those."""
    cwd, run = frozen
    first, second = ends_of_episodes(run, cwd)
    assert first != second and rows(cwd)[0]["charts/episodes"] == "2"
    assert run.entity_reward[first - 1, 0].sum() < -0.9  # the factory's loss


def test_in_self_play_it_is_each_sides_own(tmp_path):
    run = train(PARENT, f"{FROZEN} --opponent self --num-steps 160 --total-timesteps 320", tmp_path)
    first, same, second, as_well = ends_of_episodes(run, tmp_path)
    assert first == same != second == as_well and rows(tmp_path)[0]["charts/episodes"] == "2"


def test_environments_play_other_maps(frozen):
    _, run = frozen
    checkpoint = torch.load(frozen[0] / "runs/test/checkpoint.pt", weights_only=True)
    assert len({game["generator"]["state"]["state"] for game in checkpoint["games"]}) == 2
    assert not torch.equal(run.obs["planes"][0, 0, 1], run.obs["planes"][0, 1, 1])  # where the ice is


def short(steps):
    """A change after which games last so many steps."""

    def change(script):
        script.EPISODE_STEPS = steps

    return change


def test_which_episodes_are_full(frozen, tmp_path):
    assert column(frozen[0], "charts/full_episodes") == [0.0]
    train(PARENT, "", tmp_path, short(20))
    assert column(tmp_path, "charts/full_episodes") == [1.0]


# ---- the parent's update


@pytest.fixture(scope="module")
def update(tmp_path_factory):
    """Two iterations of three epochs of two minibatches, with what the losses were given."""
    cwd, norms = tmp_path_factory.mktemp("update"), []

    def change(script):
        recording("policy_loss", "value_loss", "normalize")(script)
        script.norms = norms

    def before_step(optimizer, *_):
        gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        return cwd, train(PARENT, "--max-grad-norm 0.01 --total-timesteps 128", cwd, change)
    finally:
        hook.remove()


def test_every_epoch_has_every_map_once_in_another_order(update):
    _, run = update
    seen = [given[2] for given, _ in run.calls["value_loss"]]  # returns: (maps, groups)
    assert len(seen) == 2 * 3 * 2 and all(len(part) == 32 for part in seen)
    epochs = [torch.cat(seen[i : i + 2])[:, -1] for i in range(6, 12, 2)]  # the factory's, of the last iteration
    plain = run.batch["returns"][:, -1]
    assert plain.unique().numel() > 60
    for i, epoch in enumerate(epochs):
        assert torch.equal(epoch.sort()[0], plain.sort()[0])
        assert not any(torch.equal(epoch, other) for other in (plain, *epochs[:i]))


def test_which_cells_each_loss_is_over(update):
    _, run = update
    choice, active = run.batch["choice"], run.batch["active"]
    assert (choice <= active).all() and choice.sum() < active.sum()
    for calls, mask, expected in (("policy_loss", 2, choice), ("normalize", 1, choice), ("value_loss", 3, active)):
        given = [given[mask] for given, _ in run.calls[calls][-2:]]  # of the last epoch
        assert sum(map(torch.Tensor.sum, given)) == expected.sum()
    for (_, normal), ((_, used, _, clip), _) in zip(run.calls["normalize"], run.calls["policy_loss"], strict=True):
        assert used is normal and clip == 0.2


def test_what_is_logged_of_the_ratio(update):
    cwd, run = update
    kl, clipped = [], []
    for (ratio, _, mask, _), _ in run.calls["policy_loss"]:
        ratio = ratio.detach()[mask]
        kl.append((ratio - 1 - ratio.log()).mean().item())
        clipped.append(((ratio < 0.8) | (ratio > 1.2)).float().mean().item())
    for name, numbers in (("approx_kl", kl), ("clipfrac", clipped)):
        means = [np.mean(numbers[:6]), np.mean(numbers[6:])]
        assert column(cwd, f"losses/{name}") == pytest.approx(means, rel=1e-3, abs=1e-7)
    assert max(kl) > 1e-6 and kl[0] < 1e-9  # no step of the optimiser has been made


def test_explained_variance(update):
    cwd, run = update
    active = run.batch["active"].numpy()
    returns, values = run.batch["returns"].numpy()[active], run.batch["values"].numpy()[active]
    expected = 1 - np.var(returns - values, ddof=1) / np.var(returns, ddof=1)
    assert column(cwd, "losses/explained_variance")[-1] == pytest.approx(expected, rel=1e-3)


def test_gradients_are_clipped(update):
    cwd, run = update
    assert len(run.norms) == 12 and max(run.norms) < 0.0101
    assert min(column(cwd, "losses/grad_norm")) > 0.02  # what is logged is the norm before


def test_annealing(tmp_path, update):
    cwd, run = update
    assert column(cwd, "charts/learning_rate") == pytest.approx([1e-3, 5e-4])
    assert run.ent_coef == pytest.approx(0.01)
    flags = "--no-anneal-lr --no-anneal-ent --no-clip-vloss --total-timesteps 128"
    run = train(PARENT, flags, tmp_path, recording("value_loss"))
    assert column(tmp_path, "charts/learning_rate") == [1e-3, 1e-3]
    assert run.ent_coef == 0.02
    assert run.calls["value_loss"][0][0][4] is None and update[1].calls["value_loss"][0][0][4] == 0.2


@pytest.mark.parametrize("flag", ["--ent-coef 10", "--vf-coef 0", "--max-grad-norm 1e-6", "--update-epochs 1"])
def test_each_of_these_settings_counts(flag, tmp_path):
    weights = []
    for name, flags in (("a", ""), ("b", flag)):
        (tmp_path / name).mkdir()
        run = train(PARENT, f"--num-steps 16 --total-timesteps 32 --update-epochs 2 {flags}", tmp_path / name)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in run.agent.parameters()]))
    assert (weights[0] - weights[1]).abs().max() > 1e-5


# ---- the best policy


class Cut(Exception):
    """In place of the end of a process."""


def test_the_best_policy_is_kept_also_by_a_run_that_goes_on(tmp_path):
    """Eight episodes an iteration, so that from the second on the last 16 are those of two."""

    def training(name, cut=None):
        (tmp_path / name).mkdir(exist_ok=True)
        saved = []

        def change(script):
            script.EPISODE_STEPS = 4

            class LuxEnv(script.LuxEnv):
                def step(self, action):
                    *result, info = super().step(action)
                    for stats in info.values():  # a return that only the map decides
                        stats["episodic_return"] = float(np.sin(self.engine.state.board.rubble.sum()))
                    return *result, info

            def save(content, path, save=script.save):
                saved.extend([len(script.rows)] * path.endswith("best.pt"))
                if cut == len(script.rows):
                    raise Cut
                save(content, path)

            script.make_worker_env, script.save = LuxEnv, save

        with contextlib.suppress(Cut):
            train(PARENT, "--num-steps 16 --total-timesteps 256 --resume", tmp_path / name, change)
        return saved

    saved, returns, best, expected = training("whole"), column(tmp_path / "whole", "charts/episodic_return"), -2, []
    assert set(column(tmp_path / "whole", "charts/episodes")) == {8} and len(returns) == 8
    for n in range(2, 9):
        if np.mean(returns[n - 2 : n]) > best:
            best, expected = np.mean(returns[n - 2 : n]), [*expected, n]
    assert saved == expected == [2, 5, 8]
    assert training("cut", cut=5) == [2]
    assert training("cut", cut=7) == [5]
    assert training("cut") == [8]
    assert column(tmp_path / "cut", "charts/episodic_return") == returns


# ---- the copies


def test_one_sample_of_a_step_is_trained_on(tmp_path):
    script = "ablations/trajsep_sample_reduction_lux.py"
    for flags, valued in (("", 1), ("--no-reduce-values", 2)):
        cwd = tmp_path / str(valued)
        cwd.mkdir()
        run = train(script, f"--keep random {flags}", cwd)
        assert run.batch["choice"].sum(-1).max() == 1 and (run.batch["choice"] <= run.batch["active"]).all()
        assert run.batch["active"].sum(-1).max() >= valued and (run.batch["active"].sum(-1).max() == 1) == (valued == 1)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rewards_are_blended(share, tmp_path):
    run = train("ablations/trajsep_own_reward_lux.py", f"--own-reward {share}", tmp_path)
    alive, own = living(run), run.entity_reward
    equal = (team_rewards(run) / alive.sum(-1))[..., None] * alive
    torch.testing.assert_close(run.trajectories.rewards, own if share else equal)
    assert not torch.equal(own, equal)


def test_kinds_share_trajectories(tmp_path):
    flags = "--factories-per-team 2 --no-separate-factories --no-separate-units"
    run = train("ablations/trajsep_mixed_lux.py", flags, tmp_path)
    assert run.batch["active"].sum(-1).max() == 2 and living(run).sum(-1).max() > 3


@pytest.mark.parametrize("rule", ["quadrant", "closest-factory", "closest-heavy"])
def test_units_are_grouped_as_asked(rule, tmp_path):
    run = train("ablations/trajsep_grouping_lux.py", f"--grouping {rule}", tmp_path, recording("group_index"))
    assert run.calls["group_index"] and all(given[-1] == rule for given, _ in run.calls["group_index"])


def test_heavies_alone_are_built(tmp_path):
    run = train("ablations/trajsep_heavies_lux.py", "", tmp_path)
    assert (run.obs["kind"] == run.HEAVY).any() and not (run.obs["kind"] == run.LIGHT).any()
    assert not run.obs["action_mask"][:, :, run.args.max_units :, run.BUILD_LIGHT].any()
    parent = train(PARENT, "--seed 2", tmp_path / "runs")
    assert (parent.obs["kind"] == parent.LIGHT).any()
    (tmp_path / "full").mkdir()
    run = train("ablations/trajsep_heavies_lux.py", "--factories-per-team 2 --max-units 1", tmp_path / "full")
    units, may_build = living(run)[..., :1].sum(-1), run.obs["action_mask"][:, :, 1:, run.BUILD_HEAVY].sum(-1)
    assert (may_build == 1).any() and (may_build + units <= 1).all()  # one slot for two factories


@pytest.mark.parametrize(
    "script", ["ippo_lux", "mappo_lux", "ablations/coma_lux", "ablations/gpae_lux", "ablations/dae_lux"]
)
@pytest.mark.parametrize("scale", [0, 0.3])
def test_all_are_paid_what_the_team_earns(script, scale, tmp_path):
    run = train(f"{script}.py", f"--num-steps 16 --total-timesteps 32 --team-scale {scale}", tmp_path)
    alive = living(run)
    pay = team_rewards(run) * scale if scale else team_rewards(run) / alive.sum(-1)
    one_for_all = run.trajectories.rewards.shape[-1] == 1  # MAPPO's
    torch.testing.assert_close(run.trajectories.rewards, pay[..., None] * (1 if one_for_all else alive))


SCRIPTS = [path for path in (*ROOT.glob("*_lux.py"), *ROOT.glob("ablations/*_lux.py"))]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in SCRIPTS if "multigpu" not in path.name)
BRIEFLY = "--num-steps 8 --total-timesteps 16"


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_discounts_what_learns_and_from_which_cells(script, tmp_path):
    """Gamma and lambda reach the returns as what they are, a loss every weight of the network."""
    returns = "lambda_returns" if "vdn" in script else "compute_gae"
    losses = ("policy_loss", "normalize", "value_loss") * ("vdn" not in script)

    def change(script):
        def action_masks(view, function=script.action_masks):
            mask = function(view)
            mask[view.factories["slot"], 1:] &= bool(view.obs["real_env_steps"] % 2)  # else one legal action
            return mask

        script.action_masks = action_masks
        recording(returns, *losses)(script)

    run = train(script, "--gamma 0.9 --gae-lambda 0.7", tmp_path, change)
    assert [given[-2:] for given, _ in run.calls[returns]] == [(0.9, 0.7)]
    for name, parameter in run.agent.named_parameters():
        if not name.startswith(("predictor", "guide.")):  # TRAMA's: it learns apart, its first matrix is zero
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert not losses or "sample" in script or run.batch["choice"].sum() != run.batch["active"].sum()
    for loss in losses:  # three epochs of two minibatches
        cells = run.batch["active" if loss == "value_loss" else "choice"].sum()
        masks = [
            next(x for x in given if getattr(x, "dtype", None) == torch.bool).sum() for given, _ in run.calls[loss]
        ]
        assert len(masks) % 6 == 0 and sum(masks) == cells * (len(masks) // 2)


def test_groups_of_units_are_as_many_as_asked(tmp_path):
    run = train(PARENT, f"{BRIEFLY} --num-groups 3 --max-units 8", tmp_path, recording("group_index"))
    (((_, max_units, num_groups), group),) = run.calls["group_index"]
    assert (max_units, num_groups, run.total_groups) == (8, 3, 3 + 1) and torch.equal(
        run.batch["group"], group.flatten(0, 1)
    )


def test_what_the_group_scripts_group_by(tmp_path):
    (tmp_path / "mixed").mkdir()
    run = train(
        "ablations/trajsep_mixed_lux.py",
        f"{BRIEFLY} --no-separate-factories",
        tmp_path / "mixed",
        recording("group_index"),
    )
    assert run.calls["group_index"][0][0][2:] == (True, False)
    run = train("ablations/trajsep_grouping_lux.py", BRIEFLY, tmp_path, recording("group_index"))
    (tile, kind, map_size, max_units, _), _ = run.calls["group_index"][0]
    assert tile is run.obs["tile"] and kind is run.obs["kind"] and (map_size, max_units) == (24, 8)


def test_as_many_cells_are_kept_as_asked_by_the_score_asked(tmp_path):
    flags = "--keep top-return --samples-per-step 2"
    run = train("ablations/trajsep_sample_reduction_lux.py", flags, tmp_path, recording("select_cells"))
    (((advantages, returns, active, *how), selected),) = run.calls["select_cells"]
    assert how == ["top-return", 2] and torch.equal(returns, advantages + run.trajectories.values)
    assert torch.equal(active, run.trajectories.active)
    assert torch.equal(run.batch["choice"], (selected & run.trajectories.choice).flatten(0, 1))


@pytest.mark.parametrize("script, paid", [("difference", "decoupled"), ("trajsep_own_reward", "blended")])
def test_how_rewards_go_along_with_the_teams_is_logged(script, paid, tmp_path):
    def change(script):
        short(12)(script)
        recording("team_correlation")(script)

    run = train(f"ablations/{script}_lux.py", "--num-steps 16 --total-timesteps 32", tmp_path, change)
    (((given, team, mask), answer),) = run.calls["team_correlation"]
    assert given is vars(run)[paid] and torch.equal(mask, living(run))
    assert torch.equal(team, team_rewards(run)) and column(tmp_path, "charts/reward_correlation") == [answer]
    assert torch.equal(run.trajectories.rewards, vars(run)[paid])
    if script == "difference":  # a factory's is its own reward, also in the last step of an episode
        factory = run.obs["kind"] == run.FACTORY
        assert run.entity_dones.any() and torch.equal(run.entity_difference[factory], run.entity_reward[factory])


def test_when_norms_are_brought_up_to_date(tmp_path):
    """Spectral norm's vectors in every step, batch norm's statistics at the start and after each update."""

    def change(script):
        class Agent(script.Agent):
            def power_iteration(self):
                script.calls["power_iteration"].append(len(script.calls["value_loss"]))
                return super().power_iteration()

            def refresh_batch_norm(self, batches):
                batches = list(batches)
                script.calls["refresh"].append((len(script.calls["value_loss"]), [len(x["kind"]) for x in batches]))
                return super().refresh_batch_norm(batches)

        script.Agent = Agent
        recording("value_loss")(script)

    run = train("ablations/trajsep_poster_norms_lux.py", "--total-timesteps 128", tmp_path, change)
    assert run.calls["power_iteration"][-12:] == list(range(1, 13))  # two iterations, three epochs, two minibatches
    assert run.calls["refresh"] == [(0, [2]), (6, [32, 32]), (12, [32, 32])]


def seen(run, t):
    """What the network saw at step t, its policy and the actions taken."""
    obs = {key: buffer[t] for key, buffer in run.obs.items()}
    return obs, run.agent.get_distribution(obs), run.actions[t]


def taken(q, action):
    return q.gather(-1, action[..., None]).squeeze(-1)


def close(a, b, where=...):
    torch.testing.assert_close(a[where], b[where], rtol=1e-3, atol=1e-5)


def test_coma_trains_on_its_counterfactual_advantage(tmp_path):
    run = train("ablations/coma_lux.py", FROZEN, tmp_path, recording("value_loss", "compute_gae"))
    alive, ((_, errors),) = living(run), run.calls["compute_gae"]
    with torch.no_grad():
        for t in range(run.args.num_steps):
            obs, policy, action = seen(run, t)
            q = run.agent.get_value(obs, action)
            close(run.entity_values[t], taken(q, action), alive[t])
            expected = taken(q, action) - (policy.probs * q).sum(-1)
            close(run.batch["advantages"].unflatten(0, (-1, run.num_rows))[t], expected, alive[t])
        last = run.agent.get_value(run.next_obs, run.action)  # the action is drawn for it
        close(run.entity_values[-1], taken(last, run.action), run.next_obs["kind"] != 0)
        assert not torch.equal(run.action, run.agent.get_distribution(run.next_obs).probs.argmax(-1))
    assert (run.batch["advantages"][run.batch["choice"]].abs() > 1e-3).any()
    assert torch.equal(run.batch["returns"], (errors + run.trajectories.values).flatten(0, 1))
    for (newvalue, values, _, active, _), _ in run.calls["value_loss"]:  # nothing has been learnt
        close(newvalue, values, active)


def test_dae_predicts_rewards_and_takes_off_what_was_expected(tmp_path):
    flags = f"{FROZEN} --beta 0.7"
    run = train(
        "ablations/dae_lux.py", flags, tmp_path, recording("difference_advantages", "compute_gae", "value_loss")
    )
    (given, answer), (_, gae) = run.calls["difference_advantages"][-1], run.calls["compute_gae"][-1]
    assert given[0] is gae and given[3:] == (0.7, 0.99, 0.95) and not torch.equal(answer, gae)
    assert given[1] is run.trajectories.dones and given[2] is run.expected
    assert torch.equal(run.batch["advantages"], answer.flatten(0, 1))
    assert torch.equal(run.batch["returns"], (answer + run.trajectories.values).flatten(0, 1))
    alive, predictions = living(run), []
    with torch.no_grad():
        for t in range(run.args.num_steps):
            obs, policy, action = seen(run, t)
            value, predicted = run.agent.get_value(obs, action)
            close(run.entity_values[t], value, alive[t])
            close(run.expected[t], (policy.probs * predicted).sum(-1), alive[t])
            predictions.append(taken(predicted, action)[alive[t]])
    rewards = [given for given, _ in run.calls["value_loss"] if given[1] is None][:2]  # of the first epoch
    for of, expected in ((0, torch.cat(predictions)), (2, run.trajectories.rewards[alive])):
        epoch = torch.cat([given[of].detach()[given[3]] for given in rewards])
        close(epoch.sort()[0], expected.sort()[0])


def test_gpae_values_older_steps_by_the_policy_as_it_is(tmp_path):
    """Stopped before its fourth update, whose policy then is the one that all was computed with."""
    scripts = []

    def change(script):
        recording("trace_weights", "compute_gae", "value_loss")(script)

        def policy_loss(*given, function=script.policy_loss):
            if script.iteration == 4:
                raise Cut
            script.calls["policy_loss"].append((given, function(*given)))
            return script.calls["policy_loss"][-1][1]

        class Agent(script.Agent):
            def get_value(self, obs, action, probs):
                assert not probs.requires_grad  # the critic's loss does not move the actor
                if "reward" in obs:  # after the rollout
                    legal = taken(obs["action_mask"], action).bool()
                    script.calls["drawn"].append((legal.all(), torch.equal(action, script.actions[-1])))
                return super().get_value(obs, action, probs)

        script.policy_loss, script.Agent = policy_loss, Agent
        scripts.append(script)

    flags = "--reuse 3 --num-steps 8 --total-timesteps 64 --importance st --eta 1.2 --learning-rate 0.01"
    with contextlib.suppress(Cut):
        train("ablations/gpae_lux.py", flags, tmp_path, change)
    run = scripts[0]
    alive, free = living(run), run.obs["action_mask"].sum(-1) > 1
    with torch.no_grad():
        for t in range(24):
            obs, policy, action = seen(run, t)
            close(run.current[t], policy.log_prob(action), alive[t])
            close(run.probs[t], policy.probs, alive[t])
            close(run.entity_values[t], run.agent.get_value(obs, action, policy.probs), alive[t])
            moved = (run.current[t] - run.entity_logprobs[t]).abs()[alive[t] & free[t]]
            assert moved.mean() > 1e-3 if t < 16 else (moved == 0).all()
    clock = 1000 * run.obs["planes"][:, 0, 17, 0, 0].double()
    assert clock.round().int().tolist() == list(range(8, 32))  # the three newest rollouts of four, the newest last
    (logratio, *how), traces = run.calls["trace_weights"][-1]
    assert how == ["st", 1.2] and torch.equal(logratio, (run.current - run.entity_logprobs) * alive)
    given, advantages = run.calls["compute_gae"][-1]
    assert given[1] is traces
    returns = logratio.exp().clamp(max=1) * advantages + run.trajectories.values
    assert torch.equal(run.batch["returns"], returns.flatten(0, 1))
    # one rollout in the first update, then two, then three, in two minibatches and three epochs
    calls = [given for given, _ in run.calls["policy_loss"]]
    assert [len(given[0]) for given in calls] == [8] * 6 + [16] * 6 + [24] * 6
    assert max(column(tmp_path, "charts/active_cells")) <= alive.sum(-1).max()
    kept = torch.load(tmp_path / "runs/test/checkpoint.pt", weights_only=True)["kept"]
    assert len(kept) == len(run.obs) + 4 and all(len(buffer) == 16 for buffer in kept)
    legal, same = zip(*run.calls["drawn"], strict=True)
    assert len(legal) == 4 and all(legal) and not all(same)
    for given in (calls[0], calls[6]):  # before any step of the optimiser
        close(given[0].detach(), given[1])
        assert given[0].requires_grad and not given[1].requires_grad
    assert (calls[0][1] - 1).abs().max() < 1e-4 < (calls[6][1] - 1).abs().max()
    kl = [((r / old).detach() - 1 - (r / old).detach().log())[mask].mean().item() for r, old, _, mask, _ in calls]
    assert column(tmp_path, "losses/approx_kl") == pytest.approx(np.reshape(kl, (3, 6)).mean(1), rel=1e-2, abs=1e-6)
    masks = [sum(given[3].sum() for given in calls[12 + 2 * i : 14 + 2 * i]) for i in range(3)]
    assert len({mask.item() for mask in masks}) == 1  # the same cells in each epoch
    for given in calls:
        assert torch.equal(given[3], given[3] & (given[1] != 0))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_differences_are_decoupled(share, tmp_path):
    run = train("ablations/difference_lux.py", f"--num-steps 16 --total-timesteps 32 --own-reward {share}", tmp_path)
    alive = living(run)
    equal = (team_rewards(run) / alive.sum(-1))[..., None] * alive
    torch.testing.assert_close(run.trajectories.rewards, run.entity_difference * alive if share else equal)


def test_vdn_explores_less_and_less_and_learns_the_teams_return(tmp_path):
    epsilons = []

    def change(script):
        class Agent(script.Agent):
            def __setattr__(self, name, value):
                epsilons.extend([value] * (name == "epsilon"))
                super().__setattr__(name, value)

        script.Agent, script.EPISODE_STEPS = Agent, 12
        recording("lambda_returns")(script)

    flags = f"{FROZEN} --num-steps 16 --total-timesteps 128 --exploration-fraction 0.5 --end-e 0.02 --team-scale 0.3"
    run = train("ablations/vdn_lux.py", flags, tmp_path, change)
    assert epsilons == pytest.approx([0.02, 1, 1 - 0.98 * 0.5, 0.02, 0.02])  # the first: of a model that is loaded
    (reward, over, best_q, *_), returns = run.calls["lambda_returns"][-1]
    torch.testing.assert_close(reward, team_rewards(run) * 0.3)
    alive = living(run)
    assert torch.equal(over.bool(), (~alive | run.entity_dones.bool()).all(-1)) and over.any()
    with torch.no_grad():
        q = run.agent.get_q(run.next_obs).amax(-1)
    torch.testing.assert_close(best_q[-1], (q * (run.next_obs["kind"] != 0)).sum(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(run.batch["returns"], returns.flatten())
    errors = []
    with torch.no_grad():
        for t in range(run.args.num_steps):
            q = run.agent.get_q({key: buffer[t] for key, buffer in run.obs.items()})
            close(best_q[t], (q.amax(-1) * alive[t]).sum(-1))
            errors.append((taken(q, run.actions[t]) * alive[t]).sum(-1) - returns[t])
    assert column(tmp_path, "losses/value_loss")[-1] == pytest.approx(
        0.5 * torch.stack(errors).pow(2).mean().item(), rel=1e-3
    )


def test_trama_learns_the_classes_of_the_trajectories_that_its_entities_are_in(tmp_path):
    """Three iterations of games of eleven steps, of which the last is looked at."""
    heard, gradients, hooks, numbers = defaultdict(list), [], [], itertools.count()

    def change(script):
        script.EPISODE_STEPS, script.HORIZON, script.STRIDE, script.NUM_POINTS = 11, 8, 2, 4
        script.NUM_STORED, script.CLUSTER_EVERY = 40, 1

        def noted(name, answer, *given):
            heard[name].append((given, answer))
            return answer

        class Classes(script.Classes):
            def add(self, *given):
                return noted("add", super().add(*given), *given)

            def fit(self, optimizer, steps, rng):
                return noted("fit", super().fit(optimizer, steps, rng), steps, rng.initial_seed())

            def cluster(self, *given):
                super().cluster(*given)
                return 0.25, 0.75

        class Agent(script.Agent):
            def predict(self, near, living, hidden):
                answer = super().predict(near, living, hidden)
                return noted("predict", answer, near, living, hidden) if len(near) > 1 else answer

        def before_a_step(optimizer, *_):
            weights = list(script.agent.predictor.parameters())
            predicts = optimizer is script.class_optimizer and weights[0].grad is not None
            if predicts and script.iteration == 3:
                optimizer.param_groups[0]["lr"] = 0.1  # so that each epoch says something else
                of, known = script.agent, script.target >= 0
                logits = super(Agent, of).predict(script.obs["near"], living(script), script.obs["hidden"][0])[0]
                loss = torch.nn.functional.cross_entropy(logits[known], script.target[known])
                expected = torch.autograd.grad(loss, weights)
                gradients.append([(weight.grad.clone(), x) for weight, x in zip(weights, expected, strict=True)])

        class LuxEnv(script.LuxEnv):
            def step(self, action):
                *answer, info = super().step(action)
                if "episode" in info:  # so that no two games have the same return
                    info["episode"]["episodic_return"] = float(next(numbers))
                return *answer, info

        script.Classes, script.Agent, script.make_worker_env = Classes, Agent, LuxEnv
        hooks.append(register_optimizer_step_pre_hook(before_a_step))

    flags = "--num-steps 64 --total-timesteps 384 --num-classes 2 --tasks cave mountain-lean"
    try:
        run = train("ablations/trama_lux.py", flags, tmp_path, change)
    finally:
        hooks[0].remove()
    assert run.iteration == 3
    (states, age), place = heard["add"][-1]
    assert torch.equal(states, run.obs["planes"][:, :, :16].float().mean((-2, -1)))
    assert torch.equal(age, ((128 + torch.arange(64)) % 11)[:, None].expand(64, 2))
    # what the predictor is to say: of the living the class of their trajectory, where it has one
    _, valid, _, code, label = run.classes.look()
    expected = torch.where(living(run), label[place][..., None], -1)
    assert torch.equal(run.target, expected) and {*expected.unique().tolist()} == {-1, 0, 1}
    assert (run.classes.label[place[-1]] == -1).any()  # of those that are not whole the nearest
    # what it says that by: three epochs, each from the memory that the rollout began with
    predictions = heard["predict"]
    assert len(predictions) == 9 and len(gradients) == 3
    for (near, alive, hidden), _ in predictions[-3:]:
        assert near is run.obs["near"] and torch.equal(alive, living(run))
        assert torch.equal(hidden, run.obs["hidden"][0]) and hidden.any()
    assert not torch.equal(run.obs["hidden"][0], run.obs["hidden"][-1])
    for gradient, right in (pair for epoch in gradients for pair in epoch):
        torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-6)
    # what is logged
    last = rows(tmp_path)[-1]
    logged = [float(last[f"classes/{name}"]) for name in ("kept", "kept_random", "accuracy", "codes_used")]
    right = predictions[-3][1][0].argmax(-1) == expected
    share, used = right[expected >= 0].float().mean(), len({*code[valid].tolist()})
    assert logged == pytest.approx([0.25, 0.75, share.item(), used])
    assert [given[0] for given, _ in heard["fit"]] == [32] * 3
    assert len({given[1] for given, _ in heard["fit"]}) == 3  # what is drawn is another in each iteration
    task = run.obs["task"].long()
    assert torch.equal(run.classes.task[place], task) and len(task.unique()) == 2
    for name in run.args.tasks:
        of = run.classes.task == list(run.TASKS).index(name)
        assert [float(last[f"classes/{name}_{k}"]) for k in (0, 1)] == [(of & (label == k)).sum() for k in (0, 1)]
    ended, names = task[age == 10], list(run.TASKS)
    returns = defaultdict(list)
    for number, value in zip(ended.tolist(), run.episodes["episodic_return"], strict=True):
        returns[names[number]].append(value)
    assert len(ended) == len({*run.episodes["episodic_return"]})
    assert {name: run.episodes[f"return_{name}"] for name in run.args.tasks} == returns


@pytest.mark.parametrize("script", [PARENT, "ablations/gpae_lux.py"])
def test_several_threads_train_the_same_twice(script, tmp_path):
    """Without deterministic algorithms threads add the gradients of what was gathered in any order."""
    ends = []
    threads = torch.get_num_threads()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        try:
            torch.set_num_threads(3)  # 64 maps: a boundary between threads falls inside a map
            space = train(script, "--channels 24 --num-minibatches 1 --update-epochs 4", tmp_path / folder)
        finally:
            torch.set_num_threads(threads)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in space.agent.parameters()]))
    assert torch.equal(*ends)
