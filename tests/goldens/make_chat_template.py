"""Goldens of chat templates: ids and assistant masks of Hugging Face transformers.

    pip install "transformers==5.24.0" "tokenizers==0.23.3" "jinja2==3.1.6" sentencepiece protobuf torch
    python tests/goldens/make_chat_template.py

Writes chat_template.json beside this script: for the tiny tokenizers, templates and dialogues of
tests/tiny_hf.py the ids with and without the prompt for an answer, the mask of a template with
`{% generation %}`, and ids and decoded text of some strings. tests/text/test_chat_template.py and
tests/text/test_hf_tokenizer.py compare.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import tokenizers
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_hf import DIALOGUES, TOKENIZERS, wordpiece

PINNED = {"transformers": (transformers, "5.24.0"), "tokenizers": (tokenizers, "0.23.3")}
TEXTS = [
    "hello world, the cat sat!",
    "好 😀é",
    "the\n\n  end",
    "",
    "sat<think>the</think>",
    "x </s> y <|im_end|>",
]


def main() -> None:
    for name, (module, version) in PINNED.items():
        if module.__version__ != version:
            raise SystemExit(f"needs {name} {version}, not {module.__version__}")
    goldens = {name: golden(load(files, name)) for name, files in TOKENIZERS.items()}
    bert = load(wordpiece(), "bert")
    goldens["wordpiece"] = {"texts": strings(bert)}
    path = Path(__file__).with_name("chat_template.json")
    path.write_text(json.dumps(goldens, ensure_ascii=True) + "\n")
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def load(files: dict[str, bytes], name: str) -> transformers.PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        for file, data in files.items():
            (Path(folder) / file).write_bytes(data)
        if name == "bert":
            return transformers.BertTokenizer.from_pretrained(folder)
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def strings(tokenizer: transformers.PreTrainedTokenizerBase) -> list[dict]:
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        obeyed = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append({"text": text, "ids": ids, "obeyed": obeyed, "decoded": decoded})
    return rows


def golden(tokenizer: transformers.PreTrainedTokenizerBase) -> dict:
    rows = []
    for messages in DIALOGUES:
        try:
            whole = tokenizer.apply_chat_template(
                messages,
                return_dict=True,
                return_assistant_tokens_mask="endgeneration" in tokenizer.chat_template,
            )
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # the template refuses it
            rows.append({"error": str(error)})
            continue
        rows.append(
            {"ids": whole["input_ids"], "prompt": prompt["input_ids"], "mask": whole.get("assistant_masks")}
        )
    return {"dialogues": rows, "texts": strings(tokenizer)}


if __name__ == "__main__":
    main()
