"""Sequences from a graph: the likelihood against enumeration, the generator against the likelihood, streams and files that go on exactly, files of graphs with every mistake."""
import itertools
import json
import math
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import gammaln

from tformer_lab.data import graphical
from tformer_lab.data.graphical import GraphStream, draw_context, draw_kernels, kernel_table, generate, generate_states, log_dirichlet, sequence_block, shape_rows, stored_sequences
from tformer_lab.data.graphs import GraphError, graph_figure, graph_yaml, make_graph, parse_graph, read_graph
from tformer_lab.storage import FileError
from tformer_lab.theory.graph_bounds import entropy_bounds, likelihood_bounds, particle_bounds, per_token
from tformer_lab.theory.graph_entropy import calibrate, compressed_size, entropy_rate, position_entropies, stationary_law, token_entropies
from tformer_lab.theory.graphical import exact_work, filtered_states, log_likelihood, past_size, predict

EXAMPLES = Path(__file__).parents[1] / "nbs/papers/graphs"


def node(name, states=2, parents=(), concentration=.7, **more): return {"name": name, "states": states, "concentration": concentration, "parents": list(parents), **more}


def seen(parents, states=3, **more): return node("X", states, parents, observed=True, **more)


GRAPHS = {
    "chain": [node("Z", 3), seen("Z", 4)],
    "no hidden node": [seen("", 4)],
    "product": [node("A", 2), node("B", 3, "A"), seen("BA")],
    "product of three, listed backwards": [seen("CBA", 2), node("C", 2, "BA"), node("B", 2, "A"), node("A", 2)],
    "fullrank": [node("A", 2, kernel="fullrank"), node("B", 3, "A", kernel="fullrank"), seen("BA", kernel="fullrank")],
    "fullrank, listed backwards": [seen("CBA", 2, kernel="fullrank"), node("C", 2, "BA", kernel="fullrank"), node("B", 2, "A"), node("A", 2)],
    "slow and dead": [node("A", 2, mode="slow"), node("B", 2, "A", mode="dead"), node("C", 2, "BA", mode="dead", kernel="fullrank"), seen("AC", mode="dead")],
    "a node that is seen through another only": [node("A", 3), node("B", 2, "A"), seen("B")],
    "below the observed node": [node("A", 2), seen("A"), node("C", 2, "XA"), node("D", 2, "CX", kernel="fullrank")],
    "small concentrations": [node("A", 2, concentration=1e-3), node("B", 2, "A", 1e-3), seen("BA", concentration=1e-3)],
}
graphs = pytest.mark.parametrize("nodes", GRAPHS.values(), ids=GRAPHS)


def paths(kernels, length):
    """The states of all nodes over time, and the probability of each path: (tokens, {name: states}, p)."""
    graph, P = kernels.graph, {name: table.numpy() for name, table in kernels.tables.items()}
    names = list(graph.order)
    for path in itertools.product(itertools.product(*(range(graph[name].states) for name in names)), repeat=length - 1):
        p, old = 1., dict.fromkeys(names, 0)
        for states in path:
            new = dict(zip(names, states))
            for name in names:  # the new states of parents, and the node's own old one
                p *= P[name][(*(old[name] if other == name else new[other] for other in graph.inputs(name)), new[name])]
            old = new
        history = {name: (0, *(states[i] for states in path)) for i, name in enumerate(names)}
        yield history[graph.observed.name], history, p


# likelihood

@graphs
def test_the_likelihood_is_the_sum_over_all_paths(nodes):
    kernels, length = draw_kernels(make_graph(nodes), 3), 3
    law = {}
    for x, _, p in paths(kernels, length): law[x] = law.get(x, 0.) + p
    x = torch.tensor(list(law))
    log_p = log_likelihood(kernels, x)
    np.testing.assert_allclose(log_p[:, -1].exp(), list(law.values()), rtol=1e-10)
    for sequence, found in zip(x.tolist(), log_p[:, 1].exp()): assert found == pytest.approx(sum(p for other, p in law.items() if other[:2] == tuple(sequence[:2])), rel=1e-10)
    assert (log_p[:, 0] == 0).all()


@graphs
def test_predictions_are_ratios_of_likelihoods_and_sum_to_one(nodes):
    kernels = draw_kernels(make_graph(nodes), 1)
    x = generate(kernels, 6, 9, np.random.default_rng(0))
    p = predict(kernels, x)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-12)
    for token in range(kernels.graph.vocab_size):
        longer = torch.cat([x, torch.full((6, 1), token)], 1)
        np.testing.assert_allclose(p[:, -1, token], log_likelihood(kernels, longer).diff(dim=1)[:, -1].exp(), rtol=1e-9)
    np.testing.assert_allclose(p[:, :-1].gather(2, x[:, 1:, None])[..., 0], log_likelihood(kernels, x).diff(dim=1).exp(), rtol=1e-9)


@graphs
def test_the_filter_is_bayes_rule_over_all_paths(nodes):
    kernels = draw_kernels(make_graph(nodes), 3)
    graph, x = kernels.graph, generate(kernels, 1, 3, np.random.default_rng(1))
    expected = {name: np.zeros(graph[name].states) for name in graph.order if not graph[name].observed}
    for tokens, history, p in paths(kernels, 3):
        if tokens == tuple(x[0].tolist()):
            for name in expected: expected[name][history[name][-1]] += p
    found = filtered_states(kernels, x)
    assert set(found) == set(expected)
    for name, q in expected.items():
        np.testing.assert_allclose(found[name][0, -1], q / q.sum(), rtol=1e-10)
        np.testing.assert_array_equal(found[name][0, 0], np.eye(len(q))[0])
        np.testing.assert_allclose(filtered_states(kernels, x, [name])[name], found[name], rtol=1e-10)


def test_the_order_of_parents_and_of_nodes_does_not_change_the_law():
    one = draw_kernels(make_graph(GRAPHS["product of three, listed backwards"]))
    other = draw_kernels(make_graph([node("A", 2), node("B", 2, "A"), node("C", 2, "AB"), seen("ABC", 2)]))
    x = torch.cat([torch.zeros(8, 1, dtype=torch.long), torch.tensor(list(itertools.product(range(2), repeat=3)))], 1)
    np.testing.assert_allclose(log_likelihood(one, x), log_likelihood(other, x), rtol=1e-12)


def test_a_batch_is_its_sequences_also_in_parts(monkeypatch):
    kernels = draw_kernels(make_graph(GRAPHS["below the observed node"]))
    x = generate(kernels, 7, 12, np.random.default_rng(0))
    whole = log_likelihood(kernels, x), predict(kernels, x), filtered_states(kernels, x)["D"]
    monkeypatch.setattr("tformer_lab.theory.graphical._AT_ONCE", 16)
    for a, b in zip(whole, (log_likelihood(kernels, x), predict(kernels, x), filtered_states(kernels, x)["D"])): np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_allclose(whole[0][3:4], log_likelihood(kernels, x[3:4]), rtol=1e-12)


def test_long_sequences_do_not_underflow():
    kernels = draw_kernels(read_graph(EXAMPLES / "five_nodes.yaml").with_concentration(1e-2))
    x = torch.cat([torch.zeros(2, 1, dtype=torch.long), torch.randint(0, 32, (2, 2047), generator=torch.Generator().manual_seed(0))], 1)  # tokens that the graph would hardly give
    log_p = log_likelihood(kernels, x)
    assert torch.isfinite(log_p).all() and (log_p.diff(dim=1) < 0).all() and (log_p[:, -1] < -5000).all()
    chain = draw_kernels(make_graph(GRAPHS["chain"]))
    x = generate(chain, 2, 2048, np.random.default_rng(0))
    A, E, log_b = chain.tables["Z"].log(), chain.tables["X"].log(), torch.full((2, 3), -torch.inf, dtype=torch.float64)
    log_b[:, 0] = 0
    for token in x.T[1:]: log_b = (log_b[:, :, None] + A).logsumexp(1) + E[:, token].T
    np.testing.assert_allclose(log_likelihood(chain, x)[:, -1], log_b.logsumexp(1), rtol=1e-12)


# context nodes

CONTEXT = {
    "no hidden node": [seen("", mode="context")],
    "hidden parent": [node("Z"), seen("Z", mode="context", concentration=.2)],
    "hidden context node": [node("Z", mode="context"), seen("Z")],
    "all, fullrank": [node("A", mode="context"), node("B", 2, "A", mode="context", kernel="fullrank"), seen("BA", 2, mode="context", kernel="fullrank", concentration=.4)],
    "below another": [node("A", mode="slow"), node("B", 2, "A"), seen("B", mode="context")],
}
contexts = pytest.mark.parametrize("nodes", CONTEXT.values(), ids=CONTEXT)


def context_law(kernels, length):
    """p of each sequence and its path, with the Dirichlet-multinomial law of all counts at once."""
    graph, names = kernels.graph, list(kernels.graph.order)
    for path in itertools.product(itertools.product(*(range(graph[name].states) for name in names)), repeat=length - 1):
        log_p, old, counts = 0., dict.fromkeys(names, 0), {name: np.zeros(graph.kernel_shape(name)) for name in names if graph[name].mode == "context"}
        for states in path:
            new = dict(zip(names, states))
            for name in names:
                entry = (*(old[name] if other == name else new[other] for other in graph.inputs(name)), new[name])
                if name in counts: counts[name][entry] += 1
                else: log_p += math.log(kernels.tables[name][entry])
            old = new
        for name, n in counts.items():
            a, s = graph[name].concentration, graph[name].states
            log_p += (gammaln(s * a) - gammaln(s * a + n.sum(-1)) + (gammaln(a + n) - gammaln(a)).sum(-1)).sum()
        yield (0, *(states[names.index(graph.observed.name)] for states in path)), {name: states for name, states in zip(names, path[-1])}, math.exp(log_p)


@contexts
def test_context_nodes_are_integrated_over_exactly(nodes):
    kernels, length = draw_kernels(make_graph(nodes)), 5 if len(nodes) < 3 else 4
    law, last = {}, {}
    for x, states, p in context_law(kernels, length):
        law[x] = law.get(x, 0.) + p
        for name, state in states.items(): last[x, name, state] = last.get((x, name, state), 0.) + p
    x = torch.tensor(list(law))
    np.testing.assert_allclose(log_likelihood(kernels, x)[:, -1].exp(), list(law.values()), rtol=1e-10)
    p = predict(kernels, x)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(p[:, :-1].gather(2, x[:, 1:, None])[..., 0], log_likelihood(kernels, x).diff(dim=1).exp(), rtol=1e-10)
    for name, q in filtered_states(kernels, x).items():
        np.testing.assert_allclose(q[:, -1], [[last[key, name, s] / law[key] for s in range(q.shape[-1])] for key in law], rtol=1e-9)


@contexts
def test_sequences_with_kernels_of_their_own_have_the_integrated_law(nodes):
    kernels = draw_kernels(make_graph(nodes))
    check_frequencies(kernels, 4)


def test_products_in_context_and_too_many_pasts_are_refused_by_name():
    product = draw_kernels(make_graph([node("A"), node("B"), seen("AB", mode="context")]))
    with pytest.raises(GraphError, match="'X' is in mode context, and its kernel is a product over A and B"): log_likelihood(product, torch.zeros(1, 4, dtype=torch.long))
    long = draw_kernels(make_graph([node("Z", 8), seen("Z", 8, mode="context")]))
    with pytest.raises(GraphError, match="pasts of Z have to be told apart.*131,072"): log_likelihood(long, generate(long, 1, 64, np.random.default_rng(0)))
    aside = draw_kernels(make_graph([node("A"), seen("A"), node("B", 2, "AX", mode="context")]))  # below the tokens it does not matter
    without = draw_kernels(make_graph([node("A"), seen("A")]))
    x = generate(aside, 5, 6, np.random.default_rng(0))
    np.testing.assert_allclose(log_likelihood(aside, x), log_likelihood(without, x), rtol=1e-12)


# the generator

def check_frequencies(kernels, length, n=60_000):
    """Chi-square of the frequencies of all short sequences, those that are expected less than five times taken together."""
    x = torch.cartesian_prod(torch.tensor([0]), *[torch.arange(kernels.graph.vocab_size)] * (length - 1))
    expected = n * log_likelihood(kernels, x)[:, -1].exp().numpy()
    drawn = generate(kernels, n, length, np.random.default_rng(5))
    assert (drawn[:, 0] == 0).all()
    place = (drawn[:, 1:] * kernels.graph.vocab_size ** torch.arange(length - 2, -1, -1)).sum(1)
    counts = np.bincount(place, minlength=len(x)).astype(float)
    rare = expected < 5
    expected, counts = (np.append(v[~rare], v[rare].sum()) for v in (expected, counts))
    keep = expected > 0
    assert counts[~keep].sum() == 0 and expected.sum() == pytest.approx(n, rel=1e-9)
    assert keep.sum() < 2 or stats.chisquare(counts[keep], expected[keep] * counts[keep].sum() / expected[keep].sum()).pvalue > 1e-4


@pytest.mark.parametrize("nodes", [nodes for name, nodes in GRAPHS.items() if name != "small concentrations"], ids=[name for name in GRAPHS if name != "small concentrations"])
def test_sequences_have_the_frequencies_that_the_likelihood_says(nodes):
    check_frequencies(draw_kernels(make_graph(nodes), 3), 4)


def test_hidden_states_are_drawn_with_their_tokens():
    kernels = draw_kernels(make_graph(GRAPHS["below the observed node"]), 3)
    states = generate_states(kernels, 60_000, 3, np.random.default_rng(2))
    assert list(states) == [n.name for n in kernels.graph] and torch.equal(states["X"], generate(kernels, 60_000, 3, np.random.default_rng(2)))
    names, law = kernels.graph.order, {}
    for _, history, p in paths(kernels, 3):
        key = tuple(history[name][t] for name in names for t in (1, 2))
        law[key] = law.get(key, 0.) + p
    drawn = {}
    for row in torch.stack([states[name][:, t] for name in names for t in (1, 2)], 1).tolist(): drawn[tuple(row)] = drawn.get(tuple(row), 0) + 1
    common = [key for key, p in law.items() if p * 60_000 > 5]
    expected, counts = np.array([60_000 * law[key] for key in common]), np.array([drawn.get(key, 0) for key in common])
    assert expected.sum() > 59_000 and stats.chisquare(np.append(counts, 60_000 - counts.sum()), np.append(expected, 60_000 - expected.sum())).pvalue > 1e-4


def uniform_numbers(kernels, n, length, rng):
    """Those of each step, [nodes, n], as the generator draws them."""
    draw_context(kernels.graph, n, rng)
    largest = 1 - 2**-52 * max(table[..., 0].numel() for table in kernels.tables.values())
    return [np.minimum(rng.random((len(kernels.graph), n)), largest) for _ in range(length - 1)]


def searched(kernels, n, length, rng):
    """The states of all nodes, [length, n], step by step: a binary search for each, in the line of its kernel's sums."""
    graph = kernels.graph
    found = {name: [np.zeros(n, dtype=int)] for name in graph.order}
    for uniform in uniform_numbers(kernels, n, length, rng):
        for name, u in zip(graph.order, uniform):
            inputs = [found[other][-1] for other in graph.inputs(name)]
            row = np.ravel_multi_index(inputs, kernels.tables[name].shape[:-1]) if inputs else np.zeros(n, dtype=int)
            found[name].append(kernels.line(name).searchsorted(u + row, "right") - row * (graph[name].states - 1))
    return {name: np.stack(states) for name, states in found.items()}


WIDE = {
    "a chain of 64 states": read_graph(EXAMPLES / "chain.yaml").nodes,
    "rows of three inputs": [node("A", 3), node("B", 5, "A"), node("C", 7, "BA", kernel="fullrank"), seen("CA", 4, kernel="fullrank")],
    "states of two bytes": [node("A", 200, concentration=.01), node("B", 140, "A"), seen("B", 300)],
    "states of four bytes": [seen("", 40_000, concentration=.01)],
}


@pytest.mark.parametrize("most_parts, largest", [(2**12, 2**22), (2, 2**22), (2**12, 0)], ids=["as it is", "two parts a row", "no guide"])
@pytest.mark.parametrize("nodes", [*GRAPHS.values(), *WIDE.values()], ids=[*GRAPHS, *WIDE])
def test_guided_draws_are_those_of_the_search_bit_for_bit(nodes, most_parts, largest, monkeypatch):
    monkeypatch.setattr(graphical, "_MOST_PARTS", most_parts)
    monkeypatch.setattr(graphical, "_LARGEST_GUIDE", largest)
    kernels = draw_kernels(make_graph(nodes), 2)
    for n, length in ((1, 30), (64, 64), (3000, 60)):  # the last in several blocks
        ours, theirs = np.random.default_rng(n), np.random.default_rng(n)
        states = generate_states(kernels, n, length, ours)
        for name, expected in searched(kernels, n, length, theirs).items(): np.testing.assert_array_equal(states[name].T, expected)
        assert ours.bit_generator.state == theirs.bit_generator.state
    assert any((kernels.guide(name)[0] < 0).any() for name in kernels.tables)  # else nothing was left to the search


@pytest.mark.parametrize("nodes", [*WIDE.values(), [node("A", 64), node("B", 64, concentration=.01), seen("AB", 512)]], ids=[*WIDE, "in pieces"])
def test_a_guide_says_how_many_sums_lie_below_a_part_that_holds_none(nodes):
    kernels = draw_kernels(make_graph(nodes))
    for name, table in kernels.tables.items():
        (guide, parts), *inputs, states = kernels.guide(name), *table.shape
        rows, own = math.prod(inputs), 1 if kernels.graph[name].observed else states
        below = kernels.line(name).searchsorted(np.arange(rows * parts + 1) / parts, "right")
        expected = np.where(below[:-1] == below[1:], below[:-1] - np.arange(rows).repeat(parts) * (states - 1), -1)
        np.testing.assert_array_equal(guide.reshape(-1, own).T.reshape(-1), expected)


def test_other_devices_draw_the_same_by_comparing_with_each_sum():
    kernels, n, length = draw_kernels(make_graph(GRAPHS["below the observed node"])), 50, 20
    found = {name: torch.zeros(length, n, dtype=torch.long) for name in kernels.graph.order}
    uniform = torch.from_numpy(np.stack(uniform_numbers(kernels, n, length, np.random.default_rng(1))))
    for i, name in enumerate(kernels.graph.order): graphical._step_by_step(kernels.graph, name, graphical._fixed_sampler(kernels, name, torch.device("cpu")))(uniform[:, i], found, 1)
    for name, states in generate_states(kernels, n, length, np.random.default_rng(1)).items(): assert torch.equal(states.T, found[name])


@pytest.mark.parametrize("alpha", [.1, .4, 1., 30.])
def test_rows_are_from_the_dirichlet_law(alpha):
    rows = np.exp(log_dirichlet(alpha, (4000, 5), np.random.default_rng(1)))
    assert stats.kstest(rows[:, 2], stats.beta(alpha, 4 * alpha).cdf).pvalue > 1e-3
    assert stats.kstest(rows[:, :2].sum(1), stats.beta(2 * alpha, 3 * alpha).cdf).pvalue > 1e-3


def test_tiny_concentrations_give_rows_with_one_state_and_nothing_is_impossible():
    rows = np.exp(shape_rows(log_dirichlet(1e-9, (500, 6), np.random.default_rng(0)), "default"))
    np.testing.assert_allclose(np.sort(rows)[:, :-1], 1e-10, rtol=1e-8)
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-12)
    assert stats.chisquare(np.bincount(rows.argmax(1), minlength=6)).pvalue > 1e-3


def test_rows_are_clipped_before_they_are_multiplied():
    graph = make_graph([node("A", 4, concentration=1e-4), node("B", 4, concentration=1e-4), seen("AB", 8, concentration=1e-4)])
    factors = graphical.draw_factors(graph, "X", [0])
    assert [f.inputs for f in factors] == [("A",), ("B",)]
    a, b = (np.exp(f.rows[0]) for f in factors)
    assert a.min() >= .99e-10 and b.min() >= .99e-10
    product = a[:, None] * b[None]
    np.testing.assert_allclose(graphical.kernel_table(graph, "X", factors)[0], product / product.sum(-1, keepdims=True), rtol=1e-10)


def test_modes_move_the_largest_entry_and_keep_the_others():
    rows = log_dirichlet(.5, (50, 5, 5), np.random.default_rng(0))
    plain, slow, dead = (shape_rows(rows, mode) for mode in ("default", "slow", "dead"))
    for moved in (slow, dead): np.testing.assert_array_equal(np.sort(moved), np.sort(plain))
    assert (slow.argmax(-1) == np.arange(5)).all() and (dead.argmax(-1) == 0).all()
    assert ((slow != plain).sum(-1) <= 2).all()


def test_kernels_are_the_same_for_the_same_seed_and_move_little_with_the_concentration():
    graph = make_graph(GRAPHS["product"])
    one, again, other, near = draw_kernels(graph, 4), draw_kernels(graph, 4), draw_kernels(graph, 5), draw_kernels(graph.with_concentration(.70001), 4)
    for name, table in one.tables.items():
        assert torch.equal(table, again.tables[name]) and not torch.equal(table, other.tables[name]) and table.dtype == torch.float64
        np.testing.assert_allclose(table, near.tables[name], atol=1e-3)
    assert one.fingerprint == again.fingerprint and len({k.fingerprint for k in (one, other, near)}) == 3


# streams and files

def test_a_resumed_stream_goes_on_exactly_and_ranks_differ():
    for nodes in (GRAPHS["product"], CONTEXT["hidden parent"]):
        kernels = draw_kernels(make_graph(nodes))
        streams = [GraphStream(kernels, 16, 20, 1, rank, 3) for rank in range(3)]
        batches = [[next(stream) for _ in range(2)] for stream in streams]
        flat = [batch for part in batches for batch in part]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(flat, 2))
        saved = json.loads(json.dumps(streams[1].state_dict()))
        expected = [next(streams[1]) for _ in range(3)]
        resumed = GraphStream(kernels, 16, 20, 1, 1, 3)
        resumed.load_state_dict(saved)
        assert all(torch.equal(next(resumed), batch) for batch in expected)
        fresh = GraphStream(kernels, 16, 20, 1, 1, 3)
        assert torch.equal(next(fresh), batches[1][0])


def test_the_state_of_another_stream_is_refused():
    kernels = draw_kernels(make_graph(GRAPHS["chain"]))
    stream = GraphStream(kernels, 4, 8, seed=1)
    before = stream.state_dict()
    for name, other in {"kernels": GraphStream(draw_kernels(kernels.graph, 1), 4, 8, 1), "seed": GraphStream(kernels, 4, 8, 2), "length": GraphStream(kernels, 4, 9, 1), "batch_size": GraphStream(kernels, 5, 8, 1),
                        "world_size": GraphStream(kernels, 4, 8, 1, 0, 2)}.items():
        with pytest.raises(ValueError, match=f"of another stream: its {name}"): stream.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="no state of a random generator"): stream.load_state_dict({**before, "rng": {"bit_generator": "PCG64"}})
    assert stream.state_dict() == before
    with pytest.raises(ValueError, match="from 0 to 1"): GraphStream(kernels, 4, 8, rank=2, world_size=2)
    with pytest.raises(ValueError, match="length is 0"): GraphStream(kernels, 4, 0)


def test_a_stored_data_set_is_made_once_and_refused_for_anything_else(tmp_path):
    kernels, path = draw_kernels(make_graph(GRAPHS["chain"])), tmp_path / "sets/a.npy"
    data = stored_sequences(path, kernels, 5000, 7, seed=3, progress=False)
    assert isinstance(data.tokens, np.memmap) and data.tokens.dtype == np.uint8 and len(data) == 5000 and data[5].dtype == torch.int64
    made = path.stat().st_mtime_ns
    again = stored_sequences(path, kernels, 5000, 7, seed=3, progress=False)
    assert path.stat().st_mtime_ns == made and torch.equal(again[[4, 4999]], data[[4, 4999]])
    assert torch.equal(data[4096:], sequence_block(kernels, 1, 7, 3)["X"][:904])
    assert torch.equal(stored_sequences(tmp_path / "short.npy", kernels, 100, 7, seed=3, progress=False)[:], data[:100])
    others = {"the graph's fingerprint": dict(kernels=draw_kernels(kernels.graph.with_concentration(.8))), "the seed of its kernels": dict(kernels=draw_kernels(kernels.graph, 1)), "its seed": dict(seed=4),
              "its length": dict(length=8), "its number of sequences": dict(n=4000)}
    for what, change in others.items():
        with pytest.raises(FileError, match=f"made from something else: {what}"): stored_sequences(**{**dict(path=path, kernels=kernels, n=5000, length=7, seed=3, progress=False), **change})
    assert path.stat().st_mtime_ns == made


def test_a_stored_data_set_that_is_broken_is_refused(tmp_path):
    kernels, path = draw_kernels(make_graph(GRAPHS["chain"])), tmp_path / "a.npy"
    ask = lambda: stored_sequences(path, kernels, 50, 7, progress=False)
    ask()
    whole, note = path.read_bytes(), tmp_path / "a.npy.json"
    for broken in (whole[:-10], b"", b"not numpy"):
        path.write_bytes(broken)
        with pytest.raises(FileError, match="no readable numpy file|holds"): ask()
    np.save(path, np.zeros((50, 7)))
    with pytest.raises(FileError, match="holds float64"): ask()
    path.write_bytes(whole)
    said = note.read_text()
    for broken in ("{", "[1]"):
        note.write_text(broken)
        with pytest.raises(FileError, match="cannot be read"): ask()
    note.unlink()
    with pytest.raises(FileError, match="no a.npy.json beside it"): ask()
    note.write_text(said)
    assert len(ask()) == 50
    with pytest.raises(FileError, match="should end on .npy"): stored_sequences(tmp_path / "a.bin", kernels, 5, 7)


def test_an_interrupted_write_leaves_nothing_that_could_be_taken_for_a_data_set(tmp_path, monkeypatch):
    kernels, path = draw_kernels(make_graph(GRAPHS["chain"])), tmp_path / "a.npy"
    real, done = graphical.sequence_block, []
    def interrupted(*args):
        if done: raise KeyboardInterrupt
        done.append(args)
        return real(*args)
    monkeypatch.setattr(graphical, "sequence_block", interrupted)
    with pytest.raises(KeyboardInterrupt): stored_sequences(path, kernels, 9000, 7, progress=False)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []
    monkeypatch.setattr(graphical, "sequence_block", real)
    assert len(stored_sequences(path, kernels, 9000, 7, progress=False)) == 9000


def _write_slowly(path):
    kernels, real = draw_kernels(make_graph(GRAPHS["chain"])), graphical.sequence_block
    def slow(*args):
        time.sleep(.2)
        return real(*args)
    graphical.sequence_block = slow
    stored_sequences(path, kernels, 4096 * 200, 7, progress=False)


def test_a_killed_write_is_begun_anew(tmp_path):
    path = tmp_path / "a.npy"
    process = multiprocessing.get_context("spawn").Process(target=_write_slowly, args=(path,))
    process.start()
    while not (found := list(tmp_path.glob("*.tmp"))) or not found[0].stat().st_size:
        assert process.is_alive()
        time.sleep(.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not path.exists() and list(tmp_path.glob("*.tmp"))
    assert len(stored_sequences(path, draw_kernels(make_graph(GRAPHS["chain"])), 500, 7, progress=False)) == 500
    assert not list(tmp_path.glob("*.tmp"))


# tokens that cannot be

def test_tokens_that_no_graph_gives_are_refused():
    kernels = draw_kernels(make_graph(GRAPHS["chain"]))
    for x, said in ((torch.zeros(2, 3), "whole numbers"), (torch.zeros(3, dtype=torch.long), r"\[batch, time\]"), (torch.tensor([[0, 4]]), "from 0 to 3"), (torch.tensor([[0, -1]]), "token -1"), (torch.tensor([[0], [1]]), "begin with 0")):
        for ask in (log_likelihood, predict, filtered_states):
            with pytest.raises(ValueError, match=said): ask(kernels, x)
    with pytest.raises(GraphError, match="'X' is no hidden node; there are Z"): filtered_states(kernels, torch.zeros(1, 2, dtype=torch.long), ["X"])
    one = torch.zeros(2, 1, dtype=torch.uint8)
    assert log_likelihood(kernels, one).tolist() == [[0], [0]] and predict(kernels, one).shape == (2, 1, 4) and filtered_states(kernels, one)["Z"][0, 0].tolist() == [1, 0, 0]


# entropies

def test_the_entropy_per_token_is_that_of_all_sequences():
    for nodes in (GRAPHS["slow and dead"], CONTEXT["hidden parent"]):
        kernels = draw_kernels(make_graph(nodes))
        x = torch.cartesian_prod(torch.tensor([0]), *[torch.arange(3)] * 4)
        log_p = log_likelihood(kernels, x)
        assert log_p[:, -1].exp().sum() == pytest.approx(1, rel=1e-10)
        exact = -(log_p[:, -1].exp() * log_p[:, -1]).sum().item() / 4
        found, by_position = entropy_rate(kernels, 3000, 5), position_entropies(kernels, 3000, 5)
        assert abs(found.value - exact) < 4 * found.error and found.error < .03
        assert by_position.value.mean() == pytest.approx(found.value) and by_position.value.shape == (4,)


def test_calibration_finds_the_concentration_and_says_when_there_is_none():
    graph = read_graph(EXAMPLES / "chain.yaml")
    found = calibrate(graph, .8, n=100, length=24, draws=2)
    assert abs(found.entropy.value - .8) < 6 * found.entropy.error and found.graph["Z"].concentration == found.graph["X"].concentration == found.concentration
    rate = lambda more: np.mean([entropy_rate(draw_kernels(found.graph, i), 100, 24, seed=2 * i + more).value for i in range(2)])
    assert found.entropy.value == pytest.approx(rate(1), rel=1e-9) and abs(rate(0) - .8) < .002 < abs(found.entropy.value - rate(0))  # that of the search is the target
    part = calibrate(graph, 2.8, ["X"], n=100, length=24)
    assert part.graph["Z"] == graph["Z"] and part.graph["X"].concentration == part.concentration
    fresh = entropy_rate(draw_kernels(part.graph), 400, 24, seed=77)
    assert abs(fresh.value - 2.8) < 4 * 3 * fresh.error
    for wrong, said in ((dict(target=0.), "between 0 and 3.466"), (dict(target=3.5), "between 0"), (dict(target=.5, bounds=(2., 9.)), "on this side"), (dict(target=1., bounds=(2., 1.)), "bounds"), (dict(target=1., names=["Y"]), "no node 'Y'")):
        with pytest.raises(ValueError, match=said): calibrate(graph, n=20, length=8, **wrong)


def test_entropies_refuse_what_is_no_seed_and_share_no_stream_with_trainings():
    kernels, unknown = draw_kernels(make_graph(GRAPHS["chain"])), draw_kernels(make_graph(CONTEXT["hidden parent"]))
    for seed in (-1, 1.5, True, 2**63):
        for ask, of in ((entropy_rate, kernels), (position_entropies, kernels), (entropy_bounds, unknown), (particle_bounds, unknown)):
            with pytest.raises(ValueError, match="seed is .*: it should be a whole number from 0"): ask(of, n=2, length=4, seed=seed)
    assert entropy_rate(kernels, 64, 12).value != pytest.approx(-log_likelihood(kernels, generate(kernels, 64, 12, np.random.default_rng([4, 0])))[:, -1].mean().item() / 11, rel=1e-9)


def test_stationary_entropies_are_those_of_the_joint_chain():
    kernels = draw_kernels(make_graph([node("A", 3), node("B", 2, "A"), seen("BA", 4)]), 2)
    A, B, X = (kernels.tables[name].numpy() for name in "ABX")
    P = np.einsum("ac,bcd->abcd", A, B).reshape(6, 6)
    law = np.linalg.matrix_power(P, 4000)[0]
    np.testing.assert_allclose(stationary_law(P), law, rtol=1e-8)
    E = X.transpose(1, 0, 2).reshape(6, 4)
    pairs = np.einsum("i,ix,ij,jy->xy", law, E, P, E)
    entropy = lambda p: -(p * np.log(p)).sum()
    found = token_entropies(kernels)
    assert found.unigram == pytest.approx(entropy(pairs.sum(0)), rel=1e-9) and found.bigram == pytest.approx(entropy(pairs) - entropy(pairs.sum(1)), rel=1e-9)
    alone = draw_kernels(make_graph(GRAPHS["no hidden node"]))
    np.testing.assert_allclose(token_entropies(alone), [entropy(alone.tables["X"].numpy())] * 2, rtol=1e-12)
    with pytest.raises(GraphError, match="mode context"): token_entropies(draw_kernels(make_graph(CONTEXT["hidden parent"])))


def test_compressors_do_not_pass_below_the_entropy_of_long_data():
    kernels = draw_kernels(make_graph([node("Z", 3, concentration=.2), seen("Z", 4, concentration=.2)]))
    x = generate(kernels, 3000, 64, np.random.default_rng(0))
    h = entropy_rate(kernels).value
    assert all(h < size < math.log(4) + .1 for size in compressed_size(kernels.graph, x))
    noise = draw_kernels(make_graph([seen("", 256, concentration=1e6)]))
    assert compressed_size(noise.graph, generate(noise, 1000, 64, np.random.default_rng(0))).lzma == pytest.approx(math.log(256), rel=.01)


# bounds

@contexts
def test_particles_bracket_the_exact_likelihood_of_every_kind(nodes):
    kernels = draw_kernels(make_graph(nodes))
    found = particle_bounds(kernels, n=48, length=8, particles=12)
    exact = log_likelihood(kernels, found.tokens)[:, -1].numpy()
    for bound, sign in ((found.lower, -1), (found.upper, 1)):
        gap = sign * (bound - exact)
        assert gap.mean() > -3.5 * gap.std() / math.sqrt(48) and abs(gap.mean()) < .3
    again = particle_bounds(kernels, n=48, length=8, particles=12)
    assert (again.lower == found.lower).all() and (again.upper == found.upper).all() and (again.tokens == found.tokens).all()
    bracket = per_token(found)
    assert bracket.lower.value == pytest.approx(-found.upper.mean() / 7) and bracket.upper.error == pytest.approx(found.lower.std(ddof=1) / math.sqrt(48) / 7)


def test_few_particles_are_right_in_the_mean():
    """Of p, and of 1/p where the true past is kept: few particles and many sequences of three tokens, whose laws are enumerated."""
    kernels = draw_kernels(make_graph([node("Z"), seen("Z", mode="context", concentration=.5)]))
    found = particle_bounds(kernels, n=40_000, length=4, particles=2)
    x, place = np.unique(found.tokens.numpy(), axis=0, return_inverse=True)
    p = log_likelihood(kernels, x)[:, -1].exp().numpy()
    for values, wanted in ((np.exp(found.lower), p), (np.exp(-found.upper), 1 / p)):
        for k in np.flatnonzero(np.bincount(place.ravel()) > 400):
            own = values[place.ravel() == k]
            assert abs(own.mean() - wanted[k]) < 4.5 * own.std(ddof=1) / math.sqrt(len(own)) + 1e-9 * wanted[k]


@contexts
def test_no_more_pasts_come_than_were_foretold(nodes):
    kernels = draw_kernels(make_graph(nodes))
    names, x = kernels.graph.ancestors, generate(kernels, 6, 6, np.random.default_rng(2))
    counted = [name for name in (*names, kernels.graph.observed.name) if kernels.graph[name].mode == "context"]
    for sequence, foretold in zip(x.tolist(), exact_work(kernels, x).tolist()):
        pasts = [set() for _ in range(5)]
        for path in itertools.product(itertools.product(*(range(kernels.graph[name].states) for name in names)), repeat=4):
            old, counts = dict.fromkeys(kernels.graph.order, 0), Counter()
            for t in range(5):
                pasts[t].add((tuple(old[name] for name in names), tuple(sorted(counts.items()))))
                if t == 4: break
                new = {**dict(zip(names, path[t])), kernels.graph.observed.name: sequence[t + 1]}
                for name in counted: counts[name, tuple(old[other] if other == name else new[other] for other in kernels.graph.inputs(name)), new[name]] += 1
                old = {**old, **new}
        work = past_size(kernels) * sum(map(len, pasts))
        assert work <= foretold * (1 + 1e-9) and foretold < 2 * work


def test_too_much_work_is_foretold_as_infinite():
    kernels = draw_kernels(read_graph(EXAMPLES / "context.yaml"))
    x = generate(kernels, 3, 40, np.random.default_rng(0))
    assert exact_work(kernels, x).isinf().all() and exact_work(kernels, x[:, :12]).isfinite().all() and (exact_work(kernels, x[:, :1]) == 0).all()
    with pytest.raises(GraphError, match="pasts of topic, Z have to be told apart"): log_likelihood(kernels, x[:1])
    assert (exact_work(draw_kernels(make_graph(GRAPHS["chain"])), x % 4 * 0) == 0).all()
    with pytest.raises(GraphError, match="product over"): particle_bounds(draw_kernels(make_graph([node("A"), node("B"), seen("AB", mode="context")])))
    with pytest.raises(GraphError, match="log_likelihood is exact"): particle_bounds(draw_kernels(make_graph(GRAPHS["chain"])))


@pytest.mark.parametrize("name", ["no hidden node", "hidden parent", "hidden context node", "all, fullrank"])
def test_bounds_bracket_an_exact_likelihood_in_the_mean(name):
    kernels = draw_kernels(make_graph(CONTEXT[name]))
    found = likelihood_bounds(kernels, n=40, length=8, chains=4, steps=120)
    exact = log_likelihood(kernels, found.tokens)[:, -1].numpy()
    for gap in (exact - found.lower, found.upper - exact):
        error = gap.std(ddof=1) / 40**.5
        assert -4 * error < gap.mean() < .1 + 4 * error and error < .1


def test_chains_of_few_steps_have_unbiased_weights_in_both_directions():
    kernels = draw_kernels(make_graph([node("Z"), seen("Z", mode="context", concentration=2.)]))
    found = likelihood_bounds(kernels, n=20_000, length=6, chains=4, steps=2)
    exact = log_likelihood(kernels, found.tokens)[:, -1].numpy()
    for ratio in (np.exp(found.lower - exact), np.exp(exact - found.upper)):  # the mean of exp(w) is p(x), that of exp(-w) from the posterior is 1 / p(x)
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / 20_000**.5 < .05


def test_bounds_of_a_product_agree_with_the_mean_over_many_kernels_from_the_prior():
    kernels, m = draw_kernels(make_graph([node("A"), node("B"), seen("BA", mode="context"), node("C", 2, "XA", mode="context")])), 20_000
    found = likelihood_bounds(kernels, n=20, length=5, chains=4, steps=150, seed=3)
    tables = torch.from_numpy(kernel_table(kernels.graph, "X", draw_context(kernels.graph, m, np.random.default_rng(0))["X"]))  # [m, B, A, X]
    A, B, one = kernels.tables["A"], kernels.tables["B"], torch.tensor(1., dtype=torch.float64)
    naive = []
    for x in found.tokens.tolist():
        belief = torch.zeros(m, 2, 2, dtype=torch.float64)
        belief[:, 0, 0] = one
        for token in x[1:]: belief = torch.einsum("mba,bc,ad->mcd", belief, B, A) * tables[..., token]
        naive.append(belief.sum((1, 2)).mean().log().item())
    for gap in (naive - found.lower, found.upper - naive):
        error = gap.std(ddof=1) / 20**.5
        assert -4 * error < gap.mean() < .1 + 4 * error and error < .1
    bracket = entropy_bounds(kernels, n=20, length=5, chains=4, steps=150, seed=3)
    assert bracket.lower.value == pytest.approx(-found.upper.mean() / 4) and bracket.upper.value == pytest.approx(-found.lower.mean() / 4)
    with pytest.raises(GraphError, match="log_likelihood is exact"): likelihood_bounds(draw_kernels(make_graph([node("A"), seen("A"), node("C", 2, "X", mode="context")])))


# files of graphs

Z, X = "{name: Z, states: 4, concentration: 0.1}", "{name: X, states: 8, concentration: 0.1, parents: [Z], observed: true}"
MISTAKES = {
    "empty": ("", "list of nodes"), "no nodes": ("[]", "no nodes"), "mapping": ("{Z: 4}", "list of nodes"), "text": ("[Z]", "entry 1 is 'Z'"), "broken YAML": ("[{", "no YAML"), "unsafe": ("!!python/object/apply:os.getcwd []", "no YAML that can be read safely"),
    "key twice": (f"[{X}, {{name: Z, name: Y, states: 4, concentration: 1}}]", "'name' stands twice"),
    "cycle": (f"[{X}, {Z[:-1]}, parents: [Y]}}, {{name: Y, states: 2, concentration: 1, parents: [Z]}}]", "cycle, (Z → Y → Z|Y → Z → Y)"), "own parent": (f"[{X}, {Z[:-1]}, parents: [Z]}}]", "cycle, Z → Z"),
    "cycle with the observed": (f"[{X}, {Z[:-1]}, parents: [X]}}]", "cycle, "), "unknown parent": (f"[{X.replace('[Z]', '[ZZ]')}, {Z}]", "node 'X': there is no parent 'ZZ'; did you mean 'Z'"),
    "parent twice": (f"[{X.replace('[Z]', '[Z, Z]')}, {Z}]", "listed twice"), "no observed": (f"[{Z}]", "no node is observed"), "two observed": (f"[{X}, {X.replace('X', 'Y')}, {Z}]", "2 nodes are observed, X, Y"),
    "slow with parents": (f"[{X}, {Z}, {{name: S, states: 2, concentration: 1, mode: slow, parents: [Z]}}]", "node 'S': a slow node has no parents"), "slow and observed": ("[{name: X, states: 2, concentration: 1, mode: slow, observed: true}]", "cannot be slow"),
    "same name": (f"[{X}, {Z}, {Z}]", "2 nodes with the name 'Z'"), "one state": (f"[{X}, {Z.replace('4', '1')}]", "node 'Z': states = 1"), "half a state": (f"[{X}, {Z.replace('4', '4.5')}]", "states = 4.5"), "states in words": (f"[{X}, {Z.replace('4', 'four')}]", "states = 'four'"),
    "true states": (f"[{X}, {Z.replace('4', 'yes')}]", "states = True"), "no concentration": (f"[{X}, {Z.replace('0.1', '0')}]", "concentration = 0"), "negative": (f"[{X}, {Z.replace('0.1', '-1')}]", "concentration = -1"),
    "nan": (f"[{X}, {Z.replace('0.1', '.nan')}]", "concentration = nan"), "infinite": (f"[{X}, {Z.replace('0.1', '.inf')}]", "concentration = inf"), "true concentration": (f"[{X}, {Z.replace('0.1', 'yes')}]", "concentration = True: it should be a number"),
    "missing": ("[{name: X, observed: true, states: 3}]", "node 'X': concentration is missing"), "unknown key": (f"[{X}, {Z.replace('states', 'stats')}]", "no key 'stats'; did you mean 'states'"), "a key of elsewhere": (f"[{X}, {Z.replace('concentration', 'alpha')}]", "no key 'alpha'; did you mean 'concentration'"),
    "mode": (f"[{X}, {Z[:-1]}, mode: slwo}}]", "did you mean 'slow'"), "kernel": (f"[{X}, {Z[:-1]}, kernel: full}}]", "kernel = 'full'"), "parents left empty": (f"[{X.replace('[Z]', '')}, {Z}]", r"parents = None: it should be a list, \[\]"), "parents as text": (f"[{X.replace('[Z]', 'Z')}, {Z}]", r"a list, \[Z\]"), "name": (f"[{X}, {Z.replace('Z', '../Z')}]", "letters, digits"),
    "number for a key": (f"[{X}, {Z[:-1]}, 3: 4}}]", "no key 3"), "observed in words": (f"[{Z[:-1]}, observed: maybe}}]", "observed = 'maybe'"), "huge kernel": ("[{name: Z, states: 65536, concentration: 1}, {name: X, states: 8, concentration: 1, parents: [Z], observed: true}]", "4,294,967,296 entries"),
}


@pytest.mark.parametrize("text, said", MISTAKES.values(), ids=MISTAKES)
def test_a_file_with_a_mistake_is_refused_with_its_name(tmp_path, text, said):
    (tmp_path / "graph.yaml").write_text(text)
    with pytest.raises(GraphError, match=said) as found: read_graph(tmp_path / "graph.yaml")
    assert str(found.value).startswith(str(tmp_path / "graph.yaml"))


def test_all_mistakes_are_told_at_once_and_files_that_are_none(tmp_path):
    with pytest.raises(GraphError) as found: parse_graph("[{name: A, states: 0, concentration: 1}, {name: B, states: 2, concentration: -1}]")
    assert "node 'A': states = 0" in str(found.value) and "node 'B': concentration = -1" in str(found.value)
    (tmp_path / "chain.yaml").write_text(f"[{X}, {Z}]")
    with pytest.raises(GraphError, match="no such file; did you mean 'chain.yaml'"): read_graph(tmp_path / "chian.yaml")
    with pytest.raises(GraphError, match="it is a folder"): read_graph(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"\xe9\xff")
    with pytest.raises(GraphError, match="not text in UTF-8"): read_graph(tmp_path / "latin.yaml")


@graphs
def test_a_graph_is_what_its_yaml_says_and_its_picture_points_from_left_to_right(nodes):
    graph = make_graph(nodes)
    assert parse_graph(graph_yaml(graph)) == graph and parse_graph(graph_yaml(graph)).fingerprint == graph.fingerprint
    figure = graph_figure(graph)
    places = {word.split("<b>")[1].split("</b>")[0]: (x, y) for trace in figure.data if trace.text for x, y, word in zip(trace.x, trace.y, trace.text)}
    assert len(set(places.values())) == len(graph)
    assert all(places[parent][0] < places[n.name][0] for n in graph for parent in n.parents)
    assert len(figure.layout.annotations) == sum(len(n.parents) for n in graph)


def test_numbers_with_an_exponent_are_numbers(): assert parse_graph("[{name: X, states: 3, concentration: 1e-3, observed: true}]")["X"].concentration == 1e-3
