"Work for workers that needs nothing but a processor; a module of its own, so that a worker starts quickly."
import os
from collections import namedtuple

from pispiral.evidence.executors import Cell, Job

Answer = namedtuple("Answer", "key read pid value")


def load(spec, device, threads): return spec["rounds"]


def work(rounds, cell, tick):
    "As long for every question."
    for key, x in zip(cell.keys, cell.asked):
        for _ in range(rounds): x = (x*6364136223846793005 + 1442695040888963407) % 2**64
        yield Answer(key, 1, os.getpid(), x)


def cells(n, each):
    rows = [tuple(range(i*each, i*each + each)) for i in range(n)]
    return [Cell(row, row, {}, each) for row in rows]


def job(rounds): return Job(load, work, dict(rounds=rounds))


def here(rounds, cells): # {key: value}
    return {a.key: a.value for cell in cells for a in work(rounds, cell, None)}
