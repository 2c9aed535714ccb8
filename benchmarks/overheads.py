"""What a user waits for beside the questions themselves: imports, commands, papermill, records, figures, the paper."""
import logging
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import nbformat
import papermill
import torch
from timing import NotHere, side_by_side

from pispiral.codes.registry import code
from pispiral.evidence.cells import item_record
from pispiral.evidence.records import Log
from pispiral.evidence.settings import Setting
from pispiral.lab.places import repository, runs_dir
from pispiral.lab.publishing import open_publication
from pispiral.model.load import load_model
from pispiral.model.decode import answers
from pispiral.publish.figures.run import all_figures
from pispiral.publish.paper import make_paper
from pispiral.tasks.niah import niah_item

PROGRAMS = dict(import_pispiral="import pispiral",
                cli_help="from pispiral.cli.main import app; app(['--help'])",
                status="from pispiral.cli.main import app; app(['status', 'reference'])")


def python(program):
    "Return a function that runs a program in a new interpreter; the reference run is the repository's."
    env = {k: v for k, v in os.environ.items() if k != "PISPIRAL_RUNS"}
    return partial(subprocess.run, [sys.executable, "-c", program], check=True, capture_output=True, env=env,
                   cwd=repository())


def start_cases(repeats):
    "The package's import, the command's help and the reference run's status, against a bare interpreter."
    for case, program in PROGRAMS.items(): yield side_by_side(case, python(program), "python", python(""), repeats)


def papermill_cases(repeats, cell="import torch, transformers"):
    "A notebook of one cell under papermill, against the same line in a bare interpreter."
    logging.getLogger("papermill").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as tmp:
        notebook, executed = Path(tmp)/"a.ipynb", Path(tmp)/"b.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), notebook)
        ours = partial(papermill.execute_notebook, str(notebook), str(executed), kernel_name="python3",
                       progress_bar=False, extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
        yield side_by_side("papermill_phase", ours, "python", python(cell), min(repeats, 3))


def record_cases(repeats, length=512):
    "An item's record, from its answer to the disk, against the answering of an item of the plan's shortest length."
    model, tok = load_model("smollm2-135m-instruct")
    item = niah_item(tok, length, .5, seed=0)
    setting = Setting("smollm2-135m-instruct", "rope", code("rope"), None, str(model.dtype)[6:], "cpu", 512)
    def answer():
        with torch.inference_mode(): list(answers(model, [item.ids], [item.max_new], {tok.eos_token_id}))
    with tempfile.TemporaryDirectory() as tmp, Log(Path(tmp)/"items.jsonl") as log:
        def keep(): log.append(item_record(item, setting, item.expected[0], 1., length))
        yield side_by_side("record_item", keep, "answer_512", answer, repeats, length=length)


def publish_cases(repeats):
    "The reference run's figures, and its paper, against what kaleido alone takes to turn the figures into PDF."
    if not (runs_dir()/"reference"/"run.json").exists():
        raise NotHere("the reference run is not where PISPIRAL_RUNS points")
    published = open_publication("reference")
    drawn = all_figures(published.res, published.figures)
    def only_kaleido(): return [d.figure.to_image("pdf") for d in drawn]
    with tempfile.TemporaryDirectory() as tmp:
        def paper(): return make_paper(published.res, repository()/"paper", published.figures, Path(tmp))
        def figures(): return all_figures(published.res, published.figures)
        for case, ours in dict(figures=figures, paper=paper).items():
            yield side_by_side(case, ours, "kaleido", only_kaleido, 1, figures=len(drawn))
