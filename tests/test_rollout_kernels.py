"""The rollout's Triton kernels against its torch kernels (which test_rollout.py compares with
megatron-core's and transformers' layers), and what a compiler makes of them.

Where there is no CUDA, Triton's interpreter runs the kernels, in a process that switches it on
before triton is imported.
"""

import tempfile
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.real_decoder import REAL_SHAPE
from megatron_gkd.rollout import decode, torch_kernels
from tests.gpu import SHARED_MEMORY
from tests.processes import in_a_process
from tests.rollout_layer import CASES, LayerCase, make, run_best, run_layer, run_scores

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# penalty, temperature, columns that are no padding
BEST = [(4000, True), (4000, False), (500, True)]  # columns; whether there is noise
SCORES = [(1.1, 1.0, 4352), (1.0, 0.7, 4200), (1.3, 0.0, 4352), (1.2, 0.9, 0)]
REAL = LayerCase(
    num_rows=32,
    hidden=2048,
    groups=4,
    queries=8,
    head_dim=128,
    num_experts=128,
    num_local_experts=4,
    experts_per_token=8,
    intermediate=768,
    rank=8,
    dtype=torch.bfloat16,
    longest_prompt=64,
    max_new_tokens=64,
)


def run_all():
    from megatron_gkd.rollout import triton_kernels

    results = {}
    for name, case in CASES.items():
        # a launch of fewer programs: the interpreter takes milliseconds for each
        triton_kernels.MOST_KEY_PARTS = 32 if CUDA or name == "one row, rank 1" else 4
        results[name] = run_layer(triton_kernels, case, DEVICE)
    results |= {case: run_scores(triton_kernels, *case, DEVICE) for case in SCORES}
    results |= {case: run_best(triton_kernels, *case, DEVICE) for case in BEST}
    return results


def compile_all(case, capability):
    """What the kernels of a layer need of a GPU of this compute capability: of each its name, bytes
    of shared memory, bytes of registers that it spills, and the code.
    """
    from megatron_gkd.rollout import triton_kernels
    from tests.triton_launches import compile_launch, recorded_launches, spilled_bytes

    results = []
    with recorded_launches() as launches:
        run_layer(triton_kernels, case)
        run_scores(triton_kernels, 1.1, 1.0, 4352, "cpu")
        run_best(triton_kernels, 4352, True, "cpu")
    for launch in launches:
        kernel = compile_launch(launch, capability)
        spilled = spilled_bytes(kernel)
        name = launch.function.__name__
        results.append((name, kernel.metadata.shared, spilled, kernel.asm["ptx"]))
    return results


def write_texts():
    """Texts of both modules' kernels through an engine whose batch becomes smaller and whose cache
    grows, two samples a prompt: of Triton's also the slots after either, and the cache's rows.
    """
    from demo.tiny.config import TinyModelConfig
    from demo.tiny.folder import build_folder
    from megatron_gkd import parallel as parallel_module
    from megatron_gkd.formats.loading import load_weights
    from megatron_gkd.lora import apply_lora
    from megatron_gkd.lora.slots import lora_modules
    from megatron_gkd.lora_targets import LINEARS
    from megatron_gkd.model.args import read_model_args
    from megatron_gkd.model.decoder import build_decoder
    from megatron_gkd.rollout import cache, decode, generate, row_batch, triton_kernels
    from tests.rollouts import make_engine, make_sampling

    # a look after every second token, so that few tokens will do
    triton_kernels.MOST_KEY_PARTS = 2
    cache.LOOK = generate.LOOK = row_batch.LOOK = 2
    cache.CAPACITY = 3  # grows for the fourth of four tokens
    with tempfile.TemporaryDirectory() as work:
        config = TinyModelConfig(
            thinker_only=True,
            num_hidden_layers=1,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=2,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        )
        folder = build_folder(f"{work}/model", config)
        parallel = parallel_module.initialize(torch.device("cpu"))
        model_args = read_model_args(folder)
        model = build_decoder(model_args, parallel, torch.float32)
        load_weights(model, model_args, parallel, folder)
    options = dict(rank=2, alpha=4.0, dropout=0.0, targets=list(LINEARS), seed=0)
    apply_lora(model, model_args, parallel, **options)
    generator = torch.Generator().manual_seed(0)
    for module in lora_modules(model):
        for up in module.slot.up.values():
            torch.nn.init.normal_(up, std=0.1, generator=generator)
    prompts = [[5, 9, 2], [7], [4, 4]]
    texts, slots = {}, []
    for kernels in (torch_kernels, triton_kernels):
        decode.select_kernels = lambda model_args, parallel, kernels=kernels: kernels
        for stopping in (False, True):
            written = texts.get(("torch_kernels", False), [])
            # three of six rows end with their first token
            stops = [written[row][0] for row in (0, 3, 4)] if stopping else []
            engine = make_engine(
                model,
                model_args,
                parallel,
                sampling=make_sampling(temperature=1.5, top_k=40, top_p=0.95),
                max_new_tokens=5,
                stop_token_ids=stops,
            )
            reserve = generate.RowBatch.reserve

            def watched(batch, num_tokens, reserve=reserve):
                before = batch.rows.slots[: batch.size].tolist()
                reserve(batch, num_tokens)
                after = batch.rows.slots[: batch.size].tolist()
                slots.append((before, after, batch.cache.response.shape[2]))

            generate.RowBatch.reserve = watched
            found = generate.generate(engine, prompts, seed=1, row_ids=[0, 1, 2], num_samples=2)
            generate.RowBatch.reserve = reserve
            texts[kernels.__name__.split(".")[-1], stopping] = [
                response.token_ids for response in found
            ]
    return (texts, slots)


@pytest.fixture(scope="module")
def computed():
    return in_a_process(run_all, interpret_triton=not CUDA)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_torch(computed, name):
    """Every function of the module, for the second layer of a cache whose rows share prompts."""
    case, expected = CASES[name], run_layer(torch_kernels, CASES[name])
    tolerance = (1e-5 if CUDA else 3e-6) if case.dtype == torch.float32 else 5e-3
    for key, found in computed[name].items():
        wanted = expected[key]
        if key == "ids":
            assert torch.equal(found, wanted)
        else:
            assert wanted.norm() > 0
            assert (found - wanted).norm() <= tolerance * wanted.norm(), key


@pytest.mark.parametrize(
    "sizes, tp, reason",
    [
        ({}, 8, ""),
        (dict(hidden_size=2050), 1, "hidden_size is 2050, no multiple of 16"),
        (dict(moe_intermediate_size=760), 1, "moe_intermediate_size is 760, no multiple of 16"),
        (dict(head_dim=96), 1, "head_dim is 96, not 32, 64, 128 or 256"),
        (dict(num_key_value_heads=1), 1, "32 query heads share a key, more than 16"),
        (dict(num_key_value_heads=1), 2, ""),
    ],
)
def test_a_gpu_that_does_without_triton_says_why(sizes, tp, reason):
    model_args = replace(REAL_SHAPE.model_args(), **sizes)
    on_cpu = SimpleNamespace(device=torch.device("cpu"), tp_size=tp)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), tp_size=tp)
    assert decode.slow_kernels_note(model_args, on_cpu) == ""
    note = decode.slow_kernels_note(model_args, on_gpu)
    assert note.endswith(f": {reason}") if reason else note == ""
    kernels = decode.select_kernels(model_args, on_gpu)
    assert kernels.CAPTURABLE is not bool(reason)


def test_the_router_is_fp32():
    """As in training, whatever the weights' dtype."""
    layer, sizes, *_, x, _ = make(LayerCase(dtype=torch.bfloat16), "cpu")
    exact = replace(layer, router=layer.router.float())
    found, expected = (
        torch_kernels.route(rows, weights, sizes, (0, 1))
        for rows, weights in ((x, layer), (x.float(), exact))
    )
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.probabilities, expected.probabilities)


@pytest.mark.parametrize("case", SCORES, ids=str)
def test_scores_equal_torch(computed, case):
    """Scores, log-sum-exp (NaN where a logit is not finite) and the largest through the groups."""
    expected = run_scores(torch_kernels, *case, "cpu")
    for key, found in computed[case].items():
        torch.testing.assert_close(found, expected[key], rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("case", BEST, ids=str)
def test_the_best_equal_torch(computed, case):
    """The same noise, and the lowest column of equal scores."""
    found, expected = computed[case], run_best(torch_kernels, *case, "cpu")
    has_number = torch.arange(6) != 4
    assert found["column"][4] in range(case[0])
    assert torch.equal(found["column"][has_number], expected["column"][has_number])
    values = found["value"][[0, 1, 2, 5]]
    assert values.isfinite().all()
    torch.testing.assert_close(values, expected["value"][[0, 1, 2, 5]], rtol=1e-14, atol=1e-14)


def bytes_of_a_draw():
    """At its peak, beside the scores, of 8 rows and 100,000 columns."""
    from megatron_gkd.rollout import triton_kernels
    from tests.live_bytes import LiveBytes
    from tests.triton_launches import recorded_launches

    scores, keys, memory = torch.zeros(8, 100_000), torch.zeros(8, dtype=torch.int64), LiveBytes()
    with recorded_launches(), memory:
        memory.begin()
        triton_kernels.best_of(scores, keys, 0)
    return memory.peak()


def test_a_draw_among_all_columns_holds_no_copy_of_them():
    assert 0 < in_a_process(bytes_of_a_draw) < 8 * 100_000 // 10


class _Watched:
    """The module of Triton kernels, whose functions' own torch operations are counted."""

    CAPTURABLE = True

    def __init__(self, counting):
        self.counting = counting

    def __getattr__(self, name):
        from megatron_gkd.rollout import triton_kernels

        def counted(*arguments):
            with self.counting:
                return getattr(triton_kernels, name)(*arguments)

        return counted


def count_launches(is_partial):
    """(of Triton, of torch) by name, of a layer with one of its two norms; is_partial: experts of
    other ranks, too.
    """
    from tests.counting import HOST, Counting
    from tests.triton_launches import recorded_launches

    case, counting = REAL, Counting()
    if not is_partial:
        case = REAL._replace(num_experts=4, experts_per_token=4)
    with recorded_launches() as launches:
        run_layer(_Watched(counting), case)
    of_torch = {name: n for name, n in counting.operations.items() if name not in HOST}
    return [launch.function.__name__ for launch in launches], of_torch


@pytest.mark.parametrize("is_partial", [False, True])
def test_what_torch_launches_beside_triton(is_partial):
    """The router's product, whose casts CUDA does without; zeros for pairs of other ranks."""
    of_triton, of_torch = in_a_process(count_launches, is_partial)
    assert of_torch.pop("_to_copy") == 2 and of_torch.pop("mm") == 1
    assert of_torch == ({"new_zeros": 1} if is_partial else {})
    of_layer = Counter(of_triton)
    sums = of_layer.pop("sum_kernel")  # before the all-reduces, with tensor parallelism
    assert sums == 2 and of_layer["add_norm_kernel"] == 1
    num_launches = of_layer.total() + 1 + 1  # the other norm, the router's product
    assert num_launches == 13
    assert num_launches + sums + 1 <= 16  # the zeros; collectives are counted with the ranks


@pytest.fixture(scope="module")
def compiled():
    return in_a_process(compile_all, REAL, 90)


def test_weights_are_read_in_16_bytes(compiled):
    """The kernels that read weights use no narrower copies, and fit into shared memory."""
    for name, shared, _, ptx in compiled:
        assert shared <= 100_000, name
        if name in ("linear_kernel", "gate_up_kernel", "down_kernel", "attention_kernel"):
            assert "cp.async.cg" in ptx and "cp.async.ca" not in ptx, name
            assert "mma" in ptx, name


@pytest.mark.parametrize(
    "capability, rank, dtype",
    [
        pytest.param(80, 64, torch.bfloat16),
        pytest.param(89, 128, torch.bfloat16, marks=pytest.mark.extended),
        pytest.param(120, 64, torch.bfloat16, marks=pytest.mark.extended),
        pytest.param(100, 64, torch.bfloat16, marks=pytest.mark.extended),
        pytest.param(90, 128, torch.bfloat16, marks=pytest.mark.extended),
        pytest.param(89, 64, torch.float32, marks=pytest.mark.extended),
    ],
)
def test_kernels_fit_gpus_that_are_not_here(capability, rank, dtype):
    """At the real sizes they find their shared memory; in bfloat16 no register is spilled."""
    found = in_a_process(compile_all, REAL._replace(rank=rank, dtype=dtype), capability)
    assert len(found) > 12
    for name, shared, spilled, _ in found:
        assert shared <= SHARED_MEMORY[capability], name
        assert not spilled or dtype == torch.float32, name


@pytest.mark.skipif(CUDA, reason="the interpreter runs these kernels on a CPU's model")
def test_texts_through_an_engine():
    """Triton's kernels find the keys of a prompt that samples share, and those of rows that have
    moved to other places: no two places write into one slot. Where the cache grows, the responses
    that have ended leave it.
    """
    texts, slots = in_a_process(write_texts, interpret_triton=True)
    for stopping in (False, True):
        expected = texts["torch_kernels", stopping]
        assert texts["triton_kernels", stopping] == expected
        assert len(set(map(tuple, expected))) > 3
    first = list(range(8))
    whole, grown = (first, first, 8), (first[:4], first[:4], 4)
    moved = slots[-2][0]  # places of rows that go on, as they were
    assert len(set(moved)) == 4 and moved != first[:4]
    kept_by_triton = [whole, whole, (moved, moved, 8), (moved, first[:4], 4)]
    assert slots == [whole, whole, grown, grown, *kept_by_triton]
