"""Our torch.randn against the real one."""

import numpy as np
import pytest
import torch

from sdjax.diffusion.torch_noise import torch_noise


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 4, 5, 7), (3, 3), (1, 4, 2, 2), (3, 1, 5), (4,), (1,)], ids=str)
def test_noise_is_pytorchs(shape, seed):
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    found = torch_noise(seed, shape)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
