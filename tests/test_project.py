"""The project around the code: public names, one version, a cheap import, pages that say what is true."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import difflayers

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = ROOT / "tests" / "public_names.txt"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]

IMPORT_COST = """
import json, sys, time, torch
before = set(sys.modules)
start = time.process_time()
import difflayers
elapsed = time.process_time() - start
for name in difflayers.__all__:
    getattr(difflayers, name)
print(json.dumps({"seconds": elapsed, "modules": sorted(set(sys.modules) - before)}))
"""


def public_names() -> dict[str, set[str]]:
    """The names promised to users, by module."""
    promised: dict[str, set[str]] = {}
    for line in PUBLIC.read_text().split():
        module, _, name = line.rpartition(".")
        promised.setdefault(module, set()).add(name)
    return promised


@pytest.mark.parametrize("module", sorted(public_names()))
def test_public_names(module: str) -> None:
    offered = set(importlib.import_module(module).__all__)
    promised = public_names()[module]
    assert not promised - offered, f"{module} has lost names that users rely on: {sorted(promised - offered)}"
    assert not offered - promised, f"new names of {module}, to be added to {PUBLIC.name}: {sorted(offered - promised)}"


def test_every_family_promises_its_names() -> None:
    families = {f"difflayers.{path.parent.name}" for path in (ROOT / "difflayers").glob("*/__init__.py")}
    assert families <= set(public_names())


def test_public_names_are_on_their_reference_page() -> None:
    reference = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"auto\w+:: (\S+)", reference))
    missing = [
        f"{module}.{name}"
        for module, names in public_names().items()
        for name in sorted(names)
        if not (name.startswith("__") or isinstance(getattr(importlib.import_module(module), name), ModuleType))
        # A name of the top level may stand there under its family, and the other way round.
        and not documented & {module, f"{module}.{name}", f"difflayers.{name}"}
    ]
    assert not missing


def test_import_is_cheap() -> None:
    # In one process after torch, so that only the package is looked at; processor time, as the machine may be busy.
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", IMPORT_COST], capture_output=True, text=True, check=True, cwd=ROOT)
        cost = json.loads(run.stdout)
        if cost["seconds"] < 0.1:
            break
    assert cost["seconds"] < 0.1, f"import difflayers took {cost['seconds']:.2f} s after import torch"
    # Nor do the families bring what only some of their functions use.
    foreign = {name.partition(".")[0] for name in cost["modules"]} - set(sys.stdlib_module_names) - {"difflayers", "torch"}
    assert not foreign, f"import difflayers brings {sorted(foreign)}; import them where they are used"
    heavy = [name for name in cost["modules"] if name.startswith(("torch._dynamo", "torch._inductor", "torch.onnx", "torch.testing"))]
    assert not heavy


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'QPlayer'"):
        difflayers.QPlayer  # noqa: B018
    assert set(dir(difflayers)) == set(difflayers.__all__)


def test_the_version_is_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    source = ROOT / project["tool"]["hatch"]["version"]["path"]
    assert re.findall(r'^__version__ = "(.+)"$', source.read_text(), re.MULTILINE) == [difflayers.__version__]
    assert "version:" not in (ROOT / "CITATION.cff").read_text().replace("cff-version:", "")


def test_constraints_agree_with_the_pinned_linters() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["lint"]
    assert set(lint) <= set((ROOT / "constraints.txt").read_text().split())


def test_the_package_is_typed() -> None:
    assert (ROOT / "difflayers" / "py.typed").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_the_right_distribution_and_link_to_what_exists(page: Path) -> None:
    text = page.read_text()
    assert "install difflayers" not in text, "the project of that name on PyPI is unrelated"
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and "auto_examples" not in target:
            assert (page.parent / target).exists(), f"a link to {target}, which does not exist"


def test_the_readme_begins_with_the_two_commands() -> None:
    head = (ROOT / "README.md").read_text().split("\n## ")[0]
    assert head.index("make demo") < head.index("make test") < head.index("pip install")


@pytest.mark.parametrize(
    ("body", "fetches"),
    [
        ('<script src="https://cdn.example/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/font.css">', True),
        ("<style>@import url('https://fonts.example/font.css')</style>", True),
        ('<a href="https://example.org">a link that a reader may follow</a><img src="here.png">', False),
    ],
)
def test_the_offline_check_sees_what_a_page_would_fetch(tmp_path: Path, body: str, fetches: bool) -> None:
    (tmp_path / "page.html").write_text(f"<html><body>{body}</body></html>")
    check = runpy.run_path(str(ROOT / "docs" / "check_offline.py"))
    assert check["main"](str(tmp_path)) == int(fetches)
