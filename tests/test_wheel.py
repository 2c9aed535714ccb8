"What is installed is the whole package, and works outside the repository."
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel, built from a copy: a build writes into its folder."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT/name, source)
    shutil.copytree(ROOT/"pispiral", source/"pispiral", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
                    "--disable-pip-version-check", "-w", out, source], check=True)
    [path] = out.glob("*.whl")
    return path


def test_the_wheel_has_every_file_of_the_package(wheel):
    there = {p.relative_to(ROOT).as_posix() for p in (ROOT/"pispiral").rglob("*")
             if p.is_file() and "__pycache__" not in p.parts}
    assert there - set(zipfile.ZipFile(wheel).namelist()) == set()


def test_the_wheel_imports_and_answers(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = ("import pathlib, pispiral; from pispiral.codes.registry import CODES; "
               "from pispiral.cli.main import app; "
               "print(pathlib.Path(pispiral.__file__).parent.parent, len(CODES))")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(tmp_path.resolve()) and int(done.stdout.split()[1]) >= 9


def test_everything_that_the_package_imports_at_once_is_among_its_requirements():
    import ast
    from pispiral.lab.wheels import own_requirements
    from test_kaggle import needed_by
    tops = {f.parts[0].removesuffix(".py") for dist in needed_by(r.name for r in own_requirements()).values()
            for f in dist.files or ()}
    for path in (ROOT/"pispiral").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in (n.partition(".")[0] for n in names):
                assert top in {*sys.stdlib_module_names, "pispiral", *tops}, f"{path.name} imports {top}"
