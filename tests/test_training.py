"""What the main block does with the functions above it: trainings in this process, whose variables are then looked at.

The environments step in this process, one after the other; all else is the script as it is.
"""

import ast
import contextlib
import csv
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


def test_coma_trains_on_its_counterfactual_advantage(tmp_path):
    run = train("ablations/coma_lux.py", FROZEN, tmp_path)
    with torch.no_grad():
        for t in range(run.args.num_steps):
            seen = {key: buffer[t] for key, buffer in run.obs.items()}
            q, probs = run.agent.get_value(seen, run.actions[t]), run.agent.get_distribution(seen).probs
            taken = q.gather(-1, run.actions[t][..., None]).squeeze(-1)
            expected = (taken - (probs * q).sum(-1))[living(run)[t]]
            trained = run.batch["advantages"].unflatten(0, (-1, run.num_rows))[t][living(run)[t]]
            torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-5)
    assert (run.batch["advantages"][run.batch["choice"]].abs() > 1e-3).any()


def test_dae_takes_its_beta(tmp_path):
    run = train("ablations/dae_lux.py", "--beta 0.7", tmp_path, recording("difference_advantages", "compute_gae"))
    (given, answer), (_, gae) = run.calls["difference_advantages"][-1], run.calls["compute_gae"][-1]
    assert given[0] is gae and given[3] == 0.7 and not torch.equal(answer, gae)
    assert torch.equal(run.batch["advantages"], answer.flatten(0, 1))


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
