"""Two ways to do the same work, timed in turns; and what the machine itself would allow."""
import statistics
import time
from functools import lru_cache

import torch


class NotHere(Exception):
    "Why a case cannot be measured on this machine."


def pair_row(case,   # what is timed
             peer,   # what it is compared with
             pairs,  # [(our seconds, their seconds)]
             unit="s",
             **more  # what else the row holds: length, work, …
             ):      # dict(case, peer, ratio, ours, theirs, unit, repeats, spread, …): medians, theirs over ours
    "Return a row of the bench; `spread` holds the lowest and the highest ratio of a pair."
    ratios = [theirs/ours for ours, theirs in pairs]
    ours, theirs = (statistics.median(times) for times in zip(*pairs))
    return dict(case=case, peer=peer, ratio=round(statistics.median(ratios), 3), ours=ours, theirs=theirs, unit=unit,
                repeats=len(pairs), spread=[round(min(ratios), 3), round(max(ratios), 3)], **more)


def seconds(function, clock=time.perf_counter):
    "Return how long a call takes, in seconds."
    start = clock()
    function()
    return clock() - start


def side_by_side(case,     # what is timed
                 ours,     # called without arguments
                 peer,     # what it is compared with
                 theirs,   # the same work, called without arguments
                 repeats,  # of each, in turns, after a first call that is not counted
                 **more    # what else the row holds
                 ):        # a row
    "Time two ways to do the same work."
    if repeats < 1: raise ValueError(f"repeats={repeats} is not a number of repeats: at least 1 is needed")
    ours(), theirs()
    return pair_row(case, peer, [(seconds(ours), seconds(theirs)) for _ in range(repeats)], **more)


def best_seconds(function, device, tries=6):
    "Return the shortest of several calls, each waited for until the device is done."
    def whole():
        function()
        if device.startswith("cuda"): torch.cuda.synchronize()
    alone = device == "cpu" and torch.get_num_threads() == 1 # processor time, which other work hardly stretches
    return min(seconds(whole, time.process_time if alone else time.perf_counter) for _ in range(tries))


def machine_limits(dtype="bfloat16",  # of the matrix product
                   device="cpu",
                   megabytes=256,     # of the copy
                   size=2048          # rows and columns of the matrices
                   ):                 # dict(copy=bytes moved a second, matrix=operations a second)
    "Measure what this machine copies and multiplies in a second."
    source = torch.ones(megabytes*2**18, device=device)
    target, matrix = torch.empty_like(source), torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    return dict(copy=2*4*source.numel()/best_seconds(lambda: target.copy_(source), device),
                matrix=2*size**3/best_seconds(lambda: matrix @ matrix, device))


def with_limit(row, limits):
    "Return the row with `limit` (seconds), what sets it (`bound`) and our share of it, if the row states its work."
    if not (work := row.get("work")): return row
    takes = {"copying": work.get("bytes", 0)/limits["copy"], "matrix products": work.get("flops", 0)/limits["matrix"]}
    bound = max(takes, key=takes.get)
    return {**row, "limit": takes[bound], "bound": bound, "of_limit": round(takes[bound]/row["ours"], 4)}


@lru_cache(maxsize=1)
def matrix_ratio(): # bfloat16's rate over float32's
    "Measure how much faster this CPU multiplies matrices of bfloat16 than of float32."
    rate = {dtype: machine_limits(dtype, megabytes=1, size=1024)["matrix"] for dtype in ("bfloat16", "float32")}
    return rate["bfloat16"]/rate["float32"]


GAIN = 1.3 # of bfloat16 over float32, from which it is worth its digits

def good_dtype(): # "bfloat16" or "float32"
    "Return what this CPU is good at: bfloat16 where it has products of it, float32 where it emulates them."
    return "bfloat16" if matrix_ratio() >= GAIN else "float32"
