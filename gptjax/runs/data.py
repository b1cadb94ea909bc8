"""The data of a run: text, tokenizer, and rows of tokens in an order set by the seed alone."""

from pathlib import Path
from typing import NamedTuple

import grain
from jax.sharding import Mesh

from gptjax.config import ExperimentConfig, with_vocabulary
from gptjax.data.corpus import Corpus, Sources, learn_tokenizer, open_corpus, open_sources
from gptjax.data.pipeline import EvaluationBatches, Stage, training_batches
from gptjax.data.streaming import streamed_batches
from gptjax.data.tokenizers import Tokenizer
from gptjax.runs.directory import saved_tokenizer
from gptjax.training.prefetch import own_rows


class Data(NamedTuple):
    """The data of a run."""

    config: ExperimentConfig
    """The run's config, now with the size of the vocabulary."""
    sources: Sources
    tokenizer: Tokenizer
    corpus: Corpus
    """Rows of tokens, for training and for validation."""

    @property
    def size(self) -> str:
        """The size of the training set, in words."""
        rows = sum(map(len, self.corpus.train))
        if not rows:
            return "streamed text"
        return f"{self.corpus.train_tokens:,} tokens in {rows:,} rows"

    def batches(self, mesh: Mesh) -> tuple[grain.DatasetIterator, EvaluationBatches]:
        """Endless training batches and all validation batches, this process's rows of them."""
        config, corpus, hosts = self.config, self.corpus, own_rows(mesh)
        order = {"batch_size": config.train.batch_size, "seed": config.train.seed, **hosts}
        validation = EvaluationBatches(corpus.validation, config.train.batch_size, **hosts)
        data = config.data
        if not data.streaming:
            # A step's batch is the one before it, counted from 0.
            stages = [Stage(step - 1, weights) for step, weights in data.later_weights]
            batches = training_batches(corpus.train, data.weights, stages=stages, **order)
            return batches, validation
        length = config.model.context_length
        streamed = streamed_batches(
            self.sources, self.tokenizer, corpus.vocabulary, config.data, length, **order
        )
        return streamed, validation


def open_data(config: ExperimentConfig, out: Path, *, overwrite: bool = False) -> Data:
    """Open the text, learn or read the tokenizer, and cut the text into rows of tokens.

    A resumed run has its tokenizer in `out`, unless it is to be overwritten.

    Raises:
      InputError: text, a tokenizer or rows that `config.data` does not describe.
    """
    sources = open_sources(config.data)
    saved = None if overwrite else saved_tokenizer(out, config.data, sources.fingerprint)
    tokenizer = saved or learn_tokenizer(config.data, sources)
    corpus = open_corpus(sources, tokenizer, config.data, config.model)
    return Data(with_vocabulary(config, corpus.vocabulary.size), sources, tokenizer, corpus)
