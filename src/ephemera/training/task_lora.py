"""The baseline: one LoRA adapter for a task, or for a mixture of tasks, trained through PEFT (TaskWeaver 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ephemera.batch import last_tokens, pad
from ephemera.config import TrainTaskLora
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.processes import dealt, of_all
from ephemera.saving import whole_folder
from ephemera.scoring import Encoded, batches_of
from ephemera.training.loop import Schedule, train
from ephemera.training.mixture import mix, task_rows
from ephemera.training.run import begin, kept_settings, open_run

VALIDATION_BATCH = 8


class AdapterWeights(nn.Module):
    """The trainable parameters of a PEFT model alone: what the loop optimises and checkpoints."""

    def __init__(self, model: PeftModel):
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)  # pyright: ignore[reportArgumentType]


class TaskLoraTrainee:
    """PEFT's model under `loop.train`, on the answers' NLL: mean over a row's answer tokens, then over rows."""

    def __init__(self, backbone: FrozenLM, model: PeftModel, *, validation: dict[str, list[Encoded]]):
        self.backbone = backbone
        self.network = AdapterWeights(model)
        self.validation = validation

    @property
    def learning_rates(self) -> dict[str, float]:
        return {"": 1.0}

    def backward(self, rows: Sequence[Encoded], step: int) -> dict[str, float]:
        with torch.enable_grad():
            nll_B = self._nll(rows)
            nll_B.mean().backward()
        return {"nll": nll_B.mean().item()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        report, every = {}, []
        for task, rows in self.validation.items():
            groups = dealt(batches_of(self.backbone, rows, VALIDATION_BATCH))
            nll_N = torch.cat(of_all([self._nll(some).cpu() for some in groups]))
            report[f"validation_nll_{task}"] = nll_N.mean().item()
            every.append(nll_N)
        return {**report, "validation_nll": torch.cat(every).mean().item()}

    def _nll(self, rows: Sequence[Encoded]) -> Tensor:
        # PEFT has put its layers into the backbone's own modules: the backbone's forward runs them.
        batch = pad([r.prompt + r.answer for r in rows], pad_id=self.backbone.pad_id).to(self.backbone.device)
        answers = last_tokens(batch, [len(r.answer) for r in rows])
        return self.backbone.mean_nll(self.backbone.forward(batch).hidden_BTD, batch, tokens=answers)


def train_task_lora(config: TrainTaskLora, *, resume: bool = False) -> Path:
    """`ephemera train lora`: returns the folder of the adapter, `<output>/adapter`, in PEFT's format."""
    torch.manual_seed(config.optimizer.seed)
    folder = Path(config.output)
    lora = config.model.lora
    accelerator, backbone = open_run(config, folder, target_modules=lora.target_modules)
    kept = kept_settings(config, folder) if resume else None
    config = kept or config.model_copy(deep=True)
    by_task, validation = task_rows(backbone, config.train), task_rows(backbone, config.validation)
    rows = mix(by_task, config.train, config.optimizer.samples)
    if config.train.stop != "samples":
        config.optimizer.samples = len(rows)
    modules = sorted({p.module.rpartition(".")[2] for p in backbone.projections})
    settings = LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=modules, task_type="CAUSAL_LM")  # pyright: ignore[reportArgumentType]
    settings.base_model_name_or_path = config.model.name
    model = get_peft_model(backbone.model, settings, autocast_adapter_dtype=True)  # adapters in float32
    assert isinstance(model, PeftModel)
    if kept is None:  # after everything that can be wrong: it clears an older run
        begin(config, folder, accelerator)
    trainee = TaskLoraTrainee(backbone, model, validation=validation)
    schedule = Schedule(config.checkpoint_every, config.validate_every)
    train(trainee, rows, config.optimizer, schedule, folder, accelerator, resume=resume)
    if accelerator.is_main_process:
        with whole_folder(folder / "adapter") as scratch:
            model.save_pretrained(str(scratch))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder / "adapter"
