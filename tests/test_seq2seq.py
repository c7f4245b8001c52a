"""Models that forecast: what each output sees, free-running against teacher-forced, attention weights, and sizes that cannot be."""
import pytest
import torch

from tformer_lab.models.seq2seq import LSTMForecaster, TransformerForecaster, shift_right

N, IN, OUT, FEATURES = 3, 7, 5, 2
KINDS = {"transformer": lambda **how: TransformerForecaster(FEATURES, 8, 2, 2, 16, **how), "lstm": lambda **how: LSTMForecaster(FEATURES, 8, 2, **how)}


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    return KINDS[request.param](dropout=.3).double().eval()


@pytest.fixture
def windows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(N, steps, FEATURES, generator=generator, dtype=torch.float64) for steps in (IN, OUT)]


def seen(function, values):
    """[outputs, values] does an output step depend on a step of the values? By the Jacobian of the first example."""
    jacobian = torch.autograd.functional.jacobian(function, values)  # [n, out, features, n, steps, features]
    assert (jacobian[0, :, :, 1:] == 0).all()  # nor on other examples
    return jacobian[0, :, :, 0].abs().amax((1, 3)) > 0


def test_a_forecast_sees_all_targets_before_its_own_and_none_later(model, windows):
    inputs, targets = windows
    expected = torch.arange(OUT)[:, None] > torch.arange(OUT)
    assert torch.equal(seen(lambda y: model(inputs, y), targets), expected)


def test_every_forecast_sees_the_whole_window(model, windows):
    inputs, targets = windows
    assert seen(lambda x: model(x, targets), inputs).all()
    assert seen(lambda x: model.forecast(x, OUT), inputs).all()


def test_the_decoder_begins_with_the_last_value_of_the_window(windows):
    inputs, targets = windows
    assert torch.equal(shift_right(inputs, targets)[:, 0], inputs[:, -1]) and torch.equal(shift_right(inputs, targets)[:, 1:], targets[:, :-1])


def test_free_running_is_teacher_forcing_with_its_own_outputs(model, windows):
    """Anew for each step, and at once: the kept keys and values of the steps before change nothing."""
    inputs, _ = windows
    free, slow = model.forecast(inputs, OUT), torch.zeros(N, 0, FEATURES, dtype=torch.float64)
    for t in range(OUT): slow = torch.cat([slow, model(inputs, torch.cat([slow, slow.new_zeros(N, 1, FEATURES)], 1))[:, -1:]], 1)
    torch.testing.assert_close(free, slow, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(free, model(inputs, free), rtol=1e-10, atol=1e-12)


def test_a_shorter_forecast_is_the_beginning_of_a_longer_one(model, windows):
    torch.testing.assert_close(model.forecast(windows[0], 2), model.forecast(windows[0], OUT)[:, :2], rtol=1e-10, atol=1e-12)


def test_dropout_acts_in_training_alone(model, windows):
    inputs, targets = windows
    for run in (lambda: model(inputs, targets), lambda: model.forecast(inputs, OUT)):
        assert torch.equal(model.eval() and run(), run())
        assert not torch.equal(model.train() and run(), run())


@pytest.mark.parametrize("training", [False, True])
def test_attention_maps_are_the_weights_that_torch_uses(windows, training):
    """Against softmax(q k / sqrt(d)) of what each attention is given; and asking for them changes no forecast."""
    torch.manual_seed(0)
    model, heads = KINDS["transformer"](dropout=0.).double().train(training), 2
    given = {}
    attentions = {f"{side}.{i}.{kind}": getattr(layer, name) for side, kinds in (("encoder", {"self": "self_attn"}), ("decoder", {"self": "self_attn", "cross": "multihead_attn"}))
                  for i, layer in enumerate(getattr(model.transformer, side).layers) for kind, name in kinds.items()}
    handles = [a.register_forward_pre_hook(lambda m, args, name=name: given.__setitem__(name, [x.detach() for x in args])) for name, a in attentions.items()]
    maps = model.attention_maps(*windows)
    for handle in handles: handle.remove()
    assert maps.keys() == attentions.keys()
    for name, attention in attentions.items():
        query, key, _ = given[name]
        q, k = (torch.nn.functional.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2) for x, w, b in
                zip((query, key), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)))
        scores = q @ k.transpose(-1, -2) / q.shape[-1]**.5
        if name.startswith("decoder") and name.endswith("self"): scores = scores.masked_fill(torch.ones(OUT, OUT).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(maps[name], scores.softmax(-1), rtol=1e-10, atol=1e-12)
    before = model(*windows).detach()
    model.attention_maps(*windows)
    assert torch.equal(model(*windows), before)  # the hooks are gone
    assert not any(a._forward_hooks or a._forward_pre_hooks for a in attentions.values())


def test_positions_go_on_through_the_horizon(windows):
    """Moving a value by a step in time, from the window's end to the decoder, gives it the same position."""
    torch.manual_seed(0)
    model = KINDS["transformer"](dropout=0.).double()
    inputs, targets = windows
    assert torch.equal(model._embed(inputs, 0)[:, -1], model._embed(shift_right(inputs, targets), IN - 1)[:, 0])


@pytest.mark.parametrize("kind, wrong, said", [
    (TransformerForecaster, {"d_model": 30}, "d_model is 30: it has to be a multiple of n_heads, 4"), (TransformerForecaster, {"n_heads": 0}, "n_heads is 0"),
    (TransformerForecaster, {"feedforward": -1}, "feedforward is -1"), (TransformerForecaster, {"activation": "tanh"}, "'relu' or 'gelu'"), (TransformerForecaster, {"dropout": 1.}, r"in \[0, 1\)"),
    (LSTMForecaster, {"features": 0}, "features is 0"), (LSTMForecaster, {"n_layers": 1.5}, "n_layers is 1.5"), (LSTMForecaster, {"dropout": float("nan")}, r"in \[0, 1\)")])
def test_sizes_that_cannot_be_are_refused_before_anything_is_drawn(kind, wrong, said):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=said): kind(**wrong)
    assert torch.equal(torch.get_rng_state(), before)


def test_windows_of_another_shape_are_refused(model, windows):
    inputs, targets = windows
    for wrong in (lambda: model(inputs[..., :1], targets), lambda: model(inputs, targets[:, :, 0]), lambda: model(inputs[:1], targets), lambda: model.forecast(inputs[:, :0], OUT)):
        with pytest.raises(ValueError, match="shape|inputs and"): wrong()
    with pytest.raises(ValueError, match="the horizon is 0: it has to be 1 or more"): model.forecast(inputs, 0)
