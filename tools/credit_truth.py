"""Whose credit is right? Every estimator's advantages against the simulated effect of the actions.

The policy of a run is frozen. Truth (branches.py): an action's advantage is the team's discounted return
over the next steps less its mean over the entity's policy, with each other action simulated in turn.
Estimates (estimates.py): each training script's own functions, with a critic fitted from scratch, on the
rollout in which the state came up; in units of the team's reward. With the defaults some two hours of one core.
The script beside the model is run as a program: measure only runs that you trust.

    python tools/credit_truth.py runs/NAME --json truth.json --picture truth.png
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import load
import numpy as np
import torch
from branches import Games, branch_returns, true_advantages
from estimates import ESTIMATORS, NO_CRITIC, ROOT, Estimator, deaths_and_births, fit, settings
from scipy.stats import rankdata

FORCED = 0.05  # how often a unit is made to stand still for the advantage gap
CASES = 200  # deaths and births looked at, at most
TABLE = {
    **{"std": "its spread", "correlation": "correlation", "without": "without any one action", "rank": "of ranks"},
    **{"slope": "slope", "noise": "noise / truth", "signs": "right signs", "explained": "explained variance"},
    **{"gap": "gap less placebo", "gap_raw": "in the team's reward", "spread": "among entities / truth's"},
    **{"after_death": "paid after death", "before_birth": "paid by older ones"},
}
CELL = "rollout", "t", "b", "slot"
SILENT = {"run_name", "resume", "seed", "cuda", "track"}  # settings of a run that change nothing that is measured
COLOURS = {"light": "#6aaed6", "heavy": "#08306b", "factory": "#d95f02"}


# ---- measures


def mean(x, weights):
    """The weighted mean of x (n,), weights (..., n): (...); NaN where nothing weighs."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return weights @ x / weights.sum(-1)


def measure(truth, error, kind, estimate, weights):
    """An estimate (n,) beside a truth (n,) with its standard errors; weights (..., n).

    Its spread, correlation, that of the ranks within each kind; slope and noise over truth, both without
    the truth's error, NaN where that exceeds the truth's spread; the share of right signs where the truth
    is two errors from 0.
    """
    xx, yy, xy = moments(truth, estimate, weights)
    ranks = moments(*(ranks_within(kind, x) for x in (truth, estimate)), weights)
    known, squared = np.abs(truth) > np.maximum(2 * error, 1e-9), mean(error**2, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation, rank = (np.where(b > 0, ab / np.sqrt(a * b), 0.0) for a, b, ab in ((xx, yy, xy), ranks))
        true = np.where(xx > squared, xx - squared, np.nan)
        noise = np.sqrt(np.maximum(xx + yy - 2 * xy - squared, 0) / true)
        signs = mean(np.sign(truth) == np.sign(estimate), weights * known)
    found = {"std": np.sqrt(yy), "slope": xy / true, "correlation": correlation, "rank": rank}
    return found | {"noise": noise, "signs": signs}


def ranks_within(kind, x):
    """Ranks of x (n,) among those of the same kind, from -0.5 to 0.5."""
    ranks = np.zeros(len(x))
    for name in np.unique(kind):
        ranks[kind == name] = (rankdata(x[kind == name]) - 0.5) / (kind == name).sum() - 0.5
    return ranks


def moments(x, y, weights):
    """Weighted variances of x and y (n,) and their covariance."""
    x, y = x - x.mean(), y - y.mean()
    a, b = mean(x, weights), mean(y, weights)
    xx, yy = mean(x**2, weights) - a**2, mean(y**2, weights) - b**2
    return np.maximum(xx, 0), np.maximum(yy, 0), mean(x * y, weights) - a * b


def with_intervals(cluster, statistic, resamples=1000):
    """The numbers of statistic(weights) for all rows alike, and 95% intervals: whole clusters (n,) are drawn anew."""
    names, index = np.unique(cluster, return_inverse=True)
    value = {name: float(x[0]) for name, x in statistic(np.ones((1, len(cluster)))).items()}
    if len(names) < 3:  # too few to tell
        return {"value": value, "interval": dict.fromkeys(value, [np.nan, np.nan])}
    equal = np.full(len(names), 1 / len(names))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = statistic(np.random.default_rng(0).multinomial(len(names), equal, size=resamples)[:, index])
    drawn = {name: x[np.isfinite(x)] for name, x in drawn.items()}
    found = {name: np.percentile(x, [2.5, 97.5]).tolist() if len(x) else [np.nan] * 2 for name, x in drawn.items()}
    return {"value": value, "interval": found}


def within_steps(state, x):
    """The variance of x (n,) among the entities of each state that has two or more: (states,)."""
    several = [x[state == name] for name in np.unique(state)]
    return np.array([np.var(some, ddof=1) for some in several if len(some) > 1])


# ---- the whole measurement


def collect_truth(flags, agent, args, rollouts):
    """One row for each entity with a choice in each kept state: a dictionary of arrays (n,)."""
    rows, number = [], 0
    for r, rollout in enumerate(rollouts):
        for (t, b), env, obs, action in rollout["states"]:
            horizons = (flags.steps, flags.near_steps) + (flags.long_steps,) * (number < flags.long_states)
            seeds = [[flags.seed, number, s] for s in range(flags.seeds)]
            returns = branch_returns(agent, env, obs, action, horizons, seeds, args.gamma)
            probs = rollout["seen"]["probs"][t, b].numpy()
            found = [true_advantages(one, probs, action.numpy()) for one in returns]
            kind, free = obs["kind"][0], obs["action_mask"][0].sum(-1) > 1
            for slot in np.flatnonzero(free):
                row = {"state": number, "rollout": r, "t": t, "b": b, "slot": int(slot), "kind": int(kind[slot])}
                row |= {"action": int(action[slot]), "living": int((kind > 0).sum())}
                row["inner_error"] = found[0]["inner_error"]
                for name in ("policy", "no_op", "still"):
                    row |= {name: found[0][name][0][slot], f"{name}_error": found[0][name][1][slot]}
                for name, one in zip(("near", "long"), [*found[1:], None][:2], strict=True):
                    row[name], row[f"{name}_error"] = [x[slot] for x in one["policy"]] if one else (np.nan, np.nan)
                rows.append(row)
            number += 1
            print(f"\rtruth: {number} states, {len(rows)} actions", end="", file=sys.stderr, flush=True)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def quality(error, truth):
    """Of a truth (n,): its spread, the mean of its errors, its reliability, the highest correlation that it allows.

    `largest`: the share of its variance that the action which makes most of it makes alone.
    """
    away, reliability, largest = (truth - truth.mean()) ** 2, 0.0, 1.0
    if away.any():
        reliability, largest = max(0.0, 1 - np.mean(error**2) / away.mean()), away.max() / away.sum()
    numbers = {"actions": len(truth), "std": np.std(truth), "error": np.sqrt(np.mean(error**2))}
    return numbers | {"reliability": reliability, "ceiling": reliability**0.5, "largest": largest}


def groups_of(script, truth):
    """Which rows each row of the tables is over, and the truth that it takes: {name: (rows, name of the truth)}."""
    low, high = np.quantile(truth["living"], (1 / 3, 2 / 3))
    long = np.isfinite(truth["long"])
    groups = {"all": (np.full(len(long), True), "policy")}
    for name in ("light", "heavy", "factory"):
        groups[name] = truth["kind"] == getattr(script, name.upper()), "policy"
    groups[f"few (to {low:.0f})"] = truth["living"] <= low, "policy"
    groups[f"some (to {high:.0f})"] = (truth["living"] > low) & (truth["living"] <= high), "policy"
    groups["many"] = truth["living"] > high, "policy"
    groups |= {"against no-op": (truth["action"] != script.NO_OP, "no_op"), "near": (groups["all"][0], "near")}
    groups["long"] = long, "long"
    groups["long's states"] = long, "policy"
    return {name: group for name, group in groups.items() if group[0].any()}


def true_gap(script, truth):
    """The advantage gap by the truth: what the others' actions bring less what standing still would bring."""
    gaps, unit = [], truth["kind"] < script.FACTORY
    for n in np.flatnonzero((truth["action"] != script.NO_OP) & unit):
        others = (truth["state"] == truth["state"][n]) & unit
        others[n] = False
        if others.any():
            gaps.append((truth["policy"][others].mean() - truth["still"][n], truth["state"][n]))
    gap, state = np.array(gaps).reshape(-1, 2).T
    return with_intervals(state, lambda weights: {"gap": mean(gap, weights)})


def judge(estimator, truth, fresh, forced, cases):
    """What one fit of an estimator says: estimates at the truth's rows, explained variance, gaps and faults."""
    script, found = estimator.script, {"raw": np.zeros(len(truth["t"])), "normal": np.zeros(len(truth["t"]))}
    errors, targets = [], []
    found |= {"gaps": [], "parts": {"after_death": [], "before_birth": []}}
    for r, rollout in enumerate((*fresh, *forced)):
        raw, normal, returns, trajectories, said = estimator.advantages(rollout)
        if r < len(fresh):
            at = np.flatnonzero(truth["rollout"] == r)
            where = tuple(truth[name][at] for name in ("t", "b", "slot"))
            found["raw"][at], found["normal"][at] = raw[where].numpy(), normal[where].numpy()
            targets.append(returns[trajectories.active])
            errors.append((returns - trajectories.values)[trajectories.active])
        unit = (rollout["seen"]["kind"][:-1] < script.FACTORY) & (rollout["seen"]["action_mask"][:-1].sum(-1) > 1)
        for name in ("stood", "spared"):
            for t, b, slot in rollout[name]:
                others = unit[t, b].clone()
                others[slot] = False
                if others.any():
                    gap = [(x[t, b, others] - x[t, b, slot]).mean().item() for x in (raw, normal)]
                    found["gaps"].append((name == "stood", rollout["games"][t, b], *gap))
        for name, (b, slot, cells, erased) in cases[r]:
            part = (raw[:, b] - estimator.without(rollout, said, b, erased))[cells, slot].double()
            whole = raw[cells, b, slot].double()
            sums = (part.sum(), whole.sum(), part @ whole, whole @ whole)
            found["parts"][name].append((rollout["games"][cells.start, b], len(whole), *map(float, sums)))
    return found | {"explained": (1 - torch.cat(errors).var() / torch.cat(targets).var()).item()}


def summary(script, truth, fits):
    """An estimator's numbers in the mean over its fits, with intervals over states (or games) and by group."""
    result = {}
    for name, (chosen, which) in groups_of(script, truth).items():
        true = [truth[key][chosen] for key in (which, f"{which}_error", "kind")]
        raw, normal = ([np.asarray(one[key])[chosen] for one in fits] for key in ("raw", "normal"))

        def statistic(weights, true=true, raw=raw, normal=normal):
            several = [measure(*true, x, weights) for x in raw]
            found = {key: np.mean([one[key] for one in several], 0) for key in several[0]}
            several = [measure(*true, x, weights)["correlation"] for x in normal]
            return found | {"correlation_normal": np.mean(several, 0)}

        result[name] = with_intervals(truth["state"][chosen], statistic)
        everything = np.ones(len(true[0]))
        left = statistic(everything - np.eye(len(everything)))["correlation"]
        result[name]["without_one"] = [left.min(), left.max()]
        result[name]["fits"] = [measure(*true, x, everything) for x in raw]
    found = result["all"]
    inner = [within_steps(truth["state"], np.asarray(x)) for x in (truth["policy"], *(one["raw"] for one in fits))]
    states, counts = np.unique(truth["state"], return_counts=True)
    error = np.array([truth["inner_error"][truth["state"] == name][0] for name in states[counts > 1]])
    rows, cluster, *gaps = np.mean([np.reshape(one["gaps"], (-1, 4)) for one in fits], 0).T

    def spread(weights):
        true, wrong, *estimates = (mean(variance, weights) for variance in (inner[0], error, *inner[1:]))
        return {"spread": np.sqrt(np.mean(estimates, 0) / np.where(true > wrong, true - wrong, np.nan))}

    def gap(weights):
        stood, spared = ([mean(x, weights * (rows == one)) for x in gaps] for one in (1, 0))
        return {
            "gap_raw": stood[0] - spared[0],
            "gap_seen": stood[1],
            "placebo": spared[1],
            "gap": stood[1] - spared[1],
        }

    several = [with_intervals(np.arange(len(inner[0])), spread), with_intervals(cluster, gap)]
    for name in ("after_death", "before_birth"):
        game, *sums = np.mean([np.array(one["parts"][name]).reshape(-1, 6) for one in fits], 0).T

        def share(weights, name=name, sums=sums):
            """Of the variance of the advantages near a death or birth, what goes along with the rewards in question."""
            n, part, whole, product, square = (weights @ x for x in sums)
            with np.errstate(divide="ignore", invalid="ignore"):
                variance = square / n - (whole / n) ** 2
                return {name: (product / n - part * whole / n**2) / np.where(variance > 0, variance, np.nan)}

        several.append(with_intervals(game, share))
        found[f"{name}_cases"] = len(game)
    for more in several:
        found["value"] |= more["value"]
        found["interval"] |= more["interval"]
    found["value"]["explained"] = np.mean([one["explained"] for one in fits])
    return result


def show(results, known):
    """Two tables in Markdown, to stdout: all numbers with their intervals, and some of them by group."""

    def line(*cells):
        print("| " + " | ".join(cells) + " |")

    def cell(groups, key):
        found = groups["all"]
        if key == "without":
            return "{:.2f} to {:.2f}".format(*found["without_one"])
        value, (low, high) = found["value"][key], found["interval"].get(key, (np.nan, np.nan))
        digits = 3 if key in ("std", "gap_raw") else 2
        text = f"{value:.{digits}f}" if np.isfinite(value) else ""
        return text + (f" ({low:.{digits}f}, {high:.{digits}f})" if text and np.isfinite(low) else "")

    line("", *TABLE.values())
    line(*["---"] * (1 + len(TABLE)))
    for name, groups in results.items():
        line(name, *(cell(groups, key) for key in TABLE))
    print("\nCorrelation, that of ranks, slope and noise by group of actions\n")
    line("", *known)
    line(*["---"] * (1 + len(known)))
    quality = "{actions}, {ceiling:.2f}, {largest:.2f}"
    line("actions, ceiling, share of the largest", *(quality.format(**one) for one in known.values()))
    for name, groups in results.items():
        keys = ("correlation", "rank", "slope", "noise")
        found = (" ".join(f"{groups[group]['value'][key]:.2f}" for key in keys) for group in known)
        line(name, *(text.replace("nan", "-") for text in found))


def draw(path, script, truth, results, estimates):
    """Truth across, estimate up, a panel an estimator; the grey line is where they are equal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns, rows = 4, -(-len(results) // 4)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.9 * rows), sharex=True, squeeze=False)
    wide = np.abs(truth["policy"]).max() * 1.05
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    for axis, (name, groups) in zip(axes.flat, results.items(), strict=False):
        estimate, found = np.asarray(estimates[name][0]["raw"]), groups["all"]["value"]
        axis.plot([-wide, wide], [-wide, wide], color="0.7", linewidth=1)
        for label, colour in COLOURS.items():
            chosen = truth["kind"] == getattr(script, label.upper())
            axis.scatter(truth["policy"][chosen], estimate[chosen], s=7, color=colour, label=label, alpha=0.7)
        axis.set_title(f"{name}\ncorrelation {found['correlation']:.2f}, slope {found['slope']:.2f}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=5)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("true advantage of the action (simulated), in the team's reward", fontsize=9)
    figure.supylabel("the estimator's advantage (first fit)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def stored(path):
    """What an earlier measurement wrote with --json, its truth as arrays."""
    try:
        with open(path) as file:
            content = json.load(file)
        rows = {name: np.array(x, dtype=float) for name, x in content["truth"].items()}  # null becomes NaN
        whole = {name: rows[name].astype(int) for name in ("state", *CELL, "kind", "action", "living")}
        return {"flags": content["flags"], "args": content["args"]} | content | {"truth": rows | whole}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise load.Refusal(f"{path} is not what --json of this program wrote: give another.") from error


def take_truth(flags, args, rollouts):
    """The truth of an earlier measurement, where that had this policy's settings, states and actions."""
    content, names = stored(flags.take_truth), ("states", "seeds", "steps", "near_steps", "long_states", "long_steps")
    for name in (*names, "seed"):
        if content["flags"].get(name) != getattr(flags, name):
            said = content["flags"].get(name)
            raise load.Refusal(f"{flags.take_truth} has --{name.replace('_', '-')} {said}: give the same, or no truth.")
    truth = content["truth"]
    chosen = [rollouts[r]["seen"]["action"][t, b, k] for r, t, b, k in zip(*(truth[x] for x in CELL), strict=True)]
    if measured(plain(asdict(args))) != measured(content["args"]) or list(map(int, chosen)) != truth["action"].tolist():
        raise load.Refusal(f"{flags.take_truth} is of another policy, which did other things: give this one's.")
    return truth


def measured(args):
    """The settings of a run that what is measured depends on."""
    return {name: value for name, value in args.items() if name not in SILENT}


def plain(x):
    """Numbers and arrays as JSON has them, to six digits; NaN becomes null."""
    x = x.tolist() if isinstance(x, (np.ndarray, np.generic)) else x
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if np.isfinite(x) else None
    return str(x) if isinstance(x, Path) else x


def report(script, content, file, picture):
    """Print what is in the truth and the estimates of `content`, and write all of it to a file, if one is named."""
    truth, estimates = content["truth"], content["estimates"]
    groups = groups_of(script, truth)
    known = {n: quality(truth[f"{which}_error"][rows], truth[which][rows]) for n, (rows, which) in groups.items()}
    results = {name: summary(script, truth, fits) for name, fits in estimates.items()}
    states, spread, error = len(np.unique(truth["state"])), known["all"]["std"], known["all"]["error"]
    print(
        f"{content['run']}: {len(truth['t'])} actions in {states} states, {content['events']} units made to stand still"
    )
    print(f"truth over {content['flags']['steps']} steps: standard deviation {spread:.4f}, error {error:.4f}")
    gap = true_gap(script, truth)
    print("its advantage gap: {:.4f} ({:.4f}, {:.4f})\n".format(gap["value"]["gap"], *gap["interval"]["gap"]))
    show(results, known)
    if file:
        with open(file, "x") as out:
            json.dump(plain(content | {"quality": known, "true_gap": gap, "estimators": results}), out)
    if picture:
        draw(picture, script, truth, results, estimates)


def credit_truth(flags):
    load.refuse_taken(flags.json, flags.picture)
    if flags.take_truth:
        stored(flags.take_truth)  # what is wrong with it is said at once
    script, args, agent = load.load(flags.run, flags.best, flags.script)
    numbers = {name: value for name, value in vars(flags).items() if type(value) is int}
    least = {"long_states": 0, "long_steps": flags.steps, "seeds": 2, "seed": 0}
    for name, value in numbers.items():
        if not least.get(name, 1) <= value <= 10**6:
            raise load.Refusal(f"--{name.replace('_', '-')} must be from {least.get(name, 1)} to 1000000, got {value}.")
    if args.opponent != "idle":
        raise load.Refusal(f"{flags.run} was trained in self-play: the truth is for the idle opponent only.")
    if hasattr(agent, "hidden"):
        raise load.Refusal(f"{flags.run} has a policy with a memory, which the branches of a game cannot share.")
    files = {file: load.import_script(ROOT / file) for file, _ in ESTIMATORS.values()}
    game, start, seconds = files["ablations/difference_lux.py"], time.time(), {}
    game_args = settings(game, args, {})

    def say(stage, text):
        seconds[stage] = time.time() - start
        print(f"{seconds[stage]:7.0f} s  {stage}: {text}", file=sys.stderr, flush=True)

    def games(part):
        found = Games(game, game_args, agent, 10000 * flags.seed + part)
        found.scatter(game.EPISODE_STEPS)
        return found

    playing, steps, envs = games(0), args.num_steps, args.num_envs
    train = [playing.rollout(steps) for _ in range(flags.rollouts)]
    say("rollouts", f"{len(train)} to fit critics on")
    fresh, forced, events = [], [], 0
    for r in range(-(-flags.states // envs)):  # every state from a game, hence a map, of its own
        playing, count = games(1 + r), min(envs, flags.states - r * envs)
        fresh.append(playing.rollout(steps, kept=[(int(playing.rng.integers(steps)), b) for b in range(count)]))
    playing = games(9999)
    while events < flags.gap_events and len(forced) * steps * envs * FORCED < 5 * flags.gap_events:
        forced.append(playing.rollout(steps, FORCED))
        events += len(forced[-1]["stood"])
    say("fresh rollouts", f"{len(fresh)} for the truth, {len(forced)} with {events} units made to stand still")
    truth = take_truth(flags, args, fresh) if flags.take_truth else collect_truth(flags, agent, args, fresh)
    say("truth", f"{len(truth['t'])} actions in {flags.states} states")
    cases = [[] for _ in (*fresh, *forced)]  # by rollout
    found = [deaths_and_births(script, rollout) for rollout in (*fresh, *forced)]
    for name in ("after_death", "before_birth"):
        every = [(r, case) for r, one in enumerate(found) for case in one[name]]
        for i in np.random.default_rng(flags.seed).permutation(len(every))[:CASES]:
            cases[every[i][0]].append((name, every[i][1]))
    estimates = {}
    for name, (file, changed) in ESTIMATORS.items():
        its_args, fits = settings(files[file], args, changed), []
        for seed in range(1 if name in NO_CRITIC else flags.fits):
            critic = None if name in NO_CRITIC else fit(files[file], its_args, train, seed)
            fits.append(judge(Estimator(name, files[file], its_args, critic), truth, fresh, forced, cases))
        estimates[name] = fits
        say(name, f"{len(fits)} fits")
    content = {"run": flags.run, "flags": {key: value for key, value in vars(flags).items() if key != "run"}}
    content |= {"args": asdict(args), "seconds": seconds, "events": events, "truth": truth, "estimates": estimates}
    report(script, content, flags.json, flags.picture)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    load.add_arguments(parser)
    for name, default, text in (
        ("states", 40, "states, each on a map of its own, in which every entity's action is judged"),
        ("seeds", 24, "how often each branch is played on"),
        ("steps", 24, "how many steps the truth looks ahead"),
        ("near-steps", 8, "how many it looks ahead for a truth with less chance in it"),
        ("long-states", 4, "states in which it looks further as well"),
        ("long-steps", 100, "how far"),
        ("rollouts", 40, "rollouts that critics are fitted on"),
        ("fits", 2, "critics of each estimator"),
        ("gap-events", 1500, "units that are made to stand still"),
        ("seed", 0, "of everything that is drawn"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})", metavar="N")
    parser.add_argument("--take-truth", type=Path, help="take the truth of an earlier --json", metavar="FILE")
    parser.add_argument("--json", type=Path, help="write all numbers", metavar="FILE")
    parser.add_argument("--picture", type=Path, help="draw truth and estimates", metavar="FILE.png")
    try:
        credit_truth(parser.parse_args())
    except (load.Refusal, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
