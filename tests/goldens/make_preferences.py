"""Golden losses and gradients of objectives over preferences, from Hugging Face's trl.

    pip install "torch==2.13.0" "transformers==5.24.0" "trl==1.16.0" "numpy<3"
    python tests/goldens/make_preferences.py

Reads gpt2.npz beside this script (`make_families.py` wrote it) and writes preferences.npz: `documents`, as
JSON a list of prompts, chosen and rejected completions (token ids), and the reference's log-probability of
each token of these; and for each objective its `NAME/loss` and the gradients `NAME/wte`, `NAME/wpe` and
`NAME/ln_f`, in float32 on a CPU. For KTO, completion i is good where i is even (the chosen one) and bad
elsewhere (the rejected one), and the other completion of prompt i is that of i - 1, as trl cycles them. The
reference is the model itself with all weights times 1.2. The losses are trl's own code, called with a trainer
of its settings alone. tests/objectives/test_preferences.py compares.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.numpy import save_file
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

HERE, PAIRS = Path(__file__).parent, 4
GRADIENTS = {
    "wte": "transformer.wte.weight",
    "wpe": "transformer.wpe.weight",
    "ln_f": "transformer.ln_f.weight",
}
ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def load_model(scale: float) -> Any:
    stored = dict(np.load(HERE / "gpt2.npz"))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(json.loads(str(stored["config"]))))
        tensors = {k.removeprefix("tensors/"): v for k, v in stored.items() if k.startswith("tensors/")}
        save_file(tensors, Path(folder, "model.safetensors"), {"format": "pt"})
        kind = hf.AutoModelForCausalLM
        model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    return model


def padded(documents: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of (prompt, completion)s, padded on the right."""
    length = max(len(p) + len(c) for p, c in documents)
    columns = {
        n: torch.zeros(len(documents), length, dtype=torch.long) for n in ("ids", "attention", "completion")
    }
    for i, (prompt, completion) in enumerate(documents):
        size = len(prompt) + len(completion)
        columns["ids"][i, :size] = torch.tensor(prompt + completion)
        columns["attention"][i, :size] = 1
        columns["completion"][i, len(prompt) : size] = 1
    return {
        "input_ids": columns["ids"],
        "attention_mask": columns["attention"],
        "completion_mask": columns["completion"],
    }


class Fused:
    """The model as trl's trainers call it: with the log-probabilities of labels, 0 where there is none."""

    def __init__(self, model: Any) -> None:
        self.model, self.training = model, True

    def __call__(self, input_ids: Any, attention_mask: Any, labels: Any, **_: Any) -> SimpleNamespace:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        targets = labels[:, 1:]
        chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        zeros = torch.zeros_like(chosen)
        return SimpleNamespace(
            log_probs=torch.where(targets >= 0, chosen, 0.0),
            entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros, logits=logits,
        )  # fmt: skip


def trainer(**settings: Any) -> SimpleNamespace:
    """What trl's loss functions read of a trainer."""
    shared = {
        "accelerator": ACCELERATOR, "aux_loss_enabled": False, "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    return SimpleNamespace(**(shared | settings))


def logps(model: Any, documents: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The log-probability of each token [N, T - 1], 0 where it is no completion."""
    batch = padded(documents)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return Fused(model)(batch["input_ids"], batch["attention_mask"], labels).log_probs


def losses(model: Any, reference: Any, prompts: Any, chosen: Any, rejected: Any) -> dict[str, torch.Tensor]:
    """Every objective's loss, a mean over pairs or completions."""
    fused, sides = (
        Fused(model),
        (list(zip(prompts, chosen, strict=True)), list(zip(prompts, rejected, strict=True))),
    )
    with torch.no_grad():
        stored = [logps(reference, side).sum(1) for side in sides]
    pairs = padded([*sides[0], *sides[1]]) | {"ref_chosen_logps": stored[0], "ref_rejected_logps": stored[1]}
    made = {}
    for name, kind, beta in (("dpo", "sigmoid", 0.3), ("ipo", "ipo", 0.2)):
        settings = {"loss_types": [kind], "loss_weights": [1.0], "beta": beta}
        me = trainer(
            model=fused, ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, **settings
        )
        made[name] = DPOTrainer._compute_loss(me, fused, dict(pairs), False)
    ratios = [logps(model, side).sum(1) - one for side, one in zip(sides, stored, strict=True)]
    me = trainer(alpha=0.0, loss_type="sigmoid", beta=0.3, label_smoothing=0.1)
    made["cdpo"] = CPOTrainer.cpo_loss(me, *ratios)[0].mean()
    means = [logps(model, side).sum(1) / torch.tensor([float(len(c)) for _, c in side]) for side in sides]
    me = trainer(alpha=0.0, loss_type="simpo", simpo_gamma=0.5, beta=2.0, label_smoothing=0.0)
    made["simpo"] = CPOTrainer.cpo_loss(me, *means)[0].mean()
    made["orpo"] = -ORPOTrainer.odds_ratio_loss(trainer(beta=0.4), *means)[0].mean()
    own = [
        (p, c if i % 2 == 0 else r) for i, (p, c, r) in enumerate(zip(prompts, chosen, rejected, strict=True))
    ]
    others = [(p, own[i - 1][1]) for i, (p, _) in enumerate(own)]
    cycled = padded(others)
    with torch.no_grad():
        found = {"ref_logps": logps(reference, own).sum(1), "ref_KL_logps": logps(reference, others).sum(1)}
    batch = padded(own) | found | {"label": torch.tensor([i % 2 == 0 for i in range(len(own))])}
    batch |= {f"KL_{name}": value for name, value in cycled.items()}
    me = trainer(
        model=fused, calculate_KL=True, beta=0.3, loss_type="kto",
        desirable_weight=1.0, undesirable_weight=1.5,
    )  # fmt: skip
    me._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(me, model, batch)
    made["kto"] = KTOTrainer._compute_loss(me, fused, batch, False)
    made["kto/kl"] = torch.tensor(me._metrics["train"]["kl"][0])
    return made


def main() -> None:
    random = np.random.default_rng(0)
    model, reference = load_model(1.0), load_model(1.2)

    def draw(low: int, high: int) -> list[list[int]]:
        return [random.integers(1, 64, random.integers(low, high)).tolist() for _ in range(PAIRS)]

    prompts, chosen, rejected = draw(2, 5), draw(2, 7), draw(2, 7)
    out: dict[str, Any] = {}
    for name, loss in losses(model, reference, prompts, chosen, rejected).items():
        out[f"{name}/loss" if "/" not in name else name] = loss.detach().numpy()
        if loss.requires_grad:
            model.zero_grad()
            loss.backward(retain_graph=True)
            tensors = dict(model.named_parameters())
            out |= {f"{name}/{short}": tensors[long].grad.numpy().copy() for short, long in GRADIENTS.items()}
    documents = {"prompts": prompts, "chosen": chosen, "rejected": rejected}
    own = [c if i % 2 == 0 else r for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))]
    documents["other"] = [own[i - 1] for i in range(PAIRS)]
    with torch.no_grad():
        for side in ("chosen", "rejected", "other"):
            found = logps(reference, list(zip(prompts, documents[side], strict=True))).tolist()
            spans = [(len(p) - 1, len(p) + len(c) - 1) for p, c in zip(prompts, documents[side], strict=True)]
            documents[f"reference_{side}"] = [row[a:b] for row, (a, b) in zip(found, spans, strict=True)]
    np.savez_compressed(HERE / "preferences.npz", documents=json.dumps(documents), **out)
    print({name: float(value) for name, value in out.items() if value.ndim == 0})


if __name__ == "__main__":
    main()
