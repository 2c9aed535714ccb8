"Published sets from files of their own form, made by hand: Parquet and JSON Lines as they lie on the hub."
import json
import re
from hashlib import sha256

import pytest

datasets = pytest.importorskip("datasets", minversion="4")
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from pispiral.evidence.cells import cell_metrics, item_record
from pispiral.evidence.settings import Setting
from pispiral.codes.registry import code
from pispiral.lab.phases import benchmarks
from pispiral.tasks import published
from pispiral.tasks.assets import model_folder
from pispiral.tasks.registry import make_item
from pispiral.tasks.scoring import score

BOOK = " ".join(f"On day {i} the keeper wrote {i*i} lines." for i in range(400))
PASSAGES = "\n\n".join(f"Passage {i}:\nTown {i}\nTown {i} lies by river {i*7}." for i in range(1, 41))


def parquet(path, rows):
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path, monkeypatch):
    "A folder with a copy of every set, each in its own layout."
    def squad(i, paragraph, *answers):
        return dict(id=f"q{i}", title="Light", context=paragraph, question=f"What is asked {i}?",
                    answers=dict(text=list(answers), answer_start=[0]*len(answers)))
    parquet(tmp_path/"rajpurkar"/"squad_v2"/"squad_v2"/"validation-00000-of-00001.parquet",
            [squad(0, "The lamp burns oil.", "oil", "oil", "burns oil"), squad(1, "Nobody knows."),
             squad(2, "The tower is white.", "white")])
    parquet(tmp_path/"rajpurkar"/"squad_v2"/"other"/"train-00000-of-00001.parquet", [squad(9, "Not this.", "x")])
    parquet(tmp_path/"hotpot_qa"/"distractor"/"validation-00000-of-00001.parquet",
            [dict(id=str(i), question=f"Who keeps light {i}?", answer=f"Ada {i}", type="bridge", level="hard",
                  supporting_facts=dict(title=[f"Light {i}"], sent_id=[0]),
                  context=dict(title=[f"Light {i}", f"Ada {i}"],
                               sentences=[[f"Light {i} is kept", f" by Ada {i}."], [f"Ada {i} was born at sea."]]))
             for i in range(3)])
    for name in ("2wikimqa", "musique"):
        lines(tmp_path/"longbench"/"data"/f"{name}.jsonl",
              [dict(input=f"Where is {name} {i}?", context=PASSAGES, answers=[f"river {i}", f"river {i}"], length=300,
                    dataset=name, language="en", all_classes=None, _id=f"{name}{i}") for i in range(2)])
    infinite = tmp_path/"infinitebench"
    for task, answer, options in (("longbook_qa_eng", ["a keeper"], []),
                                  ("longbook_sum_eng", ["The keeper wrote."], []),
                                  ("longbook_choice_eng", ["ink"], ["oil", "ink", "salt", "rope"]),
                                  ("longdialogue_qa_eng", ["ADA"], [])):
        lines(infinite/f"{task}.jsonl", [dict(id=i, context=text, input=f"Which {i}?", answer=answer, options=options)
                                         for i, text in enumerate((BOOK, "The keeper wrote a little."))])
    lines(tmp_path/"baber"/"paul_graham_essays"/"data"/"train.jsonl",
          [dict(title=f"Essay {i}", text=f"Make what people want, said {i} founders. Ship it early! "*30)
           for i in range(4)])
    clear()
    monkeypatch.setenv("PISPIRAL_DATA", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path/"cache"))
    yield tmp_path
    clear()


def clear():
    for cached in (published.rows_or_why, published.essays, benchmarks.why_unreachable): cached.cache_clear()


@pytest.fixture(scope="module")
def tok(): return PreTrainedTokenizerFast.from_pretrained(model_folder("smollm2-135m-instruct"))


def test_every_set_is_read_with_its_version(data):
    for name in published.PUBLISHED:
        rows = published.fetch_rows(name, "longbook_qa_eng") if name == "infinitebench" else published.fetch_rows(name)
        assert len(rows) and re.fullmatch("sha256 [0-9a-f]{16}", published.revision_of(rows)), name
    file = data/"longbench"/"data"/"musique.jsonl"
    assert published.published_revision("musique") == f"sha256 {sha256(file.read_bytes()).hexdigest()[:16]}"


@pytest.mark.parametrize("task, answers, held", [
    ("qa_1", ("oil", "burns oil"), "The lamp burns oil."), ("qa_2", ("Ada 0",), "Light 0 is kept by Ada 0."),
    ("multidoc_hotpotqa", ("Ada 0",), "Ada 0 was born at sea."),
    ("multidoc_2wikimqa", ("river 0",), "Town 3 lies by river 21."), ("multidoc_musique", ("river 0",), "Town 40")])
def test_published_questions_over_documents(data, tok, task, answers, held):
    it = make_item(tok, task, 2048, source="published")
    assert it.expected == answers and held in tok.decode(it.ids) and len(it.ids) + it.max_new == it.length == 2048
    assert it.source.startswith("published ") and it.revision.startswith("sha256 ") and it.cut == 0
    offline = make_item(tok, task, 2048)
    assert offline.source.startswith("offline variant of ") and offline.revision is None


def test_too_long_documents_lose_the_middle_of_the_prompt(data, tok):
    cut = make_item(tok, "multidoc_musique", 300, source="published")
    assert cut.cut > 0 and len(cut.ids) + cut.max_new == cut.length == 300 and cut.needle_at is None
    text = tok.decode(cut.ids) # the first and the last passages of the row, and nothing else
    kept = [int(n) for n in re.findall(r"Passage (\d+):", text)]
    assert kept[0] == 1 and kept[-1] == 40 and len(kept) < 20 and max(b - a for a, b in zip(kept, kept[1:])) > 20
    assert set(re.findall(r"[A-Z]\w+ \d+ lies", text)) <= {f"Town {n} lies" for n in kept}
    with pytest.raises(ValueError, match="length=300 is too short"):
        make_item(tok, "multidoc_musique", 300, source="published", truncate=False)


@pytest.mark.parametrize("task", ["longbook_qa_eng", "longbook_sum_eng", "longbook_choice_eng", "longdialogue_qa_eng"])
def test_a_book_has_its_own_length_or_loses_its_middle(data, tok, task):
    whole, short = make_item(tok, task, 10**5), make_item(tok, task, 10**5, seed=1)
    for it in (whole, short): assert it.length == len(it.ids) + it.max_new < 10**5 and it.cut == 0
    for length in (1600, 1601):
        it = make_item(tok, task, length)
        n = (length - it.max_new)//2
        assert it.length == length == len(it.ids) + it.max_new and it.cut == len(whole.ids) - len(it.ids) > 0
        assert list(it.ids[:n]) == list(whole.ids[:n]) and list(it.ids[-n:]) == list(whole.ids[-n:])
        assert (it.source, it.revision) == (whole.source, whole.revision) and it.revision.startswith("sha256 ")
    with pytest.raises(ValueError, match="length=1600 is too short"): make_item(tok, task, 1600, truncate=False)


def test_records_hold_version_cut_length_and_rouge(data, tok):
    setting = Setting("tiny", "rope", code("rope"), None, "float32", "cpu", 64)
    book = make_item(tok, "longbook_sum_eng", 1600)
    record = item_record(book, setting, "The keeper wrote.", 1., 10)
    assert (record["cut"], record["revision"], record["length"]) == (book.cut, book.revision, 1600)
    assert record["rouge"] == record["score"] == 1 and cell_metrics([record])["rouge"] == 1
    earlier = {k: v for k, v in record.items() if k != "rouge"} # written before ROUGE had its own field
    assert cell_metrics([earlier])["rouge"] == 1
    other = item_record(make_item(tok, "longbook_qa_eng", 1600), setting, "a keeper", 1., 10)
    assert "rouge" not in other and cell_metrics([other])["rouge"] is None
    assert score(book, "A keeper sailed.")["rouge"] < 1


def test_rulers_essays(data, tok):
    it = make_item(tok, "niah_single_2", 700, .5, source="published")
    text = tok.decode(it.ids)
    assert "Make what people want" in text and it.expected[0] in text and len(it.ids) + it.max_new == 700
    assert (it.haystack, it.source) == ("essays", "published essays") and it.revision.startswith("sha256 ")
    offline = make_item(tok, "niah_single_2", 700, .5)
    assert (offline.haystack, offline.source, offline.revision) == ("prose", "offline variant of essays: prose", None)
    assert make_item(tok, "niah_single_1", 700).source is None # noise is RULER's own


def test_auto_asks_the_published_set_where_there_is_one(data, tok, monkeypatch):
    def asked():
        clear()
        q = benchmarks.ruler_questions(tok, ["niah_single_2", "qa_1", "vt"], [1100], 1, ["rope"], "auto")
        return {item.task: item.source for step in q.steps for _, item in step}, q.missing
    sources, missing = asked()
    assert missing == [] and sources == {"niah_single_2": "published essays", "qa_1": "published squad", "vt": None}
    for name in ("rajpurkar", "baber"): (data/name).rename(data/f"no {name}")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: 1/0) # a hub that does not answer
    sources, missing = asked()
    assert sources["qa_1"].startswith("offline variant of squad")
    assert sources["niah_single_2"] == "offline variant of essays: prose" and len(missing) == 2
    assert "rajpurkar/squad_v2 is unreachable" in missing[1][1]


def test_the_hubs_commit_is_the_version(monkeypatch):
    "The cache that `datasets` reads from is named after it."
    clear()
    commit, asked = "3ffb306f725f7d2ce8394bc1873b24868140c412", []
    class Rows(list):
        cache_files = [dict(filename=f"cache/rajpurkar___squad_v2/squad_v2/0.0.0/{commit}/squad_v2-validation.arrow")]
    monkeypatch.delenv("PISPIRAL_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or Rows())
    rows = published.fetch_rows("squad")
    assert published.revision_of(rows) == commit
    assert asked == [(("rajpurkar/squad_v2", None), dict(split="validation", features=None))]
    clear()


def test_an_older_library_and_a_damaged_copy_are_named(data, monkeypatch):
    (data/"longbench"/"data"/"musique.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(published.Unreachable, match="Xnhyacinth/LongBench is unreachable"):
        published.fetch_rows("musique")
    clear()
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(published.Unreachable, match="`datasets` 3.6.0 is here, and it takes 4 or later"):
        published.fetch_rows("squad")
