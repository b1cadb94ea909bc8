"""Loading a run from its directory: its model, tokenizer and metrics."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from gptjax.config import ExperimentConfig, InputError
from gptjax.data.objectives.rows import objective_vocabulary
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.data.tokenizers.special import DecodingTokens
from gptjax.models.build import LanguageModel, abstract
from gptjax.runs.bucket import address, is_pushed
from gptjax.runs.directory import CONFIG, TOKENS, load_config, read_config
from gptjax.system.mirrors import copied
from gptjax.system.programs import keep_programs
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.checkpoint_files import CHECKPOINTS
from gptjax.training.trackers.jsonl import METRICS, read_jsonl


class DecodingInputs(NamedTuple):
    """An encoded text, as arguments of `generate` and `beam_search`."""

    prompt: Int[np.ndarray, " T"]
    """Tokens to continue."""
    source: Int[np.ndarray, " S"] | None
    """Source tokens of an encoder-decoder."""
    ends: tuple[int, ...]
    """End tokens."""


class Run(NamedTuple):
    """A loaded run."""

    config: ExperimentConfig
    model: LanguageModel
    tokenizer: Tokenizer
    step: int
    """The step of the model's checkpoint."""
    tokens: DecodingTokens
    """The begin and end tokens of decoding."""
    metrics: list[dict[str, Any]]
    """Scalars of the logged steps; empty for an imported model."""

    def decoding_inputs(self, text: str) -> DecodingInputs:
        """The text encoded as the prompt, or as the source of an encoder-decoder.

        Raises:
          InputError: an encoder-decoder that was imported without a begin or end token.
        """
        tokens = self.tokens
        if self.config.model.family != "encoder_decoder":
            return DecodingInputs(self.tokenizer.encode_prompt(text), None, tokens.ends)
        start = tokens.begin if tokens.start is None else tokens.start
        if start is None or not tokens.ends:
            missing = "eos_token_id" if tokens.ends == () else "decoder_start_token_id"
            raise InputError(
                f"The model was converted from a config.json without {missing}, so that it cannot "
                "translate: add it there, and convert it again."
            )
        (source,) = self.tokenizer.encode_documents([text])
        prompt, source = np.array([start]), np.append(source, tokens.ends[0])
        return DecodingInputs(prompt, source, tokens.ends)


def load_run(directory: str | Path, step: int | None = None) -> Run:
    """The model, tokenizer and metrics of a run, from its best checkpoint or the one of `step`.

    Raises:
      InputError: no run, no checkpoint, or one that does not fit its config.
    """
    with copied(Path(directory), is_pushed) as directory:
        config, model, step = load_model(directory, step)
        tokenizer = load_tokenizer(directory)
        tokens = decoding_tokens(directory, config, tokenizer)
        return Run(config, model, tokenizer, step, tokens, read_jsonl(directory / METRICS))


def decoding_tokens(
    directory: str | Path, config: ExperimentConfig, tokenizer: Tokenizer | None
) -> DecodingTokens:
    """The begin and end tokens of decoding in a run, as it was imported or trained.

    Raises:
      InputError: a `config.json` that holds something else there.
    """
    path = Path(directory) / CONFIG
    with copied(Path(directory), {CONFIG}.__contains__) as own:
        saved = read_config(own).get(TOKENS)
    if saved is not None:
        try:
            fields = DecodingTokens(**saved).fields()
        except TypeError as error:
            raise InputError(f"{path}: {TOKENS} is {saved!r}, not of a gptjax run.") from error
        tokens = DecodingTokens.of_fields([(str(path), fields)], config.model.vocab_size)
        # A decoder's config may have a start token too, which transformers ignores.
        return tokens if config.model.family == "encoder_decoder" else tokens._replace(start=None)
    if tokenizer is None or config.model.family == "encoder":
        return DecodingTokens(pad=tokenizer.special.get("pad") if tokenizer else None)
    begin, pad = tokenizer.special.get("begin"), tokenizer.special.get("pad")
    if config.model.family != "encoder_decoder" or config.data.objective == "causal":
        ends = () if tokenizer.end_token is None else (tokenizer.end_token,)
        return DecodingTokens(begin, ends, pad)
    words = objective_vocabulary(config.data, config.model, tokenizer)
    return DecodingTokens(begin, (words.needed("end"),), pad, words.needed("begin"))


def load_model(
    directory: str | Path, step: int | None = None
) -> tuple[ExperimentConfig, LanguageModel, int]:
    """The config, the model and the step of a run, which may lack a tokenizer.

    Raises:
      InputError: no run, no checkpoint, or one that does not fit its config.
    """
    with copied(Path(directory), is_pushed) as directory:
        config = load_config(directory)
        graphdef, shapes = abstract(config.model)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        keep_programs()
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
        )
        with _checkpoints(directory) as checkpoints:
            step = checkpoints.best_step if step is None else step
            params = checkpoints.restore_params(shapes, step)
            step = checkpoints.last_step if step is None else step
    assert step is not None
    return config, nnx.merge(graphdef, params), step


def checkpoint_steps(directory: str | Path) -> list[int]:
    """The steps of a run's checkpoints, in order.

    Raises:
      InputError: no run, or no checkpoint.
    """
    with copied(Path(directory), is_pushed) as directory:
        load_config(directory)
        with _checkpoints(directory) as checkpoints:
            return checkpoints.steps


@contextlib.contextmanager
def _checkpoints(directory: Path) -> Iterator[Checkpoints]:
    """The checkpoints of a run, to be read.

    Raises:
      InputError: there are none yet.
    """
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        if not (directory / CHECKPOINTS).is_dir():
            raise InputError(f"{address(directory)} holds no {CHECKPOINTS} yet.")
        yield checkpoints
