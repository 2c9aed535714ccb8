"Benchmark items as a property of any task, length and seed; and the same questions under lm-evaluation-harness."
import re

import pytest
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedTokenizerFast

from pispiral.evidence.records import digest
from pispiral.tasks import items as items_module, ruler_words
from pispiral.tasks.assets import model_folder
from pispiral.tasks.exports import lm_eval_answers
from pispiral.tasks.infinitebench import HIDDEN, SYNTHETIC, infinitebench_item
from pispiral.tasks.multidoc import QUESTIONS, question_item
from pispiral.tasks.ruler import NIAH, RULER, ruler_item
from pispiral.tasks.scoring import score

TASKS = {**{t: ruler_item for t in RULER}, **{t: infinitebench_item for t in SYNTHETIC},
         **{t: question_item for t in QUESTIONS if t not in RULER}}


def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(model_folder("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@few
@given(task=st.sampled_from(sorted(TASKS)), length=st.integers(1100, 1700), seed=st.integers(0, 10**6))
def test_any_item_has_the_length_asked_for_and_holds_its_answer(tok, task, length, seed):
    it = TASKS[task](tok, task, length, seed)
    text = tok.decode(it.ids)
    assert len(it.ids) + it.max_new == length and it.cut == it.wraps == 0
    if task in NIAH or task in HIDDEN:
        assert it.expected[0] in tok.decode(it.ids[it.needle_at:it.needle_at + it.needle_len])
        assert {text.count(v) for v in it.expected} == {2 if task in HIDDEN and task != "kv_retrieval" else 1}
    if task not in ("math_find", "math_calc", "code_run"):
        assert all(v in text for v in it.expected[:1])
    assert TASKS[task](tok, task, length, seed).prompt_hash == it.prompt_hash


@few
@given(task=st.sampled_from([*NIAH, *HIDDEN]), depth=st.floats(0, 1), length=st.integers(3000, 4000))
def test_a_needle_is_within_one_sentence_line_or_pair_of_its_depth(tok, task, depth, length):
    it = TASKS[task](tok, task, length, 7, depth=depth)
    ends = {"prose": r"(?<=[.!?;:])\s+|\n", "pairs": r'(?<=",) '}.get(it.haystack, r"\n")
    longest = max(map(len, tok(re.split(ends, tok.decode(it.ids)), add_special_tokens=False).input_ids))
    assert abs(it.depth_at - depth)*length <= 1.1*longest # the haystack is shorter than the item by a tenth at most


def test_items_are_the_same_in_every_process(tok): # each run of the tests has its own hash seed
    assert digest({t: make(tok, t, 1100, 0).prompt_hash for t, make in TASKS.items()}) == "dcdf083f4a3262cd"


def test_short_corpus_is_repeated_and_short_vocabulary_refused(monkeypatch):
    tok, lines = tokenizer(), [f"Sentence {i} of the poem." for i in range(50)]
    monkeypatch.setattr(items_module, "prose", lambda: [" ".join(lines)])
    it = ruler_item(tok, "niah_single_2", 2000, 0)
    assert it.wraps > 1 and len(it.ids) + it.max_new == 2000
    assert tok.decode(it.ids).count(lines[7]) > 2
    monkeypatch.setattr(ruler_words, "vocabulary", lambda more=False: tuple(f"word{i}x" for i in range(100)))
    with pytest.raises(ValueError, match="needs more than the 100 words that there are for task 'cwe'"):
        ruler_item(tok, "cwe", 4000, 0)


def test_lm_eval_answers_as_we_do(tok):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed here")
    import torch
    from lm_eval.models.huggingface import HFLM
    from pispiral import load_model
    from pispiral.model.stream import answers
    from pispiral.verdict.stats import paired_gain
    model, tok = load_model("smollm2-135m-instruct", pos="hybrid", hybrid_K=2048, target_length=16384, dtype="float32")
    asked = [ruler_item(tok, "niah_single_1", 512, s) for s in range(6)]
    theirs = lm_eval_answers(HFLM(pretrained=model, tokenizer=tok, batch_size=1, max_length=16384), tok, asked)
    with torch.inference_mode():
        ours = dict(answers(model, [it.ids for it in asked], [it.max_new for it in asked], {tok.eos_token_id}))
    scores = lambda said: [score(it, a)["score"] for it, a in zip(asked, said)]
    gain = paired_gain(scores(tok.decode(ours[i], skip_special_tokens=True) for i in range(len(asked))), scores(theirs))
    assert gain.lower <= 0 <= gain.upper and gain.diff == 0
