"""Does a tuned model answer customers from documents, cite them, and say when they hold no answer?

Dialogues in any layout that `Chat` reads, and a folder of documents (docs/customer_service.md). The passages
that the search finds for a customer's last question stand before it; the answer is learned with the mark of
its passage, or as a sentence that says that none has it.

    jaxgpt serve documents data/support/documents --questions data/support/dev.txt
    jaxgpt train configs/customer_service.py --init-from runs/instruct_alpaca
    jaxgpt serve runs/customer_service --documents data/support/documents --least 0.13

Expected: answers to held-out questions have a higher F1 with the documents than without, and `cited` is above
the share of questions whose first passage is the right one.
"""

from jaxgpt.config import GPT, Compute, Knowledge, LoRA, Optim, Run, Train
from jaxgpt.tasks import Support


def config() -> Run:
    return Run(
        name="customer_service",
        init_from="runs/instruct_alpaca",
        tune=LoRA(rank=16, alpha=32.0, dropout=0.05),
        model=GPT(vocab_size=50_304, context=1024, layers=12, heads=12, width=768),
        data=Support(
            train=("data/support/*.jsonl",),
            validation_fraction=0.05,
            length=1024,
            knowledge=Knowledge(documents=("data/support/documents",), passages=3, cited=True, least=0.13),
        ),
        optim=Optim(peak_lr=3e-4, final_lr=0.0, schedule="linear", warmup_steps=30, weight_decay=0.0),
        train=Train(steps=600, batch_size=32, eval_every=50, save_every=200, patience=4),
        compute=Compute(dtype="bfloat16"),
    )
