"""Commands that train: rates, their gate, a lens, the generator, the task-LoRA baseline."""

from __future__ import annotations

from ephemera.cli.options import ConfigFile, PrintConfig, Resume, SetOption, settled, train_app


@train_app.command(
    "scalenet",
    epilog="""Examples:

    ephemera train scalenet --config configs/scalenet-nq-open.yaml

    ephemera train scalenet --set train.task=squad --set train.source=data/squad --set optimizer.samples=2000

    ephemera train scalenet --config configs/smoke.yaml --resume

    accelerate launch -m ephemera train scalenet --config configs/scalenet-nq-open.yaml""",
)
def train_scalenet_command(
    config: ConfigFile = None, set_: SetOption = None, print_config: PrintConfig = False, resume: Resume = False
) -> None:
    """Train ScaleNet, layer-wise or step-wise, by the first-order meta-gradient of the answers' NLL.

    Settings and their meaning: `--print-config`, and docs/reference/configuration.md."""
    from ephemera.config import TrainScaleNet

    settings = settled(TrainScaleNet, config, set_, print_config=print_config)
    from ephemera.training.scalenet import train_scalenet

    print(train_scalenet(settings, resume=resume))


@train_app.command(
    "lens",
    epilog="""Examples:

    ephemera train lens --config configs/lens.yaml

    ephemera train lens --set "exit_layers=[6, 8, 10]" --set train.source=data/nq_open --set optimizer.samples=1000

    ephemera train lens --config configs/lens.yaml --resume""",
)
def train_lens_command(
    config: ConfigFile = None, set_: SetOption = None, print_config: PrintConfig = False, resume: Resume = False
) -> None:
    """Train a tuned lens: from earlier layers to the last one's next-token distribution, on unlabelled prompts."""
    from ephemera.config import TrainLens

    settings = settled(TrainLens, config, set_, print_config=print_config)
    from ephemera.training.lens import train_lens

    print(train_lens(settings, resume=resume))


@train_app.command(
    "generator",
    epilog="""Examples:

    ephemera train generator --config configs/taskweaver.yaml

    ephemera train generator --set "train.tasks=[{task: snli, weight: 2}, {task: boolq}]" --set optimizer.samples=2000

    ephemera train generator --config configs/taskweaver.yaml --resume""",
)
def train_generator_command(
    config: ConfigFile = None, set_: SetOption = None, print_config: PrintConfig = False, resume: Resume = False
) -> None:
    """Train a generator of adapters end to end through the frozen model; with `scalenet` settings, both together."""
    from ephemera.config import TrainGenerator

    settings = settled(TrainGenerator, config, set_, print_config=print_config)
    from ephemera.training.generator import train_generator

    print(train_generator(settings, resume=resume))


@train_app.command(
    "lora",
    epilog="""Examples:

    ephemera train lora --set "train.tasks=[{task: snli}]" --set "validation.tasks=[{task: snli}]"

    ephemera train lora --set output=runs/task-lora/mixed --set optimizer.learning_rate=5e-4""",
)
def train_lora_command(
    config: ConfigFile = None, set_: SetOption = None, print_config: PrintConfig = False, resume: Resume = False
) -> None:
    """Train the baseline through PEFT: one adapter for a task, or for a mixture of tasks."""
    from ephemera.config import TrainTaskLora

    settings = settled(TrainTaskLora, config, set_, print_config=print_config)
    from ephemera.training.task_lora import train_task_lora

    print(train_task_lora(settings, resume=resume))


@train_app.command(
    "gate",
    epilog="""Examples:

    ephemera train gate --config configs/universal-gate.yaml

    ephemera train gate --set network=runs/mine/network --set data.task=squad --set data.source=data/squad""",
)
def train_gate_command(config: ConfigFile = None, set_: SetOption = None, print_config: PrintConfig = False) -> None:
    """Calibrate when a network leaves a prompt alone, so that at most a chosen share of prompts is harmed."""
    from ephemera.config import TrainGate

    settings = settled(TrainGate, config, set_, print_config=print_config)
    from ephemera.training.gate import train_gate

    print(train_gate(settings))
