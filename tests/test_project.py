"""What holds for the project as a whole, and no single notebook can show"""
import ast
import importlib
import inspect
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tformer_lab"


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def imported_packages(module):
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("module", ["tformer_lab", "tformer_lab.spectra"])
def test_importing_the_package_loads_neither_torch_nor_pandas_nor_plotly(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'pandas', 'plotly'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["tformer_lab", "tformer_lab.spectra"])
def test_every_name_that_a_package_offers_is_there_and_hides_no_module(package):
    offered = importlib.import_module(package)
    modules = {entry.name for entry in pkgutil.iter_modules(offered.__path__) if entry.name not in ("docs", "_modidx")}
    assert modules == {name for name in offered.__all__ if inspect.ismodule(getattr(offered, name))}
    assert all(getattr(offered, name).__name__ == name for name in set(offered.__all__) - modules)


def test_only_the_site_builder_imports_nbdev_or_fastcore():
    guilty = [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if imported_packages(path) & {"nbdev", "fastcore", "execnb"}]
    assert guilty == ["tformer_lab/docs.py"]


def test_exported_code_has_no_wildcard_import():
    assert [str(path) for path in PACKAGE.rglob("*.py") if re.search(r"(?m)^\s*from \S+ import \*", path.read_text(encoding="utf-8"))] == []


def test_nothing_is_defined_twice():
    """A second definition of a name would silently replace the first."""
    def own(body): return [node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not any(isinstance(mark, ast.Attribute) and mark.attr in ("setter", "deleter") or isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list)]
    twice = {}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for part in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(part, ast.Module | ast.ClassDef) and len(set(names := own(part.body))) < len(names): twice[f"{path.name} {getattr(part, 'name', '')}"] = sorted(name for name in set(names) if names.count(name) > 1)
    assert twice == {}


def test_no_saved_output_holds_a_path_of_a_machine():
    assert [path.name for path in (ROOT / "nbs").rglob("*.ipynb") if re.search(r"(?<![\w.])/(tmp/tmp|root/|Users/)", " ".join(str(cell.get("outputs")) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]))] == []


def test_every_module_has_a_notebook_in_the_same_place():
    modules = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.startswith("_")]
    assert [str(path) for path in modules if not (ROOT / "nbs" / path).with_suffix(".ipynb").is_file()] == []


def test_every_notebook_is_in_the_sidebar_once():
    def pages(entry):
        if isinstance(entry, list): return [page for part in entry for page in pages(part)]
        return pages(entry["contents"]) if isinstance(entry, dict) else [entry]

    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    written = [path.relative_to(ROOT) for path in (ROOT / "nbs").rglob("*.ipynb")]
    written = [path.as_posix() for path in written if not any(part[0] in "._" for part in path.parts)]
    assert sorted(pages(config["website"]["sidebar"]["contents"])) == sorted(written)


def test_the_package_and_the_citation_have_the_version_of_the_settings():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == settings()["version"]
    assert f'__version__ = "{settings()["version"]}"' in (PACKAGE / "__init__.py").read_text(encoding="utf-8")


def test_every_requirement_is_pinned_and_no_pin_names_a_host():
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    pinned = {normal(line.partition("==")[0]) for line in lines}
    extras = [settings()[key] for key in ("requirements", "dev_requirements", "docs_requirements", "lab_requirements")]
    required = {normal(re.match(r"[\w.-]+", need)[0]) for extra in extras for need in shlex.split(extra)}
    assert required - pinned == set()
