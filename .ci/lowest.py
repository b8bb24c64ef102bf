"""Prints pip constraints that pin every dependency of pyproject.toml to the oldest version that it allows."""

import re
import sys
import tomllib
from pathlib import Path

# torch's own lower bound would pull a CUDA build of several GB; it stays at the version of constraints.txt.
KEPT = {"torch"}

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
pinned = dict(
    re.findall(r"^([\w-]+)==(\S+)$", (Path(__file__).parents[1] / "constraints.txt").read_text("utf-8"), re.MULTILINE)
)
found = {}
for requirement in sum(project["optional-dependencies"].values(), project["dependencies"]):
    match = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)", requirement)
    if match is None:
        sys.exit(f"{requirement!r} has no lower bound")
    name, oldest = match.groups()
    if found.setdefault(name, oldest) != oldest:
        sys.exit(f"{name} has two lower bounds, {found[name]} and {oldest}")
for name, oldest in sorted(found.items()):
    print(f"{name}=={pinned[name] if name in KEPT else oldest}")
