"The CPU attention kernel: its structs, its refusals, and its memory under the sanitizers."
import ctypes
import os
import subprocess
import sys

import pytest

from pispiral.base.native import compiler
from pispiral.model import backends, kernels

# what runs in a process of its own, whose every allocation is the sanitizer's
SANITIZED = """
import torch
from pispiral.model import kernels
kernels.CPU_FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
torch.set_num_threads(2)
{before}
for case, output, lse in kernels.kernel_errors(): assert output < .025 and lse < .008, (case, output, lse)
print("compared", len(kernels.CASES))
"""
TOO_LITTLE = "kernels.values_scratch = lambda key, L, span: key.new_empty(64)"


@pytest.fixture
def kernel():
    "The kernel's module, where the kernel runs."
    if missing := kernels.missing_requirement(): pytest.skip(f"this machine lacks {missing}")
    return kernels


@pytest.fixture
def sanitized(kernel, tmp_path):
    "Run the kernel's own comparison, compiled with the sanitizers, after some lines of Python."
    library = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library): pytest.skip("the compiler has no libasan.so")
    env = {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "PISPIRAL_CACHE": str(tmp_path)}
    def run(before=""):
        return subprocess.run([sys.executable, "-c", SANITIZED.format(before=before)], env=env, capture_output=True,
                              text=True, encoding="utf-8", timeout=900)
    return run


def test_structs_are_as_large_as_the_library_says(kernel):
    assert kernel.kernel_library().call_size() == ctypes.sizeof(kernel.Call)


def test_the_source_is_package_data():
    assert {p.name for p in kernels.SOURCE.parent.iterdir()} == {"attention.cpp", "attention.h", "bf16.h"}


def test_another_size_of_head_is_refused_by_the_library(kernel):
    assert kernel.kernel_library().attention(None, 48) == 1


def test_auto_is_sdpa_on_a_cpu():
    assert backends.check_backend("auto", "cpu", "bfloat16") == "sdpa"


def test_a_kernel_that_cannot_run_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(backends, "missing_requirement", lambda: "a C++ compiler (g++, or $CXX)")
    with pytest.raises(ValueError, match=r"attn_backend='fused' needs a C\+\+ compiler .*: allowed on cpu: auto, sdpa"):
        backends.check_backend("fused", "cpu", "bfloat16")


@pytest.mark.slow
def test_no_sanitizer_complains(sanitized):
    done = sanitized()
    assert done.returncode == 0 and f"compared {len(kernels.CASES)}" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
def test_the_sanitizer_sees_a_buffer_that_is_too_small(sanitized):
    done = sanitized(TOO_LITTLE)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
