"""Writes nf4.npz, what bitsandbytes makes of random blocks; needs torch and bitsandbytes (made by
0.50.2).

python tests/adapters/reference/make_nf4.py
"""

from pathlib import Path

import bitsandbytes.functional as F
import numpy as np
import torch

rng = np.random.default_rng(0)
weights = rng.standard_normal((24, 128)) * np.exp(rng.normal(size=(24, 1)))
weights = weights.astype(np.float32)  # [out, in]
packed, state = F.quantize_4bit(torch.tensor(weights), blocksize=64, quant_type="nf4")
halves = packed.numpy().reshape(-1)
np.savez_compressed(
    Path(__file__).with_name("nf4.npz"),
    weights=weights,
    codes=np.stack([halves >> 4, halves & 15], axis=-1).reshape(weights.shape).astype(np.uint8),
    absmax=state.absmax.numpy(),
    table=state.code.numpy(),
)
