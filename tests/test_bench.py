"The benchmarks' own arithmetic, and that their peers do the same work; small rounds, whose times say nothing."
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT/"benchmarks"))
import answering
import attractor
import bench
import gpu
import items
import minutes
import timing
from rotations import rotation_cases
from table import bench_markdown, with_aim
from timing import machine_limits, pair_row, side_by_side, with_limit

from pispiral.memory.attractor import AttractorState, scan
from pispiral.memory.scan import recurrent, unit_vectors
from pispiral.tasks.assets import model_folder, prose
from pispiral.tasks.registry import make_item
from pispiral.tasks.scoring import score


def tiny_llama(**config):
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **config)).eval()


def test_a_ratio_is_theirs_over_ours():
    naps = side_by_side("short_nap", partial(time.sleep, .02), "long_nap", partial(time.sleep, .06), 3, length=3)
    assert 1.5 < naps["ratio"] < 6
    assert list(naps) == ["case", "peer", "ratio", "ours", "theirs", "unit", "repeats", "spread", "length"]
    assert pair_row("a", "b", [(1, 2), (1, 3), (2, 2)])["spread"] == [1., 3.]
    assert "limit" not in with_limit(naps, dict(copy=1, matrix=1))
    with pytest.raises(ValueError, match="repeats=0"): side_by_side("a", print, "b", print, 0)


def test_a_row_is_set_against_the_machines_limit():
    assert min(machine_limits("float32", megabytes=8, size=256).values()) > 1e8
    row = with_limit(pair_row("a", "b", [(2., 2.)], work=dict(bytes=100, flops=10)), dict(copy=100, matrix=100))
    assert (row["limit"], row["bound"], row["of_limit"]) == (1, "copying", .5)


def test_what_is_asked_of_a_row_is_met_or_missed():
    assert with_aim(pair_row("rotation_hybrid", "transformers", [(1., .9)]))["met"] is False
    assert with_aim(pair_row("papermill_phase", "python", [(7., 3.)]))["met"] is True
    assert "met" not in with_aim(pair_row("nap", "python", [(7., 3.)]))


def test_the_table_has_each_row_and_what_was_not_measured():
    limits = dict(copy=1e10, matrix=1e11)
    rows = [*attractor.attractor_cases(1, length=2048, d=32), *rotation_cases(1, lengths=(64,))]
    table = bench_markdown([with_aim(with_limit(r, limits)) for r in rows], limits, [("gpu", "no CUDA device")])
    assert sum(line.startswith("| ") for line in table.splitlines()) == 1 + len(rows)
    assert "- gpu: no CUDA device" in table and "**attractor_chunked** at 2,048 tokens" in table
    assert [r["peer"] for r in rows[:6]] == ["lfilter", "lfilter_complex64", "copy", "torch_loop", "associative_scan",
                                             "torch_loop"]


def test_the_command_names_an_unknown_case():
    command = [sys.executable, ROOT/"benchmarks"/"bench.py", "--case", "atractor"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and "did you mean 'attractor'" in done.stderr
    with pytest.raises(ValueError, match="repeats=0"): bench.bench(ROOT/".cache"/"bench", ["rotation"], 0)


def test_the_attractors_peers_do_the_same_work():
    h, e, state = torch.randn(1, 300, 8), unit_vectors(torch.arange(300)[None]), AttractorState(8, N=300)
    assert torch.allclose(attractor.loop(h, e, state.alpha), recurrent(h, e, state.log_alpha)[1], atol=1e-4)
    y = torch.view_as_real(attractor.associative(h[0].to(torch.complex64), attractor.filter_pole(state)))
    assert torch.allclose(y.mT, scan(h, e, state.log_alpha)[0][0], atol=1e-4)


def test_rulers_search_finds_the_most_words_that_fit():
    tok, words = AutoTokenizer.from_pretrained(model_folder()), prose()[0].split()[:3000]
    size = lambda n: len(items.token_ids(tok, " ".join(words[:n]))) + 128
    found = len(items.ruler_search(tok, words, 1024, step=50))
    assert size(found) <= 1024 < size(found + 1)


def test_an_engine_answers_in_a_process_of_its_own():
    tok = AutoTokenizer.from_pretrained(model_folder())
    needle = [make_item(tok, "niah_single_1", 400)]
    with answering.Engine("pispiral") as engine: said, _ = engine.ask(answering.questions(needle))
    assert score(needle[0], said[0])["score"] == 1
    assert answering.agreement(needle, said, ["it is 12"]) == dict(items=1, same_answers=0, same_scores=0, right=1)
    about = dict(length=400, batch=1, **answering.agreement(needle, said, said))
    rows = list(answering.answer_rows("niah", "lm_eval", [((said, 2.), (said, 6.))], [(1., 5.)], needle, about, tok))
    assert [r["ratio"] for r in rows] == [3., 3.667]
    assert {(r["same_answers"], r["same_scores"], r["right"]) for r in rows} == {(1, 1, 1)}
    with pytest.raises(answering.NotHere, match=".cache/bench_nobody.log"): answering.Engine("nobody")


def test_the_bench_computes_in_what_the_machine_is_good_at(monkeypatch):
    for ratio, dtype in ((3.2, "bfloat16"), (.4, "float32")):
        monkeypatch.setattr(timing, "matrix_ratio", lambda: ratio)
        assert timing.good_dtype() == dtype


def test_every_engine_is_set_against_both_of_ours_in_turns():
    "Stand-ins that answer at once: who is not here is named after all rows."
    class Fixed:
        load = 2.
        def __init__(self, seconds): self.seconds, self.asked = seconds, []
        def ask(self, asked, batch=1, **how):
            self.asked.append(batch)
            return ["it is 12"]*len(asked), self.seconds*len(asked)
    tok = AutoTokenizer.from_pretrained(model_folder())
    some = [make_item(tok, "niah_single_1", 400, seed=s) for s in range(2)]
    class Gone(Fixed):
        def ask(self, *a, **how): raise answering.NotHere("its process ended")
        def close(self): self.asked.append("closed")
    gone = Gone(1.)
    engines = dict(pispiral=Fixed(2.), kernels=Fixed(1.), lm_eval=Fixed(6.), vllm=Fixed(3.), generate=gone)
    rows = list(answering.cell_rows("niah_item_1k", engines, {name: [4.] for name in engines}, some, 1,
                                    dict(length=400, batch=4), tok, absent := {}))
    assert absent == {"generate": "its process ended"} and gone.asked == ["closed"] and "generate" not in engines
    assert {(r["case"], r["peer"]): r["ratio"] for r in rows if not r["case"].endswith("load")} == {
        ("niah_item_1k", "lm_eval"): 3, ("niah_item_1k_kernels", "lm_eval"): 6,
        ("niah_item_1k", "vllm"): 1.5, ("niah_item_1k_kernels", "vllm"): 3}
    assert engines["lm_eval"].asked[0] == 4 and set(engines["vllm"].asked) == {1}
    assert with_aim(rows[0])["met"] and "of vllm" in bench_markdown(rows)


def test_last_bits_are_flipped_the_same_way_each_time_and_only_while_asked():
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2).to(torch.bfloat16)
    def logits(share):
        with answering.flipped_bits(model, share), torch.inference_mode(): return model(torch.arange(40)[None]).logits
    plain = logits(0)
    assert [torch.equal(logits(share), plain) for share in (0, .5, 0)] == [True, False, True]
    assert torch.equal(logits(.5), logits(.5))
    assert (logits(1) - plain).abs().max() < .1


def test_the_gpu_cases_run_small_on_a_cpu():
    if not torch.cuda.is_available():
        with pytest.raises(gpu.NotHere, match="no CUDA device"): next(gpu.gpu_cases(1))
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=100,
                       max_position_embeddings=256)
    with torch.inference_mode():
        rows = [*gpu.prefill_cases(1, model, 128, size=64, window=32), *gpu.attractor_cases(1, "cpu", 128, 16)]
    assert {("gpu_prefill_sdpa", "matrix_products"), ("gpu_attractor", "copy")} <= {(r["case"], r["peer"])
                                                                                    for r in rows}


def test_where_the_reference_runs_minutes_went():
    total = minutes.minutes_table(ROOT/"runs"/"reference").loc["all"]
    assert total["questions"] > total["far, full attention"] > 0 and total["duplicates"] > 0


def test_importing_the_package_leaves_torch_alone():
    subprocess.run([sys.executable, "-c", "import sys, pispiral; sys.exit('torch' in sys.modules)"], check=True)
