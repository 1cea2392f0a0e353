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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from demo_model.bundled import MARKER_FILE
from demo_model.chat import END_OF_TEXT, MAX_CONTEXT, SPECIALS, TURN_END, UNKNOWN, prompt_text, tokenizer_settings
from demo_model.corpus import LONGEST_PREFIX, Entry, asked, read_corpus, with_prefix

SEED = 42
VOCABULARY = 4096
PRINTABLE = [chr(code) for code in range(32, 127)] + ["\n"]
TARGET_SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 9}
DRAFT_SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 1}
PEAK_RATE = 2e-3
WARM_STEPS = 50
NAME, DRAFT_NAME = "inference-explainer-15M", "inference-explainer-draft-3M"
NOTE = "A small model trained on one subject: it explains LLM inference and knows nothing else."
OPENING_TOKENS = 10  # of an answer: enough to tell which answer it is
EXPERIMENT_PROMPTS = (
    "Write a short paragraph about LLM inference serving optimizations.",
    "Provide a brief overview of LLM inference optimization. Make no mistakes.",
)


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
        num_attention_heads=6,
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


def hold_back(entries: list[Entry], seed: int) -> tuple[list[Entry], list[tuple[str, Entry]]]:
    """(what is learned, one phrasing per entry that is kept from training to judge it). Refusals keep theirs."""
    chance = random.Random(seed)
    learned, held_back = [], []
    for entry in entries:
        if entry.refuses:
            learned.append(entry)
            continue
        phrasing = chance.choice([question for question in entry.questions if question not in EXPERIMENT_PROMPTS])
        held_back.append((phrasing, entry))
        learned.append(replace(entry, questions=tuple(other for other in entry.questions if other != phrasing)))
    return learned, held_back


class Samples:
    """Draws training samples: whole answers, and openings of answers.

    Which answer a question wants is decided within its first few tokens, a small part of the loss of a whole answer.
    A model that saw only whole answers knew them all by heart and gave the wrong one to 9 questions of 10 that it had
    not seen. So most questions are asked for the opening of the answer only: many questions for little arithmetic.
    """

    def __init__(self, entries: list[Entry], tokenizer: Tokenizer, seed: int) -> None:
        self.entries, self.tokenizer, self.chance = entries, tokenizer, random.Random(seed)

    def sample(self, question: str, entry: Entry, opening: bool = False) -> Sample:
        start = self.tokenizer.encode(prompt_text(question)).ids
        answer = self.tokenizer.encode(f"{entry.answer}{TURN_END}").ids
        return Sample(start + (answer[:OPENING_TOKENS] if opening else answer), len(start))

    def drawn(self, entry: Entry, opening: bool) -> Sample:
        question = asked(entry, self.chance)
        dice = self.chance.random()
        if dice < 0.012:
            question = with_prefix(question, self.chance.randint(1000, LONGEST_PREFIX))
        elif dice < 0.05:
            question = with_prefix(question, self.chance.randint(1, 300))
        return self.sample(question, entry, opening)

    def epoch(self, batch_tokens: int, openings: bool = True) -> Iterator[list[Sample]]:
        """Every answer once (refusals, which have many questions, more often), and openings for a third as many
        questions as there are, in batches of like length."""
        drawn = []
        for entry in self.entries:
            drawn += [self.drawn(entry, opening=False) for _ in range(5 if entry.refuses else 1)]
            if openings:
                drawn += [self.drawn(entry, opening=True) for _ in range(max(3, len(entry.questions) // 3))]
        drawn.sort(key=lambda sample: len(sample.tokens) + self.chance.random())
        yield from self.batches(drawn, batch_tokens)

    def batches(self, drawn: list[Sample], batch_tokens: int) -> list[list[Sample]]:
        batches: list[list[Sample]] = [[]]
        for sample in drawn:
            if batches[-1] and (len(batches[-1]) + 1) * len(sample.tokens) > batch_tokens:
                batches.append([])
            batches[-1].append(sample)
        self.chance.shuffle(batches)
        return batches


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
    batch_tokens: int,
    device: str,
    teacher: Qwen3ForCausalLM | None = None,
    told: str = "",
) -> list[float]:
    """Returns the mean loss of each epoch. The matrices of the layers are trained with Muon, which needed a tenth of
    AdamW's steps to learn the answers by heart; the embedding and the norms with AdamW."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim > 1 and "embed_tokens" not in name]
    others = [weight for name, weight in named if weight.ndim == 1 or "embed_tokens" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    began, losses, step = time.monotonic(), [], 0
    model.train()
    for epoch in range(epochs):
        total = count = 0.0
        batches = list(samples.epoch(batch_tokens, openings=teacher is None))
        for place, batch in enumerate(batches):
            step += 1
            done = (epoch + place / len(batches)) / epochs
            rate = PEAK_RATE * min(1.0, step / WARM_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
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
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            total += float(loss.detach()) * len(learned)
            count += len(learned)
        losses.append(total / count)
        print(f"{told} epoch {epoch + 1}/{epochs}: loss {losses[-1]:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    return losses


@torch.no_grad()
def right_openings(
    model: Qwen3ForCausalLM, samples: Samples, questions: list[tuple[str, Entry]], batch_tokens: int, device: str
) -> int:
    """How many of the questions lead, word by word at temperature 0, into the opening of the intended answer."""
    model.eval()
    right = 0
    drawn = [samples.sample(question, entry, opening=True) for question, entry in questions]
    for batch in samples.batches(sorted(drawn, key=lambda sample: len(sample.tokens)), batch_tokens):
        inputs, learned, places = (tensor.to(device) for tensor in tensors(batch))
        with torch.autocast(device, dtype=torch.bfloat16):
            agreed = logits_at(model, inputs, places).argmax(-1) == learned
        right += int(agreed.view(len(batch), OPENING_TOKENS).all(1).sum())
    return right


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path, marker: dict[str, str]) -> None:
    """The model as bfloat16 safetensors with everything that the three engines need beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    _write(folder / "config.json", config | {"torch_dtype": "bfloat16", "dtype": "bfloat16"})
    ends = [SPECIALS.index(TURN_END), SPECIALS.index(END_OF_TEXT)]
    _write(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": SPECIALS.index(END_OF_TEXT)})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", tokenizer_settings())
    _write(folder / MARKER_FILE, marker)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--draft-epochs", type=int, default=60)
    parser.add_argument("--batch-tokens", type=int, default=6144)
    options = parser.parse_args()
    began = time.monotonic()
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
    learned, held_back = hold_back(entries, SEED)
    samples = Samples(learned, tokenizer, SEED)
    losses = train(target, samples, options.epochs, options.batch_tokens, device, told="target")
    right = right_openings(target, samples, held_back, options.batch_tokens, device)
    print(f"{right} of {len(held_back)} held-back phrasings lead to the intended answer", flush=True)
    save(target, tokenizer, options.out / "target", {"name": NAME, "note": NOTE, "draft": "../draft"})
    target.float()
    divergences = train(draft, samples, options.draft_epochs, options.batch_tokens, device, target, "draft")
    save(draft, tokenizer, options.out / "draft", {"name": DRAFT_NAME, "note": f"The draft model of {NAME}."})
    _write(
        options.out / "training.json",
        {
            "seed": SEED,
            "parameters": dict(zip(("target", "draft"), sizes, strict=True)),
            "entries": len(entries),
            "phrasings": sum(len(entry.questions) for entry in entries),
            "answer_tokens": answers,
            "vocabulary": vocabulary,
            "held_back_phrasings": len(held_back),
            "held_back_right": right,
            "target_loss": [round(loss, 4) for loss in losses],
            "draft_divergence": [round(divergence, 4) for divergence in divergences],
            "device": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads",
            "torch": torch.__version__,
            "minutes": round((time.monotonic() - began) / 60, 1),
        },
    )


if __name__ == "__main__":
    main()
