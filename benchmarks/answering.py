"""The same items, put to lm-evaluation-harness's Hugging Face model and to this package, in turns.

Each engine is a process of its own, with its own environment: the harness brings many packages that nothing here needs
(`make bench` installs it into `.venv-bench`). The processes exchange lines of JSON over their standard streams, so that
the bench can put a round of questions to the one and then to the other. As a script: one engine's process.
"""
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from timing import NotHere, pair_row
from transformers import AutoTokenizer

from pispiral.evidence.profiling import Shape, reading_work
from pispiral.lab.places import repository
from pispiral.model.load import load_model, model_config
from pispiral.model.prefill import reading_order
from pispiral.model.decode import answers
from pispiral.tasks.assets import model_folder
from pispiral.tasks.exports import lm_eval_answers
from pispiral.tasks.registry import make_item
from pispiral.tasks.scoring import score

TASKS = {"niah": "niah_single_1", "vt": "vt"}
LENGTHS = {"1k": 1024, "2k": 2048, "4k": 4096}
BATCHES = (1, 4)  # of the harness that are tried at each length; the faster is used
FLIPS = 1e-4      # share of last bits flipped, in the first layer's attention only, where answers differ


# ---- the two engines

def our_engine(folder, dtype):
    "This package, as `evaluate` asks: over one cache, guessing ahead from the prompt."
    model, tok = load_model(folder, pos="rope", dtype=dtype)
    def answer(asked, batch):
        with torch.inference_mode():
            tokens = dict(answers(model, [a["ids"] for a in asked], [a["max_new"] for a in asked], {tok.eos_token_id}))
        return [tok.decode(tokens[i], skip_special_tokens=True) for i in range(len(asked))]
    return answer


@contextmanager
def flipped_bits(model, share):
    "The last bit of a `share` of the first layer's attention output flipped, the same ones each time."
    drawn = torch.Generator().manual_seed(0)
    def flip(_, __, out):
        bits = torch.int16 if out[0].dtype.itemsize == 2 else torch.int32
        chosen = torch.rand(out[0].shape, generator=drawn) < share
        return (out[0].view(bits) ^ chosen.to(bits)).view(out[0].dtype), *out[1:]
    hook = model.get_decoder().layers[0].self_attn.register_forward_hook(flip) if share else None
    try: yield
    finally:
        if hook: hook.remove()


def harness_engine(folder, dtype):
    "The harness' HFLM as a user makes it; with `flips`, off by as many last bits: how far answers hang on rounding."
    from lm_eval.models.huggingface import HFLM  # installed in .venv-bench only
    lm = HFLM(pretrained=folder, dtype=dtype, device="cpu", batch_size=1, max_length=16384)
    def answer(asked, batch, flips=0):
        lm.batch_size_per_gpu = batch
        with flipped_bits(lm.model, flips):
            return lm_eval_answers(lm, lm.tokenizer, [SimpleNamespace(**a) for a in asked])
    return answer


ENGINES = dict(pispiral=our_engine, lm_eval=harness_engine)


# ---- their processes

def serve(engine,  # a key of `ENGINES`
          folder,  # of the model
          dtype):
    "Answer lines of JSON on stdin until it closes; whatever else is printed goes to stderr."
    out, sys.stdout = sys.stdout, sys.stderr
    def reply(what): print(json.dumps(what), file=out, flush=True)
    answer = ENGINES[engine](folder, dtype)
    reply("ready")
    for line in sys.stdin: reply(answer(**json.loads(line)))


class Engine:
    "A process that answers questions; `load` is the seconds until it could."
    def __init__(self, engine, python=sys.executable, dtype="bfloat16"):
        start, path = time.perf_counter(), repository()/".cache"/f"bench_{engine}.log"
        path.parent.mkdir(exist_ok=True)
        self.log = open(path, "w", encoding="utf-8")
        command = [str(python), __file__, engine, str(model_folder()), dtype]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                                        text=True, encoding="utf-8", env={**os.environ, "TQDM_DISABLE": "1"})
        self.read()
        self.load = time.perf_counter() - start

    def read(self):
        "Return the process' next line; NotHere if it ended."
        line = self.process.stdout.readline()
        if not line: raise NotHere(f"its process ended: see .cache/{Path(self.log.name).name}")
        return json.loads(line)

    def ask(self,
            asked,   # [dict(ids, max_new)]
            batch=1,
            **how):  # (answers, seconds)
        "Put questions, all at once."
        start = time.perf_counter()
        print(json.dumps(dict(asked=asked, batch=batch, **how)), file=self.process.stdin, flush=True)
        return self.read(), time.perf_counter() - start

    def close(self):
        "End the process."
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def __enter__(self): return self
    def __exit__(self, *_): self.close()


def harness_python():
    "Return the path of the Python that has lm-evaluation-harness; NotHere if `make bench` has not made it."
    python = repository()/".venv-bench"/"bin"/"python"
    if not python.exists(): raise NotHere("lm-evaluation-harness is not installed: `make bench` does it")
    return python


def load_engines(repeats):
    "Start both engines in turns; return the last pair, and the seconds that each took, without the first time."
    both, seconds = (), []
    for _ in range(repeats + 1):
        for engine in both: engine.close()
        both = Engine("pispiral"), Engine("lm_eval", harness_python())
        seconds.append([engine.load for engine in both])
    return both, seconds[1:]


# ---- questions and rows

def questions(items):
    "Return items as an engine takes them: [dict(ids, max_new)]."
    return [dict(ids=item.ids.tolist(), max_new=item.max_new) for item in items]


def shared_work(tok, items):
    "Return the operations of reading prompts once each, common beginnings once."
    shape = Shape.of(model_config("smollm2-135m-instruct")[1])
    order = reading_order([item.ids for item in items])
    return sum(sum(reading_work(shape, start, len(items[i].ids))) for i, start in order)


def agreement(items, ours, theirs):
    "Return answers to the same items compared, as texts and by their scores."
    def scores(texts): return [score(item, text)["score"] for item, text in zip(items, texts)]
    return dict(items=len(items), same_answers=sum(a.strip() == b.strip() for a, b in zip(ours, theirs)),
                same_scores=sum(a == b for a, b in zip(scores(ours), scores(theirs))),
                right=sum(s == 1 for s in scores(ours)))


def answer_rows(case, rounds, loads, items, about, tok):
    "Yield two rows: what an item costs, and what it costs if the model is loaded for these items."
    n = len(items)
    pairs = [(ours/n, theirs/n) for (_, ours), (_, theirs) in rounds]
    yield pair_row(case, "lm_eval", pairs, "s an item", work=dict(flops=shared_work(tok, items)/n), **about)
    loaded = [(ours + a/n, theirs + b/n) for (ours, theirs), (a, b) in zip(pairs, loads)]
    yield pair_row(f"{case}_with_load", "lm_eval", loaded, "s an item", **about)


def faster_batch(harness, asked):
    "Return the batch size at which the harness is the faster."
    return min(BATCHES, key=lambda batch: harness.ask(asked[:4], batch)[1])


def compared(items, asked, rounds, harness, batch):
    "Return how answers agree; where some differ, also how far the harness agrees with itself a few last bits apart."
    (ours, _), (theirs, _) = rounds[0]
    found = agreement(items, ours, theirs)
    if found["same_answers"] == len(items): return found
    itself = agreement(items, harness.ask(asked, batch, flips=FLIPS)[0], theirs)
    return found | {f"peer_{k}": v for k, v in itself.items() if k.startswith("same")}


def answering_cases(repeats,          # at most two are made: a round is long
                    items=6,          # of each task and length
                    lengths=LENGTHS):
    "Yield rows of each task and length: seconds an item, with the model loaded and with the loading."
    repeats, tok = min(repeats, 2), AutoTokenizer.from_pretrained(model_folder())
    (ours, theirs), loads = load_engines(repeats)
    with ours, theirs:
        for name, length in lengths.items():
            batch = None
            for task, maker in TASKS.items():
                some = [make_item(tok, maker, length, seed=seed) for seed in range(items)]
                asked = questions(some)
                if batch is None: batch = faster_batch(theirs, asked)
                else: theirs.ask(asked[:1], batch)
                ours.ask(asked[:1])
                rounds = [(ours.ask(asked), theirs.ask(asked, batch)) for _ in range(repeats)]
                about = dict(length=length, batch=batch, **compared(some, asked, rounds, theirs, batch))
                yield from answer_rows(f"{task}_item_{name}", rounds, loads, some, about, tok)


if __name__ == "__main__": serve(*sys.argv[1:])
