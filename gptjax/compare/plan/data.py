"""The data that all variants share: text, tokenizer, order of batches, held-out rows."""

import dataclasses
from typing import Any, NamedTuple

import grain

from gptjax.compare.question import Comparison
from gptjax.config import TransformerConfig
from gptjax.data.batch import Batch
from gptjax.data.corpus import Corpus, Sources, learn_tokenizer, open_corpus, open_sources
from gptjax.data.pipeline import EvaluationBatches, training_batches
from gptjax.data.streaming import streamed_batches
from gptjax.data.tokenizers import Tokenizer


class SharedData(NamedTuple):
    """Training batches and held-out rows, opened once for the whole comparison."""

    comparison: Comparison
    context_length: int
    sources: Sources
    tokenizer: Tokenizer
    corpus: Corpus
    validation: list[Batch]
    """All held-out rows; every evaluation uses all of them."""

    def batches(self, seed: int) -> grain.DatasetIterator:
        """Returns the training batches of a seed, the same for every variant."""
        data, size = self.comparison.data, self.comparison.batch_size
        if data.streaming:
            return streamed_batches(
                self.sources,
                self.tokenizer,
                self.corpus.vocabulary,
                data,
                self.context_length,
                batch_size=size,
                seed=seed,
            )
        return training_batches(self.corpus.train, data.weights, batch_size=size, seed=seed)

    @property
    def tokens_per_step(self) -> int:
        """Positions per batch; for pairs, those of the longest targets."""
        return self.comparison.batch_size * self.context_length

    @property
    def one_shape(self) -> bool:
        """Whether all batches have one shape, as an ensemble of runs in one program needs."""
        return len(self.corpus.train) <= 1

    @property
    def identity(self) -> dict[str, Any]:
        """Fingerprints of the data, on which a run's result depends beside its config."""
        return {
            "data_sha256": self.sources.fingerprint,
            "tokenizer_sha256": self.tokenizer.fingerprint,
        }

    @property
    def description(self) -> str:
        """One line for the report."""
        data = self.comparison.data
        held_out = sum(int((batch.loss_weights > 0).sum()) for batch in self.validation)
        trained = f"{self.corpus.train_tokens:,} tokens" if self.corpus.train else "text as read"
        return (
            f"{', '.join(data.source)} ({data.tokenizer}, {self.corpus.vocabulary.size} tokens in "
            f"the vocabulary, {data.objective}): trained on {trained}, each evaluation on "
            f"{held_out:,}"
        )


def open_shared_data(comparison: Comparison, model: TransformerConfig) -> SharedData:
    """Open the data for models of this family and context length.

    Raises:
      InputError: what `open_sources`, `learn_tokenizer` and `open_corpus` raise.
    """
    data = comparison.data
    sources = open_sources(data)
    tokenizer = learn_tokenizer(data, sources)
    corpus = open_corpus(sources, tokenizer, data, dataclasses.replace(model, vocab_size=0))
    held_out = EvaluationBatches(corpus.validation, comparison.batch_size)
    validation = [held_out[number] for number in range(len(held_out))]
    return SharedData(comparison, model.context_length, sources, tokenizer, corpus, validation)
