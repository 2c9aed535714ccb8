"Benchmark items as a property of any task, length and seed; and the same questions under lm-evaluation-harness."
import re

import pytest
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedTokenizerFast

from pispiral.base.registry import load_plugin
from pispiral.evidence.records import digest
from pispiral.tasks import haystacks, ruler_words
from pispiral.tasks.assets import model_folder
from pispiral.tasks.exports import lm_eval_answers
from pispiral.tasks.registry import TASKS, make_item, tasks_of
from pispiral.tasks.scoring import score

GENERATED = [t for t in tasks_of() if not TASKS[t].network]
BENCHMARKS = [t for t in GENERATED if TASKS[t].suite not in ("needle", "short", "memory")]
NEEDLES = [t for t in tasks_of("ruler") if TASKS[t].takes_depth]
HIDDEN = [t for t in tasks_of("infinitebench") if TASKS[t].takes_depth]

# digests of the prompts' hashes at two lengths and seeds: a change would make earlier records those of other questions
DIGESTS = {"facts": "39eb465e67167cc8",
    "niah": "63733ff2f254e03e", "shortqa": "b3bb8a51d93f4050", "niah_single_1": "777976fc4e825cea",
    "niah_single_2": "08351e87252442b2", "niah_single_3": "cbc0c3b2491e95e8", "niah_multikey_1": "46661aa2200ab597",
    "niah_multikey_2": "ae163cb75abdd6c7", "niah_multikey_3": "ab32e0fc7e3d97f4", "niah_multivalue": "a715a219a53a360d",
    "niah_multiquery": "74cfcd81a0ce6174", "vt": "71c719a0fab4c6be", "cwe": "79f2dee81794bb87",
    "fwe": "2ad33fc92609acd2",
    "qa_1": "9b49d47e19d75228", "qa_2": "ce19eb9a19e5ec48", "multidoc_hotpotqa": "df128f18e684ad3e",
    "multidoc_2wikimqa": "77589545147ea00f", "multidoc_musique": "4902786122b3f722", "passkey": "db07e3d76265e431",
    "number_string": "d867b0e7c436a378", "kv_retrieval": "d7e321e6dfc2f3e3", "math_find": "7db69607d8550f73",
    "math_calc": "bd7430e321fbfbdc", "code_run": "73a107ac08dee753"}

# a task of one's own in a file of one's own, with nothing but public names
PLUGIN = """
'Adds up: two prices stand in real prose, and their sum is asked for.'
from pispiral import Item, register_task
from pispiral.tasks.haystacks import haystack
from pispiral.tasks.tokens import assemble, item_rng


def nearness(item, answer):
    'Return 1 for the right sum, less for a sum that is off by a part of it.'
    digits = ''.join(c for c in answer if c.isdigit())
    return max(0, 1 - abs(int(digits) - int(item.expected[0]))/int(item.expected[0])) if digits else 0


@register_task('prices', metric=nearness, source='an example')
def prices(tok, length, depth=None, seed=0, goods='bell'):
    'Ask what two things cost together.'
    rng = item_rng('prices', goods, length, depth, seed)
    a, b = (int(n) for n in rng.integers(10, 500, 2))
    facts = (f'The {goods} costs {a} crowns.', f'The lamp costs {b} crowns.')
    depths = (float(rng.random()) if depth is None else depth, float(rng.random()))
    return Item(task='prices', seed=seed, expected=(str(a + b),), **assemble(
        tok, 'Read the text.\\n', haystack('prose', tok, seed), facts, depths,
        f'\\nHow much do {goods} and lamp cost together?', 'Together they cost', length, max_new=8))
"""


def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(model_folder("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@few
@given(task=st.sampled_from(sorted(BENCHMARKS)), length=st.integers(1100, 1700), seed=st.integers(0, 10**6))
def test_any_item_has_the_length_asked_for_and_holds_its_answer(tok, task, length, seed):
    it = make_item(tok, task, length, seed=seed)
    text = tok.decode(it.ids)
    assert len(it.ids) + it.max_new == length and it.cut == it.wraps == 0
    if task in NEEDLES or task in HIDDEN:
        assert it.expected[0] in tok.decode(it.ids[it.needle_at:it.needle_at + it.needle_len])
        assert {text.count(v) for v in it.expected} == {2 if task in HIDDEN and task != "kv_retrieval" else 1}
    if task not in ("math_find", "math_calc", "code_run"):
        assert all(v in text for v in it.expected[:1])
    assert make_item(tok, task, length, seed=seed).prompt_hash == it.prompt_hash


@few
@given(task=st.sampled_from([*NEEDLES, *HIDDEN]), depth=st.floats(0, 1), length=st.integers(3000, 4000))
def test_a_needle_is_within_one_sentence_line_or_pair_of_its_depth(tok, task, depth, length):
    it = make_item(tok, task, length, depth, seed=7)
    ends = {"prose": r"(?<=[.!?;:])\s+|\n", "pairs": r'(?<=",) '}.get(it.haystack, r"\n")
    longest = max(map(len, tok(re.split(ends, tok.decode(it.ids)), add_special_tokens=False).input_ids))
    assert abs(it.depth_at - depth)*length <= 1.1*longest # the haystack is shorter than the item by a tenth at most


def test_items_are_the_same_in_every_process(tok): # each run of the tests has its own hash seed
    assert digest({t: make_item(tok, t, 1100).prompt_hash for t in BENCHMARKS}) == "dcdf083f4a3262cd"
    def hashes(task, depth=None): return [make_item(tok, task, *of).prompt_hash for of in (
        (1100, depth, 0), (1100, depth, 7), (2048, depth, 0), (2048, depth, 7))]
    assert {t: digest(hashes(t, .5 if t == "niah" else None)) for t in GENERATED} == DIGESTS


def test_a_task_of_ones_own_is_one_file(tok, tmp_path, monkeypatch):
    for name in ("entries", "sources"): monkeypatch.setattr(TASKS, name, dict(getattr(TASKS, name)))
    path = tmp_path/"prices.py"
    path.write_text(PLUGIN)
    assert len(PLUGIN.strip().splitlines()) <= 30
    load_plugin(path)
    assert tasks_of("own") == ("prices",) and tasks_of()[-1] == "prices"
    for length, depth, seed in ((300, None, 0), (1024, .25, 1), (4096, 1, 2)):
        it = make_item(tok, "prices", length, depth, seed, goods="horse")
        text = tok.decode(it.ids)
        a, b = (int(re.search(rf"The {thing} costs (\d+) crowns", text)[1]) for thing in ("horse", "lamp"))
        assert (it.task, len(it.ids) + it.max_new, it.expected) == ("prices", length, (str(a + b),))
        assert score(it, f" {a + b} crowns.")["score"] == 1 and 0 <= score(it, str(a))["score"] < 1
        assert score(it, "I do not know.")["score"] == 0
        if depth is not None: assert abs(it.depth_at - depth) < .2
    with pytest.raises(ValueError, match="'good' is not an option of task 'prices'; did you mean 'goods'?"):
        make_item(tok, "prices", 300, good="horse")
    with pytest.raises(ValueError, match="task='prices': length=60 is too short for this item: at least"):
        make_item(tok, "prices", 60)


def test_short_corpus_is_repeated_and_short_vocabulary_refused(monkeypatch):
    tok, lines = tokenizer(), [f"Sentence {i} of the poem." for i in range(50)]
    monkeypatch.setattr(haystacks, "prose", lambda: [" ".join(lines)])
    it = make_item(tok, "niah_single_2", 2000)
    assert it.wraps > 1 and len(it.ids) + it.max_new == 2000
    assert tok.decode(it.ids).count(lines[7]) > 2
    monkeypatch.setattr(ruler_words, "vocabulary", lambda more=False: tuple(f"word{i}x" for i in range(100)))
    with pytest.raises(ValueError, match="needs more than the 100 words that there are for task 'cwe'"):
        make_item(tok, "cwe", 4000)


def test_lm_eval_answers_as_we_do(tok):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed here")
    import torch
    from lm_eval.models.huggingface import HFLM
    from pispiral import load_model
    from pispiral.model.decode import answers
    from pispiral.verdict.stats import paired_gain
    model, tok = load_model("smollm2-135m-instruct", pos="hybrid", hybrid_K=2048, target_length=16384, dtype="float32")
    asked = [make_item(tok, "niah_single_1", 512, seed=s) for s in range(6)]
    theirs = lm_eval_answers(HFLM(pretrained=model, tokenizer=tok, batch_size=1, max_length=16384), tok, asked)
    with torch.inference_mode():
        ours = dict(answers(model, [it.ids for it in asked], [it.max_new for it in asked], {tok.eos_token_id}))
    scores = lambda said: [score(it, a)["score"] for it, a in zip(asked, said)]
    gain = paired_gain(scores(tok.decode(ours[i], skip_special_tokens=True) for i in range(len(asked))), scores(theirs))
    assert gain.lower <= 0 <= gain.upper and gain.diff == 0
