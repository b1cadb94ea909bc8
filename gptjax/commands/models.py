"""Commands about models and runs."""

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from gptjax.config import ExperimentConfig, InputError, TransformerConfig
from gptjax.config.values import DecodingWeights
from gptjax.costs.model import ModelCost, model_cost
from gptjax.models.presets import PRESETS, preset
from gptjax.system.buckets import downloaded, has, url_of
from gptjax.system.memory import ACTIVATION_BYTES, check_fits
from gptjax.system.mirrors import copied
from gptjax.system.outputs import whole_directory

TOKEN_BYTES = 8
"""Bytes of a token in a list."""


def sample(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    /,
    prompt: str = "\n",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    beams: int = 0,
    seed: int = 0,
    num_samples: int = 1,
    sliding_window: bool = False,
    weights: DecodingWeights = "dtype",
    step: Annotated[int | None, tyro.conf.arg(metavar="STEP")] = None,
) -> None:
    """Continue a prompt with a trained run, printing both as one text while it is decoded.

    The reason it ends is printed on standard error.

    Args:
      run: Directory of the run, such as runs/quickstart.
      prompt: Text to continue, or the source to translate.
      max_new_tokens: Tokens to add; fewer if the end token or the end of the context comes first.
      temperature: Divides the logits; 0 takes the most likely token.
      top_k: Sample from this many of the most likely tokens; 0 takes all.
      top_p: Sample from the smallest set of likely tokens that reaches this probability.
      min_p: Sample from tokens at least this times as likely as the most likely one.
      repetition_penalty: Above 1, tokens that occurred become less likely.
      beams: Print the best result of a beam search of this width instead of sampling.
      seed: Random seed of the first sample; further samples have the next seeds.
      num_samples: Continuations, decoded as one batch; more than one are printed when all end.
      sliding_window: At the end of the context, continue from its second half.
      weights: The model's dtype, or int8, which is faster where reading the weights takes the time.
      step: Checkpoint to load; the best by default.
    """
    import numpy as np

    from gptjax.data.tokenizers import stream_text
    from gptjax.decoding.beam_search import beam_search
    from gptjax.decoding.generate import generate
    from gptjax.decoding.sampling import Sampling
    from gptjax.runs.loading import load_run

    if num_samples < 1:
        raise InputError(f"num-samples is {num_samples}: it must be at least 1.")
    if not 1 <= max_new_tokens < 1 << 31:
        wanted = "at least 1 and below 2**31"
        raise InputError(f"max-new-tokens is {max_new_tokens}: it must be {wanted}.")
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed is {seed}: it must be at least 0 and below 2**32.")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if beams:
        _check_unset(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            num_samples=num_samples,
            sliding_window=sliding_window,
        )
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"prompt is {prompt!r}: it must be UTF-8.") from error
    loaded = load_run(run, step)
    _check_decoding_fits(loaded.config.model, beams or num_samples, max_new_tokens)
    question = loaded.decoding_inputs(prompt)

    def say(tokens: Iterable[int]) -> None:
        """Print the prompt and its continuation as the tokens arrive, and why they end."""
        decoded: list[int] = []

        def text_tokens() -> Iterator[int]:
            for token in tokens:
                if not decoded and question.source is None:  # The prompt was accepted.
                    yield from question.prompt
                decoded.append(token)
                if token in question.ends:
                    return
                yield token

        for piece in stream_text(loaded.tokenizer, text_tokens()):
            print(piece, end="", flush=True)
        print(flush=True)
        print(_why_ended(decoded, question.ends, max_new_tokens, loaded.config), file=sys.stderr)

    def repeated(tokens: np.ndarray | None) -> np.ndarray | None:
        return None if tokens is None else np.tile(tokens, (num_samples, 1))

    if beams:
        ((best, *_),) = beam_search(
            loaded.model,
            question.prompt[None],
            max_new_tokens=max_new_tokens,
            beams=beams,
            end_token=question.ends,
            source=repeated(question.source),
            weights=weights,
        )
        say(best.tokens)
        return
    rows = generate(
        loaded.model,
        np.tile(question.prompt, (num_samples, 1)),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        end_token=question.ends,
        sliding_window=sliding_window,
        source=repeated(question.source),
        weights=weights,
    )
    if num_samples == 1:
        say(int(row[0]) for row in rows)
        return
    for number, column in enumerate(np.stack(list(rows), axis=1)):
        print(f"--- sample {number + 1}")
        say(column.tolist())


def _why_ended(
    decoded: Sequence[int], ends: Sequence[int], most: int, config: ExperimentConfig
) -> str:
    """Returns why decoding ended; printed on standard error, so that a file has only the text."""
    if decoded[-1] in ends:
        why = "the model ended the text"
    elif len(decoded) == most:
        why = "as many as --max-new-tokens allows"
    else:
        length = config.model.context_length
        why = f"the context of {length:,} is full, beyond which --sliding-window continues"
    return f"{len(decoded):,} new token{'s' if len(decoded) > 1 else ''}: {why}."


def _check_unset(**flags: object) -> None:
    """Check that flags which beam search does not support are at their defaults.

    Raises:
      InputError: one that does not.
    """
    defaults = inspect.signature(sample).parameters
    for name, value in flags.items():
        if value != defaults[name].default:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is for sampling: it cannot be combined with --beams.")


def _check_decoding_fits(model: TransformerConfig, rows: int, new_tokens: int) -> None:
    """Refuse more sequences than fit in memory: logits, tokens, and the KV cache.

    The cache counts where attention keeps keys and values of the whole context.

    Raises:
      InputError: it cannot.
    """
    kept = 4 * model.vocab_size + TOKEN_BYTES * min(new_tokens, model.context_length)
    if rows > 1:
        kept += TOKEN_BYTES * new_tokens
    if model.family != "recurrent" and model.attention == "full":
        size = 2 * model.depth * model.actual_kv_heads * model.actual_head_dim
        kept += ACTIVATION_BYTES[model.dtype] * size * model.context_length
    check_fits(f"Decoding {rows} sequences of {new_tokens} tokens", rows * kept)


def params(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    /,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Print a model's parameters by part and its FLOPs per token.

    Args:
      name: A preset's name, or the directory of a run.
      as_json: Print JSON for machines.
    """
    counted = model_cost(PRESETS[name] if name in PRESETS else _model_of_run(name))
    print(json.dumps(_cost_json(counted), indent=2) if as_json else _cost_table(name, counted))


def _model_of_run(name: str) -> TransformerConfig:
    """Returns the config of the model in a run's directory.

    Raises:
      InputError: there is none, and the name is no preset's either.
    """
    from gptjax.runs.directory import CONFIG, load_config  # Which imports JAX.

    named = Path(name).name == name and not has(name, CONFIG)
    return preset(name) if named else load_config(name).model


def _cost_json(counted: ModelCost) -> dict:
    return {
        "parts": [dataclasses.asdict(part) for part in counted.parts],
        "parameters": counted.parameters,
        "active_parameters": counted.active_parameters,
        "weight_bytes": {"float32": 4 * counted.parameters, "bfloat16": 2 * counted.parameters},
        "forward_flops_per_token": counted.forward_flops,
        "attention_flops_per_token": counted.attention_flops,
        "training_flops_per_token": counted.training_flops,
        "state_bytes": counted.state_bytes,
    }


def _cost_table(name: str, counted: ModelCost) -> str:
    columns = f"{'matrices':>10}{'parameters':>18}{'share':>8}{'FLOPs per token':>18}"
    lines = [name, f"  {'part':<20}{columns}"]
    for part in counted.parts:
        share = part.parameters / counted.parameters
        lines.append(
            f"  {part.name:<20}{part.matrices:>10,}{part.parameters:>18,}{share:>8.1%}"
            f"{part.flops:>18,}"
        )
    rows = {"total": counted.parameters}
    if counted.active_parameters < counted.parameters:
        rows["active for a token"] = counted.active_parameters
    sections = {
        "parameters": rows,
        "FLOPs per token, at full context": {
            "head": counted.unembedding_flops,
            "attention": counted.attention_flops,
            "forward": counted.forward_flops,
            "training": counted.training_flops,
        },
        "bytes of the weights": {
            "float32": 4 * counted.parameters,
            "bfloat16": 2 * counted.parameters,
        },
        "bytes of training state, float32": {
            **counted.state_bytes,
            "total": sum(counted.state_bytes.values()),
        },
    }
    for title, numbers in sections.items():
        lines.append(title)
        lines += [f"  {row:<28}{number:>20,}" for row, number in numbers.items()]
    return "\n".join(lines)


def certify(
    names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[VARIANT ...]")
    ] = (),
    /,
    every: Annotated[bool, tyro.conf.arg(name="all")] = False,
    markdown: bool = False,
) -> None:
    """Check that equivalent programs of a variant agree; exit code 1 if one does not.

    Args:
      names: Presets, or values of an axis such as position_embedding=alibi.
      every: Take every preset and every value of every axis.
      markdown: Print the page experiments/certificate.md; progress goes to standard error.
    """
    import jax

    from gptjax.certify.grid import certify, failures, heading, line, page, variants, verdict

    if every == bool(names):
        raise InputError(
            "certify takes names, such as gpt2 or position_embedding=alibi, or else --all."
        )
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", 8)
    progress = sys.stderr if markdown else sys.stdout
    chosen, rows = variants(names), {}
    print(heading(), file=progress)
    for name, config in chosen.items():
        rows[name] = certify(config)
        print(line(name, rows[name]), file=progress, flush=True)
    failed = failures(rows)
    if markdown:
        print(page(rows, f"python -m gptjax certify {' '.join(names) or '--all'} --markdown"))
    else:
        print(*failed, verdict(rows), sep="\n")
    if failed:
        raise SystemExit(1)


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")],
    /,
    step: Annotated[int | None, tyro.conf.arg(metavar="STEP")] = None,
) -> None:
    """Write a run as a Hugging Face directory, or a Hugging Face model or a GGUF file as a run.

    A tokenizer.json is converted too, both ways, and so are the tokens that begin and end a text.

    Args:
      source: Directory of a run or of Hugging Face's, a name on its hub, or a GGUF file.
      destination: New or empty directory; nothing is overwritten.
      step: Checkpoint of the run to take; the best by default.
    """
    from gptjax.huggingface.files import check_unused
    from gptjax.runs.bucket import is_pushed
    from gptjax.runs.directory import CHECKPOINTS

    check_unused(destination)
    is_run = has(source, CHECKPOINTS)
    if step is not None and not is_run:
        raise InputError(f"step is {step}: {source} is no run, and has no checkpoints.")
    with whole_directory(destination) as made:
        if is_run:
            with copied(Path(source), is_pushed) as run:
                what = _convert_run(run, made, step)
        elif Path(source).suffix == ".gguf":
            url = url_of(source)
            what = _convert_gguf(downloaded(url) if url else Path(source), made)
        else:
            what = _convert_huggingface(source, made)
    print(f"{url_of(destination) or destination} is {what}.")


def _convert_run(run: Path, destination: Path, step: int | None) -> str:
    """Convert it; returns a description of what was written."""
    from gptjax.data.tokenizers import DESCRIPTION, SubwordTokenizer, load_tokenizer
    from gptjax.data.tokenizers.special import TOKENIZER_CONFIG, tokenizer_config
    from gptjax.huggingface import to_huggingface
    from gptjax.huggingface.files import TOKENIZER
    from gptjax.runs.bucket import address
    from gptjax.runs.loading import decoding_tokens, load_model

    config, model, step = load_model(run, step)
    tokenizer = load_tokenizer(run) if (run / DESCRIPTION).exists() else None
    tokens = decoding_tokens(run, config, tokenizer)
    to_huggingface(model, destination, fields=tokens.fields())
    its = f"without a tokenizer: the run has none that a {TOKENIZER} describes"
    if isinstance(tokenizer, SubwordTokenizer):
        family = config.model.family
        # Marian's tokenizer ends the source; in a run of ours the pipeline appends the end token.
        content = tokenizer.ended() if family == "encoder_decoder" else tokenizer.save()
        (destination / TOKENIZER).write_bytes(content)
        described = tokenizer_config(tokenizer.special_texts(), family)
        (destination / TOKENIZER_CONFIG).write_text(json.dumps(described, indent=2) + "\n")
        its = "with its tokenizer"
    return f"step {step} of {address(run)}, {its}"


def _convert_huggingface(source: str, destination: Path) -> str:
    """Convert it; returns a description of what was written."""
    from gptjax.data.tokenizers import read_huggingface, save_tokenizer
    from gptjax.data.tokenizers.special import read_decoding_tokens
    from gptjax.huggingface import from_huggingface
    from gptjax.huggingface.files import TOKENIZER, find
    from gptjax.runs.directory import save_model

    directory = find(source)
    tokenizer = read_huggingface(directory) if (directory / TOKENIZER).exists() else None
    model = from_huggingface(directory)
    tokens = read_decoding_tokens(directory, model.config.vocab_size)
    end = tokenizer.end_token if tokenizer else None
    if not tokens.ends and end is not None:
        tokens = tokens._replace(ends=(end,))
    save_model(destination, model, tokens)
    its = f"without a tokenizer: there is no {TOKENIZER}"
    if tokenizer:
        save_tokenizer(tokenizer, destination)
        its = "with its tokenizer"
    return f"{source} as a run, {its}"


def _convert_gguf(path: Path, destination: Path) -> str:
    """Convert it; returns a description of what was written."""
    from gptjax.data.tokenizers.special import DecodingTokens
    from gptjax.huggingface import from_gguf
    from gptjax.huggingface.gguf_files import GGUFWeights
    from gptjax.runs.directory import save_model

    model = from_gguf(path)
    given = [(str(path), GGUFWeights(path).token_ids())]
    save_model(destination, model, DecodingTokens.of_fields(given, model.config.vocab_size))
    return f"{path} as a run, without a tokenizer"
