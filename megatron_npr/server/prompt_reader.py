"""Prompts and conversations as token ids, off the event loop: a long text takes longer than a step of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jinja2 import TemplateError

from megatron_npr.server.http.errors import ApiError
from megatron_npr.server.schema import CompletionRequest, Message

Result = TypeVar("Result")


class PromptReader:
    """Owns the tokenizer, which one thread at a time may use."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = asyncio.Lock()

    async def completion(self, request: CompletionRequest) -> list[list[int]]:
        """The ids of each prompt; texts get what the tokenizer puts before a text (BOS)."""
        prompt = request.prompt
        if isinstance(prompt, str):
            return [await self._alone(lambda: list(self._tokenizer.encode(prompt)))]
        texts = [item for item in prompt if isinstance(item, str)]
        if texts:
            return [list(ids) for ids in await self._alone(lambda: self._tokenizer(texts)["input_ids"])]
        numbers = [item for item in prompt if isinstance(item, int)]
        return [numbers] if numbers else [item for item in prompt if isinstance(item, list)]

    async def chat(self, messages: Sequence[Message]) -> list[int]:
        """The conversation in the model's chat template, up to the opening of the assistant's turn."""
        if not self._tokenizer.chat_template:
            raise ApiError(400, "the served model has no chat template: use /v1/completions")
        turns = [{"role": message.role, "content": message.text} for message in messages]
        try:
            return await self._alone(lambda: self._chat(turns))
        except TemplateError as error:
            raise ApiError(
                400, f"messages: the model's chat template refuses them: {error}", param="messages"
            ) from None

    def _chat(self, turns: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    async def _alone(self, work: Callable[[], Result]) -> Result:
        async with self._lock:
            return await asyncio.to_thread(work)
