"""Every speed as a ratio against what a user would take instead, measured side by side in one run.

`python benchmarks/bench.py [--case NAME]… [--repeats N]` writes runs/bench/bench.json and bench.md, and prints the
latter. A ratio above 1 means that ours is the faster.
"""
import argparse
import sys
from functools import partial

from answering import ITEMS, LENGTHS, answering_cases
from attractor import attractor_cases
from gpu import gpu_cases
from items import item_cases, task_cases
from overheads import papermill_cases, publish_cases, record_cases, start_cases
from rotations import rotation_cases
from streams import stream_cases
from table import bench_markdown, with_aim
from timing import NotHere, good_dtype, machine_limits, with_limit
from tqdm.auto import tqdm

from pispiral.base.errors import one_of
from pispiral.base.files import write_text
from pispiral.base.text import plain_output
from pispiral.evidence.records import write_json
from pispiral.lab.places import runs_dir

CASES = dict(attractor=attractor_cases, rotation=rotation_cases, stream=stream_cases, start=start_cases,
             papermill=papermill_cases, record=record_cases, item=item_cases, task=task_cases,
             answering=answering_cases, publish=publish_cases, gpu=gpu_cases)


def bench(folder,     # where bench.json and bench.md go
          names=(),   # of `CASES`; none: all
          repeats=5,  # pairs of measurements a case
          **asked):   # of the answering case: items of each task, and lengths
    "Run cases, write what was measured after each, and return the table as Markdown; ValueError on an unknown name."
    chosen = [one_of(name, CASES, "a group of cases", name="case") for name in names] or list(CASES)
    rows, left_out, limits = [], [], machine_limits(good_dtype())
    for name in (bar := tqdm(chosen, desc="bench", file=sys.stderr)):
        try:
            for row in (partial(CASES[name], **asked) if name == "answering" else CASES[name])(repeats):
                bar.set_postfix_str(f"{row['case']} {row['ratio']:.2f}")
                rows.append(with_aim(with_limit(row, limits)))
                write_json(folder/"bench.json", rows)
        except NotHere as e: left_out.append((name, str(e)))
    text = bench_markdown(rows, limits, left_out)
    write_text(folder/"bench.md", text)
    return text


def main():
    "Read the command line and run the bench."
    plain_output()
    parser = argparse.ArgumentParser(description="Time the package against what a user would take instead.")
    parser.add_argument("--case", action="append", default=[], help="a group of cases; may be repeated; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements a case; 1 is a quick look")
    parser.add_argument("--task", action="append", choices=ITEMS, help="of the answering case; may be repeated")
    parser.add_argument("--length", action="append", choices=LENGTHS, help="of the answering case; may be repeated")
    args = parser.parse_args()
    pick = lambda all_, names: {name: all_[name] for name in names or all_}
    asked = dict(items=pick(ITEMS, args.task), lengths=pick(LENGTHS, args.length))
    try: print(bench(runs_dir()/"bench", args.case, args.repeats, **asked))
    except ValueError as e: parser.error(str(e))


if __name__ == "__main__": main()
