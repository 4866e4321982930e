"""Do answers that people prefer become more likely when a tuned GPT-2 124M learns from pairs of answers?

One epoch of direct preference optimization over files of `chosen`/`rejected` answers to a `prompt` (or
`conversations`), starting from the best checkpoint of `instruct_alpaca`, which is also what it is held
close to.

    jaxgpt data show configs/dpo.py     # both sides of a pair follow each other in a row
    jaxgpt train configs/dpo.py
    jaxgpt eval runs/dpo                # margin and accuracy on held-out pairs

Expected: the validation loss falls from 0.69, `val_margin` from 0 rises, and `val_accuracy` from 0.5 to
between 0.6 and 0.75, as the pairs allow. `reward_chosen` may fall too, only more slowly than
`reward_rejected`; `nll_weight` holds it up. Other objectives over the same pairs: IPO(), SimPO(), ORPO();
over single answers that are good or bad, data=Rated(...) and objective=KTO().
"""

from jaxgpt.config import DPO, GPT, Compute, Optim, Pairs, Run, Train


def config() -> Run:
    return Run(
        name="dpo",
        init_from="runs/instruct_alpaca",
        model=GPT(vocab_size=50_304, context=1024, layers=12, heads=12, width=768),
        data=Pairs(train=("data/preferences/*.json",), validation_fraction=0.05),
        objective=DPO(beta=0.1),
        optim=Optim(peak_lr=5e-7, final_lr=0.0, schedule="linear", warmup_steps=30, weight_decay=0.0),
        train=Train(epochs=1.0, batch_size=32, accumulate=4, eval_every=50, save_every=200, log_every=5),
        compute=Compute(dtype="bfloat16"),
    )
