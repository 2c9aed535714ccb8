"""Reading a prompt with the package's own attention kernel against everything that torch offers, on this CPU.

    python benchmarks/cpu_kernels.py --lengths 1024 4096 --threads 1 --repeats 3
    python benchmarks/cpu_kernels.py --ways fused sdpa      # without the minutes that compiling takes

Every way reads the same tokens into a cache of keys and values and gives the logits after the last one, in bfloat16.
The ways run in turns, and what is reported are medians of the ratios to `fused`: of the wall time, and of the time that
the process had of the CPUs, which another process on the machine hardly changes. A way that fails is named with its
reason.
"""
import argparse
import os
import statistics
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from pispiral.base.text import first_line
from pispiral.model.cache import new_cache
from pispiral.model.load import load_model, resolve
from pispiral.model.prefill import prefill

MODEL = "smollm2-135m-instruct"
LAYERS = dict(kept=None)  # None: all; compiling takes minutes for thirty layers and seconds for four


def first_layers(model):
    "The model with its first layers only, if fewer were asked for."
    if LAYERS["kept"]:
        model.model.layers = model.model.layers[:LAYERS["kept"]]
        model.config.num_hidden_layers = LAYERS["kept"]
    return model


def package_way(backend):
    "This package, chunk by chunk as it reads prompts."
    model = first_layers(load_model(MODEL, dtype="bfloat16", attn_backend=backend)[0])
    @torch.inference_mode()
    def read(ids): return prefill(model, ids, new_cache(model, len(ids)))
    return read


def transformers_model(implementation):
    "The model as transformers has it."
    return first_layers(AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=torch.bfloat16,
                                                             attn_implementation=implementation).eval())


def transformers_way(implementation="sdpa"):
    "transformers, the whole prompt in one pass."
    model = transformers_model(implementation)
    @torch.inference_mode()
    def read(ids):
        out = model(torch.from_numpy(ids)[None], past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float()
    return read


def compiled_way(implementation, mode):
    "transformers compiled for one length, weights frozen so that oneDNN has them packed; the prompt in one pass."
    import torch._inductor.config as inductor
    inductor.freezing = True
    model = transformers_model(implementation)
    def whole(ids):
        out = model(ids, use_cache=True, logits_to_keep=1)
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    run = torch.compile(whole, mode=mode, dynamic=False)
    @torch.no_grad()
    def read(ids): return run(torch.from_numpy(ids)[None])[0][0, -1].float()
    return read


WAYS = {
    "fused": lambda: package_way("fused"),
    "sdpa": lambda: package_way("sdpa"),
    "transformers": transformers_way,
    "compiled": lambda: compiled_way("sdpa", "default"),
    "autotuned": lambda: compiled_way("sdpa", "max-autotune"),
    "compiled flex": lambda: compiled_way("flex_attention", "default"),
}


def timed(read, ids):
    "Return (wall seconds, CPU seconds) of one reading."
    wall, cpu = time.perf_counter(), time.process_time()
    read(ids)
    return time.perf_counter() - wall, time.process_time() - cpu


def first_readings(ways, ids):
    "Return each way's logits, without those of ways that fail; the first reading is where compiling happens."
    logits = {}
    for name in list(ways):
        begin = time.perf_counter()
        try: logits[name] = [ways[name](ids) for _ in range(2)][1]  # the second may compile anew
        except Exception as e: # whatever a compiler says
            print(f"{name} failed at {len(ids)} tokens: {type(e).__name__}: {first_line(str(e))[:200]}")
            del ways[name]
        else: print(f"{name}, {len(ids)} tokens, first: {time.perf_counter() - begin:.0f} s", flush=True)
    return logits


def compare(ways, length, repeats):
    "Print one length's rows of the table."
    ids = np.random.default_rng(0).integers(100, 40000, length)
    ways = dict(ways)
    logits, seconds = first_readings(ways, ids), {name: [] for name in ways}
    for _ in range(repeats):
        for name, read in ways.items(): seconds[name].append(timed(read, ids))
    for name in ways:
        wall, cpu = (statistics.median(t) for t in zip(*seconds[name]))
        ratios = (statistics.median(a[i]/b[i] for a, b in zip(seconds[name], seconds["fused"])) for i in (0, 1))
        off = float((logits[name] - logits["fused"]).norm()/logits["fused"].norm())
        print(f"| {length} | {name} | {wall:.2f} | {cpu:.2f} | {' | '.join(f'{r:.2f}' for r in ratios)} | {off:.1%} |",
              flush=True)


def main():
    "Read the command line and print the table."
    parser = argparse.ArgumentParser(description="Time the package's attention kernel against torch's own ways.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of the model, from the first; default: all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    LAYERS["kept"] = args.layers
    ways = {name: WAYS[name]() for name in dict.fromkeys(["fused", *args.ways])}
    print(f"{torch.backends.cpu.get_cpu_capability()}, threads: {args.threads}, layers: {args.layers or 'all'}, "
          f"torch {torch.__version__}\n")
    print("| tokens | way | wall s | CPU s | wall / fused | CPU / fused | logits differ |\n" + "| --- "*7 + "|")
    for length in args.lengths: compare(ways, length, args.repeats)


if __name__ == "__main__": main()
