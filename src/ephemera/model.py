"""AdaptiveLM: adapt to each prompt, answer, forget."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ephemera.adaptation import Adaptation, beyond, left_alone, steps_of, told
from ephemera.batch import batch_tokens, length_batches, pad
from ephemera.begin import adapt_from, gate_of, reach_of
from ephemera.inits import Init, default_start, load_init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.llm.prefill import prefill, whole_reading
from ephemera.llm.prompts import checked_prompts
from ephemera.llm.quantization import Quantization
from ephemera.llm.share import Parallel
from ephemera.llm.tokenize import Prompt, encode_answer, encode_prompt
from ephemera.llm.window import fit
from ephemera.made_for import Format, Reach, checked_reach
from ephemera.messages import unknown
from ephemera.rates import Rate, adapted_by, default_rate, load_rate, place_rate
from ephemera.together import SharedAdapter, shared_adapter

BATCH_SIZE = 16  # rows that adapt together

RateLike = Rate | str | Path | float | None
InitLike = Init | str | Path | None


class AdaptiveLM:
    """A frozen language model that adapts to each prompt before it answers.

    A prompt is a text, or with `chat=True` also a list of a chat's messages, each with `role` and `content`.
    Safe to call from several threads: calls wait for each other, and no adapter outlives its call.
    """

    def __init__(
        self,
        backbone: FrozenLM,
        *,
        init: InitLike = None,
        rate: RateLike = None,
        chat: bool = False,
        truncate: Literal["left"] | None = None,
        reach: Reach | None = None,
        special_tokens: bool = False,
        unasked: Init | None = None,
    ):
        """`reach`: where adapters act; default: as the rate was trained for, else on every token (`from_pretrained`).

        `unasked`: makes the adapters, without a step, where nobody names a start, a rate or steps.
        """
        self.backbone = backbone
        self.reach: Reach | None = None if reach is None else checked_reach(reach)
        self.init = self._init(init)
        self.rate = self._rate(rate)
        self.unasked = None if unasked is None else unasked.placed(backbone)
        self.chat, self.special_tokens = chat, special_tokens
        self.truncate: Literal["left"] | None = truncate

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        init: InitLike = None,
        rate: RateLike = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        lora: dict[str, Any] | None = None,
        chat: bool = False,
        truncate: Literal["left"] | None = None,
        reach: Reach | None = None,
        special_tokens: bool = False,
        checkpoint: bool = False,
        quantization: Quantization = "none",
        parallel: Parallel = "none",
        **kwargs: Any,
    ) -> AdaptiveLM:
        """Load a model.

        `name`: a hub id, a local folder, a GGUF file, or `smollm2-135m-instruct` (from the package index). `init`:
        where adapters start: an init object, "zero" (the default), a generator's folder or shipped name, the
        folder of a PEFT adapter, or a hub id. `rate`: a rate object, a folder, a shipped name, a hub id, a preset
        ("full", "fast"), a number, or "none" for the plain model. By default what ships for the model and the prompts'
        format, if neither `init` nor `lora` is given: a generator without steps, and a rate where steps are asked for. `reach`: "answer" lets adapters
        act from the last prompt token on, "all" on every token; by default as the rate was trained for. `dtype`:
        "float32" (default on CPU) or "bfloat16" (default on CUDA). `lora`: any of `r`, `lora_alpha`, `init_std`,
        `target_modules`, `layers`; what is adapted is by default what init or rate was trained for. `chat`: put
        prompts in the model's chat template. `special_tokens`: a special token that a prompt spells is one; else it
        is text. `truncate="left"`: cut prompts longer than the model's window instead of refusing them; BOS and the chat
        template's words stay, the beginning of the prompt's own text goes. `checkpoint`: steps keep only each layer's
        input and run the layer again in the backward pass: less memory, more time, the same adapters. `quantization`:
        "int8" or "nf4" (bitsandbytes), or "torchao-int8"; "none": as the files are. `parallel`: "tensor" or "fsdp" over
        the processes that torchrun started, or "offload" (accelerate's `device_map`), for models larger than a device.
        `fast=False`: run the reference path. Further keywords go to transformers. ValueError names what is allowed.
        """
        reach, settings = None if reach is None else checked_reach(reach), dict(lora or {})
        allowed = ["r", "lora_alpha", "init_std", "target_modules", "layers"]
        for key in settings:
            if key not in allowed:
                raise unknown("lora setting", key, allowed)
        adapted = {key: settings.pop(key) for key in ("target_modules", "layers") if key in settings}
        if init is not None and init != "zero" and settings:
            raise ValueError(f"lora={settings} sets the zero init's values, but init={init!r} replaces it; give one.")
        init = load_init(init, **settings)
        about: dict[str, Any] = {"chat": chat, "truncate": truncate, "special_tokens": special_tokens}
        if rate is None and init.zero and not lora:
            format: Format = "chat" if chat else "plain"
            rate = default_rate(name, format)
            about["unasked"] = None if reach == "all" else default_start(name, format)
        elif isinstance(rate, str | Path | float | int):
            rate = None if rate == "none" else load_rate(rate)
        brought = init.lora_settings.get("target_modules")
        if brought is not None:
            adapted["target_modules"] = brought
        kwargs |= {"checkpoint": checkpoint, "quantization": quantization, "parallel": parallel}
        backbone = load_backbone(name, dtype=dtype, device=device, **(adapted or adapted_by(rate)), **kwargs)
        return cls(backbone, init=init, rate=rate, reach=reach, **about)

    @property
    def format(self) -> Format:
        return "chat" if self.chat else "plain"

    @property
    def path(self) -> Path:
        """Local folder (or GGUF file) of the backbone."""
        return self.backbone.path

    def encode(self, prompt: Prompt, *, reserve: int = 0) -> list[int]:
        """Token ids of a prompt, or of a chat's messages; `reserve` places of the model's window stay free after it."""
        texts = [prompt] if isinstance(prompt, str) else [str(message.get("content", "")) for message in prompt]
        if not any(text.strip() for text in texts):
            raise ValueError("the prompt is empty; give some text to adapt to and answer.")
        ids = encode_prompt(self.backbone.tokenizer, prompt, chat=self.chat, special_tokens=self.special_tokens)
        ids = self.backbone.check_ids(ids)
        return fit(self.backbone, ids, reserve=reserve, chat=self.chat, truncate=self.truncate)

    def adapt(
        self,
        prompts: Sequence[Prompt] | str,
        *,
        steps: int | None = None,
        rate: RateLike = None,
        init: InitLike = None,
        seed: int = 0,
    ) -> Adaptation:
        """Adapt to each prompt alone: `steps` gradient steps on its own NLL. Rows never touch each other.

        `steps`: by default those that the rate was validated at; none without a rate. Where nothing is named, the
        adapters of the generator that ships for the model's prompts, if there is one.
        """
        made = self._adapt(checked_prompts(prompts), steps=steps, rate=rate, init=init, seed=seed)
        return made if made.reach == "answer" else replace(made, cached={})  # it may be kept for long

    def adapt_together(
        self, prompts: Sequence[Prompt] | str, *, steps: int | None = None, rate: RateLike = None, seed: int = 0
    ) -> SharedAdapter:
        """One adapter for prompts of a kind: `steps` steps on the mean of their NLLs, at the mean of their rates.

        The result is an init for other prompts (`init=`), and exports to PEFT. It starts where the first prompt's would.
        No gate applies: gates are calibrated for one prompt's adapter. Memory does not grow with the number of prompts.
        ValueError for no step, a prompt of one token, a generated start, and a step that is not finite.
        """
        texts, rule = checked_prompts(prompts), self._rate(rate) if rate is not None else self.rate
        steps = steps_of(rule, steps)
        if not steps or rule is None:
            raise ValueError(f"steps is {steps}: a shared adapter needs 1 or more, and a rate; give steps= and rate=.")
        ids = [self.encode(p) for p in texts]
        reach: Reach = self.reach or reach_of(self.init, rule)
        with self.backbone.lock:
            return shared_adapter(
                self.backbone, ids, self._batches(ids), self.init, rule, steps, seed=seed, reach=reach
            )

    def _adapt(
        self,
        prompts: tuple[Prompt, ...],
        *,
        steps: int | None,
        seed: int,
        rate: RateLike = None,
        init: InitLike = None,
    ) -> Adaptation:
        """Besides the adapters it holds what the base model made of the prompts: a prefill need not run that again."""
        start_from, rule, steps = self._asked(init, rate, steps)
        reach: Reach = self.reach or reach_of(start_from, rule)
        start = time.perf_counter()
        ids = [self.encode(p) for p in prompts]
        shares, parts = [self.backbone.share(rows) for rows in self._batches(ids)], list[Adaptation]()
        with self.backbone.lock:
            self.backbone.check_same("prompts or arguments", (ids, steps, seed, reach))
            for share in shares:
                batch = pad([ids[i] for i in share.own], pad_id=self.backbone.pad_id).to(self.backbone.device)
                part, _ = adapt_from(self.backbone, batch, start_from, [seed] * len(share.own), rule, steps, reach)
                if reach == "answer":
                    part = part.with_reading(whole_reading(self.backbone, batch, part.reading))
                parts.append(part)
        made = Adaptation.joined(parts, shares)
        moved = rule.made_for if rule is not None and steps else None
        facts = zip(made.fallback_B.tolist(), made.abstained_B.tolist(), ids, strict=True)
        return replace(
            made,
            prompts=prompts,
            left=tuple(left_alone(fell_back=f, tokens=len(i), steps=steps, abstained=a) for f, a, i in facts),
            remarks=(told(*(beyond(m, self.format, self.reach) for m in (moved, start_from.made_for))),) * len(prompts),
            started=start_from.label is not None and gate_of(rule, reach, start_from, steps) is None,
            seconds=time.perf_counter() - start,
            base_model=os.path.abspath(self.path) if self.path.exists() else str(self.path),
            reach=reach,
            whole_loss=rule is None or rule.objective.describe() is None,
        )

    def _asked(self, init: InitLike, rate: RateLike, steps: int | None) -> tuple[Init, Rate | None, int]:
        """Start, rate and steps, as asked for or by default."""
        if self.unasked is not None and init is None and rate is None and steps is None:
            return self.unasked, None, 0
        rule = self._rate(rate) if rate is not None else self.rate
        return self.init if init is None else self._init(init), rule, steps_of(rule, steps)

    def answer_nll(
        self, prompts: Sequence[Prompt] | str, answers: Sequence[str] | str, adaptation: Adaptation | None = None
    ) -> Tensor:
        """Mean NLL [B] in nats over each row's answer tokens, no end token, under its adapter (or none)."""
        prompts = checked_prompts(prompts)
        answers = (answers,) if isinstance(answers, str) else tuple(answers)
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; give one answer per prompt.")
        ids = [self.encode_answer(p, a) for p, a in zip(prompts, answers, strict=True)]
        out = torch.zeros(len(prompts))
        with self.backbone.lock:
            for share, read in self._prefills(prompts, adaptation, reserve=[len(i) for i in ids]):
                out[share.order] = share.all_rows(read.answer_nll([ids[i] for i in share.own])).float().cpu()
        return out

    def prompt_nll(self, prompts: Sequence[Prompt] | str, adaptation: Adaptation) -> Tensor | None:
        """Prompt NLL [B] in nats per token that the steps left: one more reading. A training loss, not a result.

        None where there is none to compare: no step, an early exit's loss, or reach "answer".
        """
        if not adaptation.leaves_a_loss:
            return None
        prompts = checked_prompts(prompts)
        out = torch.zeros(len(prompts))
        with self.backbone.lock:
            for share, read in self._prefills(prompts, adaptation, reserve=[0] * len(prompts)):
                out[share.order] = share.all_rows(read.prompt_nll()).float().cpu()
        return out

    def generate(
        self,
        prompts: Sequence[Prompt] | str,
        *,
        steps: int | None = None,
        adaptation: Adaptation | None = None,
        rate: RateLike = None,
        seed: int = 0,
        max_new_tokens: int = 64,
        **kwargs: Any,
    ) -> list[str]:
        """Adapt, answer, forget: the new text of each prompt.

        `steps`: by default those that the rate was validated at; none without a rate. Greedy unless `do_sample=True`;
        further keywords go to transformers' `generate`. With `adaptation`, its adapters are used and no step is taken.
        """
        prompts = self._with_room(prompts, max_new_tokens)
        if adaptation is None:
            adaptation = self._adapt(prompts, steps=steps, rate=rate, seed=seed)
        elif steps is not None:
            raise ValueError("give steps or adaptation, not both: an adaptation has already taken its steps.")
        return self._generate(prompts, adaptation, max_new_tokens, losses=False, **kwargs)[0]

    def reply(
        self, prompts: Sequence[Prompt] | str, *, steps: int | None = None, seed: int = 0, max_new_tokens: int = 64
    ) -> tuple[list[str], Adaptation]:
        """`generate`, greedy, with the adaptation, whose notes also say where the steps did not lower a prompt's loss."""
        prompts = self._with_room(prompts, max_new_tokens)
        adaptation = self._adapt(prompts, steps=steps, seed=seed)
        texts, left_B = self._generate(prompts, adaptation, max_new_tokens, losses=True)
        return texts, adaptation.after_reading(left_B)

    def _with_room(self, prompts: Sequence[Prompt] | str, max_new_tokens: int) -> tuple[Prompt, ...]:
        """The prompts, checked before any step is taken: is there room for an answer?"""
        for prompt in checked_prompts(prompts):
            self.encode(prompt, reserve=max_new_tokens)
        return checked_prompts(prompts)

    def _generate(
        self, prompts: Sequence[Prompt], adaptation: Adaptation, new: int, *, losses: bool, **kwargs: Any
    ) -> tuple[list[str], list[float] | None]:
        """Answers; with `losses` also the prompts' own under their adapters, where those act on the prompts."""
        repeats = kwargs.get("num_return_sequences") or 1
        texts, left_B = [""] * (len(prompts) * repeats), [math.nan] * len(prompts)
        losses = losses and adaptation.leaves_a_loss
        with self.backbone.lock:
            for share, read in self._prefills(prompts, adaptation, [new] * len(prompts)):
                ids = read.generate(max_new_tokens=new, **kwargs)
                said = self.backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)
                nll_B = read.prompt_nll().tolist() if losses else [math.nan] * len(share.own)
                own = [(said[n * repeats : (n + 1) * repeats], nll) for n, nll in enumerate(nll_B)]
                for i, (answers, nll) in zip(share.order, share.all_values(own), strict=True):
                    texts[i * repeats : (i + 1) * repeats] = answers
                    left_B[i] = nll
        return texts, left_B if losses else None

    def encode_answer(self, prompt: Prompt, answer: str) -> list[int]:
        """Token ids of an answer as it continues a prompt."""
        if not answer.strip():
            raise ValueError(f"the answer to {prompt[-40:]!r} is empty; there is nothing to score.")
        ids = encode_answer(self.backbone.tokenizer, prompt, answer, chat=self.chat, special_tokens=self.special_tokens)
        return self.backbone.check_ids(ids)

    def _prefills(self, prompts: Sequence[Prompt], adaptation: Adaptation | None, reserve: Sequence[int]):
        """(Share, Prefill of its own rows) of all prompts, in batches of similar length."""
        if adaptation is not None and adaptation.prompts != tuple(prompts):
            raise ValueError(
                "the adaptation was made for other prompts; pass the same prompts, in the same order "
                f"(it holds {len(adaptation.prompts)}, given were {len(prompts)})."
            )
        ids = [self.encode(p, reserve=room) for p, room in zip(prompts, reserve, strict=True)]
        self.backbone.check_same("prompts", ids)
        for rows in self._batches(ids):
            share = self.backbone.share(rows)
            batch = pad([ids[i] for i in share.own], pad_id=self.backbone.pad_id).to(self.backbone.device)
            read = None if adaptation is None else adaptation.read(self.backbone, batch, share.own)
            yield share, prefill(self.backbone, batch, None) if read is None else read

    def _batches(self, ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Row indices of batches of similar length, as large as this device likes them."""
        most = batch_tokens(self.backbone.device)
        return length_batches([len(i) for i in ids], batch_size=BATCH_SIZE, max_tokens=most)

    def _init(self, init: InitLike) -> Init:
        return load_init(init).placed(self.backbone)

    def _rate(self, rate: RateLike) -> Rate | None:
        if rate == "none":
            return None
        rule = load_rate(rate) if isinstance(rate, str | Path | float | int) else rate
        return None if rule is None else place_rate(rule, self.backbone)
