"""Routed transformers: what they are at capacity 1, what they may not look at, what learns, what is counted, and what a run records of them."""
import math
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tformer_lab.models.decoder import Decoder, causal_mask, flops, next_tokens, parameter_count
from tformer_lab.models.language import language_model
from tformer_lab.models.routed import (ROUTED, SDT, MoD, Routed, ScoreRouter, SurpriseRouter, answer, change_surprise, chosen_places, compute_some, first_places, ramp, routing,
                                       routing_metrics, static_surprise, trailing_mean, with_gradient_of)
from tformer_lab.runs.store import Run
from tformer_lab.spectra.matrices import weight_matrices
from tformer_lab.tasks.graphical import Graphical, token_losses
from tformer_lab.training.fit import Session, fit, trained
from tformer_lab.training.parameters import ParameterError, build, trainer_for

VOCAB, N, TIME, D, LAYERS, HEADS = 11, 3, 16, 16, 4, 2
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def made(kind, **options):
    torch.manual_seed(0)
    return kind(VOCAB, D, LAYERS, n_heads=HEADS, **options).double()


@pytest.fixture(params=ROUTED)
def kind(request): return ROUTED[request.param]


@pytest.fixture
def model(kind): return made(kind, capacity=.5)


@pytest.fixture
def tokens(): return torch.randint(VOCAB, (N, TIME), generator=torch.Generator().manual_seed(1))


# Capacity 1, and the same beginning

def test_at_capacity_1_it_is_the_decoder_in_training_and_inference(kind, tokens):
    plain, full = made(Decoder), made(kind, capacity=1)
    assert full.state_dict().keys() == plain.state_dict().keys() and not any("router" in name for name, _ in full.named_modules())
    full.load_state_dict(plain.state_dict())  # and there are no buffers
    for ours in (full.train(), full.eval()):
        torch.testing.assert_close(ours(tokens), plain(tokens), rtol=1e-6, atol=1e-6)
        assert answer(ours, tokens).losses == {} and answer(ours, tokens).auxiliary == 0.
    assert torch.equal(full.generate(tokens, 5, generator=0), plain.generate(tokens, 5, generator=0)) and parameter_count(full) == parameter_count(plain) and flops(full, 9) == flops(plain, 9)
    assert all(torch.equal(a, b) for a, b in zip(full.attention_maps(tokens).values(), plain.attention_maps(tokens).values()))


def test_with_a_seed_the_blocks_begin_as_the_decoders(kind, model):
    plain, mine = made(Decoder).state_dict(), model.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in plain.items())
    assert all(name.startswith("routers.") or name in ("step", "steps") for name in mine.keys() - plain.keys())


# What is computed

def test_a_routed_block_is_the_block_under_a_mask_on_the_chosen(tokens):
    """Own positions, a causal order by position, and nobody else: beside a block that computes all under a mask."""
    torch.manual_seed(3)
    block, x = made(Decoder).blocks[0], torch.randn(N, TIME, D, dtype=torch.float64)
    chosen = torch.rand(N, TIME) < torch.tensor([.2, .5, .8])[:, None]
    places, real = chosen_places(chosen)
    scale = torch.rand(N, TIME, dtype=torch.float64)
    seen = causal_mask(TIME, TIME) & chosen[:, None, None] | torch.eye(TIME, dtype=torch.bool)
    every = block(x, torch.arange(TIME), seen)
    found = compute_some(block, x, places, torch.arange(TIME), scale, real)
    torch.testing.assert_close(found, (x + scale[..., None] * (every - x)).where(chosen[..., None], x), **CLOSE)
    assert torch.equal(found[~chosen], x[~chosen]) and places.sort().values.diff(dim=1).min() > 0


@pytest.mark.parametrize("length, capacity, k", [(16, .5, 8), (15, .5, 7), (16, .75, 12), (3, .1, 1), (1, .75, 1)])
def test_in_training_the_k_best_of_each_sequence_are_computed(kind, length, capacity, k):
    model = made(kind, capacity=capacity)
    tokens = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(4))
    stream, seen = [model.embed(tokens)], []
    stream += model._stream(stream[0], 0, [None] * LAYERS, seen)
    for i, c in zip(model.routed, seen):
        assert (c.top.sum(1) == k).all() and model.computed_tokens(i, length) == k
        assert torch.equal((stream[i + 1] != stream[i]).any(-1), c.top)
        assert k == length or c.signals.score.where(c.top, math.inf).amin(1).ge(c.signals.score.where(~c.top, -math.inf).amax(1)).all()


def test_every_second_block_is_routed_or_every_one():
    assert made(MoD).routed == (1, 3) and made(MoD, every=1).routed == (0, 1, 2, 3) and made(SDT, every=3).routed == (2,) and made(MoD, capacity=1).routed == ()


# Causality and independence

def test_in_inference_logits_do_not_depend_on_later_tokens(model, tokens):
    model.eval()
    for t in (1, 5, 11):
        other = tokens.clone()
        other[:, t:] = (tokens[:, t:] + 1) % VOCAB
        torch.testing.assert_close(model(other)[:, :t], model(tokens)[:, :t], **CLOSE)
    assert (model.train()(other)[:, :11] - model(tokens)[:, :11]).abs().max() > 1e-6  # which in training is not so: the test can see it


@pytest.mark.parametrize("training", [True, False])
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(training, model, tokens):
    model.train(training)
    together = model(tokens)
    for i in range(N): torch.testing.assert_close(model(tokens[i:i + 1])[0], together[i], **CLOSE)


def test_generation_with_kept_keys_decides_as_the_full_pass(model, tokens):
    """Token by token and in chunks; sequences have different numbers of chosen tokens, and at some steps none."""
    model.eval()
    with torch.no_grad():
        whole = model(tokens)
        for sizes in ([1] * TIME, [5, 1, 7, 3], [TIME]):
            state = model.new_state()
            torch.testing.assert_close(torch.cat([model(part, state) for part in tokens.split(sizes, 1)], 1), whole, **CLOSE)
            assert torch.equal(torch.stack([state.blocks[i].lengths for i in model.routed]), routing(model, tokens).chosen.sum(-1))
        quick, slow, generator = model.generate(tokens, 8, generator=5), tokens, torch.Generator().manual_seed(5)
        for _ in range(8): slow = torch.cat([slow, next_tokens(model(slow)[:, -1], 1., generator)], 1)
    assert torch.equal(quick, slow)
    assert torch.equal(model.train().generate(tokens, 8, generator=5), quick)  # with a state the causal router decides


def test_what_no_router_lets_through_passes_by(model, tokens):
    for router in model.routers.values(): nn.init.constant_(router.causal.out.bias, -1e6)
    x = model.embed(tokens)
    expected = model.blocks[2](model.blocks[0](x, torch.arange(TIME)), torch.arange(TIME))
    torch.testing.assert_close(model.eval()(tokens), model.predict(expected), **CLOSE)


# Surprise, by hand

@pytest.mark.parametrize("beta", [.1, 1., 3.])
@pytest.mark.parametrize("gates", ["either", "expected"])
@pytest.mark.parametrize("from_last", [False, True])
def test_gates_are_the_formulas_number_by_number(gates, from_last, beta):
    torch.manual_seed(0)
    o, m, c, window = 1.3, .9, .7, 3
    router = SurpriseRouter(4, 2, o, m, True, c, window, gates, from_last).double()
    before, residual = torch.randn(2, 1, 6, 4, dtype=torch.float64)
    after, found, history = before + residual, router(before + residual, before, torch.tensor(beta)), []
    for t in range(6):
        source = (after[0, t - 1] if t else torch.zeros(4).double()) if from_last else before[0, t]
        h = source / (source.square().mean() + 1e-6)**.5 * router.norm.weight
        z = router.gate.weight @ h
        out = router.out.weight @ (z / (1 + (-z).exp()) * (router.up.weight @ h))
        mean, log_variance, r = out[:4], out[4:], residual[0, t]
        static = sum(r[i]**2 for i in range(4)) / 4
        change = sum(log_variance[i] + ((r[i] - mean[i])**2 + c) / log_variance[i].exp() for i in range(4)) / 8
        history.append(static)
        recent = history[-window:]
        s_ce, s_cu = (1 / (1 + (-beta * v).exp()) for v in (static - (change - math.log(o)), static - m * sum(recent) / len(recent)))
        gate = s_ce + s_cu - s_ce * s_cu if gates == "either" else s_ce
        for value, own in ((static, found.static), (change, found.change), (gate, found.gate)): torch.testing.assert_close(own[0, t], value, rtol=1e-6, atol=1e-7)


def test_the_order_of_sharp_gates_is_not_lost():
    """At beta = 100 gates are 1 in float32; the scores still have the order that float64 gives to 1 - g."""
    static = torch.linspace(.5, 2., 50)[None]
    router = SurpriseRouter(1, 1, 1., 1.1, True, 1., 100, "expected", False)
    nn.init.zeros_(router.out.weight)
    found = router(static[..., None].sqrt(), torch.zeros(1, 50, 1), torch.tensor(100.))
    assert found.gate[0, 25:].eq(1).sum() > 10 and found.score.diff().min() > 0


def test_change_surprise_is_a_divergence_of_normal_laws():
    """Torch's, but for the constant that depends on c alone."""
    r, mean, log_variance = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    laws = torch.distributions.Normal(r, .7**.5), torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(*laws).mean(-1) + (1 + math.log(.7)) / 2
    torch.testing.assert_close(change_surprise(r, mean, log_variance, .7), expected, **CLOSE)
    assert torch.equal(static_surprise(torch.ones(2, 3)), torch.ones(2))


@pytest.mark.parametrize("window", [1, 4, 100])
def test_the_trailing_mean_is_that_of_the_last_values(window):
    x = torch.randn(2, 9, dtype=torch.float64)
    torch.testing.assert_close(trailing_mean(x, window), torch.stack([x[:, max(0, t + 1 - window):t + 1].mean(1) for t in range(9)], 1), **CLOSE)


# The formulas that learn, by hand

def under_a_mask(model, x, chosen, scale):
    """The last block's update of the chosen tokens alone, times a scale."""
    seen = causal_mask(TIME, TIME) & chosen[:, None, None] | torch.eye(TIME, dtype=torch.bool)
    return (x + scale[..., None] * (model.blocks[1](x, torch.arange(TIME), seen) - x)).where(chosen[..., None], x)


def two_blocks(kind, **options):
    """The second is routed."""
    torch.manual_seed(0)
    return kind(VOCAB, D, 2, n_heads=HEADS, capacity=.5, **options).double()


def test_mods_update_is_times_the_sigmoid_of_its_score_in_training_and_in_inference(tokens):
    model = two_blocks(MoD)
    router, (_, x, trained) = model.routers["1"], model.residual_stream(tokens)
    score = (x * router.score.weight).sum(-1)
    gate = 1 / (1 + (-score).exp())
    assert gate.max() > .7 and gate.min() < .3
    torch.testing.assert_close(trained, under_a_mask(model, x, score > score.sort().values[:, TIME // 2 - 1:TIME // 2], gate), **CLOSE)
    torch.testing.assert_close(model.eval().residual_stream(tokens)[2], under_a_mask(model, x, router.causal(x) > 0, gate), **CLOSE)


def test_mods_scores_learn_from_their_own_choice_and_are_kept_small(tokens):
    router, scores = ScoreRouter(1), [2., -1., .5, 3.]
    nn.init.ones_(router.score.weight)
    found = router.losses(router(torch.tensor(scores)[None, :, None]), torch.tensor([[True, False, False, True]]))
    assert found["score"].item() == pytest.approx(sum(math.log(1 + math.exp(x)) for x in (-2., -1., .5, -3.)) / 4) and found["z"].item() == pytest.approx((4 + 1 + .25 + 9) / 4)
    model = two_blocks(MoD)
    score = (model.residual_stream(tokens)[1] * model.routers["1"].score.weight).sum(-1)
    own = torch.where(score >= score.sort().values[:, TIME // 2:TIME // 2 + 1], 1 / (1 + (-score).exp()), 1 / (1 + score.exp()))
    assert model(tokens, auxiliary=True).losses["score"].item() == pytest.approx(-own.log().mean().item())


@pytest.mark.parametrize("from_last", [False, True])
def test_the_prediction_learns_from_the_change_surprise(from_last, tokens):
    """Of a network that predicts 0 with variance 1 that is half the mean square of the residual and c; steps against its gradient lower it."""
    model = two_blocks(ROUTED["stt" if from_last else "sdt"], residual_variance=.7)
    router, (before, x, _) = model.routers["1"], model.residual_stream(tokens)
    nn.init.zeros_(router.out.weight)
    prior = lambda: model(tokens, auxiliary=True).losses["prior"]
    assert prior().item() == pytest.approx(((x - before).square().mean().item() + .7) / 2)
    values = [prior().item()]
    for _ in range(3):
        gradient, = torch.autograd.grad(prior(), router.out.weight)
        with torch.no_grad(): router.out.weight -= 3 * gradient
        values.append(prior().item())
    assert values == sorted(values, reverse=True) and values[-1] < values[0] - .001


WEIGHTS = {"router_weight": ("router", .01), "balance_weight": ("balance", 0.), "gate_warmup_weight": ("gates", 0.), "score_weight": ("score", .01), "z_weight": ("z", 1e-4), "prior_weight": ("prior", .05)}


def test_each_weight_is_of_its_own_loss(kind, tokens):
    own = {name: loss for name, loss in WEIGHTS.items() if name not in (("prior_weight",) if kind is MoD else ("score_weight", "z_weight"))}
    usual = made(kind, capacity=.5)(tokens, auxiliary=True)
    assert usual.auxiliary.item() == pytest.approx(sum(weight * usual.losses[loss].item() for loss, weight in own.values() if weight))
    for name, (loss, _) in own.items():
        found = made(kind, capacity=.5, **{**dict.fromkeys(own, 0.), name: 3.})(tokens, auxiliary=True)
        assert found.auxiliary.item() == pytest.approx(3 * found.losses[loss].item()) and found.auxiliary > 0


@pytest.mark.parametrize("name", ["log_o_ce", "m_cu"])
@pytest.mark.parametrize("from_last", [False, True])
def test_a_threshold_learns_as_if_the_gate_were_in_the_update(name, from_last, tokens, monkeypatch):
    """The gradient of the language model's loss, beside differences of that loss with updates times 1 + g - g0"""
    model = two_blocks(ROUTED["stt" if from_last else "sdt"], beta_from=1.)
    router = model.routers["1"]
    threshold, loss = getattr(router, name), lambda: F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    gradient, = torch.autograd.grad(loss(), threshold)
    before, x, _ = model.residual_stream(tokens[:, :-1])
    gate, h, found = router(x, before, model.beta()).gate.detach(), 1e-4, []
    monkeypatch.setattr(router, "scale", lambda signals: 1 + signals.gate.detach() - gate)
    for sign in (1, -1):
        with torch.no_grad(): threshold += sign * h
        found.append(loss().item())
        with torch.no_grad(): threshold -= sign * h
    assert gradient.item() == pytest.approx((found[0] - found[1]) / (2 * h), rel=1e-5) and abs(gradient) > 1e-6


# Schedules

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_beta_goes_from_one_value_to_the_other_and_is_kept_with_the_weights(schedule, tokens):
    model, expected = made(SDT, beta_schedule=schedule, beta_warmup=10), {0: .1, 10: .1, 35: .1 + 99.9 * (.25 if schedule == "linear" else (1 - math.cos(math.pi / 4)) / 2), 60: 50.05, 110: 100., 200: 100.}
    for step, beta in expected.items():
        model.advance(step, 110)
        assert model.beta().item() == pytest.approx(beta, rel=1e-5) and model.eval().beta().item() == pytest.approx(beta, rel=1e-5)
    model.advance(35, 110)
    other = made(SDT, beta_schedule=schedule, beta_warmup=10)
    other.load_state_dict(model.state_dict())
    assert other.beta().item() == model.beta().item() != 0 and torch.equal(routing(other, tokens).gate, routing(model, tokens).gate)
    model.advance(0, 110)
    assert not torch.equal(routing(other, tokens).gate, routing(model, tokens).gate)
    assert ramp(torch.tensor(5), torch.tensor(3), 10) == 0  # a training that ends before the warm-up


def test_gates_are_pushed_open_early_and_only_then(kind, tokens):
    model = made(kind, capacity=.5, gate_warmup_weight=2., gate_warmup=8)
    for step, share in ((0, 1.), (2, .75), (8, 0.), (100, 0.)):
        model.advance(step, 1000)
        found = model(tokens, auxiliary=True)
        rest = sum(model.loss_weights[name] * loss for name, loss in found.losses.items() if name != "gates")
        assert (found.auxiliary - rest).item() == pytest.approx(2 * share * found.losses["gates"].item(), abs=1e-9)
    parameters = [p for name, p in model.named_parameters() if name.endswith(("score.weight", "log_o_ce", "m_cu"))]
    model.advance(0, 1000)
    before = model(tokens, auxiliary=True).losses["gates"]
    with torch.no_grad():
        for p, g in zip(parameters, torch.autograd.grad(before, parameters)): p -= .01 * g
    assert model(tokens, auxiliary=True).losses["gates"] < before


def test_balance_is_the_variance_of_the_load_over_blocks(kind, tokens):
    model = made(kind, capacity=.5, balance_weight=1.)
    for router, odds in zip(model.routers.values(), (0., math.log(3))):
        nn.init.zeros_(router.causal.out.weight)
        nn.init.constant_(router.causal.out.bias, odds)
    assert model(tokens, auxiliary=True).losses["balance"].item() == pytest.approx(.125**2)
    assert "balance" not in made(kind, capacity=.5)(tokens, auxiliary=True).losses


# What learns

@pytest.mark.parametrize("options", [{}, {"learn_thresholds": False}, {"gates": "expected"}], ids=str)
def test_all_that_is_meant_to_learn_gets_a_gradient(kind, options, tokens):
    if kind is MoD and options: pytest.skip("mod has no thresholds")
    model = made(kind, capacity=.5, **options)
    logits, auxiliary, _ = answer(model, tokens[:, :-1])
    with_gradient_of(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), auxiliary).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    learnt = {name.rpartition(".")[2] for name, _ in model.named_parameters()} & {"log_o_ce", "m_cu"}
    assert learnt == (set() if kind is MoD or options.get("learn_thresholds") is False else {"log_o_ce"} if options else {"log_o_ce", "m_cu"})


def test_without_auxiliary_losses_only_what_the_loss_needs_learns(model, tokens):
    """The causal router and the prediction have losses of their own, and what they foresee is not changed by them."""
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert all(".causal." in name or name.split(".")[2] in ("norm", "gate", "up", "out") for name in without) and any(".causal." in name for name in without)
    model.zero_grad()
    answer(model, tokens).losses["router"].backward()
    assert all(".causal." in name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0)


@pytest.mark.parametrize("name", ROUTED)
def test_the_reported_loss_is_the_language_models_alone(name):
    """Its value to the last digit, and yet the gradient of the routers' losses is in it, scaled with the parts of a batch."""
    task = small(name, router_weight=100.)
    batch, model = task.batch(4, np.random.default_rng(0)), task.model()
    loss = task.loss(model, batch)
    assert torch.equal(loss, token_losses(model(batch.tokens[:, :-1]), batch.tokens).mean())
    weight = model.routers["1"].causal.out.weight
    (own,), (wanted,) = (torch.autograd.grad(value, weight) for value in (loss, answer(model, batch.tokens[:, :-1]).auxiliary))
    torch.testing.assert_close(own, wanted)
    assert own.abs().max() > 1 and torch.equal(task.loss(model.eval(), batch), token_losses(model(batch.tokens[:, :-1]), batch.tokens).mean())
    gradients = []
    for accumulate in (1, 2):
        session = Session(task, trainer_for(task, batch_size=4, accumulate=accumulate, optimizer="sgd"))
        session.update(session.loss(0))
        gradients.append(session.bare.routers["1"].causal.out.weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_causal_router_learns_to_foresee(model):
    tokens = torch.randint(VOCAB, (8, TIME), generator=torch.Generator().manual_seed(6))
    optimizer, before = torch.optim.Adam([p for name, p in model.named_parameters() if ".causal." in name], .03), routing_metrics(model, tokens)
    for _ in range(30):
        optimizer.zero_grad()
        model(tokens, auxiliary=True).losses["router"].backward()
        optimizer.step()
    after = routing_metrics(model, tokens)
    assert after["routing/router_loss"] < before["routing/router_loss"] and after["routing/accuracy_1"] > max(.7, before["routing/accuracy_1"])


# Work

def counted(model, *arguments):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad(): model(*arguments)
    return counter.get_total_flops()


def test_work_in_training_is_torchs_count(kind):
    for capacity, every in ((.5, 2), (.25, 2), (.3, 4)):
        model = kind(VOCAB, 32, 4, capacity=capacity, every=every)
        assert counted(model, torch.zeros(1, 40, dtype=torch.int64), None, True) == flops(model, 40)
    full, half = flops(Decoder(VOCAB, 64, 4, tied=True), 256), flops(MoD(VOCAB, 64, 4, capacity=.5, every=1, tied=True), 256)
    assert half / full < .55


def test_work_in_inference_is_that_of_what_is_let_through(kind, tokens):
    """Of a pass, and of a step of generation: with nothing let through only the other blocks work."""
    model = kind(VOCAB, 32, 4).eval()
    work = {}
    for bias in (-1e6, 1e6):
        for router in model.routers.values(): nn.init.constant_(router.causal.out.bias, bias)
        state = model.new_state()
        with torch.no_grad(): model(tokens, state)
        work[bias] = counted(model, tokens[:1]), counted(model, tokens[:, -1:], state)
    block = sum(p.numel() for name, p in model.blocks[1].named_parameters() if p.ndim == 2)
    score = 32 if kind is MoD else 0
    for (closed, opened), new, keys in zip(zip(*work.values()), (TIME, N), (TIME, TIME + 1)):
        assert opened - closed == 2 * (2 * new * (block + score) + 4 * new * keys * 32)


# Statistics

def test_routing_tells_what_was_computed_and_why(model, tokens):
    found = routing(model, tokens)
    assert model.training and found.blocks == (1, 3) and found.chosen.shape == found.top.shape == found.gate.shape == found.probability.shape == (2, N, TIME)
    assert torch.equal(found.chosen, found.probability > .5) and (found.top.sum(-1) == 8).all() and (found.static is None) == isinstance(model, MoD)
    stream = model.eval().residual_stream(tokens)
    for i, chosen in zip(found.blocks, found.chosen): assert torch.equal((stream[i + 1] != stream[i]).any(-1), chosen)
    maps = model.attention_maps(tokens)
    for i, chosen in zip(found.blocks, found.chosen):
        torch.testing.assert_close(maps[f"{i}.attention"].sum(-1), chosen[:, None].expand(-1, HEADS, -1).double())
        assert not (maps[f"{i}.attention"] * ~chosen[:, None, None]).any()
    if not isinstance(model, MoD): torch.testing.assert_close(found.static[0], (stream[1] - stream[0]).square().mean(-1), **CLOSE)


def test_metrics_are_means_however_sequences_are_split(kind, tokens):
    model = made(kind, capacity=.5, balance_weight=1., gate_warmup_weight=1.)
    one, parts = routing_metrics(model, tokens), [routing_metrics(model, tokens, n) for n in (1, 2)]
    assert all(one == pytest.approx(found, rel=1e-9) for found in parts) and routing_metrics(made(Decoder), tokens) == {}
    assert one["routing/balance_loss"] == pytest.approx(routing(model, tokens).losses["balance"]) and one["routing/balance_loss"] > 1e-6
    assert one["routing/chosen_1"] == routing(model, tokens).chosen[0].double().mean().item()


def test_the_spectral_instrument_finds_blocks_under_the_decoders_names(model):
    ours, plain = set(weight_matrices(model).table()["name"]), set(weight_matrices(made(Decoder)).table()["name"])
    assert plain < ours and all(name.startswith("routers.") for name in ours - plain)


# Runs

def small(name, **other): return Graphical(**{"graph": "nbs/papers/graphs/chain.yaml", "model": name, "length": 12, "test_size": 16, "d_model": 8, "capacity": .5, **({} if name == "mod" else {"beta_warmup": 2}), **other})


@pytest.mark.parametrize("name", ROUTED)
def test_a_stopped_run_goes_on_bit_for_bit_and_records_its_routers(name, tmp_path, monkeypatch):
    given = {"steps": 8, "batch_size": 4, "checkpoints": 4, "evaluations": 4, "progress": False}
    run = fit(small(name), runs_dir=tmp_path, **given)
    calls, advance = [], Session.advance
    def stop(self, step):
        advance(self, step)
        calls.append(step)
        if len(calls) == 5: os.kill(os.getpid(), signal.SIGUSR1)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "advance", stop)
        again = fit(small(name), runs_dir=tmp_path, **given)
    assert again.status == "stopped" and again.status_details["step"] == 4
    again = fit(small(name), resume=again, **given)
    assert again.status == "done" and run.metrics.equals(again.metrics) and all(torch.equal(value, again.checkpoints[8][key]) for key, value in run.checkpoints[8].items())
    assert {"routing/chosen_1", "routing/accuracy_1", "routing/gate_1", "routing/router_loss", *(["routing/z_loss"] if name == "mod" else ["routing/surprise_1", "routing/prior_loss"])} <= set(run.metrics)
    assert "routers.1.causal.hidden" in run.spectra.matrices and run.checkpoints[8]["step"] == 8 and run.checkpoints[8]["steps"] == 8
    model = trained(Run(run.path))
    assert isinstance(model, Routed) and model.step == 8 and small(name).evaluate(model) == pytest.approx(run.metrics.drop(columns=["step", "train/loss"]).iloc[-1].to_dict(), rel=1e-6)
    assert "train/loss" not in [o["metric"] for o in run.optimum] and "valid/loss" in [o["metric"] for o in run.optimum]


def test_a_saved_state_holds_the_step():
    task = small("sdt")
    one, two = (Session(task, trainer_for(task, steps=10, batch_size=4)) for _ in range(2))
    one.advance(7)
    two.restore(one.state())
    assert two.bare.beta().item() == one.bare.beta().item() > 1


def test_half_precision_trains(tmp_path):
    run = fit(small("sdt"), runs_dir=tmp_path, steps=3, batch_size=4, checkpoints=1, precision="bfloat16", progress=False)
    assert run.status == "done"


# What cannot be

@pytest.mark.parametrize("name, options, said", [
    ("mod", {"capacity": 0.}, "capacity is 0.0: it has to be above 0"), ("mod", {"capacity": 1.5}, "at most 1"), ("sdt", {"every": 1}, "every is 1: it has to be 2 or more"), ("mod", {"every": 5}, "n_layers is 4: with every = 5 no block"),
    ("mod", {"every": 0}, "every is 0"), ("mod", {"z_weight": -1.}, "z_weight is -1.0"), ("stt", {"o_ce": 0.}, "o_ce is 0.0: it has to be above 0"), ("sdt", {"gates": "both"}, "one of 'either', 'expected'"),
    ("sdt", {"beta_schedule": "step"}, "one of 'linear', 'cosine'"), ("sdt", {"window": 0}, "window is 0"), ("sdt", {"learn_thresholds": False, "gate_warmup_weight": 1.}, "learn_thresholds has to be True"),
    ("sdt", {"beta_to": math.inf}, "beta_to is inf"), ("mod", {"gate_warmup": 0}, "gate_warmup is 0"), ("sdt", {"m_cu": math.nan}, "m_cu is nan"), ("stt", {"m_cu": math.inf}, "m_cu is inf"), ("sdt", {"m_cu": "1"}, "m_cu is '1'"),
    ("mod", {"capacity": "0.5"}, "capacity is '0.5'"), ("mod", {"router_weight": "x"}, "router_weight is 'x'"), ("mod", {"z_weight": True}, "z_weight is True"), ("sdt", {"o_ce": "1"}, "o_ce is '1'"), ("sdt", {"learn_thresholds": "no"}, "learn_thresholds is 'no'"),
    ("mod", {"every": 4, "balance_weight": .1}, "of 4 with every = 4 only one is; n_layers has to be 8 or more"), ("stt", {"every": 3, "balance_weight": .1}, "only one is")], ids=str)
def test_models_that_cannot_be_are_refused_before_anything_is_drawn(name, options, said):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=said): language_model(name, VOCAB, D, 4, **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_losses_with_a_state_and_choices_of_what_routes_nothing_are_refused(model, tokens):
    with pytest.raises(ValueError, match="auxiliary losses are of whole sequences"): model(tokens, model.new_state(), auxiliary=True)
    with pytest.raises(ValueError, match="routes nothing"): routing(made(MoD, capacity=1), tokens)
    assert first_places(torch.tensor([[3., 1., 2.]]), 2).tolist() == [[0, 2]]


@pytest.mark.parametrize("given, said", [({"model": "mod", "window": 3}, "'mod' has no such parameter"), ({"model": "transformer", "capacity": .5}, "has no such parameter"), ({"model": "sdt", "n_layers": 1}, "n_layers is 1: with every = 2"),
                                         ({"model": "sdt", "every": 1}, "every is 1"), ({"model": "mod", "capacity": 2}, "capacity = 2"), ({"model": "mod", "balance_weight": .1}, "of 2 with every = 2 only one is; n_layers has to be 4"),
                                         ({"model": "mod", "gate_warmup": 9}, "gate_warmup is 9: it is for a weight"), ({"model": "sdt", "gates": "expected", "m_cu": 1.}, "m_cu is 1.0: it is for unexpected changes"), ({"model": "stt", "gates": "expected", "window": 5}, "window is 5")], ids=str)
def test_the_task_refuses_them_by_name(given, said):
    with pytest.raises(ParameterError, match=said): build(Graphical, given)


@pytest.mark.parametrize("given", [{"model": "mod", "n_layers": 4, "balance_weight": .1}, {"model": "mod", "every": 1, "balance_weight": .1}, {"model": "mod", "balance_weight": 0.}, {"model": "mod", "balance_weight": .1, "capacity": 1}, {"model": "mod", "gate_warmup": 9, "gate_warmup_weight": .1}], ids=str)
def test_options_that_can_act_are_taken(given): build(Graphical, given)


@pytest.mark.parametrize("name", ["sdt", "stt"])
def test_a_warmup_that_never_ends_is_refused_and_said_where_it_is_the_usual_one(name):
    with pytest.raises(ParameterError, match="beta_warmup is 9: in 9 steps gates would never get sharper; it has to be less than steps"): Session(task := small(name, beta_warmup=9), trainer_for(task, steps=9, batch_size=4))
    with pytest.warns(UserWarning, match="in 100 steps gates do not get sharper: beta_warmup is 100"): Session(task := small(name, beta_warmup=None), trainer_for(task, steps=100, batch_size=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given, steps in (({"beta_warmup": None}, 101), ({"beta_warmup": 9}, 10), ({"beta_warmup": None, "capacity": 1.}, 10), ({"beta_warmup": None, "beta_from": 2., "beta_to": 2.}, 10)):
            Session(task := small(name, **given), trainer_for(task, steps=steps, batch_size=4))
        Session(task := small("mod"), trainer_for(task, steps=10, batch_size=4))


def test_what_learns_from_losses_of_its_own_is_not_evolved():
    task = small("stt")
    with pytest.raises(ParameterError, match="take an optimizer that follows one"): Session(task, trainer_for(task, optimizer="es"))
