"""Does a small language model, trained from scratch on histories as text, rank better than popularity?

MovieLens's ratings, the last item of each user held out (docs/recommendation.md).

    jaxgpt data ratings data/ml/ratings.csv --items data/ml/movies.csv --out data/ml
    jaxgpt tokenizer train data/ml/train.jsonl --out tokenizers/ml --field candidate --vocab-size 4096
    jaxgpt train configs/recommend_movielens.py

Expected: NDCG@10 of the test records above that of popularity in data/ml/baselines.json; item-kNN is hard to
beat where ratings are dense.
"""

from jaxgpt.config import GPT, Compute, Optim, Run, Train
from jaxgpt.tasks import Recommendation


def config() -> Run:
    return Run(
        name="recommend_movielens",
        model=GPT(
            vocab_size=4096,
            context=512,
            layers=4,
            width=192,
            heads=6,
            position="rope",
            norm="rmsnorm",
            bias=False,
            dropout=0.1,
        ),
        data=Recommendation(
            train=("data/ml/train.jsonl",),
            validation=("data/ml/validation.jsonl",),
            test=("data/ml/test.jsonl",),
            tokenizer="tokenizers/ml",
            metrics=("ndcg@10", "recall@10", "mrr"),
            most=10,
        ),
        optim=Optim(peak_lr=1e-3, final_lr=1e-5, warmup_steps=100, weight_decay=0.1),
        train=Train(
            steps=3000,
            batch_size=32,
            eval_every=250,
            save_every=500,
            eval_examples=1000,
            best_by="recommendation:ndcg@10",
        ),
        compute=Compute(dtype="float32"),
    )
