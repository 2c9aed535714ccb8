"""Items of an exact length against RULER's search for a length, and against one tokenisation of their text.

RULER (`data/synthetic/niah.py`) finds a length by a binary search over the number of words, with the whole prompt
tokenised at every step and three times the estimated number as its upper end. Tokenising an item's text once is the
least that a generator of texts does.
"""
import bisect

from timing import NotHere, pair_row, seconds, side_by_side
from transformers import AutoTokenizer

from pispiral.tasks.assets import model_folder, prose
from pispiral.tasks.registry import TASKS, make_item, tasks_of
from pispiral.tasks.tokens import token_ids

GENERATED = tuple(t for t in (*tasks_of("ruler"), *tasks_of("infinitebench")) if not TASKS[t].network)
ITEMS = dict(item_4k=4096, item_128k=131_072, item_1m=1_000_000)  # tokens


def ruler_search(tok, words, length, new=128, step=500):
    "RULER's search: the most words whose prompt and answer (`new` tokens) stay within `length` tokens."
    def tokens(n): return len(token_ids(tok, " ".join(words[:n]))) + new
    most = max(3*length*step//tokens(step), 2*step)
    return words[:step + bisect.bisect_right(range(step, most), length, key=tokens) - 1]


def item_cases(repeats, items=ITEMS):
    "Yield a row a length; a million tokens are searched for once only."
    tok = AutoTokenizer.from_pretrained(model_folder())
    words = " ".join(prose()).split()
    for case, n in items.items():
        yield side_by_side(case, lambda: make_item(tok, "niah_single_2", n),
                           "ruler_search", lambda: ruler_search(tok, words, n), repeats if n < 10**6 else 1,
                           length=n, work=dict(bytes=8*n))


def task_cases(repeats, length=10**6, tasks=GENERATED):
    "Yield a row a generated task; NotHere at the end if some could not be made."
    tok = AutoTokenizer.from_pretrained(model_folder())
    lacking = []
    for task in tasks:
        def make(seed): return make_item(tok, task, length, seed=seed)
        try: text = tok.decode(make(0).ids)  # what is kept from one item to the next is made here
        except ValueError as e:
            lacking.append(str(e))
            continue
        pairs = [(seconds(lambda: make(1 + i)), seconds(lambda: token_ids(tok, text))) for i in range(min(repeats, 2))]
        yield pair_row(f"item_1m_{task}", "one_tokenisation", pairs, length=length)
    if lacking: raise NotHere("; ".join(lacking))
