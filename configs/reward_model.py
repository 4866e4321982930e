"""How well does a GPT-2 124M with a head of one output tell which of two answers people prefer?

One epoch of Bradley-Terry over files of `chosen`/`rejected` answers, starting from the best checkpoint of
`instruct_alpaca`.

    jaxgpt train configs/reward_model.py
    jaxgpt eval runs/reward_model
    jaxgpt sample runs/instruct_alpaca --prompt "What is a tuple?" --best-of 8 --reward runs/reward_model

Expected: the validation accuracy rises from 0.5 to between 0.6 and 0.75, as the pairs allow.
"""

from jaxgpt.config import GPT, BradleyTerry, Compute, Optim, Pairs, RewardModel, Run, Train


def config() -> Run:
    return Run(
        name="reward_model",
        init_from="runs/instruct_alpaca",
        model=RewardModel(backbone=GPT(vocab_size=50_304, context=1024, layers=12, heads=12, width=768)),
        data=Pairs(train=("data/preferences/*.json",), validation_fraction=0.05),
        objective=BradleyTerry(),
        optim=Optim(peak_lr=1e-5, final_lr=0.0, schedule="linear", warmup_steps=30, weight_decay=0.0),
        train=Train(epochs=1.0, batch_size=32, eval_every=50, save_every=200, log_every=5, best_by="error"),
        compute=Compute(dtype="bfloat16"),
    )
