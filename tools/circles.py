#!/usr/bin/env python3
"""Lists the circles among the files of src/: files that need each other by their `use` and other paths.

A name that a module only hands on (`pub use`) counts for the file that defines it, so the front page of the crate is on
no circle. Comments, strings and the tests at the end of a file are not read. Exits with 1 if there is a circle. `--edges`
prints what each file needs.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "src"
files = {}  # module, a tuple of names: its file
for file in sorted(ROOT.rglob("*.rs")):
    parts = file.relative_to(ROOT).with_suffix("").parts
    files[() if parts == ("lib",) else parts[:-1] if parts[-1] == "mod" else parts] = file


def code(file):
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", file.read_text(), flags=re.S)
    text = text.replace("pub(in ", "pub(")
    text = re.sub(r"pub\(crate::[^)]*\)", "pub(crate)", text)
    text = re.sub(r'b?"(?:[^"\\]|\\.)*"', '""', text, flags=re.S)
    return text.split("#[cfg(test)]\nmod tests {")[0]


def leaves(tree):
    """The paths of a use tree, each with the name that it gets here."""
    head, brace, rest = tree.partition("{")
    prefix = [name.strip() for name in head.partition(" as ")[0].split("::") if name.strip()]
    if not brace:
        yield prefix, head.partition(" as ")[2].strip() or prefix[-1]
        return
    depth, start, inner = 0, 0, rest.rstrip().removesuffix("}") + ","
    for i, letter in enumerate(inner):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            for path, name in leaves(inner[start:i].strip()) if inner[start:i].strip() else ():
                yield (prefix, prefix[-1]) if path == ["self"] else (prefix + path, name)
            start = i + 1


USE = re.compile(r"(pub(?:\([^)]*\))?\s+)?\buse\s+([^;]+);")
texts = {module: code(file) for module, file in files.items()}
names = {module: {} for module in files}  # what a name that a module imports stands for
for module, text in texts.items():
    for _, tree in USE.findall(text):
        for path, name in leaves(" ".join(tree.split())):
            names[module][name] = path


def resolve(module, path, hops=0):
    """The module that defines what this path means in this one; None for what is of another crate."""
    at, path, ours = module, list(path), hops > 0
    while path and path[0] in ("crate", "self", "super"):
        at = {"crate": (), "self": at, "super": at[:-1]}[path.pop(0)]
        ours = True
    if not path or hops > 20:
        return at
    if at + (path[0],) in files:
        return resolve(at + (path[0],), ["self"] + path[1:], hops + 1)
    if path[0] in names[at]:
        return resolve(at, names[at][path[0]] + path[1:], hops + 1)
    return at if ours else None


needs = {}
for module, text in texts.items():
    found = {resolve(module, path) for visible, tree in USE.findall(text) if not visible for path, _ in leaves(" ".join(tree.split()))}
    for path in re.findall(r"\b[a-z_]\w*(?:::\w+)+", USE.sub("", text)):
        found.add(resolve(module, path.split("::")))
    needs[module] = {other for other in found if other is not None and other != module}


def reachable(start):
    reached, todo = set(), [start]
    while todo:
        todo.extend(new := needs[todo.pop()] - reached)
        reached |= new
    return reached


def name(module):
    return str(files[module].relative_to(ROOT))


if "--edges" in sys.argv:
    for module in files:
        print(f"{name(module)}: {', '.join(sorted(map(name, needs[module])))}")
reach = {module: reachable(module) for module in files}
circles = {frozenset(b for b in reach[a] if a in reach[b]) for a in files if a in reach[a]}
for circle in sorted(circles, key=lambda c: sorted(map(name, c))):
    print(f"{len(circle)} files on a circle:")
    for module in sorted(circle, key=name):
        print(f"  {name(module)} needs {', '.join(sorted(map(name, needs[module] & circle)))}")
print(f"{len(files)} files, {len(circles)} circles")
sys.exit(bool(circles))
