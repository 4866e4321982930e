"""What users look for by the names of other projects, and what it is called here: one sentence each.

The one place for them: unknown commands, flags and config fields are looked up here. In a sentence, fields
of a config stand as `part.field` and commands as `jaxgpt COMMAND`; a test checks that they exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxgpt.errors import nearest, same_name

_ANSWERS = {
    # -------------------------------------------------------------------------------- commands
    "server api_server openai deploy endpoint": (
        "a server is planned; until then use `jaxgpt chat RUN`, `jaxgpt sample RUN --json`, or "
        "`jaxgpt.load(RUN).stream(...)` in Python"
    ),
    "lora qlora dora peft adapter adapters ia3 prefix_tuning prompt_tuning use_peft use_lora lora_r "
    "lora_rank "
    "lora_alpha lora_dropout lora_target_modules target_modules peft_config lora_config": (
        "parameter-efficient tuning is `tune` of a config with init_from: tune=LoRA(rank=8), DoRA, "
        "PromptTuning, "
        "PrefixTuning, BottleneckAdapters, IA3, BitFit or LastLayers (docs/tuning.md)"
    ),
    "finetune fine_tune fine_tuning finetuning sft tune tuning instruct": (
        "`jaxgpt train` tunes too: give it a config with Chat data and init_from (configs/instruct_alpaca.py)"
    ),
    "dpo ipo simpo orpo kto rlhf preference preferences preference_tuning pref_loss": (
        "`jaxgpt train` learns from preferences: from Pairs data with objective=DPO(), IPO(), SimPO() or "
        "ORPO(), from "
        "Rated data with KTO() (configs/dpo.py)"
    ),
    "reward reward_model reward_modeling rm bradley_terry": (
        "`jaxgpt train` trains a reward model, model=RewardModel() with objective=BradleyTerry() on Pairs "
        "data "
        "(configs/reward_model.py)"
    ),
    "best_of_n rejection_sampling": (
        "`jaxgpt sample RUN --best-of N` shows the likeliest completion, with `--reward REWARD_RUN` the one "
        "of the "
        "highest reward"
    ),
    "grpo dr_grpo dapo rlvr rl ppo reinforce rloo reward_fn reward_func reward_funcs reward_function": (
        "`jaxgpt train` learns from rewards, functions of yours or a reward model, with Prompts data and "
        "objective=GRPO(rewards=(...)) (docs/rewards.md)"
    ),
    "distill distillation teacher": (
        "a run learns from another one with objective=Distillation(teacher=...) (configs/distill.py)"
    ),
    "pretrain fit run resume_training": "`jaxgpt train CONFIG` trains, or resumes",
    "generate generation complete completion infer inference prompt_model": (
        "`jaxgpt sample RUN --prompt TEXT` completes a text, `jaxgpt chat RUN` answers, and `jaxgpt predict "
        "RUN FILE` labels"
    ),
    "captum saliency shap lime interpret interpretability integrated_gradients attribution attributions "
    "logit_lens "
    "attention_rollout visualize influence tracin why": (
        "`jaxgpt explain RUN --prompt TEXT` explains a prediction: attributions, attention, logit lens, "
        "training examples"
    ),
    "rag retrieval retrieve retriever bm25 documents_dir knowledge_base vector_store faiss": (
        "`jaxgpt sample RUN --documents FOLDER` puts passages before a prompt, and so does the field `knowledge` of a task "
        "(docs/knowledge.md)"
    ),
    "grammar constrained constrain guided guided_json guided_regex response_format outlines structured structured_output": (
        "`jaxgpt sample RUN` keeps completions to --choices, --regex or --json-schema (docs/knowledge.md)"
    ),
    "talk ask interact repl": "`jaxgpt chat RUN` answers turn by turn",
    "classify tag ner tagger classifier": "`jaxgpt predict RUN FILE` labels texts with a trained tagger or classifier",
    "convert from_pretrained from_hf load_hf hf huggingface download from_huggingface": (
        "`jaxgpt import FOLDER RUN` makes a run of a Hugging Face folder"
    ),
    "save_pretrained to_hf push_to_hub to_huggingface convert_to_hf": (
        "`jaxgpt export RUN FOLDER` writes a Hugging Face folder"
    ),
    "merge_adapter merge_lora merge_and_unload fuse": "`jaxgpt merge RUN FOLDER` puts a tuned run and its base into one",
    "gguf llamacpp ollama": (
        "`jaxgpt export RUN FILE.gguf --format gguf` writes GGUF, and `jaxgpt import FILE.gguf RUN` reads it "
        "(docs/smaller.md)"
    ),
    "onnx stablehlo": (
        "`jaxgpt export RUN FOLDER --format stablehlo` writes programs that jax runs without this package "
        "(docs/smaller.md); other tools convert a Hugging Face folder"
    ),
    "test evaluate evaluation benchmark bench lm_eval validate perplexity ppl accuracy metrics": (
        "`jaxgpt eval RUN` measures: the run's own data (`--split test`), `--text FILE`, or `--tasks`"
    ),
    "prepare preprocess tokenize encode prepare_data": "`jaxgpt data prepare SOURCES --out DIR` turns text into token ids",
    "train_tokenizer sentencepiece bpe vocab_train": "`jaxgpt tokenizer train SOURCES --out DIR` learns a vocabulary",
    "show inspect preview view": "`jaxgpt data show CONFIG` prints what a config trains on",
    "summary flops params num_params parameters memory estimate dry_run dryrun model_info": (
        "`jaxgpt info CONFIG` prints parameters, FLOPs and memory"
    ),
    "search grid hparams hyperparameters hyperparameter_search ablate ablation optuna": (
        "`jaxgpt sweep CONFIG` trains the runs of a config's sweep()"
    ),
    "demo example tutorial start init new": "`jaxgpt quickstart` is the place to begin",
    "version": "`jaxgpt --version` prints it",
    "stop kill pause cancel interrupt terminate": (
        "Ctrl-C or SIGTERM stops a training with everything saved, and the same command goes on; a text that "
        "ends a completion is `--stop` of `jaxgpt sample`"
    ),
    "resume continue restart resume_from_checkpoint resume_from restore load_checkpoint auto_resume": (
        "the same `jaxgpt train` command goes on from the newest checkpoint by itself"
    ),
    "quantization quant int8 int4 load_in_8bit load_in_4bit bnb bitsandbytes awq gptq smoothquant fp8 nf4 qat": (
        "`jaxgpt quantize RUN OUT` holds a run's matrices in 8 or 4 bits; tune=LoRA(base='nf4') does so under "
        "an "
        "adapter, and tune=QuantizationAware() trains through the rounding"
    ),
    # -------------------------------------------------------------------------------- training
    "lr learning_rate max_lr base_lr peak_learning_rate": "the learning rate is `optim.peak_lr`",
    "min_lr end_lr lr_min final_learning_rate min_lr_ratio": "the learning rate at the end is `optim.final_lr`",
    "scheduler lr_scheduler lr_scheduler_type lr_schedule lr_decay_style decay_lr": (
        "the learning-rate schedule is `optim.schedule`"
    ),
    "lr_decay_iters lr_decay_steps": "the learning rate decays until `train.steps`; its form is `optim.schedule`",
    "warmup warmup_iters num_warmup_steps warmup_ratio lr_warmup_steps": "the warm-up is `optim.warmup_steps`",
    "beta1 adam_beta1": "AdamW's first decay rate is `optim.b1`",
    "beta2 adam_beta2": "AdamW's second decay rate is `optim.b2`",
    "adam_eps adam_epsilon epsilon": "AdamW's epsilon is `optim.eps`",
    "wd decay weightdecay": "weight decay is `optim.weight_decay`",
    "optimizer optimiser opt optim_type adam sgd": "the optimizer is `optim.name`",
    "grad_clip max_grad_norm clip_grad gradient_clipping gradient_clip_val clip clip_grad_norm": (
        "gradient clipping is `optim.clip_norm`"
    ),
    "max_iters max_steps num_steps n_steps iters iterations num_iterations train_steps total_steps num_train_steps": (
        "the number of steps is `train.steps`"
    ),
    "epoch epochs num_epochs n_epochs max_epochs num_train_epochs": "`train.epochs` is the number of passes over the data, in place of `train.steps`",
    "bs bsz micro_batch_size per_device_batch_size per_device_train_batch_size global_batch_size train_batch_size": (
        "`train.batch_size` counts the rows of a step over all devices and microbatches (`train.accumulate`)"
    ),
    "gradient_accumulation_steps grad_accum gradient_accumulation accumulate_grad_batches grad_acc_steps": (
        "gradient accumulation is `train.accumulate`, the number of microbatches per step"
    ),
    "eval_interval eval_steps evaluation_strategy eval_strategy eval_freq val_every val_check_interval": (
        "the steps between evaluations are `train.eval_every`"
    ),
    "eval_iters max_eval_batches": "the batches of an evaluation are `train.eval_batches`",
    "save_steps save_interval save_strategy checkpoint_every ckpt_interval checkpoint_interval": (
        "the steps between checkpoints are `train.save_every`"
    ),
    "save_total_limit keep_checkpoints max_to_keep": "the number of checkpoints kept is `train.keep`",
    "log_interval logging_steps log_freq": "the steps between log lines are `train.log_every`",
    "early_stopping early_stopping_patience early_stop": "early stopping is `train.patience`",
    "random_seed manual_seed": "the seed is `train.seed`",
    "load_best_model_at_end metric_for_best_model": (
        "the best checkpoint is kept (`train.best_by`) and used by every command"
    ),
    "output_dir out_dir save_dir run_name experiment exp_name log_dir logdir checkpoint_dir": (
        "a run's folder is the folder runs joined with its name: `--runs FOLDER --name NAME`"
    ),
    "model_name_or_path pretrained_model_name_or_path pretrained base_model model_path model_name init_checkpoint ckpt": (
        "`jaxgpt import FOLDER RUN` makes a run of a Hugging Face folder, and `--init-from RUN` starts from "
        "a run"
    ),
    "wandb report_to log_with wandb_project wandb_log use_wandb tensorboard tracker mlflow comet": (
        "`--train.track wandb tensorboard` chooses trackers (extra track); RUN/metrics.jsonl and "
        "RUN/report.html have "
        "the numbers too"
    ),
    "pref_beta dpo_beta": "how far preferences may move a model is `objective.beta`",
    "rpo_alpha pref_ftx sft_weight": "the weight of the chosen side's likelihood is `objective.nll_weight`",
    "desirable_weight kto_chosen_weight": "the weight of good completions is `objective.good_weight`",
    "undesirable_weight kto_rejected_weight": "the weight of bad completions is `objective.bad_weight`",
    "ref_model reference_model ref_model_name_or_path precompute_ref_log_probs": (
        "the reference of preferences is the run that init_from names; its log-probabilities are computed "
        "once and kept"
    ),
    # ---------------------------------------------------------------------------------- the model
    "n_layer n_layers num_layers num_hidden_layers depth": "the number of layers is `model.layers`",
    "n_head n_heads num_heads num_attention_heads": "the number of attention heads is `model.heads`",
    "n_kv_head n_kv_heads num_kv_heads num_key_value_heads": "the number of key-value heads is `model.kv_heads`",
    "n_embd n_embed d_model hidden_size hidden_dim dim embed_dim emb_dim model_dim embedding_size": (
        "the hidden size is `model.width`"
    ),
    "head_dim d_head head_size": "the head size is `model.head_width`",
    "intermediate_size d_ff n_inner ffn_dim ff_dim ffn_hidden_size mlp_dim": "the MLP's hidden size is `model.mlp_width`",
    "block_size n_ctx n_positions max_position_embeddings context_length context_size seq_len seq_length "
    "sequence_length max_seq_len max_seq_length": (
        "the context is `model.context`, and the rows' length `data.length`"
    ),
    "vocab n_vocab vocabulary": "the vocabulary size is `model.vocab_size`",
    "tie_weights tie_word_embeddings weight_tying tied_embeddings": "tied embeddings are `model.tied`",
    "activation act act_fn hidden_act activation_function": "the MLP's activation is `model.mlp`",
    "attn_pdrop resid_pdrop embd_pdrop hidden_dropout_prob attention_dropout dropout_rate": (
        "the dropout rate is `model.dropout`"
    ),
    "sliding_window window window_size": "sliding windows are `model.windows`",
    "num_experts n_experts num_local_experts": "experts are `model.moe`, such as model=GPT(moe=MoE(experts=8)) in the config",
    "rms_norm_eps layer_norm_eps layer_norm_epsilon": "the norms' epsilon is `model.norm_eps`",
    # --------------------------------------------------------------------------- devices and types
    "dtype torch_dtype precision mixed_precision amp fp16 bf16 float16 bfloat16 fp32 half": (
        "the type of products is `compute.dtype`, bfloat16, float32 or auto (float16 is not here, nor loss scaling)"
    ),
    "device devices cuda no_cuda use_cpu cpu gpu gpus tpu n_gpu num_gpus platform": (
        "JAX finds the devices by itself (JAX_PLATFORMS=cpu in the environment keeps to the CPU), and "
        "`mesh.data`, `mesh.fsdp` and `mesh.tensor` share them out"
    ),
    "distributed torchrun accelerate deepspeed fsdp ddp zero launch nproc_per_node nnodes world_size slurm "
    "multi_gpu "
    "tensor_parallel tp pp dp": (
        "`mesh.data`, `mesh.fsdp` and `mesh.tensor` share out the devices; on several hosts start the same "
        "command once per host (launch/)"
    ),
    "compile torch_compile jit": "every program is compiled; there is nothing to turn on",
    "flash flash_attention flash_attn use_flash_attention attn_implementation sdpa": (
        "the attention kernel is `compute.attention`, by default the fastest that runs here"
    ),
    "gradient_checkpointing activation_checkpointing recompute checkpoint_activations": (
        "recomputing activations is `compute.remat`"
    ),
    # ----------------------------------------------------------------------------------- the data
    "dataset datasets dataset_name data_path data_dir train_file train_files train_data train_dataset corpus": (
        "text is `data.path` (a folder that `jaxgpt data prepare` made), and files of dialogues or labels "
        "are named by train in Chat, Tagged or Labelled data"
    ),
    "num_workers dataloader_num_workers num_proc": "processes that read ahead are `data.workers`",
    "packing pack group_texts": "rows are always packed, and documents do not see each other",
    "completion_only_loss assistant_only_loss train_on_inputs mask_prompt mask_inputs": (
        "of Chat data the answers alone are trained; `jaxgpt data show CONFIG` shows it"
    ),
    # ----------------------------------------------------------------------------------- sampling
    "max_tokens max_length num_tokens n_predict max_gen_len": (
        "the length of a completion is `--max-new-tokens` of `jaxgpt sample`, and that of rows `data.length`"
    ),
    "num_samples num_return_sequences n_samples": "the number of completions is `--n` of `jaxgpt sample`",
    "temp": "the temperature is `--temperature` of `jaxgpt sample`",
    "do_sample greedy": "greedy decoding is `--temperature 0` of `jaxgpt sample`",
    "num_beams beam beam_search beam_width beam_size": "`jaxgpt sample RUN --beams 4` searches with beams",
    "num_beam_groups diverse_beam_search group_beam_search diversity_penalty": (
        "`jaxgpt sample RUN --beams 6 --groups 3 --diversity 0.5` searches with diverse groups of beams"
    ),
    "no_repeat_ngram_size": "`--no-repeat-ngram N` of `jaxgpt sample`, no_repeat_ngram of Sampling and Beam",
    "penalty_alpha contrastive_search": "`jaxgpt sample RUN --contrastive 0.6 --top-k 4`",
    "minimum_bayes_risk mbr_decoding": "`jaxgpt sample RUN --mbr 16` shows the sample most like the others",
    "repeat_penalty": "repetition is discouraged by `--repetition-penalty` of `jaxgpt sample`",
    "frequency_penalty presence_penalty": (
        "what was made is made less likely by `--frequency-penalty` and `--presence-penalty` of `jaxgpt sample`"
    ),
    "logit_bias": "`jaxgpt sample RUN --logit-bias ID BIAS` adds to a token's logit",
    "stop_token stop_sequence stop_sequences stop_strings stop_words eos_token": (
        "a text that ends a completion is `--stop` of `jaxgpt sample`"
    ),
    "system_prompt system_message": "a system message is `--system` of `jaxgpt sample`",
    "input input_file prompts prompts_file": "a file of prompts is `--prompt-file` of `jaxgpt sample`",
}
ANSWERS = {name: answer for names, answer in _ANSWERS.items() for name in names.split()}
"""The answer to each name."""

_FIELD = re.compile(r"`((?:optim|train|model|data|objective|compute|mesh)\.[a-z0-9_.]+)`")
_BARE = {name.replace("_", ""): answer for name, answer in ANSWERS.items()}


def answer(name: str, flags: bool = False) -> str:
    """The sentence about a name of another project, without its full stop; empty where there is none.

    Args:
      name: a command, a field or a flag, with or without dashes; of `train.learning_rate` the last part
        counts.
      flags: write the fields of a config as flags of the command line.
    """
    bare = re.sub("[-_ ]", "", name).lower()
    found = _BARE.get(bare) or _BARE.get(bare.rpartition(".")[2], "")
    return _FIELD.sub(lambda field: f"`--{field[1].replace('_', '-')}`", found) if flags else found


def look_up(name: str, allowed: Iterable[str]) -> str:
    """A hint about an unknown command or field, to follow its name: the answer, or else the nearest name."""
    names = list(allowed)
    said = "" if any(same_name(name, other) for other in names) else answer(name)
    return f"; {said}." if said else nearest(name, names)
