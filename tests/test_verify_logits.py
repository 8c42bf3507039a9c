"""`verify` of logits: media take part, and the layer that parts is named."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_gkd import parallel
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.media.towers import build_towers
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.verify.logits import Trace, first_parting, layer_errors, megatron_trace
from megatron_gkd.verify.models import expected_of_transformers
from megatron_gkd.verify.tensors import Folders
from tests.ranks import run_ranks
from tests.test_verify import SMALL


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return Path(tiny_folder(**SMALL))


def without_media(rank, world_size, folder):
    """Row -> the largest difference of a logit with its media, with media that are silent or black,
    and without what the vision tower adds to the first layers.
    """
    place = parallel.initialize(torch.device("cpu"))
    model_args = read_model_args(folder)
    model = build_decoder(model_args, place, torch.float32).eval()
    load_weights(model, model_args, place, folder)
    model.towers = build_towers(folder, model_args, place, torch.float32, audio=True, visual=True)
    encode, found = model.towers.encode, {}
    for expected in expected_of_transformers(Folders(folder)):
        rows, differences = expected.rows, []
        media = rows.media and replace(
            rows.media, audio=rows.media.audio * 0, pixels=rows.media.pixels * 0
        )
        for shown, with_deepstack in (
            (rows, True),
            (replace(rows, media=media), True),
            (rows, False),
        ):
            model.towers.encode = (
                encode if with_deepstack else lambda batch: replace(encode(batch), deepstack=None)
            )
            ours = megatron_trace(model, model_args, place, shown, expected.positions).logits
            differences.append((ours - expected.trace.logits).abs()[rows.real].max().item())
        found[rows.name] = differences
    return found


def test_media_take_part(folder):
    """Audio and image rows pass only with what the towers make of these very media, a picture also
    with deepstack.
    """
    [found] = run_ranks(without_media, 1, folder)
    assert found.keys() == {"text", "audio", "image"}
    assert all(differences[0] < 1e-4 for differences in found.values())
    assert max(found["text"]) < 1e-4 and found["audio"][1] > 0.01
    assert found["image"][1] > 0.01 and found["image"][2] > 0.01


@pytest.mark.parametrize(
    "errors, said",
    [
        (
            [0.0, 1e-7, 2e-7, 3e-3, 4e-3],
            "first at layer 2: a token is off by 3.0e-03 of its RMS, before it 2.0e-07",
        ),
        ([2e-2, 2e-2, 2e-2], "first at the embedding or a tower: a token is off by 2.0e-02"),
        ([0.0, 1e-7, math.inf, math.inf], "first at layer 1: a token is off by inf"),
        (
            [0.0, 4e-6, 3e-5, 6e-5],
            "no layer stands out: the largest jump is at layer 0, from 0.0e+00 to 4.0e-06",
        ),
        (
            [0.0, 1e-7, 8e-7, 9e-7],
            "all layers agree: the final norm or the lm_head (the largest jump is at layer 1, from",
        ),
    ],
)
def test_the_layer_that_parts(errors, said):
    assert first_parting(dict(enumerate(errors))).startswith(said)


def test_one_token_of_many_that_parts_is_enough():
    """The error is a token's own, not drowned in the others'."""
    hidden = torch.randn(1, 100, 8, generator=torch.Generator().manual_seed(0))
    wrong = hidden.clone()
    wrong[0, 70] *= 1.01
    real = torch.ones(1, 100, dtype=torch.bool)
    assert layer_errors(Trace({1: wrong}, wrong), Trace({1: hidden}, hidden), real)[
        1
    ] == pytest.approx(0.01, rel=1e-4)
    real[0, 70] = False
    assert layer_errors(Trace({1: wrong}, wrong), Trace({1: hidden}, hidden), real)[1] == 0
