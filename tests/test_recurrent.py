"""Recurrent language models: the scan beside the loop, each recurrence beside its formula and its peer, states across calls, work, and what cannot be."""
import math
import shutil
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tformer_lab.models.decoder import Decoder, flops, flops_by_part, next_tokens, parameter_count
from tformer_lab.models.language import KINDS, language_model, own_options
from tformer_lab.models.recurrent import MIXERS, Hawk, Mamba, Memory, MinGRU, MinLSTM, Recurrent, scan, selective_scan
from tformer_lab.models.routed import ROUTED
from tformer_lab.spectra.matrices import weight_matrices

VOCAB, N, TIME, D = 11, 3, 9, 8
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(params=MIXERS)
def kind(request): return request.param


@pytest.fixture
def model(kind):
    torch.manual_seed(0)
    return language_model(kind, VOCAB, D, 2).double()


@pytest.fixture
def tokens(): return torch.randint(VOCAB, (N, TIME), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stream(): return torch.randn(N, TIME, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def coefficients(n, time, *rest, seed=0, dtype=torch.float64, power=.3):
    """Factors in [0, 1] near one, and normal terms."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, time, *rest, generator=generator, dtype=dtype)**power, torch.randn(n, time, *rest, generator=generator, dtype=dtype)


def loop(a, b, initial=None):
    h, found = torch.zeros_like(b[:, 0]) if initial is None else initial, []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        h = a_t * h + b_t
        found.append(h)
    return torch.stack(found, 1)


# The scan

@pytest.mark.parametrize("time", [*range(1, 18), 31, 64, 100])
def test_the_scan_is_the_loop_at_every_length(time):
    a, b = coefficients(2, time, 3)
    initial = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(scan(a, b), loop(a, b), **CLOSE)
    torch.testing.assert_close(scan(a, b, initial), loop(a, b, initial), **CLOSE)
    assert torch.equal(scan(-a, b)[:, 0], b[:, 0])
    torch.testing.assert_close(scan(-a, b), loop(-a, b), **CLOSE)  # in linear space a may have any sign
    torch.testing.assert_close(scan(torch.zeros_like(a), b), b, **CLOSE)


@pytest.mark.parametrize("time", [1, 2, 7, 8])
def test_gradients_of_the_scan_and_theirs(time):
    inputs = [x.requires_grad_() for x in (*coefficients(2, time, 2), torch.randn(2, 2, dtype=torch.float64))]
    assert torch.autograd.gradcheck(scan, inputs) and torch.autograd.gradgradcheck(scan, inputs)
    assert torch.autograd.gradcheck(lambda b: scan(inputs[0].detach(), b), inputs[1])
    assert torch.autograd.gradcheck(lambda a: scan(a, inputs[1].detach()), inputs[0])


@pytest.mark.parametrize("power", [.3, .01, .0003])
def test_at_length_4096_in_float32_the_scan_and_its_gradient_are_those_of_the_loop(power):
    a, b = coefficients(1, 4096, 8, dtype=torch.float32, power=power)
    weight = torch.randn(1, 4096, 8, generator=torch.Generator().manual_seed(3))
    results = []
    for way, dtype in ((scan, torch.float32), (loop, torch.float32), (loop, torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (a, b)]
        h = way(*inputs)
        results.append([h.detach(), *torch.autograd.grad((h * weight.to(dtype)).sum(), inputs)])
    for ours, single, double in zip(*results):
        scale = double.abs().max()
        assert (ours - single).abs().max() < 1e-5 * scale
        assert (ours - double).abs().max() < 5e-6 * scale


def test_the_scan_keeps_two_tensors_for_its_gradient():
    a, b = (x.requires_grad_() for x in coefficients(1, 1000, 4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x): scan(a, b)
    assert kept == [4000, 4000]


def test_the_scan_under_vmap_is_the_scan_of_each():
    a, b = coefficients(5, 2, 9, 3)
    together = torch.func.vmap(scan)(a, b)
    for i in range(5): torch.testing.assert_close(together[i], scan(a[i], b[i]), **CLOSE)
    torch.testing.assert_close(torch.func.vmap(scan, in_dims=(None, 0))(a[0], b)[3], scan(a[0], b[3]), **CLOSE)


def test_coefficients_that_cannot_be_are_refused():
    a, b = coefficients(2, 5, 3)
    for wrong in (lambda: scan(a, b[:, :4]), lambda: scan(a[:, :0], b[:, :0]), lambda: scan(a[:, 0, 0], b[:, 0, 0])):
        with pytest.raises(ValueError, match="they have to be the same"): wrong()
    with pytest.raises(ValueError, match=r"initial has the shape \[2, 4\]: it has to be \[2, 3\]"): scan(a, b, torch.zeros(2, 4))


# Each recurrence beside its formula, one number at a time where it may be

def convolved(convolution, x):
    """Torch's own convolution of each channel with zeros before the sequence."""
    return x if convolution is None else F.conv1d(F.pad(x.mT, (convolution.kernel_size[0] - 1, 0)), convolution.weight, convolution.bias, groups=x.shape[-1]).mT


def literal(mixer, x):
    """What a mixer says, step by step, as its paper writes it."""
    sigmoid = lambda v: 1 / (1 + (-v).exp())
    softplus = lambda v: (1 + v.exp()).log()
    silu = lambda v: v * sigmoid(v)
    found = []
    if isinstance(mixer, Mamba):
        u, A = silu(convolved(mixer.convolution, mixer.input(x))), -mixer.A_log.exp()
        h = torch.zeros(len(x), *A.shape, dtype=x.dtype)
        for t in range(x.shape[1]):
            dt, B, C = softplus(mixer.dt_out(mixer.dt_in(u[:, t]))), mixer.B(u[:, t]), mixer.C(u[:, t])
            h = torch.exp(dt[:, :, None] * A) * h + dt[:, :, None] * B[:, None, :] * u[:, t, :, None]
            found.append(((h * C[:, None, :]).sum(-1) + mixer.D * u[:, t]) * silu(mixer.branch(x[:, t])))
        return mixer.out(torch.stack(found, 1))
    u = convolved(mixer.convolution, mixer.input(x) if isinstance(mixer, Hawk) else x)
    h = torch.zeros(len(x), mixer.d_recurrent, dtype=x.dtype)
    for t in range(x.shape[1]):
        now = u[:, t]
        if isinstance(mixer, MinGRU):
            z = sigmoid(mixer.z(now))
            h = (1 - z) * h + z * mixer.candidate(now)
        elif isinstance(mixer, MinLSTM):
            f, i = sigmoid(mixer.f(now)), sigmoid(mixer.i(now))
            h = f / (f + i) * h + i / (f + i) * mixer.candidate(now)
        else:
            a = torch.exp(-8 * sigmoid(mixer.recurrence_gate(now)) * softplus(mixer.A))
            h = a * h + torch.sqrt(1 - a**2) * sigmoid(mixer.input_gate(now)) * now
        found.append(h)
    h = torch.stack(found, 1)
    return mixer.out(h * F.gelu(mixer.branch(x)) if isinstance(mixer, Hawk) else h)


def make(kind, **options):
    """A mixer whose biases are not zero."""
    torch.manual_seed(0)
    mixer = MIXERS[kind](D, **options).double()
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            if name.endswith("bias"): p.add_(torch.randn_like(p))
    return mixer


@pytest.mark.parametrize("convolution", [0, 2, 4])
@pytest.mark.parametrize("width", [None, 5])
def test_each_recurrence_is_its_formula_and_so_are_its_gradients(kind, stream, convolution, width):
    mixer = make(kind, convolution=convolution, d_recurrent=width)
    x, weight, results = stream.requires_grad_(), torch.randn(N, TIME, D, dtype=torch.float64), []
    for way in (mixer, lambda x: literal(mixer, x)):
        y = way(x)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])])
    for ours, theirs in zip(*results): torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert mixer.d_recurrent == (width or (2 * D if kind == "mamba" else D))


@pytest.mark.parametrize("chunk", [2, 4, 9, 64])
def test_the_chunks_of_a_selective_scan_change_neither_result_nor_gradient(chunk):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
    dt, u, A, B, C, initial = draw(2, 9, 2), draw(2, 9, 2), draw(2, 3), draw(2, 9, 3), draw(2, 9, 3), draw(2, 2, 3)
    def run(dt, u, A, B, C, initial): return selective_scan(dt.exp(), u, -A.exp(), B, C, initial, chunk)
    assert torch.autograd.gradcheck(run, (dt, u, A, B, C, initial))
    if chunk == 4: assert torch.autograd.gradgradcheck(run, (dt, u, A, B, C, initial))
    y, last = run(dt, u, A, B, C, initial)
    a, b = (dt.exp()[..., None] * -A.exp()).exp(), dt.exp()[..., None] * u[..., None] * B[:, :, None]
    h = loop(a, b, initial)
    torch.testing.assert_close(last, h[:, -1], **CLOSE)
    torch.testing.assert_close(y, (h * C[:, :, None]).sum(-1), **CLOSE)


def test_a_selective_scan_keeps_no_states_but_those_between_chunks():
    dt, u, A, B, C = inputs = torch.rand(1, 512, 64), torch.randn(1, 512, 64), -torch.rand(64, 16), torch.randn(1, 512, 16), torch.randn(1, 512, 16)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes() // 4) or x, lambda x: x):
        y, _ = selective_scan(dt.requires_grad_(), u, A, B, C)  # a state of 1024 numbers: 256 steps a chunk
    assert sum(kept.values()) <= sum(x.numel() for x in inputs) + (512 // 256 + 1) * 64 * 16


def test_float32_at_length_4096_is_the_step_by_step_model(kind):
    torch.manual_seed(0)
    mixer, x, memory = MIXERS[kind](4), torch.randn(1, 4096, 4), Memory()
    with torch.no_grad():
        ours, steps = mixer(x), torch.cat([mixer(part, memory) for part in x.split(1, 1)], 1)
        double = literal(mixer.double(), x.double())
    scale = max(1, double.abs().max())
    assert (ours - steps).abs().max() < 1e-5 * scale and (ours - double).abs().max() < 1e-5 * scale


def test_gates_that_are_shut_give_no_nan(kind):
    """At the limits of the gates: nothing is forgotten, or everything."""
    for size in (-200., 200.):
        torch.manual_seed(0)
        mixer = MIXERS[kind](D)
        with torch.no_grad():
            for name, p in mixer.named_parameters():
                if name.endswith("bias") and "convolution" not in name: p.fill_(size)
        y = mixer(torch.randn(2, 50, D))
        y.sum().backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in mixer.parameters())


# Peers

def test_mamba_is_the_mixer_of_hugging_face_under_mapped_weights():
    pytest.importorskip("transformers")
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    torch.manual_seed(0)
    ours, x = Mamba(32, d_state=6, dt_rank=3), torch.randn(2, 70, 32)
    peer = MambaMixer(MambaConfig(hidden_size=32, state_size=6, time_step_rank=3, conv_kernel=4, expand=2, use_bias=False, use_conv_bias=True), layer_idx=0)
    w = ours.state_dict()
    peer.load_state_dict({"A_log": w["A_log"], "D": w["D"], "conv1d.weight": w["convolution.weight"], "conv1d.bias": w["convolution.bias"], "out_proj.weight": w["out.weight"],
                          "in_proj.weight": torch.cat([w["input.weight"], w["branch.weight"]]), "x_proj.weight": torch.cat([w["dt_in.weight"], w["B.weight"], w["C.weight"]]),
                          "dt_proj.weight": w["dt_out.weight"], "dt_proj.bias": w["dt_out.bias"]})
    with torch.no_grad(): torch.testing.assert_close(ours(x), peer.eval()(x), rtol=1e-5, atol=1e-5)


def test_hawk_is_the_unit_of_hugging_face_under_mapped_weights():
    """Recurrent Gemma's, whose first step of a sequence is another: from the second on, both are fed alike."""
    pytest.importorskip("transformers")
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru
    torch.manual_seed(0)
    hawk, u = Hawk(12, convolution=0), torch.randn(2, 20, 12)
    peer = RecurrentGemmaRglru(RecurrentGemmaConfig(hidden_size=12, lru_width=12, num_attention_heads=1))
    with torch.no_grad():
        peer.recurrent_param.copy_(hawk.A)
        for gate, weight, bias in ((hawk.recurrence_gate, peer.recurrent_gate_weight, peer.recurrent_gate_bias), (hawk.input_gate, peer.input_gate_weight, peer.input_gate_bias)):
            gate.bias.normal_()
            weight.copy_(gate.weight.T[None])
            bias.copy_(gate.bias[None])
        hawk.input.weight.copy_(torch.eye(12))
        hawk.out.weight.copy_(torch.eye(12))
        expected = peer(u, torch.arange(1, 21)[None].expand(2, -1))  # position 0 would begin anew, without the root
        torch.testing.assert_close(hawk(u), F.gelu(hawk.branch(u)) * expected, rtol=1e-5, atol=1e-5)


# The model

def test_a_block_is_two_sums_with_a_norm_before_each(model, tokens):
    norm = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    stream = model.residual_stream(tokens)
    for block, before, after in zip(model.blocks, stream, stream[1:]):
        middle = before + literal(block.recurrence, norm(before))
        torch.testing.assert_close(after, middle + block.feedforward(norm(middle)), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model(tokens), norm(stream[-1]) @ model.unembedding.weight.T, **CLOSE)


def test_logits_see_no_later_token_and_no_other_sequence(model, tokens):
    before = model(tokens)
    for t in range(1, TIME):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 1) % VOCAB
        after = model(other)
        torch.testing.assert_close(after[0, :t], before[0, :t], rtol=0, atol=1e-12)
        torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-12)
        assert (after[0, t:] != before[0, t:]).any(-1).all()


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [2, 1, 1, 5]])
def test_a_state_goes_on_from_chunk_to_chunk(model, tokens, chunks):
    state = model.new_state()
    parts = torch.cat([model(part, state) for part in tokens.split(chunks, 1)], 1)
    torch.testing.assert_close(parts, model(tokens), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("temperature", [0., 1.])
@pytest.mark.parametrize("prompt", [1, 5])
def test_generation_with_a_state_is_generation_anew(model, tokens, temperature, prompt):
    quick = model.generate(tokens[:, :prompt], 20, temperature, torch.Generator().manual_seed(5))
    slow, generator = tokens[:, :prompt], torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _ in range(20): slow = torch.cat([slow, next_tokens(model(slow)[:, -1], temperature, generator)], 1)
    assert torch.equal(quick, slow)


def test_a_state_has_a_constant_size_and_holds_no_graph(model, tokens, kind):
    state, sizes = model.new_state(), []
    for part in tokens.repeat(1, 10).split([1, 2, 7, 80], 1):
        model(part, state)
        kept = [x for memory in state.blocks for x in (memory.state, memory.inputs)]
        assert not any(x.requires_grad for x in kept) and all(x.untyped_storage().nbytes() == 8 * x.numel() for x in kept)
        sizes.append([x.shape for x in kept])
    assert sizes[0] == sizes[-1] and all(shapes == sizes[0] for shapes in sizes)
    width = 2 * D if kind == "mamba" else D
    assert sizes[0][0] == ((N, width, 16) if kind == "mamba" else (N, width)) and sizes[0][1] == (N, 3, width)


def test_parameters_are_the_sum_of_what_the_formula_says(kind, model):
    two, gate = 2 * D, D * D + D
    mixer = {"mingru": gate + 2 * D * D + 5 * D, "minlstm": 2 * gate + 2 * D * D + 5 * D, "hawk": 3 * D * D + 2 * gate + D + 5 * D,
             "mamba": 3 * D * two + two * 1 + 2 * two + 2 * two * 16 + two * 16 + two + 5 * two}[kind]
    rest = 3 * D * 24 + 2 * D
    assert parameter_count(model, embeddings=False) == 2 * (mixer + rest) + D
    assert parameter_count(model) == 2 * (mixer + rest) + D + 2 * VOCAB * D == sum(p.numel() for p in model.parameters())


def test_products_with_weights_are_those_that_torch_counts(kind, model):
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(torch.zeros(1, 40, dtype=torch.int64))
    parts = flops_by_part(model, 40)
    assert counter.get_total_flops() == parts.matrices
    with FlopCounterMode(display=False) as counter: convolved(model.blocks[0].recurrence.convolution.double(), torch.zeros(1, 40, model.blocks[0].recurrence.d_recurrent, dtype=torch.float64))
    assert counter.get_total_flops() * 2 == parts.convolution and parts.attention == 0
    assert flops(model, 40) == sum(parts) == 40 * flops(model, 1)


class Counted(TorchDispatchMode):
    """The multiplications and additions of tensors."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        if function in (torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor): self.count += found.numel()
        if function == torch.ops.aten.sum.dim_IntList: self.count += args[0].numel()
        return found


def test_the_work_on_the_state_is_that_of_the_loop():
    h = torch.zeros(1, 16, 5)
    dt, u, A, B, C = torch.rand(1, 16, 1), torch.rand(1, 16, 1), torch.rand(16, 5), torch.rand(1, 1, 5), torch.rand(1, 1, 5)
    fed = dt * u
    with Counted() as counted: ((dt * A).exp() * h + fed * B).mul(C).sum(-1)
    assert counted.count == Mamba(8, d_state=5).recurrence_flops == 6 * 16 * 5
    a = b = h = torch.zeros(1, 8)
    with Counted() as counted: a * h + b
    assert counted.count == MinGRU(8).recurrence_flops == Hawk(8).recurrence_flops


def test_before_training_decays_are_where_they_were_published():
    torch.manual_seed(0)
    a = torch.exp(-8 * F.softplus(Hawk(4000).A.double())).sort().values.detach()
    torch.testing.assert_close(a, torch.linspace(.9, .999, 4000, dtype=torch.float64), rtol=0, atol=.004)  # uniform
    mamba = Mamba(2000, d_state=3)
    dt = F.softplus(mamba.dt_out.bias.double()).log().sort().values.detach()
    torch.testing.assert_close(dt, torch.linspace(math.log(1e-3), math.log(.1), 4000, dtype=torch.float64), rtol=0, atol=.15)
    torch.testing.assert_close(-mamba.A_log.exp()[7], torch.tensor([-1., -2., -3.]))
    assert (mamba.D == 1).all() and mamba.dt_in.weight.shape == (125, 4000)


def test_the_spectral_instrument_finds_every_matrix(kind, model):
    table = weight_matrices(model).table().set_index("name")
    names = {"mingru": "z candidate out", "minlstm": "f i candidate out", "hawk": "input branch out recurrence_gate input_gate", "mamba": "input branch out dt_in dt_out B C"}[kind].split()
    assert {name for name in table.index if table["kind"][name] == "linear"} == {f"{i}.recurrence.{name}" for i in range(2) for name in names}
    assert all(table["role"][f"1.recurrence.{name}"] == name and table["layer"][f"1.recurrence.{name}"] == 1 for name in names)
    assert set(table[table["kind"] == "feed_forward"]["role"]) == {"gate", "up", "down"} and table["kind"]["0.recurrence.convolution"] == "convolution"
    assert set(table["kind"]) - {"linear", "feed_forward", "convolution", "embedding"} == ({"other"} if kind == "mamba" else set())  # A_log


def test_each_kind_learns_what_it_has_to_remember(kind):
    """A token that comes back after four others: nothing but a memory of it can tell."""
    torch.manual_seed(0)
    model, generator = language_model(kind, 6, 16, 1), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        tokens = torch.cat([first := torch.randint(4, (64, 1), generator=generator), torch.full((64, 1), 4), torch.randint(4, (64, 3), generator=generator), torch.full((64, 1), 5), first], 1)
        loss = F.cross_entropy(model(tokens[:, :-1])[:, -1], tokens[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < .3 < math.log(4)


def test_bfloat16_is_near_float32_and_its_gradients_are_finite(kind, tokens):
    torch.manual_seed(0)
    model = language_model(kind, VOCAB, 16, 2)
    with torch.no_grad(): exact = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, state = model(tokens), model.new_state()
        parts = torch.cat([model(part, state) for part in tokens.split([1, 8], 1)], 1)
    assert low.dtype == torch.bfloat16 and all(memory.state.dtype == torch.float32 for memory in state.blocks)
    for found in (low, parts): torch.testing.assert_close(found.float(), exact, rtol=.05, atol=.08)
    F.cross_entropy(low.flatten(0, 1).float(), tokens.flatten()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    half = language_model(kind, VOCAB, 16, 2).bfloat16()
    assert half.generate(tokens[:, :2], 5, generator=0).shape == (N, 7) and half(tokens).dtype == torch.bfloat16


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine: torch.compile cannot be tried")

@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind, backend", [("mingru", "aot_eager"), ("minlstm", "aot_eager"), ("mamba", "aot_eager"), pytest.param("hawk", "inductor", marks=NEEDS_COMPILER)])  # its C++ takes long: once
def test_compiled_it_says_the_same(kind, backend, tokens):
    """In one graph, with its gradient."""
    torch.manual_seed(0)
    model = language_model(kind, VOCAB, D, 1, convolution=2)
    tokens = tokens[:, :4] if backend == "inductor" else tokens.repeat(1, 8)  # longer than a chunk
    expected = model(tokens)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own imports
        found = torch.compile(model, fullgraph=True, backend=backend)(tokens)
        found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for p, grad in zip(model.parameters(), grads): torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4)


# One call for all kinds

def test_one_call_makes_each_kind_with_what_it_takes(tokens):
    assert isinstance(language_model("transformer", VOCAB, 16, 1, n_heads=2, rotary_base=99., feedforward=7, tied=True), Decoder)
    for kind in MIXERS:
        model = language_model(kind, VOCAB, 16, 3, d_recurrent=10, convolution=0, feedforward=7, tied=True)
        assert isinstance(model, Recurrent) and len(model.blocks) == 3 and model.unembedding is None
        assert all(type(block.recurrence) is MIXERS[kind] and block.recurrence.d_recurrent == 10 and block.recurrence.convolution is None and block.feedforward.up.weight.shape == (7, 16) for block in model.blocks)
    assert language_model("mamba", VOCAB, 16, 1, d_state=3, dt_rank=5).blocks[0].recurrence.dt_in.weight.shape == (5, 32)
    assert set(own_options("mamba")) == {"feedforward", "tied", "d_recurrent", "convolution", "d_state", "dt_rank"} and KINDS == ("transformer", *MIXERS, *ROUTED)
    for kind in KINDS:
        torch.manual_seed(3)
        first = language_model(kind, VOCAB, 16, 2)
        torch.manual_seed(3)
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), language_model(kind, VOCAB, 16, 2).parameters()))
        assert first(tokens).shape == (N, TIME, VOCAB)


@pytest.mark.parametrize("arguments, options, said", [
    (("mambo", VOCAB), {}, "kind is 'mambo'.*did you mean 'mamba'"), (("Hawk", VOCAB), {}, "did you mean 'hawk'"), (("lstm", VOCAB), {}, "did you mean 'minlstm'"), (("zebra", VOCAB), {}, "one of 'transformer', 'mingru', 'minlstm', 'hawk', 'mamba', 'mod', 'sdt', 'stt'$"),
    (("hawk", VOCAB), {"n_heads": 2}, "hawk takes no 'n_heads', it takes feedforward"), (("transformer", VOCAB), {"n_head": 2}, "did you mean 'n_heads'"), (("mingru", VOCAB), {"d_state": 2}, "mingru takes no 'd_state'"), (("mod", VOCAB), {"capacty": .5}, "did you mean 'capacity'"), (("mod", VOCAB), {"window": 5}, "mod takes no 'window'"),
    (("mamba", VOCAB), {"d_state": 0}, "d_state is 0"), (("mamba", VOCAB), {"dt_rank": 1.5}, "dt_rank is 1.5"), (("hawk", VOCAB), {"convolution": 1}, "convolution is 1: it has to be a whole number, 2 or more, or 0"),
    (("hawk", VOCAB), {"convolution": True}, "convolution is True"), (("hawk", VOCAB), {"convolution": -4}, "convolution is -4"), (("hawk", VOCAB), {"convolution": 4.}, "convolution is 4.0"), (("hawk", VOCAB), {"d_recurrent": 0}, "d_recurrent is 0"),
    (("mingru", 0), {}, "vocab_size is 0"), (("mingru", VOCAB, 0), {}, "d_model is 0"), (("mingru", VOCAB, 8, 0), {}, "n_layers is 0"), (("mingru", VOCAB, 8.), {}, "d_model is 8.0"), (("mamba", VOCAB), {"feedforward": 0}, "feedforward is 0")])
def test_models_that_cannot_be_are_refused_before_anything_is_drawn(arguments, options, said):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=said): language_model(*arguments, **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_tokens_and_states_that_cannot_be_are_refused(model, tokens, kind):
    for wrong, error in ((tokens[:, :0], ValueError), (tokens[0], ValueError), (tokens.double(), TypeError), (tokens + VOCAB, ValueError), (tokens - VOCAB, ValueError)):
        with pytest.raises(error, match="tokens"): model(wrong)
    state = model.new_state()
    model(tokens, state)
    with pytest.raises(ValueError, match="state is of 3 sequences"): model(tokens[:1], state)
    with pytest.raises(ValueError, match="mixer is 'gru'"): Recurrent(VOCAB, mixer="gru")
    assert isinstance(state.blocks[0], Memory)
