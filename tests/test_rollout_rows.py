"""The rows of a rollout: samples, log-probabilities, chunks of prompts, rows that end, the cache
that grows. Texts are those of transformers, or of the rows written alone.
"""

from collections import Counter
from functools import partial
from typing import NamedTuple

import pytest
import torch

from megatron_gkd.lora import as_student, as_teacher
from megatron_gkd.rollout import cache
from megatron_gkd.rollout import generate as generate_module
from megatron_gkd.rollout.engine import Engine, bucket
from megatron_gkd.rollout.generate import Response, generate
from megatron_gkd.rollout.graphs import Graphs
from megatron_gkd.rollout.prefill import chunks_of
from megatron_gkd.rollout.row_batch import RowBatch
from tests.adapters import load_thinker
from tests.lora_runs import build, initialize
from tests.ranks import run_ranks
from tests.rollouts import GREEDY, greedy_texts, make_engine, make_sampling

SIZES = dict(
    num_hidden_layers=2,
    hidden_size=64,
    head_dim=16,
    moe_intermediate_size=32,
    vocab_size=1000,
    thinker_only=True,
)
LENGTHS = (9, 1, 17, 4, 12)
LONG = 40  # the host looks after tokens 1, 17 and 33
ENDS = (21, 5, 25, 16, 36)  # tokens of each row until the first stop id, of LONG
SAMPLED = make_sampling(temperature=0.9, top_p=0.9, top_k=50, repetition_penalty=1.1)
# (world size, TP, PP, EP); data-parallel size is what remains
SINGLE, EP2, PP2, TP2 = (1, 1, 1, 1), (2, 1, 1, 2), (2, 1, 2, 1), (2, 2, 1, 2)
DP2, CP2 = (2, 1, 1, 1), (2, 1, 1, 1, 2)  # the fifth: CP
TP2_EP4 = (4, 2, 1, 4)


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder(**SIZES)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1000, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def thinker(folder):
    return load_thinker(folder)


class Written(NamedTuple):
    responses: dict[int, list[Response]]
    """Of each row, its samples"""
    sizes: list[int]
    """Of the batch, for each token but the first"""
    capacities: list[int]
    """Response positions of the cache, likewise"""
    forwards: list[tuple[int, int]]
    """Shape of the packed ids of each forward for the prompts"""


def write(rank, world_size, folder, layout, cases):
    """Of each case, of its rows ({number: prompt}) this rank's share, every dp_size-th. `again`:
    with the engine of the case before; `capacity`: cache.CAPACITY.
    """
    place = initialize(*layout[1:])
    model_args, model = build(place, folder)
    sizes, capacities, forwards, write_token = [], [], [], RowBatch.write_token

    def record(batch, num_written):
        sizes.append(batch.size)
        capacities.append(batch.cache.response.shape[4])
        write_token(batch, num_written)

    RowBatch.write_token = record
    model.register_forward_pre_hook(lambda _, inputs: forwards.append(tuple(inputs[0].shape)))
    found = []
    for case in cases:
        settings = dict(rows={}, num_samples=1, again=False, capacity=512, max_new_tokens=LONG)
        settings |= case
        rows, num_samples = settings.pop("rows"), settings.pop("num_samples")
        again, cache.CAPACITY = settings.pop("again"), settings.pop("capacity")
        if not again:
            engine = make_engine(model, model_args, place, **settings)
        numbers = list(rows)[place.dp_rank :: place.dp_size]
        texts = generate(
            engine,
            [rows[number] for number in numbers],
            seed=3,
            row_ids=numbers,
            num_samples=num_samples,
        )
        responses = {
            number: texts[index * num_samples : (index + 1) * num_samples]
            for index, number in enumerate(numbers)
        }
        found.append(Written(responses, sizes[:], capacities[:], forwards[:]))
        for recorded in (sizes, capacities, forwards):
            recorded.clear()
    return found


def run(folder, layout, *cases):
    """Of each case what every rank has."""
    return list(zip(*run_ranks(write, layout[0], folder, layout, cases)))


def texts_of(of_ranks):
    """{row: token ids of its samples}; the ranks of a replica agree."""
    texts = {}
    for written in of_ranks:
        for row, samples in written.responses.items():
            text = [sample.token_ids for sample in samples]
            assert texts.setdefault(row, text) == text
    return texts


def numbered(prompts):
    return dict(enumerate(prompts))


def test_the_samples_of_a_prompt_are_those_of_the_prompt_given_again_and_again(folder, prompts):
    """Sample s of n of row r has the noise of row r n + s."""
    repeated = numbered([prompt for prompt in prompts for _ in range(3)])
    cases = [
        dict(rows=rows, num_samples=num_samples, sampling=sampling, max_new_tokens=6)
        for sampling in (SAMPLED, GREEDY)
        for rows, num_samples in ((numbered(prompts), 3), (repeated, 1))
    ]
    drawn, *others = map(texts_of, run(folder, SINGLE, *cases))
    assert all(len({str(text) for text in samples}) == 3 for samples in drawn.values())
    drawn_again, greedy, greedy_again = others
    for samples, again in ((drawn, drawn_again), (greedy, greedy_again)):
        assert sum(samples.values(), []) == [again[number][0] for number in range(15)]
    assert all(text == samples[0] for samples in greedy.values() for text in samples)
    for layout in (EP2, PP2):
        assert list(map(texts_of, run(folder, layout, cases[0], cases[2]))) == [drawn, greedy]


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, make_sampling(temperature=1.4), SAMPLED, make_sampling(top_p=0.6, temperature=0.7)],
    ids=["greedy", "temperature", "all filters", "top-p"],
)
def test_log_probabilities_are_those_of_transformers(folder, prompts, thinker, sampling):
    """Before temperature, filters and penalty; two samples a row, more tokens than the host reads
    at once.
    """
    case = dict(rows=numbered(prompts), num_samples=2, sampling=sampling, max_new_tokens=20)
    for layout in (SINGLE, TP2, PP2):
        ((*of_ranks,),) = run(folder, layout, case)
        for written in of_ranks:
            assert sorted(written.responses) == list(range(len(prompts)))
            for row, samples in written.responses.items():
                for sample in samples:
                    ids = torch.tensor([prompts[row] + sample.token_ids])
                    with torch.no_grad():
                        logits = thinker(input_ids=ids).logits[0, len(prompts[row]) - 1 : -1]
                    text = torch.tensor(sample.token_ids)[:, None]
                    expected = logits.log_softmax(dim=1).gather(1, text)[:, 0].tolist()
                    assert sample.log_probabilities == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.parametrize(
    "lengths, max_tokens, expected",
    [
        ([9, 9, 4, 3, 1], 26, [(0, 5)]),
        ([9, 9, 4, 3, 1], 25, [(0, 4), (4, 5)]),
        ([9, 9, 4, 3, 1], 18, [(0, 2), (2, 5)]),
        ([9, 9, 4, 3, 1], 17, [(0, 1), (1, 5)]),
        ([9, 9, 4, 3, 1], 16, [(0, 1), (1, 4), (4, 5)]),
        ([9, 9, 4, 3, 1], 8, [(0, 1), (1, 2), (2, 5)]),  # two are longer than 8
        ([9, 9, 4, 3, 1], 7, [(0, 1), (1, 2), (2, 4), (4, 5)]),
        ([9, 9, 4, 3, 1], 1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        ([16], 16, [(0, 1)]),
        ([16], 15, [(0, 1)]),
        ([], 16, []),
    ],
)
def test_chunks(lengths, max_tokens, expected):
    chunks = chunks_of(lengths, max_tokens)
    assert [(chunk.start, chunk.stop) for chunk in chunks] == expected


FORWARDS = {  # at prefill_tokens 8: all rows; rows 0, 2 and 4, then 1 and 3 with padding rows
    SINGLE: [[(1, 17), (1, 12), (1, 9), (1, 4 + 1)]],
    EP2: [[(1, 17), (1, 12), (1, 9)], [(1, 4 + 1), (1, 1), (1, 1)]],
    PP2: [[(1, 17), (1, 12), (1, 9), (1, 4 + 1)]] * 2,
    TP2_EP4: [[(1, 18), (1, 12), (1, 10)]] * 2 + [[(1, 6), (1, 2), (1, 2)]] * 2,
}


@pytest.mark.parametrize("layout", FORWARDS, ids=["single", "EP2-DP2", "PP2", "TP2-EP4-DP2"])
def test_texts_do_not_depend_on_the_chunks(folder, prompts, thinker, layout):
    settings = dict(rows=numbered(prompts), max_new_tokens=6)
    small, whole, drawn_small, drawn_whole = run(
        folder,
        layout,
        dict(prefill_tokens=8, **settings),
        dict(prefill_tokens=10_000, **settings),
        dict(prefill_tokens=8, sampling=SAMPLED, **settings),
        dict(prefill_tokens=10_000, sampling=SAMPLED, **settings),
    )
    assert [written.forwards for written in small] == FORWARDS[layout]
    assert all(len(written.forwards) == 1 for written in whole)
    expected = {row: [text[:6]] for row, text in greedy_texts(thinker, prompts, LONG).items()}
    assert texts_of(small) == texts_of(whole) == expected
    assert texts_of(drawn_small) == texts_of(drawn_whole) != expected


@pytest.fixture(scope="module")
def stop_token_ids(thinker, prompts):
    """Ids with which the greedy texts have ENDS tokens."""
    texts = greedy_texts(thinker, prompts, LONG)
    return [texts[row][end - 1] for row, end in enumerate(ENDS)]


@pytest.mark.parametrize(
    "layout, sizes",
    [
        (SINGLE, [8] * 16 + [4] * 16 + [1] * 7),  # 5 rows, 3 from token 17 on, 1 from token 33 on
        (PP2, [8] * 16 + [4] * 16 + [1] * 7),
        (EP2, [4] * 32 + [1] * 7),  # three rows, and two that end earlier
        (TP2_EP4, [4] * 32 + [2] * 7),  # a multiple of TP
    ],
    ids=["single", "PP2", "EP2-DP2", "TP2-EP4-DP2"],
)
def test_rows_that_have_ended_leave_the_batch(
    folder, prompts, thinker, stop_token_ids, layout, sizes
):
    """A text ends with the first stop id; ranks that share experts end together, with the last of
    their rows.
    """
    expected = greedy_texts(thinker, prompts, LONG, stop_token_ids=stop_token_ids)
    assert tuple(map(len, expected.values())) == ENDS
    settings = dict(rows=numbered(prompts), stop_token_ids=stop_token_ids)
    long, short = run(folder, layout, settings, dict(max_new_tokens=20, **settings))
    assert texts_of(long) == {row: [text] for row, text in expected.items()}
    assert texts_of(short) == {row: [text[:20]] for row, text in expected.items()}
    for written, written_short in zip(long, short):
        assert written.sizes == sizes
        assert written_short.sizes == sizes[:19]


def test_writing_ends_at_the_look_after_the_last_row(folder, prompts, stop_token_ids):
    """Rows 1 and 3 end with tokens 5 and 16, the host looks after 1 and 17; a row ends with its
    first token.
    """
    rows = numbered(prompts)
    two, none = run(
        folder,
        SINGLE,
        dict(rows={row: rows[row] for row in (1, 3)}, stop_token_ids=stop_token_ids),
        dict(rows={1: rows[1]}, stop_token_ids=range(1000)),
    )
    assert two[0].sizes == [2] * 16
    assert [len(text) for (text,) in texts_of(two).values()] == [5, 16]
    assert none[0].sizes == [] and [len(text) for (text,) in texts_of(none).values()] == [1]


def write_and_meet(rank, world_size, folder, layout, prompts, broken, max_new_tokens, **settings):
    """What this rank says of itself whenever all ranks meet, and the error. broken: a token whose
    embedding has overflowed.
    """
    generate_module.MEET, said, any_writes = 16, [], Engine.any_writes

    def record(engine, is_writing):
        said.append(is_writing)
        return any_writes(engine, is_writing)

    Engine.any_writes = record
    place = initialize(*layout[1:])
    model_args, model = build(place, folder)
    if broken is not None:
        model.embedding.word_embeddings.weight.data[broken] = float("inf")
    engine = make_engine(model, model_args, place, max_new_tokens=max_new_tokens, **settings)
    rows = list(range(len(prompts)))[place.dp_rank :: place.dp_size]
    try:
        generate(engine, [prompts[row] for row in rows], seed=3, row_ids=rows)
    except FloatingPointError as error:
        return said, str(error)
    return said, ""


@pytest.mark.parametrize(
    "layout, rows, is_broken, max_new_tokens, expected",
    [
        # three rows write until token 36; two until token 16
        pytest.param(DP2, 5, False, LONG, [[True, True, False], [False] * 3], id="DP2"),
        pytest.param(DP2, 1, False, LONG, [[True, False], [False] * 2], id="no rows"),
        pytest.param(DP2, 5, True, LONG, [[True, True, False], [False] * 3], id="an error"),
        pytest.param(CP2, 5, False, LONG, [[True, True, False]] * 2, id="CP2"),
        pytest.param(TP2, 5, False, LONG, [[]] * 2, id="TP2"),
        pytest.param(DP2, 5, False, 16, [[]] * 2, id="short"),
    ],
)
def test_ranks_that_write_apart_meet_until_all_have_written(
    folder, prompts, stop_token_ids, layout, rows, is_broken, max_new_tokens, expected
):
    """No collective waits for longer than MEET tokens."""
    broken = prompts[1][-1] if is_broken else None
    assert [broken in prompt for prompt in prompts] == [False, is_broken, *[False] * 3]
    settings = dict(stop_token_ids=stop_token_ids)
    arguments = (folder, layout, prompts[:rows], broken, max_new_tokens)
    found = run_ranks(partial(write_and_meet, **settings), 2, *arguments)
    assert [said for said, _ in found] == expected
    assert [bool(error) for _, error in found] == [False, is_broken]


STOPS_OFTEN = range(0, 1000, 20)


def test_texts_do_not_depend_on_the_rest_of_the_batch(folder, prompts):
    """Five rows of three samples that end at different times, in a cache that is large enough and
    in one that grows from 8 to 16, 32 and 40 positions; against each row alone.
    """
    settings = dict(num_samples=3, sampling=SAMPLED, stop_token_ids=STOPS_OFTEN)
    alone = [dict(rows={row: prompt}, **settings) for row, prompt in enumerate(prompts)]
    expected = {}
    for of_ranks in run(folder, SINGLE, *alone):
        expected |= texts_of(of_ranks)
    lengths = Counter(len(text) for samples in expected.values() for text in samples)
    assert len(lengths) > 6 and lengths[LONG] and min(lengths) < 17  # some leave, some stay
    settings["rows"] = numbered(prompts)
    for layout in (SINGLE, EP2, TP2):
        large, growing = run(folder, layout, settings, dict(capacity=8, **settings))
        assert texts_of(large) == texts_of(growing) == expected
        for written, grown in zip(large, growing):
            for row, samples in written.responses.items():
                for one, other in zip(samples, grown.responses[row]):
                    assert one.log_probabilities == pytest.approx(
                        other.log_probabilities, rel=0, abs=1e-5
                    )
        for written, grown in zip(large, growing):
            assert written.sizes == grown.sizes == sorted(written.sizes, reverse=True)
            assert written.sizes[0] == 16 > written.sizes[-1]
            assert written.capacities == [40] * 39
            assert grown.capacities == [32] * 16 + [40] * 23


def test_an_engine_writes_again(folder, prompts):
    """More rows than before, fewer, none and other samples: as a new engine writes them, which has
    seen no other tokens.
    """
    rows = numbered(prompts)
    cases = [
        dict(rows={2: rows[2]}),
        dict(rows=rows, num_samples=2),
        dict(rows={}),
        dict(rows={4: rows[4], 1: rows[1]}),
    ]
    rewarding = make_sampling(temperature=0.9, top_k=50, repetition_penalty=0.6)
    settings = dict(sampling=rewarding, stop_token_ids=STOPS_OFTEN, max_new_tokens=20)
    cases = [case | settings for case in cases]
    for layout in (SINGLE, EP2):
        new = map(texts_of, run(folder, layout, *cases))
        again = [cases[0]] + [dict(again=True, **case) for case in cases[1:]]
        assert list(map(texts_of, run(folder, layout, *again))) == list(new)


def state_of_engine(rank, world_size, folder):
    place = initialize(1, 1, 1)
    model_args, model = build(place, folder)
    engine = make_engine(model, model_args, place, max_new_tokens=3)
    states = [engine.state(number) for number in (5, 2, 128, 129, 1, 256)]
    return [(rows.tokens.data_ptr(), sampler.seen.data_ptr()) for rows, sampler in states]


def test_the_state_stays_where_it_is_until_it_is_too_small(folder):
    """CUDA graphs read it there."""
    (addresses,) = run_ranks(state_of_engine, 1, folder)
    assert addresses[0] == addresses[1] == addresses[2] != addresses[3]
    assert addresses[3] == addresses[4] == addresses[5]


def keys_of_graphs(rank, world_size, folder):
    """What a graph would be captured for, and where all of them would go."""
    place = initialize(1, 1, 1)
    model_args, model = build(place, folder, rank=2, alpha=2, targets=["q_proj"], seed=0)
    engine = make_engine(model, model_args, place, max_new_tokens=2)
    events, run_call, clear = [], Graphs.run, Graphs.clear

    def run_and_note(graphs, key, call):
        events.append(key)
        run_call(graphs, key, call)

    def clear_and_note(graphs):
        events.append("of the greedy" if graphs is engine.greedy.graphs else "clear")
        clear(graphs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graphs, "run", run_and_note)
        patch.setattr(Graphs, "clear", clear_and_note)
        for author, number in ((as_student, 2), (as_teacher, 2), (as_student, 3)):
            with author(model):
                generate(engine, [[5]] * number, seed=0, row_ids=range(number))
        engine.state(129)
        engine.close()
    return events


def test_a_graph_for_each_adapter_and_size(folder):
    """They go where the state moves, and at the end those of both engines."""
    (events,) = run_ranks(keys_of_graphs, 1, folder)
    keys = [("student", 2), ("teacher", 2), ("student", 4)]
    assert events == ["clear", *keys, "clear", "clear", "of the greedy"]


@pytest.mark.parametrize(
    "num_rows, multiple, expected",
    [
        (1, 1, 1),
        (3, 1, 4),
        (24, 1, 24),
        (25, 1, 32),
        (128, 1, 128),
        (129, 1, 192),
        (200, 1, 256),
        (1, 2, 2),
        (1, 8, 8),
        (17, 16, 32),
        (97, 64, 128),
        (129, 2, 192),
        (200, 8, 256),
        (129, 48, 192),
        (1, 3, 24),
        (1, 5, 320),
    ],
)
def test_buckets(num_rows, multiple, expected):
    assert bucket(num_rows, multiple) == expected
