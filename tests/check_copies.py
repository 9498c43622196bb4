"""Proves that the scripts are identical where they should be, and carries fixes from a script to its copies.

    python tests/check_copies.py                 fails with file, line and a unified diff
    python tests/check_copies.py --fix           brings every copy up to its parent
    python tests/check_copies.py --stat          lists how many lines each script adds to its parent
    python tests/check_copies.py --diff VARIANT  shows these lines: no docstring, header or marks

A variant, wherever in the repository, names its parent, and the units that it lacks, near its top:

    # Parent: ppo_trajsep_lux.py
    # Removed from ppo_trajsep_lux: Args.num_groups, group_index

A script falls into units, and every line belongs to exactly one: each import, each top-level
function and assignment, each member of a class, each field of Args, each banner section
(`# ---- name`) of the main block, each comment that stands alone. Text is compared, not syntax
trees. A unit must equal the parent's unit of the same name to the letter, unless lines of it say

    # Differs from ppo_trajsep_lux: <reason>

and a unit that the parent does not have must say `# Added to ppo_trajsep_lux: <reason>`. A mark on
a unit that does not differ is an error as well, and so is a flag that nothing reads any more.
Module docstrings are each script's own.

`--fix` touches an unmarked unit only where the copy has what git knows of the parent: its last 20
commits, and what `--fix` carried last (kept in .git/check_copies). All else is somebody's work: it
stays, and `--overwrite SCRIPT UNIT` gives it up. `--fix` and `--stat` also name marked units whose
original has changed since the copy was last committed.
"""

import argparse
import ast
import difflib
import functools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ORIGINAL = "ppo_trajsep_lux.py"
HEADER = re.compile(r"^# (Parent|Removed from (?P<of>[\w-]+)): (?P<value>.+)$")
MARK = re.compile(r"^ *# (?P<kind>Differs from|Added to) (?P<parent>[\w-]+): (?P<reason>\S.*)$")
BANNER = re.compile(r"^ +# ---- (?P<name>.+)$")
HUNK = re.compile(r"^@@ -(\d+)(\S*) \+(\d+)(\S*) @@$")
DOCSTRING = "module docstring"
BROUGHT_ALONG = {"scipy", "matplotlib", "tqdm", "filelock", "pettingzoo"}  # by the packages of requirements.txt
FOREIGN = {"args.json", "pyvenv.cfg", "conda-meta"}  # what is in the folder of a run, or of Python


class CopyError(Exception):
    """A script that cannot be compared; the message says where and why."""


@dataclass
class Unit:
    name: str
    rows: list  # (line number from 1, line with its end)

    def __post_init__(self):
        self.line = next((number for number, line in self.rows if line.strip()), 1)
        self.marks = [match for match in (MARK.match(line) for _, line in self.rows) if match]
        self.plain = [row for row in self.rows if not MARK.match(row[1])]  # the unit without its marks
        self.lines, self.text = ["".join(line for _, line in rows) for rows in (self.rows, self.plain)]


class Script:
    """A script taken apart; `name` is its path from the root, `units` by name, in the file's order."""

    def __init__(self, path, name=None, source=None):
        self.path, self.name, self.stem = path, name or path.name, path.stem
        self.parent, self.removed = None, {}
        try:
            source = path.read_text(encoding="utf-8") if source is None else source
            self.tree = ast.parse(source)
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise CopyError(f"{self.name}:{line}: not UTF-8; save the file in this encoding") from None
        except (SyntaxError, ValueError) as error:  # ValueError: a null byte, before Python 3.12
            line, why = getattr(error, "lineno", 1), getattr(error, "msg", error)
            raise CopyError(f"{self.name}:{line}: not Python: {why}") from None
        if not self.tree.body:
            raise CopyError(f"{self.name}:1: the script is empty")
        self.source = source if source.endswith("\n") else source + "\n"
        lines = re.findall(r".*\n", self.source)  # splitlines() would split at form feeds as well
        self.header = []  # indices of the header's lines, which are compared with nothing
        for i, line in enumerate(lines):
            if match := HEADER.match(line):
                names = [name.strip() for name in match["value"].split(",")]
                self.removed |= dict.fromkeys(names, match["of"]) if match["of"] else {}
                self.parent = self.parent if match["of"] else names[0]
            if match or (i - 1 in self.header and not line.strip()):
                self.header.append(i)
        self.top = f"{self.name}:{self.header[0] + 1 if self.header else 1}"
        self.header_lines = [lines[i] for i in self.header if lines[i].strip()]
        self.units = {}
        starts = list(self._starts(lines))
        for (start, name), (end, _) in zip(starts, [*starts[1:], (len(lines), None)], strict=True):
            unique, count = name, 2
            while unique in self.units:
                unique, count = f"{name} ({count})", count + 1
            self.units[unique] = Unit(unique, [(i + 1, lines[i]) for i in range(start, end) if i not in self.header])

    def _starts(self, lines):
        """(index of the first line, name) of every unit; a unit reaches to the next one's start."""
        end = 0  # of the unit before
        for node in self.tree.body:
            start, block = end, None
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
            for i in range(end, first):  # comments that stand alone between two statements
                blank = not lines[i].strip()
                if not blank and block is None and i not in self.header:
                    block = i
                if blank and block is not None:
                    title = lines[block + lines[block].startswith("# ===")]  # a section's title is between two rules
                    yield start, "comment: " + title.strip("# \n")
                    start, block = i, None
            if isinstance(node, ast.ClassDef):
                yield start, f"class {node.name}"
                end = max([node.lineno, *(base.end_lineno for base in node.bases)])
                for member in node.body:
                    if not is_docstring(member):  # which belongs to the class, or to the field above it
                        yield end, f"{node.name}.{name_of(member)}"
                    end = member.end_lineno
            elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
                yield start, "main"
                for i in range(node.lineno, node.end_lineno):
                    if match := BANNER.match(lines[i]):
                        yield i, f"main: {match['name'].rstrip()}"
            else:
                yield start, DOCSTRING if is_docstring(node) else name_of(node)
            end = node.end_lineno

    def text(self, name):
        """A unit's text without marks; None if the script does not have it."""
        return self.units[name].text if name in self.units else None

    def unread_flags(self):
        """The fields of Args that no other code reads, as `args.NAME` or `getattr(args, "NAME")`."""
        flags, read = set(), set()
        for node in ast.walk(self.tree):
            match node:
                case ast.ClassDef(name="Args"):
                    flags |= {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
                case ast.Attribute(value=value, ctx=ast.Load()) if is_args(value):
                    read.add(node.attr)
                case ast.Call(func=ast.Name("getattr"), args=[value, ast.Constant(name), *_]) if is_args(value):
                    read.add(name)
        return flags - read


def is_args(node):
    """Whether an expression is `args`, or ends in `.args`."""
    return getattr(node, "id", getattr(node, "attr", None)) == "args"


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def name_of(node):
    """A name for a statement, by which its counterpart in another script is found."""
    if hasattr(node, "name"):
        return node.name
    if isinstance(node, ast.Import):
        return "import " + ", ".join(alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return f"from {node.module} import"
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    if isinstance(node, ast.Assign):  # of several names the first, which stays when one is added
        return ast.unparse(getattr(node.targets[0], "elts", node.targets)[0])
    if isinstance(node, ast.AugAssign):
        return f"{ast.unparse(node.target)} +="
    return ast.unparse(node).splitlines()[0]


# ---- what git knows of a script


@functools.cache
def git(folder, *command):
    """The output of a git command; empty where it fails or there is no git."""
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def commits(path, count):
    """The last commits that changed a file, newest first; none outside git."""
    return git(path.parent, "log", f"-{count}", "--format=%H", "--", path.name).split()


@functools.cache
def version(path, commit=None):
    """The script in a file, or as it was there at a commit; None without one."""
    try:
        return Script(path, source=git(path.parent, "show", f"{commit}:./{path.name}") if commit else None)
    except (CopyError, OSError):
        return None


def record(script):
    """The file in .git that keeps the script as --fix carried it last."""
    folder = git(script.path.parent, "rev-parse", "--git-path", "check_copies").strip()
    return script.path.parent / folder / (script.name.replace("/", "__") + ".last")


def past(script):
    """Earlier versions of a script, one by one; none outside git."""
    known = commits(script.path, 20)
    yield from filter(None, (version(record(script)) for _ in known[:1]))
    yield from filter(None, (version(script.path, commit) for commit in known))


# ---- a variant and its parent


def difference(old, new, old_name="", new_name=""):
    """The lines of a unified diff of two units without their marks; line numbers are the files' own."""
    rows = [unit.plain if unit else [] for unit in (old, new)]
    for line in difflib.unified_diff(*([line for _, line in each] for each in rows), old_name, new_name):
        if match := HUNK.match(line):
            first, second = ([0, *(number for number, _ in each)] for each in rows)
            line = f"@@ -{first[int(match[1])]}{match[2]} +{second[int(match[3])]}{match[4]} @@ {(new or old).name}\n"
        yield line


def merged(variant, parent):
    """The units' names in the parent's order; those of the variant alone follow the shared unit before them."""
    after, last = {}, None
    for name in variant.units:
        if name in parent.units:
            last = name
        else:
            after.setdefault(last, []).append(name)
    return after.get(None, []) + [each for name in parent.units for each in (name, *after.get(name, []))]


def in_order(variant, parent):
    return [n for n in variant.units if n in parent.units] == [n for n in parent.units if n in variant.units]


def state(name, variant, parent):
    """same, marked, stale (the copy has what the parent had, so --fix may renew it) or edited."""
    own = variant.units.get(name)
    if name == DOCSTRING or (own is None and name in variant.removed):
        return "same"
    whole = variant.units.get("class " + name.partition(".")[0])  # a mark on an added class is one for its members
    marks = [*own.marks, *(whole.marks if whole and whole.name not in parent.units else [])] if own else []
    if any(mark["parent"] == parent.stem for mark in marks):
        return "marked"
    if variant.text(name) == parent.text(name):
        return "stale" if own.marks else "same"  # the parent's own marks, copied with it
    return "stale" if any(variant.text(name) == then.text(name) for then in past(parent)) else "edited"


def fault(name, variant, parent):
    """What is wrong with a unit of a variant, and what to do about it; None if nothing is."""
    own, theirs, kind = variant.units.get(name), parent.units.get(name), state(name, variant, parent)
    where = f"{variant.name}:{own.line}: {name}" if own else f"{variant.top}: {name}"
    if own is None:
        what, verb, mark = f"lacks what {parent.name}:{theirs.line} has", "adds", f"Removed from {parent.stem}: {name}"
    elif theirs is None:
        what, verb, mark = f"{parent.name} has no such unit", "removes", f"Added to {parent.stem}: <reason>"
    else:
        what, verb, mark = "differs without a mark", "renews", f"Differs from {parent.stem}: <reason>"
    if kind == "marked" and any(not mark.startswith(f"{m['kind']} {m['parent']}:") for m in own.marks):
        return f"{where}: each of its marks must say '# {mark}'"
    if kind == "marked" and own.text == parent.text(name):
        return f"{where}: marked as different, but it is the same (stale mark)"
    if kind in ("same", "marked"):
        return None
    advice = f"--fix {verb} it" if kind == "stale" else f"say '# {mark}'"
    if kind == "stale" and own and theirs and own.text == theirs.text:
        what, advice = f"carries marks that are {parent.name}'s own", "--fix takes them off"
    if kind == "stale" and own is None:
        advice += f"; if you removed it, say '# {mark}'"
    if kind == "edited" and theirs:
        advice += f", or take the parent's with --overwrite {variant.name} {shlex.quote(name)}"
    if kind == "edited" and own and theirs and re.findall(".+", own.text) == re.findall(".+", theirs.text):
        advice = "only its empty lines differ: put those of the parent back"
    elif kind == "edited" and own and theirs and own.text.endswith(theirs.text.lstrip("\n")):
        advice += "; if what stands above it belongs to a unit that you removed, remove that as well"
    diff = difference(theirs, own, parent.name, variant.name) if own and theirs else []
    return "\n".join([f"{where}: {what}: {advice}", *map(str.rstrip, diff)])


def compare(variant, parent):
    """Every fault of a variant, as text with file and line."""
    faults = [found for name in merged(variant, parent) if (found := fault(name, variant, parent))]
    for name, of in variant.removed.items():
        if of != parent.stem or name in variant.units or name not in parent.units:
            why = f"{variant.name} has it" if name in variant.units else f"{parent.name} has no such unit"
            why = why if of == parent.stem else f"the parent is {parent.stem}"
            faults.append(f"{variant.top}: '# Removed from {of}: {name}' is stale: {why}")
    for name in sorted(variant.unread_flags() - parent.unread_flags()):
        unit, flag = f"Args.{name}", "--" + name.replace("_", "-")
        advice = f": say '# Removed from {parent.stem}: {unit}' and delete it" if unit in parent.units else ""
        faults.append(f"{variant.name}:{variant.units[unit].line}: {flag} is still a flag and nothing reads it{advice}")
    if not faults and not in_order(variant, parent):
        faults.append(f"{variant.top}: the units stand in another order than in {parent.name}: --fix moves them")
    return faults


def hunks(variant, parent):
    """The lines of a diff from the parent, docstring, header and marks left out."""
    for name in merged(variant, parent):
        if name != DOCSTRING:
            yield from list(difference(parent.units.get(name), variant.units.get(name)))[2:]


def added_lines(variant, parent):
    """How many `+` lines a reader of --diff sees."""
    return sum(line.startswith("+") for line in hunks(variant, parent))


def news(variant, parent):
    """Marked units whose original has changed since the variant was last committed."""
    then = version(parent.path, *(commits(variant.path, 1) or ["HEAD"]))
    for name, unit in variant.units.items() if then else ():
        old, new = then.units.get(name), parent.units.get(name)
        if unit.marks and old and new and old.text != new.text:
            where = f"{variant.name}:{unit.line}: {name}"
            yield f"{where} is marked, and the original's has changed since: look whether it needs the change\n"
            yield from difference(old, new, f"{parent.name} then", f"{parent.name} now")


def fix(variant, parent, overwrite):
    """Write the parent's text into the units that are stale or to be overwritten; the script as it is then."""
    for name in set(overwrite) - {*merged(variant, parent)}:
        raise CopyError(f"{variant.name}:1: neither it nor {parent.name} has a unit {name!r}")
    out, done = {}, []
    for name in merged(variant, parent):
        own, theirs = variant.units.get(name), parent.units.get(name)
        if name in overwrite or state(name, variant, parent) == "stale":
            verb = "added" if own is None else "removed" if theirs is None else "replaced"
            done.append(f"{variant.name}:{own.line if own else 1}: {name}: {verb}, as in {parent.name}")
            own = Unit(name, theirs.plain) if theirs else None
        if own:
            out[name] = own.lines
    if not in_order(variant, parent):
        done.append(f"{variant.top}: units moved into the order of {parent.name}")
    if not done:
        return variant
    header = "".join(variant.header_lines)  # the blank line after it is the next unit's first
    source = "" if DOCSTRING in out else header
    source += "".join(lines + ("\n" + header) * (name == DOCSTRING) for name, lines in out.items())
    try:
        new = Script(variant.path, variant.name, source)
        whole = {n: unit.lines.strip() for n, unit in new.units.items()} == {n: out[n].strip() for n in out}
    except CopyError:
        whole = False
    if not whole:  # such as a method whose class is gone
        raise CopyError(f"{variant.top}: its own units do not fit into {parent.name} any more; mend it by hand")
    variant.path.write_text(source, encoding="utf-8")
    print("\n".join(done))
    return new


# ---- the repository


def check_imports(script, requirements):
    """Scripts import the standard library and what requirements.txt brings, never each other."""
    allowed = {re.split(r"[ =<>!~;\[@]", line)[0].rstrip("/").split("/")[-1] for line in requirements.splitlines()}
    allowed = {name.replace("-", "_").lower() for name in allowed} | BROUGHT_ALONG | set(sys.stdlib_module_names)
    for node in ast.walk(script.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.split(".")[0].lower() not in allowed:
                yield f"{script.name}:{node.lineno}: imports {name}, which is neither standard nor in requirements.txt"


def paths(root):
    """The files of scripts: by their name, or by their `# Parent:` line."""
    for folder, folders, files in os.walk(root):
        if Path(folder) != root and FOREIGN & {*folders, *files}:
            folders[:] = files[:] = []
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in ("runs", "wandb"))
        for path in (Path(folder, name) for name in sorted(files) if name.endswith(".py")):
            named = path.name.endswith("_lux.py") and not path.name.startswith("test_")
            if path.is_file() and (named or re.search(rb"^# Parent: ", path.read_bytes(), re.M)):
                yield path


def family(root):
    """Every script, parents before their variants: {path relative to root: Script}."""
    names = {path.relative_to(root).as_posix(): path for path in paths(root)}
    scripts = {name: Script(path, name) for name, path in names.items()}

    def depth(name, below=()):
        top, parent = scripts[name].top, scripts[name].parent
        if parent is None and name != ORIGINAL:
            raise CopyError(f"{top}: names no parent; say '# Parent: {ORIGINAL}' near the top")
        if parent is not None and (parent not in scripts or name in below):
            why = "descends from it" if name in below else "does not exist; give its path from the repository's root"
            raise CopyError(f"{top}: its parent {parent} {why}")
        return 0 if parent is None else 1 + depth(parent, (*below, name))

    return {name: scripts[name] for name in sorted(scripts, key=depth)}


def variant_of(scripts, wanted):
    """The variant with this path, file name or stem."""
    variants, wanted = [script for script in scripts.values() if script.parent], Path(wanted).as_posix()
    for script in sorted(variants, key=lambda script: script.name != wanted):
        if wanted in (script.name, script.path.name, script.stem):
            return script
    raise CopyError(f"{wanted}: no such variant; there are {', '.join(script.name for script in variants)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="bring every copy up to its parent; unmarked edits stay")
    pair = {"nargs": 2, "action": "append", "metavar": ("SCRIPT", "UNIT"), "default": []}
    parser.add_argument("--overwrite", **pair, help="--fix, and take the parent's text for this unit too")
    parser.add_argument("--stat", action="store_true", help="list how many lines each script adds to its parent")
    parser.add_argument("--diff", metavar="VARIANT", help="show these lines")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    args = parser.parse_args()
    faults, fixing = [], args.fix or args.overwrite
    try:
        scripts = family(args.root)
        if args.diff:
            variant = variant_of(scripts, args.diff)
            parent = scripts[variant.parent]
            print(f"--- {parent.name}\n+++ {variant.name}\n" + "".join(hunks(variant, parent)), end="")
            return
        overwrite = [(variant_of(scripts, script).name, unit) for script, unit in args.overwrite]
        for name, script in scripts.items():
            if script.parent is None:
                continue
            parent = scripts[script.parent]
            if fixing:
                script = scripts[name] = fix(script, parent, {unit for of, unit in overwrite if of == name})
            if args.stat:
                print(f"{name}: {added_lines(script, parent)} lines added to or changed in {parent.name}")
            if fixing or args.stat:
                print("".join(news(script, parent)), end="")
            faults += compare(script, parent)
        requirements = (args.root / "requirements.txt").read_text(encoding="utf-8")
        for script in scripts.values():
            faults += check_imports(script, requirements)
            if fixing and commits(script.path, 1):
                record(script).parent.mkdir(exist_ok=True)
                record(script).write_text(script.source, encoding="utf-8")
    except (CopyError, OSError) as error:
        faults.append(str(error))
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
