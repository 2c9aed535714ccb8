"""The rows of a bench, in words: what is asked of them, a table, and how far each is from the machine's limit."""
import torch
from answering import FLIPS
from items import GENERATED
from timing import good_dtype, matrix_ratio

from pispiral.evidence.records import commit, hardware, versions
from pispiral.lab.places import repository

# (case, peer): at least this ratio ("ratio"), or at most so many seconds: "ours", or ours beyond theirs ("beyond")
PEERS = ("lm_eval", "lm_eval_vllm", "generate", "vllm") # of ten needles: none of them is faster
AIMS = {("niah_item_4k", "lm_eval"): ("ratio", 3), ("vt_item_4k", "lm_eval"): ("ratio", 3),
        **{(f"niah_item_{n}{how}", peer): ("ratio", 1) for n in ("1k", "4k") for how in ("", "_kernels")
           for peer in PEERS if (n, how, peer) != ("4k", "", "lm_eval")},
        ("rotation_hybrid", "transformers"): ("ratio", 1/1.05),
        ("rotation_hybrid_first", "transformers"): ("ratio", 1/1.05),
        ("attractor_chunked", "lfilter"): ("ratio", 5), ("attractor_chunked", "copy"): ("ratio", 1/4),
        ("record_item", "answer_512"): ("ratio", 100),
        ("import_pispiral", "python"): ("ours", .3), ("status", "python"): ("ours", .7),
        ("papermill_phase", "python"): ("beyond", 5.), ("item_1m", "ruler_search"): ("ours", 2.),
        **{(f"item_1m_{t}", "one_tokenisation"): ("ours", 2.) for t in GENERATED}}

# the beginning of a case's name: what stands between it and the machine's limit
NEXT = {"attractor": "what is left is the block's second pass over its output; a fused kernel on a GPU writes it once",
        "stream": "attention runs below the matrix rate, as softmax is no matrix product",
        "item": "Python lists of sentences; arrays of ids for whole works are the next step",
        "gpu": "larger chunks and a fused rotation"}

PACKAGES = ("torch", "transformers", "numpy", "scipy", "papermill", "plotly", "kaleido", "triton",
            "flash-linear-attention")


def with_aim(row):
    "Return the row with what is asked of it and whether it is met, if anything is."
    if (aim := AIMS.get((row["case"], row["peer"]))) is None: return row
    kind, bound = aim
    if kind == "ratio": return {**row, "asked": f"ratio ≥ {bound:.3g}", "met": row["ratio"] >= bound}
    took = row["ours"] - (row["theirs"] if kind == "beyond" else 0)
    return {**row, "asked": f"{'ours − theirs' if kind == 'beyond' else 'ours'} ≤ {bound:g} s", "met": took <= bound}


def duration(seconds):
    "Return seconds in words: 12 ms, 3.4 s."
    return f"{seconds*1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def heading():
    "Return the machine and the versions that a bench was measured with, as Markdown lines."
    here = (commit(repository()) or {"commit": "an unknown commit"})["commit"][:12]
    packages = ", ".join(f"{name} {version}" for name, version in versions(PACKAGES).items() if version)
    return [f"# Bench at {here}", "", f"{hardware()['cpu']}, {torch.get_num_threads()} threads; {packages}", "",
            "Ratio is theirs ÷ ours in time, median of pairs measured in turns; above 1 ours is the faster.", ""]


def table_line(row):
    "Return a row as a line of the Markdown table."
    low, high = row["spread"]
    asked = f"{row['asked']}: {'met' if row['met'] else '**missed**'}" if "asked" in row else ""
    cells = (row["case"], row.get("length", ""), row["peer"], f"{row['ratio']:.2f}", f"{low:.2f} … {high:.2f}",
             duration(row["ours"]), duration(row["theirs"]), row["repeats"], asked)
    return f"| {' | '.join(map(str, cells))} |"


def answers_line(row):
    "Return how many answers of a row were the same, as a Markdown list's line."
    itself = (f"; the peer against itself, with {FLIPS:.2%} of the last bits of its first layer's attention flipped: "
              f"{row['peer_same_scores']} scored the same, {row['peer_same_answers']} word for word"
              if "peer_same_scores" in row else "")
    return (f"- {row['case']}: {row['items']} items, {row['right']} right; {row['same_scores']} scored the same, "
            f"{row['same_answers']} word for word; {3600/row['ours']:.0f} items an hour against "
            f"{3600/row['theirs']:.0f} of {row['peer']}" + (f" at batch size {row['batch']}" if "batch" in row else "")
            + itself)


def limit_line(row):
    "Return how far a row is from the machine's limit, as a Markdown list's line."
    times, length = row["ours"]/row["limit"], f" at {row['length']:,} tokens" if "length" in row else ""
    past = "past it: the limit is what torch reached, at another moment"
    away = f"a factor of {times:.2g} away" if times >= 1 else past
    why = next((text for name, text in NEXT.items() if row["case"].startswith(name)), None)
    return (f"- **{row['case']}**{length}: {row['of_limit']:.1%} of the limit, which is {row['bound']}: {away}"
            + (f". {why[0].upper()}{why[1:]}." if why and times > 1.5 else "."))


def limit_statement(rows, limits):
    "Return how far each row that states its work is from the machine's limit, as Markdown."
    first = {(row["case"], row.get("length")): row for row in reversed(rows) if "limit" in row}
    machine = (f"This machine copies {limits['copy']/1e9:.1f} GB/s, and torch multiplies matrices of {good_dtype()} at "
               f"{limits['matrix']/1e9:.0f} GFLOP/s on it; bfloat16 is {matrix_ratio():.1f} times as fast as float32.")
    return "\n".join([machine, "", *map(limit_line, reversed(first.values()))]) + "\n"


def bench_markdown(rows, limits=None, left_out=()):
    "Return the rows of a bench as Markdown, under the machine and the versions they were measured with."
    lines = [*heading(), "| case | length | peer | ratio | lowest … highest | ours | theirs | repeats | asked |",
             "|---|---|---|---|---|---|---|---|---|", *map(table_line, rows)]
    answered = [row for row in rows if "same_scores" in row and not row["case"].endswith("_with_load")]
    if answered: lines += ["", "## The same answers", "", *map(answers_line, answered)]
    if limits: lines += ["", "## How far from the machine's limit", "", limit_statement(rows, limits)]
    if left_out: lines += ["", "## Not measured", "", *(f"- {name}: {why}" for name, why in left_out)]
    return "\n".join(lines) + "\n"
