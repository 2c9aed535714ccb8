"""Fail if notebooks and package disagree, notebooks are not clean, or README.md is not nbs/index.ipynb.

Not a pytest file: `make test` runs it first."""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parents[1]
NOT_NEEDED = {".venv", ".venv-bench", ".venv-vllm", ".git", ".cache", "runs", "figures", "_proc", "_docs"}  # at the top


def ignore(folder, names):
    "What a copy of the repository does without."
    return {n for n in names if n in ("__pycache__", ".ipynb_checkpoints") or n in NOT_NEEDED and Path(folder) == ROOT}


def files(root):
    "What nbdev writes: the package and the notebooks."
    return {p.relative_to(root): p.read_bytes() for folder in ("pispiral", "nbs") for ext in ("*.py", "*.ipynb")
            for p in (root/folder).rglob(ext) if ".ipynb_checkpoints" not in p.parts}


def readme():
    "README.md as nbs/index.ipynb makes it: cells tagged `hide` and their inputs left out."
    config = Config(TagRemovePreprocessor=dict(enabled=True, remove_cell_tags=["hide"],
                                               remove_input_tags=["hide-input"]))
    config.MarkdownExporter.preprocessors = ["nbconvert.preprocessors.TagRemovePreprocessor"]
    text, resources = MarkdownExporter(config=config).from_filename(str(ROOT/"nbs"/"index.ipynb"))
    if resources.get("outputs"): sys.exit("nbs/index.ipynb displays an image: README can only link to one")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.strip().split("\n"))) + "\n"


def main():
    if "--write-readme" in sys.argv: return (ROOT/"README.md").write_text(readme(), encoding="utf-8")
    same = (ROOT/"README.md").read_text(encoding="utf-8") == readme()
    wrong = [] if same else ["README.md differs from nbs/index.ipynb: run `make readme`"]
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/"copy"
        shutil.copytree(ROOT, copy, ignore=ignore)
        before = files(copy)
        for command in ("nbdev_export", "nbdev_clean"):
            subprocess.run([command], cwd=copy, check=True, stdout=subprocess.DEVNULL)
        after = files(copy)
    wrong += [f"{p} is not what nbdev_export and nbdev_clean make of the notebooks: run both"
              for p in sorted({*before, *after}) if before.get(p) != after.get(p)]
    if wrong: sys.exit("\n".join(wrong))
    print(f"{len(after)} files: package, notebooks and README agree")


if __name__ == "__main__": main()
