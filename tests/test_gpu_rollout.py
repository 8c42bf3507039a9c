"""Rollouts on a GPU: the Triton kernels in a CUDA graph write what transformers writes. Skipped
where torch sees no GPU; `bash launch/gpu_checks.sh` runs it.
"""

import pytest
import torch

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.lora_targets import HEAD, LINEARS
from megatron_gkd.model.args import read_model_args
from tests.adapters import load_peft, load_thinker, random_adapter, write_adapter
from tests.gpu import DEVICE, needs_gpu
from tests.processes import in_a_process
from tests.rollouts import GREEDY, greedy_texts, make_engine, make_sampling

pytestmark = [pytest.mark.extended, needs_gpu]
MAX_NEW_TOKENS = 40
LENGTHS = (9, 1, 17, 30, 12)
TARGETS = [*LINEARS, HEAD]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = TinyModelConfig(thinker_only=True, num_experts=16, num_experts_per_tok=8)
    return build_folder(str(tmp_path_factory.mktemp("model") / "thinker"), config)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    tensors = random_adapter(read_model_args(folder), 3, TARGETS)
    return write_adapter(
        tmp_path_factory.mktemp("adapter"), tensors, rank=3, alpha=5.0, targets=TARGETS
    )


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1000, (size,), generator=generator).tolist() for size in LENGTHS]


def write_all(folder, adapter, prompts):
    """Texts of the student, greedy and sampled (three samples of each prompt), with the graph and
    without it, and between two of its rollouts the teacher's, on other prompts; the cache grows in
    each. And which kernels ran.
    """
    from megatron_gkd.formats.loading import load_weights
    from megatron_gkd.lora import apply_lora, as_student, as_teacher
    from megatron_gkd.lora.load import load_adapter
    from megatron_gkd.lora.peft_folder import PeftAdapter
    from megatron_gkd.model.decoder import build_decoder
    from megatron_gkd.parallel import initialize, resolve_device
    from megatron_gkd.rollout import cache
    from megatron_gkd.rollout.generate import generate

    sampled = make_sampling(temperature=0.9, top_p=0.9, top_k=30, repetition_penalty=1.1)
    parallel, model_args = initialize(resolve_device(DEVICE)), read_model_args(folder)
    model = build_decoder(model_args, parallel, torch.float32)
    load_weights(model, model_args, parallel, folder)
    stored = PeftAdapter(adapter, model_args)
    options = dict(rank=stored.rank, alpha=stored.alpha, dropout=0.5, targets=stored.targets)
    apply_lora(model, model_args, parallel, **options, seed=0)
    load_adapter(model, model_args, parallel, stored)
    texts, cache.CAPACITY = {}, 16
    for name, sampling, num_samples in (("greedy", GREEDY, 1), ("sampled", sampled, 3)):
        for graphs in (True, False):
            engine = make_engine(
                model,
                model_args,
                parallel,
                sampling=sampling,
                max_new_tokens=MAX_NEW_TOKENS,
                cuda_graphs=graphs,
            )
            authors = as_student, as_student, as_teacher, as_student  # captured, replayed
            for rollout, author in enumerate(authors):
                is_teacher = author is as_teacher
                read = [prompts[-1] + prompts[0], *prompts[::-1]] if is_teacher else prompts
                with author(model):
                    responses = generate(
                        engine, read, seed=3, row_ids=range(len(read)), num_samples=num_samples
                    )
                texts[name, graphs, rollout] = [found.token_ids for found in responses]
    texts["kernels"] = engine.decoder.kernels.__name__
    return texts


@pytest.fixture(scope="module")
def texts(folder, adapter, prompts):
    return in_a_process(write_all, folder, adapter, prompts)


def test_kernels_of_the_device_run(texts):
    kind = "triton" if DEVICE == "cuda" else "torch"
    assert texts["kernels"].endswith(f"{kind}_kernels")


@pytest.mark.parametrize("graphs", [True, False], ids=["graph", "eager"])
def test_greedy_text_equals_peft(texts, folder, adapter, prompts, graphs):
    model, _ = load_peft(load_thinker(folder), adapter)
    expected = list(greedy_texts(model, prompts, MAX_NEW_TOKENS).values())
    for rollout in (0, 1, 3):
        assert texts["greedy", graphs, rollout] == expected
    base = load_thinker(folder)
    read = [prompts[-1] + prompts[0], *prompts[::-1]]
    expected = list(greedy_texts(base, read, MAX_NEW_TOKENS).values())
    assert texts["greedy", graphs, 2] == expected


def test_graph_and_eager_sample_the_same_texts(texts):
    graphed = texts["sampled", True, 0]
    assert len(graphed) == 3 * len(LENGTHS) == len(set(map(tuple, graphed)))
    for rollout in (0, 1, 3):
        assert graphed == texts["sampled", True, rollout] == texts["sampled", False, rollout]
    assert texts["sampled", True, 2] == texts["sampled", False, 2]
