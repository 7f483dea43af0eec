"""Export one prompt's adapter, and open it in PEFT: both give the same logits.

pip install '.[train]'   # brings PEFT
python examples/export_peft.py adapter
"""

import argparse

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ephemera import AdaptiveLM

PROMPT = "Question: who wrote Hamlet? Answer:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    asked = parser.parse_args()

    # Reach "all": a plain LoRA acts on every token
    lm = AdaptiveLM.from_pretrained("smollm2-135m-instruct", rate=1.0, reach="all")
    made = lm.adapt(PROMPT, steps=1)
    folder = made.export_peft(asked.folder, row=0)

    base = AutoModelForCausalLM.from_pretrained(lm.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    ids_BT = torch.tensor([lm.encode(PROMPT) + lm.encode_answer(PROMPT, "William Shakespeare")])
    with torch.no_grad():
        logits_BTV = model(ids_BT).logits
    start = len(lm.encode(PROMPT))
    log_p_TV = logits_BTV[0, start - 1 : -1].log_softmax(-1)
    peft_nll = -log_p_TV.gather(1, ids_BT[0, start:, None]).mean().item()
    ours = lm.answer_nll(PROMPT, "William Shakespeare", adaptation=made).item()
    print(f"answer NLL: ours {ours:.5f}, PEFT's {peft_nll:.5f}; the adapter is in {folder}")
    assert abs(ours - peft_nll) < 1e-3


if __name__ == "__main__":
    main()
