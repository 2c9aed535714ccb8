"""Does vLLM say, token by token, what the reference engine says? Greedy answers up to 16k, and needles at 12k.

`python benchmarks/agreement.py` asks both engines on the CPU in fp32, where `make vllm` has made an environment, and
writes agreement.md beside this file. Codes that are done stand in runs/bench/agreement.json and are not asked again.
"""
import json

import pandas as pd
import torch

from pispiral.base.files import write_text
from pispiral.evidence.evaluate import all_cells, answer_cell
from pispiral.evidence.executors import answered
from pispiral.evidence.records import hardware, versions, write_json
from pispiral.evidence.settings import Setting
from pispiral.evidence.vllm_engine import ENGINE, TIES, compared, crew_for_engine, stop_engine
from pispiral.lab.places import repository, runs_dir
from pispiral.lab.profiles import load_profile
from pispiral.model.load import load_model
from pispiral.model.vllm import vllm_python, vllm_version
from pispiral.tasks.niah import niah_item
from pispiral.tasks.scoring import score

MODEL = "smollm2-135m-instruct"
NAMES = ("rope", "hybrid", "yarn", "pi_spiral")     # of demo's methods
ITEMS = {1024: 4, 4096: 3, 8192: 2, 16384: 1}       # {tokens: items of each code}
FAR, FAR_NAMES, FAR_ITEMS = 12288, ("rope", "hybrid"), 3  # needles beyond the native 8,192: of vLLM alone
DEPTHS = (.1, .5, .9)


def codes(names=NAMES):
    "Return {name: Code} of demo's methods: what the reference run compares."
    profile = load_profile("demo")
    return {name: profile.method(name).code for name in names}


def setting(name, code, engine=ENGINE):
    "Return how a method is asked in fp32 on the CPU: by vLLM, or by the reference (None)."
    return Setting(MODEL, name, code, None, "float32", "cpu", 512, backend=engine or "sdpa", engine=engine)


def needles(tok, lengths): # {tokens: how many}
    "Return needles of several lengths, each a draw of its own."
    return [niah_item(tok, n, DEPTHS[s % 3], seed=s) for n, many in lengths.items() for s in range(many)]


def vllm_answers(model, tok, items, codes): # {name: (cells, {key: token ids})}
    "Ask vLLM's process all items under each code."
    todo = {f"{name}-{i}": (name, item) for name in codes for i, item in enumerate(items)}
    how, out = {name: setting(name, c) for name, c in codes.items()}, {name: ([], {}) for name in codes}
    crew = crew_for_engine(model, todo, how)
    for cell in all_cells(model, tok, todo, how, True, {}, None):
        cells, said = out[cell.how["setting"].method]
        cells.append(cell)
        said.update((a.key, a.ids) for a in answered(crew, [cell], lambda tokens: None))
    return out


def both(model, tok, items, codes): # {name: [dict(key, length, same, token, gap, score, tokens)]}
    "Ask both engines all items under each code, and compare their answers token by token."
    out = {}
    for name, (cells, theirs) in vllm_answers(model, tok, items, codes).items():
        rows, plain = [], setting(name, codes[name], None)
        for cell in cells:
            ours = {a.key: a.ids for a in answer_cell(model, cell._replace(how={**cell.how, "setting": plain}), None)}
            rows += compared(model, cell, ours, theirs)
        named = {f"{name}-{i}": item for i, item in enumerate(items)}
        out[name] = [{**r, "length": named[r["key"]].length, "tokens": len(theirs[r["key"]]),
                      "score": found(tok, named[r["key"]], theirs[r["key"]])} for r in rows]
    return out


def found(tok, item, ids):
    "Return an answer's score: 1 for a needle that was found."
    return score(item, tok.decode(ids, skip_special_tokens=True))["score"]


def far_scores(model, tok, codes, known=0): # {name: [score]} of the needles after those that are known
    "Ask vLLM for needles beyond the model's native length."
    items = needles(tok, {FAR: FAR_ITEMS})[known:]
    asked = vllm_answers(model, tok, items, codes)
    return {name: [found(tok, item, said[f"{name}-{i}"]) for i, item in enumerate(items)]
            for name, (_, said) in asked.items()}


def far_text(scores): # {name: [score]}
    "Return which needles each code found, by their depths."
    each = lambda s: ", ".join(f"depth {DEPTHS[i % 3]:g} {'found' if one else 'lost'}" for i, one in enumerate(s))
    return "; ".join(f"{name} found {int(sum(s))} of {len(s)} ({each(s)})" for name, s in scores.items())


def agreement_text(kept): # what runs/bench/agreement.json holds -> Markdown
    "Return the tables, under the machine and the versions that they were made with."
    rows = pd.DataFrame([dict(code=name, **row) for name, rows in kept["items"].items() for row in rows])
    parted = rows[~rows.same]
    lines = ["# vLLM beside the reference engine", "", "    python benchmarks/agreement.py", "",
             f"{MODEL} in fp32 on {kept['cpu']}; {', '.join(kept['versions'])}. Single needles in repeated sentences, "
             "greedy, both engines in passes of 512 tokens; the reference is transformers' model with torch's sdpa.",
             "", "| code | tokens | items | answers equal in every token | needles found (both) |",
             "|---|---|---|---|---|"]
    lines += [f"| {code} | {n:,} | {len(part)} | {part.same.sum()} | {int(part.score.sum())} |"
              for (code, n), part in rows.groupby(["code", "length"], sort=False)]
    lines += ["", f"{rows.same.sum()} of {len(rows)} answers are equal, {rows.tokens.sum():,} tokens were compared."]
    lines += [f"- {r.code} at {r.length:,}: the two engines part at token {int(r.token)} of the answer, where the "
              f"reference's logits for the two tokens are {r.gap:.2g} apart (rounding may turn over "
              f"{TIES['float32']:g})" for r in parted.itertuples()]
    if kept.get("far"):
        lines += ["", f"Needles at {FAR:,} tokens, of vLLM alone (the model was trained on 8,192): "
                  + far_text(kept["far"]) + "."]
    return "\n".join(lines) + "\n"


def agreement(path): # a JSON file, made or gone on with
    "Ask whatever is not in the file yet, code by code, and return its content."
    now = dict(cpu=hardware()["cpu"], items={}, far={},
               versions=[vllm_version(vllm_python()).replace("-0", " 0"), *(f"{k} {v}" for k, v in
                         versions(("torch", "transformers")).items())])
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    if kept["versions"] != now["versions"]: kept = now
    model, tok = load_model(MODEL, dtype="float32", device="cpu")
    for name, code in codes().items():
        if name in kept["items"]: continue
        kept["items"] |= both(model, tok, needles(tok, ITEMS), {name: code})
        write_json(path, kept)
    known = min((len(s) for s in kept["far"].values()), default=0)
    if known < FAR_ITEMS:
        more = far_scores(model, tok, codes(FAR_NAMES), known)
        kept["far"] = {name: kept["far"].get(name, []) + scores for name, scores in more.items()}
        write_json(path, kept)
    return kept


if __name__ == "__main__":
    with torch.inference_mode(): text = agreement_text(agreement(runs_dir()/"bench"/"agreement.json"))
    stop_engine()
    write_text(repository()/"benchmarks"/"agreement.md", text)
    print(text)
