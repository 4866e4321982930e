"""Golden log-probabilities from an independent implementation: the authors' own PyTorch code.

    pip install "torch==2.13.0" "numpy<3"
    git clone https://github.com/kimiyoung/transformer-xl
    python tests/goldens/make_transformer_xl.py transformer-xl

Writes transformer_xl_*.npz beside this script: the weights of tiny random models under their own
names, the tokens of three segments in a row [B, 3 T], and the log-probability of every id after each
of them [B, 3 T, V], the segments run one after the other with the memory carried along. All float32
on a CPU. Weights are drawn wider than at initialisation, biases and norms away from 0 and 1.
tests/models/test_transformer_xl.py maps the weights to ours. The code is of 2019: what newer versions
of torch no longer take (a build without CUDA, masks of bytes) is mended here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

PINNED = "2.13.0"
VOCAB, LENGTH, ROWS, SEGMENTS = 40, 6, 2, 3
SIZES = {"n_token": VOCAB, "n_layer": 2, "n_head": 2, "d_model": 16, "d_head": 8, "d_inner": 24}
CASES = {
    "plain": {"mem_len": LENGTH},
    "same_length": {"mem_len": LENGTH + 3, "same_length": True, "clamp_len": 4},
    "adaptive": {"mem_len": LENGTH, "cutoffs": [10, 20], "tie_projs": [False, True, True]},
    "adaptive_div": {"mem_len": LENGTH, "cutoffs": [10, 20], "tie_projs": [False, True, True], "div_val": 2},
}


def main() -> None:
    if torch.__version__.split("+")[0] != PINNED:
        raise SystemExit(f"needs torch {PINNED}, not {torch.__version__}")
    here = Path(__file__).resolve().parent
    checkout = Path(sys.argv[1]).resolve() / "pytorch"
    torch.version.cuda = torch.version.cuda or "13.0"
    torch.Tensor.byte = torch.Tensor.bool
    os.chdir(checkout)  # it looks for its `utils` in the current folder
    sys.path.insert(0, str(checkout))
    from mem_transformer import MemTransformerLM

    for name, case in CASES.items():
        torch.manual_seed(0)
        write(
            here / f"transformer_xl_{name}.npz",
            MemTransformerLM(**SIZES, dropout=0.0, dropatt=0.0, tgt_len=LENGTH, ext_len=0, **case),
        )


def write(path: Path, model: torch.nn.Module) -> None:
    model.eval().float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # one that is shared comes once
            middle = 1.0 if key.endswith("layer_norm.weight") else 0.0
            parameter.copy_(middle + 0.3 * torch.randn_like(parameter))
        tokens = torch.randint(VOCAB, (SEGMENTS * LENGTH, ROWS))
        memories, parts = model.init_mems(), []
        for segment in tokens.split(LENGTH):
            hidden, memories = model._forward(segment, mems=memories)
            parts.append(torch.stack([logprob(model, hidden, i) for i in range(VOCAB)], dim=-1))
    logprobs = torch.cat(parts).transpose(0, 1)
    weights = {k: v.detach().numpy() for k, v in model.named_parameters()}
    arrays = {"tokens": tokens.T.numpy().astype(np.int32), "logprobs": logprobs.numpy(), **weights}
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def logprob(model: torch.nn.Module, hidden: torch.Tensor, token: int) -> torch.Tensor:
    """Log-probability [T, B] of one id at every place."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    target = torch.full((len(flat),), token)
    return -model.crit(flat, target, keep_order=True).view(hidden.shape[:2])


if __name__ == "__main__":
    main()
