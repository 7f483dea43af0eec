"""Compare base and adapted NLL of expected answers, on rows of your own.

python examples/compare.py examples/prompts.jsonl
python examples/compare.py mine.jsonl --rate runs/mine/network

A row is {"prompt": ..., "answer": ...}. `ephemera survey` does the same with intervals and controls.
"""

import argparse
import json
from pathlib import Path

from ephemera import AdaptiveLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--rate", help="a number or a network's name (default: what ships for chats)")
    parser.add_argument("--limit", type=int, help="only so many of the last rows")
    asked = parser.parse_args()

    rows = [json.loads(line) for line in asked.rows.read_text(encoding="utf-8").splitlines()]
    rows = rows[-asked.limit :] if asked.limit else rows
    prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]

    lm = AdaptiveLM.from_pretrained("smollm2-135m-instruct", rate=asked.rate, chat=True)
    base_B = lm.answer_nll(prompts, answers)
    change_B = lm.answer_nll(prompts, answers, adaptation=lm.adapt(prompts)) - base_B
    for base, change, prompt in zip(base_B.tolist(), change_B.tolist(), prompts, strict=True):
        print(f"{base:.3f} {change:+.3f}  {prompt.strip().splitlines()[-1][:80]}")
    harmed = (change_B > 0.05).float().mean()
    print(f"mean {base_B.mean():.3f} {change_B.mean():+.3f}; {harmed:.0%} of {len(rows)} rows rose by more than 0.05")


if __name__ == "__main__":
    main()
