"""Proves that the scripts are identical where they should be, and carries fixes from a script to its copies.

    python tests/check_copies.py          fails with file, line and a unified diff
    python tests/check_copies.py --fix    writes the parent's text into every unmarked copy
    python tests/check_copies.py --prune  the same, and deletes unmarked units that the parent no longer has
    python tests/check_copies.py --stat   lists how much each script adds to its parent

A variant names its parent, and the units that it lacks, on lines of their own near its top:

    # Parent: ppo_trajsep_lux.py
    # Removed from ppo_trajsep_lux: Args.num_groups, group_index

A script falls into units, and every line belongs to exactly one: each import, each top-level
function and assignment, each member of a class, each field of Args, each banner section
(`# ---- name`) of the main block, each comment that stands alone. Text is compared, not syntax
trees. A unit must equal the parent's unit of the same name to the letter, unless a line of it says

    # Differs from ppo_trajsep_lux: <reason>

and a unit that the parent does not have must say `# Added to ppo_trajsep_lux: <reason>`. A mark on
a unit that does not differ is an error as well. Module docstrings are each script's own.
"""

import argparse
import ast
import difflib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

HEADER = re.compile(r"^# (Parent|Removed from (?P<of>\w+)): (?P<value>.+)$")
MARK = re.compile(r"^ *# (?P<kind>Differs from|Added to) (?P<parent>\w+): (?P<reason>\S.*)$")
BANNER = re.compile(r"^ +# ---- (?P<name>.+)$")
DOCSTRING = "module docstring"
BROUGHT_ALONG = {"scipy", "matplotlib", "tqdm", "pettingzoo"}  # by the packages of requirements.txt


class CopyError(Exception):
    """A script that cannot be compared; the message says where and why."""


@dataclass
class Unit:
    name: str
    line: int  # of its first line in the file, from 1
    lines: list  # with line ends
    marks: list  # matches of MARK

    @property
    def text(self):
        """The unit without its marks."""
        return "".join(line for line in self.lines if not MARK.match(line.rstrip("\n")))


class Script:
    """A script taken apart; `units` by name, in the file's order."""

    def __init__(self, path):
        self.path, self.source = path, path.read_text()
        self.parent, self.removed = None, []
        lines = self.source.splitlines(keepends=True)
        try:
            tree = ast.parse(self.source)
        except SyntaxError as error:
            raise CopyError(f"{path}:{error.lineno}: not Python: {error.msg}") from None
        self.header = []  # indices of the header's lines, which are compared with nothing
        for i, line in enumerate(lines):
            match = HEADER.match(line.rstrip("\n"))
            if match is None:
                if i - 1 in self.header and not line.strip():
                    self.header.append(i)
            else:
                self.header.append(i)
                names = [name.strip() for name in match["value"].split(",")]
                if match["of"] is None:
                    self.parent = names[0]
                else:
                    self.removed += names
        self.units = {}
        starts = list(self._starts(tree, lines))
        for (start, name), (end, _) in zip(starts, [*starts[1:], (len(lines), None)], strict=True):
            unique, count = name, 2
            while unique in self.units:
                unique, count = f"{name} ({count})", count + 1
            kept = [lines[i] for i in range(start, end) if i not in self.header]
            marks = [match for match in (MARK.match(line.rstrip("\n")) for line in kept) if match]
            self.units[unique] = Unit(unique, start + 1, kept, marks)

    def _starts(self, tree, lines):
        """(index of the first line, name) of every unit; a unit reaches to the next one's start."""
        end = 0  # of the unit before
        for node in tree.body:
            yield from self._comments(lines, end, node)
            start = self.comment_end
            if isinstance(node, ast.ClassDef):
                yield start, f"class {node.name}"
                end = node.body[0].end_lineno if is_docstring(node.body[0]) else node.body[0].lineno - 1
                for member in node.body:
                    if is_docstring(member):  # of the class, or of the field above it
                        end = member.end_lineno
                        continue
                    yield end, f"{node.name}.{name_of(member)}"
                    end = member.end_lineno
            elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
                yield start, "main"
                for i in range(node.lineno, node.end_lineno):
                    if BANNER.match(lines[i].rstrip("\n")):
                        yield i, f"main: {BANNER.match(lines[i].rstrip())['name']}"
            else:
                yield start, DOCSTRING if is_docstring(node) else name_of(node)
            end = node.end_lineno

    def _comments(self, lines, start, node):
        """Comments between two statements that stand alone: a unit each; sets `comment_end`."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        block = None
        self.comment_end = start
        for i in range(start, first):
            blank = not lines[i].strip()
            if not blank and block is None and i not in self.header:
                block = i
            if blank and block is not None:
                title = lines[block + lines[block].startswith("# ===")]  # a section's title is between two rules
                yield self.comment_end, "comment: " + title.strip("# \n")
                self.comment_end, block = i, None


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
    if isinstance(node, ast.Assign):
        return ", ".join(ast.unparse(target) for target in node.targets)
    return ast.unparse(node).splitlines()[0]


def difference(old, new, old_name, new_name):
    return "".join(
        difflib.unified_diff(old.splitlines(keepends=True), new.splitlines(keepends=True), old_name, new_name)
    )


def compare(variant, parent):
    """Every fault of a variant, as text with file and line."""
    stem, faults = parent.path.stem, []
    for name, unit in variant.units.items():
        where = f"{variant.path}:{unit.line}: {name}"
        if name == DOCSTRING:
            continue
        kinds = [mark["kind"] for mark in unit.marks]
        if any(mark["parent"] != stem for mark in unit.marks) or len(kinds) > 1:
            faults.append(f"{where}: one mark is enough, and its parent is {stem}")
        elif name not in parent.units:
            if kinds != ["Added to"]:
                faults.append(f"{where}: {stem} has no such unit; say '# Added to {stem}: <reason>', or use --prune")
        elif kinds == ["Added to"]:
            faults.append(f"{where}: {stem} has this unit as well; say '# Differs from {stem}: <reason>'")
        elif kinds and unit.text == parent.units[name].text:
            faults.append(f"{where}: marked as different, but it is the same (stale mark)")
        elif not kinds and unit.text != parent.units[name].text:
            theirs = f"{parent.path}:{parent.units[name].line}"
            diff = difference(parent.units[name].text, unit.text, theirs, f"{variant.path}:{unit.line}")
            faults.append(f"{where}: differs without a mark\n{diff}")
    for name, unit in parent.units.items():
        if name != DOCSTRING and name not in variant.units and name not in variant.removed:
            faults.append(
                f"{variant.path}:1: lacks {name} ({parent.path}:{unit.line}); say '# Removed from {stem}: {name}'"
            )
    for name in variant.removed:
        if name in variant.units or name not in parent.units:
            faults.append(f"{variant.path}:1: '# Removed from {stem}: {name}' is stale")
    shared = [name for name in variant.units if name in parent.units]
    if not faults and shared != [name for name in parent.units if name in variant.units]:
        faults.append(f"{variant.path}:1: the units stand in another order than in {parent.path}")
    return faults


def fixed(variant, parent, prune):
    """The variant's text with the parent's in every unit that is not marked."""
    out, after = [], {}  # `after`: the units that only the variant has, by the shared unit before them
    last = None
    for name, unit in variant.units.items():
        if name in parent.units:
            last = name
        elif unit.marks or not prune:
            after.setdefault(last, []).append(unit)
    header = [variant.source.splitlines(keepends=True)[i] for i in variant.header]
    for name, unit in parent.units.items():
        own = variant.units.get(name)
        if own is not None and (own.marks or name == DOCSTRING):
            out += own.lines
        elif name not in variant.removed:
            out += unit.text.splitlines(keepends=True)
        if name == DOCSTRING:
            out += ["\n", *header[:-1]]  # the blank line after the header is the next unit's first
        for added in after.get(name, []):
            out += added.lines
    return "".join(out)


def check_imports(script, scripts, requirements):
    """Scripts import the standard library and what requirements.txt brings, never each other."""
    allowed = {re.split(r"[ =<>!~;\[@]", line)[0].replace("-", "_").lower() for line in requirements.splitlines()}
    allowed |= BROUGHT_ALONG | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(script.source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            if top in {other.path.stem for other in scripts} or top.lower() not in allowed:
                yield f"{script.path}:{node.lineno}: imports {name}, which is neither standard nor in requirements.txt"


def added_lines(variant, parent):
    """The `+` lines of a unified diff from the parent, docstring aside."""
    old, new = ("".join("".join(u.lines) for u in s.units.values() if u.name != DOCSTRING) for s in (parent, variant))
    header = len(variant.header)
    return header + sum(
        line.startswith("+") and not line.startswith("+++") for line in difference(old, new, "old", "new").splitlines()
    )


def family(root):
    """Every script, parents before their variants: {path relative to root: Script}."""
    scripts = {path.relative_to(root).as_posix(): Script(path) for path in sorted(root.glob("*.py"))}
    scripts |= {path.relative_to(root).as_posix(): Script(path) for path in sorted(root.glob("ablations/*_lux.py"))}
    for name, script in scripts.items():
        if script.parent is not None and script.parent not in scripts:
            raise CopyError(f"{script.path}:1: its parent {script.parent} does not exist")
        if script.parent is None and name != "ppo_trajsep_lux.py":
            raise CopyError(f"{script.path}:1: names no parent; say '# Parent: ppo_trajsep_lux.py' near the top")

    def depth(name):
        return 0 if scripts[name].parent is None else 1 + depth(scripts[name].parent)

    return {name: scripts[name] for name in sorted(scripts, key=depth)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="write the parent's text into every unmarked copy")
    parser.add_argument("--prune", action="store_true", help="--fix, and delete unmarked units unknown to the parent")
    parser.add_argument("--stat", action="store_true", help="list how many lines each script adds to its parent")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    args = parser.parse_args()
    faults = []
    try:
        scripts = family(args.root)
        for name in scripts:
            if scripts[name].parent is None:
                continue
            parent = scripts[scripts[name].parent]
            if args.fix or args.prune:
                text = fixed(scripts[name], parent, args.prune)
                if text != scripts[name].source:
                    scripts[name].path.write_text(text)
                    print(f"{scripts[name].path}: fixed")
                    scripts[name] = Script(scripts[name].path)
            faults += compare(scripts[name], parent)
            if args.stat:
                print(f"{name}: {added_lines(scripts[name], parent)} lines added to or changed in {parent.path.name}")
        requirements = (args.root / "requirements.txt").read_text()
        for script in scripts.values():
            faults += check_imports(script, scripts.values(), requirements)
    except CopyError as error:
        faults.append(str(error))
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
