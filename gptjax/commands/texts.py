"""Commands about data."""

import time
from pathlib import Path
from typing import Annotated

import tyro

from gptjax.config import DataConfig, InputError, TransformerConfig
from gptjax.config.values import Objective, Packing
from gptjax.system.memory import check_batch_fits


def data(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")],
    /,
    tokenizer: str = "bytes",
    target: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE ...")] = (),
    weights: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT ...")] = (),
    objective: Objective = "causal",
    packing: Packing = "split",
    whole_words: bool = False,
    cache: Annotated[str, tyro.conf.arg(metavar="DIRECTORY")] = "",
    context_length: int = 1024,
    batch_size: int = 64,
) -> None:
    """Show the training data of a run: documents, tokens, lengths, rows, three batches, speed.

    That is the nine tenths used for training; flags are those of --data in an experiment.

    Args:
      sources: The text, such as embedded, a file, a glob, tfds:NAME.
      tokenizer: The tokenizer.
      target: The target of each source, for sequence_to_sequence.
      weights: Share of the rows from each source.
      objective: The training objective.
      packing: How documents are packed into rows.
      whole_words: Mask whole words instead of tokens.
      cache: Directory of cached tokens.
      context_length: Tokens per row.
      batch_size: Rows per batch.
    """
    from gptjax.data.corpus import learn_tokenizer, open_corpus, open_sources
    from gptjax.data.objectives.rows import FAMILIES
    from gptjax.data.pipeline import training_batches
    from gptjax.data.report import report

    if batch_size < 1:
        raise InputError(f"batch-size is {batch_size}: it must be at least 1.")
    check_batch_fits(batch_size, context_length)
    chosen = DataConfig(
        source=sources,
        target=target,
        weights=weights,
        tokenizer=tokenizer,
        objective=objective,
        packing=packing,
        whole_words=whole_words,
        cache=cache,
    )
    pairs = (
        {"token_types": 2, "encoder_heads": "pretraining"} if objective == "next_sentence" else {}
    )
    model = TransformerConfig(family=FAMILIES[objective][0], context_length=context_length, **pairs)
    opened = open_sources(chosen)
    learnt = learn_tokenizer(chosen, opened)
    start = time.perf_counter()
    corpus = open_corpus(opened, learnt, chosen, model)
    seconds = time.perf_counter() - start
    batches = training_batches(corpus.train, weights, batch_size=batch_size, seed=0)
    for line in report(opened, learnt, corpus, batches, opening_seconds=seconds):
        print(line, flush=True)


def build_dataset(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    /,
    name: Annotated[str, tyro.conf.arg(metavar="NAME")],
    data_dir: Path,
    version: str = "1.0.0",
    target: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None,
    validation_fraction: float = 0.0,
) -> None:
    """Write text as a TensorFlow dataset, readable at random and without TensorFlow.

    Args:
      source: The text, as data.source names it.
      name: Name of the dataset, such as my_corpus.
      data_dir: Directory of datasets; this one is NAME/VERSION in it.
      version: Three numbers; an existing version is not overwritten.
      target: Text whose documents translate those of the source, one by one; the fields are then
        called source and target, and otherwise text.
      validation_fraction: Share of the documents, the last ones, for a split named validation.
    """
    from gptjax.data.export import build_dataset
    from gptjax.data.sources import open_source

    documents = open_source(source)
    columns = {"text": documents}
    if target is not None:
        columns = {"source": documents, "target": open_source(target)}
    written = build_dataset(
        columns,
        data_dir,
        name=name,
        version=version,
        validation_fraction=validation_fraction,
    )
    field = "" if target is None else "&field=source"
    print(f"{written} has {len(documents):,} documents: tfds:{name}#data_dir={data_dir}{field}")
