"""The report of the ablations: statistics by hand, bad data, and the committed tables made anew."""

import csv
import json
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ablations"))
import curves  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402

import ppo_trajsep_lux  # noqa: E402

HEAD = [*curves.NEEDED, "charts/seconds"]


def write(path, ice, step=4096, episodes=2, full_from=99, **made):
    """A run with a row for each of `ice` (None: no episode ended), with full episodes from one row on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEAD)
        for i, value in enumerate(ice):
            full = float(i >= full_from)
            row = [0, "", "", "", "", ""] if value is None else [episodes, value, 500 + 500 * full, value, 2000, full]
            writer.writerow([step * (i + 1), *row, i])
    if made:
        path.with_suffix(".json").write_text(json.dumps(made))


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, flags)])
    report.main()


def rows(text):
    """The cells of a Markdown table, by the first cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines}


def test_the_area_under_the_curve_by_hand(tmp_path):
    write(tmp_path / "seed1.csv", [None, 10, None, None, 40, *[None] * 8], full_from=4)  # 13 windows
    curve = curves.Curve(tmp_path / "seed1.csv")
    expected = [0, 10, 20, 30, 40, *[40] * 8]  # 0 before the first, a line between, and as before after the last
    np.testing.assert_allclose(curve.by_window("ice_transferred"), expected)
    assert curve.by_window("episodic_length")[0] == 500  # but a length is not 0 before the first
    (area,) = curves.measure({1: curve}, "ice of the run")
    assert area == pytest.approx(sum(expected) / 13) and curve.first_full() == 5 * 4096
    assert curve.end("ice_transferred") == 40  # nothing ended in the last two windows: what was seen last


def test_windows_follow_the_length_of_the_run(tmp_path):
    for steps, window in ((53248, 4096), (102400, 4096), (2048, 2048 / 13)):
        write(tmp_path / "seed1.csv", range(steps // 64), step=64)
        curve = curves.Curve(tmp_path / "seed1.csv")
        assert curve.window == window and len(curve.by_window("ice_transferred")) == round(steps / window)
        end = [i for i in range(steps // 64) if 64 * (i + 1) > steps - 2 * window]
        assert curve.end("ice_transferred") == pytest.approx(np.mean(end))
    write(tmp_path / "seed1.csv", [5, 7], step=1024)  # rollouts longer than windows
    np.testing.assert_allclose(
        curves.Curve(tmp_path / "seed1.csv").by_window("ice_transferred")[[0, 6, 9, 12]], [0, 5, 6, 7]
    )


def test_intervals_by_hand():
    values = np.array([1.0, 2.0, 6.0])
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert curves.interval(values) == pytest.approx((3 - half, 3 + half))
    assert curves.interval(values, 0, 5) == (0, 5)  # never past what can be measured
    assert np.isnan(curves.interval(values[:1])).all() and curves.interval(np.full(6, 7.0)) == (7, 7)
    many = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    assert curves.interval(many) == pytest.approx(stats.t.interval(0.95, 4, many.mean(), stats.sem(many)))
    assert curves.middle_mean(many) == 3
    rng = np.random.default_rng(0)  # of five normal runs 95 in a hundred intervals hold the mean; of a bootstrap's 85
    held = [low < 12 < high for low, high in (curves.interval(rng.normal(12, 3, 5)) for _ in range(2000))]
    assert 0.935 < np.mean(held) < 0.965


def test_the_interval_of_a_ratio():
    first, second = np.array([10.0, 10.0, 10.0]), np.array([4.0, 5.0, 9.0])
    found = curves.compare(first, second)  # a first without spread: the second's own interval in tenths
    assert (found["low"], found["high"]) == pytest.approx(
        np.array(curves.interval(second)).clip(0) / 10, rel=0.01, abs=0.01
    )
    assert found["ratio"] == pytest.approx(0.6) and found["d"] == pytest.approx(4 / np.sqrt(np.var(second, ddof=1) / 2))
    rng = np.random.default_rng(1)
    decided = 0
    for _ in range(60):  # it spans 1 exactly where Welch's p is above 0.05
        first, second = rng.normal(10, 2, rng.integers(2, 7)), rng.normal(7, 3, rng.integers(2, 7))
        found, p = curves.compare(first, second), stats.ttest_ind(first, second, equal_var=False).pvalue
        assert found["p"] == pytest.approx(p)
        assert (found["low"] <= 1 <= found["high"]) == (p > 0.05), (first, second, found)
        decided += p < 0.05
    assert 5 < decided < 55
    assert curves.compare(np.array([0.0, 1.0, 9.0]), np.array([50.0, 60.0, 55.0]))["high"] == np.inf
    small, large = np.array([0.0, 12, 51]), np.array([2917.0, 3022, 2984, 4687])  # -400 times as likely as 164 times
    found = curves.compare(small, large)
    assert found["p"] < 0.05 and 1 < found["low"] < found["ratio"] < found["high"] == np.inf
    assert curves.compare(first[:1], second) is None
    same = curves.compare(np.ones(3), np.ones(3))
    assert (same["ratio"], same["low"], same["high"], same["p"]) == pytest.approx((1, 1, 1, 1), rel=1e-3)


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says():
    rng, held, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        found = curves.compare(rng.normal(10, 3, 3), rng.normal(5, 3, 3))
        held += found["low"] <= 0.5 <= found["high"]
    assert held / trials > 0.93


def test_holm_by_hand():
    assert curves.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert curves.holm([0.5, 0.9]) == pytest.approx([1, 1]) and len(curves.holm([])) == 0


@pytest.mark.parametrize(
    "low, ratio, high, paper, expected",
    [
        (0.2, 0.3, 0.5, 0.4, "agrees"),
        (0.2, 0.3, 0.5, 0.1, "agrees in order only"),
        (0.2, 0.3, 0.5, None, "agrees in order only"),
        (0.2, 0.9, 1.5, 0.9, "not decided"),
        (0.2, 100, np.inf, 0.9, "not decided"),
        (1.1, 1.5, 2, 0.9, "contradicts"),
    ],
)
def test_verdicts(low, ratio, high, paper, expected):
    assert report.verdict({"low": low, "ratio": ratio, "high": high}, paper) == expected


def test_a_table_by_hand(tmp_path, monkeypatch, capsys):
    for seed, ice in ((1, 20), (2, 30), (3, 40)):
        write(tmp_path / f"cpu/trajsep/seed{seed}.csv", [0] * 4 + [ice] * 9, full_from=4)
        write(tmp_path / f"cpu/random_16/seed{seed}.csv", [0] * 4 + [ice + 3] * 9, full_from=5)
    for seed in (1, 2):
        write(tmp_path / f"cpu/random_1/seed{seed}.csv", [seed] * 13, full_from=12 if seed == 1 else 99)
    (tmp_path / "cpu/untrained").mkdir()
    lines = [
        "model.pt",
        "| actions | episodic_length | ice_transferred |",
        "| greedy | 120.00 +- 4.00 | 7.00 +- 1 |",
        "| sampled | 130.00 +- 4.00 | 1,008.50 +- 1 |",
    ]
    (tmp_path / "cpu/untrained/seed1_eval.txt").write_text("\n".join(lines))
    assert report.untrained(tmp_path / "cpu", "ice_transferred") == 1008.5
    more = "\n".join(lines).replace("1,008.5", "1.5")
    (tmp_path / "cpu/untrained/seed2_eval.txt").write_text(more)
    assert report.untrained(tmp_path / "cpu", "ice_transferred") == 505
    call(monkeypatch, "fig7", "--results", tmp_path)
    text = capsys.readouterr().out
    assert text == (tmp_path / "cpu/fig7.md").read_text() and text.startswith(report.METHOD[:200])
    assert (tmp_path / "cpu/fig7.png").stat().st_size > 10_000
    found = rows(text)
    full = found["trajectory separation"]
    assert full["runs"] == "1 2 3, random_16 1 2 3" and full["ratio to the first: ice of the run"] == ""
    assert full["ice of the run"].startswith(f"{31.5 * 9 / 13:.1f} [") and full["IQM"] == f"{31.5 * 9 / 13:.1f}"
    assert full["ice at the end"].startswith("31.5 [") and full["10% full"] == "20,480"
    one, sixteen = found["1 at random"], found["16 at random"]
    assert (one["runs"], one["IQM"], one["95% full"], one["first full episode"]) == (
        "1 2",
        "",
        "never",
        "53,248, never",
    )
    assert sixteen["ratio to the first: ice of the run"] == "counted in the first" and sixteen["p"] == ""
    first = np.array([20, 30, 40, 23, 33, 43]) * 9 / 13
    expected = stats.ttest_ind(first, [1.0, 2.0], equal_var=False).pvalue  # the only one that is compared
    assert one["p"] == f"{expected:.2g}" and one["ratio to the first: ice of the run"].startswith("0.069 [")
    assert found["2 at random"]["runs"] == "not run"
    assert "has the runs of `random_16` as well: 16 samples are nearly always all" in text


def test_claims_by_hand(tmp_path, monkeypatch, capsys):
    ice = {
        "trajsep": (90, 100, 110),
        "global_critic": (66, 67, 68),
        "own_reward_0": (49, 50, 51),
        "mappo": (10, 62, 99),
    }
    for name, values in ice.items():
        for seed, value in enumerate(values):
            write(tmp_path / f"results/cpu/{name}/seed{seed}.csv", [value] * 13, full_from=2)
    results, page = tmp_path / "results", tmp_path / "README.md"
    page.write_text("# Results\n<!-- claims -->\nold\n<!-- end of claims -->\nmore\n")
    call(monkeypatch, "claims", "--results", results)
    text = capsys.readouterr().out
    assert page.read_text() == f"# Results\n<!-- claims -->\n{text}<!-- end of claims -->\nmore\n"
    assert report.METHOD in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    found = {
        tuple(line[1].removeprefix("ice of the run: ").split(" > ")): line for line in cells if "ice of" in line[1]
    }
    names = {name: run.VARIANTS[name].label for name in ice}
    critic = found[names["trajsep"], names["global_critic"]]
    assert critic[2:6] == ["44,472 > 30,687", "0.69", "100 [75.2, 125]", "67.0 [64.5, 69.5]"]
    assert critic[6].startswith("0.67 [0.5") and critic[-1] == "**agrees**"
    assert found[names["trajsep"], names["own_reward_0"]][-1] == "**agrees in order only** (0.50 for 0.22)"
    assert found[names["own_reward_0"], names["mappo"]][-1] == "**not decided**"
    assert found[names["trajsep"], "IPPO, equal shares"][-1] == "not run"
    headline = cells[2]
    assert headline[2:6] == ["44,472 > 3,066", "0.069", "not run", "not run"] and headline[-1] == "not run"
    tests = [line for line in cells[2:] if line[-1] != "not run"]
    p_values = [stats.ttest_ind(ice["trajsep"], ice["own_reward_0"], equal_var=False).pvalue, float(critic[8])]
    assert p_values[0] < p_values[1] and len(tests) > 5  # corrected for all of them
    assert sum(line[-1] == "not run" for line in cells) == int(text.split("not run ")[1].split(",")[0])
    write(results / "cpu/global/seed1.csv", [1] * 13)  # one run is too few to judge, but it is shown
    page.write_text("a page without marks")
    call(monkeypatch, "claims", "--results", results)
    assert page.read_text() == "a page without marks"
    assert "| 1.0 |" in capsys.readouterr().out


def test_short_tables_by_hand(tmp_path, monkeypatch):
    """Within a scale all are compared with its first, p is corrected for all scales, and the most ice is on top."""
    ice = {
        "cpu24/trajsep": (90, 100, 110),
        "cpu24/mappo": (49, 50, 51),
        "cpu24/coma_whole": (60,),
        "cpu40/trajsep": (900, 1000, 1100),
        "cpu40/mappo": (49, 50, 57),
    }
    for name, values in ice.items():
        for seed, value in enumerate(values):
            write(tmp_path / f"results/{name}/seed{seed}.csv", [value] * 13, full_from=2 if value > 49 else 99)
    text = report.brief(tmp_path / "results", "size", ["cpu24", "cpu40"])
    page = tmp_path / "README.md"
    page.write_text("<!-- size -->\nold\n<!-- end of size -->\n")
    call(monkeypatch, "claims", "--results", tmp_path / "results")
    assert page.read_text().startswith(f"<!-- size -->\n{text.splitlines()[0]}\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    labels = ["trajectory separation", run.VARIANTS["coma_whole"].label, run.VARIANTS["mappo"].label]
    small, large = (report.MAPS[scale] for scale in ("cpu24", "cpu40"))
    where = [f"{small}: {label}" for label in labels] + [f"{large}: {label}" for label in labels[::2]]
    assert [line[0] for line in cells[2:]] == where
    both = [(ice[f"{scale}/trajsep"], ice[f"{scale}/mappo"]) for scale in ("cpu24", "cpu40")]
    p_values = [stats.ttest_ind(*pair, equal_var=False).pvalue for pair in both]
    corrected = curves.holm(p_values)
    assert cells[4][1:4:2] == ["3", "0.50 [0.41, 0.66]"] and cells[4][4] == f"{corrected[0]:.2g}"
    assert cells[6][3].startswith("0.052 [") and cells[6][4] == f"{corrected[1]:.2g}" != f"{p_values[1]:.2g}"
    assert cells[3][1:] == ["1", "60.0", "", "", "60.0", "", "12,288 (1 of 1)"]
    assert [line[7] for line in cells[2:]] == [
        f"12,288 ({runs})" for runs in ("3 of 3", "1 of 1", "2 of 3", "3 of 3", "2 of 3")
    ]
    gpae = run.VARIANTS["gpae_50_whole_entropy"].label
    assert text.endswith(f"\nNot run: {small}: {gpae}; {large}: {gpae}; {large}: {labels[1]}.\n")


def test_when_a_share_of_the_episodes_is_full(tmp_path):
    """That share and no more is enough; and runs stand in the order of their seeds."""
    for seed in range(1, 11):  # one of ten from the third window on, all from the fourth
        write(tmp_path / f"seed{seed}.csv", [1] * 13, full_from=2 if seed == 10 else 3)
    found = curves.load(tmp_path)
    assert report.reached(found, 0.1) == "12,288" and report.reached(found, 0.95) == "16,384"
    assert list(found) == [str(seed) for seed in range(1, 11)]


def test_a_claim_about_runs_that_never_had_a_full_episode_has_no_p(tmp_path, monkeypatch, capsys):
    for seed in (1, 2, 3):
        write(tmp_path / f"cpu/trajsep/seed{seed}.csv", [1] * 13, full_from=seed)
        write(tmp_path / f"cpu/global/seed{seed}.csv", [1] * 13)
    call(monkeypatch, "claims", "--results", tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "never, never, never" in line]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[8] == "" and cells[6].startswith("0.23 [") and "agrees" in cells[-1]


def test_curves_of_different_versions_of_training_are_named(tmp_path, monkeypatch, capsys):
    for seed in (1, 2, 3):
        write(tmp_path / f"cpu/trajsep/seed{seed}.csv", [9] * 13, commit="ded624b", bf16=True)
    write(tmp_path / "cpu/trajsep/seed4.csv", [9] * 13, commit="b890e22", bf16=False, clean=True)
    write(tmp_path / "cpu/epochs_2/seed1.csv", [9] * 13, commit="b890e22", bf16=True, clean=False)
    write(tmp_path / "cpu/epochs_2/seed2.csv", [9] * 13, commit="abc1234", bf16=True, clean=True)
    call(monkeypatch, "epochs", "--results", tmp_path)
    notes = capsys.readouterr().out.splitlines()[-4:]
    assert notes == [
        "Curves: training that is the same to the digit, in bfloat16 (commits ded624b).",
        "But 32x32 trajsep 4: training that is the same to the digit, in float32 (commits b890e22).",
        "But 32x32 epochs_2 1: training at commit b890e22 with changes that were not committed, in bfloat16.",
        "But 32x32 epochs_2 2: training at commit abc1234, in bfloat16.",
    ]


def test_runs_of_different_settings_under_one_name_are_told(tmp_path, monkeypatch, capsys):
    write(tmp_path / "cpu/trajsep/seed1.csv", [9] * 13)  # recorded without settings
    for seed, rate in ((2, 0.1), (3, 0.1), (4, 0.2)):
        settings = {"seed": seed, "learning_rate": rate, "gamma": 0.99}
        write(tmp_path / f"cpu/trajsep/seed{seed}.csv", [9] * 13, settings=settings)
    call(monkeypatch, "epochs", "--results", tmp_path)
    told = "**`trajsep` on 32x32 has runs of different settings**: learning_rate is 0.1 for 2 3, 0.2 for 4.\n"
    out = capsys.readouterr().out
    assert told in out and out.count("different settings") == 1


def test_every_setting_but_a_runs_own_is_looked_at(tmp_path, monkeypatch, capsys):
    names = [field.name for field in fields(ppo_trajsep_lux.Args)]
    for seed in (1, 2):
        write(tmp_path / f"cpu/trajsep/seed{seed}.csv", [9] * 13, settings=dict.fromkeys(names, seed))
    call(monkeypatch, "epochs", "--results", tmp_path)
    told = re.findall(r"runs of different settings\*\*: (\w+) is", capsys.readouterr().out)
    assert told == sorted({*names} - {"seed", "run_name", "resume", "bf16"})


def test_a_variant_of_ones_own_is_compared_by_its_folder(tmp_path, monkeypatch, capsys):
    for seed in (1, 2):
        write(tmp_path / f"tiny/trajsep/seed{seed}.csv", [seed] * 32, step=64)
        write(tmp_path / f"tiny/mine/seed{seed}.csv", [3 * seed] * 32, step=64, label="my own")
    call(monkeypatch, "--compare", "trajsep", "mine", "--scale", "tiny", "--results", tmp_path)
    found = rows(capsys.readouterr().out)
    assert found["my own"]["ratio to the first: ice of the run"].startswith("3.00 [")
    assert (tmp_path / "tiny/compare_trajsep_mine.md").exists() and (
        tmp_path / "tiny/compare_trajsep_mine.png"
    ).exists()
    with pytest.raises(SystemExit, match="There is no .*nowhere"):
        call(monkeypatch, "--compare", "trajsep", "nowhere", "--scale", "tiny", "--results", tmp_path)
    for names in (("trajsep", "mappo"), ("trajsep", "trajsep"), ("trajsep", ".."), ("trajsep", "")):
        with pytest.raises(SystemExit, match="that hold a seedN.csv, each once: not"):
            call(monkeypatch, "--compare", *names, "--scale", "tiny", "--results", tmp_path)
    with pytest.raises(SystemExit, match="Name a figure, or folders"):
        call(monkeypatch, "--results", tmp_path)
    with pytest.raises(SystemExit, match="--compare takes names of folders under .*, got ../cpu/mine"):
        call(monkeypatch, "--compare", "trajsep", "../cpu/mine", "--scale", "tiny", "--results", tmp_path)
    (tmp_path / "tiny/untrained").mkdir()
    (tmp_path / "tiny/untrained/seed1_eval.txt").write_text("episodic_length  136.0 +- 2\n")
    with pytest.raises(SystemExit, match="seed1_eval.txt has no table of an evaluation"):
        call(monkeypatch, "--compare", "trajsep", "mine", "--scale", "tiny", "--results", tmp_path)


def test_cells_hold_no_bar_and_a_ratio_of_nothing_is_blank():
    assert report.row(["a|b", 1]) == "| a\\|b | 1 |"
    assert report.ratio_text(curves.compare(np.zeros(2), np.zeros(2))) == ""


def test_report_without_runs_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="trajsep holds no seedN.csv: start its runs with ablations/run.py first"):
        call(monkeypatch, "baselines", "--results", tmp_path)


GOOD = ",".join(HEAD) + "\n4096,2,1,500,9,2000,0,3.5\n8192,0,,,,,,7\n12288,1,1,500,9,2000,0,9\n"


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        (GOOD, "", "has 0 rows below its header"),
        (GOOD[GOOD.index("8192") :], "", "has 1 rows below its header"),
        ("charts/factory_count", "charts/factories", "line 1: there is no column charts/factory_count"),
        (",2000,0,9\n", ",20", "line 4 has 6 fields in place of 8"),
        ("8192,0,,,,,,7", "", "line 3 has 0 fields in place of 8"),
        ("500,9", "500,nine", "line 2: 'nine' in column charts/ice_transferred is not a number"),
        ("8192,", "nan,", "line 3: global_step nan is no step after the line before"),
        ("8192,", "inf,", "line 3: global_step inf is no step"),
        ("8192,", ",", "line 3: global_step nan is no step"),
        ("12288,", "8192,", "line 4: global_step 8192.0 is no step after the line before"),
        ("4096,2,1,500,9", "4096,2,1,500,", "line 2: episodes ended, but"),
        ("4096,2,1,500,9", "4096,2,1,500,nan", "line 2: episodes ended, but"),
        ("8192,0", "8192,", "line 3: episodes ended, but"),
        ("500", "5\xff0", "is not UTF-8 text"),
    ],
)
def test_bad_data_is_named_by_file_and_line(tmp_path, old, new, sentence):
    assert old in GOOD
    path = tmp_path / "seed1.csv"
    path.write_bytes(GOOD.encode())
    assert curves.load(tmp_path)["1"].steps == 12288
    path.write_bytes(GOOD.replace(old, new, 1).encode("latin-1"))
    with pytest.raises(SystemExit) as error:
        curves.load(tmp_path)
    assert str(path) in str(error.value) and sentence in str(error.value)


def test_files_that_are_no_finished_runs_are_refused(tmp_path):
    write(tmp_path / "a/seed1.csv", [1] * 13)
    write(tmp_path / "a/seed2.csv", [1] * 12)
    with pytest.raises(SystemExit, match="a/seed2.csv ends at step 49,152 of 53,248: the run is not finished"):
        curves.load(tmp_path / "a")
    write(tmp_path / "b/seed1.csv", [1] * 12, steps=53248)  # alone, but it is known how long it should be
    with pytest.raises(SystemExit, match="b/seed1.csv ends at step 49,152 of 53,248"):
        curves.load(tmp_path / "b")
    write(tmp_path / "c/seed1 (copy).csv", [1] * 13)
    with pytest.raises(SystemExit, match=r"seed1 \(copy\).csv is no seedN.csv"):
        curves.load(tmp_path / "c")
    for text in ("{", "[]", '{"steps": "many"}'):
        write(tmp_path / "d/seed1.csv", [1] * 13)
        (tmp_path / "d/seed1.json").write_text(text)
        with pytest.raises(SystemExit, match="d/seed1.json is not what run.py writes"):
            curves.load(tmp_path / "d")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that report.py draws, left open."""
    monkeypatch.setattr(report.plt, "close", lambda figure: None)
    yield report.plt
    monkeypatch.undo()
    report.plt.close("all")


def test_pictures(tmp_path, monkeypatch, drawn, capsys):
    for seed in range(1, 7):  # the mean is 917 with an interval that would pass 1,000
        write(tmp_path / f"paper/trajsep/seed{seed}.csv", [seed] * 25, full_from=0 if seed > 1 else 99)
    for seed in (1, 2):
        write(tmp_path / f"paper/global/seed{seed}.csv", [seed] * 25)
    call(monkeypatch, "baselines", "--scale", "paper", "--results", tmp_path)
    length, ice = drawn.gcf().axes
    (band,) = length.collections  # of the six runs; the two are drawn one by one
    top = max(path.vertices[:, 1].max() for path in band.get_paths())
    assert 917 < top <= 1000 and min(path.vertices[:, 1].min() for path in band.get_paths()) < 917
    assert len([line for line in length.lines if line.get_color() == "#000000"]) == 3
    (paper,) = [line for line in ice.lines if line.get_linestyle() == ":"]
    assert list(zip(paper.get_xdata(), paper.get_ydata(), strict=True))[-1] == (102000, 44500)
    (line,) = [line for line in ice.lines if line.get_label() == "trajectory separation (6 runs)"]
    assert line.get_color() == "#0072B2" and list(line.get_xdata()[:2]) == [4096, 8192]  # where a window ends
    (mean,) = [line for line in length.lines if line.get_label() == "trajectory separation (6 runs)"]
    assert mean.get_ydata()[0] == pytest.approx((500 + 5 * 1000) / 6)  # not the median
    shutil.copytree(tmp_path / "paper", tmp_path / "cpu")
    call(monkeypatch, "baselines", "--results", tmp_path)
    assert ":" not in {line.get_linestyle() for line in drawn.gcf().axes[1].lines}
    assert "or no episode ended" not in capsys.readouterr().err
    write(tmp_path / "tiny/trajsep/seed1.csv", [None] * 13)
    call(monkeypatch, "baselines", "--scale", "tiny", "--results", tmp_path)
    assert "the episode length (steps) is 0 throughout, or no episode ended" in capsys.readouterr().err


def test_every_variant_has_a_line_of_its_own_in_its_pictures():
    assert set(report.LINES) == set(run.VARIANTS)
    for figure, variants in run.FIGURES.items():
        assert len({report.LINES[variant.name] for variant in variants}) == len(variants), figure
    assert ":" not in {style for _, style in report.LINES.values()}  # the paper's


def test_claims_are_about_variants_and_the_papers_numbers():
    assert {name for claim in report.CLAIMS.values() for name in claim[3:5]} <= set(run.VARIANTS)
    assert all(figure in run.FIGURES and scale in run.SCALES for figure, scale, *_ in report.CLAIMS.values())
    assert all(measure in curves.MEASURES for _, _, measure, *_ in report.CLAIMS.values())
    assert report.CLAIMS["cpu", "ice of the run", "trajsep", "groups_2"][5:] == (44472, 14388)
    for *_, first, second in report.CLAIMS.values():  # each is told so that the paper's first has more
        assert not (first and second) or first > second


COMMITTED = [path for path in sorted((ROOT / "ablations/results").glob("*/*.md")) if path.stem in run.FIGURES]
COMMITTED.append(ROOT / "ablations/README.md")  # with the claims


@pytest.fixture(scope="module")
def made_anew(tmp_path_factory):
    """A copy of the results, with all tables made anew there from the curves."""
    results = tmp_path_factory.mktemp("anew") / "results"
    shutil.copytree(ROOT / "ablations/results", results, ignore=shutil.ignore_patterns("earlier"))
    shutil.copy(ROOT / "ablations/README.md", results.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot", lambda variants, data, path: None)  # slow, and no text to compare
        call(patch, "all", "--results", results)
    return results


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_tables_are_those_of_the_committed_curves(path, made_anew):
    """Made anew from the CSV files they are the same, and a page beside run.py shows them or says where they are."""
    assert (made_anew.parent / path.relative_to(ROOT / "ablations")).read_text() == path.read_text()
    if path.stem != "README":
        pages = "".join(page.read_text() for page in (ROOT / "ablations").glob("*.md"))
        assert path.read_text() in pages or f"({path.relative_to(ROOT / 'ablations')})" in pages


PAGES = [path for path in ROOT.glob("**/*.md") if not {*path.relative_to(ROOT).parts} & {".venv", "runs"}]


def anchors(page):
    """What a link into a page may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub("```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub("```.*?```", "", page.read_text(), flags=re.S))
    for link in links:
        if not re.match("https?:", link):
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_committed_curve_tells_what_made_it():
    looked_at = 0
    for name, variant in run.VARIANTS.items():
        for scale in ("cpu", "cpu24", "cpu40", "paper"):
            for curve in curves.load(ROOT / "ablations/results" / scale / name).values():
                looked_at += 1
                assert {"command", "commit", "processor", "bf16", "torch", "seconds", "steps"} <= set(curve.made)
                assert curve.made["steps"] == curve.steps and curve.made["label"] == variant.label, curve.path
                assert curve.made["seconds"] == pytest.approx(curve.columns["charts/seconds"][-1], abs=0.1)
    assert looked_at > 100
