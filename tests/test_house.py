"The house: who may import whom, how long a cell or a line may be, and that a room has one name everywhere."
import ast
import json
import re
import statistics
from functools import cache

import pytest
from conftest import ROOT

# each imports from itself and from those before it only; CONTRIBUTING.md has the picture
WINGS = ["base", "codes", "memory", "tasks", "model", "training", "evidence", "verdict", "publish", "lab", "cli"]
PACKAGE, NOTEBOOKS = ROOT/"pispiral", ROOT/"nbs"


@cache
def modules():
    "{dotted name: path} of the package's files; packages by their folder's name."
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["pispiral._modidx"]
    return found


@cache
def notebooks():
    "Paths of the notebooks that make modules: nbs/N_wing/NN_room.ipynb."
    return sorted(NOTEBOOKS.glob("[0-9a-z]_*/*.ipynb"))


@cache
def cells(path):
    "[(kind, source)] of a notebook."
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def imported(name):
    """Yield (module, name or None) for everything that a module imports from this package, also inside functions.

    `import pispiral` alone, for its version or its folder, imports no room and does not count."""
    path = modules()[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.startswith("pispiral."))
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            if source.split(".")[0] == "pispiral": yield from ((source, a.name) for a in node.names)


@cache
def graph():
    "{module: modules that it imports}."
    def target(source, name): return f"{source}.{name}" if f"{source}.{name}" in modules() else source
    return {m: {target(*i) for i in imported(m)} & set(modules()) - {m} for m in modules()}


def wing(module): return module.split(".")[1] if module.count(".") else None


def reaches(start):
    "Every module that `start` imports, directly or through others."
    seen, queue = set(), [start]
    while queue:
        new = graph()[queue.pop()] - seen
        seen |= new
        queue += new
    return seen


def none(found):
    "Fail with the list of what should not be there."
    found = list(found)
    assert not found, f"{len(found)}:\n" + "\n".join(found)


def test_every_wing_has_its_place():
    assert {wing(m) for m in modules()} - {None} == set(WINGS)


def test_nothing_imports_in_a_circle():
    none(m for m in modules() if m in reaches(m))


def test_nothing_imports_upwards():
    inside = [m for m in modules() if wing(m)]
    none(f"{m} imports {t}" for m in inside for t in sorted(graph()[m])
         if wing(t) is None or WINGS.index(wing(t)) > WINGS.index(wing(m)))


def test_no_private_name_crosses_a_file():
    private = re.compile(r"_[^_]")
    none(f"{m} takes {name} from {source}" for m in modules() for source, name in imported(m)
         if name and private.match(name))


def test_no_line_is_longer_than_120():
    none(f"{p.relative_to(ROOT)}:{i}" for p in modules().values()
         for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
         if len(line) > 120 and not line.startswith("__all__"))  # nbdev writes that one, up to 130


def export_cells():
    "Yield (lines, notebook) of every exported cell, without blank lines and directives."
    for path in notebooks():
        for kind, source in cells(path):
            if kind == "code" and re.match(r"#\|\s*exporti?\b", source):
                lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
                yield len(lines), path.name


def test_exported_cells_are_small():
    sizes = sorted(export_cells())
    none(f"{n} lines in {name}" for n, name in sizes if n > 60)
    median = statistics.median(n for n, _ in sizes)
    assert median <= 10


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_a_module_notebook_begins_with_its_title_and_summary(path):
    text = "\n\n".join(source for kind, source in cells(path)[:2] if kind == "markdown")
    assert re.match(r"# \S[^\n]*\n\s*> \S", text), f"{path.name} begins with neither `# Title` nor `> summary`"


def test_rooms_have_the_same_name_in_nbs_and_in_the_package():
    made = {}
    for path in notebooks():
        for kind, source in cells(path):
            if kind == "code" and (found := re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M)):
                made[f"pispiral.{found[1]}"] = path
    expected = {m: f"{wing(m)}/{'_'.join(m.split('.')[2:])}" for m in made}
    assert {m: f"{p.parent.name[2:]}/{p.stem.split('_', 1)[1]}" for m, p in made.items()} == expected
    assert set(made) == {m for m, p in modules().items() if p.name != "__init__.py"}


def test_numbers_of_rooms_are_unique_in_a_wing():
    numbers = [(p.parent.name, p.name.split("_")[0]) for p in notebooks()]
    none(sorted({"/".join(n) for n in numbers if numbers.count(n) > 1}))


def test_no_stored_output_names_a_machine():
    "A warning, or a folder of whoever executed a notebook, is nothing that a reader needs."
    def outputs(path):
        return [o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", ())]
    books = sorted(NOTEBOOKS.rglob("*.ipynb"))
    none(p.name for p in books for o in outputs(p) if o.get("name") == "stderr")
    none(p.name for p in books for o in outputs(p) if str(ROOT) in json.dumps(o) or "site-packages" in json.dumps(o))
