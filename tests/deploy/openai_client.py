"""One chat through the openai package, which has an environment of its own: prints the pieces as JSON lines.

python openai_client.py BASE_URL MODEL PROMPT MAX_TOKENS [LEAVE_AFTER]
"""

from __future__ import annotations

import json
import sys

import openai


def main() -> None:
    base_url, model, prompt, max_tokens, *leave = sys.argv[1:]
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=int(max_tokens),
        temperature=0,
        stream=True,
    )
    for count, chunk in enumerate(stream):
        for choice in chunk.choices:
            sys.stdout.write(json.dumps({"text": choice.delta.content or "", "finish": choice.finish_reason}) + "\n")
            sys.stdout.flush()
        if leave and count >= int(leave[0]):
            stream.close()
            return


if __name__ == "__main__":
    main()
