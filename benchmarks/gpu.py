"""Prefill, the Triton attractor and the attention backends on a GPU, where one is at hand."""
import importlib.util
from functools import partial

import torch
from timing import NotHere, side_by_side

from pispiral.codes.registry import code
from pispiral.evidence.profiling import Shape, reading_work
from pispiral.memory.attractor import AttractorState, scan
from pispiral.memory.scan import unit_vectors
from pispiral.model.backends import BACKENDS, check_backend
from pispiral.model.load import best_dtype, set_code
from pispiral.model.shapes import random_model
from pispiral.model.cache import new_cache
from pispiral.model.prefill import prefill


def synced(function, device):
    "Return `function` so that it returns when the device is done."
    def whole():
        function()
        if device.startswith("cuda"): torch.cuda.synchronize()
    return whole


def usable_backends(device, dtype):
    "Yield the attention backends that this device has."
    for name in BACKENDS:
        try: yield check_backend(name, device, dtype)
        except ValueError: continue


def matrix_products(flops, model, size=4096):
    "Return a function that multiplies matrices for as many operations as asked."
    a, b = torch.randn(2, size, size, dtype=model.dtype, device=model.device)
    return lambda: [a @ b for _ in range(max(1, round(flops/(2*size**3))))]


def prefill_cases(repeats, model, length, size=4096, window=1024, chunk=1024):
    "Reading by each backend against as many operations in matrix products (their ratio is the MFU), and against sdpa."
    device, flops = model.device.type, sum(reading_work(Shape.of(model.config), 0, length, window))
    ids, products = torch.arange(length) % model.config.vocab_size, synced(matrix_products(flops, model, size), device)
    def read(backend):
        set_code(model, code("rope"), window, 0, backend)
        prefill(model, ids, new_cache(model, chunk=chunk), chunk)
    def reading(backend): return synced(partial(read, backend), device)
    for backend in usable_backends(device, str(model.dtype)[6:]):
        yield side_by_side(f"gpu_prefill_{backend}", reading(backend), "matrix_products", products, repeats,
                           length=length, work=dict(flops=flops))
        if backend != "sdpa":
            yield side_by_side(f"gpu_backend_{backend}", reading(backend), "sdpa", reading("sdpa"), repeats,
                               length=length)


def linear_attention(h, e, log_alpha):
    "Return flash-linear-attention's call that does the attractor's work."
    from fla.ops.simple_gla import chunk_simple_gla  # optional, and only on a GPU
    k, v = e.to(torch.bfloat16)[:, :, None], h.to(torch.bfloat16)[:, :, None]
    decay = torch.full((1, h.shape[1], 1), float(log_alpha), device=h.device)
    return lambda: chunk_simple_gla(k, k, v, decay)


def attractor_cases(repeats, device, length, d):
    "The attractor's scan against a copy, and against flash-linear-attention's simple_gla."
    h, e = torch.randn(1, length, d, device=device), unit_vectors(torch.arange(length, device=device)[None])
    state = AttractorState(d, N=length).to(device)
    y = scan(h, e, state.log_alpha)[0]
    timed = partial(side_by_side, "gpu_attractor", synced(lambda: scan(h, e, state.log_alpha), device), repeats=repeats,
                    length=length)
    yield timed("copy", synced(lambda: (h.clone(), e.clone(), y.clone()), device),
                work=dict(bytes=4*(h.numel() + e.numel() + y.numel())))
    if importlib.util.find_spec("fla"):
        yield timed("flash_linear_attention", synced(linear_attention(h, e, state.log_alpha), device))


def gpu_cases(repeats, device="cuda", length=16384, layers=8, d=1536):
    "Yield the rows of a GPU; NotHere without one."
    if not torch.cuda.is_available(): raise NotHere("no CUDA device")
    with torch.inference_mode():
        yield from prefill_cases(repeats, random_model("qwen2.5-1.5b", layers, best_dtype(device), device)[0], length)
        yield from attractor_cases(repeats, device, length, d)
