"What one draw of a needle is: text, key and value together, at whatever depth; and records of earlier draws."
import ast
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from pispiral.tasks.assets import model_folder
from pispiral.tasks.haystacks import HAYSTACKS
from pispiral.tasks.niah import niah_item
from pispiral.verdict.failures import failures, with_context

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tok():
    return AutoTokenizer.from_pretrained(model_folder())


def without_needle(item): return np.delete(item.ids, np.s_[item.needle_at:item.needle_at + item.needle_len])


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_depths_of_a_draw_are_one_question(tok, haystack):
    shallow, deep = (niah_item(tok, 700, depth, 3, haystack) for depth in (.2, .9))
    assert shallow.expected == deep.expected and shallow.needle_at < deep.needle_at
    assert np.array_equal(without_needle(shallow), without_needle(deep))
    assert len(shallow.ids) == len(deep.ids) == 700 - deep.max_new


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_seeds_and_lengths_are_other_draws(tok, haystack):
    items = [niah_item(tok, *of, haystack) for of in ((700, .5, 3), (700, .5, 4), (720, .5, 3))]
    texts = {without_needle(item)[60:300].tobytes() for item in items}
    assert len(texts) == len({item.expected for item in items}) == 3


def test_prompts_of_earlier_records_are_not_made_up(tok):
    found = with_context(failures(ROOT/"runs"/"reference"), tok)
    assert len(found) and set(found.context) == {"the prompt cannot be made again from its record"}


ANSWERING = ("model/*.py", "memory/*.py", "codes/*.py", "evidence/evaluate.py", "evidence/executors.py",
             "evidence/clusters.py")


def test_nothing_that_answers_looks_at_the_right_answer():
    texts = {p: p.read_text() for pattern in ANSWERING for p in (ROOT/"pispiral").glob(pattern)}
    names = {p: {n.attr if isinstance(n, ast.Attribute) else n.arg for n in ast.walk(ast.parse(text))
                 if isinstance(n, ast.Attribute | ast.arg)} for p, text in texts.items()}
    assert len(names) > 20
    assert not [p.name for p, found in names.items() if found & {"expected", "draft", "drafts"}]
