"""Methods of PEFT that gift does not train: what they have learned is read as another method."""

import torch
from torch import Tensor

from gift.interop.factors import smallest
from gift.interop.peft.forms import Config, Form, Layer, Read, Tensors, Written
from gift.interop.peft.layers import AdaptedTensor
from gift.methods.settings import is_integer


def _never(items: list[AdaptedTensor]) -> Written:
    """No method of gift is written in these forms."""
    raise NotImplementedError


_BANK = "base_model.vblora_vector_bank"


def read_vblora(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read VB-LoRA as the LoRA whose factors it puts together from its bank of vectors."""
    rank, best = config["r"], config["topk"]
    if _BANK not in shared:
        raise ValueError(f"{_BANK} is missing")
    bank = shared[_BANK]
    if bank.ndim != 2 or not all(is_integer(n) and n > 0 for n in (rank, best)) or best > len(bank):
        raise ValueError(f"r {rank!r}, topk {best!r} and a bank {tuple(bank.shape)} do not fit")
    rows, columns = layer.matrix()
    count, length = bank.shape
    a, b = layer.take("vblora_logits_A"), layer.take("vblora_logits_B")
    layer.expect("vblora_logits_A", a, (rank, columns // length, count))
    layer.expect("vblora_logits_B", b, (rows // length, rank, count))
    right = _mixed(a, bank, best).flatten(1)
    left = _mixed(b, bank, best).transpose(1, 2).reshape(-1, rank)
    layer.expect("the factor of vblora_logits_A", right, (rank, columns))
    layer.expect("the factor of vblora_logits_B", left, (rows, rank))
    return [_as_lora(layer, left, right, config.get("vblora_dropout"))]


def _as_lora(layer: Layer, left: Tensor, right: Tensor, dropout: float | None) -> Read:
    """Return a LoRA of these factors, in a rank that the layer can have."""
    left, right = smallest(left, right)
    rank = len(right)
    settings = {"rank": rank, "lora_alpha": rank, "lora_dropout": dropout or 0.0}
    return Read(layer, "lora", settings, {"lora_B": left, "lora_A": right}, layer.path)


def _mixed(logits: Tensor, bank: Tensor, best: int) -> Tensor:
    """Return the mean of the best vectors of a bank, weighted by the softmax of their logits."""
    values, places = logits.topk(best, -1)
    return (torch.softmax(values, -1).unsqueeze(-1) * bank[places]).sum(-2)


VBLORA_FORM = Form(
    peft_type="VBLORA",
    methods=(),
    kinds=("linear", "transposed"),
    suffixes=("vblora_logits_A", "vblora_logits_B"),
    write=_never,
    read=read_vblora,
    options=frozenset({
        "r", "num_vectors", "vector_length", "topk", "vblora_dropout", "bias", "init_logits_std",
        "init_vector_bank_bound",
    }),
    bias="vblora_only",
    shared=frozenset({_BANK}),
    defaults={"r": 4, "topk": 2},
)  # fmt: skip


_VECTOR = "base_model.unilora_theta_d"


def read_unilora(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read Uni-LoRA as the LoRA whose entries are coordinates of its vector."""
    if _VECTOR not in shared:
        raise ValueError(f"{_VECTOR} is missing")
    theta, (rows, columns) = shared[_VECTOR], layer.matrix()
    layer.expect(_VECTOR, theta, (theta.numel(),))
    factors = []
    for key, shape in (("B", (rows, config["r"])), ("A", (config["r"], columns))):
        places, scales = (layer.take(f"unilora_{name}_{key}") for name in ("indices", "scales"))
        layer.expect(f"unilora_indices_{key}", places, shape)
        layer.expect(f"unilora_scales_{key}", scales, shape)
        if not bool(((places >= 0) & (places < len(theta))).all()):
            raise ValueError(
                f"unilora_indices_{key} are from {places.min()} to {places.max()}, expected "
                f"indices of a vector of {len(theta)} numbers"
            )
        factors.append(theta[places.long()] * scales)
    left, right = factors
    return [_as_lora(layer, left, right, config.get("unilora_dropout"))]


UNILORA_FORM = Form(
    peft_type="UNILORA",
    methods=(),
    kinds=("linear", "transposed"),
    suffixes=tuple(f"unilora_{name}_{key}" for name in ("indices", "scales") for key in "AB"),
    write=_never,
    read=read_unilora,
    options=frozenset({
        "r", "proj_seed", "theta_d_length", "unilora_dropout", "bias", "init_theta_d_bound",
        "init_weights", "save_indices",
    }),
    bias="unilora_only",
    shared=frozenset({_VECTOR}),
    defaults={"r": 4},
    indices=frozenset({"unilora_indices_A", "unilora_indices_B"}),
    needs={"save_indices": True},
)  # fmt: skip


_PAIR = ("base_model.pvera_A", "base_model.pvera_B")


def read_pvera(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read PVeRA as the VeRA that it is in evaluation: the means, without noise."""
    rows, columns = layer.matrix()
    if not {*_PAIR} <= shared.keys():
        raise ValueError("pvera_A and pvera_B are missing: save with save_projection=True")
    d, b = layer.take("pvera_lambda_d"), layer.take("pvera_lambda_b")
    rank = len(d) // 2
    layer.expect("pvera_lambda_d", d, (2 * rank,))
    layer.expect("pvera_lambda_b", b, (rows,))
    values = {
        "vera_b": b,
        "vera_d": d[:rank].clone(),
        "vera_A": shared[_PAIR[0]][:rank, :columns].contiguous(),
        "vera_B": shared[_PAIR[1]][:rows].contiguous(),
    }
    layer.expect("pvera_A", values["vera_A"], (rank, columns))
    layer.expect("pvera_B", values["vera_B"], (rows, rank))
    settings = {
        "rank": rank,
        "save_projection": True,
        "vera_dropout": config.get("pvera_dropout") or 0.0,
    }
    return [Read(layer, "vera", settings, values, layer.path)]


PVERA_FORM = Form(
    peft_type="PVERA",
    methods=(),
    kinds=("linear", "transposed"),
    suffixes=("pvera_lambda_b", "pvera_lambda_d"),
    write=_never,
    read=read_pvera,
    options=frozenset({
        "r", "projection_prng_key", "save_projection", "pvera_dropout", "d_initial", "bias",
        "init_weights", "generator_seed",
    }),
    bias="pvera_only",
    shared=frozenset(_PAIR),
)  # fmt: skip
