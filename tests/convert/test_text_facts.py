"""An imported model writes and reads text as its files say; a tuned one is exported with its own ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_hf
from families import native_run, write_folder

from jaxgpt.config import Chat, Text, load
from jaxgpt.convert import commands, files, weights
from jaxgpt.convert.registry import read_config
from jaxgpt.evals.perplexity import read_texts
from jaxgpt.evals.scoring import Scorer
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.load import load_trained
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.tokenizer import StreamDecoder

BOS, EOS, BASE_END = 1, 2, 0
WORDS = tiny_hf.metaspace(tiny_hf.MISTRAL, generation_config={"eos_token_id": BASE_END, "top_p": 0.9})
SIZE = HFTokenizer(WORDS).vocab_size
LLAMA = {
    "model_type": "llama", "vocab_size": SIZE, "max_position_embeddings": 32, "num_hidden_layers": 1,
    "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24,
    "bos_token_id": BOS, "eos_token_id": BASE_END,
}  # fmt: skip


def imported(folder: Path, **tokenizer_config: object) -> Path:
    """A run of a Llama with random parameters and a tokenizer of its kind."""
    random, table = np.random.default_rng(0), weights.tensors(*read_config(LLAMA, "here"))
    tensors = {
        name: random.standard_normal(targets[0].their_shape).astype(ml_dtypes.bfloat16)
        for name, targets in table.items()
    }
    write_folder(folder / "hf", LLAMA, tensors)
    for name, data in WORDS.items():
        (folder / "hf" / name).write_bytes(data)
    config = json.loads(WORDS["tokenizer_config.json"]) | tokenizer_config
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    commands.import_(str(folder / "hf"), str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("with"), add_bos_token=True)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("without"), add_bos_token=False)


def test_a_text_begins_as_the_model_knows_it(with_bos: Path, without: Path, tmp_path: Path) -> None:
    ids = HFTokenizer(WORDS).encode("the cat sat")
    (tmp_path / "a.txt").write_text("the cat sat")
    for run, head, before in ((with_bos, [BOS], BOS), (without, [], EOS)):
        trained = load_trained(run)
        scorer = Scorer.of(trained)
        assert scorer.encode("the cat sat") == [*head, *ids]
        assert scorer.pair("the cat", " sat") == ([*head, *ids[:2]], ids[2:])
        assert scorer.pair("", "the cat sat") == ([before], ids)
        (document,) = read_texts([str(tmp_path / "a.txt")], trained.tokenizer, trained.bos)
        assert document.ids_N.tolist() == [before, *ids]
        assert Generator.load(run).texts(["the cat sat"])["prompts"] == [[*head, *ids]]
    # Text that jaxgpt prepared begins with it, whatever the tokenizer does by itself.
    assert trained._replace(step=5, run=trained.run.__class__(name="r", data=Text(path="x"))).bos
    assert not trained._replace(step=5).bos


def test_prompt_and_completion_are_the_whole_text(with_bos: Path) -> None:
    generator = Generator.load(with_bos)
    (prompt,) = generator.texts(["the cat"])["prompts"]
    for seed in range(8):
        (made,) = generator.generate([prompt], max_new_tokens=12, seeds=[seed], stop=())
        assert "the cat" + made.text == generator.tokenizer.decode([*prompt, *made.ids])
        tokens = generator.stream([prompt], max_new_tokens=12, seeds=[seed], stop=())
        assert "".join(token.text for token in tokens) == made.text
    space = generator.tokenizer.encode("the cat sat")[-1]
    assert StreamDecoder(generator.tokenizer, prompt).feed(space) == " sat"


def test_what_ends_a_text_is_all_that_the_files_say(with_bos: Path) -> None:
    assert Generator.load(with_bos).stop == (BASE_END, EOS)
    assert load_trained(with_bos).tokenizer.sampling == {"top_p": 0.9}


def test_a_tuned_run_is_exported_with_its_own_ends(with_bos: Path, tmp_path: Path) -> None:
    """The base model ends with <unk> alone by its files, the template with </s>."""
    native_run(
        tmp_path / "tuned", load(with_bos).model, init_from=str(with_bos), data=Chat(train=("x.jsonl",))
    )
    shutil.rmtree(tmp_path / "tuned" / "tokenizer")
    shutil.copytree(with_bos / "tokenizer", tmp_path / "tuned" / "tokenizer")
    commands.export(str(tmp_path / "tuned"), str(tmp_path / "out"))
    config, generation = (
        json.loads((tmp_path / "out" / name).read_text()) for name in (files.CONFIG, files.GENERATION)
    )
    assert config == LLAMA | {"eos_token_id": [BASE_END, EOS]}
    assert generation == {"eos_token_id": [BASE_END, EOS], "top_p": 0.9}
    again = HFTokenizer.from_folder(tmp_path / "out")
    assert again.stop_ids == (BASE_END, EOS)
    assert again.template is not None and again.template.source == tiny_hf.MISTRAL
    commands.export(str(with_bos), str(tmp_path / "same"))  # not tuned: as it came
    assert json.loads((tmp_path / "same" / files.CONFIG).read_text()) == LLAMA
