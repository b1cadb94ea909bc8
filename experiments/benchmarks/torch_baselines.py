"""PyTorch baselines of steps_and_tokens.py: training and decoding of GPT-2.

    python experiments/benchmarks/steps_and_tokens.py --against torch lean-torch

PyTorch and transformers come with the extra `torch`, and are imported where they are used.
"""

import importlib
from collections.abc import Callable
from typing import Any

from gptjax import TransformerConfig
from gptjax.data.batch import Batch

LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.99), 0.1
"""Hyperparameters of both sides."""

RunSteps = Callable[[int], None]
"""Runs steps and waits for them."""


def huggingface_steps(config: TransformerConfig, batch: Batch) -> RunSteps:
    """Returns training steps of Hugging Face's GPT-2, eager, with its defaults."""
    model = huggingface_model(config)
    parameters = list(model.parameters())
    return torch_steps(lambda tokens: model(tokens, use_cache=False).logits, parameters, batch)


def huggingface_model(config: TransformerConfig) -> Any:
    """Returns Hugging Face's GPT-2 of this shape."""
    transformers = importlib.import_module("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.width,
            n_layer=config.depth,
            n_head=config.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def lean_steps(config: TransformerConfig, batch: Batch, *, compiled: bool = False) -> RunSteps:
    """Returns training steps of the leanest GPT-2 in PyTorch, as nanoGPT trains it.

    No biases, one product for query, key and value, PyTorch's own attention kernel; on a GPU if
    there is one, there with autocast to the config's dtype. With `compiled`, the loss is
    `torch.compile`d; else it is eager.
    """
    torch = importlib.import_module("torch")
    functional, width, device = torch.nn.functional, config.width, torch_device()

    def matrix(*shape: int):
        return (0.02 * torch.randn(shape, device=device)).requires_grad_()

    def ones():
        return torch.ones(width, device=device, requires_grad=True)

    def norm(x, scale):
        return functional.layer_norm(x, (width,), scale)

    blocks = [
        {
            "attention_norm": ones(),
            "query_key_value": matrix(3 * width, width),
            "output": matrix(width, width),
            "mlp_norm": ones(),
            "up": matrix(4 * width, width),
            "down": matrix(width, 4 * width),
        }
        for _ in range(config.depth)
    ]
    embedding, positions = matrix(config.vocab_size, width), matrix(config.context_length, width)
    last_norm = ones()

    def logits(tokens):
        x = functional.embedding(tokens, embedding) + positions
        for block in blocks:
            projected = functional.linear(
                norm(x, block["attention_norm"]), block["query_key_value"]
            )
            query, key, value = (
                part.unflatten(2, (config.heads, -1)).transpose(1, 2)
                for part in projected.split(width, dim=2)
            )
            mixture = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + functional.linear(mixture.transpose(1, 2).flatten(2), block["output"])
            up = functional.linear(norm(x, block["mlp_norm"]), block["up"])
            x = x + functional.linear(functional.gelu(up), block["down"])
        return functional.linear(norm(x, last_norm), embedding)

    leaves = [leaf for block in blocks for leaf in block.values()]
    parameters = [embedding, positions, last_norm, *leaves]
    return torch_steps(logits, parameters, batch, dtype=config.dtype, compiled=compiled)


def torch_device() -> str:
    """Returns the GPU if there is one, and else the CPU."""
    return "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"


def torch_steps(
    logits: Callable,
    parameters: list,
    batch: Batch,
    *,
    dtype: str = "float32",
    compiled: bool = False,
) -> RunSteps:
    """Returns a function that runs training steps of a PyTorch model, where its parameters are."""
    torch = importlib.import_module("torch")
    device = parameters[0].device
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        fused=True,
    )
    tokens = torch.from_numpy(batch.tokens).long().to(device)
    targets = torch.from_numpy(batch.targets).long().flatten().to(device)

    def loss_of():
        return torch.nn.functional.cross_entropy(logits(tokens).flatten(0, 1), targets)

    loss_of = torch.compile(loss_of) if compiled else loss_of
    torch.backends.cuda.matmul.allow_tf32 = True

    def run(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
                loss = loss_of()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            loss.item()

    return run


def prompt_lengths(rows: int) -> list[int]:
    """Returns the lengths of prompts, from 1 to 64 tokens; the first has one."""
    return [1 + 9 * row % 64 for row in range(rows)]


def huggingface_decoding(config: TransformerConfig, rows: int) -> RunSteps:
    """Returns greedy decoding with Hugging Face's `generate` and its cache, on a GPU if there is.

    Prompts are padded on the left.
    """
    torch = importlib.import_module("torch")
    device = torch_device()
    model = huggingface_model(config).eval().to(device, getattr(torch, config.dtype))
    lengths = torch.tensor(prompt_lengths(rows), device=device)
    positions = torch.arange(int(lengths.max()), device=device)
    mask = (positions >= lengths.max() - lengths[:, None]).long()

    def run(steps: int) -> None:
        how = {"min_new_tokens": steps, "max_new_tokens": steps, "do_sample": False}
        model.generate(torch.zeros_like(mask), attention_mask=mask, pad_token_id=0, **how)
        if device == "cuda":
            torch.cuda.synchronize()

    return run
