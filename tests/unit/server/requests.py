"""What the tests of the server ask for, and how they read an answer."""

from __future__ import annotations

import json
from typing import Any

import httpx

QUESTION = "Sort by cost: pen=59*6, cup=13*5, map=43*6\nWork in parallel"
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
CHAT = {"messages": MESSAGES, "seed": 3, "temperature": 0.7, "max_tokens": 300}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of each event of a stream that ends as OpenAI's do; AssertionError where it does not."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
