"""Golden texts and scores of beam search, from Hugging Face transformers.

    pip install "torch==2.13.0" "transformers==5.24.0" "numpy<3"
    python tests/goldens/make_beams.py

Writes beams.npz beside this script. The models are those of gpt2.npz and llama.npz (make_families.py).
Each case of `CASES` is a search after two prompts of different lengths, each run alone; four ids end a text,
so that some do early and some do not. tests/sample/test_beam.py compares.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers as hf

PINNED = {"torch": (torch, "2.13.0"), "transformers": (hf, "5.24.0")}
LENGTHS, NEW, STOP = (12, 5), 12, (39, 34, 15, 6)
EARLY = {"full": True, "heuristic": False, "never": "never"}
PENALTIES = (0.0, 1.0, 2.0, -1.0)
PLAIN = [("gpt2", 4, penalty, 0, early) for early in EARLY for penalty in PENALTIES]
NGRAMS = [("llama", 4, penalty, 2, "heuristic") for penalty in PENALTIES]
FIELDS = ("family", "beams", "length_penalty", "no_repeat_ngram", "early_stopping")
CASES = [dict(zip(FIELDS, case, strict=True)) for case in [*PLAIN, *NGRAMS, ("llama", 7, 1.0, 1, "never")]]


def main() -> None:
    for name, (module, version) in PINNED.items():
        if module.__version__.split("+")[0] != version:
            raise SystemExit(f"needs {name} {version}, not {module.__version__}")
    ids, scores = [], []
    models = {case["family"]: load(case["family"]) for case in CASES}
    for case in CASES:
        model, tokens = models[case["family"]]
        how = {name: value for name, value in case.items() if name != "family"}
        for row, length in enumerate(LENGTHS):
            made = search(model, tokens[row : row + 1, :length], **how)
            ids.append(made[0])
            scores.append(made[1])
    found = {"cases": np.array(json.dumps(CASES))}
    most = max(case["beams"] for case in CASES)
    found["ids"] = np.stack([np.pad(x, ((0, most - len(x)), (0, 0)), constant_values=-1) for x in ids])
    found["scores"] = np.stack([np.pad(x, (0, most - len(x))) for x in scores]).astype(np.float32)
    found |= {"lengths": np.array(LENGTHS), "stop": np.array(STOP), "new": np.array(NEW)}
    path = Path(__file__).with_name("beams.npz")
    np.savez_compressed(path, **found)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, {len(CASES)} cases")


def load(family: str) -> tuple[torch.nn.Module, torch.Tensor]:
    stored = dict(np.load(Path(__file__).with_name(f"{family}.npz")))
    config = hf.AutoConfig.for_model(**json.loads(str(stored["config"])))
    config._attn_implementation = "eager"
    model = hf.AutoModelForCausalLM.from_config(config).eval().float()
    tensors = {
        k.removeprefix("tensors/"): torch.tensor(v).float()
        for k, v in stored.items()
        if k.startswith("tensors/")
    }
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model, torch.tensor(stored["tokens"]).long()


@torch.no_grad()
def search(
    model: torch.nn.Module,
    prompt: torch.Tensor,
    beams: int,
    length_penalty: float,
    no_repeat_ngram: int,
    early_stopping: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [beams, NEW], -1 behind the last, and scores [beams]."""
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=length_penalty,
        no_repeat_ngram_size=no_repeat_ngram,
        early_stopping=EARLY[early_stopping],
        eos_token_id=list(STOP),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = np.full((beams, NEW), -1, np.int32)
    for row, text in enumerate(made.sequences[:, prompt.shape[1] :].tolist()):
        end = next((i + 1 for i, token in enumerate(text) if token in STOP), len(text))
        ids[row, :end] = text[:end]
    return ids, made.sequences_scores.numpy()


if __name__ == "__main__":
    main()
