"""Train the two demo models on the standard library of the Python that runs this script.

    python examples/demo/train.py llama OUTPUT_DIR     # rotary GQA, 2 kv heads of 64
    python examples/demo/train.py opt OUTPUT_DIR       # learned positions, MHA, 4 heads of 64
    python examples/demo/train.py heldout FILE.jsonl   # a part of the held-out files, to evaluate on

Every 20th file is held out. The held-out loss, the tokens seen and the settings are written to
OUTPUT_DIR/README.md. It is training code kept small, not a part of lorc. The committed models were trained on
Python 3.11.7.
"""

import argparse
import json
import math
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 1024
STEP_TOKENS = 4096
SEQ_LEN = 256
LONG_SEQ_LEN = 1024  # one step in ten, so that positions past SEQ_LEN are trained
HELD_OUT_BYTES = 400_000  # of the held-out files without the encodings, which are long tables
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}


@dataclass(frozen=True)
class Recipe:
    """What a demo model is and how long it is trained."""

    num_steps: int
    learning_rate: float
    config: LlamaConfig | OPTConfig


RECIPES = {
    "llama": Recipe(
        num_steps=2359,
        learning_rate=3e-3,
        config=LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        ),
    ),
    "opt": Recipe(
        num_steps=1400,
        learning_rate=2e-3,
        config=OPTConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            word_embed_proj_dim=256,
            ffn_dim=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LONG_SEQ_LEN,
            dropout=0.0,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        ),
    ),
}


def split_corpus() -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out files of the standard library: text by path, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))
    texts = {str(p.relative_to(root)): p.read_text(encoding="utf-8", errors="replace") for p in paths}
    held_out = {path: text for index, (path, text) in enumerate(texts.items()) if index % 20 == 7}
    train = {path: text for path, text in texts.items() if path not in held_out}
    return train, held_out


def write_held_out(output: Path) -> None:
    """One JSON line per held-out file, shortest first, up to HELD_OUT_BYTES."""
    _, held_out = split_corpus()
    lines, total = [], 0
    for path, text in sorted(held_out.items(), key=lambda item: (len(item[1]), item[0])):
        if not path.startswith("encodings/") and text and total + len(text) <= HELD_OUT_BYTES:
            total += len(text)
            lines.append(json.dumps({"path": path, "text": text}))
    output.write_text("\n".join(lines) + "\n")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<s>` and `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def token_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All files in one row: `<s>` file `</s>` `<s>` file `</s>` ..."""
    ids: list[int] = []
    for text in texts:
        ids += [0, *tokenizer(text)["input_ids"], 1]
    return torch.tensor(ids)


def learning_rate_share(step: int, num_steps: int) -> float:
    """Warm-up over 100 steps, constant to 60 %, then linear to 2 %."""
    progress = step / num_steps
    return min((step + 1) / 100, 1.0) * (1.0 if progress < 0.6 else 1.0 - 0.98 * (progress - 0.6) / 0.4)


def random_batch(stream: Tensor, seq_len: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(stream) - seq_len, (STEP_TOKENS // seq_len,), generator=generator)
    return torch.stack([stream[start : start + seq_len] for start in starts])


def train(model: PreTrainedModel, stream: Tensor, recipe: Recipe) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, recipe.num_steps))
    started = time.perf_counter()
    for step in range(recipe.num_steps):
        batch = random_batch(stream, LONG_SEQ_LEN if step % 10 == 9 else SEQ_LEN, generator)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.perf_counter() - started:.0f} s", flush=True)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, stream: Tensor) -> float:
    """Mean loss in nats per token over all non-overlapping windows."""
    windows = stream[: len(stream) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    return math.fsum(
        model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch) for batch in windows.split(16)
    ) / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*sorted(RECIPES), "heldout"])
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "heldout":
        write_held_out(arguments.output)
    else:
        train_demo_model(arguments.what, arguments.output)


def train_demo_model(name: str, output_dir: Path) -> None:
    """Train, measure and write one model with its tokenizer and README."""
    recipe = RECIPES[name]

    torch.manual_seed(0)
    train_texts, held_out_texts = split_corpus()
    tokenizer = train_tokenizer(list(train_texts.values()))
    model_class = {"llama": LlamaForCausalLM, "opt": OPTForCausalLM}[name]
    model = model_class(recipe.config)
    stream = token_stream(train_texts.values(), tokenizer)
    started = time.perf_counter()
    train(model, stream, recipe)
    model.eval()
    loss = held_out_loss(model, token_stream(held_out_texts.values(), tokenizer))

    model.to(torch.bfloat16).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    minutes = (time.perf_counter() - started) / 60
    summary = f"""# Demo model, trained by `examples/demo/train.py {name}`

{sum(p.numel() for p in model.parameters()):,} parameters, bfloat16. Trained on the `*.py` files of Python's standard
library (PSF licence) without tests; every 20th file is held out. Seed 0, {recipe.num_steps} steps,
{recipe.num_steps * STEP_TOKENS:,} tokens seen of {len(stream):,}, {minutes:.0f} minutes.
Held-out loss in float32 over all windows of {SEQ_LEN}: {loss:.3f} nats per token (perplexity {math.exp(loss):.2f}).
"""
    (output_dir / "README.md").write_text(summary)
    print(summary)


if __name__ == "__main__":
    main()
