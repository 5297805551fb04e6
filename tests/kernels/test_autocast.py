"""The dtype of matrix products, under autocast and without."""

import torch

from hqqtrain_kernels.autocast import product_dtype, without_autocast


def test_the_dtype_of_products():
    x = torch.ones(2)
    assert product_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(x) == torch.bfloat16
        assert product_dtype(x.to("meta")) == torch.float32
        with without_autocast(x):
            assert product_dtype(x) == torch.float32
            assert (x @ x).dtype == torch.float32
    with without_autocast(x):
        assert (x @ x).dtype == torch.float32
