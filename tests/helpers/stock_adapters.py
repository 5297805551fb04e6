"""Adapters that PEFT itself has made and saved."""

import torch
from peft import LoraConfig, get_peft_model


def save_stock_adapter(folder, model, **config):
    """Save an adapter made by PEFT itself on a dense model, with nonzero B."""
    targets = {"target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **targets | config))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param)
    model.save_pretrained(folder)
    return model
