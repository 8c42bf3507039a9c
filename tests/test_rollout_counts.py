"""What a token of a rollout costs, counted on CPU ranks with LoRA on every linear: operations,
collectives, waits of the host, and what grows with the text.
"""

import pytest
import torch

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd import parallel as parallel_module
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.lora import apply_lora
from megatron_gkd.lora_targets import HEAD, LINEARS
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.rollout.row_batch import RowBatch
from tests.counting import WAITS, Counting
from tests.ranks import run_ranks
from tests.rollouts import make_engine, make_sampling

LAYERS = (2, 3)  # what the third layer adds is the cost of a layer
NUM_ROWS, PROMPT_LENGTH, MAX_NEW_TOKENS = 5, 7, 300
SAMPLING = make_sampling(temperature=0.9, top_p=0.9, top_k=20, repetition_penalty=1.1)
OF_ATTENTION = {"baddbmm", "_softmax", "bmm"}


def refuse(*arguments, **options):
    raise AssertionError("a tensor is made of the host's numbers, or read by the host")


def count(rank, world_size, folder, tp, ep, num_written, max_new_tokens=MAX_NEW_TOKENS):
    """What one token costs after so many; the first of them are not written where there are more
    than a few hundred: what a number is does not change what it costs.
    """
    parallel = parallel_module.initialize(
        torch.device("cpu"), tensor_model_parallel_size=tp, expert_model_parallel_size=ep
    )
    model_args = read_model_args(folder)
    model = build_decoder(model_args, parallel, torch.float32)
    load_weights(model, model_args, parallel, folder)
    options = dict(rank=4, alpha=8.0, dropout=0.1, targets=[*LINEARS, HEAD], seed=0)
    apply_lora(model, model_args, parallel, **options)
    engine = make_engine(
        model,
        model_args,
        parallel,
        sampling=SAMPLING,
        max_new_tokens=max_new_tokens,
        stop_token_ids=(1, 2),
    )
    prompts = [[row + 1] * (PROMPT_LENGTH - row) for row in range(NUM_ROWS)]
    with torch.no_grad():
        batch = RowBatch(engine, prompts, None, 1, NUM_ROWS, 0, list(range(NUM_ROWS)))
        batch.reserve(num_written + 1)
        first = max(0, num_written - MAX_NEW_TOKENS)
        batch.cache.response[..., :first, :] = 0
        for number in range(first, num_written):
            batch.write_token(number)
        with Counting() as counting, pytest.MonkeyPatch.context() as patch:
            # a CPU dispatches nothing for what is a copy to or from the host on CUDA
            patch.setattr(torch.Tensor, "tolist", refuse)
            patch.setattr(torch, "tensor", refuse)
            batch.write_token(num_written)
    held = (batch.cache.joined, batch.key_mask)
    num_held = sum(x.untyped_storage().nbytes() for x in held)
    return counting.operations, counting.collectives, counting.elements, num_held


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    sizes = dict(hidden_size=64, head_dim=16, moe_intermediate_size=32, vocab_size=1024)
    work = tmp_path_factory.mktemp("models")
    return {
        layers: build_folder(
            str(work / str(layers)),
            TinyModelConfig(thinker_only=True, num_hidden_layers=layers, **sizes),
        )
        for layers in LAYERS
    }


def of_a_layer(folders, world_size, tp, ep):
    """(operations, collectives) that one layer more costs, the same on every rank."""
    fewer, more = (run_ranks(count, world_size, folders[layers], tp, ep, 3) for layers in LAYERS)
    found = [tuple(a[index] - b[index] for index in (0, 1)) for a, b in zip(more, fewer)]
    assert all(one == found[0] for one in found)
    return found[0]


def test_operations_of_a_layer_and_token(folders):
    operations, collectives = of_a_layer(folders, 1, 1, 1)
    assert 30 < sum(operations.values()) <= 60, operations
    assert not collectives


@pytest.mark.parametrize(
    "layout, most",
    [
        pytest.param((8, 8, 8), 2, id="TP8-EP8"),
        pytest.param((4, 4, 2), 2, id="TP4-EP2", marks=pytest.mark.extended),
        pytest.param((2, 1, 2), 2, id="EP2-DP2"),
        # experts over two replicas of two ranks: the sums come back in two steps
        pytest.param((4, 2, 4), 4, id="TP2-EP4-DP2", marks=pytest.mark.extended),
    ],
)
def test_collectives_of_a_layer_and_token(folders, layout, most):
    operations, collectives = of_a_layer(folders, *layout)
    assert sum(collectives.values()) == most, collectives
    assert not set(collectives) & {"alltoall_base_", "alltoall_"}
    assert sum(operations.values()) <= 75, operations


def test_the_host_waits_for_nothing(folders):
    operations, *_ = run_ranks(count, 1, folders[2], 1, 1, 3)[0]
    names = {name.split(".")[0] for name in operations} | set(operations)
    assert {"addmm_", "topk", "index_select"} <= names  # the counter sees what there is
    assert not names & WAITS


def test_only_attention_grows_with_the_text(folders):
    """Numbers read and written by everything but attention are the same after 3 tokens and after
    250; attention's own grow by the keys and values it reads.
    """
    few, many = (run_ranks(count, 1, folders[2], 1, 1, number)[0] for number in (3, 250))
    assert few[0] == many[0]
    grown = {name for name in many[2] if many[2][name] != few[2][name]}
    assert grown <= OF_ATTENTION and grown
    places, groups, queries, layers, head_dim = 8, 4, 2, 2, 16
    # keys once, values once; scores as they are made (mask and result), softmax, weights
    a_token = layers * places * groups * (2 * head_dim + queries * 4 + 1)
    growth = sum(many[2][name] - few[2][name] for name in grown)
    assert growth == 247 * a_token


@pytest.mark.extended
def test_sixteen_thousand_tokens(folders):
    """What a token reads and what a rollout holds grow in proportion to the text, to its end."""
    texts = (4_000, 8_000, 16_000)
    found = [run_ranks(count, 1, folders[2], 1, 1, length, length + 1)[0] for length in texts]
    reads = [sum(elements.values()) for _, _, elements, _ in found]
    held = [num_bytes for *_, num_bytes in found]
    for of_length in (reads, held):
        first, second = of_length[1] - of_length[0], of_length[2] - of_length[1]
        assert first > 0 and second == 2 * first
