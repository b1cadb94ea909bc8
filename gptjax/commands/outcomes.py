"""Outputs of a finished run: loss curve, and samples of its best checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from gptjax import plots, probe
from gptjax.data.corpus import Corpus, Sources
from gptjax.data.objectives.vocabulary import Vocabulary
from gptjax.data.pipeline import EvaluationBatches
from gptjax.data.report import INVISIBLE, labels
from gptjax.data.sources import Documents
from gptjax.data.tokenizers import Tokenizer, stream_text
from gptjax.decoding.beam_search import beam_search
from gptjax.decoding.generate import generate
from gptjax.decoding.sampling import Sampling
from gptjax.runs.loading import Run
from gptjax.training.trackers.jsonl import METRICS, read_jsonl

SPACE = INVISIBLE[" "]
SHOWN = 20
"""Rows in predictions.txt, and sentences in translations.txt."""


def outcome(run: Run, sources: Sources, corpus: Corpus, out: Path) -> str:
    """Write the loss curve and the objective's outputs; returns the names of the files."""
    lines = read_jsonl(out / METRICS)
    plots.save(plots.loss_curve(lines), out / "loss.png")
    curves = "loss.png"
    if (inside := plots.watched(lines)) is not None:
        plots.save(inside, out / "watch.png")
        curves = "loss.png, watch.png"
    if run.config.data.objective in ("masked_lm", "next_sentence"):
        shown = predictions(run, sources, corpus, out)
    elif run.config.model.family == "encoder_decoder" and sources.validation_targets:
        shown = translations(run, sources, corpus, out)
    elif run.config.data.objective == "causal":
        shown = samples(run, sources, corpus, out)
    else:
        return curves
    return f"{curves}, {shown}"


def samples(run: Run, sources: Sources, corpus: Corpus, out: Path) -> str:
    """Write attention and samples of the run's best checkpoint."""
    line = first_line(sources.validation[0])
    sentence = run.tokenizer.encode_prompt(line)
    while len(sentence) > run.config.model.context_length and " " in line:
        line = line.rpartition(" ")[0]
        sentence = run.tokenizer.encode_prompt(line)
    sentence = sentence[: run.config.model.context_length]
    if run.config.model.family == "decoder":
        weights = np.asarray(probe.attention(run.model, sentence[None]))[:, 0]
        figure = attention_of_words(weights, sentence, run.tokenizer, corpus.vocabulary, line)
        plots.save(figure, out / "attention.png")

    prompts = np.tile(sentence, (4, 1))
    tokens = generate(
        run.model,
        prompts,
        max_new_tokens=300,
        sampling=Sampling(temperature=0.8, top_k=40),
        end_token=run.tokenizer.end_token,
        sliding_window=True,
    )
    samples = np.concatenate([prompts, np.stack(list(tokens), axis=1)], axis=1)
    texts = ["".join(stream_text(run.tokenizer, sample)) for sample in samples]
    (out / "samples.txt").write_text("\n\n----\n\n".join(texts) + "\n", encoding="utf-8")
    return "attention.png, samples.txt" if run.config.model.family == "decoder" else "samples.txt"


def attention_of_words(
    weights: np.ndarray, tokens: np.ndarray, tokenizer: Tokenizer, known: Vocabulary, title: str
) -> Figure:
    """Plots attention [L, N, T, T] between `tokens` [T] aggregated to words."""
    texts = labels(tokens, tokenizer, known)
    starts = known.word_starts(tokens)
    # A space belongs to the word after it, as in GPT-2's tokens.
    starts[1:] &= np.array([text != SPACE for text in texts[:-1]], bool)
    words = [
        tokenizer.decode(tokens[group]).strip() or "".join(texts[place] for place in group)
        for group in np.split(np.arange(len(tokens)), np.flatnonzero(starts)[1:])
    ]
    names = "query: a word, mean over its tokens", "key: a word, sum over its tokens"
    return plots.attention_grid(
        probe.by_word(weights, starts),
        list(map(plots.token_label, words)),
        plots.token_label(title).replace(SPACE, " "),
        names=names,
    )


def first_line(documents: Sequence[str] | Documents, least: int = 24, most: int = 60) -> str:
    """Returns the first line of at least `least` characters, else the text, cut at a word.

    It takes the first nonempty document; a source has one. Its first line is tried last: where a
    document was split, that line begins in the other part.
    """
    text = next(filter(None, map(documents.__getitem__, range(len(documents)))))
    first, *others = (line.strip() for line in text.splitlines())
    line = next((line for line in [*others, first] if len(line) >= least), text)
    return line if len(line) <= most else line[: most + 1].rpartition(" ")[0] or line[:most]


def predictions(run: Run, sources: Sources, corpus: Corpus, out: Path) -> str:
    """Write validation rows with the best checkpoint's predictions."""
    lines, found, hidden = [], 0, 0
    for batch in EvaluationBatches(corpus.validation, SHOWN):
        inputs = {name: jnp.asarray(array) for name, array in batch.inputs().items()}
        logits = run.model(jnp.asarray(batch.tokens), **inputs)
        guesses = np.asarray(logits.argmax(axis=-1))
        asked = batch.loss_weights > 0
        found += int((guesses == batch.targets)[asked].sum())
        hidden += int(asked.sum())
        if not lines:
            for row in np.flatnonzero(asked.any(axis=1)):
                filled = batch.padding_mask if batch.segment_ids is None else batch.segment_ids
                read = np.asarray(filled)[row] > 0
                texts = labels(batch.targets[row][read], run.tokenizer, corpus.vocabulary)
                guessed = labels(guesses[row][read], run.tokenizer, corpus.vocabulary)
                marked = [
                    f"[{text if text == guess else f'{text}: {guess}'}]" if hid else text
                    for text, guess, hid in zip(texts, guessed, asked[row][read], strict=True)
                ]
                lines.append("".join(marked))
    head = f"{found:,} of {hidden:,} masked tokens predicted correctly ({found / hidden:.1%})."
    print(head)
    explained = "Masked text is in brackets, followed by the prediction if it is wrong."
    text = "\n\n".join([head, explained, *lines])
    (out / "predictions.txt").write_text(text + "\n", encoding="utf-8")
    return "predictions.txt"


def translations(run: Run, sources: Sources, corpus: Corpus, out: Path) -> str:
    """Write translations of validation sentences by the best checkpoint, with 4 beams."""
    context, asked = run.config.model.context_length, []
    for number in range(min(SHOWN, len(sources.validation[0]))):
        text, reference = sources.validation[0][number], sources.validation_targets[0][number]
        question = run.decoding_inputs(text)
        if question.source is not None and len(question.source) <= context:
            asked.append((text, reference, question))
    found = asked and beam_search(
        run.model,
        [question.prompt for *_, question in asked],
        max_new_tokens=context - 1,
        beams=4,
        end_token=run.tokens.ends,
        length_penalty=0.6,
        source=[question.source for *_, question in asked],
    )
    shown = []
    for (text, reference, question), (best, *_) in zip(asked, found, strict=True):
        written = run.tokenizer.decode(token for token in best.tokens if token not in question.ends)
        shown.append(f"{text}\n  model      {written}\n  reference  {reference}")
    (out / "translations.txt").write_text("\n".join(shown) + "\n", encoding="utf-8")
    return "translations.txt"
