"""Tables and pictures, made from the files under ablations/results/ alone.

    python ablations/report.py baselines [--scale cpu]   one figure: results/<scale>/<figure>.md and .png
    python ablations/report.py claims                    the paper's claims beside ours, and the short tables of
                                                         figures that are not the paper's, in ablations/README.md
    python ablations/report.py all                       every table that is there, made anew, and the claims
    python ablations/report.py --compare trajsep mine    folders of results; all are compared with the first

METHOD below says how the numbers are made; it is printed before every table. Curves that are damaged or
not finished are refused by name. The dashed line in a picture is the untrained policy, where
results/<scale>/untrained/ holds its evaluation; the dotted one, at the paper's scale, the paper's curve.
"""

import argparse
import re
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from curves import MEASURES, SAME_RUNS, compare, holm, interval, load, measure, middle_mean, runs_of  # noqa: E402
from run import FIGURES, ROOT, SCALES, VARIANTS, Variant  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

METHOD = """Chosen once for all tables: the main measure is the **ice of the run**, the area under the learning curve: \
the mean over the run's windows of 4,096 steps (a thirteenth of a run of another length) of the ice that an episode \
which ended there delivered. A window in which none ended lies on the line between its neighbours and counts 0 before \
the first. Beside it the **end**, the episodes of the last two windows, and the step at which the first episode of \
1,000 steps, a full one, ended ("10% full": the first window with that share of them, over all runs). Each number is a \
mean over runs with its 95% interval by Student's t ([a bootstrap of so few is too narrow](LOG.md#intervals)), from \
five runs on with the interquartile mean (IQM) beside it. A **ratio** is the second's mean over the \
first's. Its interval holds the ratios r around it for which Welch's test does not tell the second from r times the \
first: that is sound for three runs, spans 1 exactly where Welch's p is above 0.05, and has no end where the first may \
be 0. p has Holm's correction for all tests of the table that it stands in; d is Cohen's. In pictures a band is \
the interval; below five \
runs thin lines show each run instead.
"""
VERDICTS = """The verdicts rest on each claim's own interval, without correction. A claim `first > second` **agrees** \
if the interval of the ratio lies below 1 and holds the paper's ratio; it **agrees in order only** if the paper's \
ratio (in brackets) is outside or not given; it is **not decided** if the interval spans 1, and **contradicts** if it \
lies above. The paper's ice is that at the end of training, its first full episode the step by which 10% of its \
episodes were. A run that never has an episode of 1,000 steps counts with its length, and that claim has no p.
"""
# Commits of the curves of seeds 1 to 3, between which training is the same to the digit
SAME_TRAINING = """ded624b ba62f97 ed12905 12e268d 1714c9c b121e8a 70b9f51 7ba5947 28d1e75 7d9b54a d4b30b6 7d588a7
0bfc746 df73ba5 8703038 b890e22"""
MAPS = {"cpu": "32x32", "cpu24": "24x24, 1 factory", "cpu40": "40x40, 3 factories", "paper": "48x48", "tiny": "24x24"}
PAPER_CURVE = {  # trajectory separation, read off the paper's figure: thousands of steps, value
    "episodic_length": ((4, 155), (16, 220), (20, 370), (29, 560), (33, 720), (37, 920), (49, 1000), (102, 1000)),
    "ice_transferred": ((29, 2e3), (37, 9e3), (41, 13e3), (49, 18e3), (57, 24e3), (66, 32e3), (80, 37e3), (90, 41e3))
    + ((102, 44.5e3),),
}
COLOURS = {  # Okabe and Ito's, safe for the colour-blind; a variant has the same in every picture
    "#0072B2": "trajsep trajsep_paper_ppo:-- trajsep_entropy:-- difference:-- global_twelfth:-. trama dae_25_whole:-.",
    "#000000": "global global_paper_ppo:-- vdn_whole_end:-- vdn_whole:-. global_grad_10:--"
    " global_no_value_clip:-. trama_parent",
    "#E69F00": "ippo ippo_share:-- ippo_grad_10:-- ippo_no_value_clip:-."
    " groups_1:-- own_reward_25 closest_factory top_advantage_1_all_values random_4"
    " poster_norms heavies epochs_2 global_paper_rollout:-- trajsep_paper_rollout:-. dae_100:-."
    " trama_cave:-- trama_uniform",
    "#D55E00": "mappo mappo_share:-- mappo_grad_10:-- mappo_no_value_clip:-."
    " groups_2:-- quadrant top_advantage_1 random_2 global_paper_learning_rate:--"
    " trajsep_paper_learning_rate:-. gpae_50_whole_entropy:-. dae_50:-- trama_mountain:--",
    "#009E73": "global_critic groups_8:-- units_only own_reward_50 top_abs_advantage_1 random_8"
    " global_paper_entropy:-- coma coma_whole:-. difference_free:-- trama_oracle trama_mountain_lean:--",
    "#56B4E9": "groups_16:-- own_reward_75 closest_heavy top_return_1 random_16 gpae_95 gpae_50:--"
    " gpae_reuse_2_plain:-. gpae_50_whole:-. ippo_whole:-- ippo_whole_entropy:-.",
    "#CC79A7": "own_reward_0 groups_4:-- two_trajectories random_1 global_paper_no_symmetries:-- gpae_0"
    " gpae_reuse_2:-- gpae_steps_32:-. mappo_whole:-. mappo_entropy:--",
}
LINES = {
    (word := entry.partition(":"))[0]: (c, word[2] or "-") for c, names in COLOURS.items() for entry in names.split()
}


def paper_ice(name):
    found = re.search(r"[\d,]+", VARIANTS[name].paper_ice)
    return int(found.group().replace(",", "")) if found else None


def order(figure, names, scale="cpu"):
    """Claims of a figure's order: more ice with the first than with each, and with each than with the next."""
    names = names.split()
    pairs = [(names[0], name) for name in names[1:]] + list(pairwise(names[1:]))
    return [(figure, scale, "ice of the run", *pair, *map(paper_ice, pair)) for pair in pairs]


def fig10(scale):
    paper = {"length": (1000, 866.5, 391.1), "return": (87.51, 25.7, 6.33), "factory count": (4028.7, 1946.3, 1024.2)}
    for other, i in (("ippo_share", 1), ("mappo", 2)):  # each paid in the way that brings it more
        yield from order("baselines", f"trajsep {other}", scale)
        for name, values in paper.items():
            yield "baselines", scale, f"{name} at the end", "trajsep", other, values[0], values[i]


FIRST = "first full episode"
CLAIMS = {}  # figure, scale, measure, the first, which has more, and the second, the paper's value of each; each once
for claim in (
    *order("headline", "trajsep_paper_ppo global_paper_ppo", "paper"),
    ("headline", "paper", FIRST, "global_paper_ppo", "trajsep_paper_ppo", 102400, 28672),
    *order("baselines", "trajsep global", "paper"),
    ("baselines", "paper", FIRST, "global", "trajsep", 102400, 28672),
    *order("paper_ppo", "trajsep_paper_ppo global_paper_ppo"),
    *order("baselines", "trajsep global"),
    ("baselines", "cpu", FIRST, "global", "trajsep", 102400, 28672),
    *fig10("paper"),
    *fig10("cpu"),
    *order("fig8", "trajsep global_critic own_reward_0 mappo"),
    ("fig8", "cpu", FIRST, "global_critic", "trajsep", 40960, 28672),
    ("fig8", "cpu", FIRST, "own_reward_0", "trajsep", 53248, 28672),
    ("fig8", "cpu", FIRST, "mappo", "trajsep", 73728, 28672),
    *order("fig4", "trajsep groups_16 groups_8 groups_4 groups_2 groups_1"),
    *order("fig3", "trajsep units_only two_trajectories groups_1 global"),
    *order("fig9", "trajsep own_reward_75 own_reward_50 own_reward_25 own_reward_0"),
    *order("fig6", "trajsep top_advantage_1 top_abs_advantage_1 top_return_1 random_1"),
    *order("fig5", "trajsep closest_heavy closest_factory quadrant"),
    *order("fig7", "trajsep random_8 random_4 random_2 random_1"),
):
    CLAIMS.setdefault(claim[1:5], claim)


BRIEF = {"rivals": ["cpu"], "size": ["cpu24", "cpu", "cpu40"]}  # short tables in ablations/README.md


def verdict(found, paper_ratio):
    if found["low"] <= 1 <= found["high"]:
        return "not decided"
    if found["ratio"] > 1:
        return "contradicts"
    if paper_ratio is None:
        return "agrees in order only"
    return "agrees" if found["low"] <= paper_ratio <= found["high"] else "agrees in order only"


def number(value):
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:.1f}"


def short(ratio):
    return number(ratio) if abs(ratio) >= 10 or ratio == 0 else f"{ratio:.2g}" if abs(ratio) < 0.1 else f"{ratio:.2f}"


def with_interval(values, name):
    low, high = interval(values, *MEASURES[name][1:])
    return number(np.mean(values)) + ("" if np.isnan(low) else f" [{number(low)}, {number(high)}]")


def ratio_text(found):
    if np.isnan(found["ratio"]):  # of nothing
        return ""
    return f"{short(found['ratio'])} [{short(found['low'])}, {short(found['high'])}]".replace("inf", "no end")


def row(cells):
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def names_of(curves):
    """'1 2 3, random_16 1 2 3' for the runs of these names."""
    seeds = defaultdict(list)
    for name in curves:
        seeds[name.rpartition(" ")[0]].append(name.rpartition(" ")[2])
    return ", ".join(f"{other} {' '.join(numbers)}".strip() for other, numbers in seeds.items())


def first_text(curves):
    """The mean step of the first full episode, or each run's where one has none."""
    steps = [curve.first_full() for curve in curves.values()]
    if np.isnan(steps).any():
        return ", ".join("never" if np.isnan(step) else number(step) for step in steps)
    return with_interval(np.array(steps), "first full episode")


def reached(curves, share):
    """End of the first window in which this share of all runs' episodes lasted 1,000 steps."""
    full, episodes = np.sum([curve.sums("full_episodes") for curve in curves.values()], 0)
    windows = np.flatnonzero((episodes > 0) & (full >= share * episodes))
    return number((windows[0] + 1) * next(iter(curves.values())).window) if len(windows) else "never"


def notes(data):
    """Under a table: which runs count under another name, and which curves come from which version of training."""
    lines, curves_of, commits_of = [], defaultdict(lambda: defaultdict(list)), defaultdict(dict)
    for (scale, name), curves in data.items():
        if (scale, name) in SAME_RUNS:
            other, reason = SAME_RUNS[scale, name]
            lines.append(f"`{name}` on {MAPS[scale]} has the runs of `{other}` as well: {reason}.")
        settings = {seed: curve.made.get("settings", {}) for seed, curve in curves.items()}
        for flag in sorted(
            {flag for one in settings.values() for flag in one} - {"seed", "run_name", "resume", "bf16"}
        ):
            seeds_of = defaultdict(list)
            for seed, one in settings.items():
                if flag in one:
                    seeds_of[str(one[flag])].append(seed)
            if len(seeds_of) > 1:
                different = ", ".join(f"{value} for {names_of(seeds)}" for value, seeds in seeds_of.items())
                lines.append(f"**`{name}` on {MAPS[scale]} has runs of different settings**: {flag} is {different}.")
        for seed, curve in curves.items():
            commit, clean = curve.made.get("commit", "unknown"), curve.made.get("clean", True)
            same = clean and commit.split()[0] in SAME_TRAINING.split()
            version = "training that is the same to the digit" if same else f"training at commit {commit}"
            version += "" if clean else " with changes that were not committed"
            version += {True: ", in bfloat16", False: ", in float32"}.get(curve.made.get("bf16"), "")
            curves_of[version][f"{MAPS[scale]} {name}"].append(seed)
            commits_of[version] |= {commit: None} if same else {}
    versions = sorted(curves_of, key=lambda version: -sum(map(len, curves_of[version].values())))
    for version in versions:
        which = "; ".join(f"{name} {names_of(seeds)}" for name, seeds in curves_of[version].items())
        commits = f" (commits {', '.join(commits_of[version])})" if commits_of[version] else ""
        lines.append(f"{'Curves' if version == versions[0] else f'But {which}'}: {version}{commits}.")
    return "\n".join(lines) + "\n"


def tested(sides):
    """Of pairs of curves by key: ratio of the ice of the run and at the end, and p with Holm's correction for all."""
    parts = list(MEASURES)[:2]
    found = {key: [compare(*[measure(side, part) for side in pair]) for part in parts] for key, pair in sides.items()}
    found = {key: both for key, both in found.items() if all(both)}
    p_values = holm([of_run["p"] for of_run, _ in found.values()])
    return {key: (*both, p) for (key, both), p in zip(found.items(), p_values, strict=True)}


def table(variants, data, scale):
    """A figure's Markdown table; runs that count as the first variant's are compared with nothing."""
    head = "variant | runs | steps | ice of the run | IQM | ice at the end | first full episode | 10% full | 95% full"
    head += " | length at the end | return at the end | factory count at the end"
    head += " | ratio to the first: ice of the run | ratio to the first: ice at the end | p | d | paper's ice"
    columns, first = head.count("|") + 1, variants[0].name
    counted = [first, SAME_RUNS.get((scale, first), [""])[0]]
    found = tested({name: (data[first], data[name]) for name in data if name not in counted})
    lines = [f"| {head} |", "|---" * columns + "|"]
    for variant in variants:
        curves, name = data[variant.name], variant.name
        if not curves:
            lines.append(row([variant.label, "not run", *[""] * (columns - 3), variant.paper_ice]))
            continue
        ice, end = measure(curves, "ice of the run"), measure(curves, "ice at the end")
        cells = [variant.label, names_of(curves), number(next(iter(curves.values())).steps)]
        cells += [with_interval(ice, "ice of the run")]
        cells += [number(middle_mean(ice)) if len(ice) >= 5 else ""]
        cells += [with_interval(end, "ice at the end"), first_text(curves), reached(curves, 0.1), reached(curves, 0.95)]
        cells += [with_interval(measure(curves, part), part) for part in list(MEASURES)[3:]]
        if name in found:
            *ratios, p = found[name]
            d = ratios[0]["d"]
            cells += [*map(ratio_text, ratios), f"{p:.2g}", "" if np.isnan(d) else f"{d:.1f}"]
        else:
            cells += ["counted in the first" if name in counted[1:] else "", "", "", ""]
        lines.append(row([*cells, variant.paper_ice]))
    method = METHOD.replace("](", "](../../")  # a table lies two folders below the pages
    return f"{method}\n" + "\n".join(lines) + f"\n\n{notes({(scale, name): data[name] for name in data})}"


def claims(results):
    """Every claim of the paper that these curves can judge, in one Markdown table."""
    head = "picture | claim | paper | its ratio | first here | second here | ratio | ratio of ice at the end"
    head += " | p | d | verdict"
    lines, found, p_values, counts = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"], {}, {}, defaultdict(int)
    data = {(scale, name): None for _, scale, _, *names, _, _ in CLAIMS.values() for name in names}
    data = {key: runs_of(results, *key) for key in data}
    for key, (_, scale, part, first, second, *_) in CLAIMS.items():
        sides = data[scale, first], data[scale, second]
        pairs = [compare(*[measure(side, name) for side in sides]) for name in (part, "ice at the end")]
        found |= {key: pairs} if all(pairs) else {}
        if all(pairs) and not (part == FIRST and "never" in " ".join(map(first_text, sides))):
            p_values[key] = pairs[0]["p"]
    p_values = dict(zip(p_values, holm([*p_values.values()]), strict=True))
    for key, (figure, scale, part, first, second, *paper) in CLAIMS.items():
        ratio, picture = paper[1] / paper[0] if all(paper) else None, f"{scale}/{figure}.png"
        cells = [f"{MAPS[scale]}, {figure}"]
        if (results / picture).exists():
            cells = [f"[{cells[0]}](results/{picture})"]
        cells += [f"{part}: {VARIANTS[first].label} > {VARIANTS[second].label}"]
        cells += [" > ".join(f"{value:,}" if value else "?" for value in paper) if any(paper) else "order"]
        cells += [short(ratio) if ratio else ""]
        for name in (first, second):
            curves = data[scale, name]
            text = with_interval(measure(curves, part), part) if curves else "not run"
            cells.append(first_text(curves) if curves and part == FIRST else text)
        judged = "not run"
        if key in found:
            judged, (pair, end) = verdict(found[key][0], ratio), found[key]
            cells += [ratio_text(pair), ratio_text(end) if part == "ice of the run" else ""]
            cells += [f"{p_values[key]:.2g}" if key in p_values else "", f"{pair['d']:.1f}"]
            away = f" ({short(pair['ratio'])} for {short(ratio)})" if ratio and "only" in judged else ""
            cells += [f"**{judged}**{away}"]
        else:
            cells += ["", "", "", "", judged]
        counts[judged] += 1
        lines.append(row(cells))
    total = ", ".join(f"{judged} {count}" for judged, count in sorted(counts.items(), key=lambda item: -item[1]))
    firm = sum(p < 0.05 for p in p_values.values())
    summary = f"{len(CLAIMS)} claims: {total}. After Holm's correction {firm} of those run have p below 0.05.\n"
    return f"{summary}\n" + "\n".join(lines) + f"\n\n{VERDICTS}\n{METHOD}\n{notes(data)}"


def brief(results, figure, scales):
    """A figure's short table, of one scale or several: all beside the first variant there, who has most ice on top."""
    head = "variant | runs | ice of the run | its ratio | p | ice at the end | its ratio | first full episode"
    head += " (runs with one)"
    lines, (first, *others), missing = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"], FIGURES[figure], []
    data = {(scale, one.name): runs_of(results, scale, one.name) for scale in scales for one in (first, *others)}
    found = tested({key: (data[key[0], first.name], data[key]) for key in data if key[1] != first.name})
    for scale in scales:
        where, ran = f"{MAPS[scale]}: " * (len(scales) > 1), [one for one in others if data[scale, one.name]]
        ran = sorted(ran, key=lambda one: -measure(data[scale, one.name], "ice of the run").mean())
        for one in [first] * bool(data[scale, first.name]) + ran:
            curves = data[scale, one.name]
            run, end = [with_interval(measure(curves, part), part) for part in list(MEASURES)[:2]]
            *ratios, p = found.get((scale, one.name), (None, None, None))
            ratio, end_ratio = [ratio_text(pair) if pair else "" for pair in ratios]
            full = [step for curve in curves.values() if not np.isnan(step := curve.first_full())]
            full = f"{number(np.mean(full)) if full else 'never'} ({len(full)} of {len(curves)})"
            lines.append(
                row([where + one.label, len(curves), run, ratio, "" if p is None else f"{p:.2g}", end, end_ratio, full])
            )
        missing += [where + one.label for one in (first, *others) if not data[scale, one.name]]
    return "\n".join(lines) + "\n" + f"\nNot run: {'; '.join(missing)}.\n" * bool(missing)


def put_between(page, mark, text):
    """Replace what stands between the page's two marks of that name, if there is such a page."""
    if page.exists():
        head, begin, rest = page.read_text().partition(f"<!-- {mark} -->\n")
        _, end, tail = rest.partition(f"<!-- end of {mark} -->\n")
        page.write_text(f"{head}{begin}{text}{end}{tail}" if end else head + begin + rest)


def untrained(folder, metric):
    """Mean over the seeds of an untrained policy's evaluation (sampled actions); None without one."""
    values = []
    for path in sorted((folder / "untrained").glob("seed*_eval.txt")):
        rows = [[cell.strip() for cell in line.split("|")] for line in path.read_text().splitlines() if "|" in line]
        sampled = next((row for row in rows if row[1] == "sampled"), None)
        if sampled is None:
            sys.exit(f"{path} has no table of an evaluation, as those under results/cpu/untrained/ have: remove it.")
        values.append(float(sampled[rows[0].index(metric)].split()[0].replace(",", "")))
    return np.mean(values) if values else None


def plot(variants, data, path):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    unused = [line for line in ((colour, "-.") for colour in COLOURS) if line not in LINES.values()]
    titles = {"episodic_length": "episode length (steps)", "ice_transferred": "ice transferred per episode"}
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        own, top = iter(unused), 0
        for variant in variants:
            colour, style = LINES.get(variant.name) or next(own, ("grey", "-."))
            curves = list(data[variant.name].values())
            if not curves:  # the table says so
                continue
            label = f"{variant.label} ({len(curves)} run{'s' * (len(curves) > 1)})"
            values = np.array([curve.by_window(metric) for curve in curves])
            steps = (1 + np.arange(values.shape[1])) * curves[0].window
            axis.plot(steps, values.mean(0), style, color=colour, label=label)
            if len(curves) >= 5:
                limits = MEASURES["length at the end" if metric == "episodic_length" else "ice at the end"][1:]
                bounds = np.array([interval(column, *limits) for column in values.T])
                axis.fill_between(steps, *bounds.T, color=colour, alpha=0.15, linewidth=0)
            elif len(curves) > 1:
                axis.plot(steps, values.T, style, color=colour, alpha=0.35, linewidth=0.7)
            top = np.nanmax([top, *values.ravel()])
        if not top > 0:
            print(f"{path}: the {title} is 0 throughout, or no episode ended.", file=sys.stderr)
        if (level := untrained(path.parent, metric)) is not None:
            axis.axhline(level, color="grey", linestyle="--", linewidth=0.8, label="untrained policy")
        if path.parent.name == "paper":
            x, y = np.transpose(PAPER_CURVE[metric])
            axis.plot(1000 * x, y, color="grey", linestyle=":", label="the paper's trajectory separation, read off")
            top = max(top, *y)
        axis.set(xlabel="environment steps", ylabel=title, ylim=(0, 1.05 * top or None))
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = 4 if max(map(len, labels)) < 50 else 3
    figure.legend(handles, labels, loc="lower center", ncol=columns, fontsize=8 if len(labels) < 15 else 7)
    figure.tight_layout(rect=(0, max(0.1, 0.05 * -(-len(labels) // columns)), 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def report(results, scale, name, variants):
    """Write and print one table with its picture."""
    data = {variant.name: runs_of(results, scale, variant.name) for variant in variants}
    if not data[variants[0].name]:
        sys.exit(
            f"{results / scale / variants[0].name} holds no seedN.csv: start its runs with ablations/run.py first."
        )
    text = table(variants, data, scale)
    plot(variants, data, results / scale / f"{name}.png")
    (results / scale / f"{name}.md").write_text(text)
    print(text, end="")


def own_variant(folder):
    """A variant that run.py does not list, by the label in what was recorded beside its curves."""
    labels = [curve.made["label"] for curve in load(folder).values() if "label" in curve.made]
    if not folder.is_dir():
        sys.exit(f"There is no {folder}: start its runs with ablations/run.py --script first.")
    return Variant(folder.name, labels[0] if labels else folder.name, "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", nargs="?", choices=[*FIGURES, "claims", "all"])
    parser.add_argument("--compare", nargs="+", metavar="FOLDER", help="folders of results in place of a figure")
    parser.add_argument("--scale", choices=SCALES, help="default: cpu, or paper for the headline")
    parser.add_argument("--results", type=Path, default=ROOT / "ablations/results")
    args = parser.parse_args()
    scale = args.scale or ("paper" if args.figure == "headline" else "cpu")
    if (args.figure is None) == (args.compare is None):
        sys.exit("Name a figure, or folders of results with --compare.")
    if args.compare:
        if bad := [name for name in args.compare if Path(name).name != name]:
            sys.exit(f"--compare takes names of folders under {args.results / scale}, got {bad[0]}.")
        variants = [VARIANTS.get(name) or own_variant(args.results / scale / name) for name in args.compare]
        folder = args.results / scale
        for name in args.compare:
            if args.compare.count(name) > 1 or not any((folder / name).glob("seed*.csv")):
                sys.exit(f"--compare takes folders of {folder} that hold a seedN.csv, each once: not {name!r}.")
        return report(args.results, scale, ("compare_" + "_".join(args.compare))[:200], variants)
    made = [(scale, args.figure)] if args.figure in FIGURES else []
    if args.figure == "all":
        made = [(path.parent.name, path.stem) for path in sorted(args.results.glob("*/*.md")) if path.stem in FIGURES]
    for scale, figure in made:
        report(args.results, scale, figure, FIGURES[figure])
    if args.figure in ("claims", "all"):
        page, text = args.results.parent / "README.md", claims(args.results)
        put_between(page, "claims", text)
        for figure, scales in BRIEF.items():
            put_between(page, figure, brief(args.results, figure, scales))
        print(text, end="")


if __name__ == "__main__":
    main()
