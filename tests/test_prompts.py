"A prompt put together from pieces is the prompt that the tokenizer and the chat template make, whatever they are."
import datetime as clock

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from pispiral.tasks import tokens
from pispiral.tasks.assets import prose
from pispiral.tasks.registry import make_item
from pispiral.tasks.tokens import chat_split, frame, line_ids, marks_beginnings, token_ids

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
INST = "<s>[INST] {{ messages[0].content }} [/INST]"
SPECIAL = "<s><|user|>{{ messages[0].content }}<|im_end|><|assistant|>"
PLAIN = "User: {{ messages[0].content }}\nAssistant:"
TEMPLATES = dict(chatml=CHATML, inst=INST, special=SPECIAL, plain=PLAIN, none=None)
MARKS = ["<s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]


def metaspace(scheme):
    return dict(pre=pre_tokenizers.Metaspace(prepend_scheme=scheme), decode=decoders.Metaspace(prepend_scheme=scheme))


KINDS = {
    "metaspace, first": metaspace("first"), "metaspace, always": metaspace("always"),
    "metaspace, never": metaspace("never"),
    "prepended": dict(normal=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
                      pre=pre_tokenizers.Split("▁", "merged_with_next"),
                      decode=decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])),
    "bytes": dict(pre=pre_tokenizers.ByteLevel(add_prefix_space=False), decode=decoders.ByteLevel()),
    "bytes with a space": dict(pre=pre_tokenizers.ByteLevel(add_prefix_space=True), decode=decoders.ByteLevel())}


@pytest.fixture(scope="module")
def trained():
    "Small tokenizers of each kind."
    def train(normal=None, pre=None, decode=None):
        fast = Tokenizer(models.BPE(unk_token="<unk>"))
        fast.normalizer, fast.pre_tokenizer, fast.decoder = normal, pre, decode
        texts = [prose()[0][:60000].replace("\n", " "), "".join(map(chr, range(32, 127))), "\n"]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *MARKS], show_progress=False)
        fast.train_from_iterator(texts, trainer)
        fast.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in MARKS])
        return fast
    return {kind: train(**how) for kind, how in KINDS.items()}


def tokenizer(fast, template):
    tok = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", unk_token="<unk>")
    tok.chat_template = template
    return tok


def own_ids(tok, text):
    "The ids that the template, or the tokenizer without one, gives a user's text."
    if tok.chat_template is None: return tok(text, add_special_tokens=False).input_ids
    return tok.apply_chat_template([dict(role="user", content=text)], add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_templates_own_tokens(trained, kind, template):
    tok = tokenizer(trained[kind], TEMPLATES[template])
    head, needle, question = "Read this text.\n", "The key is under the mat.", "\nWhere is the key?"
    around = frame(tok, head, question, "", 400, 5)
    body = [*line_ids(tok, ["One line."])[0], *token_ids(tok, [" " + needle])[0]]
    ids = around.join_short(body)["ids"].tolist()
    assert ids == own_ids(tok, f"{head}One line. {needle}{question}")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "prepended"])  # whose decoder adds spaces of its own
def test_items_are_read_as_they_are_written(trained, kind, template):
    tok = tokenizer(trained[kind], TEMPLATES[template])
    for task, length in (("niah", 900), ("passkey", 900), ("vt", 2400)):
        it = make_item(tok, task, length)
        ids, text = it.ids.tolist(), tok.decode(it.ids, clean_up_tokenization_spaces=False)
        again = tok(text, add_special_tokens=False).input_ids
        assert len(again) <= len(ids)  # a haystack is cut at a token, and two halves may be one
        end = it.needle_at + it.needle_len
        assert again[:end] == ids[:end], (task, text[:200])


def test_a_date_in_a_template_is_the_runs(trained, monkeypatch):
    asks = CHATML.replace("{% for", "{{ strftime_now('%d %B %Y, %A') }} {{ date_string }}\n{% for", 1)
    first = chat_split(tokenizer(trained["bytes"], asks))
    class Later(clock.datetime):
        "Another day."
        @classmethod
        def now(cls, tz=None): return cls(2031, 5, 6)
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    tok = tokenizer(trained["bytes"], asks)
    assert chat_split(tok) == first and "26 July 2024, Friday 26 Jul 2024" in tok.decode(first[0])
    monkeypatch.setattr(tokens, "TEMPLATE_DATE", clock.datetime(2025, 1, 1))
    assert chat_split(tokenizer(trained["bytes"], asks)) != first


def test_a_template_that_cannot_be_split_is_told(trained):
    for template, n in (("{{ messages[0].content }} {{ messages[0].content }}", 2), ("Hello", 0)):
        with pytest.raises(ValueError, match=f"shows the user's text {n} times"):
            chat_split(tokenizer(trained["bytes"], template))


def test_which_tokenizers_mark_beginnings(trained):
    found = {kind: marks_beginnings(tokenizer(fast, None)) for kind, fast in trained.items()}
    assert [k for k, marks in found.items() if not marks] == ["metaspace, never", "bytes"]
