"""Chats and instructions: what is learnt of them, kept apart in a row, written and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from gift.data import ChatReader, DataError, TextReader, chats, reader_from_config
from gift.data.examples import IGNORED
from gift.errors import GiftWarning
from gift.jobs import Run, read_job, run_job
from gift.strategies import FullFineTuningStrategy
from gift.training import TrainingError, Written, evaluate, finetune, predict
from tests.job_examples import CHEAP, written

WORDS = ["[PAD]", "[UNK]", "[EOS]", "<user>", "<assistant>", "<system>", "one", "two", "three",
         "four", "plus", "is", "what", "and", "much"]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' [EOS] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SUMS = [("one plus one", "two"), ("one plus two", "three"), ("two plus two", "four"),
        ("one plus three", "four")]  # fmt: skip
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]",
        model_max_length=64,
    )  # fmt: skip
    found.chat_template = template
    return found


READER = TextReader(tokenizer())


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=2, bos_token_id=None,
    )).eval()  # fmt: skip


def messages(*turns: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


def words(ids: Any) -> str:
    return " ".join(WORDS[int(one)] for one in ids if int(one) != IGNORED)


def learnt(row: Any) -> str:
    return words(row["labels"])


def test_only_answers_are_learnt() -> None:
    chat = messages("one plus one", "two", "and two plus two", "four")
    chat["messages"].insert(0, {"role": "system", "content": "much"})
    [row] = chats([chat], READER).dataset
    assert words(row["input_ids"]) == (
        "<system> much [EOS] <user> one plus one [EOS] <assistant> two [EOS] <user> and two plus "
        "two [EOS] <assistant> four [EOS]"
    )
    assert learnt(row) == "two [EOS] four [EOS]"


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": (messages("one plus one", "two"),
                 "<user> one plus one [EOS] <assistant> two [EOS]"),
    "conversations": ({"conversations": [{"from": "human", "value": "one plus one"},
                                         {"from": "gpt", "value": "two"}]},
                      "<user> one plus one [EOS] <assistant> two [EOS]"),
    "instruction": ({"instruction": "one plus one", "input": "", "output": "two"},
                    "<user> one plus one [EOS] <assistant> two [EOS]"),
    "input": ({"instruction": "what is", "input": "one plus one", "output": "two"},
              "<user> what is one plus one [EOS] <assistant> two [EOS]"),
    "prompt": ({"prompt": "one plus one is", "completion": " two"}, "one plus one is two [EOS]"),
    "prompt of messages": ({"prompt": messages("one plus one")["messages"],
                            "completion": [{"role": "assistant", "content": "two"}]},
                           "<user> one plus one [EOS] <assistant> two [EOS]"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("as_list", [True, False], ids=["list", "lines"])
def test_records_of_each_form(form: str, as_list: bool, tmp_path: Path) -> None:
    given, text = FORMS[form]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([given, given]) if as_list else (json.dumps(given) + "\n\n") * 2)
    found = chats(path, READER)
    assert len(found) == 2
    assert words(found.dataset[1]["input_ids"]) == text
    assert learnt(found.dataset[1]) == "two [EOS]"
    assert isinstance(found.reader, ChatReader)
    assert found.reader.conversational is (form != "prompt")


REFUSED: dict[str, tuple[str, str]] = {
    "no json": ('{"messages": [\n', "line 1: this is not JSON"),
    "another record": ('{"text": "one"}\n', r"line 1: it has \['text'\], expected messages"),
    "a list": ("5\n", "line 1: this is 5, expected a record"),
    "no role": ('{"messages": [{"content": "one"}]}\n', "has the role None"),
    "an odd role": ('{"messages": [{"role": "me", "content": "one"}]}\n', "role 'me'"),
    "no text": ('{"messages": [{"role": "user", "content": 5}]}\n', "the content 5, no text"),
    "an empty answer": (json.dumps(messages("one", " ")), "of assistant, has the content ' '"),
    "no answer": (json.dumps(messages("one")), "line 1: there is no answer to learn"),
    "no completion": ('{"prompt": "one"}', "line 1: there is no answer to learn"),
    "an empty prompt": ('{"prompt": "", "completion": "one"}', "the prompt is empty"),
    "both kinds": (json.dumps(messages("one", "two")) + '\n{"prompt": "one", "completion": "two"}',
                   "some records have messages, some texts"),
    "nothing": ("\n\n", "there are no records"),
    "no messages": ('{"messages": []}', "expected a list of messages"),
    "two": ('{"x": 1}\n' + json.dumps(messages("one", "two")) + '\n{"y": 1}\n',
            "(?s)line 1.*line 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_records_that_are_none_are_named_by_line(name: str, tmp_path: Path) -> None:
    text, message = REFUSED[name]
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        chats(path, READER)


def test_templates_that_are_absent_refuse_or_rewrite_are_told(tmp_path: Path) -> None:
    chat = messages("one plus one", "two", "and", "four")
    with pytest.raises(DataError, match="no chat template"):
        chats([chat], TextReader(tokenizer(None)))
    with pytest.raises(DataError, match=r"record 0: the chat template refuses it: .*odd"):
        chats([chat], TextReader(tokenizer("{{ raise_exception('odd') }}")))
    last = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages[-2:] %}")
    with pytest.raises(DataError, match="writes earlier messages in another way"):
        chats([chat], TextReader(tokenizer(last)))
    with pytest.raises(DataError, match=r"no such file"):
        chats(tmp_path / "none.jsonl", READER)
    with pytest.raises(DataError, match=r"length is 1, expected"):
        chats([chat], READER, length=1)
    assert len(chats([{"prompt": "one", "completion": "two"}], TextReader(tokenizer(None)))) == 1


def test_long_examples_are_cut_and_told() -> None:
    long = messages("one plus one and " * 5, "two")
    short = messages("one plus one", "two and two and two and two")
    with pytest.warns(GiftWarning, match="2 of 2 examples have more than 8 .* 1 of them are left"):
        found = chats([long, short], READER, length=8)
    assert [len(row["input_ids"]) for row in found.dataset] == [8]
    with pytest.raises(DataError, match="all answers begin after 4 tokens"):
        chats([long], READER, length=4)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=2,
        eos_token_id=2,
    )).eval()  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_examples_in_one_row_do_not_see_each_other(make: Any, attention: str) -> None:
    """The loss of packed rows is that of the examples one by one, by the network's own loss."""
    net = make()
    net.set_attn_implementation(attention) if hasattr(net, "set_attn_implementation") else None
    data = [messages(*pair) for pair in SUMS] + [messages("what is one plus one and two", "four")]
    plain, packed = chats(data, READER), chats(data, READER, length=24, packing=True)
    assert (len(plain), len(packed)) == (5, 2)
    single = evaluate(net, plain, device="cpu", batch_size=2)
    together = evaluate(net, packed, device="cpu", batch_size=2)
    total = count = 0.0
    for row in plain.dataset:
        tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = net(input_ids=tokens).logits[0, :-1].double()
        total += F.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += (labels[1:] != IGNORED).sum().item()
    assert single["loss"] == pytest.approx(total / count, rel=1e-5)
    assert together["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_network_learns_to_answer() -> None:
    net, data = llama(), chats([messages(*pair) for pair in SUMS], READER, packing=True, length=24)
    finetune(
        net, data, strategy=FullFineTuningStrategy(), epochs=60, lr=0.01, batch_size=4, **QUIET
    )
    questions = [question for question, _ in SUMS]
    found = predict(net, questions, max_new_tokens=4, batch_size=3)
    assert [type(one) for one in found] == [Written] * 4
    assert [one.text.strip() for one in found] == [answer for _, answer in SUMS]
    assert predict(net, [messages("two plus two", "four", "one plus one")], max_new_tokens=1)
    as_messages = predict(net, [messages("two plus two")["messages"]], max_new_tokens=4)
    assert as_messages[0].text.strip() == "four"
    with pytest.raises(DataError, match="role 'me'"):
        predict(net, [[{"role": "me", "content": "x"}]])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        predict(net, questions, max_new_tokens=0)


def test_what_is_written_does_not_depend_on_the_others() -> None:
    """Prompts of several lengths in a batch, by greedy decoding one by one."""
    net = llama()
    data = chats([{"prompt": q, "completion": f" {a}"} for q, a in SUMS], READER)
    finetune(net, data, strategy=FullFineTuningStrategy(), epochs=3, lr=0.01, batch_size=4, **QUIET)
    prompts = ["one plus", "what is one plus two and two", "four"]
    found = predict(net, prompts, max_new_tokens=5)
    for prompt, one in zip(prompts, found, strict=True):
        ids = READER.tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        said = [WORDS[n] for n in ids[start:] if n not in (0, 1, 2)]
        assert one.text.split() == said


def test_networks_without_generation_are_not_asked_to_write() -> None:
    from gift.core.io_spec import set_io_spec

    net = nn.Embedding(20, 20)
    set_io_spec(net, ChatReader(tokenizer()), None, "language")
    with pytest.raises(TrainingError, match="language model of transformers, with generate"):
        predict(net, ["one"])


def test_the_reader_is_found_again_in_its_folder(tmp_path: Path) -> None:
    reader = ChatReader(tokenizer(), 16, conversational=True)
    again = reader_from_config(json.loads(json.dumps(reader.to_config(tmp_path))), tmp_path)
    assert again("one plus one") == reader("one plus one")
    assert words(again("one plus one")["input_ids"]) == "<user> one plus one [EOS] <assistant>"
    assert len(again("one " * 30)["input_ids"]) == 16
    with pytest.raises(DataError, match="no chat template"):
        ChatReader(tokenizer(None))


def test_a_job_on_chats(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    lines = "\n".join(json.dumps(messages(*pair)) for pair in SUMS)
    (tmp_path / "a.jsonl").write_text(lines)
    result = run_job(read_job(written(tmp_path, {
        "network": {"name": "transformers:model"},
        "data": {"kind": "chats", "train": "a.jsonl", "valid": "a.jsonl",
                 "options": {"length": 24, "packing": True}},
        "strategy": "FullFineTuningStrategy",
        "training": CHEAP | {"epochs": 40, "lr": 0.01},
    })))  # fmt: skip
    assert result.after["token_accuracy"] > 0.9
    run = Run(tmp_path / "run")
    assert run.evaluate() == pytest.approx(result.after, rel=1e-4)
    assert [one.text.strip() for one in run.predict(["two plus two"])] == ["four"]
