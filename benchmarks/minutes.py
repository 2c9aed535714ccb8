"""Where a run's minutes went: each phase, its questions, and those at 8,192 tokens and more with full attention."""
import json
import sys
from pathlib import Path

import pandas as pd

from pispiral.evidence.records import read_log
from pispiral.lab.places import repository


def phase_minutes(folder):
    "Return {phase: minutes} of a run's phases."
    return {int(path.parent.name[6:]): json.loads(path.read_text(encoding="utf-8"))["seconds"]/60
            for path in sorted(folder.glob("phase_*/result.json"))}


def question_minutes(folder):
    "Return a table of a run's questions: phase, minutes, whether far with full attention, whether a duplicate."
    return pd.DataFrame([dict(phase=int(path.parent.name[6:]), questions=r["seconds"]/60, duplicates="same_as" in r,
                              far=r["length"] >= 8192 and r["window"] is None)
                         for path in sorted(folder.glob("phase_*/items.jsonl")) for r in read_log(path)])


def minutes_table(folder):
    "Return minutes by phase and in all, and how many duplicates cost nothing."
    asked, phases = question_minutes(folder), phase_minutes(folder)
    table = pd.DataFrame({"phase": phases, "questions": asked.groupby("phase").questions.sum(),
                          "far, full attention": asked[asked.far].groupby("phase").questions.sum(),
                          "duplicates": asked.groupby("phase").duplicates.sum()}).fillna(0)
    table.loc["all"] = table.sum()
    return table.round(1)


if __name__ == "__main__":
    print(minutes_table(Path(sys.argv[1]) if sys.argv[1:] else repository()/"runs"/"reference").to_string())
