"""The copies tool on small families of scripts: what it reports, what it mends, and what it must not touch."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from check_copies import Script, family, fix  # noqa: E402

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
ORIGINAL = '''"""The original."""

import csv
import random
from dataclasses import dataclass

# ==========
# Settings
# ==========


@dataclass
class Args:
    gamma: float = 0.99
    """the discount factor"""
    num_groups: int = 0
    """how many groups"""
    seed: int = 1
    """the seed"""


# ==========
# Trajectories
# ==========

PLAYERS = ("player_0", "player_1")

# ---- groups


def group_index(unit_id, num_groups):
    return unit_id % num_groups


def compute_gae(rewards, gamma):
    """The advantages."""
    last = rewards[0] * 0
    return last + gamma


class Agent:
    """The network."""

    def __init__(self):
        self.size = 3

    def get_value(self, obs):
        return obs + self.size


if __name__ == "__main__":
    args = Args()
    # ---- rollout
    rows = list(csv.reader([]))
    random.seed(args.seed)
    # ---- update
    index = group_index(7, args.num_groups)
    print(compute_gae([1.0], args.gamma), index, rows)
'''
IPPO = [
    (
        "    def get_value(self, obs):\n",
        "    # Differs from ppo_trajsep_lux: local\n    def get_value(self, obs, near):\n",
    ),
]
MAPPO = [
    ('    num_groups: int = 0\n    """how many groups"""\n', ""),
    ("def group_index(unit_id, num_groups):", "# Differs from ppo_trajsep_lux: alone\ndef group_index(unit_id):"),
    ("    return unit_id % num_groups\n", "    return unit_id\n"),
    ("    # ---- update\n", "    # ---- update\n    # Differs from ppo_trajsep_lux: alone\n"),
    ("(7, args.num_groups)", "(7)"),
    ("\n\nif __n", "\n    # Added to ppo_trajsep_lux: value\n    def everywhere(self):\n        return 2\n\n\nif __n"),
]
MIXED = [("    last = rewards[0] * 0\n", "    # Differs from mappo_lux: mixed\n    last = 1.0\n")]


def variant(parent, text, edits, *removed):
    """A parent's text as a variant: its own docstring, the header, no marks of the parent's, and the edits."""
    text = re.sub(r"^ *# (Differs|Added|Removed|Parent).*\n", "", text, flags=re.M)
    text = re.sub(r'^"""[^"]*"""\n+', "", text)
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    header = "".join(f"# Removed from {Path(parent).stem}: {name}\n" for name in removed)
    return f'"""A variant."""\n\n# Parent: {parent}\n{header}\n{text}'


def git(tree, *command):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *command], cwd=tree, check=True, capture_output=True, env=ENVIRONMENT)


def commit(tree):
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "state")


@pytest.fixture
def bare(tmp_path):
    """The original, two variants, and a variant of a variant; no git."""
    tree = tmp_path / "project"
    (tree / "ablations").mkdir(parents=True)
    (tree / "requirements.txt").write_text("numpy==2.2.6\n./packages/luxai_s2_fast\n")
    (tree / "ppo_trajsep_lux.py").write_text(ORIGINAL)
    (tree / "ippo_lux.py").write_text(variant("ppo_trajsep_lux.py", ORIGINAL, IPPO))
    mappo = variant("ppo_trajsep_lux.py", ORIGINAL, MAPPO, "Args.num_groups")
    (tree / "mappo_lux.py").write_text(mappo)
    (tree / "ablations/mixed_lux.py").write_text(variant("mappo_lux.py", mappo, MIXED))
    return tree


@pytest.fixture
def tree(bare):
    """The same, committed."""
    git(bare, "init", "-q")
    commit(bare)
    return bare


def check(tree, *flags, **environment):
    command = [sys.executable, str(ROOT / "tests/check_copies.py"), "--root", str(tree), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


def line_of(path, text):
    return path.read_text()[: path.read_text().index(text)].count("\n") + 1


def texts(tree):
    return {path.name: path.read_text() for path in tree.rglob("*.py")}


# ---- the repository itself


def test_the_repository_is_in_order():
    done = check(ROOT)
    assert done.returncode == 0, done.stderr


def test_the_readme_says_how_many_lines_each_script_changes():
    counts = dict(re.findall(r"(\S+): (\d+) lines added", check(ROOT, "--stat").stdout))
    said = dict(re.findall(r"^\| `(\S+\.py)`.*\| (\d+) \|$", (ROOT / "README.md").read_text(), re.M))
    assert said and said == {name: counts.get(name) for name in said}


def test_every_line_belongs_to_exactly_one_unit():
    for script in family(ROOT).values():
        kept = [line for i, line in enumerate(script.source.splitlines(keepends=True)) if i not in script.header]
        assert [line for unit in script.units.values() for _, line in unit.rows] == kept


# ---- units and marks


def test_a_script_falls_into_units(tree):
    names = list(Script(tree / "ppo_trajsep_lux.py").units)
    assert names == [
        *("module docstring", "import csv", "import random", "from dataclasses import", "comment: Settings"),
        *("class Args", "Args.gamma", "Args.num_groups", "Args.seed", "comment: Trajectories", "PLAYERS"),
        *("comment: ---- groups", "group_index", "compute_gae", "class Agent", "Agent.__init__", "Agent.get_value"),
        *("main", "main: rollout", "main: update"),
    ]
    assert check(tree).returncode == 0 and check(tree).stdout == ""


def test_of_several_names_the_first_is_the_units_so_that_one_can_be_added(tree):
    old = "STAY, MOVE = range(2)\nSTATS = []\nSTATS += [1]\n"
    new = old.replace("MOVE =", "MOVE, GIVE =").replace("range(2)", "range(3)").replace("[1]", "[1, 2]")
    for path in tree.rglob("*_lux.py"):
        edit(path, "PLAYERS = (", old + "PLAYERS = (")
    assert {"STAY", "STATS", "STATS +="} < {*Script(tree / "ippo_lux.py").units} and check(tree).returncode == 0
    edit(tree / "ippo_lux.py", old, new)
    assert "ippo_lux.py:" in check(tree).stderr
    mark = "# Differs from ppo_trajsep_lux: gifts\n"
    edit(tree / "ippo_lux.py", "STAY,", f"{mark}STAY,")
    edit(tree / "ippo_lux.py", "STATS +=", f"{mark}STATS +=")
    before = texts(tree)
    assert check(tree).returncode == 0 and check(tree, "--fix").returncode == 0 and texts(tree) == before


EDITS = [  # in mappo_lux.py: what, to what, in which unit
    ("    last = rewards[0] * 0\n", "    last = rewards[1] * 0\n", "compute_gae"),
    ("    gamma: float = 0.99\n", "    gamma: float = 0.98\n", "Args.gamma"),
    ('"""the discount factor"""', '"""the discount"""', "Args.gamma"),
    ("import random\n", "import random  # for nothing\n", "import random"),
    ("    random.seed(args.seed)\n", "    random.seed(1 + args.seed)\n", "main: rollout"),
    ("    def __init__(self):", "    def __init__(self, size=3):", "Agent.__init__"),
    ("PLAYERS = (", "PLAYERS  = (", "PLAYERS"),
]


@pytest.mark.parametrize("old, new, unit", EDITS)
def test_an_edit_is_reported_and_stays_until_it_is_marked_or_given_up(tree, old, new, unit):
    path = tree / "mappo_lux.py"
    good = path.read_text()
    edit(path, old, new)
    edited = path.read_text()
    line = Script(path).units[unit].line
    assert edited.splitlines()[line - 1].strip()  # points at code, not at a blank line above it
    for flags in ((), ("--fix",)):
        done = check(tree, *flags)
        said = f"mappo_lux.py:{line}: {unit}: differs without a mark: say '# Differs from ppo_trajsep_lux: <reason>'"
        assert done.returncode != 0 and said in done.stderr and "ippo_lux.py:" not in done.stderr
        assert f"--overwrite mappo_lux.py '{unit}'".replace("'", "'" * (" " in unit)) in done.stderr
        rows = done.stderr.splitlines()
        assert any(row[0] == "+" and (row[1:] in new or new in row[1:] + "\n") for row in rows if len(row) > 1)
        assert path.read_text() == edited
    done = check(tree, "--overwrite", "mappo_lux.py", unit)
    assert done.returncode == 0 and path.read_text() == good, done.stderr
    assert f"mappo_lux.py:{line}: {unit}: replaced" in done.stdout
    indent = " " * (len(new) - len(new.lstrip()))
    if old[0] == " " and unit != "compute_gae":  # which the variant of this variant has marked
        edit(path, old, f"{indent}# Differs from ppo_trajsep_lux: for the test\n{new}")
        done = check(tree)  # the variant of this variant lacks the edit, and may have it
        assert "mappo_lux.py:" not in done.stderr.replace("--- mappo_lux.py", "") and "--fix renews it" in done.stderr
        assert check(tree, "--fix").returncode == 0 and new in (tree / "ablations/mixed_lux.py").read_text()


def test_no_edit_is_lost_wherever_it_is(tree):
    parent, lines = Script(tree / "ppo_trajsep_lux.py"), (tree / "mappo_lux.py").read_text().splitlines(keepends=True)
    path, tried = tree / "trial_lux.py", 0
    for i, line in enumerate(lines):
        indent = line[: len(line) - len(line.lstrip())]
        for mine in (f"{line}{indent}mine = 1\n", f"{line}\n{indent}# mine\n\n", line.replace("\n", "  # mine\n"), ""):
            changed = "".join([*lines[:i], mine, *lines[i + 1 :]])
            try:
                compile(changed, "trial", "exec")
            except SyntaxError:
                continue
            path.write_text(changed)
            fix(Script(path), parent, [])
            tried += 1
            after = path.read_text().splitlines()
            kept = Counter(line for line in changed.splitlines() if line.strip())
            assert kept <= Counter(after), (i, mine)
    assert tried > 100


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("def compute_gae(", "# Differs from ppo_trajsep_lux: x\ndef compute_gae(", "compute_gae: marked as different"),
        ("    # Differs from ppo_trajsep_lux: alone\n", "    # Added to ppo_trajsep_lux: x\n", "must say '# Differs"),
        (
            "# Added to ppo_trajsep_lux: value",
            "# Differs from ppo_trajsep_lux: value",
            "must say '# Added to ppo_trajsep",
        ),
        (
            "        return 2\n",
            "        # Differs from ppo_trajsep_lux: x\n        return 2\n",
            "Agent.everywhere: each of its marks must say '# Added to",
        ),
        (
            "    return unit_id\n",
            "    # Differs from ippo_lux: x\n    return unit_id\n",
            "group_index: each of its marks must say '# Differs from ppo_trajsep_lux: <reason>'",
        ),
        (
            "# Differs from ppo_trajsep_lux: alone\ndef",
            "# Differs from ppo_trajsep_lux:\ndef",
            "differs without a mark",
        ),
        ("# Removed from ppo_trajsep_lux: Args.num_groups\n", "", "Args.num_groups: lacks what ppo_trajsep_lux.py:16"),
        (": Args.num_groups\n", ": Args.num_groups, Args.gamma\n", "Args.gamma' is stale: mappo_lux.py has it"),
        (": Args.num_groups\n", ": Args.num_groups, old\n", "old' is stale: ppo_trajsep_lux.py has no such unit"),
        ("# Removed from ppo_trajsep_lux", "# Removed from ippo_lux", "stale: the parent is ppo_trajsep_lux"),
    ],
)
def test_marks_are_checked(tree, old, new, said):
    path = tree / "mappo_lux.py"
    edit(path, old, new)
    written = path.read_text()
    for flags in ((), ("--fix",)):
        done = check(tree, *flags)
        assert done.returncode != 0 and said in done.stderr, done.stderr
        assert re.search(r"^mappo_lux\.py:\d+: ", done.stderr, re.M)
    assert path.read_text() == written  # also of a unit that is missing without '# Removed'


def test_a_unit_may_have_several_marks(tree):
    edit(
        tree / "mappo_lux.py",
        "    return unit_id\n",
        "    # Differs from ppo_trajsep_lux: no modulo\n    return unit_id\n",
    )
    assert check(tree).returncode == 0


def test_the_marks_of_a_copied_variant_are_dropped(tree):
    """`cp mappo_lux.py ablations/mine_lux.py`, and the new parent named: the old marks are not this copy's."""
    mine = tree / "ablations/mine_lux.py"
    mine.write_text((tree / "mappo_lux.py").read_text())
    edit(
        mine, "# Parent: ppo_trajsep_lux.py\n# Removed from ppo_trajsep_lux: Args.num_groups", "# Parent: mappo_lux.py"
    )
    assert "group_index: carries marks that are mappo_lux.py's own: --fix takes them off" in check(tree).stderr
    done = check(tree, "--fix")
    assert done.returncode == 0 and "mine_lux.py" in done.stdout, done.stderr
    assert "ppo_trajsep_lux:" not in mine.read_text() and "def everywhere" in mine.read_text()


def test_units_stand_in_the_order_of_the_original(tree):
    text, good = (tree / "ppo_trajsep_lux.py").read_text(), (tree / "mappo_lux.py").read_text()
    start, middle, end = (
        text.index("\n\ndef group_index"),
        text.index("\n\ndef compute_gae"),
        text.index("\n\nclass Agent"),
    )
    moved = text[:start] + text[middle:end] + text[start:middle] + text[end:]
    (tree / "ppo_trajsep_lux.py").write_text(moved)
    assert "mappo_lux.py:3: the units stand in another order than in ppo_trajsep_lux.py" in check(tree).stderr
    done = check(tree, "--fix")
    assert done.returncode == 0 and "mappo_lux.py:3: units moved into the order of" in done.stdout, done.stderr
    text = (tree / "mappo_lux.py").read_text()
    assert text.index("def compute_gae") < text.index("# Differs from ppo_trajsep_lux: alone\ndef group_index")
    assert sorted(text) == sorted(good)


# ---- what --fix carries


def test_a_change_of_the_original_reaches_every_copy_before_and_after_its_commit(tree):
    for committed in (False, True):
        old, new = ("the discount factor", "what a step costs") if not committed else ("the seed", "the seed of all")
        edit(tree / "ppo_trajsep_lux.py", f'"""{old}"""', f'"""{new}"""')
        edit(
            tree / "ppo_trajsep_lux.py",
            "def compute_gae(",
            f"def helper_{committed}():\n    return 1\n\n\ndef compute_gae(",
        )
        if committed:
            commit(tree)
        done = check(tree)
        unit = "Args.seed" if committed else "Args.gamma"
        assert f"{unit}: differs without a mark: --fix renews it" in done.stderr
        assert (
            f"helper_{committed}: lacks what ppo_trajsep_lux.py:" in done.stderr
            and "--fix adds it; if you removed it, say" in done.stderr
        )
        done = check(tree, "--fix")
        assert done.returncode == 0, done.stderr
        for name in ("ippo_lux.py", "mappo_lux.py", "ablations/mixed_lux.py"):
            text = (tree / name).read_text()
            assert f'"""{new}"""' in text
            assert text.index(f"def helper_{committed}()") < text.index("def compute_gae(")
            assert re.search(rf"^{name}:\d+: {unit}: replaced, as in (ppo_trajsep|mappo)_lux.py$", done.stdout, re.M)
            assert re.search(rf"^{name}:\d+: helper_{committed}: added", done.stdout, re.M)
        assert "# Differs from mappo_lux: mixed" in (tree / "ablations/mixed_lux.py").read_text()
        commit(tree)


def test_a_unit_that_the_original_deleted_goes_from_copies_that_did_not_touch_it(tree):
    edit(tree / "ppo_trajsep_lux.py", 'PLAYERS = ("player_0", "player_1")\n\n', "")
    edit(tree / "ippo_lux.py", '"player_1")', '"player_2")')
    line = line_of(tree / "mappo_lux.py", "PLAYERS")
    assert f"mappo_lux.py:{line}: PLAYERS: ppo_trajsep_lux.py has no such unit: --fix removes it" in check(tree).stderr
    done = check(tree, "--fix")
    assert (
        f"mappo_lux.py:{line}: PLAYERS: removed" in done.stdout and "PLAYERS" not in (tree / "mappo_lux.py").read_text()
    )
    assert "ippo_lux.py:28: PLAYERS: ppo_trajsep_lux.py has no such unit: say '# Added to ppo_trajsep" in done.stderr
    assert 'PLAYERS = ("player_0", "player_2")' in (tree / "ippo_lux.py").read_text()


def test_an_edit_is_kept_while_the_rest_of_the_script_is_brought_up(tree):
    edit(tree / "ppo_trajsep_lux.py", "    return last + gamma\n", "    return last - gamma\n")
    edit(tree / "ppo_trajsep_lux.py", '"""the seed"""', '"""the seed of all"""')
    edit(tree / "ippo_lux.py", "    last = rewards[0] * 0\n", "    last = rewards[0]\n")
    done = check(tree, "--fix")
    assert done.returncode != 0 and "compute_gae: differs without a mark: say" in done.stderr
    text = (tree / "ippo_lux.py").read_text()
    assert "    last = rewards[0]\n    return last + gamma\n" in text and '"""the seed of all"""' in text


def test_older_commits_are_known(tree):
    for old, new in (("the seed", "a seed"), ("a seed", "one seed"), ("one seed", "any seed")):
        edit(tree / "ppo_trajsep_lux.py", f'"""{old}"""', f'"""{new}"""')
        commit(tree)
    assert check(tree, "--fix").returncode == 0
    assert all('"""any seed"""' in text for text in texts(tree).values())


def test_what_fix_carried_last_is_known_without_a_commit(tree):
    for old, new in (("the seed", "a seed"), ("a seed", "one seed"), ("one seed", "any seed")):
        edit(tree / "ppo_trajsep_lux.py", f'"""{old}"""', f'"""{new}"""')
        done = check(tree, "--fix")
        assert done.returncode == 0, done.stderr
        assert all(f'"""{new}"""' in text for text in texts(tree).values())


def test_new_functions_are_kept(tree):
    edit(tree / "ippo_lux.py", "def compute_gae(", "def more():\n    return 1\n\n\ndef compute_gae(")
    before = texts(tree)
    done = check(tree, "--fix")
    line = line_of(tree / "ippo_lux.py", "def more(")
    assert (
        f"ippo_lux.py:{line}: more: ppo_trajsep_lux.py has no such unit: say '# Added to ppo_trajsep_lux" in done.stderr
    )
    assert done.returncode != 0 and texts(tree) == before
    edit(tree / "ippo_lux.py", "def more(", "# Added to ppo_trajsep_lux: for the test\ndef more(")
    assert check(tree, "--fix").returncode == 0 and "def more(" in (tree / "ippo_lux.py").read_text()


def test_a_mark_on_an_added_class_is_one_for_its_members(tree):
    path = tree / "ippo_lux.py"
    new = "class More:\n    def __init__(self):\n        self.x = 1\n\n    def get(self):\n        return self.x\n"
    edit(path, "class Agent:", f"{new}\n\nclass Agent:")
    assert check(tree).stderr.count("has no such unit") == 3  # the class and its members
    edit(path, "class More:", "# Added to ppo_trajsep_lux: more\nclass More:")
    assert check(tree).returncode == 0
    edit(path, "        self.size = 3\n", "        self.size = 3\n\n    def more(self):\n        return 4\n")
    assert "Agent.more: ppo_trajsep_lux.py has no such unit" in check(tree).stderr  # a class of both is another matter


def test_what_misled_a_newcomer_is_told(tree):
    """No empty line below the docstring; a heading that stays above a field that is removed."""
    edit(tree / "ippo_lux.py", "\n# Parent:", "# Parent:")
    edit(tree / "ippo_lux.py", "    seed: int = 1\n", "    # A heading\n    seed: int = 1\n")
    said = check(tree, "--fix").stderr
    assert "differs without a mark: only its empty lines differ: put those of the parent back" in said
    assert "Args.seed; if what stands above it belongs to a unit that you removed, remove that as well" in said
    edit(tree / "ippo_lux.py", "    # A heading\n    seed: int = 1\n", "    seed: int  = 1\n")
    assert "Args.seed\n" in check(tree, "--fix").stderr and "seed; if what" not in check(tree, "--fix").stderr


def test_without_git_nothing_is_touched(bare):
    edit(bare / "ppo_trajsep_lux.py", '"""the seed"""', '"""a seed"""')
    before = texts(bare)
    files = sorted(bare.rglob("*"))
    done = check(bare, "--fix", PATH="")  # not even the program
    assert "ippo_lux.py:20: Args.seed: differs without a mark: say '# Differs" in done.stderr and texts(bare) == before
    done = check(bare, "--fix")
    assert "ippo_lux.py:20: Args.seed: differs without a mark: say '# Differs" in done.stderr and texts(bare) == before
    git(bare, "init", "-q")  # a repository that does not know the original is no better
    assert "ippo_lux.py:20: Args.seed: differs without a mark: say '# Differs" in check(bare, "--fix").stderr
    assert texts(bare) == before and files == sorted(path for path in bare.rglob("*") if ".git" not in path.parts)
    for _ in range(2):
        check(bare, "--overwrite", "ippo_lux.py", "Args.seed", "--overwrite", "mappo_lux", "Args.seed")
    assert (
        '"""a seed"""' in (bare / "ippo_lux.py").read_text() and '"""a seed"""' in (bare / "mappo_lux.py").read_text()
    )
    assert '"""the seed"""' in (bare / "ablations/mixed_lux.py").read_text()


def test_overwrite_gives_up_one_unit_of_one_script(tree):
    for name in ("ippo_lux.py", "mappo_lux.py"):
        edit(tree / name, "    last = rewards[0] * 0\n", "    last = rewards[0]\n")
        edit(tree / name, '"""the seed"""', '"""a seed"""')
    edit(tree / "ippo_lux.py", "class Agent:", "def more():\n    return 1\n\n\nclass Agent:")
    for flags in (["--overwrite", "ippo_lux.py", "compute_gae"], ["--overwrite", "ippo_lux.py", "more"]):
        assert "neither" not in check(tree, *flags).stderr
    ippo, mappo = (tree / "ippo_lux.py").read_text(), (tree / "mappo_lux.py").read_text()
    assert "rewards[0] * 0" in ippo and "def more" not in ippo and '"""a seed"""' in ippo
    assert "rewards[0] * 0" not in mappo and '"""a seed"""' in mappo
    before = texts(tree)
    done = check(tree, "--overwrite", "ippo_lux.py", "nothing")
    assert done.returncode != 0 and "neither it nor ppo_trajsep_lux.py has a unit 'nothing'" in done.stderr
    done = check(tree, "--overwrite", "nobody_lux.py", "Args.seed")
    assert done.returncode != 0 and "nobody_lux.py: no such variant" in done.stderr
    assert texts(tree) == before


@pytest.mark.parametrize("last", [True, False])
def test_what_would_become_part_of_another_unit_is_not_written(tree, last):
    path = tree / "ppo_trajsep_lux.py"
    text = path.read_text()
    before = text[: text.index("\n\nclass Agent")]
    if last:  # without a function above it, the method without its class is not even Python
        before = before[: before.index("\n\ndef compute_gae")] + "\n\ncompute_gae = print\n"
    path.write_text(before + text[text.index("\n\nif __name__") :])
    before = texts(tree)
    done = check(tree, "--fix")
    assert done.returncode != 0 and "ippo_lux.py:3: its own units do not fit" in done.stderr
    assert (tree / "ippo_lux.py").read_text() == before["ippo_lux.py"]


@pytest.mark.parametrize(
    "old, new",
    [
        ("Args.num_groups\n\nimport csv", "Args.num_groups\nimport csv"),  # no blank line after the header
        ("# Parent: ppo_trajsep_lux.py\n", "# Parent: ppo_trajsep_lux.py\n\n"),
        ('"""A variant."""\n\n', '#!/usr/bin/env python\n\n"""A variant."""\n\n'),
        ('"""A variant."""\n\n', ""),
        ("args.gamma), index, rows)\n", "args.gamma), index, rows, 3)"),  # no newline at the end
    ],
)
def test_headers_and_odd_ends_are_kept(tree, old, new):
    edit(tree / "mappo_lux.py", old, new)
    kept = [line for line in (tree / "mappo_lux.py").read_text().splitlines() if line]
    edit(tree / "ppo_trajsep_lux.py", '"""the seed"""\n', '"""a seed"""\n')
    edit(tree / "ppo_trajsep_lux.py", "    print(comp", "    # ---- last\n    print(comp")
    check(tree, "--fix")
    text = (tree / "mappo_lux.py").read_text()
    assert '"""a seed"""' in text and text.count("# ---- last") == 1
    lost = [line for line in kept if line not in text.splitlines()]
    assert lost == ['    """the seed"""'] and Script(tree / "mappo_lux.py").parent == "ppo_trajsep_lux.py"


# ---- what a fix does not reach


def test_a_change_of_the_original_in_a_marked_unit_is_told(tree):
    edit(tree / "ppo_trajsep_lux.py", "        return obs + self.size\n", "        return obs - self.size\n")
    told = (
        f"ippo_lux.py:{line_of(tree / 'ippo_lux.py', '    # Differs')}: Agent.get_value is marked, and the original's"
    )
    assert "Agent.get_value" not in check(tree).stdout  # the plain check has no news
    for flags in (("--stat",), ("--fix",), ("--fix",)):
        done = check(tree, *flags)
        assert f"{told} has changed since: look whether it needs the change\n" in done.stdout
        assert "-        return obs + self.size\n+        return obs - self.size\n" in done.stdout
        assert "is marked" not in done.stderr and done.stdout.count("is marked") == 1
    assert done.returncode == 0
    commit_of_the_original = ["commit", "-qm", "fix", "ppo_trajsep_lux.py"]
    git(tree, *commit_of_the_original)
    assert told in check(tree, "--stat").stdout
    edit(tree / "ippo_lux.py", "        return obs + self.size\n", "        return obs - self.size\n")
    commit(tree)
    assert "is marked" not in check(tree, "--stat").stdout


def test_news_for_a_variant_that_is_not_committed_yet(tree):
    (tree / "mine_lux.py").write_text((tree / "ippo_lux.py").read_text())
    assert "is marked" not in check(tree, "--stat").stdout
    edit(tree / "ppo_trajsep_lux.py", "        return obs + self.size\n", "        return obs - self.size\n")
    assert "mine_lux.py:49: Agent.get_value is marked" in check(tree, "--stat").stdout


# ---- --stat and --diff


def counts(tree):
    return {name: int(n) for name, n in re.findall(r"^(\S+): (\d+) lines added", check(tree, "--stat").stdout, re.M)}


def test_stat_counts_the_lines_that_diff_shows(tree):
    assert counts(tree) == {"ippo_lux.py": 1, "mappo_lux.py": 6, "ablations/mixed_lux.py": 1}
    for name, count in counts(tree).items():
        rows = check(tree, "--diff", name).stdout.splitlines()
        assert sum(row.startswith("+") for row in rows[2:]) == count
    before = counts(tree)
    edit(tree / "mappo_lux.py", '"""A variant."""', '"""A variant.\n\nOf this kind.\n"""')
    assert counts(tree) == before
    edit(tree / "mappo_lux.py", "    return unit_id\n", "    unit_id += 1\n    return unit_id\n")
    assert counts(tree) == {**before, "mappo_lux.py": before["mappo_lux.py"] + 1, "ablations/mixed_lux.py": 1}


def test_diff_shows_the_code_that_differs_and_where(tree):
    for name, mark in (("ppo_trajsep_lux.py", ""), ("mappo_lux.py", "    # Differs from ppo_trajsep_lux: far below\n")):
        many = "".join(f"    gamma += {i}\n" for i in range(9))
        edit(tree / name, "    last = rewards[0] * 0\n", f"{mark}{many}    last = {len(mark)}\n")
    done = check(tree, "--diff", "mappo_lux.py")
    rows = done.stdout.splitlines()
    assert done.returncode == 0 and rows[:2] == ["--- ppo_trajsep_lux.py", "+++ mappo_lux.py"]
    assert "-def group_index(unit_id, num_groups):" in rows and "+def group_index(unit_id):" in rows
    assert "+        return 2" in rows and '-    """how many groups"""' in rows
    for word in ("Differs from", "Added to", "Parent:", "Removed from", "A variant", "The original"):
        assert word not in done.stdout
    files = [(tree / row.split()[1]).read_text().splitlines() for row in rows[:2]]
    shown = 0
    for above, row in zip(rows[1:], rows[2:], strict=False):  # the numbers are those of the files
        if row.startswith("@@"):
            old, new = (int(n) for n in re.match(r"@@ -(\d+)\S* \+(\d+)\S* @@ \S", row).groups())
            continue
        old += row[0] in " -"
        assert row[0] == "+" or files[0][old - 2] == row[1:]
        if row[0] in " +":
            while not above.startswith("@@") and re.match(" *# (Differs|Added)", files[1][new - 1]):
                new += 1
            assert files[1][new - 1] == row[1:]
            new += 1
            shown += 1
    assert shown > 6
    assert check(tree, "--diff", "mappo_lux").stdout == check(tree, "--diff", "mappo_lux.py").stdout
    (tree / "ablations/mappo_lux.py").write_text((tree / "ippo_lux.py").read_text())  # a full path comes first
    assert check(tree, "--diff", "./mappo_lux.py").stdout == done.stdout
    (tree / "ablations/mappo_lux.py").unlink()
    assert check(tree, "--diff", "mixed_lux.py").stdout == check(tree, "--diff", "ablations/mixed_lux.py").stdout != ""
    for name in ("nobody", "ppo_trajsep_lux.py"):  # the original is no variant
        done = check(tree, "--diff", name)
        said = f"{name}: no such variant; there are ippo_lux.py, mappo_lux.py, ablations/mixed_lux.py\n"
        assert done.returncode != 0 and done.stderr == said


# ---- flags


def test_a_flag_that_nothing_reads_is_a_fault(tree):
    path = tree / "ippo_lux.py"
    mark = "    # Differs from ppo_trajsep_lux: x\n"
    edit(path, "    index = group_index(7, args.num_groups)\n", f"{mark}    index = group_index(7, 2)  # more\n")
    done = check(tree)
    said = (
        "ippo_lux.py:18: --num-groups is still a flag and nothing reads it: say '# Removed from ppo_trajsep_lux: Args."
    )
    assert done.returncode != 0 and said in done.stderr
    for reads in ('getattr(args, "num_groups")', "self.args.num_groups", "args.num_groups"):
        path.write_text(path.read_text().replace("group_index(7, 2)", f"group_index(7, {reads})"))
        assert check(tree).returncode == 0
        path.write_text(path.read_text().replace(reads, "2"))
    for reads in ("vars(args)", "getattr(args, name)", "getattr(*pair)", '"num_groups"', "arg.num_groups"):
        path.write_text(path.read_text().replace("group_index(7, 2)", f"group_index(7, {reads})"))
        assert said in check(tree).stderr, reads
        path.write_text(path.read_text().replace(reads, "2"))
    edit(path, "    index = group_index(7, 2)", "    args.num_groups = index = group_index(7, 2)")
    assert said in check(tree).stderr  # written, not read
    edit(path, '    num_groups: int = 0\n    """how many groups"""\n', "")
    edit(path, "trajsep_lux.py\n", "trajsep_lux.py\n# Removed from ppo_trajsep_lux: Args.num_groups\n")
    assert check(tree).returncode == 0


def test_a_new_flag_must_be_read_and_an_unread_one_of_the_original_is_its_own_affair(tree):
    new = '    # Added to ppo_trajsep_lux: x\n    speed: int = 1\n    """how fast"""\n'
    edit(tree / "ippo_lux.py", "    seed: int = 1\n", f"{new}    seed: int = 1\n")
    assert "ippo_lux.py:20: --speed is still a flag and nothing reads it" in check(tree).stderr
    edit(tree / "ippo_lux.py", new, "")
    edit(
        tree / "ppo_trajsep_lux.py",
        "    seed: int = 1\n",
        '    speed: int = 1\n    """how fast"""\n    seed: int = 1\n',
    )
    assert check(tree, "--fix").returncode == 0


# ---- whose scripts are checked


@pytest.mark.parametrize("name", ["mine_lux.py", "ablations/mine_lux.py", "my/own/folder/mine_lux.py", "my/try.py"])
def test_own_variants_are_found(tree, name):
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text((tree / "ippo_lux.py").read_text())
    assert check(tree).returncode == 0 and counts(tree)[name] == 1
    edit(tree / name, "    last = rewards[0] * 0\n", "    last = 2\n")
    assert f"{name}:37: compute_gae: differs without a mark: say" in check(tree, "--fix").stderr


def test_other_files_are_nobodys_business(tree):
    broken = (tree / "ippo_lux.py").read_text().replace("rewards[0] * 0", "2")
    for name, text in {
        "plot.py": "import pandas\n",
        "notes.py": "this is (not Python\n",
        "empty.py": "",
        "my_results/README.md": "x",
        "tests/test_mine_lux.py": "import pandas\n",
        "runs/one/script.py": broken,
        "wandb/run-1/files/code/ippo_lux.py": broken,
        "ablations/results/kept/script.py": broken,
        "ablations/results/kept/args.json": "{}",
        "env/pyvenv.cfg": "",
        "env/lib/site/other_lux.py": broken,
        ".hidden/other_lux.py": broken,
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    (tree / "latin.py").write_bytes(b"# caf\xe9\n")
    done = check(tree)
    assert done.returncode == 0, done.stderr
    assert len(counts(tree)) == 3


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("# Parent: ppo_trajsep_lux.py\n", "", "ippo_lux.py:1: names no parent; say '# Parent: ppo_trajsep_lux.py'"),
        (
            "# Parent: ppo_trajsep_lux.py\n",
            "# Parent: nobody_lux.py\n",
            "ippo_lux.py:3: its parent nobody_lux.py does not",
        ),
        ("# Parent: ppo_trajsep_lux.py\n", "# Parent: ippo_lux.py\n", "ippo_lux.py:3: its parent ippo_lux.py descends"),
        (
            "# Parent: ppo_trajsep_lux.py\n",
            "# Parent: ablations/circle_lux.py\n",
            "lux.py:3: its parent ablations/circle_lux.py descends from it",
        ),
    ],
)
def test_parents_are_checked(tree, old, new, said):
    edit(tree / "ippo_lux.py", old, new)
    if "circle" in new:
        text = (tree / "ippo_lux.py").read_text()
        (tree / "ablations/circle_lux.py").write_text(text.replace("ablations/circle_lux.py", "ippo_lux.py"))
        said = "ippo_lux.py:3: its parent ablations/circle_lux.py descends from it"
    before = texts(tree)
    for flags in ((), ("--fix",), ("--stat",), ("--diff", "mappo_lux.py")):
        done = check(tree, *flags)
        assert done.returncode != 0 and ("descends" if "circle" in new else said) in done.stderr
    assert texts(tree) == before


@pytest.mark.parametrize(
    "content, said",
    [
        (b'"""x"""\n\n# caf\xe9\n', "mine_lux.py:3: not UTF-8"),
        (b"", "mine_lux.py:1: the script is empty"),
        (b"\n# nothing\n", "mine_lux.py:1: the script is empty"),
        (b'"""x"""\n\ndef f(:\n', "mine_lux.py:3: not Python: invalid syntax"),
        (b"a = 1\n\x00\n", "not Python: source code"),
    ],
)
def test_bad_files_are_named(tree, content, said):
    (tree / "mine_lux.py").write_bytes(content)
    edit(tree / "ppo_trajsep_lux.py", '"""the seed"""', '"""a seed"""')
    before = (tree / "ippo_lux.py").read_text()
    for flags in ((), ("--fix",), ("--stat",), ("--diff", "mine_lux.py")):
        done = check(tree, *flags)
        assert done.returncode != 0 and said in done.stderr and done.stderr.count("\n") == 1
    assert (tree / "ippo_lux.py").read_text() == before


def test_a_folder_without_requirements_is_named(tree):
    (tree / "requirements.txt").unlink()
    done = check(tree)
    assert done.returncode != 0 and "requirements.txt" in done.stderr


def test_imports_are_checked(tree):
    path = tree / "ppo_trajsep_lux.py"
    edit(path, "import random\n", "import random\nimport luxai_s2_fast\nimport numpy as np\nimport tqdm\n")
    assert check(tree, "--fix").returncode == 0
    for bad, name in (
        ("import pandas", "pandas"),
        ("from ippo_lux import Agent", "ippo_lux"),
        ("from . import x", "."),
    ):
        edit(path, "import tqdm\n", f"import tqdm\n{bad}\n")
        assert f"ppo_trajsep_lux.py:{line_of(path, bad)}: imports {name}, which is neither" in check(tree).stderr
        edit(path, f"{bad}\n", "")
