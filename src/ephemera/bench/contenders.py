"""What is compared: ephemera's batched adaptation, and PEFT with torch.optim.SGD one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from ephemera.adapt import adapt
from ephemera.batch import batch_tokens, length_batches, pad
from ephemera.bench.prompts import examples
from ephemera.fast.rms_norm import fast_norms
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.tokenize import encode_answer, encode_prompt
from ephemera.lora import LoraBatch
from ephemera.rates import FixedRate
from ephemera.scoring import Encoded

RATE = 5e-2  # LDTTA's fixed baseline: bold enough that adapters move, mild enough for many steps
INIT = ZeroInit(r=4, lora_alpha=16.0)


def encoded(backbone: FrozenLM, length: str, batch: int) -> list[Encoded]:
    """The benchmark's prompts as token ids, cut to the model's window."""
    return [
        Encoded(
            e.id,
            encode_prompt(backbone.tokenizer, e.prompt)[: backbone.max_length],
            encode_answer(backbone.tokenizer, e.prompt, e.answer),
        )
        for e in examples(length, batch)
    ]


def initial_lora(backbone: FrozenLM, prompts: Sequence[Sequence[int]]) -> LoraBatch:
    """What `adapt_batched` starts from, for another contender to start from as well."""
    return INIT(backbone, pad(prompts, pad_id=backbone.pad_id).to(backbone.device), [0] * len(prompts))


def adapt_batched(backbone: FrozenLM, prompts: Sequence[Sequence[int]], steps: int) -> LoraBatch:
    """As `AdaptiveLM.adapt` does it: batches by length, padding, init, K steps. Rows in the order given."""
    batches = length_batches(
        [len(ids) for ids in prompts], batch_size=len(prompts), max_tokens=batch_tokens(backbone.device)
    )
    adapted = []
    for rows in batches:
        batch = pad([prompts[i] for i in rows], pad_id=backbone.pad_id).to(backbone.device)
        lora = INIT(backbone, batch, [0] * len(rows))
        adapted.append(adapt(backbone, batch, lora, FixedRate(RATE), steps).lora)
    return LoraBatch.cat(adapted).rows(torch.tensor([i for rows in batches for i in rows]).argsort())


class PeftLoop:
    """Plain PEFT: transformers' own loss, its default attention, one prompt at a time; adapter weights in float32, in a float64
    model in float64."""

    def __init__(self, backbone: FrozenLM):
        path, file = backbone.path, {}
        if path.is_file():
            path, file = path.parent, {"gguf_file": path.name}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=backbone.dtype, **file)
        if backbone.dtype == torch.float64:
            for parent, name, norm in fast_norms(model):  # transformers' own go through float32
                setattr(parent, name, norm)
        config = peft.LoraConfig(
            r=INIT.r,
            lora_alpha=int(INIT.lora_alpha),
            target_modules=sorted({p.module.rpartition(".")[2] for p in backbone.projections}),
            task_type="CAUSAL_LM",
        )
        self.device = backbone.device
        self.model = peft.get_peft_model(model.eval(), config).eval().to(self.device)  # pyright: ignore[reportArgumentType]
        self.parameters = [
            self.model.get_parameter(f"base_model.model.{p.module}.lora_{matrix}.default.weight")
            for matrix in "AB"
            for p in backbone.projections
        ]

    def adapt(self, ids: Sequence[int], initial: Sequence[Tensor], steps: int) -> list[Tensor]:
        """One prompt's final A's, then B's, from its initial ones."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, initial, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.SGD(self.parameters, lr=RATE)
        input_ids = torch.tensor([ids], device=self.device)
        for _ in range(steps):
            optimizer.zero_grad()
            self._loss(input_ids).backward()
            optimizer.step()
        return [p.detach().clone() for p in self.parameters]

    def _loss(self, input_ids: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, labels=input_ids, use_cache=False)
        if output.logits.dtype == torch.float64:  # transformers' own loss goes through float32
            return F.cross_entropy(output.logits[0, :-1], input_ids[0, 1:])
        return output.loss

    def adapt_all(self, prompts: Sequence[Sequence[int]], initial: LoraBatch, steps: int) -> list[list[Tensor]]:
        starts = [[t[row] for t in initial.tensors] for row in range(len(prompts))]
        return [self.adapt(ids, start, steps) for ids, start in zip(prompts, starts, strict=True)]


def max_relative_difference(lora: LoraBatch, rows: Sequence[Sequence[Tensor]]) -> float:
    """Over all rows and matrices: the largest difference of an entry, by the largest entry of its matrix."""
    worst = 0.0
    for place, tensor in enumerate(lora.tensors):
        want = torch.stack([row[place] for row in rows]).to(tensor)
        difference_B = (tensor - want).abs().flatten(1).amax(1) / want.abs().flatten(1).amax(1)
        worst = max(worst, difference_B.nan_to_num(nan=torch.inf).max().item())
    return worst
