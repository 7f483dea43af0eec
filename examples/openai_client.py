"""Ask a running server through OpenAI's client: the model itself, and a method that adapts.

ephemera serve                      # in another terminal
pip install openai
python examples/openai_client.py "Who wrote Hamlet?"
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="-", help="one of the server's keys, if it has any")
    parser.add_argument("--max-tokens", type=int, default=32)
    asked = parser.parse_args()

    client = OpenAI(base_url=asked.base_url, api_key=asked.api_key)
    for model in client.models.list().data[:2]:  # the model itself, and the first method that adapts
        answer = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": asked.prompt}],
            max_tokens=asked.max_tokens,
            temperature=0,
            extra_body={"adapt": {"trace": True}},
        )
        told = (answer.model_extra or {})["ephemera"]
        print(f"{model.id} ({told['method']}, {told['steps_taken']} steps): {answer.choices[0].message.content}")
        if told["note"]:
            print(f"note: {told['note']}")


if __name__ == "__main__":
    main()
