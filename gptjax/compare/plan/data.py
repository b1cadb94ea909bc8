"""What all variants are trained and evaluated on: text, tokens, order, held-out rows."""

import dataclasses
from typing import Any, NamedTuple

import grain

from gptjax.compare.question import Comparison
from gptjax.config import TransformerConfig
from gptjax.data.batch import Batch
from gptjax.data.corpus import Corpus, Sources, learn_tokenizer, open_corpus, open_sources
from gptjax.data.pipeline import EvaluationBatches, streamed_batches, training_batches
from gptjax.data.tokenizers import Tokenizer


class Material(NamedTuple):
    """Opened once for the whole comparison."""

    comparison: Comparison
    context_length: int
    sources: Sources
    tokenizer: Tokenizer
    corpus: Corpus
    validation: list[Batch]
    """All held-out rows, of which every evaluation of every run takes all."""

    def batches(self, seed: int) -> grain.DatasetIterator:
        """The training batches of a seed, the same for every variant."""
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
        """Places of a batch; of pairs those of the longest targets."""
        return self.comparison.batch_size * self.context_length

    @property
    def one_shape(self) -> bool:
        """Whether all batches are alike, as runs that share a program need."""
        return len(self.corpus.train) <= 1

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's numbers depend on beside its config."""
        return {
            "data_sha256": self.sources.fingerprint,
            "tokenizer_sha256": self.tokenizer.fingerprint,
        }

    @property
    def description(self) -> str:
        """In a line, for the report."""
        data = self.comparison.data
        held_out = sum(int((batch.loss_weights > 0).sum()) for batch in self.validation)
        trained = f"{self.corpus.train_tokens:,} tokens" if self.corpus.train else "text as read"
        return (
            f"{', '.join(data.source)} ({data.tokenizer}, {self.corpus.vocabulary.size} tokens in "
            f"the vocabulary, {data.objective}): trained on {trained}, each evaluation on "
            f"{held_out:,}"
        )


def open_material(comparison: Comparison, model: TransformerConfig) -> Material:
    """Open the data for models of this family and context.

    Raises:
      InputError: what `open_sources`, `learn_tokenizer` and `open_corpus` raise.
    """
    data = comparison.data
    sources = open_sources(data)
    tokenizer = learn_tokenizer(data, sources)
    corpus = open_corpus(sources, tokenizer, data, dataclasses.replace(model, vocab_size=0))
    held_out = EvaluationBatches(corpus.validation, comparison.batch_size)
    validation = [held_out[number] for number in range(len(held_out))]
    return Material(comparison, model.context_length, sources, tokenizer, corpus, validation)
