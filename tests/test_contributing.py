"What README and CONTRIBUTING show is executed: each Python example registers its entry, as a plugin does."
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import pispiral


def examples(page):
    "The Python blocks of a page."
    return re.findall(r"^```python\n(.*?)^```", (ROOT/page).read_text(encoding="utf-8"), re.M | re.S)


def example(page, word):
    "The one block that has a word in it."
    [found] = [block for block in examples(page) if word in block]
    return found


def with_plugin(tmp_path, text, program):
    "What a program prints, as JSON, in a process that uses the text as a plugin."
    plugin = tmp_path/"my_plugin.py"
    plugin.write_text(text)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8", cwd=ROOT,
                          env={**os.environ, "PISPIRAL_PLUGINS": str(plugin)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CODE = """
import json
from pispiral.codes.registry import CODES, code, code_parameters, make_code
from pispiral.model.load import model_config
made = make_code(code(NAME, **PARAMS), model_config("smollm2-135m-instruct")[1])
print(json.dumps([NAME in CODES, list(code_parameters()), made.words.tolist()]))
"""


@pytest.mark.parametrize("page, name, params, parameter", [("CONTRIBUTING.md", "partial", dict(still=.25), "still"),
                                                           ("README.md", "slow", dict(factor=4.), "factor")])
def test_a_code_in_one_file(tmp_path, page, name, params, parameter):
    program = CODE.replace("NAME", repr(name)).replace("PARAMS", repr(params))
    known, parameters, words = with_plugin(tmp_path, example(page, f'"{name}"'), program)
    assert known and parameter in parameters
    still = sum(word == 0 for word in words)/len(words)
    assert still == params.get("still", 0)


def test_loading_as_readme_shows():
    made = {}
    exec(example("README.md", "import load_model"), made)
    assert made["model"].config.num_hidden_layers == 30 and made["tok"].eos_token_id is not None


TASK = """
import json
from transformers import AutoTokenizer
from pispiral.tasks.assets import model_folder
from pispiral.tasks.registry import TASKS, make_item
item = make_item(AutoTokenizer.from_pretrained(model_folder()), "password", 600, depth=.5, seed=3)
print(json.dumps([TASKS["password"].suite, len(item.ids) + item.max_new, item.expected[0]]))
"""


def test_a_task_in_one_file(tmp_path):
    suite, length, expected = with_plugin(tmp_path, example("CONTRIBUTING.md", "register_task"), TASK)
    assert suite == "own" and length == 600 and re.fullmatch("[a-h]{6}", expected)


GATE = """
import json
from pispiral.lab.places import repository
from pispiral.verdict.gates import evaluate_gates, load_gates
gates = evaluate_gates(repository()/"runs"/"reference", load_gates(repository()/"nbs"/"profiles"/"gates.yaml"))
[gate] = [g for g in gates if g.id == "3.beats_yarn"]
print(json.dumps([gate.statement, gate.verdict, gate.reason]))
"""


def test_a_gate_in_one_file(tmp_path):
    statement, verdict, reason = with_plugin(tmp_path, example("CONTRIBUTING.md", "register_gate"), GATE)
    assert statement == "hybrid finds more needles than YaRN does."
    assert verdict == "inconclusive" and "draws, " in reason


FIGURE = """
import json
from pispiral.lab.places import repository
from pispiral.publish.figures.run import drawn_figures
from pispiral.publish.results import open_results
results = open_results(repository()/"runs"/"reference", repository()/"nbs"/"profiles"/"gates.yaml")
drawn = [d for d in drawn_figures(results) if d.name == "seconds_an_item"]
print(json.dumps([[d.stem, d.caption, len(d.figure.data)] for d in drawn]))
"""


def test_a_figure_in_one_file(tmp_path):
    drawn = with_plugin(tmp_path, example("CONTRIBUTING.md", "register_figure"), FIGURE)
    assert drawn and all(stem.startswith("seconds_an_item__model-") and traces == 1 for stem, _, traces in drawn)


def test_examples_are_short():
    for page, most in (("README.md", 11), ("CONTRIBUTING.md", 20)):
        for block in examples(page): assert len([line for line in block.splitlines() if line.strip()]) <= most, block


def test_readme_fits_on_a_page():
    assert len((ROOT/"README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    path = ROOT/page
    links = [to for to in re.findall(r"\]\(([^)\s#]+)", path.read_text(encoding="utf-8")) if not to.startswith("http")]
    assert [to for to in links if not (path.parent/to).exists()] == []


def test_every_command_that_the_pages_show_exists(cli):
    known = set(re.findall(r"│\s+([a-z]+)\s", cli.here("--help")[0]))
    for page in ("README.md", "CONTRIBUTING.md"):
        shown = {a or b for a, b in re.findall(r"^pispiral ([a-z]+)|`pispiral ([a-z]+)", (ROOT/page).read_text(), re.M)}
        assert shown and shown <= known, page


def test_the_citation_is_valid():
    cff = yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "software"
    assert cff["message"] and cff["title"] and cff["authors"] == [{"name": "The pispiral authors"}]
    assert cff["version"] == pispiral.__version__ and cff["license"] == "Apache-2.0"
