"""scripts/pretrain_tiny.py: sizes, the corpus that may be trained on, and the learning rate."""

from collections import Counter
from email.message import Message
from importlib.metadata import PathDistribution

import numpy as np
import pretrain_corpus
import pretrain_tiny
import pytest
import torch
from pretrain_corpus import clean_corpus, package_sources, permissive_license
from pretrain_tiny import SIZES, batches, learning_rate
from transformers import AutoConfig, LlamaForCausalLM

from hqqtrain.loading.catalog import TINY_FOLDER


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 5_770_496), ("16m", 16_783_872)])
def test_parameters(size, parameters):
    with torch.device("meta"):
        model = LlamaForCausalLM(SIZES[size].config())
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_large_size_sees_300_m_tokens_and_fits_35_mb():
    size = SIZES["16m"]
    assert size.steps * size.batch * size.context >= 300e6
    assert 16_783_872 * 2 < 35e6
