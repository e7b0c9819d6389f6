"""What is taken for a LoRA factor, and what never is."""

from __future__ import annotations

import logging

import pytest
import torch
from reliability.runs import takes_names
from torch import nn

from benchmarks.models import load
from library.automagic_cameamp import Automagic_CameAMP
from library.cameamp.lora import find_factors, is_factor_name, why_none


def tensors(shapes):
    return [torch.empty(shape, device="meta") for shape in shapes]


def factors_of(*groups, names=None):
    """How many of the parameters are taken for factors, and how many there are."""
    groups = [tensors(group) for group in groups]
    return len(find_factors(groups, names or {})), sum(len(group) for group in groups)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "base_model.model.layers.0.q_proj.lora_A.default.weight",
        "unet.mid_block.attn.processor.to_q_lora.lora_B.weight",
        "lycoris_unet_mid.hada_w1_a",
        "lycoris_unet_mid.lokr_w2",
        "lora_A.3",
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight",
        "lycoris_layers_0_self_attn_q_proj.a1.weight",
        "network.lycoris_unet_mid_block_attn.b2.weight",
    ],
)
def test_factor_names(name):
    assert is_factor_name(name)


@pytest.mark.parametrize(
    "name", ["lora_unet_mid.oft_blocks", "lora_unet_mid.alpha", "conv_in.weight", "lora_unet.dora_scale"]
)
def test_other_names(name):
    assert not is_factor_name(name)


def test_names_win_over_structure():
    down, up = tensors([(4, 32), (32, 4)])
    assert find_factors([[down, up]], {down: "a.lora_down.weight", up: "a.lora_up.weight"}) == {down, up}
    assert find_factors([[down, up]], {down: "encoder.weight", up: "decoder.weight"}) == set()


def test_named_vectors_are_no_factors():
    (vector,) = tensors([(4,)])
    assert find_factors([[vector]], {vector: "a.lora_up.bias"}) == set()


@pytest.mark.parametrize("model", ["sd15_lora16", "sdxl_lora16", "sdxl_lora16_te"])
def test_real_loras_by_structure(model):
    shapes = load(model)
    assert factors_of(shapes) == (len(shapes), len(shapes))
    assert factors_of(shapes[:72], shapes[72:]) == (len(shapes), len(shapes))


@pytest.mark.parametrize("model", ["sd15_lora16", "sdxl_lora16_te"])
def test_real_loras_with_lora_plus_groups(model):
    shapes = load(model)
    downs, ups = shapes[::2], shapes[1::2]
    assert factors_of(downs, ups) == (len(shapes), len(shapes))
    assert factors_of(downs[:40], ups[:40], downs[40:], ups[40:]) == (len(shapes), len(shapes))


def test_convolution_factors_by_structure():
    assert factors_of([(8, 64, 3, 3), (128, 8, 1, 1), (8, 64, 1, 1), (64, 8, 1, 1)]) == (4, 4)


def test_a_few_thin_layers_do_not_hide_a_lora():
    assert factors_of([(16, 36), (320, 16), (16, 320), (4, 16), (16, 320), (320, 16)]) == (6, 6)


def loha(rank, *layers):
    """The factors of LoHas of layers with these outputs and inputs."""
    return [shape for out, into in layers for shape in [(out, rank), (rank, into)] * 2]


LAYERS = [(320, 320), (320, 768), (2560, 320), (320, 1280), (4, 2880)]


@pytest.mark.parametrize("rank", [1, 2, 8, 64])
def test_loha_by_structure(rank):
    shapes = loha(rank, *LAYERS)
    assert factors_of(shapes) == (20, 20)
    assert factors_of(shapes[:12], shapes[12:]) == (20, 20)
    assert factors_of([*shapes, (320,)]) == (0, 21)
    assert factors_of([*shapes, (320, 320)]) == (0, 21)
    assert factors_of([*shapes, (320, rank), (rank, 768)] if rank > 1 else [(1, 1)])[0] == 0


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("by_output", [True, False], ids=["of outputs", "of inputs"])
def test_dora_by_structure_where_magnitudes_are_matrices(by_output, rank):
    def magnitude(out, into):
        return (out, 1) if by_output else (1, into)

    layers = [(320, 320), (320, 768), (2560, 320)]
    dora = [shape for o, i in layers for shape in (magnitude(o, i), (rank, i), (o, rank))]
    kernel = [(128, 1, 1, 1) if by_output else (1, 64, 1, 1), (rank, 64, 3, 3), (128, rank, 1, 1)]
    hada = [shape for o, i in layers for shape in (*loha(rank, (o, i)), magnitude(o, i))]
    assert factors_of(dora) == (6, 9)
    assert factors_of(dora, kernel) == (8, 12)
    assert factors_of(hada) == (12, 15)
    params = tensors(dora)
    assert find_factors([params], {}) == {p for number, p in enumerate(params) if number % 3}
    # A magnitude of another layer, a vector as a bias has it, and one layer alone.
    assert factors_of([magnitude(640, 640), *dora[1:]])[0] == 0
    assert factors_of([(320,), *dora[1:]])[0] == 0
    assert factors_of(dora[3:6])[0] == 0


@pytest.mark.parametrize("model", ["sd15_full", "sdxl_full"])
def test_full_models_never(model):
    shapes = load(model)
    assert factors_of(shapes)[0] == 0
    # Not even without everything that is not a matrix.
    assert factors_of([shape for shape in shapes if len(shape) > 1])[0] == 0


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)),
        nn.Sequential(nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False)),
        nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False)),
        nn.Sequential(nn.Linear(64, 256, bias=False), nn.ReLU(), nn.Linear(256, 64, bias=False)),
        nn.Sequential(*[nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)] * 3),
        nn.TransformerEncoderLayer(32, 4, 128),
        nn.TransformerEncoderLayer(32, 4, 128, bias=False),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10)),
        nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32)),
    ],
    ids=[
        "mlp",
        "mlp-no-bias",
        "square",
        "feed-forward",
        "deep-feed-forward",
        "transformer",
        "transformer-no-bias",
        "conv",
        "bottleneck",
    ],
)
def test_plain_models_never(model):
    assert find_factors([list(model.parameters())], {}) == set()


@pytest.mark.parametrize(
    "groups",
    [
        [[(4, 32), (32, 4), (32,)]],
        [[(4, 32), (32, 4), (64, 64)]],
        [[(4, 32), (32, 4), (4, 32)]],
        [[(4, 32), (32, 8)]],
        [[]],
    ],
)
def test_unpaired_never(groups):
    assert factors_of(*groups)[0] == 0


@pytest.mark.parametrize("blocks", [1, 2, 4, 6, 12, 24])
@pytest.mark.parametrize(
    "block",
    [
        [(256, 64), (64, 256)],  # feed-forward
        [(512, 64), (64, 256)],  # with both halves of a gated one in one matrix
        [(256, 64), (256, 64), (64, 256)],
        [(256, 64), (64, 256), (256, 64)],
        [(64, 64), (16, 64), (16, 64), (64, 64), (256, 64), (64, 256)],  # with attention to grouped keys
        [(64, 64), (64, 64), (64, 64), (64, 64), (512, 64), (64, 256)],
        [(32, 16), (16, 32), (256, 64), (64, 256)],  # a mixer, of tokens and channels
        [(64, 256), (64, 64, 3, 3), (256, 64)],  # a bottleneck of convolutions
        [(256, 64, 3, 3), (64, 256, 3, 3)],
        [(1, 64), (16, 64), (64, 16)],  # a narrow expert, and its gate
        [(64, 1), (16, 64), (64, 16)],  # an embedding of one number
        [(1, 64), (256, 64), (64, 256)],
    ],
    ids=str,
)
def test_transformers_of_matrices_alone_never(block, blocks):
    assert factors_of(block * blocks)[0] == 0


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        ([(4, 32), (48, 4), (48,)] * 2, "vectors beside low-rank pairs may be biases"),
        ([*loha(4, (48, 32), (32, 48)), (48,)], "vectors beside low-rank pairs may be biases"),
        (loha(4, (32, 32)), "a model's own layers can have these shapes"),
        ([(32, 1), (4, 32), (32, 4)] * 2, "a model's own layers can have these shapes"),
        ([(48, 32), (48,)], ""),
        ([(4, 32, 3, 3), (48, 4), (48, 48)], ""),
        ([(), (48,), (0, 3)], ""),
        ([], ""),
    ],
    ids=str,
)
def test_the_reason_for_a_doubt(shapes, why):
    params = tensors(shapes)
    assert find_factors([params], {}) == set()
    assert why_none([params], {}) == why
    assert why_none([params], dict.fromkeys(params, "layer.weight")) == ""


def run_once(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def test_one_line_says_what_was_found(caplog):
    caplog.set_level(logging.INFO, "library.cameamp.parameters")
    params = [nn.Parameter(torch.randn(4, 32)), nn.Parameter(torch.zeros(32, 4))]
    optimizer = Automagic_CameAMP(params)
    run_once(optimizer)
    run_once(optimizer)
    assert [r.message for r in caplog.records] == [
        "2 of 2 parameters are LoRA factors: ALLoRA is on, unless full_finetune"
    ]


def test_the_line_says_what_hides_factors(caplog):
    caplog.set_level(logging.INFO, "library.cameamp.parameters")
    run_once(Automagic_CameAMP([nn.Parameter(torch.randn(shape)) for shape in [(4, 32), (48, 4), (48,)]]))
    assert [r.message for r in caplog.records] == [
        "none of 3 parameters is a LoRA factor: ALLoRA is off "
        "(vectors beside low-rank pairs may be biases; set_parameter_names decides)"
    ]


@pytest.mark.skipif(not takes_names(), reason="torch takes named parameters from 2.6 on")
def test_names_from_the_groups_and_from_outside():
    def moved(prepare):
        torch.manual_seed(0)
        layers = nn.ModuleDict({"lora_down": nn.Linear(32, 4, bias=False), "other": nn.Linear(7, 7, bias=False)})
        start = layers["lora_down"].weight.detach().clone()
        run_once(prepare(layers))
        return (layers["lora_down"].weight - start).abs().sum()

    def told(layers):
        optimizer = Automagic_CameAMP(layers.parameters(), lr=1e-4)
        optimizer.set_parameter_names({p: name for name, p in layers.named_parameters()})
        return optimizer

    plain = moved(lambda layers: Automagic_CameAMP(layers.parameters(), lr=1e-4))
    assert moved(told) != plain
    assert moved(lambda layers: Automagic_CameAMP(layers.named_parameters(), lr=1e-4)) == moved(told)
    assert moved(lambda layers: Automagic_CameAMP(layers.named_parameters(), lr=1e-4, full_finetune=True)) == plain
