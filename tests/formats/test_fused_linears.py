"""Linears that inference engines fuse must have the same settings."""

from hqqtrain.formats.fused_linears import dense_linears, differing_linears, engine_name


def test_names_of_fused_linears():
    assert engine_name("model.layers.0.self_attn.k_proj") == "model.layers.0.self_attn.qkv_proj"
    assert engine_name("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.gate_up_proj"
    assert engine_name("model.layers.0.mlp.down_proj") == "model.layers.0.mlp.down_proj"
    assert engine_name("lm_head") == "lm_head"


def test_dense_linears(make_trained):
    trained = make_trained(overrides={"*.1.mlp.down_proj": None})
    found = dense_linears(trained.settings, trained.hf_config)
    assert found == ["model.layers.1.mlp.down_proj", "lm_head"]


def test_pairs_with_different_settings(make_trained):
    same = make_trained(overrides={"*.0.mlp.*_proj": {"nbits": 4}})
    assert list(differing_linears(same.settings, same.hf_config)) == []
    mixed = make_trained(overrides={"*.0.mlp.up_proj": {"nbits": 4}, "*.1.self_attn.v_proj": None})
    assert list(differing_linears(mixed.settings, mixed.hf_config)) == [
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"),
    ]
