"""The decoder: rotary positions, attention, blocks on some tokens only, generation with kept keys, sizes and work, peers, and what cannot be."""
import shutil
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tformer_lab.models.decoder import (Attention, Block, Decoder, FeedForward, KeyValues, causal_mask, default_feedforward, flops, flops_by_part, next_tokens,
                                        parameter_count, rotate, rotation)
from tformer_lab.spectra.matrices import weight_matrices

VOCAB, N, TIME, D, HEADS = 11, 3, 9, 24, 3
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Decoder(VOCAB, D, n_layers=2, n_heads=HEADS, feedforward=20).double()


@pytest.fixture
def tokens(): return torch.randint(VOCAB, (N, TIME), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stream(): return torch.randn(N, TIME, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# Positions

def test_rotation_is_a_product_with_a_complex_number():
    """exp(i t base^(-2k/d)) on the pairs (k, k + d/2), to the last digits at position 100,000."""
    x, positions, base = torch.randn(5, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 4095, 100_000]), 500.
    frequencies = torch.tensor([base ** (-2 * k / 12) for k in range(6)], dtype=torch.float64)
    turned = torch.complex(x[:, :6], x[:, 6:]) * torch.polar(torch.ones(5, 6, dtype=torch.float64), positions[:, None] * frequencies)
    torch.testing.assert_close(rotate(x, *rotation(positions, 12, base)), torch.cat([turned.real, turned.imag], 1), **CLOSE)
    single = rotate(x.float(), *rotation(positions, 12, base))
    torch.testing.assert_close(single.double(), torch.cat([turned.real, turned.imag], 1), rtol=1e-5, atol=1e-6)


def test_the_first_pair_turns_by_one_radian_a_step():
    cosine, sine = rotation(torch.arange(5), 8)
    torch.testing.assert_close(sine[:, 0], torch.arange(5.).double().sin())
    assert torch.equal(cosine[0], torch.ones(4, dtype=torch.float64)) and (sine[1:] != 0).all()


def test_attention_depends_on_differences_of_positions_alone(stream):
    torch.manual_seed(0)
    attention = Attention(D, HEADS).double()
    here = attention(stream, torch.arange(TIME))
    torch.testing.assert_close(attention(stream, torch.arange(TIME) + 5000), here, rtol=1e-8, atol=1e-9)
    assert (attention(stream, 2 * torch.arange(TIME)) - here).abs().max() > 1e-3
    own = torch.arange(TIME) + torch.tensor([[0], [7], [100]])  # each sequence at a place of its own
    torch.testing.assert_close(attention(stream, own), here, rtol=1e-8, atol=1e-9)


# Attention and blocks

def literal_attention(attention, x, positions):
    """One query, one head at a time."""
    size, found = D // HEADS, torch.zeros_like(x)
    for n in range(len(x)):
        for t in range(x.shape[1]):
            for head in range(HEADS):
                rows = slice(head * size, (head + 1) * size)
                q, keys, values = attention.q.weight[rows] @ x[n, t], x[n, :t + 1] @ attention.k.weight[rows].T, x[n, :t + 1] @ attention.v.weight[rows].T
                def turned(v, p):
                    angle = p * torch.tensor([1e4 ** (-2 * k / size) for k in range(size // 2)], dtype=torch.float64)
                    z = torch.complex(v[:size // 2], v[size // 2:]) * torch.polar(torch.ones_like(angle), angle)
                    return z
                query = turned(q, positions[t])
                scores = torch.stack([(query * turned(key, positions[s]).conj()).sum().real for s, key in enumerate(keys)]) / size**.5
                weights = scores.exp() / scores.exp().sum()
                found[n, t, rows] = (weights[:, None] * values).sum(0)
    return found @ attention.o.weight.T


def test_attention_is_a_softmax_over_earlier_keys(stream):
    torch.manual_seed(0)
    attention, positions = Attention(D, HEADS).double(), torch.tensor([0, 1, 2, 3, 5, 8, 13, 21, 34])
    with torch.no_grad(): torch.testing.assert_close(attention(stream, positions), literal_attention(attention, stream, positions), **CLOSE)


def test_attention_maps_are_the_weights_that_act(model, tokens):
    maps, before = model.attention_maps(tokens), model(tokens)
    assert list(maps) == ["0.attention", "1.attention"] and all(m.shape == (N, HEADS, TIME, TIME) for m in maps.values())
    with torch.no_grad():
        for (name, weights), block, x in zip(maps.items(), model.blocks, model.residual_stream(tokens)):
            inputs = block.attention_norm(x)
            values = block.attention.v(inputs).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            torch.testing.assert_close(block.attention.o((weights @ values).transpose(1, 2).flatten(2)), block.attention(inputs, torch.arange(TIME)), **CLOSE)
            assert (weights.triu(1) == 0).all(), name
    assert torch.equal(model(tokens), before)


def test_a_block_on_some_tokens_is_the_whole_block_with_the_others_hidden(stream):
    torch.manual_seed(0)
    block = Block(D, HEADS, 20).double()
    chosen = torch.tensor([[0, 2, 3, 8], [1, 4, 5, 6], [0, 1, 7, 8]])
    take = lambda x: x.gather(1, chosen[..., None].expand(-1, -1, D))
    few = block(take(stream), chosen)
    kept = torch.zeros(N, 1, 1, TIME, dtype=torch.bool).scatter(-1, chosen[:, None, None], True)
    every = block(stream, torch.arange(TIME), mask=causal_mask(TIME, TIME) & kept | torch.eye(TIME, dtype=torch.bool))
    torch.testing.assert_close(few, take(every), **CLOSE)


def test_chosen_tokens_go_through_a_block_in_chunks_with_a_cache(stream):
    torch.manual_seed(0)
    block, chosen, cache = Block(D, HEADS, 20).double(), torch.tensor([0, 2, 3, 6, 8]), KeyValues()
    whole = block(stream[:, chosen], chosen)
    parts = [block(stream[:, part], part, cache=cache) for part in chosen.split([2, 1, 2])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    hidden = causal_mask(TIME, TIME) & (torch.arange(TIME) != 1)  # keys in the cache that a mask hides
    hidden[1, 1] = True
    cache, first = KeyValues(), block(stream, torch.arange(TIME), mask=hidden)
    parts = [block(stream[:, a:b], torch.arange(a, b), mask=hidden[a:b, :b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), first, **CLOSE)


def test_feed_forward_and_norms_are_their_formulas(model, tokens):
    block, x = model.blocks[0], model.residual_stream(tokens)[0]
    def norm(x): return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    with torch.no_grad():
        middle = x + block.attention(norm(x), torch.arange(TIME))
        z = norm(middle) @ block.feedforward.gate.weight.T
        expected = middle + (z / (1 + (-z).exp()) * (norm(middle) @ block.feedforward.up.weight.T)) @ block.feedforward.down.weight.T
        torch.testing.assert_close(model.residual_stream(tokens)[1], expected, **CLOSE)
        torch.testing.assert_close(model(tokens), norm(model.residual_stream(tokens)[2]) @ model.unembedding.weight.T, **CLOSE)
        torch.testing.assert_close(x, model.embedding.weight[tokens] * D**.5, **CLOSE)


def test_logits_see_no_later_token_and_no_other_sequence(model, tokens):
    before = model(tokens)
    for t in range(1, TIME):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 1) % VOCAB
        after = model(other)
        assert torch.equal(after[0, :t], before[0, :t]) and torch.equal(after[1:], before[1:])
        assert (after[0, t:] != before[0, t:]).any(-1).all()


# Generation

@pytest.mark.parametrize("temperature", [0., .7, 1.])
def test_generation_with_kept_keys_is_generation_anew(model, tokens, temperature):
    quick = model.generate(tokens[:, :4], 30, temperature, torch.Generator().manual_seed(5))
    slow, generator = tokens[:, :4], torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _ in range(30): slow = torch.cat([slow, next_tokens(model(slow)[:, -1], temperature, generator)], 1)
    assert torch.equal(quick, slow)


def test_a_seed_repeats_a_generation_and_leaves_torch_alone(model, tokens):
    before = torch.get_rng_state()
    first = model.generate(tokens[:, :1], 40, generator=3)
    assert torch.equal(model.generate(tokens[:, :1], 40, generator=3), first) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model.generate(tokens[:, :1], 40, generator=4), first)
    torch.manual_seed(7)
    free = model.generate(tokens[:, :1], 40)
    torch.manual_seed(7)
    assert torch.equal(model.generate(tokens[:, :1], 40), free)
    assert first.dtype == torch.int64 and first.shape == (N, 41) and torch.equal(first[:, :1], tokens[:, :1])


def test_sampling_has_the_frequencies_of_the_softmax():
    logits = torch.tensor([[0., 1., 2., -1.]])
    drawn = next_tokens(logits.expand(40_000, 4), 2., torch.Generator().manual_seed(0)).flatten().bincount(minlength=4) / 40_000
    p = (logits[0] / 2).softmax(0)
    assert ((drawn - p).abs() < 4 * (p * (1 - p) / 40_000).sqrt()).all()


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [3, 1, 1, 4]])
def test_a_state_goes_on_from_chunk_to_chunk(model, tokens, chunks):
    state = model.new_state()
    parts = torch.cat([model(part, state) for part in tokens.split(chunks, 1)], 1)
    torch.testing.assert_close(parts, model(tokens), **CLOSE)
    assert state.length == TIME and all(kept.length == TIME for kept in state.blocks)


# Sizes and work

def test_parameters_are_the_sum_of_what_the_formula_says(model):
    per_block = 4 * D * D + 3 * D * 20 + 2 * D
    assert parameter_count(model, embeddings=False) == 2 * per_block + D
    assert parameter_count(model) == 2 * per_block + D + 2 * VOCAB * D == sum(p.numel() for p in model.parameters())
    assert parameter_count(Decoder(VOCAB, D, 2, HEADS, 20, tied=True)) == parameter_count(model) - VOCAB * D


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_flops_are_those_that_torch_counts(tied, length):
    model = Decoder(VOCAB, D, n_layers=3, n_heads=HEADS, tied=tied)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad(): model(torch.zeros(1, length, dtype=torch.int64))
    assert counter.get_total_flops() == flops(model, length)
    if length > 1: assert flops_by_part(model, length).attention == 3 * 4 * length**2 * D


def test_a_tied_head_is_the_embedding_itself(tokens):
    torch.manual_seed(0)
    model = Decoder(VOCAB, D, 1, HEADS, tied=True).double()
    x = model.residual_stream(tokens)[-1]
    torch.testing.assert_close(model(tokens), model.norm(x) @ model.embedding.weight.T, **CLOSE)
    assert "unembedding.weight" not in model.state_dict() and model.unembedding is None
    one = torch.zeros(1, 1, dtype=torch.int64)
    model(one).sum().backward()
    assert (model.embedding.weight.grad.abs().sum(1) > 0).all()  # of tokens, too, that were only predicted
    before = model(one).detach()
    with torch.no_grad(): model.embedding.weight[5] *= 2  # a token that is not read: its own logit doubles
    after = model(one).detach()
    torch.testing.assert_close(after[..., 5], 2 * before[..., 5])
    assert torch.equal(after[..., :5], before[..., :5])


def test_activations_keep_their_size_before_training():
    torch.manual_seed(0)
    model = Decoder(100, 256, n_layers=12, n_heads=4)
    with torch.no_grad(): stream = model.residual_stream(torch.randint(100, (4, 64)))
    sizes = torch.stack([x.square().mean().sqrt() for x in stream])
    assert .8 < sizes[0] < 1.2 and sizes[-1] < 2
    assert .7 < model.predict(stream[-1]).std() < 1.4
    assert torch.isclose(model.blocks[3].attention.o.weight.std(), torch.tensor(256**-.5 / 24**.5), rtol=.02)
    assert torch.isclose(model.blocks[3].feedforward.gate.weight.std(), torch.tensor(1 / 16.), rtol=.02)


def test_the_spectral_instrument_knows_every_matrix(model):
    found = weight_matrices(model, circuits=True)
    table = found.table().set_index("name")
    roles = {"attention": {"q", "k", "v", "o"}, "feed_forward": {"gate", "up", "down"}, "embedding": {"embedding", "unembedding"}}
    for kind, expected in roles.items(): assert set(table[table["kind"] == kind]["role"]) == expected
    assert set(table["kind"]) == {*roles, "circuit"} and sum(table["kind"] == "circuit") == 2 * 2 * HEADS
    assert sorted(table[table["kind"] == "attention"]["layer"].astype(int)) == [0] * 4 + [1] * 4
    assert torch.equal(found["1.attention.q"], model.blocks[1].attention.q.weight.detach())


# Precision and compilation

def test_bfloat16_is_near_float32_and_its_gradients_are_finite(tokens):
    torch.manual_seed(0)
    model = Decoder(VOCAB, D, 2, HEADS)
    with torch.no_grad(): exact = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16): low = model(tokens)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=.05, atol=.05)
    F.cross_entropy(low.flatten(0, 1).float(), tokens.flatten()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine: torch.compile cannot be tried")
@pytest.mark.timeout(300)
def test_compiled_it_says_the_same(tokens):
    torch.manual_seed(0)
    model = Decoder(VOCAB, 16, 1, 2)
    expected = model(tokens)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own imports
        found = torch.compile(model, fullgraph=True)(tokens)
        found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for p, grad in zip(model.parameters(), grads): torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4)


# A peer

@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_llama_of_hugging_face_under_mapped_weights(tokens, tied):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = Decoder(VOCAB, D, 2, HEADS, 20, tied=tied, rotary_base=777.)
    with torch.no_grad():  # norms that are not one
        for name, p in model.named_parameters():
            if "norm" in name: p.uniform_(.5, 1.5)
    config = transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=D, intermediate_size=20, num_hidden_layers=2, num_attention_heads=HEADS, rms_norm_eps=1e-6,
                                      rope_parameters={"rope_type": "default", "rope_theta": 777.}, rope_theta=777., tie_word_embeddings=False)
    peer = transformers.LlamaForCausalLM(config).eval()
    ours = model.state_dict()
    mapped = {"model.embed_tokens.weight": ours["embedding.weight"] * D**.5, "model.norm.weight": ours["norm.weight"], "lm_head.weight": ours["embedding.weight" if tied else "unembedding.weight"]}
    for i in range(2):
        block, theirs = f"blocks.{i}.", f"model.layers.{i}."
        mapped |= {f"{theirs}self_attn.{m}_proj.weight": ours[f"{block}attention.{m}.weight"] for m in "qkvo"}
        mapped |= {f"{theirs}mlp.{m}_proj.weight": ours[f"{block}feedforward.{m}.weight"] for m in ("gate", "up", "down")}
        mapped |= {f"{theirs}input_layernorm.weight": ours[block + "attention_norm.weight"], f"{theirs}post_attention_layernorm.weight": ours[block + "feedforward_norm.weight"]}
    peer.load_state_dict(mapped)
    with torch.no_grad(): torch.testing.assert_close(model(tokens), peer(tokens).logits, rtol=1e-5, atol=1e-5)


# What cannot be

@pytest.mark.parametrize("wrong, said", [
    ({"vocab_size": 0}, "vocab_size is 0"), ({"d_model": 30}, "d_model is 30: it has to be a multiple of n_heads, 4"), ({"d_model": 12}, "has the size 3.*has to be a multiple of 8"), ({"n_layers": 0}, "n_layers is 0"),
    ({"n_heads": 2.}, "n_heads is 2.0"), ({"feedforward": -4}, "feedforward is -4"), ({"d_model": True}, "d_model is True"), ({"d_model": "64"}, "d_model is '64'"), ({"rotary_base": 1.}, "rotary_base is 1.0")])
def test_sizes_that_cannot_be_are_refused_before_anything_is_drawn(wrong, said):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=said): Decoder(**{"vocab_size": VOCAB, **wrong})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong, error, said", [
    (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"shape \[2, 0\]"), (torch.zeros(3, dtype=torch.int64), ValueError, r"shape \[3\]"), (torch.zeros(0, 3, dtype=torch.int64), ValueError, r"shape \[0, 3\]"),
    (torch.zeros(1, 3), TypeError, "tokens are float32"), (torch.zeros(1, 3, dtype=torch.bool), TypeError, "tokens are bool"), ([[1, 2]], TypeError, "tokens are a list"),
    (torch.tensor([[0, VOCAB]]), ValueError, f"from 0 to {VOCAB}: they have to be from 0 to {VOCAB - 1}"), (torch.tensor([[-1, 3]]), ValueError, "from -1 to 3")])
def test_tokens_that_cannot_be_are_refused(model, wrong, error, said):
    with pytest.raises(error, match=said): model(wrong)
    with pytest.raises(error, match=said): model.generate(wrong, 3)


def test_generations_and_states_that_cannot_be_are_refused(model, tokens):
    for wrong, said in ((dict(length=0), "length is 0"), (dict(length=2, temperature=-.1), "temperature is -0.1"), (dict(length=2, temperature=float("nan")), "temperature is nan")):
        with pytest.raises(ValueError, match=said): model.generate(tokens, **wrong)
    state = model.new_state()
    model(tokens, state)
    with pytest.raises(ValueError, match="state is of 3 sequences, and tokens are of 2"): model(tokens[:2], state)
    with pytest.raises(ValueError, match="with 2 blocks: this one has 1"): Decoder(VOCAB, D, 1, HEADS)(tokens, model.new_state())
    with pytest.raises(ValueError, match="length is 0"): flops(model, 0)


def test_widths_of_the_feed_forward_layer():
    assert [default_feedforward(d) for d in (3, 8, 64, 128, 768)] == [8, 24, 176, 344, 2048]
    assert Decoder(VOCAB, 64).blocks[0].feedforward.up.weight.shape == (176, 64) and isinstance(Decoder(VOCAB).blocks[3].feedforward, FeedForward)
