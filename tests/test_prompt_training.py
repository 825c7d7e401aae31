"""Prompted language models: where they start, training, states, what is refused."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from gift import (
    disable_fine_tuning,
    enable_fine_tuning,
    merge_strategies,
    plan_fine_tuning,
)
from gift.strategies import (
    BottleneckFineTuningStrategy,
    HeadReplacementStrategy,
    LoRALinearFineTuningStrategy,
)
from gift.strategies import PromptFineTuningStrategy as Prompts
from tests.cases.prompts import PAD, WORDS, N, batch, made, prompted, tokens_of
from tests.common import all_bits, bits, full_state, trainable

pytestmark = [pytest.mark.usefixtures("double"),
              pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")]  # fmt: skip


def writer() -> GPT2LMHeadModel:
    return made("GPT2", "LMHeadModel")


def classifier() -> BertForSequenceClassification:
    return made("Bert", "ForSequenceClassification").float()


# --- where it starts -----------------------------------------------------------------------------


def test_it_starts_with_words_of_the_vocabulary() -> None:
    """Different ones, while there are enough, and never the one of padding."""
    net = classifier()
    words = net.get_input_embeddings().weight.detach().clone()
    enable_fine_tuning(net, Prompts(WORDS - 1))
    tokens = tokens_of(net)
    drawn = [int((words == token).all(1).nonzero()) for token in tokens.detach()]
    assert sorted(drawn) == [word for word in range(WORDS) if word != PAD]
    assert drawn != sorted(drawn)
    many = classifier()
    enable_fine_tuning(many, Prompts(WORDS + 3))
    assert tokens_of(many).shape == (WORDS + 3, 8)


def test_its_start_is_not_that_of_the_model() -> None:
    """Attention over more keys gives something else: see the reason in the tests of `Prompt`."""
    base, given = writer(), batch("none")
    net = copy.deepcopy(base)
    enable_fine_tuning(net, Prompts(1))
    assert (net(**given).logits - base(**given).logits).abs().max() > 1e-3


def test_a_planned_prompt_draws_no_random_numbers() -> None:
    net = classifier()
    torch.manual_seed(0)
    plan = plan_fine_tuning(net, Prompts(4))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)
    assert plan.claims[0].what == "prompt(num_virtual_tokens=4) on bert.embeddings.word_embeddings"
    assert plan.trainable_after == plan.claims[0].trainable == 4 * 8


def test_from_the_meta_device() -> None:
    """There is no vocabulary yet when memory is given: small random vectors take its place."""
    with torch.device("meta"):
        net = GPT2LMHeadModel(writer().config)
    enable_fine_tuning(net, Prompts(20))
    assert tokens_of(net).is_meta
    net.to_empty(device="cpu").load_state_dict(writer().state_dict())
    assert 0.01 < tokens_of(net).std() < 0.03


# --- training ------------------------------------------------------------------------------------


def test_gradients_reach_the_tokens_and_nothing_frozen() -> None:
    net = writer()
    enable_fine_tuning(net, Prompts(N))
    net.train()(**batch("right")).logits.square().sum().backward()
    assert tokens_of(net).grad.abs().sum(1).all()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == set(trainable(net))


def test_with_lora_bottlenecks_and_a_new_head() -> None:
    net, given = classifier(), batch("right")
    parts = [Prompts(N), BottleneckFineTuningStrategy(4), HeadReplacementStrategy(5),
             LoRALinearFineTuningStrategy(rank=2)]  # fmt: skip
    report = enable_fine_tuning(net, merge_strategies(parts))
    alone = classifier()
    alone.load_state_dict({k: v for k, v in nn.Module.state_dict(net).items()
                           if k in alone.state_dict() and "classifier" not in k},
                          strict=False)  # fmt: skip
    enable_fine_tuning(alone, Prompts(N))
    tokens_of(alone).data.copy_(net.bert.embeddings.word_embeddings.prompt_tokens)
    hidden = alone.bert(**given).pooler_output
    torch.testing.assert_close(net(**given).logits, net.classifier(hidden))
    net(**given).logits.sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == set(trainable(net))
    assert sum(claim.trainable for claim in report.claims) == report.trainable_after
    assert not report.unmatched


class Own(nn.Module):
    """Takes embeddings itself, so that it is its own call that is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 2)

    def forward(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(embeddings).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


IDS = {"input_ids": [[i] * 4 for i in range(3, 11)], "attention_mask": [[1] * 4] * 8}
VECTORS = {"embeddings": torch.randn(8, 4, 8).tolist()}


@pytest.mark.parametrize(("make", "columns"), [(classifier, IDS), (Own, VECTORS)])
def test_the_trainer_of_transformers(
    make: Callable[[], nn.Module], columns: dict[str, Any], tmp_path: Any
) -> None:
    """It reads from the signature which columns there are for; only what is chosen changes."""
    net = make()
    report = enable_fine_tuning(net, Prompts(N, head=True))
    assert report.trainable_after == N * 8 + 8 * 2 + 2
    before = {name: bits(p) for name, p in net.named_parameters()}
    rows = Dataset.from_dict({**columns, "labels": [1] * 8, "note": ["no argument"] * 8})
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=10, per_device_train_batch_size=8, learning_rate=0.02,
        report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(net, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.75 * losses[0]
    changed = {name for name, p in net.named_parameters() if bits(p) != before[name]}
    assert changed == set(trainable(net))


def test_a_base_in_bfloat16_with_checkpointing() -> None:
    """Tokens are float32; gradients come through layers that are computed again."""
    net = writer().bfloat16()
    enable_fine_tuning(net, Prompts(N))
    assert tokens_of(net).dtype == torch.float32
    grads = []
    for again in (False, True):
        net.zero_grad()
        if again:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        output = net.train()(**batch_of_one(), use_cache=False).logits
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
        grads.append(tokens_of(net).grad.clone())
    assert grads[0].abs().sum() > 0
    assert torch.equal(*grads)


def batch_of_one() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 9)[None]}


# --- copies, states, the way back ----------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_is_independent(copied: Callable[[Any], Any]) -> None:
    net, given = prompted(writer()), batch("left")
    twin = copied(net)
    before = net(**given).logits
    assert torch.equal(twin(**given).logits, before)
    tokens_of(twin).data.normal_()
    assert torch.equal(net(**given).logits, before)
    assert not torch.equal(twin(**given).logits, before)


@pytest.mark.parametrize(
    ("kind", "head"), [("GPT2", "LMHeadModel"), ("T5", "ForConditionalGeneration")]
)
def test_the_way_back(kind: str, head: str) -> None:
    net = made(kind, head)
    before = full_state(net)
    enable_fine_tuning(net, Prompts(N))
    net.generate(**batch("left"), max_new_tokens=2)
    generation = net.generation_config
    disable_fine_tuning(net)
    assert net.generation_config is generation
    assert full_state(net) == before


def test_a_saved_delta() -> None:
    base, given = writer(), batch("left")
    net, fresh = prompted(base), prompted(base)
    state = net.state_dict()
    assert list(state) == ["transformer.wte.prompt_tokens"]
    fresh.load_state_dict(state)
    assert all_bits(fresh) == all_bits(net)
    assert torch.equal(fresh(**given).logits, net(**given).logits)
    with pytest.raises(RuntimeError, match=r"'num_virtual_tokens': 3.*'num_virtual_tokens': 4"):
        prompted(base, 4).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*wte.prompt_tokens"):
        fresh.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gate"):
        fresh.load_state_dict(state | {"gate": torch.zeros(1)})


def test_compiled_as_one_graph() -> None:
    net, ids = prompted(writer()), batch("none")["input_ids"]
    one = torch.__version__ >= "2.7"  # before, the compiler does not follow `copy.copy` of outputs
    compiled: Any = torch.compile(net, fullgraph=one, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, net(ids).logits)


# --- what is refused -----------------------------------------------------------------------------


def test_more_than_the_model_has_positions_for() -> None:
    with pytest.raises(ValueError, match="24 virtual tokens leave no room in 24 pos"):
        enable_fine_tuning(writer(), Prompts(24))
    net = prompted(writer(), 20)
    assert net(torch.full((1, 4), 5)).logits.shape == (1, 4, WORDS)
    with pytest.raises(ValueError, match=r"transformer \(GPT2Model\) has 24 positions: 20 virtual "
                       r"tokens leave room for 4 others, 5 were given"):  # fmt: skip
        net(torch.full((1, 5), 5))
    with pytest.raises(ValueError, match="room for 4 others, 5 were given"):
        net.generate(torch.full((1, 3), 5), max_new_tokens=9, min_new_tokens=9)
    roberta = prompted(made("Roberta", "ForMaskedLM"), 20)  # two of the 24 are not for tokens
    assert roberta(torch.full((1, 2), 5)).logits.shape == (1, 2, WORDS)
    with pytest.raises(ValueError, match=r"has 22 positions.* room for 2 others, 3 were given"):
        roberta(torch.full((1, 3), 5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bbox": torch.zeros(2, 6, 4)}, r"was given bbox \(2, 6, 4\), which goes with the tokens"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"attention_mask that is not \(batch, time\)"),
    ],
)
def test_arguments_of_unknown_meaning(given: dict[str, Any], message: str) -> None:
    net = prompted(made("Bert", "Model"))
    with pytest.raises(ValueError, match=message):
        net(input_ids=batch("none")["input_ids"], **given)


def test_networks_that_take_something_else() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 12}  # fmt: skip
    vision = ViTForImageClassification(ViTConfig(image_size=32, **sizes))
    with pytest.raises(ValueError, match="takes no embeddings"):
        enable_fine_tuning(vision, Prompts(N))
    with pytest.raises(ValueError, match=r"a language model sets \['dim'\] itself"):
        enable_fine_tuning(writer(), Prompts(N, dim=8))
