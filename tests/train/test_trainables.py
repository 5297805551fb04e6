"""The trainable parameters have the names that PEFT saves them under."""

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from hqqtrain.train.trainables import trainable_parameters


def test_names_are_those_of_peft(make_model):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    found, expected = trainable_parameters(model), get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(param.requires_grad for param in found.values())
