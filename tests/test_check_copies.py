"""The copies tool on broken copies: it reports the file and the line, shows the difference, and repairs it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from check_copies import Script, family  # noqa: E402


@pytest.fixture
def tree(tmp_path):
    for name in ("ppo_trajsep_lux.py", "ippo_lux.py", "mappo_lux.py", "ppo_global_lux.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def check(tree, *flags):
    command = [sys.executable, str(ROOT / "tests/check_copies.py"), "--root", str(tree), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def line_of(path, text):
    return path.read_text()[: path.read_text().index(text)].count("\n") + 1


def test_the_repository_is_in_order():
    done = check(ROOT)
    assert done.returncode == 0, done.stderr


def test_the_readme_says_how_many_lines_each_script_changes():
    counts = dict(re.findall(r"(\S+): (\d+) lines added", check(ROOT, "--stat").stdout))
    said = dict(re.findall(r"^\| `(\S+\.py)`.*\| (\d+) \|$", (ROOT / "README.md").read_text(), re.M))
    assert len(counts) == 8 and said == counts


def test_every_line_belongs_to_exactly_one_unit():
    for script in family(ROOT).values():
        kept = [line for i, line in enumerate(script.source.splitlines(keepends=True)) if i not in script.header]
        assert [line for unit in script.units.values() for line in unit.lines] == kept
        names = list(script.units)
        for name in ("import csv", "Args.gamma", "LuxEnv.step", "compute_gae", "main: update", "comment: Settings"):
            assert name in names


@pytest.mark.parametrize(
    "old, new, unit",
    [
        ("    lastgaelam = torch.zeros_like(rewards[0])\n", "    lastgaelam = rewards[0] * 0\n", "compute_gae"),
        ("    gamma: float = 0.99\n", "    gamma: float = 0.98\n", "Args.gamma"),
        ('"""the discount factor gamma"""', '"""the discount factor"""', "Args.gamma"),
        ("import random\n", "import random  # for nothing\n", "import random"),
        ("# ---- placement\n", "# ---- placing\n", "comment: ---- placement"),
        ("                optimizer.zero_grad()\n", "                agent.zero_grad()\n", None),  # in a marked section
        ("        update_end = time.time()\n", "        update_end = 0\n", "main: logging"),
        ("    def power_iteration(self):", "    def power_iteration(self, twice=False):", "Agent.power_iteration"),
        ("PLAYERS = (", "PLAYERS  = (", "PLAYERS"),
    ],
)
def test_a_broken_copy_is_reported_and_repaired(tree, old, new, unit):
    good = (tree / "mappo_lux.py").read_text()
    edit(tree / "mappo_lux.py", old, new)
    done = check(tree)
    if unit is None:
        assert done.returncode == 0  # a marked unit is the variant's own
        return
    assert done.returncode != 0 and "ippo_lux.py:1" not in done.stderr
    if unit == "comment: ---- placement":  # a renamed unit: one too many and one too few
        assert "comment: ---- placing: ppo_trajsep_lux has no such unit" in done.stderr
        assert f"lacks {unit}" in done.stderr
        return
    line = Script(tree / "mappo_lux.py").units[unit].line
    assert f"mappo_lux.py:{line}: {unit}: differs without a mark" in done.stderr
    assert any(row in f"+{new}" or new in row for row in done.stderr.splitlines() if row[:1] == "+" and row[:2] != "++")
    assert check(tree, "--fix").returncode == 0
    assert (tree / "mappo_lux.py").read_text() == good
    assert check(tree).returncode == 0


def test_a_fix_in_the_original_reaches_every_copy(tree):
    edit(tree / "ppo_trajsep_lux.py", "the discount factor gamma", "how much a reward is worth a step later")
    edit(tree / "ppo_trajsep_lux.py", "def masked_mean(", "def helper():\n    return 1\n\n\ndef masked_mean(")
    done = check(tree)
    assert done.returncode != 0 and "lacks helper" in done.stderr and "Args.gamma" in done.stderr
    done = check(tree, "--fix")
    assert done.returncode == 0, done.stderr
    for name in ("ippo_lux.py", "mappo_lux.py", "ppo_global_lux.py"):
        text = (tree / name).read_text()
        assert "how much a reward is worth a step later" in text and "def helper()" in text
        assert text.index("def helper()") < text.index("def masked_mean(")
        assert Script(tree / name).units["group_index"].marks  # the variant's own stays


def test_marks_are_checked(tree):
    path = tree / "ippo_lux.py"
    good = path.read_text()
    edit(path, "def compute_gae(", "# Differs from ppo_trajsep_lux: no reason\ndef compute_gae(")
    assert "compute_gae: marked as different, but it is the same" in check(tree).stderr
    path.write_text(good)
    edit(path, "def compute_gae(", "def more():\n    return 1\n\n\ndef compute_gae(")
    assert "ppo_trajsep_lux has no such unit" in check(tree).stderr
    assert "has no such unit" in check(tree, "--fix").stderr and "def more(" in path.read_text()  # nothing is lost
    edit(path, "def more(", "# Added to ppo_trajsep_lux: for the test\ndef more(")
    assert check(tree).returncode == 0
    assert check(tree, "--prune").returncode == 0 and "def more(" in path.read_text()
    edit(path, "# Added to ppo_trajsep_lux: for the test\n", "")
    assert check(tree, "--prune").returncode == 0 and path.read_text() == good
    path.write_text(good)
    edit(path, "# Removed from ppo_trajsep_lux: Args.num_groups\n", "")
    assert "lacks Args.num_groups" in check(tree).stderr
    path.write_text(good)
    edit(path, "Args.num_groups\n", "Args.num_groups, Args.gamma\n")
    assert "'# Removed from ppo_trajsep_lux: Args.gamma' is stale" in check(tree).stderr
    path.write_text(good)
    edit(path, "# Parent: ppo_trajsep_lux.py\n", "")
    assert "names no parent" in check(tree).stderr
    path.write_text(good)
    edit(path, "# Parent: ppo_trajsep_lux.py\n", "# Parent: nobody_lux.py\n")
    assert "nobody_lux.py does not exist" in check(tree).stderr


def test_imports_are_checked(tree):
    edit(tree / "ppo_trajsep_lux.py", "import random\n", "import random\nimport pandas\n")
    check(tree, "--fix")
    assert (
        f"ppo_trajsep_lux.py:{line_of(tree / 'ppo_trajsep_lux.py', 'import pandas')}: imports pandas"
        in check(tree).stderr
    )
    edit(tree / "ppo_trajsep_lux.py", "import pandas\n", "from ippo_lux import Agent\n")
    assert "imports ippo_lux" in check(tree, "--fix").stderr


def test_stat_counts_the_lines_of_a_diff(tree):
    before = check(tree, "--stat").stdout
    assert "mappo_lux.py: " in before
    count = {line.split(":")[0]: int(line.split()[1]) for line in before.splitlines()}
    assert all(0 < n <= 60 for n in count.values()) and len(count) == 3
    edit(tree / "mappo_lux.py", "    return torch.arange(", "    unit_id = unit_id\n    return torch.arange(")
    after = {line.split(":")[0]: int(line.split()[1]) for line in check(tree, "--stat").stdout.splitlines()}
    assert after == {**count, "mappo_lux.py": count["mappo_lux.py"] + 1}
    edit(tree / "mappo_lux.py", '"""MAPPO', '"""\nMAPPO')  # the docstring does not count
    assert {line.split(":")[0]: int(line.split()[1]) for line in check(tree, "--stat").stdout.splitlines()} == after
