"""Adapt to one prompt, and look at what was done.

python examples/adapt_one_prompt.py "Who wrote Hamlet?"            # an adapter that a generator makes
python examples/adapt_one_prompt.py --steps 1 "Who wrote Hamlet?"  # a gradient step on the prompt
python examples/adapt_one_prompt.py --rate 0.5 --steps 2 "Name the capital of Norway."
"""

import argparse

from ephemera import AdaptiveLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--rate", help="a number or a network's name (default: what ships for chats)")
    parser.add_argument(
        "--steps", type=int, help="gradient steps (default: a generated adapter; with --rate as it was validated)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32)
    asked = parser.parse_args()

    lm = AdaptiveLM.from_pretrained("smollm2-135m-instruct", rate=asked.rate, chat=True)
    made = lm.adapt(asked.prompt, steps=asked.steps)
    for k, (nll, rates_M) in enumerate(zip(made.prompt_nll_BK[0], made.rates_BKM[0], strict=True), 1):
        print(f"step {k}: saw the prompt at {nll:.3f} nats per token, mean rate {rates_M.mean():.3g}")
    if made.share_B is not None:
        print(f"the gate keeps {made.share_B[0]:.3g} of the adapter")
    if made.notes[0]:
        print(f"note: {made.notes[0]}")
    print("base:   ", lm.generate(asked.prompt, steps=0, max_new_tokens=asked.max_new_tokens)[0])
    print("adapted:", lm.generate(asked.prompt, adaptation=made, max_new_tokens=asked.max_new_tokens)[0])


if __name__ == "__main__":
    main()
