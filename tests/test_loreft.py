"""LoReFT, beside its formula in hooks of a plain network."""

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18

import gift
from gift import DeltaBank, disable_fine_tuning, enable_fine_tuning
from gift.strategies import (
    LoRALinearFineTuningStrategy,
    LoReFTFineTuningStrategy,
    PromptFineTuningStrategy,
    merge_strategies,
)
from gift.training.tasks.language import Language
from tests.cases.prompts import PAD, WORDS, batch, made
from tests.common import bits, full_state, trainable

pytestmark = [pytest.mark.usefixtures("double"),
              pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")]  # fmt: skip

LoReFT = LoReFTFineTuningStrategy
Positions = Sequence[Sequence[int]] | None  # of each row; None for all


def orthonormal(columns: Tensor) -> Tensor:
    """Gram and Schmidt, column by column."""
    done: list[Tensor] = []
    for column in columns.unbind(1):
        rest = column - sum((q * (q @ column) for q in done), torch.zeros_like(column))
        done.append(rest / rest.square().sum().sqrt())
    return torch.stack(done, 1)


def changed(h: Tensor, p: dict[str, Tensor], positions: Positions = None) -> Tensor:
    """``h + R^T (W h + b - R h)``, token by token."""
    r = orthonormal(p["rotation"]).T
    new = h + torch.einsum("rd,...r->...d", r, torch.einsum("rd,...d->...r", p["weight"] - r, h)
                           + p["bias"])  # fmt: skip
    if positions is None:
        return new
    rows = [torch.stack([new[i, t] if t in chosen else h[i, t] for t in range(h.shape[1])])
            for i, chosen in enumerate(positions)]  # fmt: skip
    return torch.stack(rows)


def after_training(net: nn.Module) -> None:
    for name, p in net.named_parameters():
        if p.requires_grad and "loreft" in name:
            nn.init.normal_(p, std=0.5)


def hooked(base: nn.Module, net: nn.Module, positions: Positions = None) -> Any:
    """The plain network with the formula in hooks, on the parameters of `net`."""
    plain = copy.deepcopy(base)
    for path, module in net.named_modules():
        own = {k: p for k, p in module._parameters.items() if k.startswith("loreft_")}
        if not own:
            continue
        values: Any = {name.removeprefix("loreft_"): p for name, p in own.items()}

        def hook(_: Any, __: Any, output: Any, values: Any = values) -> Any:
            if isinstance(output, tuple):
                return changed(output[0], values, positions), *output[1:]
            return changed(output, values, positions)

        plain.get_submodule(path).register_forward_hook(hook)
    return plain


def tuned(base: nn.Module, **settings: Any) -> Any:
    net = copy.deepcopy(base)
    enable_fine_tuning(net, LoReFT(2, **settings))
    after_training(net)
    return net


def images() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 8, 8)}


def sequences() -> dict[str, Any]:
    return {"src": torch.randn(2, 5, 8)}


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3).double()


def vision() -> nn.Module:
    net = VisionTransformer(8, 4, 2, 2, 8, 12).double()
    nn.init.normal_(net.heads[0].weight)  # zeros at the start
    return net


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "encoder": (encoder, sequences, {}),
    "some blocks": (encoder, sequences, {"after": ["layers.0", "layers.2"]}),
    "linear": (encoder, sequences, {"after": "layers.*.linear1"}),
    "vision": (vision, images, {}),
    "llama": (lambda: made("Llama", "ForCausalLM"), lambda: batch("none"), {}),
    "gpt2": (lambda: made("GPT2", "LMHeadModel"), lambda: batch("none"), {}),
    "bert": (lambda: made("Bert", "ForMaskedLM"), lambda: batch("right"), {}),
    "t5": (lambda: made("T5", "ForConditionalGeneration"),
           lambda: batch("right") | {"decoder_input_ids": torch.ones(2, 3).long()}, {}),
}  # fmt: skip


def tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize(("make", "inputs", "settings"), NETS.values(), ids=NETS)
def test_it_is_the_formula(
    make: Callable[[], nn.Module], inputs: Callable[[], dict[str, Any]], settings: dict[str, Any]
) -> None:
    """Identity bit by bit at the start; then value and gradients."""
    base, given = make().eval(), inputs()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, LoReFT(2, **settings))
    for part in base.modules():
        part.register_forward_hook(lambda *_: None)  # else torch computes blocks in one kernel
    with torch.no_grad():  # where gradients are needed, torch chooses another kernel
        assert bits(tensor(net(**given))) == bits(tensor(base(**given)))
    after_training(net)
    output, expected = tensor(net(**given)), tensor(hooked(base, net)(**given))
    torch.testing.assert_close(output, expected)
    assert (output - tensor(base(**given))).abs().max() > 1e-3
    own = [p for name, p in net.named_parameters() if p.requires_grad]
    assert sum(p.numel() for p in own) == sum(
        2 * (2 * p.shape[1] + 1) for p in own if p.ndim == 2 and p.shape[0] == 2
    )
    mine, theirs = (torch.autograd.grad(y.square().sum(), own) for y in (output, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
    assert all(gradient.any() for gradient in mine)


def test_rows_stay_orthonormal_in_training() -> None:
    net, x = tuned(encoder()), torch.randn(4, 5, 8)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    for _ in range(5):
        loss = net(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer = net.layers[0]
    with torch.no_grad():  # h' - h lies in the subspace: W and b of another one span it
        h = torch.randn(50, 8)
        with gift.disabled(net):
            plain = layer(h[None])
        q = orthonormal(layer.loreft_rotation)
        torch.testing.assert_close(q.T @ q, torch.eye(2))
        difference = (layer(h[None]) - plain)[0]
        torch.testing.assert_close(difference @ q @ q.T, difference)


# --- positions ----------------------------------------------------------------------------------

SIDES = {"left": [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5]], "right": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]],
         "none": [[*range(6)]] * 2}  # fmt: skip
CHOSEN: dict[str, Callable[[list[int]], list[int]]] = {
    "f2+l1": lambda tokens: [*tokens[:2], *tokens[-1:]],
    "f1": lambda tokens: tokens[:1],
    "l3": lambda tokens: tokens[-3:],
    "f9+l9": lambda tokens: tokens,
}


@pytest.mark.parametrize(("kind", "head"), [("Llama", "ForCausalLM"), ("Bert", "ForMaskedLM"),
                                            ("GPT2", "ForSequenceClassification")])  # fmt: skip
@pytest.mark.parametrize("positions", CHOSEN)
@pytest.mark.parametrize("side", SIDES)
def test_the_first_and_last_tokens_of_texts(
    kind: str, head: str, positions: str, side: str
) -> None:
    base, given = made(kind, head), batch(side)
    if side == "none":
        given = {"input_ids": given["input_ids"].clamp(min=2)}
    net = tuned(base, positions=positions)
    chosen = [CHOSEN[positions](row) for row in SIDES[side]]
    output, expected = net(**given).logits, hooked(base, net, chosen)(**given).logits
    seen = (
        [(i, t) for i, row in enumerate(SIDES[side]) for t in row] if output.ndim == 3 else [(0,)]
    )
    for place in seen:
        torch.testing.assert_close(output[place], expected[place])


def test_positions_end_where_labels_begin() -> None:
    """As argument of the model, or told by the loop."""
    base, given = made("Llama", "ForCausalLM"), batch("right")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[0, :3], labels[1, :2] = -100, -100
    net = tuned(base, positions="f1+l1")
    expected = hooked(base, net, [[0, 2], [0, 1]])(**given).logits
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(net(**given, labels=labels).logits[seen], expected[seen])
    task = Language()
    outputs = task.outputs(net, given | {"labels": labels})
    torch.testing.assert_close(outputs[seen[:, :-1]], expected[:, :-1][seen[:, :-1]])
    whole = hooked(base, net, [[0, 5], [0, 3]])(**given).logits
    for same in ({}, {"labels": given["input_ids"]}):  # no token is before the first label
        torch.testing.assert_close(net(**given, **same).logits[seen], whole[seen])


def test_labels_of_tokens_are_not_an_answer() -> None:
    base, given = made("Bert", "ForTokenClassification"), batch("none")
    net = tuned(base, positions="l1")
    labels = torch.tensor([[-100, -100, 1, 0, 1, -100]] * 2)
    expected = hooked(base, net, [[5], [5]])(**given).logits
    torch.testing.assert_close(net(**given, labels=labels).logits, expected)


@pytest.mark.parametrize(("kind", "head"), [("Llama", "ForCausalLM"), ("GPT2", "LMHeadModel")])
@pytest.mark.parametrize("positions", ["all", "f1+l2"])
def test_what_is_written_is_not_changed(kind: str, head: str, positions: str) -> None:
    """Step by step with a cache, as reading the prompt and what was written at once."""
    base = made(kind, head)
    net, given = tuned(base, positions=positions), batch("left")
    few = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    options: list[dict[str, Any]] = [{}, {"num_beams": 2}]
    written = net.generate(**given, **few, min_new_tokens=5)
    tokens = [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5]]
    chosen = None if positions == "all" else [CHOSEN["f1"](t) + t[-2:] for t in tokens]
    plain, mask = hooked(base, net, chosen), given["attention_mask"]
    ids, position_ids = given["input_ids"], (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(5):
        logits = plain(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        best = logits[:, -1].index_fill(-1, torch.tensor(2), -torch.inf).argmax(-1)
        ids, mask = torch.cat([ids, best[:, None]], 1), nn.functional.pad(mask, (0, 1), value=1)
        position_ids = torch.cat([position_ids, position_ids[:, -1:] + 1], 1)
    assert torch.equal(written, ids)
    for option in options:
        net.generate(**given, **few, **option)
    net.generation_config.use_cache = False
    assert torch.equal(net.generate(**given, **few, min_new_tokens=5), ids)


def test_positions_of_other_networks_are_those_of_the_last_but_one_axis() -> None:
    for base, given, time in ((encoder(), sequences(), 5), (vision(), images(), 5)):
        net = tuned(base.eval(), positions="f1+l1")
        plain = hooked(base, net, [[0, time - 1]] * 2)
        torch.testing.assert_close(net(**given), plain(**given))


# --- what a strategy has to do ------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "f2+l1"])
def test_it_is_saved_copied_switched_and_taken_off(positions: str, tmp_path: Any) -> None:
    base, given = made("GPT2", "LMHeadModel"), batch("left")
    net = copy.deepcopy(base)
    before = full_state(net)
    enable_fine_tuning(net, LoReFT(2, positions))
    after_training(net)
    expected = net(**given).logits
    gift.save(net, tmp_path / "delta.safetensors")
    loaded, fresh, bank = copy.deepcopy(base), copy.deepcopy(base), DeltaBank(copy.deepcopy(base))
    gift.load(loaded, tmp_path / "delta.safetensors")
    enable_fine_tuning(fresh, LoReFT(2, positions))
    fresh.load_state_dict(net.state_dict())
    bank.add("loreft", strategy=LoReFT(2, positions))
    bank.add("lora", strategy=LoRALinearFineTuningStrategy(rank=2))
    bank.activate("loreft")
    bank.net.load_state_dict(net.state_dict())
    bank.activate("lora")
    bank.activate("loreft")
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net)), gift.reference(net)
    for other in (loaded, fresh, bank.net, *copies):
        assert torch.equal(other(**given).logits, expected)
    with pytest.raises(ValueError, match="is wrapped by loreft"):
        gift.merge(net)
    with pytest.raises(ValueError, match="no counterpart for loreft"):
        gift.save_peft(net, tmp_path / "peft")
    with gift.disabled(net):
        assert torch.equal(net(**given).logits, base(**given).logits)
    other = copy.deepcopy(base)
    enable_fine_tuning(other, LoReFT(2, "l1"))
    with pytest.raises(RuntimeError, match="was trained with"):
        other.load_state_dict(net.state_dict())
    disable_fine_tuning(net)
    assert full_state(net) == before


def test_with_lora_a_head_and_on_top_of_another_in_16_bits() -> None:
    base, given = made("GPT2", "ForSequenceClassification").bfloat16(), batch("right")
    net = copy.deepcopy(base)
    both = merge_strategies([LoReFT(2, "f1+l1", head=True), LoRALinearFineTuningStrategy(rank=2)])
    report = enable_fine_tuning(net, both)
    assert not report.unmatched
    assert bits(net(**given).logits) == bits(base(**given).logits)
    assert net.transformer.h[0].loreft_rotation.dtype is torch.float32
    net(**given).logits.float().square().sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == set(trainable(net))
    assert "score.weight" in trainable(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(**given).logits.isfinite().all()
    lower = copy.deepcopy(base)
    enable_fine_tuning(lower, LoRALinearFineTuningStrategy(rank=2))
    enable_fine_tuning(lower, LoReFT(2), stack=True)
    assert all("loreft" in name for name in trainable(lower))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("positions", ["all", "f1+l2"])
def test_checkpoints(positions: str, reentrant: bool) -> None:
    """Blocks are called again for the backward pass, outside of the model's call."""
    net, given = tuned(made("Llama", "ForCausalLM"), positions=positions).train(), batch("left")
    short = {key: value[:, 1:] for key, value in given.items()}
    own = list(net.parameters())

    def gradients() -> list[Tensor]:
        net.zero_grad()
        first, second = (
            net(**one).logits[one["attention_mask"].bool()].square().sum() for one in (given, short)
        )
        first.backward()  # while the second one is pending
        second.backward()
        return [p.grad.clone() for p in own]

    expected = gradients()
    if reentrant:
        net.enable_input_require_grads()  # as old versions of transformers need it
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), expected)


def test_a_planned_one_and_the_meta_device() -> None:
    with torch.device("meta"):
        net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 2)
    report = enable_fine_tuning(net, LoReFT(2))
    assert report.trainable_after == 2 * 2 * (2 * 8 + 1)
    values = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 2).eval()
    net.to_empty(device="cpu").load_state_dict(values.state_dict())
    x = torch.randn(5, 2, 8)
    torch.testing.assert_close(net.eval()(x), values(x))
    assert all(net.layers[0].loreft_weight.square().sum(1) > 0.99)


def test_dropout_is_that_of_training() -> None:
    net, given = tuned(encoder(), dropout=0.5).eval(), sequences()
    assert torch.equal(net(**given), net(**given))
    assert not torch.equal(net.train()(**given), net(**given))


T5 = ("T5", "ForConditionalGeneration")
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "channels": (resnet18, {"after": "layer1.0"}, "not along the last axis"),
    "rank": (encoder, {"rank": 9}, "rank=9 is above its 8 features"),
    "two texts": (lambda: made(*T5), {"positions": "f1"}, "positions='all' alone is understood"),
    "nothing": (encoder, {"positions": "f0+l0"}, "expected 'all', or first and last tokens"),
    "other words": (encoder, {"positions": "last"}, "expected 'all', or first and last tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make: Callable[[], nn.Module], settings: dict[str, Any], message: str) -> None:
    net = make()
    before = full_state(net)
    with pytest.raises(ValueError, match=message):
        enable_fine_tuning(net, LoReFT(**settings))
    assert full_state(net) == before


def test_calls_that_are_refused() -> None:
    base, ids = made("Llama", "ForCausalLM"), torch.randint(3, WORDS, (2, 6))
    net = tuned(base, positions="f1")
    with pytest.raises(ValueError, match=r"an attention_mask \(2, 1, 6, 6\) for \(2, 6\) tokens"):
        net(ids, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match="was called outside of its language model"):
        net.model.layers[0](torch.randn(2, 6, 8), position_embeddings=(torch.ones(1, 6, 4),) * 2)
    both = copy.deepcopy(base)
    enable_fine_tuning(both, merge_strategies([LoReFT(2, "f1"), PromptFineTuningStrategy(3)]))
    with pytest.raises(ValueError, match=r"gives \(2, 9, 8\), and .* those of \(2, 6\) tokens"):
        both(ids)
    caps = [LoReFT(2, "f1", after="model.layers.0"), LoReFT(2, "l1", after="model.layers.1")]
    with pytest.raises(ValueError, match="other interventions are at f1"):
        enable_fine_tuning(copy.deepcopy(base), merge_strategies(caps))
