"""Train a ScaleNet on rows of your own, and adapt with it.

pip install '.[train]'
python examples/train_a_rate.py examples/prompts.jsonl --output runs/example

The defaults show that training runs, within minutes on two cores. A useful network needs hundreds of rows at least.
"""

import argparse

from ephemera import AdaptiveLM
from ephemera.config import TrainScaleNet, load_config
from ephemera.training.scalenet import train_scalenet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("--output", default="runs/example")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    asked = parser.parse_args()

    settings = load_config(
        TrainScaleNet,
        overrides=[
            f"output={asked.output}",
            f"model.name={asked.model}",
            *(f"{part}.{key}" for part in ("train", "validation") for key in ("task=own", f"source={asked.rows}")),
            "validation.limit=4",
            "scalenet.reach=answer",  # with one step: each prompt is prepared once
            "scalenet.max_steps=1",
            "scalenet.base_rates=[2.0]",
            "validation_steps=[1]",
            "validate_every=4",
            "optimizer.batch_size=4",
            "optimizer.passes=2",
            f"optimizer.samples={asked.samples}",
        ],
    )
    folder = train_scalenet(settings)  # the card beside the network holds the validation NLL

    lm = AdaptiveLM.from_pretrained(asked.model, rate=folder)
    made = lm.adapt("Name the capital of Norway.")
    print(f"{folder}: rates from {made.rates_BKM.min():.3g} to {made.rates_BKM.max():.3g}")


if __name__ == "__main__":
    main()
