"The attractor's Triton kernels: interpreted against the plain form, and compiled for a GPU that need not be there."
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def alone(code, **env):
    "Run Python code in a process of its own, from the repository."
    env = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **env}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


INTERPRETED = """
import torch
from pispiral.memory.attractor import scan
from pispiral.memory.scan import unit_vectors
g = torch.Generator().manual_seed(0)
for B, L, d, H, own in ((1, 1, 3, 1, 0), (2, 31, 5, 2, 1), (1, 64, 66, 1, 0), (2, 65, 4, 1, 1)):
    e = unit_vectors(torch.arange(L*(B if own else 1)).view(-1, L), "phi", H)
    given = torch.randn(B, L, d, generator=g), torch.tensor(-.05).double(), torch.randn(B, 2*H, d, generator=g)
    seen = []
    for backend in ("torch", "triton"):
        h, log_alpha, state = args = [x.clone().requires_grad_() for x in given]
        y, C = scan(h, e, log_alpha, state, backend=backend)
        ((y**3).sum() + (C**2).sum()).backward()
        seen.append((y, C, *(x.grad for x in args)))
    for want, got in zip(*seen): assert (got - want).abs().max() <= 2e-5*want.abs().max(), (B, L, d, H)
print("agree")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pispiral.memory import triton as room
for kernel, flags in ((room.sums_kernel, {}), (room.filter_kernel, {}), (room.adjoint_sums_kernel, {}),
                      (room.adjoint_kernel, dict(learned=1))):
    fixed = dict(flags, T=room.TOKENS, W=room.CHANNELS, H=1)
    kind = {"h": "*bf16", "dh": "*bf16"} | dict.fromkeys(("L", "K", "d", "e_batch"), "i32") | dict.fromkeys(
        fixed, "constexpr")
    signature = {name: kind.get(name, "*fp32") for name in kernel.arg_names}
    assert triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 80, 32)).asm["ptx"]
print("compiled")
"""

ABSENT = """
import sys
sys.modules["triton"] = None
import torch
from pispiral.memory.attractor import scan
from pispiral.memory.scan import unit_vectors
assert "pispiral.memory.triton" not in sys.modules
try: scan(torch.ones(1, 2, 3), unit_vectors(torch.arange(2))[None], -1., backend="triton")
except ValueError as said: print(said)
"""


@needs_triton
def test_triton_kernels_under_the_interpreter():
    assert alone(INTERPRETED, TRITON_INTERPRET="1").strip() == "agree"


@needs_triton
def test_triton_kernels_compile():
    assert alone(COMPILED).strip() == "compiled"


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_needs_a_gpu():
    code = ABSENT.replace('sys.modules["triton"] = None\n', "")
    assert alone(code).strip().startswith("backend='triton' needs h on a CUDA device, not on cpu")


def test_without_triton():
    assert alone(ABSENT).strip().startswith("backend='triton' needs the package triton")
