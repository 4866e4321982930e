"""The Python interface: a trained run or a Hugging Face folder as one object (docs/python.md).

    model = jaxgpt.load("runs/quickstart_tune")
    print(model.chat("What is a tuple?").text)

Shapes: N texts, T tokens of a text, D hidden size, V vocabulary, L layers, H heads.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import numpy as np

from jaxgpt import runtime
from jaxgpt.checkpoint.whole import find_base, params_digest
from jaxgpt.config import ONE_DEVICE, Classifier, Decoding, Headed, Mesh, Run, code
from jaxgpt.config import load as load_config
from jaxgpt.config.decoding import Weights, draws
from jaxgpt.convert.load import load_model
from jaxgpt.errors import NotFinite, nearest, require, require_known
from jaxgpt.evals.during import task_scores
from jaxgpt.evals.features import Wanted, observe
from jaxgpt.evals.predict import Label, Span, predict
from jaxgpt.evals.scoring import Scorer
from jaxgpt.files import read_json
from jaxgpt.models import parameter_counts
from jaxgpt.report import points, read_metrics
from jaxgpt.sample.adapters import Names
from jaxgpt.sample.encode import Pooling, reading_ids
from jaxgpt.sample.generate import Completion, Generator, Token
from jaxgpt.sample.judge import Judge
from jaxgpt.sample.load import Trained, load_trained
from jaxgpt.sample.settings import CHAT_DEFAULT, SAMPLE_DEFAULT, Asked, Sampling
from jaxgpt.streams import quiet_libraries
from jaxgpt.text.chat import Dialogue, prompt_ids
from jaxgpt.train.loop import train

log = logging.getLogger(__name__)

Text = str | Sequence[int]
"""A text, or its token ids."""
MOST_TOKENS = 2048
"""Of a text whose attention maps of all layers are returned."""
DType = Literal["float32", "bfloat16"]


class Settings(TypedDict, total=False):
    """How tokens are chosen; what is left out is as the model's generation_config.json says, else as
    `jaxgpt sample` and `chat` do (see `jaxgpt.sample.settings.Asked`).
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    no_repeat_ngram: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...]


def load(
    folder: str | Path,
    *,
    checkpoint: str | int = "best",
    dtype: DType | None = None,
    cache: Literal["float", "int8"] | None = None,
    weights: Weights = "own",
    mesh: Mesh = ONE_DEVICE,
    verify: bool = True,
    trust_code: bool = False,
) -> Model:
    """A trained run, or a model in a Hugging Face folder, ready to use.

    Args:
      folder: of a run, or one with config.json, safetensors files and a tokenizer; it is not written to.
      checkpoint: of a run: `best` on validation data, `newest`, or a step number.
      dtype: of matrix products and activations; None means as the run was trained.
      cache: how keys and values are held while text is written, `int8` in 8 bits; None means as the run says.
      weights: what `generate` and `chat` read; see `Generator`.
      mesh: devices to spread the model over.
      verify: compare the checkpoint's checksums, and refuse parameters that are not finite.
      trust_code: run Python code that a run brings with it, though it was never run here before.

    Raises:
      UserError: there is no such folder, it is none of a model, or it does not fit this machine.
    """
    _set_up()
    with code.trusting(trust_code):
        kept = {name: value for name, value in (("dtype", dtype), ("cache", cache)) if value is not None}
        return Model(_load(Path(folder), checkpoint, kept, mesh, verify), weights)


def _load(path: Path, checkpoint: str | int, kept: dict[str, Any], mesh: Mesh, verify: bool) -> Trained:
    require(path.is_dir(), f"{str(path)!r} is no folder; give that of a run or of a Hugging Face model.")
    if _is_hugging_face(path):
        require(
            checkpoint == "best",
            f"checkpoint is {checkpoint!r} but {path} is a Hugging Face model, which has one; drop it.",
        )
        trained = load_model(path, mesh)
    else:
        trained = load_trained(path, which=str(checkpoint), mesh=mesh, verify=verify)
    if kept:
        compute = dataclasses.replace(trained.run.compute, **kept)
        trained = trained._replace(run=dataclasses.replace(trained.run, compute=compute))
    return trained


def fit(config: Run | str | Path, *, progress: bool = True, verify: bool = True) -> Model:
    """Train a config, or go on with its run where it stopped, and load the best checkpoint.

    Args:
      config: a `Run`, a config file, a run's config.json or a run's folder.
      progress: show a progress line.
      verify: compare the checksums of what is loaded.

    Raises:
      UserError: config, data, mesh, memory or folder do not fit each other.
      jaxgpt.train.loop.Diverged: the numbers did not stay finite.
      KeyboardInterrupt: training was stopped; what it did is saved, and the same call goes on.
    """
    _set_up()
    run, source = (config, None) if isinstance(config, Run) else (load_config(config), Path(config))
    result = train(run, progress=progress, verify=verify, source=source, scores=task_scores)
    if result.reason not in ("finished", "patience"):
        raise KeyboardInterrupt(f"{run.folder}: {result.reason} at step {result.step}, saved")
    return load(run.folder, mesh=_own_devices(run), verify=verify)


def _own_devices(run: Run) -> Mesh:
    """One device, or in a cluster the mesh of training, which every process is part of."""
    return run.mesh if jax.process_count() > 1 else ONE_DEVICE


@functools.cache  # once per process
def _set_up() -> None:
    quiet_libraries()
    runtime.set_up()


def _is_hugging_face(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        return False
    return "run" not in (held := read_json(path, dict[str, Any], "restore it")) and "model_type" in held


class Model:
    """A trained model: what it writes, what it thinks of texts, and what it computes inside.

    Texts may also be given as token ids. Text begins as it did in training (`encode` shows how).

    Attributes:
      config: the `Run` it was trained with; `config.model` is the architecture.
      params: float32 parameters as nested dicts, those of equal layers stacked along a first axis; weights in
        few bits are `layers.quantized.Quantized`.
      tokenizer: reads and writes text.
      folder, step: where it is from.
    """

    def __init__(self, trained: Trained, weights: Weights = "own") -> None:
        self._trained, self._weights = trained, weights
        self.config, self.params, self.tokenizer = trained.run, trained.params, trained.tokenizer
        self.folder, self.step = trained.folder, trained.step

    def __repr__(self) -> str:
        model, count = self.config.model, parameter_counts(self.config.model)["total"]
        kind = type(model).__name__
        if isinstance(model, Classifier):
            kind += f" of {len(model.labels)} labels"
        if isinstance(model, Headed):
            kind += f" on {type(model.backbone).__name__}"
        about = f"{kind}, {count:,} parameters, context {model.context:,}"
        return f"<jaxgpt.Model {str(self.folder)!r}: {about}, step {self.step:,}>"

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a number that training logged, such as `loss`, `val_loss` or `learning_rate`.

        Raises:
          UserError: it was never logged.
        """
        records = read_metrics(self.folder / "metrics.jsonl")
        found = [(int(step), value) for step, value in points(records, name)]
        known = {key for record in records for key in record} - {"step", "event"}
        require(bool(found), f"{self.folder} has no curve {name!r}{nearest(name, known)}")
        return found

    # ------------------------------------------------------------------------------------- writing

    @cached_property
    def generator(self) -> Generator:
        """What generates; made when it is first used, as it holds the parameters in another form."""
        self._require_text("generate")
        t = self._trained
        how: Any = {"mesh": t.mesh, "bos": t.bos, "weights": self._weights}
        return Generator(t.run.model, t.run.compute, t.params, t.tokenizer, **how)

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load a LoRA run that was tuned from this model, for `generate(..., adapter=name)`.

        Any number of prompts in one call may each have an adapter of their own.

        Raises:
          UserError: it was tuned from another model, or is no LoRA.
        """
        _, base = find_base(Path(folder))
        require(
            base["digest"] == params_digest(self.params),
            f"{folder} was tuned from {base['run']}, step {base['step']}, not from {self.folder}, step "
            f"{self.step}; load that run.",
        )
        self.generator.load_adapter(name, folder)

    @overload
    def generate(
        self, prompts: str, *, max_new_tokens: int = ..., seed: int = ..., stop: Sequence[str] = ...,
        adapter: Names = ..., decoding: Decoding | None = ..., **sampling: Unpack[Settings],
    ) -> Completion: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Sequence[Text], *, max_new_tokens: int = ..., seed: int = ...,
        stop: Sequence[str] = ..., adapter: Names = ..., decoding: Decoding | None = ...,
        **sampling: Unpack[Settings],
    ) -> list[Completion]: ...  # fmt: skip

    def generate(
        self,
        prompts: str | Sequence[Text],
        *,
        max_new_tokens: int = 256,
        seed: int = 0,
        stop: Sequence[str] = (),
        adapter: Names = None,
        decoding: Decoding | None = None,
        **sampling: Unpack[Settings],
    ) -> Completion | list[Completion]:
        """Go on with texts, in one compiled program. A dialogue is answered by `chat`.

        Args:
          prompts: a text, or a list of texts (or of token ids); repeat one for several completions.
          max_new_tokens: maximum number of tokens in a completion.
          seed: sample i has seed + i; the same seed gives the same text, in any company.
          stop: texts that end a completion and are not part of it.
          adapter: name of one from `load_adapter`, for all prompts or one each; None means this model alone.
          decoding: another way of decoding, as `jaxgpt.config.Beam(beams=4)`; None samples.
          **sampling: see `Settings`; `temperature=0` takes the likeliest token.

        Returns:
          A `Completion` (text, ids, logprobs, finish_reason, seed; where a `decoding` chooses among several
          also score and candidates), or a list of them.

        Raises:
          UserError: a model that writes no text, a bad setting, or a prompt that fills the context.
          NotFinite: the logits were not finite.
        """
        one = isinstance(prompts, str)
        asked = self._continued([prompts] if one else list(prompts)) | _choice(adapter)
        made = self._complete(
            asked, max_new_tokens, seed, stop, self._how(decoding, sampling, SAMPLE_DEFAULT)
        )
        return made[0] if one else made

    @overload
    def chat(
        self, messages: str | Dialogue, *, max_new_tokens: int = ..., seed: int = ...,
        stop: Sequence[str] = ..., adapter: Names = ..., decoding: Decoding | None = ...,
        **sampling: Unpack[Settings],
    ) -> Completion: ...  # fmt: skip
    @overload
    def chat(
        self, messages: Sequence[str | Dialogue], *, max_new_tokens: int = ..., seed: int = ...,
        stop: Sequence[str] = ..., adapter: Names = ..., decoding: Decoding | None = ...,
        **sampling: Unpack[Settings],
    ) -> list[Completion]: ...  # fmt: skip

    def chat(
        self,
        messages: str | Dialogue | Sequence[str | Dialogue],
        *,
        max_new_tokens: int = 512,
        seed: int = 0,
        stop: Sequence[str] = (),
        adapter: Names = None,
        decoding: Decoding | None = None,
        **sampling: Unpack[Settings],
    ) -> Completion | list[Completion]:
        """Answer a dialogue, or several.

        Args:
          messages: what a user says, or a list of `{"role": ..., "content": ...}`; or a list of such.
          max_new_tokens, seed, stop, adapter, decoding, **sampling: as in `generate`.
        """
        one = isinstance(messages, str) or bool(messages and isinstance(messages[0], Mapping))
        dialogues: Any = [messages] if one else messages
        asked = self._dialogues(dialogues) | _choice(adapter)
        made = self._complete(asked, max_new_tokens, seed, stop, self._how(decoding, sampling, CHAT_DEFAULT))
        return made[0] if one else made

    def stream(
        self,
        prompt: str | Dialogue,
        *,
        max_new_tokens: int = 512,
        seed: int = 0,
        stop: Sequence[str] = (),
        **sampling: Unpack[Settings],
    ) -> Iterator[Token]:
        """As `generate` of a text, or `chat` of a list of messages, token by token as they are made.

            for token in model.stream([{"role": "user", "content": "Hi"}]):
                print(token.text, end="", flush=True)

        Args:
          prompt: a text to go on with, or messages to answer.
          max_new_tokens, seed, stop, **sampling: as in `generate`.
        """
        text = isinstance(prompt, str)
        asked = self._continued([prompt]) if text else self._dialogues([prompt])
        how = self._how(None, sampling, SAMPLE_DEFAULT if text else CHAT_DEFAULT)
        strings = [stop] if isinstance(stop, str) else list(stop)
        call = asked | {"max_new_tokens": max_new_tokens, "seeds": [seed], "stop_strings": strings}
        for token in self.generator.stream(decoding=how, **call):
            if token.finish_reason == "error":
                raise NotFinite("the completion ended early, where logits were")
            yield token

    def _complete(
        self, asked: dict[str, Any], most: int, seed: int, stop: Sequence[str], how: Decoding
    ) -> list[Completion]:
        strings = [stop] if isinstance(stop, str) else list(stop)
        made: list[Completion] = []
        count, size, each = len(asked["prompts"]), max(1, 64 // how.rows), draws(how)
        require(
            0 <= seed <= 2**32 - max(count, 1) * each,
            f"seed is {seed}; it must be between 0 and 2**32 - 1.",
        )
        for start in range(0, count, size):
            part = {k: v[start : start + size] if isinstance(v, list) else v for k, v in asked.items()}
            seeds = [seed + i * each for i in range(start, start + len(part["prompts"]))]
            call: dict[str, Any] = part | {
                "max_new_tokens": most,
                "seeds": seeds,
                "stop_strings": strings,
            }
            made += self.generator.generate(decoding=how, **call)
        failed = sum(completion.finish_reason == "error" for completion in made)
        if failed:
            raise NotFinite(f"{failed} of {count} completions ended early, where logits were")
        return made

    def _continued(self, texts: Sequence[Text]) -> dict[str, Any]:
        generator = self.generator
        prompts = [
            generator.texts([text])["prompts"][0] if isinstance(text, str) else [*map(int, text)]
            for text in texts
        ]
        return {"prompts": prompts}

    def _dialogues(self, dialogues: Sequence[str | Dialogue]) -> dict[str, Any]:
        if not self.config.templated:
            log.warning("%s was not tuned on dialogues, so its answers may make no sense", self.folder)
        return self.generator.dialogues(
            [[{"role": "user", "content": d}] if isinstance(d, str) else list(d) for d in dialogues]
        )

    def _how(self, decoding: Decoding | None, sampling: Mapping[str, Any], default: Sampling) -> Decoding:
        """How a call decodes: as its `decoding` says, else by sampling, as its other arguments say."""
        known = [field.name for field in dataclasses.fields(Asked)]
        for name in sampling:
            require_known(name, known, f"generating has no setting {name!r}")
        if decoding is None:
            return Asked(**sampling).settle(self.tokenizer.sampling, default)
        require(
            not sampling,
            f"{next(iter(sampling), '')} is given beside decoding; put it into the decoding, or drop one.",
        )
        return decoding

    # ------------------------------------------------------------------------------------- scoring

    @cached_property
    def scorer(self) -> Scorer:
        """What gives texts a probability."""
        self._require_text("score")
        return Scorer.of(self._trained)

    def score(
        self, contexts: Sequence[Text | Dialogue], continuations: Sequence[Text]
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding would write it) of each continuation.

        Args:
          contexts: what is given: texts (may be empty), token ids, or dialogues up to a user's turn.
          continuations: what is scored, as many as contexts; of a dialogue, the beginning of the answer.
        """
        for name, value in (("contexts", contexts), ("continuations", continuations)):
            require(not isinstance(value, str), f"{name} is a text; give a list of texts.")
        require(
            len(contexts) == len(continuations),
            f"there are {len(contexts)} contexts and {len(continuations)} continuations; give one for each.",
        )
        pairs = [self._pair(*pair) for pair in zip(contexts, continuations, strict=True)]
        return [(s.logprob, s.greedy) for s in self.scorer.token_logprobs(pairs)]

    def _pair(self, context: Any, continuation: Text) -> tuple[list[int], list[int]]:
        if isinstance(context, str) and isinstance(continuation, str):
            return self.scorer.pair(context, continuation)
        if isinstance(context, str):
            context = self.encode(context) or [self.scorer.before]
        elif context and isinstance(context[0], Mapping):
            context = prompt_ids(context, self.tokenizer)
        more = self.tokenizer.encode(continuation) if isinstance(continuation, str) else continuation
        return [*map(int, context)], [*map(int, more)]

    # ------------------------------------------------------------------------------------- labelling

    def predict(self, texts: Sequence[Any]) -> list[list[Span]] | list[Label]:
        """Labels of texts by a tagger or a classifier, as `jaxgpt predict` and `eval` find them.

        Args:
          texts: texts; of a tagger also lists of words, of a classifier of pairs also pairs of texts.

        Returns:
          Of a tagger, the spans of each text (`start`, `end`, `label`, `score`, `text`: characters start to
          end). Of a classifier, a `Label` each (`label`, `score`, `scores` of all labels).

        Raises:
          UserError: a model without labels, or a text that it cannot read.
        """
        require(not isinstance(texts, str), "texts is a text; give a list of texts.")
        return predict(self._trained, texts)

    @cached_property
    def judge(self) -> Judge:
        """What gives dialogues a reward."""
        return Judge(self._trained)

    def rewards(self, dialogues: Sequence[Dialogue]) -> np.ndarray:
        """How good the last answer of each dialogue is [N], by a reward model: float32, of any scale.

        Args:
          dialogues: lists of `{"role": ..., "content": ...}` that end with an assistant's turn.

        Raises:
          UserError: the model is no reward model, or a dialogue is longer than its context.
        """
        return self.judge(dialogues)

    # ------------------------------------------------------------------------------- what is inside

    def encode(self, text: str) -> list[int]:
        """The token ids [T] that the model reads for a text, with those that begin (and end) it."""
        return reading_ids(self._trained, text)

    def tokens(self, text: Text) -> list[str]:
        """What each of these T ids stands for, to label the axes of a picture."""
        names, ids = self.tokenizer.names, self._ids(text)
        return [names.get(i) or self.tokenizer.piece_bytes(i).decode(errors="replace") for i in ids]

    def logits(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """Float32 logits [T, V] of each text: row t is of the token after token t.

        Of a masked language model, row t is of token t itself.
        """
        self._refuse_labels("logits", "predict")
        return [found["logits"] for found in self._observe(texts, Wanted(logits=True))]

    def hidden(
        self, texts: Sequence[Text], layers: Sequence[int] | None = None
    ) -> dict[int, list[np.ndarray]]:
        """Hidden states {number: [T, D] of each text}, float32.

        Number 0 is the embedding, i the output of layer i; the last is after the final norm, as the head
        reads it (the convention of transformers' `hidden_states`).

        Args:
          texts: the texts.
          layers: numbers, negative ones from the end; None means all.
        """
        numbers = self._numbers(layers, self.config.model.layers + 1)
        found = self._observe(texts, Wanted(states=numbers))
        return {i: [one["hidden"][i] for one in found] for i in numbers}

    def attention(self, texts: Sequence[Text], layers: Sequence[int] | None = None) -> list[np.ndarray]:
        """Attention probabilities [L, H, T, T] of each text: entry [l, h, t, s] is what token t takes from s.

        Args:
          texts: the texts.
          layers: layers from 0 in the order wanted, negative ones from the end; None means all, of texts of
            at most 2,048 tokens.
        """
        rows = self._rows(texts)
        if layers is None:
            longest = max(map(len, rows), default=0)
            require(
                longest <= MOST_TOKENS,
                f"a text has {longest} tokens; above {MOST_TOKENS} name some layers, such as layers=[0, -1].",
            )
        found = self._observe(rows, Wanted(maps=self._numbers(layers, self.config.model.layers)))
        return [one["attention"] for one in found]

    def embed(self, texts: Sequence[Text], pooling: Pooling = "mean") -> np.ndarray:
        """One vector for each text [N, D], float32, made of the last hidden states.

        Args:
          texts: the texts.
          pooling: `mean` over the tokens, or the `first` or `last` token's.
        """
        require_known(pooling, ("mean", "first", "last"), f"pooling is {pooling!r}")
        found = self._observe(texts, Wanted(pooling=pooling))
        vectors = [one["embedding"] for one in found]
        return np.stack(vectors) if vectors else np.zeros((0, self.config.model.width), np.float32)

    def _observe(self, texts: Sequence[Text], wanted: Wanted) -> list[dict[str, Any]]:
        return observe(self._trained, self._rows(texts), wanted)

    def _rows(self, texts: Sequence[Text]) -> list[list[int]]:
        require(not isinstance(texts, str), "texts is a text; give a list of texts.")
        rows, vocab = [self._ids(text) for text in texts], self.config.model.vocab_size
        for i, row in enumerate(rows):
            bad = [token for token in row if not 0 <= token < vocab]
            require(not bad, f"text {i} holds the id {bad[:1]}; the model's are 0 to {vocab - 1}.")
        return rows

    def _ids(self, text: Text) -> list[int]:
        return self.encode(text) if isinstance(text, str) else [*map(int, text)]

    def _numbers(self, wanted: Sequence[int] | None, count: int) -> tuple[int, ...]:
        if wanted is None:
            return tuple(range(count))
        for number in wanted:
            allowed = f"it must be between {-count} and {count - 1}"
            require(-count <= number < count, f"layers holds {number}; {allowed}.")
        return tuple(number % count for number in wanted)

    def _refuse_labels(self, what: str, instead: str) -> None:
        headed = self.config.headed
        require(
            headed is None,
            f"{self.folder} holds a {type(headed).__name__}, which has no {what} of tokens; use "
            f"{instead if self.config.task else 'rewards'}().",
        )

    def _require_text(self, what: str) -> None:
        model = self.config.model
        self._refuse_labels(f"way to {what}", "predict")
        require(
            model.causal,
            f"{self.folder} holds a {type(model).__name__}, which sees both sides and cannot {what}; use "
            "logits(), hidden() or embed().",
        )


def _choice(adapter: Names) -> dict[str, Any]:
    """What `Generator.generate` is told of adapters; a list is of the prompts."""
    if adapter is None:
        return {}
    return {"adapters": adapter if isinstance(adapter, str) else list(adapter)}
