"""Trains the bundled model and its draft from the corpus, seeded.

Run it with the Python of the Transformers environment: `python -m demo_model.train --out FOLDER`.

Two small dense Qwen3 models share one tokenizer. The target learns the answers; the draft, one layer deep, learns to
agree with the target (its probabilities, not the text), because a draft pays by being accepted.
Speed-ups that matter on a CPU: bfloat16 products (AMX where the CPU has it), questions are not predicted, batches hold
samples of like length, and only the positions that are learned go through the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from demo_model.corpus import LONGEST_PREFIX, Entry, read_corpus, varied, with_prefix
from demo_model.random_model import END_OF_TEXT, MAX_CONTEXT, TURN_END, TURN_START, UNKNOWN, tokenizer_settings

SEED = 42
SPECIALS = [END_OF_TEXT, TURN_START, TURN_END, UNKNOWN]
VOCABULARY = 4096
PRINTABLE = [chr(code) for code in range(32, 127)] + ["\n"]
TARGET_SHAPE = {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 12}
DRAFT_SHAPE = {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 1}


def train_tokenizer(entries: list[Entry]) -> Tokenizer:
    """A byte-level BPE over ASCII only, so that every token is printable text; what is not ASCII is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted({piece for letter in PRINTABLE for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(letter)})
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    texts = [text for entry in entries for text in (*entry.questions, *(4 * [entry.answer]))]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_config(shape: dict[str, int], vocabulary: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=MAX_CONTEXT,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIALS.index(TURN_END),
        pad_token_id=SPECIALS.index(END_OF_TEXT),
        **shape,
    )


@dataclass(frozen=True, slots=True)
class Sample:
    tokens: list[int]
    prompt_length: int


class Samples:
    """Draws training samples: another phrasing each time, varied, now and then behind a long prefix."""

    def __init__(self, entries: list[Entry], tokenizer: Tokenizer, seed: int) -> None:
        self.entries, self.tokenizer, self.chance = entries, tokenizer, random.Random(seed)

    def sample(self, entry: Entry) -> Sample:
        chance = self.chance
        question = varied(chance.choice(entry.questions), chance)
        dice = chance.random()
        if dice < 0.012:
            question = with_prefix(question, chance.randint(1000, LONGEST_PREFIX))
        elif dice < 0.05:
            question = with_prefix(question, chance.randint(1, 300))
        prompt = f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"
        start = self.tokenizer.encode(prompt).ids
        answer = self.tokenizer.encode(f"{entry.answer}{TURN_END}").ids
        return Sample(start + answer, len(start))

    def epoch(self, batch_tokens: int) -> Iterator[list[Sample]]:
        """Every entry once (those with many questions more often), in batches of like length."""
        drawn = []
        for entry in self.entries:
            drawn += [self.sample(entry) for _ in range(max(1, round(len(entry.questions) / 12)))]
        drawn.sort(key=lambda sample: len(sample.tokens) + self.chance.random())
        batches: list[list[Sample]] = [[]]
        for sample in drawn:
            if batches[-1] and (len(batches[-1]) + 1) * len(sample.tokens) > batch_tokens:
                batches.append([])
            batches[-1].append(sample)
        self.chance.shuffle(batches)
        yield from batches


def tensors(batch: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input [B, T], next token [N], flat positions [N] in B*T where it is learned). Padding stands on the right,
    where causal attention never looks."""
    longest = max(len(sample.tokens) for sample in batch)
    inputs = torch.zeros(len(batch), longest, dtype=torch.long)
    learned, places = [], []
    for row, sample in enumerate(batch):
        inputs[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        places += [row * longest + place for place in range(sample.prompt_length - 1, len(sample.tokens) - 1)]
        learned += sample.tokens[sample.prompt_length :]
    return inputs, torch.tensor(learned), torch.tensor(places)


def logits_at(model: Qwen3ForCausalLM, inputs: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[N, vocabulary] at the flat positions."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[places]).float()


def train(
    model: Qwen3ForCausalLM,
    samples: Samples,
    epochs: int,
    peak_rate: float,
    batch_tokens: int,
    device: str,
    teacher: Qwen3ForCausalLM | None = None,
    seconds: float = math.inf,
    told: str = "",
) -> list[float]:
    """Returns the mean loss of each epoch. Stops early, with the learning rate brought down, after `seconds`."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=peak_rate,
        betas=(0.9, 0.98),
    )
    began, losses = time.monotonic(), []
    model.train()
    warm_steps, step = 100, 0
    for epoch in range(epochs):
        passed = max(epoch / epochs, (time.monotonic() - began) / seconds)
        if passed >= 1:
            break
        total = count = 0.0
        for batch in samples.epoch(batch_tokens):
            step += 1
            now = min(1.0, max(passed, (time.monotonic() - began) / seconds))
            for group in optimizer.param_groups:
                group["lr"] = (
                    peak_rate * min(1.0, step / warm_steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * now)))
                )
            inputs, learned, places = (tensor.to(device) for tensor in tensors(batch))
            with torch.autocast(device, dtype=torch.bfloat16):
                logits = logits_at(model, inputs, places)
                if teacher is not None:
                    with torch.no_grad():
                        wanted = logits_at(teacher, inputs, places)
            if teacher is None:
                loss = functional.cross_entropy(logits, learned)
            else:
                loss = functional.kl_div(
                    functional.log_softmax(logits, -1),
                    functional.log_softmax(wanted, -1),
                    log_target=True,
                    reduction="batchmean",
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach()) * len(learned)
            count += len(learned)
        losses.append(total / count)
        if epoch % 5 == 0 or epoch == epochs - 1:
            print(f"{told} epoch {epoch}: loss {losses[-1]:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    return losses


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path, name: str, note: str) -> None:
    """The model as bfloat16 safetensors with everything that the three engines need beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    _write(folder / "config.json", config | {"torch_dtype": "bfloat16", "dtype": "bfloat16"})
    _write(folder / "generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": 0})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", tokenizer_settings())
    _write(folder / "bakeoff.json", {"name": name, "note": note})


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=220)
    parser.add_argument("--draft-epochs", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=90.0, help="of training the target; the draft gets a third")
    parser.add_argument("--batch-tokens", type=int, default=6144)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    entries = read_corpus()
    tokenizer = train_tokenizer(entries)
    vocabulary = tokenizer.get_vocab_size()
    target = Qwen3ForCausalLM(model_config(TARGET_SHAPE, vocabulary)).to(device)
    draft = Qwen3ForCausalLM(model_config(DRAFT_SHAPE, vocabulary)).to(device)
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (target, draft)]
    answers = sum(len(tokenizer.encode(entry.answer).ids) for entry in entries)
    print(f"{len(entries)} entries, {answers} answer tokens, vocabulary {vocabulary}, parameters {sizes}", flush=True)
    samples = Samples(entries, tokenizer, SEED)
    losses = train(
        target,
        samples,
        options.epochs,
        options.rate,
        options.batch_tokens,
        device,
        None,
        options.minutes * 60,
        "target",
    )
    target.eval()
    note = "A small model trained on one subject: it explains LLM inference and knows nothing else."
    save(target, tokenizer, options.out / "target", "inference-explainer-15M", note)
    target.float()
    draft_losses = train(
        draft,
        samples,
        options.draft_epochs,
        options.rate,
        options.batch_tokens,
        device,
        target,
        options.minutes * 20,
        "draft",
    )
    save(
        draft, tokenizer, options.out / "draft", "inference-explainer-draft-3M", "The draft of inference-explainer-15M."
    )
    record = {"target_loss": losses, "draft_divergence": draft_losses, "parameters": sizes, "entries": len(entries)}
    _write(options.out / "training.json", {**record, "answer_tokens": answers, "vocabulary": vocabulary, "seed": SEED})


if __name__ == "__main__":
    main()
